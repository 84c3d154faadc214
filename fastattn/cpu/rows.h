/* Rows of a tile in one accumulator type: conversion and packing at the edges, then score, mask, softmax and their gradients.
 * Included after real.h, once per type. `first` and `last` bound the keys of a tile that some row of the task may see, and
 * `seen`, where a boolean mask makes one, tells which of them: the others are packed as zeros, so what they hold (NaN in padding,
 * say) is never read. */

/* ------------------------------------------------------------------ conversion */
static void name(load_row)(void *to, long padded, const char *src, long stride, int dtype, long n) {
  REAL *dst = (REAL *)to;
  long j = 0;
  if (stride == element_size(dtype)) {
    if (dtype == DT_REAL) {
      memcpy(dst, src, (size_t)(n * (long)sizeof(REAL)));
      j = n;
    }
#if REAL_BITS == 32
    else if (dtype == DT_BF16) {
#if defined(__AVX512F__)
      for (; j + 16 <= n; j += 16)
        _mm512_storeu_ps(dst + j, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(src + 2 * j))), 16)));
#else
      for (; j < n; j++) dst[j] = bf16_to_float(((const unaligned16 *)src)[j].x);
#endif
    } else if (dtype == DT_F16) {
#if defined(__AVX512F__)
      for (; j + 16 <= n; j += 16) _mm512_storeu_ps(dst + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src + 2 * j))));
#elif defined(__F16C__)
      for (; j + 8 <= n; j += 8) _mm256_storeu_ps(dst + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + 2 * j))));
#endif
    }
#endif
  }
  for (; j < n; j++) dst[j] = (REAL)load_element(src + j * stride, dtype);
  for (; j < padded; j++) dst[j] = 0;
}
static void name(store_row)(char *dst, long stride, int dtype, const void *from, double factor, long n) {
  const REAL *src = (const REAL *)from, scale = (REAL)factor;
  long j = 0;
  if (stride == element_size(dtype)) {
    if (dtype == DT_REAL) {
      for (; j + VL <= n; j += VL) STORE((REAL *)(void *)dst + j, LOAD(src + j) * SPLAT(scale));
    }
#if REAL_BITS == 32 && defined(__AVX512F__)
    else if (dtype == DT_F16) {
      for (; j + 16 <= n; j += 16)
        _mm256_storeu_si256((__m256i *)(dst + 2 * j), _mm512_cvtps_ph((__m512)(LOAD(src + j) * SPLAT(scale)), 0));
    }
#elif REAL_BITS == 32 && defined(__F16C__)
    else if (dtype == DT_F16) {
      for (; j + 8 <= n; j += 8) _mm_storeu_si128((__m128i *)(dst + 2 * j), _mm256_cvtps_ph((__m256)(LOAD(src + j) * SPLAT(scale)), 0));
    }
#endif
#if REAL_BITS == 32
    else if (dtype == DT_BF16)
      for (; j < n; j++) ((unaligned16 *)dst)[j].x = float_to_bf16(src[j] * scale);
#endif
  }
  for (; j < n; j++) store_element(dst + j * stride, dtype, src[j] * scale);
}

