/* Short sequences: all keys are one tile, so there is no running maximum and nothing to rescale. Included after rows.h, once per type.
 *
 * For such a tile the general loop spends more on its frame than on products. Here Q and V are read in place, each step of a panel's
 * softmax is taken for all its rows, and out is written once. Every sum has the terms and the order that the general loop gives it, so
 * results are the same to the bit. Panels are as equal as they can be: one of 2 rows has too few accumulators for the latency of a
 * multiply-add. */
ALWAYS_INLINE long name(keys_of_row)(const ShortRows *w, long i) {
  const long keys = w->reach + i;
  return keys < 0 ? 0 : keys < w->keys ? keys : w->keys;
}
/* -inf in the columns [keys, width) of a row: in whole vectors, because a vector is loaded slowly where a part of it was just stored */
ALWAYS_INLINE void name(end_row)(REAL *s, long keys, long width, ivec lane) {
  for (long j = keys / VL * VL; j < width; j += VL)
    STORE(s + j, name(choose)((ivec)(lane >= (ivec){0} + (INT)(keys - j)), SPLAT((REAL)-INFINITY), LOAD(s + j)));
}
static void name(short_rows)(const ShortRows *w) {
  const long bytes = (long)sizeof(REAL);
  const REAL c2 = (REAL)w->c2;
  REAL S[PANEL_ROWS * BLOCK_N] __attribute__((aligned(64))), top[PANEL_ROWS], sum[PANEL_ROWS], factor[PANEL_ROWS];
  ivec lane;
  for (long i = 0; i < VL; i++) lane[i] = (INT)i;
  for (long i = 0, mr; i < w->rows; i += mr) {
    const long left = w->rows - i, panels = (left + PANEL_ROWS - 1) / PANEL_ROWS;
    mr = (left + panels - 1) / panels;
    const long keys = name(keys_of_row)(w, i + mr - 1), width = (keys + VL - 1) / VL * VL;
    name(scores)(mr, w->head_dim, (const REAL *)w->q + i * w->q_row, w->q_row, w->columns, 0, keys, S, width);
    for (long r = 0; r < mr; r++) {
      REAL *s = S + r * width, peak = (REAL)-INFINITY;
      name(end_row)(s, name(keys_of_row)(w, i + r), width, lane);
      if (keys) peak = name(row_peak)(s, 0, width);
      top[r] = peak > (REAL)-INFINITY ? peak : (REAL)-INFINITY; /* as in raise_maxima, NaN too */
    }
    for (long r = 0; r < mr; r++) {
      REAL *s = S + r * width, base = top[r] > (REAL)-INFINITY ? top[r] : 0;
      sum[r] = name(difference_first)(base, c2) ? name(exponentials)(1, s, 0, width, base, c2) : name(exponentials)(0, s, 0, width, base, c2);
    }
    for (long r = 0; r < mr; r++) {
      factor[r] = sum[r] == 0 ? 0 : 1 / sum[r];
      if (w->row_max) ((REAL *)w->row_max)[i + r] = top[r], ((REAL *)w->row_sum)[i + r] = sum[r];
    }
    name(multiply)(w->row_max ? name(ZERO) : name(SCALED), mr, keys, w->head_dim_v, S, width, (const char *)w->v, w->v_row * bytes, VL * bytes, 0, 0,
                   (REAL *)w->out + i * w->out_row, w->out_row, factor);
  }
}
