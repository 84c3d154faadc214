/* Elementary functions of vectors that traced functions may call, beside exp2 and tanh of real.h. Included after real.h, once per type.
 *
 * float: own polynomials, at most 2 ulp off. double, and sin, cos and erf: the C library's, one element after another. */
#define SIGN_BIT ((ivec)SPLAT((REAL)-0.0))
#define EACH_LANE(to, x, call) for (long i = 0; i < VL; i++) to[i] = (REAL)call((x)[i])

ALWAYS_INLINE vec name(absolute)(vec x) { return (vec)((ivec)x & ~SIGN_BIT); }
/* tanh, exactly 1 where it rounds to 1. tanh itself may be 1 - 2^-24 there, and the derivative 1 - t^2 of a trace 2^-23 instead of 0. */
ALWAYS_INLINE vec name(saturated_tanh)(vec x) {
  const vec one = (vec)((ivec)SPLAT((REAL)1) | ((ivec)x & SIGN_BIT)), far = SPLAT((REAL)(REAL_BITS == 32 ? 9.1 : 20.0));
  return name(choose)((ivec)(name(absolute)(x) >= far), one, name(tanh)(x));
}
/* Nearest integer, ties to even. Above 2^(mantissa) all numbers are whole. */
ALWAYS_INLINE vec name(nearest)(vec x) {
  const vec whole = SPLAT(REAL_BITS == 32 ? (REAL)8388608.0 : (REAL)4503599627370496.0), size = name(absolute)(x);
  const vec r = (vec)((ivec)name(rounded)(name(rounded)(size + whole) - whole) | ((ivec)x & SIGN_BIT));
  return name(choose)((ivec)(size < whole), r, x); /* NaN stays NaN */
}
ALWAYS_INLINE vec name(floor)(vec x) {
  const vec r = name(nearest)(x);
  return r - (vec)((ivec)(r > x) & (ivec)SPLAT(1));
}
/* the fraction cut off; within 32 bits; NaN gives 0 */
ALWAYS_INLINE ivec name(whole)(vec x) {
  const vec limit = SPLAT((REAL)2147483648.0);
  const ivec over = (ivec)(x >= limit), under = (ivec)(x <= -limit);
  const ivec inside = (ivec)(x < limit) & (ivec)(x > -limit);
  const ivec r = __builtin_convertvector((vec)((ivec)x & inside), ivec);
  return r | (over & ((INT)INT32_MAX - (ivec){0})) | (under & ((INT)INT32_MIN - (ivec){0}));
}
/* p * 2^n for whole n, in two steps: the first result stays normal, the second may be denormal or infinite */
ALWAYS_INLINE vec name(scaled_by_power)(vec p, vec n) {
  const int mantissa = REAL_BITS == 32 ? 23 : 52, bias = REAL_BITS == 32 ? 127 : 1023;
  const vec half = name(nearest)(n * SPLAT((REAL)0.5));
  const ivec one = __builtin_convertvector(half, ivec), two = __builtin_convertvector(n - half, ivec);
  return name(rounded)(p * (vec)((one + bias) << mantissa)) * (vec)((two + bias) << mantissa);
}
/* 2^(n + f), f in [-1/2, 1/2], n whole */
ALWAYS_INLINE vec name(power_of_two)(vec n, vec f) {
#if REAL_BITS == 32
  return name(scaled_by_power)(name(power_of_fraction)(f), n);
#else
  vec p;
  EACH_LANE(p, n + f, exp2);
  return p;
#endif
}
/* x within what powers of two need; NaN stays NaN */
ALWAYS_INLINE vec name(within_exponents)(vec x) {
  const vec most = SPLAT(REAL_BITS == 32 ? (REAL)252 : (REAL)2000);
  return -VMAX(-most, -VMAX(-most, x));
}
/* exp2 of real.h gives 0 below 2^-100; this one does not */
ALWAYS_INLINE vec name(full_exp2)(vec x) {
#if REAL_BITS == 32
  x = name(within_exponents)(x);
  const vec n = name(nearest)(x);
  return name(power_of_two)(n, x - n);
#else
  vec y;
  EACH_LANE(y, x, exp2);
  return y;
#endif
}
ALWAYS_INLINE vec name(exp)(vec x) {
#if REAL_BITS == 32
  const vec y = name(within_exponents)(x * SPLAT(1.44269504f)), n = name(nearest)(y);
  const vec most = SPLAT(170.0f);
  vec r = -VMAX(-most, -VMAX(-most, x));
  r = (r - n * SPLAT(0.693359375f)) - n * SPLAT(-2.12194440e-4f); /* ln 2 in two parts: the first has few bits, so its product is exact */
  return name(power_of_two)(n, r * SPLAT(1.44269504f));
#else
  vec y;
  EACH_LANE(y, x, exp);
  return y;
#endif
}
#if REAL_BITS == 32
/* x = m 2^e with m in [sqrt(1/2), sqrt(2)): e, and log(m) by a minimax polynomial of (log(1 + f) - f + f^2 / 2) / f^3 */
ALWAYS_INLINE vec name(log_parts)(vec x, vec *e) {
  const ivec tiny = (ivec)(x < SPLAT(FLT_MIN));
  const vec y = name(choose)(tiny, x * SPLAT(8388608.0f), x);
  const ivec bits = (ivec)y - 0x3f3504f3; /* sqrt(1/2) */
  *e = __builtin_convertvector(bits >> 23, vec) - (vec)(tiny & (ivec)SPLAT(23.0f));
  const vec f = (vec)((bits & 0x7fffff) + 0x3f3504f3) - SPLAT(1.0f);
  vec p = SPLAT(0.06746640056371689f);
  p = p * f + SPLAT(-0.11675652116537094f);
  p = p * f + SPLAT(0.11888162046670914f);
  p = p * f + SPLAT(-0.1240558922290802f);
  p = p * f + SPLAT(0.14219552278518677f);
  p = p * f + SPLAT(-0.1666799634695053f);
  p = p * f + SPLAT(0.2000211924314499f);
  p = p * f + SPLAT(-0.25000008940696716f);
  p = p * f + SPLAT(0.3333331346511841f);
  const vec z = f * f;
  return f + (p * f * z - SPLAT(0.5f) * z);
}
/* the logarithms of 0, of negative numbers, of infinity and of NaN */
ALWAYS_INLINE vec name(log_edges)(vec x, vec y) {
  y = name(choose)((ivec)(x == (vec){0}), SPLAT(-INFINITY), y);
  y = name(choose)((ivec)(x == SPLAT(INFINITY)), x, y);
  return name(choose)((ivec)(x >= (vec){0}), y, SPLAT(NAN));
}
#endif
ALWAYS_INLINE vec name(log)(vec x) {
  vec y;
#if REAL_BITS == 32
  vec e;
  y = name(log_parts)(x, &e);
  return name(log_edges)(x, (y + e * SPLAT(-2.12194440e-4f)) + e * SPLAT(0.693359375f));
#else
  EACH_LANE(y, x, log);
  return y;
#endif
}
ALWAYS_INLINE vec name(log2)(vec x) {
  vec y;
#if REAL_BITS == 32
  vec e;
  y = name(log_parts)(x, &e);
  return name(log_edges)(x, y * SPLAT(1.44269504f) + e);
#else
  EACH_LANE(y, x, log2);
  return y;
#endif
}
ALWAYS_INLINE vec name(sigmoid)(vec x) {
  const vec e = name(exp)(-name(absolute)(x));
  return name(choose)((ivec)(x < (vec){0}), e, SPLAT(1)) / (SPLAT(1) + e);
}
ALWAYS_INLINE vec name(root)(vec x) {
#if defined(__AVX512F__)
  return REAL_BITS == 32 ? (vec)_mm512_sqrt_ps((__m512)x) : (vec)_mm512_sqrt_pd((__m512d)x);
#else
  vec y;
  EACH_LANE(y, x, sqrt);
  return y;
#endif
}
#if REAL_BITS == 32
#define LIBRARY(call) static vec name(call)(vec x) { vec y; EACH_LANE(y, x, call##f); return y; }
#else
#define LIBRARY(call) static vec name(call)(vec x) { vec y; EACH_LANE(y, x, call); return y; }
#endif
LIBRARY(sin)
LIBRARY(cos)
LIBRARY(erf)
#undef LIBRARY

