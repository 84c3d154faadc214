/* Rows of qkv to rows of q, k and v, and back (transform.pxi). A piece is n elements of one head. Arithmetic is float, for double tensors
 * double. Rows that are not contiguous (`dim` is not the element's size) go element by element. */
#pragma once
#include "simd.h"

#define PIECES(KIND, T, REAL, LOADED, STORED)                                                                          \
  /* to = (from + bias) factor */                                                                                      \
  static void rescale_##KIND(T *restrict to, const char *restrict from, long dim, const REAL *restrict bias, REAL factor, long n) { \
    if (dim == (long)sizeof(T))                                                                                        \
      for (long j = 0; j < n; j++) to[j].x = STORED((LOADED(((const T *)from)[j].x) + bias[j]) * factor);              \
    else                                                                                                               \
      for (long j = 0; j < n; j++) to[j].x = STORED((LOADED(((const T *)(from + j * dim))->x) + bias[j]) * factor);    \
  }                                                                                                                    \
  /* to = from factor, which is added to sums before its rounding */                                                   \
  static void scale_##KIND(T *restrict to, const char *restrict from, long dim, REAL *restrict sums, REAL factor, long n) { \
    for (long j = 0; j < n; j++) {                                                                                     \
      REAL x = LOADED(dim == (long)sizeof(T) ? ((const T *)from)[j].x : ((const T *)(from + j * dim))->x) * factor;    \
      sums[j] += x;                                                                                                    \
      to[j].x = STORED(x);                                                                                             \
    }                                                                                                                  \
  }
PIECES(real32, unaligned32, float, , )
PIECES(real64, unaligned64, double, , )
PIECES(bf16, unaligned16, float, bf16_to_float, float_to_bf16)
PIECES(f16_one, unaligned16, float, half_to_float, float_to_half)

/* gcc does not vectorise the conversions of float16 */
#if defined(__AVX512F__)
#define HALVES 16
#define HALF_VEC __m512
#define HALF_LOAD(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define HALF_STORE(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), _mm512_cvtps_ph(v, 0))
#define FLOATS_LOAD(p) _mm512_loadu_ps(p)
#define FLOATS_STORE(p, v) _mm512_storeu_ps(p, v)
#elif defined(__F16C__)
#define HALVES 8
#define HALF_VEC __m256
#define HALF_LOAD(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define HALF_STORE(p, v) _mm_storeu_si128((__m128i *)(void *)(p), _mm256_cvtps_ph(v, 0))
#define FLOATS_LOAD(p) _mm256_loadu_ps(p)
#define FLOATS_STORE(p, v) _mm256_storeu_ps(p, v)
#endif
static void rescale_f16(unaligned16 *to, const char *from, long dim, const float *bias, float factor, long n) {
  long j = 0;
#if defined(HALVES)
  if (dim == 2)
    for (; j + HALVES <= n; j += HALVES) {
      HALF_VEC x = (HALF_LOAD(from + 2 * j) + FLOATS_LOAD(bias + j)) * factor;
      HALF_STORE(to + j, x);
    }
#endif
  rescale_f16_one(to + j, from + j * dim, dim, bias + j, factor, n - j);
}
static void scale_f16(unaligned16 *to, const char *from, long dim, float *sums, float factor, long n) {
  long j = 0;
#if defined(HALVES)
  if (dim == 2)
    for (; j + HALVES <= n; j += HALVES) {
      HALF_VEC x = HALF_LOAD(from + 2 * j) * factor;
      FLOATS_STORE(sums + j, FLOATS_LOAD(sums + j) + x);
      HALF_STORE(to + j, x);
    }
#endif
  scale_f16_one(to + j, from + j * dim, dim, sums + j, factor, n - j);
}

/* Stores past the caches, which saves reading the memory that is overwritten. Both addresses and `bytes` are multiples of 16. */
#if defined(__x86_64__)
static void stream_out(char *to, const char *from, long bytes) {
  for (long i = 0; i < bytes; i += 16) _mm_stream_si128((__m128i *)(void *)(to + i), _mm_load_si128((const __m128i *)(const void *)(from + i)));
}
static void stream_end(void) { _mm_sfence(); }
#else
static void stream_out(char *to, const char *from, long bytes) { memcpy(to, from, (size_t)bytes); }
static void stream_end(void) {}
#endif

enum { STREAM_BYTES_AT_ONCE = 4096 };

/* to = (from + bias) factor for `rows` rows of a head, `to_row` and `from_row` bytes apart. `stream`: store past the caches. */
static void rescale_rows(char *to, long to_row, const char *from, long from_row, long dim, const void *bias, double factor, long rows, long n,
                         int dtype, int stream) {
  char buffer[STREAM_BYTES_AT_ONCE] __attribute__((aligned(64)));
  long size = element_size(dtype), real = dtype == DT_F64 ? 8 : 4, step = stream ? STREAM_BYTES_AT_ONCE / size : n;
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < n; j += step) {
      long m = n - j < step ? n - j : step;
      char *end = to + i * to_row + j * size;
      void *here = stream ? buffer : end;
      const char *s = from + i * from_row + j * dim;
      const void *b = (const char *)bias + j * real;
      switch (dtype) {
        case DT_F32: rescale_real32(here, s, dim, b, (float)factor, m); break;
        case DT_F64: rescale_real64(here, s, dim, b, factor, m); break;
        case DT_F16: rescale_f16(here, s, dim, b, (float)factor, m); break;
        default: rescale_bf16(here, s, dim, b, (float)factor, m);
      }
      if (stream) stream_out(end, buffer, m * size);
    }
}

/* One row of dq, dk and dv into a row of dqkv: to = from factor, head by head, `head` bytes apart; also added to the columns' sums. Not
 * past the caches: the result is usually new memory, which the system has just zeroed, so 36 MB would take 14 ms instead of 10. */
typedef struct { const char *from[3]; long head[3], dim[3]; } HeadRows;
static void join_row(char *to, const HeadRows *x, long heads, long n, void *sums, double factor, int dtype) {
  long size = element_size(dtype), real = dtype == DT_F64 ? 8 : 4;
  char *sum = (char *)sums;
  for (int part = 0; part < 3; part++)
    for (long h = 0; h < heads; h++, to += n * size, sum += n * real) {
      const char *from = x->from[part] + h * x->head[part];
      double f = part ? 1.0 : factor;
      switch (dtype) {
        case DT_F32: scale_real32((void *)to, from, x->dim[part], (void *)sum, (float)f, n); break;
        case DT_F64: scale_real64((void *)to, from, x->dim[part], (void *)sum, f, n); break;
        case DT_F16: scale_f16((void *)to, from, x->dim[part], (void *)sum, (float)f, n); break;
        default: scale_bf16((void *)to, from, x->dim[part], (void *)sum, (float)f, n);
      }
    }
}
