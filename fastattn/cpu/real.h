/* Vectors, elementary functions and the matrix micro-kernel in one accumulator type. Included twice: with REAL_BITS 32 (float32,
 * float16 and bfloat16 tensors) and 64. name(x) becomes x_f32 or x_f64. Layouts of a tile:
 *   rows     [n][ld]             row-major, ld = head_dim rounded up to a vector, zero padded
 *   columns  [n / CB][head_dim][CB]   transposed in blocks of CB = TILE_VECTORS vectors of keys: the B operand of S = Q K^T
 *   scores   [PANEL_ROWS][BLOCK_N]    one panel of S, then P in its place; 6 KiB of float stay in L1 */
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#if REAL_BITS == 32
#define REAL float
#define INT int32_t
#define name(x) CAT(x, _f32)
#define DT_REAL DT_F32
#else
#define REAL double
#define INT int64_t
#define name(x) CAT(x, _f64)
#define DT_REAL DT_F64
#endif
#define VL ((long)(VBYTES / sizeof(REAL)))
#define CB (TILE_VECTORS * VL)

typedef REAL name(vec) __attribute__((vector_size(VBYTES), aligned(1), may_alias));
typedef INT name(ivec) __attribute__((vector_size(VBYTES), aligned(1), may_alias));
#define vec name(vec)
#define ivec name(ivec)
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))

