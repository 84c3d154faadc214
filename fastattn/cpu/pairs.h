/* bfloat16 arithmetic: operands are bfloat16 pairs along the summed axis, sums are float32. Two instruction sets have it: AMX (16 rows
 * x 16 columns x 32 terms per instruction, 15 times the float32 FMA rate) and AVX512_BF16's dot product of pairs.
 *
 *   rows     [n][ld]                                  bfloat16, ld a multiple of 32: the A operand
 *   columns  [columns / 16][terms / 32][16 pairs][16][2]   the B operand; one (column group, 32 terms) is one AMX tile of 1 KiB
 *
 * PARTS: AMX is fast enough to multiply float16 in two parts, because a float16 is exactly the sum of two bfloat16. Number the parts from
 * the most significant: the products i x j with i + j < PARTS give 16 bits. The small ones are added first, so that they round at their
 * own size. A row, or a column group, of an operand is its parts one after the other. */
#pragma once
#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__)
#include <immintrin.h>
#define PAIR_PANEL 32
#define HAVE_AMX 1
#else
#define PAIR_PANEL PANEL_ROWS
#define HAVE_AMX 0
#endif
#define PAIR_COLS 32
#define PAIR_N BLOCK_N /* 128 keys fit L1 better but double the work per row (maximum, sum, rescale): 1.79 against 1.48 cycles a pair */
#define MAX_LD 576 /* problem.MAX_HEAD_DIM */
typedef uint16_t bf16;

