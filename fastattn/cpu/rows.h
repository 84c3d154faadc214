/* Rows of a tile in one accumulator type: conversion and packing, score, mask and softmax. Included after real.h,
 * once per type.
 *
 * [first, last) are the keys of a tile that some row of the task may attend. `attended`, which exists if there is a boolean mask, says
 * which of them are attended. All other keys are packed as zeros, so what they hold (NaN in padding, say) is never read. */

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
#if defined(__AVX2__) && defined(__F16C__)
    else if (dtype >= DT_E4M3) {
      const __m256 scale = _mm256_set1_ps(dtype == DT_E4M3 ? 256 : 1);
      for (; j + 16 <= n; j += 16) {
        const __m256i h = halves_of_bytes(_mm_loadu_si128((const __m128i *)(src + j)), dtype);
        _mm256_storeu_ps(dst + j, _mm256_cvtph_ps(_mm256_castsi256_si128(h)) * scale);
        _mm256_storeu_ps(dst + j + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)) * scale);
      }
    }
#endif
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
    else if (dtype == DT_BF16) {
#if defined(__AVX512F__)
      for (; j + 16 <= n; j += 16) _mm256_storeu_si256((__m256i *)(dst + 2 * j), floats_to_bf16((__m512)(LOAD(src + j) * SPLAT(scale))));
#else
      for (; j < n; j++) ((unaligned16 *)dst)[j].x = float_to_bf16(src[j] * scale);
#endif
    }
#endif
  }
  for (; j < n; j++) store_element(dst + j * stride, dtype, src[j] * scale);
}

/* ------------------------------------------------------------------ packing */
static void name(pack_rows)(void *to, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long padded, long n_dim,
                            const uint8_t *attended) {
  REAL *dst = (REAL *)to;
  for (long i = 0; i < padded; i++, dst += ld) {
    prefetch_key(src, row, places, dtype, i, n_dim);
    if (i < first || i >= last || (attended && !attended[i])) memset(dst, 0, (size_t)(ld * (long)sizeof(REAL)));
    else name(load_row)(dst, ld, row_at(src, row, places, i), dim, dtype, n_dim);
  }
}
static void name(pack_values)(void *to, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long capacity, long n_dim,
                              const uint8_t *attended) {
  (void)capacity;
  name(pack_rows)(to, ld, src, row, places, dim, dtype, first, last, last, n_dim, attended);
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
static void name(pack_columns)(void *to, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long n_dim, const uint8_t *attended) {
  REAL part[VL * VL] __attribute__((aligned(64)));
  for (long block = 0; block < last; block += CB)
    for (long j = block; j < block + CB && j < last; j += VL) {
      REAL *dst = (REAL *)to + block * n_dim + (j - block);
      int inside = !attended && !places && j >= first && j + VL <= last;
      for (long d = 0; d < n_dim; d += VL) {
        long w = n_dim - d < VL ? n_dim - d : VL;
        const char *s = src + j * row + d * dim; /* where a block of whole vectors begins */
        if (inside && w == VL && dtype == DT_REAL && dim == (long)sizeof(REAL) && row % (long)sizeof(REAL) == 0) {
          name(transpose)((const REAL *)(const void *)s, row / (long)sizeof(REAL), dst + d * CB, CB);
          continue;
        }
        for (long i = 0; i < VL; i++) {
          if (j + i < first || j + i >= last || (attended && !attended[j + i])) memset(part + i * VL, 0, sizeof(REAL) * (size_t)VL);
          else name(load_row)(part + i * VL, VL, row_at(src, row, places, j + i) + d * dim, dim, dtype, w);
        }
        if (w == VL) name(transpose)(part, VL, dst + d * CB, CB);
        else
          for (long e = 0; e < w; e++)
            for (long i = 0; i < VL; i++) dst[(d + e) * CB + i] = part[i * VL + e];
      }
    }
}

/* ------------------------------------------------------------------ GEMMs of a panel
 * scores: S[mr][first..last) = A K^T. first is a multiple of VL; columns up to the next multiple of VL are written. Chains of 64
 * terms are added up: one chain of 256 terms rounds three times as much as a BLAS that sums in lanes. */
#define CHAIN 64
static void name(scores)(long mr, long n_dim, const void *A, long lda, const void *columns, long first, long last, void *S, long lds) {
  static const REAL ones[PANEL_ROWS] = {1, 1, 1, 1, 1, 1};
  for (long j = first, width; j < last; j += width) {
    const REAL *B = (const REAL *)columns + j / CB * CB * n_dim + j % CB;
    long vectors = (last - j + VL - 1) / VL, rest = TILE_VECTORS - j % CB / VL;    /* needed, and left in this block of columns */
    vectors = vectors < rest ? vectors : rest;
    int index = vectors >= 4 ? 2 : vectors >= 2 ? 1 : 0;
    width = VL << index;
    for (long d = 0; d < n_dim; d += CHAIN)
      name(products)[d ? name(RESCALE) : name(ZERO)][mr - 1][index](n_dim - d < CHAIN ? n_dim - d : CHAIN, (const REAL *)A + d, lda,
                                                                     (const char *)(B + d * CB), CB * (long)sizeof(REAL), 0, 0, (REAL *)S + j, lds, ones);
  }
}
#undef CHAIN
/* O[mr][ldo] = O * rescale + P[mr][first..last) V[first..last)[ldv] */
static void name(weighted_sum)(long mr, long first, long last, const void *P, long ldp, const void *V, long ldv, long capacity, void *O, long ldo,
                               const void *rescale) {
  const long bytes = (long)sizeof(REAL);
  (void)capacity;
  name(multiply)(name(RESCALE), mr, last - first, ldv, (const REAL *)P + first, ldp, (const char *)((const REAL *)V + first * ldv), ldv * bytes,
                 VL * bytes, 0, 0, (REAL *)O, ldo, (const REAL *)rescale);
}
/* dV += P^T dO and dK += dS^T Q, six keys at a time, over the query rows that attend them (lo and hi rise with the row) */
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
                   (const char *)w->dO + begin * w->ldv * bytes, w->ldv * bytes, VL * bytes, 0, 0, (REAL *)w->dV + j * w->ldv, w->ldv, 0);
    name(multiply)(name(TRANSPOSED_A), mr, end - begin, w->ldq, (const REAL *)w->dS + begin * GRAD_N + j, GRAD_N,
                   (const char *)w->Q + begin * w->ldq * bytes, w->ldq * bytes, VL * bytes, 0, 0, (REAL *)w->dK + j * w->ldq, w->ldq, 0);
  }
}
static const void *name(key_row)(const void *G, long ld, long j, void *scratch) {
  (void)scratch;
  return (const REAL *)G + j * ld;
}