/* ------------------------------------------------------------------ vectors */
ALWAYS_INLINE vec name(splat)(REAL x) { return x - (vec){0}; }
#define SPLAT(x) name(splat)(x)
ALWAYS_INLINE vec name(choose)(ivec where, vec a, vec b) { return (vec)(((ivec)a & where) | ((ivec)b & ~where)); }
/* x as it is: keeps the compiler from fusing the product x into an addition, so that it is rounded */
ALWAYS_INLINE vec name(rounded)(vec x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}
/* a b - c with one rounding, if the level has the instruction (FUSES). An intrinsic, because lse depends on the fusion. */
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define FUSES 1
ALWAYS_INLINE vec name(multiply_subtract)(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return REAL_BITS == 32 ? (vec)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c) : (vec)_mm512_fmsub_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  return REAL_BITS == 32 ? (vec)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c) : (vec)_mm256_fmsub_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
}
#else
#define FUSES 0
#endif
/* max(a, b); b when a is NaN or both are */
ALWAYS_INLINE vec name(vmax)(vec a, vec b) {
#if defined(__AVX512F__)
  return REAL_BITS == 32 ? (vec)_mm512_max_ps((__m512)a, (__m512)b) : (vec)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return REAL_BITS == 32 ? (vec)_mm256_max_ps((__m256)a, (__m256)b) : (vec)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return name(choose)((ivec)(a > b), a, b);
#endif
}
#define VMAX(a, b) name(vmax)(a, b)
ALWAYS_INLINE REAL name(reduce_max)(vec v) {
#if defined(__AVX512F__)
  return REAL_BITS == 32 ? (REAL)_mm512_reduce_max_ps((__m512)v) : (REAL)_mm512_reduce_max_pd((__m512d)v);
#else
  REAL m = v[0];
  for (long i = 1; i < VL; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}
ALWAYS_INLINE REAL name(reduce_add)(vec v) {
#if defined(__AVX512F__)
  return REAL_BITS == 32 ? (REAL)_mm512_reduce_add_ps((__m512)v) : (REAL)_mm512_reduce_add_pd((__m512d)v);
#else
  for (long w = VL / 2; w > 0; w /= 2)
    for (long i = 0; i < w; i++) v[i] += v[i + w];
  return v[0];
#endif
}
#if REAL_BITS == 32
/* 2^f, f in [-1/2, 1/2] */
ALWAYS_INLINE vec name(power_of_fraction)(vec f) {
  vec p = SPLAT(0.00015345812158740182f);
  p = p * f + SPLAT(0.001339993120947414f);
  p = p * f + SPLAT(0.0096184889565227916f);
  p = p * f + SPLAT(0.055503287769976638f);
  p = p * f + SPLAT(0.24022646890639572f);
  p = p * f + SPLAT(0.69314720573725268f);
  p = p * f + SPLAT(1.0000000005541663f);
  return p;
}
#endif
/* 2^x: x = n + f, a polynomial in f (float: degree 6, relative error 2e-9 before rounding; double: the Taylor series to degree 12),
 * then n added to the exponent. With AVX-512 f is in [0, 1), because its scaling instruction floors; otherwise f is in [-1/2, 1/2].
 * Below FLUSH the result is 0: a probability that small does not change a sum that contains the row's largest, and denormals would
 * cost a trap each. NaN stays NaN. */
#define FLUSH (REAL_BITS == 32 ? -100 : -1000)
ALWAYS_INLINE vec name(exp2)(vec x) {
#if defined(__AVX512F__) && REAL_BITS == 32
  vec f = (vec)_mm512_reduce_ps((__m512)x, 9);
  vec p = SPLAT(0.00021702255680520309f);
  p = p * f + SPLAT(0.0012439687747148747f);
  p = p * f + SPLAT(0.0096788410070436725f);
  p = p * f + SPLAT(0.05548334197771016f);
  p = p * f + SPLAT(0.24022983627589422f);
  p = p * f + SPLAT(0.69314698384043869f);
  p = p * f + SPLAT(1.0000000018557977f);
  return (vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(FLUSH), _CMP_NLT_UQ), (__m512)p, (__m512)x);
#else
  const REAL magic = REAL_BITS == 32 ? (REAL)12582912.0 : (REAL)6755399441055744.0; /* 1.5 * 2^mantissa: adding it rounds */
  ivec under = (ivec)(x < SPLAT(FLUSH)), over = (ivec)(x >= SPLAT(REAL_BITS == 32 ? 128 : 1024));
  x = VMAX(SPLAT(FLUSH), x);
  vec t = x + SPLAT(magic), f = x - (t - SPLAT(magic));
#if REAL_BITS == 32
  vec p = name(power_of_fraction)(f);
#else
  static const double c[13] = {1.0, 0.69314718055994531, 0.24022650695910072, 0.055504108664821580, 0.0096181291076284772,
                               0.0013333558146428443, 0.00015403530393381610, 1.5252733804059840e-5, 1.3215486790144309e-6,
                               1.0178086009239699e-7, 7.0549116208011233e-9, 4.4455382718708116e-10, 2.5678435993488205e-11};
  vec p = SPLAT(c[12]);
  for (int i = 11; i >= 0; i--) p = p * f + SPLAT(c[i]);
#endif
  const int mantissa = REAL_BITS == 32 ? 23 : 52;
  vec r = (vec)((ivec)p + ((ivec)t << mantissa));
  r = name(choose)(under, (vec){0}, r);
  return name(choose)(over, SPLAT((REAL)INFINITY), r);
#endif
}
/* tanh; NaN stays NaN.
 * float: x P(x^2) / Q(x^2) with degrees 6 and 3, a minimax fit of the relative error on [0, 8.6]. At 8.6 tanh is 1 to the last bit.
 * At most 2.5 ulp off, 0.5 rms. With AVX-512 the division is a 14-bit reciprocal and a Newton step: a 64-byte division takes 16 cycles.
 * double: a rational function below 0.625 (Cephes), else 1 - 2 / (e^2|x| + 1) with the sign of x. */
