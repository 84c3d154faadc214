/* Rows of a tile in one accumulator type: gradients of the softmax, of the softcap and of a bias. Included after rows.h, once per type. */

/* ------------------------------------------------------------------ backward, one row
 * In: s (scores / scale) and dp (dO V^T). Out: P in place of s, with dropout if `keep` is given, and dS = P (keep_scale keep dP - delta)
 * in place of dp.
 *
 * P = exp(s scale - lse), where s scale is rounded as lse is. So a key with all of its row's probability has a difference of 0 and P = 1;
 * fused, the difference would be the rounding error of lse, 5e-4 at scores of 10^4. A row that attends nothing has lse = -inf and P = 0.
 * CAPPED: P is at most 1. The lse of another kernel may be a few roundings below the largest score, which at scores of 10^10 are
 * thousands. NON_FINITE: delta is infinite or NaN, because out has passed the largest number of its dtype; then dS is still 0 where P is 0:
 * the gradients of keys that the row does not attend stay finite. */
ALWAYS_INLINE void name(gradients)(const int CAPPED, const int NON_FINITE, REAL *s, REAL *dp, long first, long last, REAL scale, REAL lse, REAL delta, const uint64_t *keep,
                                   REAL keep_scale) {
  const vec c = SPLAT(scale), base = SPLAT(lse), d = SPLAT(delta), log2e = SPLAT((REAL)1.4426950408889634), ks = SPLAT(keep_scale);
  for (long j = first; j < last; j += VL) {
    vec x = (name(rounded)(LOAD(s + j) * c) - base) * log2e, g = LOAD(dp + j);
    if (CAPPED) x = name(choose)((ivec)(x > (vec){0}), (vec){0}, x); /* NaN stays NaN */
    vec p = name(exp2)(x);
    STORE(s + j, keep ? name(kept)(p * ks, keep, j) : p);
    if (keep) g = name(kept)(g * ks, keep, j);
    vec ds = p * (g - d);
    STORE(dp + j, NON_FINITE ? name(choose)((ivec)(p == (vec){0}), (vec){0}, ds) : ds);
  }
}
static void name(grad_row)(void *score, void *dprob, long first, long last, double scale, double lse, double delta, const uint64_t *keep, double keep_scale) {
  const REAL base = (REAL)(lse == -INFINITY ? INFINITY : lse);
  if (delta - delta != 0) name(gradients)(1, 1, (REAL *)score, (REAL *)dprob, first, last, (REAL)scale, base, (REAL)delta, keep, (REAL)keep_scale);
  else if (fabs(lse) < DIFFERENCE_FIRST) name(gradients)(0, 0, (REAL *)score, (REAL *)dprob, first, last, (REAL)scale, base, (REAL)delta, keep, (REAL)keep_scale);
  else name(gradients)(1, 0, (REAL *)score, (REAL *)dprob, first, last, (REAL)scale, base, (REAL)delta, keep, (REAL)keep_scale);
}
/* The softcap's backward: dS *= its derivative. 0 stays 0, even if a masked score made the derivative NaN. */
static void name(uncap_row)(void *grad, const void *slope, long first, long last) {
  REAL *g = (REAL *)grad;
  for (long j = first; j < last; j += VL) {
    vec x = LOAD(g + j);
    STORE(g + j, name(choose)((ivec)(x == (vec){0}), (vec){0}, x * LOAD((const REAL *)slope + j)));
  }
}
/* dbias[j] += dS[j]. With stride 0 (a bias broadcast over keys) one element gets the sum. */
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
