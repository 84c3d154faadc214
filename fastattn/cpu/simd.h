/* Vector widths of the instruction set for which this file is compiled, tile sizes, and conversions of single elements.
 *
 * Arithmetic uses gcc's vector extensions, so SSE2, AVX2, AVX-512 and NEON share one source. Intrinsics are used only for what the
 * extensions lack: max, scaling by powers of two, transposes, half-precision conversion. */
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VBYTES 64
#define TILE_VECTORS 4 /* 32 registers: 6 x 4 accumulators */
#elif defined(__AVX2__)
#define VBYTES 32
#define TILE_VECTORS 2 /* 16 registers: 6 x 2 */
#elif defined(__aarch64__)
#define VBYTES 16
#define TILE_VECTORS 4
#else
#define VBYTES 16
#define TILE_VECTORS 2
#endif
#define PANEL_ROWS 6
#define MAX_PANEL 32 /* rows of any panel, at most; arrays with one number per row have room for whole vectors */
#define GRAD_M 96       /* backward: query rows of a block; P and dS (96 x 192) stay in L2 */
#define GRAD_N 192      /* backward: keys of a tile */
#define DIFFERENCE_FIRST 65536 /* |score| in bits from which the maximum is subtracted before scaling: `exponent` in rows.h */
#define BLOCK_N 256 /* keys of a forward tile; a multiple of 16 (dropout's blocks) and of every packed width */

/* A block of the backward: P and dS [GRAD_M][GRAD_N] reals, packed Q and dO, the tile's dK and dV, each row's keys [lo, hi). */
typedef struct {
  long ldq, ldv, rows, keys;
  void *P, *dS, *Q, *dO, *dK, *dV, *scratch;
  long *lo, *hi;
} GradBlock;

/* Rows of a head against all its keys, which are one tile, read in place (short.h). Row strides are in elements. */
typedef struct {
  long rows, keys, head_dim, head_dim_v;
  long reach; /* row i attends the first reach + i keys, if there are so many. Without a causal mask: at least keys */
  const void *q, *columns, *v; /* columns: K packed */
  long q_row, v_row;
  double c2;
  void *out; /* where the results go */
  long out_row;
  void *row_max, *row_sum; /* NULL: out is divided by the sum. Else out is what the generic epilogue takes, and these are written */
} ShortRows;

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum { DT_F32 = 0, DT_F64 = 1, DT_F16 = 2, DT_BF16 = 3, DT_E4M3 = 5, DT_E5M2 = 6 }; /* 4 is bool */

typedef struct __attribute__((packed)) { uint16_t x; } unaligned16;
typedef struct __attribute__((packed)) { float x; } unaligned32;
typedef struct __attribute__((packed)) { double x; } unaligned64;

ALWAYS_INLINE float bf16_to_float(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
/* round to nearest even; NaN becomes quiet NaN */
ALWAYS_INLINE uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? (uint16_t)((u >> 16) | 0x40u) : (uint16_t)rounded;
}
#if defined(__AVX512F__)
ALWAYS_INLINE __m256i floats_to_bf16(__m512 f) {
  const __m512i u = (__m512i)f, high = _mm512_srli_epi32(u, 16), odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), quiet));
}
#endif
#if defined(__F16C__)
ALWAYS_INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
ALWAYS_INLINE uint16_t float_to_half(float f) { return _cvtss_sh(f, 0); }
#elif defined(__aarch64__)
ALWAYS_INLINE float half_to_float(uint16_t h) {
  __fp16 x;
  memcpy(&x, &h, 2);
  return (float)x;
}
ALWAYS_INLINE uint16_t float_to_half(float f) {
  __fp16 x = (__fp16)f;
  uint16_t h;
  memcpy(&h, &x, 2);
  return h;
}
#else
/* exact: the half's bits as a float, scaled by a power of two; Inf and NaN get their exponent of all ones back */
ALWAYS_INLINE float half_to_float(uint16_t h) {
  uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13, sign = (uint32_t)(h & 0x8000u) << 16, u;
  float f;
  memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  memcpy(&u, &f, 4);
  if ((h & 0x7c00u) == 0x7c00u) u = magnitude | 0x7f800000u;
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}
/* round to nearest even, by letting the float adder round at the half's last bit */
ALWAYS_INLINE uint16_t float_to_half(float f) {
  uint32_t u, sign, r;
  memcpy(&u, &f, 4);
  sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
  if (u < 0x38800000u) {
    float magnitude, magic = 0.5f;
    memcpy(&magnitude, &u, 4);
    magnitude += magic;
    memcpy(&r, &magnitude, 4);
    return (uint16_t)(sign | (r - 0x3f000000u));
  }
  r = u + 0xfffu + ((u >> 13) & 1u) - 0x38000000u;
  return (uint16_t)(sign | (r >> 13));
}
#endif