ALWAYS_INLINE vec name(tanh)(vec x) {
#if REAL_BITS == 32
#if defined(__AVX512F__)
  x = (vec)_mm512_min_ps(_mm512_set1_ps(8.6f), (__m512)VMAX(SPLAT(-8.6f), x));
#else
  x = -VMAX(SPLAT(-8.6f), -VMAX(SPLAT(-8.6f), x));
#endif
  vec z = x * x, p = SPLAT(-9.6114698773693e-14f), q = SPLAT(0.0002573580713942647f);
  p = p * z + SPLAT(5.694519161769662e-11f);
  p = p * z + SPLAT(-2.1055937438063665e-08f);
  p = p * z + SPLAT(1.135321599576855e-05f);
  p = p * z + SPLAT(0.0031226843129843473f);
  p = p * z + SPLAT(0.13100703060626984f);
  p = p * z + SPLAT(1.0f);
  q = q * z + SPLAT(0.024569522589445114f);
  q = q * z + SPLAT(0.46434032917022705f);
  q = q * z + SPLAT(1.0f);
#if defined(__AVX512F__)
  vec r = (vec)_mm512_rcp14_ps((__m512)q);
  return p * x * (r + r * (SPLAT(1) - q * r));
#else
  return p * x / q;
#endif
#else
  const ivec sign_bit = (ivec)SPLAT((REAL)-0.0);
  ivec sign = (ivec)x & sign_bit;
  vec a = (vec)((ivec)x & ~sign_bit), z = x * x;
  vec large = SPLAT(1) - SPLAT(2) / (name(exp2)(a * SPLAT((REAL)2.8853900817779268)) + SPLAT(1));
  vec p = (SPLAT(-9.64399179425052238628e-1) * z + SPLAT(-9.92877231001918586564e1)) * z + SPLAT(-1.61468768441708447952e3);
  p = p / (((z + SPLAT(1.12811678491632931402e2)) * z + SPLAT(2.23548839060100448583e3)) * z + SPLAT(4.84406305325125486048e3));
  vec small = p * z * x + x;
  return name(choose)((ivec)(a < SPLAT((REAL)0.625)), small, (vec)((ivec)large | sign));
#endif
}

ALWAYS_INLINE int name(any)(ivec where) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)where, (__m512i)where) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)where, (__m256i)where);
#else
  return (((const int64_t *)&where)[0] | ((const int64_t *)&where)[1]) != 0;
#endif
}
/* The derivative of tanh: 1 - t^2 with t = tanh(x). Near t = 1 that cancels down to t's rounding error. So for |x| > 1, which scores
 * under a softcap seldom reach, it is 4 e / (1 + e)^2 with e = exp(-2 |x|). */
ALWAYS_INLINE vec name(slope_of_tanh)(vec x, vec t) {
  const vec size = (vec)((ivec)x & ~(ivec)SPLAT((REAL)-0.0));
  const ivec far = (ivec)(size > SPLAT(1));
  vec slope = SPLAT(1) - t * t;
  if (name(any)(far)) {
    const vec e = name(exp2)(size * SPLAT((REAL)-2.8853900817779268)), d = SPLAT(1) + e;
    slope = name(choose)(far, SPLAT(4) * e / (d * d), slope);
  }
  return slope;
}

/* Load a vector of a tensor in place: elements of `dtype` (constant after inlining), widened to REAL. */
#if REAL_BITS == 32 && defined(__AVX512F__)
#define LOADS_HALF 1
ALWAYS_INLINE vec name(load_as)(const char *p, const int dtype) {
  if (dtype == DT_F16) return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
  if (dtype == DT_BF16) return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
  if (dtype >= DT_E4M3) {
    vec x = (vec)_mm512_cvtph_ps(halves_of_bytes(_mm_loadu_si128((const __m128i *)p), dtype));
    return dtype == DT_E4M3 ? (vec)(x * SPLAT(256)) : x;
  }
  return LOAD((const REAL *)(const void *)p);
}
#elif REAL_BITS == 32 && defined(__AVX2__) && defined(__F16C__)
#define LOADS_HALF 1
ALWAYS_INLINE vec name(load_as)(const char *p, const int dtype) {
  if (dtype == DT_F16) return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
  if (dtype == DT_BF16) return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
  if (dtype >= DT_E4M3) {
    vec x = (vec)_mm256_cvtph_ps(_mm256_castsi256_si128(halves_of_bytes(_mm_loadl_epi64((const __m128i *)p), dtype)));
    return dtype == DT_E4M3 ? (vec)(x * SPLAT(256)) : x;
  }
  return LOAD((const REAL *)(const void *)p);
}
#else
#define LOADS_HALF 0
ALWAYS_INLINE vec name(load_as)(const char *p, const int dtype) {
  (void)dtype;
  return LOAD((const REAL *)(const void *)p);
}
#endif

