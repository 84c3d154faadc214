/* The backward with bfloat16 products (pairs.h): dV^T += dO^T P and dK^T += Q^T dS.
 * A block's reals become operands: P and dS as pairs of query rows (columns are keys), dS as rows too, dO and Q transposed. 32 rows from
 * row i0 at a time; of P and dS only the columns [first, last) that some of these rows attend. */
#pragma once
#if defined(__AVX512BF16__)
ALWAYS_INLINE void pairs_of_rows(const int PARTS, bf16 *dst, const float *src, long i0, long rows, long first, long last) {
  bf16 a[PARTS][32] __attribute__((aligned(64))), b[PARTS][32] __attribute__((aligned(64)));
  for (long i = i0; i < i0 + 32; i += 2)
    for (long j = first; j < last; j += 32) {
      const float *x = src + i * GRAD_N + j, *y = x + GRAD_N;
      const __mmask16 upper = i < rows ? 0xffff : 0, lower = i + 1 < rows ? 0xffff : 0;
      split(PARTS, _mm512_maskz_loadu_ps(upper, x), _mm512_maskz_loadu_ps(upper, x + 16), a[0], 32);
      split(PARTS, _mm512_maskz_loadu_ps(lower, y), _mm512_maskz_loadu_ps(lower, y + 16), b[0], 32);
      for (int p = 0; p < PARTS; p++) {
        bf16 *to = dst + (PARTS * j + 16 * p) * GRAD_M + i * 16;
        interleave(_mm512_load_si512(a[p]), _mm512_load_si512(b[p]), to, to + PARTS * 16 * GRAD_M);
      }
    }
}
ALWAYS_INLINE void rows_of(const int PARTS, bf16 *dst, const float *src, long i0, long rows, long first, long last) {
  for (long i = i0; i < i0 + 32; i++)
    for (long j = first; j < last; j += 32) {
      const __mmask16 inside = i < rows ? 0xffff : 0;
      split(PARTS, _mm512_maskz_loadu_ps(inside, src + i * GRAD_N + j), _mm512_maskz_loadu_ps(inside, src + i * GRAD_N + j + 16),
            dst + i * PARTS * GRAD_N + j, GRAD_N);
    }
}
/* [rows][ld] -> [ld][GRAD_M], rows a multiple of 32 */
ALWAYS_INLINE void transpose_rows(const int PARTS, bf16 *dst, const bf16 *src, long ld, long rows) {
  bf16 tile[2][16][32] __attribute__((aligned(64)));
  for (int p = 0; p < PARTS; p++, src += ld, dst += GRAD_M)
    for (long i = 0; i < rows; i += 32)
      for (long d = 0; d < ld; d += 32) {
        for (long k = 0; k < 16; k++) {
          const bf16 *a = src + (i + 2 * k) * PARTS * ld + d;
          interleave(_mm512_loadu_si512(a), _mm512_loadu_si512(a + PARTS * ld), tile[0][k], tile[1][k]);
        }
        for (int half = 0; half < 2; half++)
          transpose_f32((const float *)(const void *)tile[half], 16, (float *)(void *)(dst + (d + 16 * half) * PARTS * GRAD_M + i), PARTS * GRAD_M / 2);
      }
}
/* Offsets of the operands in a block's scratch: transposed rows [ld][GRAD_M]; pairs and rows of [GRAD_M][GRAD_N]; each PARTS times. */
#define SCRATCH_DO_T(w) ((bf16 *)(w)->scratch)
#define SCRATCH_Q_T(w) (SCRATCH_DO_T(w) + PARTS * GRAD_M * (w)->ldv)
#define SCRATCH_P(w) (SCRATCH_Q_T(w) + PARTS * GRAD_M * (w)->ldq)
#define SCRATCH_DS(w) (SCRATCH_P(w) + PARTS * GRAD_M * GRAD_N)
#define SCRATCH_DS_ROWS(w) (SCRATCH_DS(w) + PARTS * GRAD_M * GRAD_N)
static long pairs_scratch(long ldq, long ldv, long parts) { return 2 * parts * (GRAD_M * (ldq + ldv) + 3 * GRAD_M * GRAD_N); }