/* float8_e4m3fn: a half's fields, but the exponent's bias is 7 instead of 15 and 0x7f is NaN. float8_e5m2 is the first byte of a half. */
ALWAYS_INLINE float e4m3_to_float(uint8_t x) {
  return (x & 0x7f) == 0x7f ? NAN : half_to_float((uint16_t)((x & 0x80) << 8 | (x & 0x7f) << 7)) * 256;
}
#if defined(__AVX2__) && defined(__F16C__)
/* sixteen of them as halves; those of float8_e4m3fn are too small by 2^8 */
ALWAYS_INLINE __m256i halves_of_bytes(__m128i bytes, int dtype) {
  const __m256i x = _mm256_cvtepu8_epi16(bytes), size = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  if (dtype == DT_E5M2) return _mm256_slli_epi16(x, 8);
  const __m256i nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f)), sign = _mm256_slli_epi16(_mm256_xor_si256(x, size), 8);
  return _mm256_or_si256(_mm256_or_si256(sign, _mm256_slli_epi16(size, 7)), _mm256_and_si256(nan, _mm256_set1_epi16(0x7fff)));
}
#endif
ALWAYS_INLINE double load_element(const char *p, int dtype) {
  switch (dtype) {
    case DT_F32: return ((const unaligned32 *)p)->x;
    case DT_F64: return ((const unaligned64 *)p)->x;
    case DT_F16: return half_to_float(((const unaligned16 *)p)->x);
    case DT_E4M3: return e4m3_to_float(*(const uint8_t *)p);
    case DT_E5M2: return half_to_float((uint16_t)(*(const uint8_t *)p << 8));
    default: return bf16_to_float(((const unaligned16 *)p)->x);
  }
}
ALWAYS_INLINE void store_element(char *p, int dtype, double x) {
  switch (dtype) {
    case DT_F32: ((unaligned32 *)p)->x = (float)x; break;
    case DT_F64: ((unaligned64 *)p)->x = x; break;
    case DT_F16: ((unaligned16 *)p)->x = float_to_half((float)x); break;
    default: ((unaligned16 *)p)->x = float_to_bf16((float)x);
  }
}
/* Prefetch distance in rows for K and V read in place: 48 if a head's rows are contiguous, 16 if other heads' rows, which this task
 * reads first, lie in between. */
#define AHEAD(row) ((row) > 1024 ? 16 : 48)
/* Rows past the last of a tile whose place in pages must be known, because they are prefetched. Four keys are done at once. */
static long ahead_of(long row) { return AHEAD(row) + 4; }
/* Into L2: memory that is read later in another order, which the processor's own prefetch does not follow. GCC takes calls of a function
 * that only prefetches away, as calls without effect; hence the asm. */
static void fetch_lines(const char *start, long bytes) {
  for (long byte = 0; byte < bytes; byte += 64) __builtin_prefetch(start + byte, 0, 2);
  __asm__ volatile("" : : "r"(start));
}
/* Where the rows of a tile of keys are: `row` bytes apart, or each at its place in pages. `ahead`: bytes from a row to the one that is
 * prefetched with it; in pages their places say it. */
typedef struct {
  long row, ahead;
  const long *places; /* or NULL */
} TileRows;
static TileRows rows_apart(long row) {
  const TileRows rows = {row, AHEAD(row) * row, 0};
  return rows;
}
/* Row i of a tile of keys: rows are `row` bytes apart, or, in pages, `places` has each one's distance from src. */
ALWAYS_INLINE const char *row_at(const char *src, long row, const long *places, long i) { return src + (places ? places[i] : i * row); }
ALWAYS_INLINE long element_size(int dtype) { return dtype == DT_F32 ? 4 : dtype == DT_F64 ? 8 : dtype >= DT_E4M3 ? 1 : 2; }
/* Before row i of a tile of keys is packed: prefetch a row AHEAD of it, where rows are in pages or 8-bit. One head of a row is read at a
 * time, and the processor's own prefetch does not follow. */
ALWAYS_INLINE void prefetch_key(const char *src, long row, const long *places, int dtype, long i, long n) {
  if (!places && dtype < DT_E4M3) return;
  const char *ahead = row_at(src, row, places, i + AHEAD(row));
  for (long byte = 0; byte < n * element_size(dtype); byte += 64) __builtin_prefetch(ahead + byte);
}