/* ------------------------------------------------------------------ packing */
static void name(pack_rows)(void *to, long ld, const char *src, long row, long dim, int dtype, long first, long last, long padded, long n_dim,
                            const uint8_t *seen) {
  REAL *dst = (REAL *)to;
  for (long i = 0; i < padded; i++, dst += ld) {
    if (i < first || i >= last || (seen && !seen[i])) memset(dst, 0, (size_t)(ld * (long)sizeof(REAL)));
    else name(load_row)(dst, ld, src + i * row, dim, dtype, n_dim);
  }
}
static void name(pack_values)(void *to, long ld, const char *src, long row, long dim, int dtype, long first, long last, long capacity, long n_dim,
                              const uint8_t *seen) {
  (void)capacity;
  name(pack_rows)(to, ld, src, row, dim, dtype, first, last, last, n_dim, seen);
}
#if REAL_BITS == 32 && defined(__AVX512F__)
ALWAYS_INLINE void name(transpose)(const REAL *s, long ss, REAL *d, long ds) {
  __m512i r[16], t[16];
#define EACH(n) _Pragma("GCC unroll 16") for (int i = 0; i < n; i++)
  EACH(16) r[i] = _mm512_loadu_si512(s + i * ss);
  EACH(8) { t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]); t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]); }
  EACH(4) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  EACH(4) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  EACH(8) {
    _mm512_storeu_si512(d + i * ds, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(d + (i + 8) * ds, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
#undef EACH
}
#elif REAL_BITS == 32 && defined(__AVX2__)
ALWAYS_INLINE void name(transpose)(const REAL *s, long ss, REAL *d, long ds) {
  __m256 r[8], t[8];
#define EACH(n) _Pragma("GCC unroll 8") for (int i = 0; i < n; i++)
  EACH(8) r[i] = _mm256_loadu_ps(s + i * ss);
  EACH(4) { t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]); t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]); }
  EACH(2) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  EACH(4) {
    _mm256_storeu_ps(d + i * ds, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(d + (i + 4) * ds, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#undef EACH
}
#else
ALWAYS_INLINE void name(transpose)(const REAL *s, long ss, REAL *d, long ds) {
  for (long j = 0; j < VL; j++)
    for (long i = 0; i < VL; i++) d[j * ds + i] = s[i * ss + j];
}
#endif
static void name(pack_columns)(void *to, const char *src, long row, long dim, int dtype, long first, long last, long n_dim, const uint8_t *seen) {
  REAL part[VL * VL] __attribute__((aligned(64)));
  for (long block = 0; block < last; block += CB)
    for (long j = block; j < block + CB; j += VL) {
      REAL *dst = (REAL *)to + block * n_dim + (j - block);
      int inside = !seen && j >= first && j + VL <= last;
      for (long d = 0; d < n_dim; d += VL) {
        long w = n_dim - d < VL ? n_dim - d : VL;
        const char *s = src + j * row + d * dim;
        if (inside && w == VL && dtype == DT_REAL && dim == (long)sizeof(REAL) && row % (long)sizeof(REAL) == 0) {
          name(transpose)((const REAL *)(const void *)s, row / (long)sizeof(REAL), dst + d * CB, CB);
          continue;
        }
        for (long i = 0; i < VL; i++) {
          if (j + i < first || j + i >= last || (seen && !seen[j + i])) memset(part + i * VL, 0, sizeof(REAL) * (size_t)VL);
          else name(load_row)(part + i * VL, VL, s + i * row, dim, dtype, w);
        }
        if (w == VL) name(transpose)(part, VL, dst + d * CB, CB);
        else
          for (long e = 0; e < w; e++)
            for (long i = 0; i < VL; i++) dst[(d + e) * CB + i] = part[i * VL + e];
      }
    }
}

/* ------------------------------------------------------------------ products of a panel
 * scores: S[mr][first..last) = A K^T; first is a multiple of CB, columns up to the next multiple of CB are written. */
static void name(scores)(long mr, long n_dim, const void *A, long lda, const void *columns, long first, long last, void *S, long lds) {
  for (long j = first; j < last; j += CB)
    name(products)[name(ZERO)][mr - 1][TILE_VECTORS / 2](n_dim, (const REAL *)A, lda, (const char *)((const REAL *)columns + j * n_dim),
                                                         CB * (long)sizeof(REAL), (REAL *)S + j, lds, 0);
}
/* O[mr][ldo] = O * rescale + P[mr][first..last) V[first..last)[ldv] */
static void name(weighted_sum)(long mr, long first, long last, const void *P, long ldp, const void *V, long ldv, long capacity, void *O, long ldo,
                               const void *rescale) {
  const long bytes = (long)sizeof(REAL);
  (void)capacity;
  name(multiply)(name(RESCALE), mr, last - first, ldv, (const REAL *)P + first, ldp, (const char *)((const REAL *)V + first * ldv), ldv * bytes,
                 VL * bytes, (REAL *)O, ldo, (const REAL *)rescale);
}
/* dV += P^T dO and dK += dS^T Q, six keys at a time, over the query rows that see them (their bounds rise with the row) */
static void name(key_gradients)(const GradBlock *w) {
  const long bytes = (long)sizeof(REAL);
  long begin = 0, end = 0;
  for (long j = 0; j < w->keys; j += PANEL_ROWS) {
    long mr = w->keys - j < PANEL_ROWS ? w->keys - j : PANEL_ROWS;
    while (begin < w->rows && w->hi[begin] <= j) begin++;
    if (end < begin) end = begin;
    while (end < w->rows && w->lo[end] < j + mr) end++;
    if (begin >= end) continue;
    name(multiply)(name(TRANSPOSED_A), mr, end - begin, w->ldv, (const REAL *)w->P + begin * GRAD_N + j, GRAD_N,
                   (const char *)w->dO + begin * w->ldv * bytes, w->ldv * bytes, VL * bytes, (REAL *)w->dV + j * w->ldv, w->ldv, 0);
    name(multiply)(name(TRANSPOSED_A), mr, end - begin, w->ldq, (const REAL *)w->dS + begin * GRAD_N + j, GRAD_N,
                   (const char *)w->Q + begin * w->ldq * bytes, w->ldq * bytes, VL * bytes, (REAL *)w->dK + j * w->ldq, w->ldq, 0);
  }
}
static const void *name(key_row)(const void *G, long ld, long j, void *scratch) {
  (void)scratch;
  return (const REAL *)G + j * ld;
}

/* ------------------------------------------------------------------ short queries: K and V read in place, once
 * Rows of K and V have their last axis contiguous and a multiple of VL long; nothing is packed. */
ALWAYS_INLINE void name(dots)(const int MR, const int dtype, long n_dim, const REAL *A, long lda, const char *K, long row, long first, long last,
                              REAL *S, long lds) {
  const long step = dtype == DT_REAL ? VL * (long)sizeof(REAL) : VL * 2;
  for (long j = first; j < last; j++) {
    const char *k = K + j * row;
    vec c0 = {0}, c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0;
    for (long d = 0; d < n_dim; d += VL, k += step) {
      __builtin_prefetch(k + AHEAD * row);
      vec x = name(load_as)(k, dtype);
      c0 += x * LOAD(A + d);
      if (MR > 1) c1 += x * LOAD(A + lda + d);
      if (MR > 2) c2 += x * LOAD(A + 2 * lda + d);
      if (MR > 3) c3 += x * LOAD(A + 3 * lda + d);
      if (MR > 4) c4 += x * LOAD(A + 4 * lda + d);
      if (MR > 5) c5 += x * LOAD(A + 5 * lda + d);
    }
    S[j] = name(reduce_add)(c0);
    if (MR > 1) S[lds + j] = name(reduce_add)(c1);
    if (MR > 2) S[2 * lds + j] = name(reduce_add)(c2);
    if (MR > 3) S[3 * lds + j] = name(reduce_add)(c3);
    if (MR > 4) S[4 * lds + j] = name(reduce_add)(c4);
    if (MR > 5) S[5 * lds + j] = name(reduce_add)(c5);
  }
}
static void name(direct_scores)(long mr, long n_dim, const void *A, long lda, const char *K, long row, int dtype, long first, long last, void *S, long lds) {
#define DOTS(R, T) name(dots)(R, T, n_dim, (const REAL *)A, lda, K, row, first, last, (REAL *)S, lds)
#define EACH_HEIGHT(T)                     \
  switch (mr) {                            \
    case 1: DOTS(1, T); break;             \
    case 2: DOTS(2, T); break;             \
    case 3: DOTS(3, T); break;             \
    case 4: DOTS(4, T); break;             \
    case 5: DOTS(5, T); break;             \
    default: DOTS(6, T);                   \
  }
#if LOADS_HALF
  if (dtype == DT_F16) { EACH_HEIGHT(DT_F16) return; }
  if (dtype == DT_BF16) { EACH_HEIGHT(DT_BF16) return; }
#endif
  EACH_HEIGHT(DT_REAL)
  (void)dtype;
#undef DOTS
#undef EACH_HEIGHT
}
static void name(direct_sum)(long mr, long first, long last, const void *P, long ldp, const char *V, long row, int dtype, long n_dim, void *O, long ldo,
                             const void *rescale) {
  int mode = dtype == DT_F16 ? name(IN_PLACE_F16) : dtype == DT_BF16 ? name(IN_PLACE_BF16) : name(IN_PLACE);
  name(multiply)(mode, mr, last - first, n_dim, (const REAL *)P + first, ldp, V + first * row, row, VL * element_size(dtype), (REAL *)O, ldo,
                 (const REAL *)rescale);
}

/* ------------------------------------------------------------------ score and mask, one row in L1
 * s = softcap(s * scale) - slope * |distance - j| + bias[j]; the tanh of the cap is kept for backward when asked. */
static void name(score_row)(void *row, long first, long last, double scale, double softcap, double slope, double distance, const void *bias, void *tanh_out) {
  REAL *s = (REAL *)row, *t = (REAL *)tanh_out;
  const REAL *b = (const REAL *)bias;
  vec ramp;
  for (long i = 0; i < VL; i++) ramp[i] = (REAL)i;
  const ivec sign_bit = (ivec)SPLAT((REAL)-0.0);
  for (long j = first; j < last; j += VL) {
    vec x = LOAD(s + j) * SPLAT((REAL)scale);
    if (softcap > 0) {
      vec c = name(tanh)(x * SPLAT((REAL)(1 / softcap)));
      if (t) STORE(t + j, c);
      x = c * SPLAT((REAL)softcap);
    }
    if (slope != 0) {
      vec d = SPLAT((REAL)(distance - (double)j)) - ramp;
      x -= SPLAT((REAL)slope) * (vec)((ivec)d & ~sign_bit);
    }
    if (b) x += LOAD(b + j);
    STORE(s + j, x);
  }
}
static void name(mask_row)(void *row, long first, long last, const char *mask, long stride) {
  REAL *s = (REAL *)row;
  if (stride == 1)
    for (long j = first; j < last; j++) s[j] = mask[j] ? s[j] : (REAL)-INFINITY;
  else
    for (long j = first; j < last; j++) s[j] = mask[j * stride] ? s[j] : (REAL)-INFINITY;
}
/* -inf (a score) or 0 (a probability) in [first, lo) and [hi, last): the interval is the structural mask */
static void name(fill_outside)(void *row, long first, long lo, long hi, long last, double value) {
  REAL *s = (REAL *)row;
  for (long j = first; j < lo && j < last; j++) s[j] = (REAL)value;
  for (long j = hi > first ? hi : first; j < last; j++) s[j] = (REAL)value;
}

/* A score near the largest float (a bias of finfo.min, say) overflows when multiplied before the maximum is subtracted. */
ALWAYS_INLINE int name(is_huge)(REAL base) { return !(base > (REAL)-1e37 && base < (REAL)1e37); }
/* P = 2^((s - base) c2) over [first, last) in place; returns the sum */
ALWAYS_INLINE REAL name(exponentials)(const int HUGE_BASE, REAL *s, long first, long last, REAL base, REAL c2) {
  vec b = SPLAT(HUGE_BASE ? base : base * c2), c = SPLAT(c2), sum = {0}, sum1 = {0};
#define EXPONENTIAL(at) name(exp2)(HUGE_BASE ? (LOAD(s + (at)) - b) * c : LOAD(s + (at)) * c - b)
  long j = first;
  for (; j + VL < last; j += 2 * VL) {
    vec p = EXPONENTIAL(j), p1 = EXPONENTIAL(j + VL);
    sum += p;
    sum1 += p1;
    STORE(s + j, p);
    STORE(s + j + VL, p1);
  }
  if (j < last) {
    vec p = EXPONENTIAL(j);
    sum += p;
    STORE(s + j, p);
  }
#undef EXPONENTIAL
  return name(reduce_add)(sum + sum1);
}

/* ------------------------------------------------------------------ softmax, online
 * For each row over [first, last): new maximum m, P = 2^((s - m) c2) in place, sum l, and the factor that rescales what was
 * accumulated under the old maximum. A row that has seen nothing keeps m = -inf and l = 0 without a NaN. */
ALWAYS_INLINE REAL name(row_peak)(const REAL *s, long first, long last) {
  vec top = LOAD(s + first), top1 = top;
  long j = first + VL;
  for (; j + VL < last; j += 2 * VL) {
    top = VMAX(top, LOAD(s + j));
    top1 = VMAX(top1, LOAD(s + j + VL));
  }
  if (j < last) top = VMAX(top, LOAD(s + j));
  return name(reduce_max)(VMAX(top, top1));
}
/* For each of mr rows: row_max takes in `peak`, base becomes what to subtract (0 while a row has seen nothing), rescale 2^((old - new) c2),
 * and row_sum is rescaled. Works in whole vectors: the arrays have room for them. */
ALWAYS_INLINE void name(raise_maxima)(long mr, const REAL *peak, REAL c2, REAL *row_max, REAL *row_sum, REAL *rescale, REAL *base) {
  for (long r = 0; r < mr; r += VL) {
    vec old = LOAD(row_max + r), top = VMAX(LOAD(peak + r), old), nothing = SPLAT((REAL)-INFINITY);
    vec b = name(choose)((ivec)(top == nothing), (vec){0}, top);
    vec factor = name(choose)((ivec)(top == old), SPLAT(1), name(exp2)((old - b) * SPLAT(c2)));
    if (r + VL <= mr) {
      STORE(row_max + r, top);
      STORE(row_sum + r, LOAD(row_sum + r) * factor);
    } else {
      for (long i = 0; r + i < mr; i++) row_max[r + i] = top[i], row_sum[r + i] *= factor[i];
    }
    STORE(rescale + r, factor);
    STORE(base + r, b);
  }
}
static void name(softmax)(long mr, void *S, long lds, void *P, long ldp, long first, long last, double c2, void *row_max, void *row_sum, void *rescale) {
  REAL peak[MAX_PANEL], base[MAX_PANEL], *s = (REAL *)S, *l = (REAL *)row_sum;
  (void)P;
  (void)ldp;
  for (long r = 0; r < mr; r++) peak[r] = name(row_peak)(s + r * lds, first, last);
  for (long r = mr; r % VL; r++) peak[r] = 0;
  name(raise_maxima)(mr, peak, (REAL)c2, (REAL *)row_max, l, (REAL *)rescale, base);
  for (long r = 0; r < mr; r++)
    l[r] += name(is_huge)(base[r]) ? name(exponentials)(1, s + r * lds, first, last, base[r], (REAL)c2)
                                   : name(exponentials)(0, s + r * lds, first, last, base[r], (REAL)c2);
}
/* v where the keep bits from column j say so (j a multiple of VL), else 0 */
ALWAYS_INLINE vec name(kept)(vec v, const uint64_t *keep, long j) {
  uint64_t bits = keep[j / 64] >> j % 64;
#if defined(__AVX512F__)
  return REAL_BITS == 32 ? (vec)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v) : (vec)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)v);