/* ------------------------------------------------------------------ conversion */
ALWAYS_INLINE __m512i bf16_of(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
ALWAYS_INLINE __m512 float_of(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
/* 32 floats -> PARTS times 32 bfloat16, `step` apart. Every part but the last truncates: exact, cheap, and accurate enough for P. */
ALWAYS_INLINE void split(const int PARTS, __m512 a, __m512 b, bf16 *to, long step) {
  const __m512i top = _mm512_set1_epi32((int)0xffff0000);
  for (int p = 0; p < PARTS - 1; p++) {
    __m512 x = (__m512)_mm512_and_si512((__m512i)a, top), y = (__m512)_mm512_and_si512((__m512i)b, top);
    _mm512_storeu_si512(to + p * step, bf16_of(x, y));
    a -= x;
    b -= y;
  }
  _mm512_storeu_si512(to + (PARTS - 1) * step, bf16_of(a, b));
}
/* The same with every part rounded to nearest even, so that the error of the omitted products has no bias. An infinity is entirely in
 * the first part. */
ALWAYS_INLINE void split_rounded(const int PARTS, __m512 a, __m512 b, bf16 *to, long step) {
  __mmask16 x = _mm512_fpclass_ps_mask(a, 0x18), y = _mm512_fpclass_ps_mask(b, 0x18); /* infinities */
  for (int p = 0; p < PARTS; p++) {
    __m512i h = bf16_of(a, b);
    _mm512_storeu_si512(to + p * step, h);
    a = _mm512_maskz_sub_ps((__mmask16)~x, a, float_of(_mm512_castsi512_si256(h)));
    b = _mm512_maskz_sub_ps((__mmask16)~y, b, float_of(_mm512_extracti64x4_epi64(h, 1)));
  }
}
/* a row as bfloat16, zero padded to ld; parts are `step` apart */
ALWAYS_INLINE void bf16_row(const int PARTS, bf16 *to, long step, long ld, const char *src, long stride, int dtype, long n) {
  float part[32];
  if (PARTS == 1 && dtype == DT_BF16 && stride == 2) {
    for (long j = 0; j < ld; j += 32)
      _mm512_storeu_si512(to + j, _mm512_maskz_loadu_epi16(n - j >= 32 ? ~(__mmask32)0 : n > j ? ((__mmask32)1 << (n - j)) - 1 : 0, src + 2 * j));
    return;
  }
  for (long j = 0; j < ld; j += 32) {
    long w = n - j < 32 ? n - j : 32;
    if (w > 0) load_row_f32(part, 32, src + j * stride, stride, dtype, w);
    else memset(part, 0, sizeof part);
    split_rounded(PARTS, _mm512_loadu_ps(part), _mm512_loadu_ps(part + 16), to + j, step);
  }
}
/* two rows of 32 -> pairs (a0 b0 a1 b1 ...), 16 columns per vector */
ALWAYS_INLINE void interleave(__m512i a, __m512i b, bf16 *left, bf16 *right) {
  const __m512i lo = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i hi = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  _mm512_storeu_si512(left, _mm512_permutex2var_epi16(a, lo, b));
  _mm512_storeu_si512(right, _mm512_permutex2var_epi16(a, hi, b));
}

/* ------------------------------------------------------------------ packing */
ALWAYS_INLINE void pairs_rows(const int PARTS, bf16 *dst, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long padded, long n_dim,
                              const uint8_t *attended) {
  const long step = PARTS * ld;
  for (long i = 0; i < padded; i++, dst += step) {
    if (i >= first && i < last && (!attended || attended[i])) bf16_row(PARTS, dst, ld, ld, row_at(src, row, places, i), dim, dtype, n_dim);
    else memset(dst, 0, (size_t)(2 * step));
  }
}
/* K^T: columns are keys, terms are head_dim */
ALWAYS_INLINE void pairs_columns(const int PARTS, bf16 *dst, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long n_dim, const uint8_t *attended) {
  const long ld = (n_dim + 31) / 32 * 32;
  bf16 tile[PARTS][16][32] __attribute__((aligned(64)));
  for (long j = 0; j < (last + 31) / 32 * 32; j += 16) /* whole blocks of 32: a column that is computed holds nothing stale */
    for (long d = 0; d < ld; d += 32) {
      long w = n_dim - d < 32 ? n_dim - d : 32, rest = first > j || last < j + 16;
      for (long i = 0; i < 16; i++) {
        if (d == 0) prefetch_key(src, row, places, dtype, j + i, n_dim);
        if ((rest && (j + i < first || j + i >= last)) || (attended && !attended[j + i])) {
          for (int p = 0; p < PARTS; p++) memset(tile[p][i], 0, 64);
        } else {
          bf16_row(PARTS, tile[0][i], 512, 32, row_at(src, row, places, j + i) + d * dim, dim, dtype, w);
        }
      }
      for (int p = 0; p < PARTS; p++)
        transpose_f32((const float *)(const void *)tile[p], 16, (float *)(void *)(dst + (PARTS * j + 16 * p) * ld + d * 16), 16);
    }
}
/* V: columns are head_dim_v, terms are keys, with room for `capacity` keys */
ALWAYS_INLINE void pairs_values(const int PARTS, bf16 *dst, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long capacity, long n_dim,
                                const uint8_t *attended) {
  bf16 rows[2][PARTS][MAX_LD] __attribute__((aligned(64)));
  for (long j = 0; j < (last + 31) / 32 * 32; j += 2) {
    for (long i = 0; i < 2; i++) {
      long key = j + i;
      prefetch_key(src, row, places, dtype, key, n_dim);
      if (key >= first && key < last && (!attended || attended[key])) {
        bf16_row(PARTS, rows[i][0], MAX_LD, ld, row_at(src, row, places, key), dim, dtype, n_dim);
      } else {
        for (int p = 0; p < PARTS; p++) memset(rows[i][p], 0, (size_t)(2 * ld));
      }
    }
    for (int p = 0; p < PARTS; p++)
      for (long d = 0; d < ld; d += 32) {
        bf16 *to = dst + (PARTS * d + 16 * p) * capacity + j * 16;
        interleave(_mm512_load_si512(rows[0][p] + d), _mm512_load_si512(rows[1][p] + d), to, to + PARTS * 16 * capacity);
      }
  }
}

/* ------------------------------------------------------------------ GEMM
 * C[rows][columns] (+)= A[rows][terms] B over terms [t0, t1) and columns [0, n), all multiples of 32. `group`: distance of column groups
 * of 16 in B. a_part, b_part: distance of the parts of a row of A and of a group of B. rescale, if given, multiplies C first. */
/* (part of A, part of B), smallest products first. A GEMM does the last COUNT of them: 1 for one part, 3 for two (4 for scores, so that
 * float16 products are exact). */
#define COUNT_OF(PARTS) ((PARTS) * ((PARTS) + 1) / 2)
static const int PRODUCTS[4][2] = {{1, 1}, {1, 0}, {0, 1}, {0, 0}};
/* STORED: C = AB. ADDED: C += AB, with sums that start at 0. CONTINUED: C += AB, with sums that start at C. That saves a pass over C and
 * is accurate enough for a C that is rounded to bfloat16 in the end. */
enum { STORED, ADDED, CONTINUED };
ALWAYS_INLINE void pairs_rescale(long rows, float *C, long ldc, long n, const float *rescale) {
  for (long r = 0; r < rows; r++)
    if (rescale[r] != 1)
      for (long d = 0; d < n; d += 16) _mm512_storeu_ps(C + r * ldc + d, _mm512_loadu_ps(C + r * ldc + d) * _mm512_set1_ps(rescale[r]));
}
#if HAVE_AMX
/* Eight tiles of 16 rows of 64 bytes. A constant in memory: gcc takes _tile_loadconfig for a read of 8 bytes, and drops stores to the
 * others as dead. */
static const struct { uint8_t palette, start, reserved[14]; uint16_t colsb[16]; uint8_t rows[16]; } AMX_TILES __attribute__((aligned(64))) = {
    .palette = 1, .colsb = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
static void amx_begin(void) { _tile_loadconfig(&AMX_TILES); }
static void amx_end(void) { _tile_release(); }
/* C = C * rescale + T for a block of 32 x 32 */
ALWAYS_INLINE void add_block(float *C, long ldc, const float *T, const float *rescale, long rows) {
  for (long r = 0; r < rows; r++, C += ldc, T += 32) {
    __m512 s = _mm512_set1_ps(rescale ? rescale[r] : 1);
    _mm512_storeu_ps(C, _mm512_loadu_ps(C) * s + _mm512_loadu_ps(T));
    _mm512_storeu_ps(C + 16, _mm512_loadu_ps(C + 16) * s + _mm512_loadu_ps(T + 16));
  }
}
ALWAYS_INLINE void pairs_product(const int MODE, const int COUNT, long rows, long t0, long t1, const bf16 *A, long lda, long a_part, const bf16 *B,
                                 long group, long b_part, float *C, long ldc, long n, const float *rescale) {
  float block[32 * 32] __attribute__((aligned(64)));
  __asm__ volatile("" : : : "memory");           /* gcc does not know that _tile_loadd reads memory: A, B and C are stored before it */
  for (long i = 0; i < rows; i += 32)
    for (long j = 0; j < n; j += 32) {
      float *c = MODE == ADDED ? block : C + i * ldc + j;
      const long ld = MODE == ADDED ? 32 : ldc;
      if (MODE == CONTINUED) {
        _tile_loadd(0, c, 4 * ld);
        _tile_loadd(1, c + 16, 4 * ld);
        _tile_loadd(2, c + 16 * ld, 4 * ld);
        _tile_loadd(3, c + 16 * ld + 16, 4 * ld);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int p = 4 - COUNT; p < 4; p++) {
        const bf16 *a = A + i * lda + PRODUCTS[p][0] * a_part, *b = B + j / 16 * group + PRODUCTS[p][1] * b_part;
        for (long t = t0; t < t1; t += 32) {
          _tile_loadd(4, a + t, 2 * lda);
          _tile_loadd(6, b + t * 16, 64);
          _tile_loadd(5, a + 16 * lda + t, 2 * lda);
          _tile_loadd(7, b + group + t * 16, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, c, 4 * ld);
      _tile_stored(1, c + 16, 4 * ld);
      _tile_stored(2, c + 16 * ld, 4 * ld);
      _tile_stored(3, c + 16 * ld + 16, 4 * ld);
      if (MODE == ADDED) add_block(C + i * ldc + j, ldc, block, rescale ? rescale + i : 0, 32);
    }
}
#else
static void amx_begin(void) {}
static void amx_end(void) {}
#define ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5)
ALWAYS_INLINE void pairs_dot(const int MR, const int NV, const int ACCUMULATE, long t0, long t1, const bf16 *A, long lda, const bf16 *B, long group, float *C,
                             long ldc) {
#define DECLARE(r) __m512 c##r##0 = _mm512_setzero_ps(), c##r##1 = c##r##0, c##r##2 = c##r##0, c##r##3 = c##r##0;
#define STEP(r)                                                                         \
  if (r < MR) {                                                                         \
    int32_t pair;                                                                       \
    memcpy(&pair, A + r * lda + t, 4);                                                  \
    __m512bh a = (__m512bh)_mm512_set1_epi32(pair);                                     \
    c##r##0 = _mm512_dpbf16_ps(c##r##0, a, b0);                                         \
    c##r##1 = _mm512_dpbf16_ps(c##r##1, a, b1);                                         \
    if (NV > 2) c##r##2 = _mm512_dpbf16_ps(c##r##2, a, b2);                             \
    if (NV > 2) c##r##3 = _mm512_dpbf16_ps(c##r##3, a, b3);                             \
  }
#define ADD(r, n)                                                            \
  if (n < NV) {                                                              \
    if (ACCUMULATE) c##r##n += _mm512_loadu_ps(C + r * ldc + 16 * n);        \
    _mm512_storeu_ps(C + r * ldc + 16 * n, c##r##n);                         \
  }
#define FINAL(r)            \
  if (r < MR) {             \
    ADD(r, 0)               \
    ADD(r, 1)               \
    ADD(r, 2)               \
    ADD(r, 3)               \
  }
  ROWS(DECLARE)
  for (long t = t0; t < t1; t += 2) {
    const bf16 *b = B + t * 16;
    __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + group), b2 = b0, b3 = b0;
    if (NV > 2) b2 = (__m512bh)_mm512_loadu_si512(b + 2 * group), b3 = (__m512bh)_mm512_loadu_si512(b + 3 * group);
    ROWS(STEP)
  }
  ROWS(FINAL)
#undef DECLARE
#undef STEP
#undef FINAL
#undef ADD
}
ALWAYS_INLINE void pairs_product(const int MODE, const int COUNT, long rows, long t0, long t1, const bf16 *A, long lda, long a_part, const bf16 *B,
                                 long group, long b_part, float *C, long ldc, long n, const float *rescale) {
  (void)COUNT, (void)a_part, (void)b_part;
  if (rescale) pairs_rescale(rows, C, ldc, n, rescale);
  for (long i = 0; i < rows; i += 6)
    for (long j = 0; j < n; j += 64) {
      const bf16 *a = A + i * lda, *b = B + j / 16 * group;
      float *c = C + i * ldc + j;
#define DOT(R) (n - j < 64 ? pairs_dot(R, 2, MODE != STORED, t0, t1, a, lda, b, group, c, ldc) : pairs_dot(R, 4, MODE != STORED, t0, t1, a, lda, b, group, c, ldc))
      switch (rows - i) {
        case 1: DOT(1); break;
        case 2: DOT(2); break;
        case 3: DOT(3); break;
        case 4: DOT(4); break;
        case 5: DOT(5); break;
        default: DOT(6);
      }
#undef DOT
    }
}
#undef ROWS
#endif

/* ------------------------------------------------------------------ operations of a Kernels table */
#define WHOLE(rows) (HAVE_AMX ? ((rows) + 31) / 32 * 32 : (rows))
ALWAYS_INLINE void pairs_scores(const int PARTS, long mr, long n_dim, const bf16 *A, long lda, const bf16 *columns, long first, long last, float *S, long lds) {
  const long ld = (n_dim + 31) / 32 * 32;
  pairs_product(STORED, PARTS == 2 ? 4 : COUNT_OF(PARTS), WHOLE(mr), 0, ld, A, PARTS * lda, lda, columns + PARTS * first * ld, PARTS * 16 * ld, 16 * ld, S + first, lds,
                (last - first + 31) / 32 * 32, 0);
}
ALWAYS_INLINE void pairs_weighted_sum(const int PARTS, long mr, long first, long last, const bf16 *P, long ldp, const bf16 *V, long ldv, long capacity,
                                      float *O, long ldo, const float *rescale) {
  if (HAVE_AMX && PARTS == 1) pairs_rescale(mr, O, ldo, ldv, rescale);
  pairs_product(HAVE_AMX && PARTS == 1 ? CONTINUED : ADDED, COUNT_OF(PARTS), WHOLE(mr), first / 32 * 32, (last + 31) / 32 * 32, P, PARTS * ldp, ldp, V,
                PARTS * 16 * capacity, 16 * capacity, O, ldo, ldv, rescale);
}
/* 2^x with error 7.5e-8: far below the rounding of a bfloat16 P, and about that of a float32 sum of thousands */
ALWAYS_INLINE __m512 exp2_coarse(__m512 x) {
  __m512 f = _mm512_reduce_ps(x, 9), p = _mm512_set1_ps(0.0018775767000199889f);
  p = p * f + _mm512_set1_ps(0.0089893400235819068f);
  p = p * f + _mm512_set1_ps(0.0558263181162335f);
  p = p * f + _mm512_set1_ps(0.24015361702112632f);
  p = p * f + _mm512_set1_ps(0.69315307320262606f);
  p = p * f + _mm512_set1_ps(0.99999992506358772f);
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-100), _CMP_NLT_UQ), p, x);
}
ALWAYS_INLINE float pairs_exponentials(const int PARTS, const int DIFFERENCE, const float *S, bf16 *P, long ldp, long first, long last, float base, float c2) {
  __m512 b = _mm512_set1_ps(DIFFERENCE ? base : base * c2), c = _mm512_set1_ps(c2), sum = _mm512_setzero_ps(), sum1 = sum;
  for (long j = first; j < last; j += 32) {
    __m512 x = (__m512)exponent_f32(DIFFERENCE, (vec_f32)_mm512_loadu_ps(S + j), (vec_f32)b, (vec_f32)c);
    __m512 y = (__m512)exponent_f32(DIFFERENCE, (vec_f32)_mm512_loadu_ps(S + j + 16), (vec_f32)b, (vec_f32)c);
    __m512 p = PARTS > 1 ? (__m512)exp2_f32((vec_f32)x) : exp2_coarse(x), p1 = PARTS > 1 ? (__m512)exp2_f32((vec_f32)y) : exp2_coarse(y);
    sum += p;
    sum1 += p1;
    split(PARTS, p, p1, P + j, ldp);
  }
  return _mm512_reduce_add_ps(sum + sum1);
}
/* As softmax_f32, with P stored in parts. row_sum adds P before its rounding. Only rows whose bit is set in `rows`; the others stay as they
 * are. */
ALWAYS_INLINE void pairs_softmax(const int PARTS, long mr, uint32_t rows, const float *S, long lds, bf16 *P, long ldp, long first, long last, double c2,
                                 float *row_max, float *row_sum, float *rescale) {
  float peak[MAX_PANEL], base[MAX_PANEL];
  for (long r = 0; r < mr; r++) peak[r] = rows >> r & 1 ? row_peak_f32(S + r * lds, first, last) : -INFINITY;
  for (long r = mr; r % 16; r++) peak[r] = 0;
  raise_maxima_f32(mr, peak, (float)c2, row_max, row_sum, rescale, base);
  for (long r = 0; r < mr; r++)
    if (rows >> r & 1)
      row_sum[r] += difference_first_f32(base[r], (float)c2) ? pairs_exponentials(PARTS, 1, S + r * lds, P + r * PARTS * ldp, ldp, first, last, base[r], (float)c2)
                                                          : pairs_exponentials(PARTS, 0, S + r * lds, P + r * PARTS * ldp, ldp, first, last, base[r], (float)c2);
}
/* Optimistic maximum: scores and softmax of a tile in one pass, CHUNK keys at a time, under the maximum of earlier keys. A row without
 * one uses the maximum of the tile's first chunk plus AHEAD_OF_MAXIMUM bits. Scores stay in L1, and there is no pass for maxima and
 * nothing to rescale.
 *
 * P, O and row_sum are floating point, so a maximum that is some bits too low costs no accuracy. A row's P may add up to its number of
 * keys; V may be as large as that allows. So in a whole tile the maximum may lag by AHEAD_OF_MAXIMUM + 8 bits. Returns the rows (bits)
 * for which it lags further, or is infinite or NaN: `scores` and `softmax` do these again. Each row is judged by its own scores alone.
 * lo, hi: each row's keys; minus n0 they count from the tile. */
#define CHUNK 64            /* 32, 64 and 128 differ by 2 %; 256 loses half the gain */
#define AHEAD_OF_MAXIMUM 7 /* bits. Below 8, the exponent of a row's largest score rounds to 2.4e-7, which is nothing for lse; with 16 or 24 it would matter. */
/* Prepare a tile: maxima of rows that have none yet, rescale, and base, which is subtracted from a row's scores times c2. base is 0 while
 * the row has attended nothing. It is NaN, so that the row counts as lagging, if the difference must be taken before scaling. */
ALWAYS_INLINE void optimistic_bases(long mr, const float *S, long width, float c2, float *row_max, float *row_sum, float *rescale, float *base) {
  const float ahead = AHEAD_OF_MAXIMUM / c2 < 1e36f ? AHEAD_OF_MAXIMUM / c2 : 1e36f;
  const __m512 limit = _mm512_set1_ps(DIFFERENCE_FIRST), nothing = _mm512_set1_ps(-INFINITY);
  int fresh = 0;
  for (long r = 0; r < mr; r += 16) {
    const __m512 top = _mm512_mask_loadu_ps(_mm512_setzero_ps(), (__mmask16)(mr - r < 16 ? (1 << (mr - r)) - 1 : 0xffff), row_max + r);
    _mm512_storeu_ps(base + r, top);
    _mm512_storeu_ps(rescale + r, _mm512_set1_ps(1));
    fresh |= _mm512_cmp_ps_mask(top, nothing, _CMP_EQ_OQ);
  }
  if (fresh) {
    float peak[MAX_PANEL];
    for (long r = 0; r < mr; r++) peak[r] = row_max[r] == -INFINITY ? fminf(row_peak_f32(S + r * CHUNK, 0, width) + ahead, FLT_MAX) : -INFINITY;
    for (long r = mr; r % 16; r++) peak[r] = 0;
    raise_maxima_f32(mr, peak, c2, row_max, row_sum, rescale, base);
  }
  for (long r = 0; r < mr; r += 16) {
    const __m512 u = _mm512_loadu_ps(base + r) * _mm512_set1_ps(c2);
    _mm512_storeu_ps(base + r, _mm512_mask_mov_ps(_mm512_set1_ps(NAN), _mm512_cmp_ps_mask(_mm512_abs_ps(u), limit, _CMP_LT_OQ), u));
  }
}
/* The horizontal sums of 16 vectors, in order. */
ALWAYS_INLINE __m512 sums_of_rows(const float (*s)[16]) {
#define EVERY_FOURTH(k) by_row_f32((vec_f32)_mm512_load_ps(s[k]), (vec_f32)_mm512_load_ps(s[4 + k]), (vec_f32)_mm512_load_ps(s[8 + k]), (vec_f32)_mm512_load_ps(s[12 + k]))
  return fold_f32(fold_f32(EVERY_FOURTH(0), EVERY_FOURTH(1)), fold_f32(EVERY_FOURTH(2), EVERY_FOURTH(3)));
#undef EVERY_FOURTH
}
ALWAYS_INLINE uint32_t pairs_optimistic(const int PARTS, long mr, long n_dim, const bf16 *A, long lda, const bf16 *columns, long first, long last,
                                        const long *lo, const long *hi, long n0, float *S, bf16 *P, long ldp, double c2, float *row_max,
                                        float *row_sum, float *rescale) {
  float keys[MAX_PANEL], base[MAX_PANEL], sums[MAX_PANEL][16] __attribute__((aligned(64)));
  const long ld = (n_dim + 31) / 32 * 32;
  uint32_t lagging = 0;
  int cut = 0;
  for (long r = 0; r < mr; r++) {
    const long begin = lo[r] - n0 > first ? lo[r] - n0 : first, end = hi[r] - n0 < last ? hi[r] - n0 : last;
    keys[r] = end > begin ? (float)(end - begin) : 0;
    cut |= end - begin < last - first;
  }
  for (long j = first, width; j < last; j += width) {
    width = last - j < CHUNK ? last - j : CHUNK;
    pairs_scores(PARTS, mr, n_dim, A, lda, columns + PARTS * j * ld, 0, width, S, CHUNK);
    for (long r = 0; cut && r < mr; r++) fill_outside_f32(S + r * CHUNK, 0, lo[r] - n0 - j, hi[r] - n0 - j, width, -INFINITY);
    if (j == first) optimistic_bases(mr, S, width, (float)c2, row_max, row_sum, rescale, base);
    for (long r = 0; r < mr; r++) {
      const float *s = S + r * CHUNK;
      bf16 *to = P + r * PARTS * ldp + j;
      const __m512 b = _mm512_set1_ps(base[r]), c = _mm512_set1_ps((float)c2);
      __m512 sum = j == first ? _mm512_setzero_ps() : _mm512_load_ps(sums[r]), sum1 = _mm512_setzero_ps();
      for (long i = 0; i < width; i += 32) {
        __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s + i), c, b), y = _mm512_fmsub_ps(_mm512_loadu_ps(s + i + 16), c, b);
        __m512 p = PARTS > 1 ? (__m512)exp2_f32((vec_f32)x) : exp2_coarse(x), p1 = PARTS > 1 ? (__m512)exp2_f32((vec_f32)y) : exp2_coarse(y);
        sum += p;
        sum1 += p1;
        split(PARTS, p, p1, to + i, ldp);
      }
      _mm512_store_ps(sums[r], sum + sum1);
    }
  }
  for (long r = 0; r < mr; r += 16) {
    const __mmask16 rows = (__mmask16)(mr - r < 16 ? (1 << (mr - r)) - 1 : 0xffff);
    const __m512 sum = sums_of_rows(sums + r), n = _mm512_loadu_ps(keys + r), old = _mm512_maskz_loadu_ps(rows, row_sum + r);
    /* equal scores sum to the number of keys, up to rounding: hence the margin */
    __mmask16 good = _mm512_cmp_ps_mask(sum, n * _mm512_set1_ps(1.015625f), _CMP_LE_OQ);
    good &= _mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(rows, row_max + r), _mm512_set1_ps(-INFINITY), _CMP_GT_OQ) |
            _mm512_cmp_ps_mask(n, _mm512_setzero_ps(), _CMP_EQ_OQ);
    _mm512_mask_storeu_ps(row_sum + r, rows & good, old + sum);
    lagging |= (uint32_t)(__mmask16)(rows & ~good) << r;
  }
  return lagging;
}
ALWAYS_INLINE void pairs_drop_row(const int PARTS, bf16 *p, const uint64_t *keep, long first, long last) {
  for (int part = 0; part < PARTS; part++, p += PAIR_N)
    for (long j = first / 32 * 32; j < last; j += 32)
      _mm512_storeu_si512(p + j, _mm512_maskz_mov_epi16((__mmask32)(keep[j / 64] >> j % 64), _mm512_loadu_si512(p + j)));
}
#define PAIRS_KERNELS(KIND, PARTS)                                                                                                                       \
  static void pack_rows_##KIND(void *to, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long padded, long n_dim,        \
                               const uint8_t *attended) {                                                                                               \
    pairs_rows(PARTS, (bf16 *)to, ld, src, row, places, dim, dtype, first, last, padded, n_dim, attended);                                                       \
  }                                                                                                                                                     \
  static void pack_columns_##KIND(void *to, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long n_dim, const uint8_t *attended) {    \
    pairs_columns(PARTS, (bf16 *)to, src, row, places, dim, dtype, first, last, n_dim, attended);                                                                \
  }                                                                                                                                                     \
  static void pack_values_##KIND(void *to, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long capacity, long n_dim,    \
                                 const uint8_t *attended) {                                                                                             \
    pairs_values(PARTS, (bf16 *)to, ld, src, row, places, dim, dtype, first, last, capacity, n_dim, attended);                                                   \
  }                                                                                                                                                     \
  static void scores_##KIND(long mr, long n_dim, const void *A, long lda, const void *columns, long first, long last, void *S, long lds) {               \
    pairs_scores(PARTS, mr, n_dim, (const bf16 *)A, lda, (const bf16 *)columns, first, last, (float *)S, lds);                                           \
  }                                                                                                                                                     \
  static void weighted_sum_##KIND(long mr, long first, long last, const void *P, long ldp, const void *V, long ldv, long capacity, void *O, long ldo,    \
                                  const void *rescale) {                                                                                                \
    pairs_weighted_sum(PARTS, mr, first, last, (const bf16 *)P, ldp, (const bf16 *)V, ldv, capacity, (float *)O, ldo, (const float *)rescale);           \
  }                                                                                                                                                     \
  static void softmax_##KIND(long mr, uint32_t rows, void *S, long lds, void *P, long ldp, long first, long last, double c2, void *row_max,               \
                             void *row_sum, void *rescale) {                                                                                            \
    pairs_softmax(PARTS, mr, rows, (const float *)S, lds, (bf16 *)P, ldp, first, last, c2, (float *)row_max, (float *)row_sum, (float *)rescale);        \
  }                                                                                                                                                     \
  static void drop_row_##KIND(void *row, const uint64_t *keep, long first, long last) { pairs_drop_row(PARTS, (bf16 *)row, keep, first, last); }
#define PAIRS_OPTIMISTIC(KIND, PARTS)                                                                                                                    \
  static uint32_t optimistic_##KIND(long mr, long n_dim, const void *A, long lda, const void *columns, long first, long last, const long *lo,            \
                                    const long *hi, long n0, void *S, void *P, long ldp, double c2, void *row_max, void *row_sum, void *rescale) {       \
    return pairs_optimistic(PARTS, mr, n_dim, (const bf16 *)A, lda, (const bf16 *)columns, first, last, lo, hi, n0, (float *)S, (bf16 *)P, ldp, c2,      \
                            (float *)row_max, (float *)row_sum, (float *)rescale);                                                                       \
  }
PAIRS_KERNELS(bf16, 1)
#if HAVE_AMX
PAIRS_OPTIMISTIC(bf16, 1)
PAIRS_OPTIMISTIC(two_parts, 2)
PAIRS_KERNELS(two_parts, 2)
#endif
#endif
