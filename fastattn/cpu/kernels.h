/* The operations on a tile, as tables that the Cython loops call. There is one table for each kind of arithmetic, so that a loop
 * is written once. S, O, row_max and row_sum are reals (float or double). Packed operands are reals too, or bfloat16 (pairs.h). */
#pragma once
#include "simd.h"
#include "program.h"
#define REAL_BITS 32
#include "real.h"
#include "rows.h"
#include "short.h"
#include "rows_backward.h"
#include "functions.h"
#include "program_rows.h"
#include "undefine.h"
#define REAL_BITS 64
#include "real.h"
#include "rows.h"
#include "short.h"
#include "rows_backward.h"
#include "functions.h"
#include "program_rows.h"
#include "undefine.h"
#include "dropout.h"
#include "pairs.h"
#include "pairs_backward.h"

/* attended[j] |= mask[j] and bit j of `seen`, for keys [first, last) of a tile: attended[j] says whether some row attends key j. NULL is
 * no mask. Returns whether this row attends any. */
static int mark_attended(uint8_t *attended, const char *mask, long stride, const uint64_t *seen, long first, long last) {
  int any = 0;
  for (long j = first; j < last; j++) {
    const uint8_t attends = (uint8_t)((mask ? mask[j * stride] : 1) & (seen ? seen[j / 64] >> j % 64 & 1 : 1));
    attended[j] |= attends;
    any |= attends;
  }
  return any;
}

typedef struct {
  long real;    /* bytes of a real */
  long operand; /* bytes of an element of a packed operand */
  long panel;   /* rows of a panel, at most */
  long cols;    /* scores start and end at multiples of this many keys */
  long block_n; /* keys of a forward tile, at most BLOCK_N */
  long align;   /* packed rows are padded to this many elements */
  int half;     /* direct_* read float16 and bfloat16 in place */
  void (*load_row)(void *dst, long padded, const char *src, long stride, int dtype, long n);
  void (*store_row)(char *dst, long stride, int dtype, const void *src, double scale, long n);
  void (*pack_rows)(void *to, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long padded, long n_dim,
                    const uint8_t *attended);
  void (*pack_columns)(void *to, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long n_dim, const uint8_t *attended);
  void (*pack_values)(void *to, long ld, const char *src, long row, const long *places, long dim, int dtype, long first, long last, long capacity, long n_dim,
                      const uint8_t *attended);
  void (*scores)(long mr, long n_dim, const void *A, long lda, const void *columns, long first, long last, void *S, long lds);
  void (*weighted_sum)(long mr, long first, long last, const void *P, long ldp, const void *V, long ldv, long capacity, void *O, long ldo, const void *rescale);
  const void *(*grad_operands)(const GradBlock *block); /* NULL: P and dS are operands already */
  void (*key_gradients)(const GradBlock *block);
  const void *(*key_row)(const void *G, long ld, long j, void *scratch);
  void (*direct_scores)(long mr, long n_dim, const void *A, long lda, const char *K, const TileRows *rows, int dtype, long first, long last, void *S,
                        long lds);
  void (*direct_sum)(long mr, long first, long last, const void *P, long ldp, const char *V, const TileRows *rows, int dtype, long n_dim, void *O, long ldo,
                     const void *rescale);
  void (*score_row)(void *row, long first, long last, double scale, double softcap, double slope, double distance, const void *bias, void *slope_out);
  void (*mask_row)(void *row, long first, long last, const char *mask, long stride);
  void (*fill_outside)(void *row, long first, long lo, long hi, long last, double value);
  uint32_t (*optimistic)(long mr, long n_dim, const void *A, long lda, const void *columns, long first, long last, const long *lo, const long *hi, long n0,
                         void *S, void *P, long ldp, double c2, void *row_max, void *row_sum, void *rescale); /* or NULL */
  void (*softmax)(long mr, uint32_t rows, void *S, long lds, void *P, long ldp, long first, long last, double c2, void *row_max, void *row_sum, void *rescale);
  void (*short_rows)(const ShortRows *w); /* or NULL */
  double (*rounding_of_unit)(double m, double c2);
  void (*drop_row)(void *row, const uint64_t *keep, long first, long last);
  void (*grad_row)(void *score, void *dprob, long first, long last, double scale, double lse, double delta, const uint64_t *keep, double keep_scale);
  void (*uncap_row)(void *grad, const void *slope, long first, long last);
  void (*add_row)(void *to, long stride, const void *from, long first, long last);
  double (*dot_row)(const void *a, const void *b, long n);
  void (*add_scaled)(void *to, const void *from, double factor, long n);
  void (*run_program)(const Program *p, Registers *r, long batch, long head, long q, long key, const void *score, long first, long last);
  void (*modify_row)(const Program *p, Registers *r, long batch, long head, long q, long key, void *row, long first, long last);
  void (*see_row)(const Program *p, Registers *r, long batch, long head, long q, long key, uint64_t *seen, long first, long last);
  void (*hide_row)(void *row, const uint64_t *seen, long first, long last);
  void (*slope_row)(const Program *p, const Registers *r, const void *score, void *grad, long first, long last);
  void (*scatter_row)(const Program *p, const Registers *r, double *const *sums, const void *score, const void *grad, long first, long last);
} Kernels;