#else
  ivec bit;
  for (long i = 0; i < VL; i++) bit[i] = (INT)1 << i;
  return (vec)((ivec)v & (ivec)(((((INT)(bits & 0xff)) - (ivec){0}) & bit) == bit));
#endif
}
static void name(drop_row)(void *row, const uint64_t *keep, long first, long last) {
  REAL *p = (REAL *)row;
  for (long j = first / VL * VL; j < last; j += VL) STORE(p + j, name(kept)(LOAD(p + j), keep, j));
}

/* ------------------------------------------------------------------ backward, one row
 * In: s (scores / scale) and dp (dO V^T). Out: P in place of s (dropped when `keep`), and in place of dp the gradient of the score,
 * dS = P (keep_scale keep dP - delta). P = exp(s scale - lse); a row that sees nothing has lse = -inf and no probability. */
static void name(grad_row)(void *score, void *dprob, long first, long last, double scale, double lse, double delta, const uint64_t *keep, double keep_scale) {
  REAL *s = (REAL *)score, *dp = (REAL *)dprob;
  vec c = SPLAT((REAL)scale), base = SPLAT((REAL)(lse == -INFINITY ? INFINITY : lse)), d = SPLAT((REAL)delta), log2e = SPLAT((REAL)1.4426950408889634);
  const vec ks = SPLAT((REAL)keep_scale);
  for (long j = first; j < last; j += VL) {
    vec p = name(exp2)((LOAD(s + j) * c - base) * log2e), g = LOAD(dp + j);
    STORE(s + j, keep ? name(kept)(p * ks, keep, j) : p);
    if (keep) g = name(kept)(g * ks, keep, j);
    STORE(dp + j, p * (g - d));
  }
}
/* through the softcap: dS *= 1 - tanh^2 */
static void name(uncap_row)(void *grad, const void *tanh_in, long first, long last) {
  REAL *g = (REAL *)grad;
  const REAL *t = (const REAL *)tanh_in;
  for (long j = first; j < last; j++) g[j] *= 1 - t[j] * t[j];
}
/* dbias[j] += dS[j]; one element takes the sum when the bias is broadcast over keys (stride 0) */
static void name(add_row)(void *to, long stride, const void *from, long first, long last) {
  REAL *g = (REAL *)to, sum = 0;
  const REAL *s = (const REAL *)from;
  if (stride)
    for (long j = first; j < last; j++) g[j] += s[j];
  else {
    for (long j = first; j < last; j++) sum += s[j];
    g[0] += sum;
  }
}
static double name(dot_row)(const void *a, const void *b, long n) {
  vec sum = {0};
  for (long j = 0; j < n; j += VL) sum += LOAD((const REAL *)a + j) * LOAD((const REAL *)b + j);
  return (double)name(reduce_add)(sum);
}
/* O_out = sum over splits of O_s 2^((m_s - m) c2): adds one split's rows; see forward.pxi */
static void name(add_scaled)(void *to, const void *from, double factor, long n) {
  REAL *g = (REAL *)to;
  const REAL *s = (const REAL *)from;
  for (long j = 0; j < n; j++) g[j] += s[j] * (REAL)factor;
}