/* ------------------------------------------------------------------ the matrix micro-kernel
 * C[MR][NV vectors] (+)= A[MR][K] B[K][NV vectors], with the accumulators in registers. They are named variables, because gcc would
 * keep an array in memory. They start at 0 and C is added last: one chain of sums over all tiles would round more. SCALED: nothing is
 * added, and the sums are multiplied by `rescale`. MR, NV, MODE and
 * B's dtype are compile-time constants, so branches on them vanish. Strides of A and C are in elements, of B in bytes. PAGED: rows of B
 * are where `places` says (row_at in simd.h), which reaches AHEAD rows past the last. */
enum { name(ZERO) = 0, name(RESCALE), name(TRANSPOSED_A), name(SCALED), name(IN_PLACE), name(IN_PLACE_F16), name(IN_PLACE_BF16), name(IN_PLACE_E4M3), name(IN_PLACE_E5M2),
       name(PAGED), name(PAGED_F16), name(PAGED_BF16), name(PAGED_E4M3), name(PAGED_E5M2) };
#define IS_PAGED(MODE) ((MODE) >= name(PAGED))
#define IS_MODE(MODE, DTYPE) ((MODE) == name(IN_PLACE_##DTYPE) || (MODE) == name(PAGED_##DTYPE))
#define ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5)
ALWAYS_INLINE void name(product)(const int MR, const int NV, const int MODE, long K, const REAL *A, long lda, const char *B, long ldb,
                                 long distance, const long *places, REAL *C, long ldc, const REAL *rescale) {
  const int dtype = IS_MODE(MODE, F16) ? DT_F16 : IS_MODE(MODE, BF16) ? DT_BF16 : IS_MODE(MODE, E4M3) ? DT_E4M3 : IS_MODE(MODE, E5M2) ? DT_E5M2 : DT_REAL;
  const long step = VL * element_size(dtype);
#define DECLARE(r) vec c##r##0 = {0}, c##r##1 = {0}, c##r##2 = {0}, c##r##3 = {0};
#define STEP(r)                                                                 \
  if (r < MR) {                                                                 \
    vec a = SPLAT(MODE == name(TRANSPOSED_A) ? A[k * lda + r] : A[r * lda + k]); \
    c##r##0 += a * b0;                                                          \
    if (NV > 1) c##r##1 += a * b1;                                              \
    if (NV > 2) c##r##2 += a * b2;                                              \
    if (NV > 3) c##r##3 += a * b3;                                              \
  }
#define ADD(r, n)                                                             \
  if (n < NV) {                                                               \
    if (MODE == name(SCALED)) c##r##n *= s;                                   \
    else if (MODE != name(ZERO)) c##r##n += LOAD(C + r * ldc + n * VL) * s;   \
    STORE(C + r * ldc + n * VL, c##r##n);                                     \
  }
#define FINAL(r)                                                                                      \
  if (r < MR) {                                                                                       \
    vec s = MODE == name(ZERO) || MODE == name(TRANSPOSED_A) ? SPLAT(1) : SPLAT(rescale[r]);          \
    ADD(r, 0)                                                                                         \
    ADD(r, 1)                                                                                         \
    ADD(r, 2)                                                                                         \
    ADD(r, 3)                                                                                         \
  }
  ROWS(DECLARE)
  const char *at = B;
  for (long k = 0; k < K; k++, at += ldb) {
    if (IS_PAGED(MODE)) at = B + places[k];
    const char *ahead = IS_PAGED(MODE) ? B + places[k + AHEAD(ldb)] : at + distance;
    if (MODE >= name(IN_PLACE))
      for (long byte = 0; byte < NV * step; byte += 64) __builtin_prefetch(ahead + byte);
    vec b0 = name(load_as)(at, dtype), b1 = b0, b2 = b0, b3 = b0;
    if (NV > 1) b1 = name(load_as)(at + step, dtype);
    if (NV > 2) b2 = name(load_as)(at + 2 * step, dtype);
    if (NV > 3) b3 = name(load_as)(at + 3 * step, dtype);
    ROWS(STEP)
  }
  ROWS(FINAL)
#undef DECLARE
#undef STEP
#undef FINAL
#undef ADD
}
#undef ROWS
typedef void (*name(product_t))(long, const REAL *, long, const char *, long, long, const long *, REAL *, long, const REAL *);
#define PRODUCT(MODE, MR, NV)                                                                                            \
  static void name(product_##MODE##_##MR##_##NV)(long K, const REAL *A, long lda, const char *B, long ldb,          \
                                                 long distance, const long *places, REAL *C, long ldc, const REAL *rescale) { \
    name(product)(MR, NV, MODE, K, A, lda, B, ldb, distance, places, C, ldc, rescale);                                   \
  }
#if TILE_VECTORS == 4
#define WIDTHS(MODE, MR) PRODUCT(MODE, MR, 1) PRODUCT(MODE, MR, 2) PRODUCT(MODE, MR, 4)
#define ROW_TABLE(MODE, MR) {name(product_##MODE##_##MR##_1), name(product_##MODE##_##MR##_2), name(product_##MODE##_##MR##_4)}
#else
#define WIDTHS(MODE, MR) PRODUCT(MODE, MR, 1) PRODUCT(MODE, MR, 2)
#define ROW_TABLE(MODE, MR) {name(product_##MODE##_##MR##_1), name(product_##MODE##_##MR##_2), 0}
#endif
#define HEIGHTS(MODE) WIDTHS(MODE, 1) WIDTHS(MODE, 2) WIDTHS(MODE, 3) WIDTHS(MODE, 4) WIDTHS(MODE, 5) WIDTHS(MODE, 6)
HEIGHTS(0) HEIGHTS(1) HEIGHTS(2) HEIGHTS(3) HEIGHTS(4) HEIGHTS(9)
#if LOADS_HALF
HEIGHTS(5) HEIGHTS(6) HEIGHTS(7) HEIGHTS(8) HEIGHTS(10) HEIGHTS(11) HEIGHTS(12) HEIGHTS(13)
#endif
#define MODE_TABLE(MODE) {ROW_TABLE(MODE, 1), ROW_TABLE(MODE, 2), ROW_TABLE(MODE, 3), ROW_TABLE(MODE, 4), ROW_TABLE(MODE, 5), ROW_TABLE(MODE, 6)}
#define IN_TABLE(MODE) [MODE] = MODE_TABLE(MODE)
static const name(product_t) name(products)[14][6][3] = {IN_TABLE(0), IN_TABLE(1), IN_TABLE(2), IN_TABLE(3), IN_TABLE(4), IN_TABLE(9),
#if LOADS_HALF
                                                         IN_TABLE(5), IN_TABLE(6), IN_TABLE(7), IN_TABLE(8), IN_TABLE(10), IN_TABLE(11), IN_TABLE(12), IN_TABLE(13)
#endif
};
#undef IN_TABLE
#undef PRODUCT
#undef WIDTHS
#undef HEIGHTS
#undef ROW_TABLE
#undef MODE_TABLE

/* C[mr][ncols], in column blocks of 4, 2 and 1 vectors. ncols is a multiple of VL. A vector of B has `step` bytes. In place, the row
 * `distance` bytes behind each one is prefetched. */
static void name(multiply)(int mode, long mr, long K, long ncols, const REAL *A, long lda, const char *B, long ldb, long step, long distance, const long *places,
                           REAL *C, long ldc, const REAL *rescale) {
  long left = ncols / VL;
  for (; left >= TILE_VECTORS; left -= TILE_VECTORS, B += TILE_VECTORS * step, C += CB)
    name(products)[mode][mr - 1][TILE_VECTORS / 2](K, A, lda, B, ldb, distance, places, C, ldc, rescale);
  for (int i = 1; i >= 0; i--)
    for (long w = 1 << i; left >= w; left -= w, B += w * step, C += w * VL)
      name(products)[mode][mr - 1][i](K, A, lda, B, ldb, distance, places, C, ldc, rescale);
}