#define REAL_KERNELS(T, BYTES, HALF)                                                                                                  \
  {BYTES, BYTES, PANEL_ROWS, VBYTES / BYTES, BLOCK_N, VBYTES / BYTES, HALF, load_row_##T, store_row_##T, pack_rows_##T,        \
   pack_columns_##T, pack_values_##T, scores_##T, weighted_sum_##T, 0, key_gradients_##T, key_row_##T, direct_scores_##T, direct_sum_##T, score_row_##T, mask_row_##T,  \
   fill_outside_##T, 0, softmax_##T, short_rows_##T, rounding_of_unit_##T, drop_row_##T, grad_row_##T, uncap_row_##T, add_row_##T, dot_row_##T, add_scaled_##T,  \
   run_program_##T, modify_row_##T, see_row_##T, hide_row_##T, slope_row_##T, scatter_row_##T}
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
#define READS_HALF 1
#else
#define READS_HALF 0
#endif
static const Kernels kernels_f32 = REAL_KERNELS(f32, 4, READS_HALF);
static const Kernels kernels_f64 = REAL_KERNELS(f64, 8, 0);

/* Which table a dtype uses. With AVX512_BF16, bfloat16 is multiplied in pairs. With AMX, float16 is multiplied in two parts
 * (`in_parts`, see plan.py; 0 if K and V are read in place). Otherwise 16-bit floats are converted while packing and use the float32 kernels. */
#if defined(__AVX512BF16__)
#define PAIRS_TABLE(KIND, PARTS, OPTIMISTIC)                                                                                                          \
  {4, 2 * PARTS, PAIR_PANEL, PAIR_COLS, PAIR_N, 32, READS_HALF, load_row_f32, store_row_f32, pack_rows_##KIND, pack_columns_##KIND, pack_values_##KIND, \
   scores_##KIND, weighted_sum_##KIND, grad_operands_##KIND, key_gradients_##KIND, pairs_key_row, direct_scores_f32, direct_sum_f32, score_row_f32, mask_row_f32, fill_outside_f32, OPTIMISTIC, softmax_##KIND, 0, \
   rounding_of_unit_f32, drop_row_##KIND, grad_row_f32, uncap_row_f32, add_row_f32, dot_row_f32, add_scaled_f32, \
   run_program_f32, modify_row_f32, see_row_f32, hide_row_f32, slope_row_f32, scatter_row_f32}
#if HAVE_AMX
static const Kernels kernels_bf16 = PAIRS_TABLE(bf16, 1, optimistic_bf16);
static const Kernels kernels_two_parts = PAIRS_TABLE(two_parts, 2, optimistic_two_parts);
#else
static const Kernels kernels_bf16 = PAIRS_TABLE(bf16, 1, 0); /* without AMX a panel's scores are in L1 anyway */
#endif
#else
#define HAVE_AMX 0
static void amx_begin(void) {}
static void amx_end(void) {}
static long pairs_scratch(long ldq, long ldv, long parts) { return 0 * (ldq + ldv + parts); }
#endif
static const Kernels *kernels_for(int dtype, int in_parts) {
  (void)in_parts;
  if (dtype == DT_F64) return &kernels_f64;
#if defined(__AVX512BF16__)
  if (dtype == DT_BF16) return &kernels_bf16;
#if HAVE_AMX
  if (dtype == DT_F16 && in_parts) return &kernels_two_parts;
#endif
#endif
  return &kernels_f32;
}