/* ------------------------------------------------------------------ few query rows: dot products with rows of K
 * Rows of K and V, the caller's or packed, are contiguous and a multiple of VL long. A sum over head_dim runs in VL lanes, which are
 * added as a tree. That needs no transposed K and rounds several times less than one long chain. */
#define ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5)
#if REAL_BITS == 32 && defined(__AVX512F__)
#define DOT_KEYS 4
/* Horizontal sums of 4 x 4 vectors, 2 shuffles each. 128-bit lane r of the result holds the sums of row r, in key order. */
ALWAYS_INLINE __m512 name(fold_lanes)(vec x, vec y) {
  return _mm512_shuffle_f32x4((__m512)x, (__m512)y, 0x88) + _mm512_shuffle_f32x4((__m512)x, (__m512)y, 0xdd);
}
ALWAYS_INLINE __m512 name(fold)(__m512 x, __m512 y) { return _mm512_shuffle_ps(x, y, 0x88) + _mm512_shuffle_ps(x, y, 0xdd); }
ALWAYS_INLINE __m512 name(by_row)(vec a, vec b, vec c, vec d) { return name(fold_lanes)((vec)name(fold_lanes)(a, b), (vec)name(fold_lanes)(c, d)); }
#define SUMS(p, q, r, s)                                                                                                              \
  name(fold)(name(fold)(name(by_row)(c##p##0, c##q##0, c##r##0, c##s##0), name(by_row)(c##p##1, c##q##1, c##r##1, c##s##1)),          \
             name(fold)(name(by_row)(c##p##2, c##q##2, c##r##2, c##s##2), name(by_row)(c##p##3, c##q##3, c##r##3, c##s##3)))
#else
#define DOT_KEYS 2
#endif
ALWAYS_INLINE void name(dots)(const int MR, const int dtype, const int IN_PAGES, long n_dim, const REAL *A, long lda, const char *K,
                              const TileRows *rows, long first, long last, REAL *S, long lds) {
  const long row = rows->row, ahead = rows->ahead, *places = rows->places;
  const long step = VL * element_size(dtype);
#define DECLARE(r) vec c##r##0 = {0}, c##r##1 = {0}, c##r##2 = {0}, c##r##3 = {0};
#define STEP(r)                             \
  if (r < MR) {                             \
    vec a = LOAD(A + r * lda + d);          \
    c##r##0 += a * x0;                      \
    c##r##1 += a * x1;                      \
    if (DOT_KEYS > 2) c##r##2 += a * x2;    \
    if (DOT_KEYS > 2) c##r##3 += a * x3;    \
  }
  for (long j = first; j < last; j += DOT_KEYS) { /* past the last key: the last key again, in columns that are masked afterwards */
#define KEY(i) (IN_PAGES ? K + places[i] : K + (i) * row)
#define AHEAD_OF(i) (IN_PAGES ? K + places[(i) + AHEAD(row)] : K + (i) * row + ahead)
    const char *k0 = KEY(j), *k1 = j + 1 < last ? KEY(j + 1) : k0, *k2 = j + 2 < last ? KEY(j + 2) : k1, *k3 = j + 3 < last ? KEY(j + 3) : k2;
    const char *a0 = AHEAD_OF(j), *a1 = AHEAD_OF(j + 1), *a2 = DOT_KEYS > 2 ? AHEAD_OF(j + 2) : a1, *a3 = DOT_KEYS > 2 ? AHEAD_OF(j + 3) : a1;
#undef KEY
#undef AHEAD_OF
    ROWS(DECLARE)
    for (long d = 0, at = 0; d < n_dim; d += VL, at += step) {
      vec x0 = name(load_as)(k0 + at, dtype), x1 = name(load_as)(k1 + at, dtype), x2 = x1, x3 = x1;
      if (DOT_KEYS > 2) x2 = name(load_as)(k2 + at, dtype), x3 = name(load_as)(k3 + at, dtype);
      if (step >= 32 || at % 64 == 0) { /* a line of 64 bytes is several steps of 8-bit elements */
        __builtin_prefetch(a0 + at);
        __builtin_prefetch(a1 + at);
        if (DOT_KEYS > 2) {
          __builtin_prefetch(a2 + at);
          __builtin_prefetch(a3 + at);
        }
      }
      ROWS(STEP)
    }
#if REAL_BITS == 32 && defined(__AVX512F__)
    __m512 low = SUMS(0, 1, 2, 3);
    _mm_storeu_ps(S + j, _mm512_castps512_ps128(low));
    if (MR > 1) _mm_storeu_ps(S + lds + j, _mm512_extractf32x4_ps(low, 1));
    if (MR > 2) _mm_storeu_ps(S + 2 * lds + j, _mm512_extractf32x4_ps(low, 2));
    if (MR > 3) _mm_storeu_ps(S + 3 * lds + j, _mm512_extractf32x4_ps(low, 3));
    if (MR > 4) {
      vec c60 = {0}, c61 = c60, c62 = c60, c63 = c60;
      __m512 high = SUMS(4, 5, 6, 6); /* there is no row 6 */
      _mm_storeu_ps(S + 4 * lds + j, _mm512_castps512_ps128(high));
      if (MR > 5) _mm_storeu_ps(S + 5 * lds + j, _mm512_extractf32x4_ps(high, 1));
    }
#else
#define FINAL(r) if (r < MR) S[r * lds + j] = name(reduce_add)(c##r##0), S[r * lds + j + 1] = name(reduce_add)(c##r##1);
    ROWS(FINAL)
#undef FINAL
#endif
  }
#undef DECLARE
#undef STEP
}
#undef ROWS
#undef SUMS
#undef DOT_KEYS
static void name(direct_scores)(long mr, long n_dim, const void *A, long lda, const char *K, const TileRows *rows, int dtype, long first, long last,
                                void *S, long lds) {
#define DOTS(R, T) (rows->places ? name(dots)(R, T, 1, n_dim, (const REAL *)A, lda, K, rows, first, last, (REAL *)S, lds) : \
                                   name(dots)(R, T, 0, n_dim, (const REAL *)A, lda, K, rows, first, last, (REAL *)S, lds))
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
  if (dtype == DT_E4M3) { EACH_HEIGHT(DT_E4M3) return; }
  if (dtype == DT_E5M2) { EACH_HEIGHT(DT_E5M2) return; }
#endif
  EACH_HEIGHT(DT_REAL)
  (void)dtype;
#undef DOTS
#undef EACH_HEIGHT
}
static void name(direct_sum)(long mr, long first, long last, const void *P, long ldp, const char *V, const TileRows *rows, int dtype, long n_dim,
                             void *O, long ldo, const void *rescale) {
#define MODE(PLACE) (dtype == DT_F16 ? name(PLACE##_F16) : dtype == DT_BF16 ? name(PLACE##_BF16) : dtype == DT_E4M3 ? name(PLACE##_E4M3) : \
                     dtype == DT_E5M2 ? name(PLACE##_E5M2) : name(PLACE))
  const long *places = rows->places;
  name(multiply)(places ? MODE(PAGED) : MODE(IN_PLACE), mr, last - first, n_dim, (const REAL *)P + first, ldp, places ? V : V + first * rows->row,
                 rows->row, VL * element_size(dtype), rows->ahead, places ? places + first : 0, (REAL *)O, ldo, (const REAL *)rescale);
#undef MODE
}

/* ------------------------------------------------------------------ score and mask of a row, in L1
 * s = softcap(s * scale) - slope * |distance - j| + bias[j]. slope_out, if not NULL, gets the softcap's derivative, for the backward. */
static void name(score_row)(void *row, long first, long last, double scale, double softcap, double slope, double distance, const void *bias, void *slope_out) {
  REAL *s = (REAL *)row, *slopes = (REAL *)slope_out;
  const REAL *b = (const REAL *)bias;
  const double most = REAL_BITS == 32 ? FLT_MAX : DBL_MAX; /* finite, because infinity times a dot product of 0 is NaN */
  const vec factor = SPLAT((REAL)fmin(fmax(softcap > 0 ? scale / softcap : scale, -most), most)), cap = SPLAT((REAL)softcap), m = SPLAT((REAL)slope);
  const ivec sign_bit = (ivec)SPLAT((REAL)-0.0);
  vec away;                                /* distance - j, exact: integers */
  for (long i = 0; i < VL; i++) away[i] = (REAL)(distance - (double)(first + i));
  for (long j = first; j < last; j += VL, away -= SPLAT((REAL)VL)) {
    vec x = LOAD(s + j) * factor;
    if (softcap > 0) {
      vec c = name(tanh)(x);
      if (slopes) STORE(slopes + j, name(slope_of_tanh)(x, c));
      x = c * cap;
    }
    if (slope != 0) x -= m * (vec)((ivec)away & ~sign_bit);
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
/* The structural mask: `value`, -inf for a score or 0 for a probability, in [first, lo) and [hi, last). */
static void name(fill_outside)(void *row, long first, long lo, long hi, long last, double value) {
  REAL *s = (REAL *)row;
  for (long j = first; j < lo && j < last; j++) s[j] = (REAL)value;
  for (long j = hi > first ? hi : first; j < last; j++) s[j] = (REAL)value;
}

/* The exponent of P, in two forms. While |base c| is below DIFFERENCE_FIRST (simd.h) it is s c - u in one instruction, u = base c
 * rounded. Then all P of a row have a common factor 2^residue with residue = base c - u, |residue| at most 2^-9. For larger scores the
 * residue could be any number of bits and base c could overflow. There the exponent is (s - base) c, which has no residue. Without a
 * fused instruction that form costs the same and is always used. */
ALWAYS_INLINE int name(difference_first)(REAL base, REAL c) {
  return !FUSES || !(base * c > -(REAL)DIFFERENCE_FIRST && base * c < (REAL)DIFFERENCE_FIRST);
}
ALWAYS_INLINE vec name(residue)(vec base, vec c) {
#if FUSES
  const vec u = base * c, limit = SPLAT(DIFFERENCE_FIRST);
  return (vec)((ivec)name(multiply_subtract)(base, c, u) & (ivec)(u > -limit) & (ivec)(u < limit));
#else
  return (vec){0};
#endif
}
/* the exponent of P; b is the base, or u */
ALWAYS_INLINE vec name(exponent)(const int DIFFERENCE, vec s, vec b, vec c) {
#if FUSES
  if (!DIFFERENCE) return name(multiply_subtract)(s, c, b);
#endif
  return (s - b) * c;
}
/* P = 2^((s - base) c2) over [first, last), in place. Returns the sum. */
ALWAYS_INLINE REAL name(exponentials)(const int DIFFERENCE, REAL *s, long first, long last, REAL base, REAL c2) {
  vec b = SPLAT(DIFFERENCE ? base : base * c2), c = SPLAT(c2), sum = {0}, sum1 = {0};
#define EXPONENTIAL(at) name(exp2)(name(exponent)(DIFFERENCE, LOAD(s + (at)), b, c))
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

/* The factor 2^residue cancels in out, but not in lse (5e-4 at scores of 10^4). Returns minus its natural log, which is to be added to
 * the log of a sum of P. */
static double name(rounding_of_unit)(double m, double c2) {
  const REAL u = (REAL)m * (REAL)c2;
  return name(difference_first)((REAL)m, (REAL)c2) ? 0 : -0.69314718055994531 * fma(m, (REAL)c2, -(double)u);
}
/* ------------------------------------------------------------------ online softmax
 * For each row over [first, last): the new maximum m, P = 2^((s - m) c2) in place, the sum l, and the factor that rescales what was
 * accumulated under the old maximum. A row that has attended nothing keeps m = -inf and l = 0, without a NaN. All rows are done;
 * the argument `rows` is for pairs.h. */
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
/* For each of mr rows: row_max = max(row_max, peak); base is what to subtract from scores, 0 while the row has attended nothing;
 * rescale = 2^((old - new) c2); row_sum is rescaled. Works in whole vectors, for which peak, rescale and base have room. */
ALWAYS_INLINE void name(raise_maxima)(long mr, const REAL *peak, REAL c2, REAL *row_max, REAL *row_sum, REAL *rescale, REAL *base) {
  for (long r = 0; r < mr; r += VL) {
    vec old = LOAD(row_max + r), top = VMAX(LOAD(peak + r), old), nothing = SPLAT((REAL)-INFINITY);
    vec b = name(choose)((ivec)(top == nothing), (vec){0}, top), c = SPLAT(c2);
    vec exponent = (old - b) * c + (name(residue)(b, c) - name(residue)(old, c)); /* the difference of what `exponentials` subtracted before and will subtract */
    vec factor = name(choose)((ivec)(top == old), SPLAT(1), name(exp2)(exponent));
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
static void name(softmax)(long mr, uint32_t rows, void *S, long lds, void *P, long ldp, long first, long last, double c2, void *row_max, void *row_sum,
                          void *rescale) {
  REAL peak[MAX_PANEL], base[MAX_PANEL], *s = (REAL *)S, *l = (REAL *)row_sum;
  (void)rows;
  (void)P;
  (void)ldp;
  for (long r = 0; r < mr; r++) peak[r] = name(row_peak)(s + r * lds, first, last);
  for (long r = mr; r % VL; r++) peak[r] = 0;
  name(raise_maxima)(mr, peak, (REAL)c2, (REAL *)row_max, l, (REAL *)rescale, base);
  for (long r = 0; r < mr; r++)
    l[r] += name(difference_first)(base[r], (REAL)c2) ? name(exponentials)(1, s + r * lds, first, last, base[r], (REAL)c2)
                                                      : name(exponentials)(0, s + r * lds, first, last, base[r], (REAL)c2);
}
/* v where the keep bits from column j (a multiple of VL) are 1, else 0 */
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

/* to += from * factor: adds a split's row to O = sum over splits of O_s 2^((m_s - m) c2); see merge_task in forward.pxi */
static void name(add_scaled)(void *to, const void *from, double factor, long n) {
  REAL *g = (REAL *)to;
  const REAL *s = (const REAL *)from;
  for (long j = 0; j < n; j++) g[j] += s[j] * (REAL)factor;
}