/* Make the operands. Returns dS as rows, the operand of dQ += dS K. */
ALWAYS_INLINE const void *pairs_operands(const int PARTS, const GradBlock *w) {
  const long rows = (w->rows + 31) / 32 * 32;
  transpose_rows(PARTS, SCRATCH_DO_T(w), (const bf16 *)w->dO, w->ldv, rows);
  transpose_rows(PARTS, SCRATCH_Q_T(w), (const bf16 *)w->Q, w->ldq, rows);
  for (long i = 0; i < rows; i += 32) {
    /* also the columns of rows that attend nothing, as in pairs_key_gradients, and of all rows of a dQ panel that shares some of these */
    long lo = w->keys, hi = 0, r = i - PAIR_PANEL % 32 > 0 ? i - PAIR_PANEL % 32 : 0;
    for (; r < i + 32 + PAIR_PANEL % 32 && r < w->rows; r++) {
      lo = w->lo[r] < lo ? w->lo[r] : lo;
      hi = w->hi[r] > hi ? w->hi[r] : hi;
    }
    const long first = lo / 32 * 32, last = (hi + 31) / 32 * 32;
    pairs_of_rows(PARTS, SCRATCH_P(w), (const float *)w->P, i, w->rows, first, last);
    pairs_of_rows(PARTS, SCRATCH_DS(w), (const float *)w->dS, i, w->rows, first, last);
    rows_of(PARTS, SCRATCH_DS_ROWS(w), (const float *)w->dS, i, w->rows, first, last);
  }
  return SCRATCH_DS_ROWS(w);
}
/* dV^T [ldv][GRAD_N] += dO^T P and dK^T += Q^T dS, 32 keys at a time, over the query rows that attend them */
ALWAYS_INLINE void pairs_key_gradients(const int PARTS, const GradBlock *w) {
  const long lda = PARTS * GRAD_M, group = PARTS * 16 * GRAD_M;
  long begin = 0, end = 0;
  for (long j = 0; j < w->keys; j += 32) {
    while (begin < w->rows && w->hi[begin] <= j) begin++;
    if (end < begin) end = begin;
    while (end < w->rows && w->lo[end] < j + 32) end++;
    if (begin >= end) continue;
    const long t0 = begin / 32 * 32, t1 = (end + 31) / 32 * 32;
    pairs_product(ADDED, COUNT_OF(PARTS), w->ldv, t0, t1, SCRATCH_DO_T(w), lda, GRAD_M, SCRATCH_P(w) + j * lda, group, 16 * GRAD_M, (float *)w->dV + j, GRAD_N, 32, 0);
    pairs_product(ADDED, COUNT_OF(PARTS), w->ldq, t0, t1, SCRATCH_Q_T(w), lda, GRAD_M, SCRATCH_DS(w) + j * lda, group, 16 * GRAD_M, (float *)w->dK + j, GRAD_N, 32, 0);
  }
}
#define PAIRS_BACKWARD(KIND, PARTS)                                                                     \
  static const void *grad_operands_##KIND(const GradBlock *w) { return pairs_operands(PARTS, w); }      \
  static void key_gradients_##KIND(const GradBlock *w) { pairs_key_gradients(PARTS, w); }
PAIRS_BACKWARD(bf16, 1)
#if HAVE_AMX
PAIRS_BACKWARD(two_parts, 2)
#endif
/* Row j of a transposed gradient. 16 rows at a time are transposed into scratch, so j must go up from a multiple of 16. */
static const void *pairs_key_row(const void *G, long ld, long j, void *scratch) {
  if (j % 16 == 0)
    for (long d = 0; d < ld; d += 16) transpose_f32((const float *)G + d * GRAD_N + j, GRAD_N, (float *)scratch + d, ld);
  return (const float *)scratch + j % 16 * ld;
}
#endif