/* integers that wrap at 32 bits */
ALWAYS_INLINE ivec name(wrap)(ivec x) { return REAL_BITS == 32 ? x : (x << 32 % REAL_BITS) >> 32 % REAL_BITS; }
/* x // y, rounded down, and the remainder, which has y's sign. Both 0 for y = 0. A quotient in floating point may be off by 2^-22 of
 * itself; that of the remainder, which is small, is not. */
ALWAYS_INLINE ivec name(floor_divide)(ivec x, ivec y, ivec *remainder) {
  const vec inverse = SPLAT(1) / __builtin_convertvector(y, vec);
  ivec q = name(whole)(name(nearest)(__builtin_convertvector(x, vec) * inverse));
  ivec r = name(wrap)(x - q * y);
  const ivec q2 = name(whole)(name(nearest)(__builtin_convertvector(r, vec) * inverse));
  q += q2, r = name(wrap)(r - q2 * y);
  const ivec below = (ivec)(r != 0) & (ivec)((r ^ y) < 0), divides = (ivec)(y != 0);
  *remainder = (r + (y & below)) & divides;
  return name(wrap)(q + below) & divides;
}
ALWAYS_INLINE ivec name(shift_left)(ivec x, ivec y) { return name(wrap)(x << (y & 31)) & (ivec)(y >= 0) & (ivec)(y < 32); }
ALWAYS_INLINE ivec name(shift_right)(ivec x, ivec y) {
  const ivec inside = (ivec)(y >= 0) & (ivec)(y < 32);
  return x >> ((y & inside) | (31 & ~inside));
}
#undef SIGN_BIT
#undef EACH_LANE
