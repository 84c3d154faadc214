/* A traced function (fastattn/flex) as the engine runs it: lines of code, what they work on, and bounds.
 *
 * Each line is one operation on registers. A narrow register is one vector that holds one value: what depends on the batch entry, the
 * head and the query row alone. A wide one has an element for each key of a tile. So a line costs what its values need: once for a head
 * and tile, once for a row, once for the keys of a tile, or for each score (program_rows.h). rowcode.py makes the code.
 *
 * Booleans are integers, 0 or -1. Integers have the width of a real, because they share its lanes; they wrap at 32 bits. */
#pragma once
#include "simd.h"

#define PROGRAM_OPS(X)                                                                                                              \
  X(f_const) X(i_const) X(column) X(where) X(i_of_f) X(i_of_b)                                                                      \
  X(f_add) X(f_sub) X(f_mul) X(f_div) X(f_neg) X(f_abs) X(f_min) X(f_max) X(f_lt) X(f_le) X(f_eq) X(f_ne) X(f_of_i) X(f_of_b)       \
  X(f_exp) X(f_exp2) X(f_log) X(f_log2) X(f_tanh) X(f_sigmoid) X(f_erf) X(f_sqrt) X(f_sin) X(f_cos) X(f_floor) X(f_round)           \
  X(f_reciprocal) X(f_muladd) X(f_submul)                                                                                           \
  X(i_add) X(i_sub) X(i_mul) X(i_neg) X(i_abs) X(i_min) X(i_max) X(i_lt) X(i_le) X(i_eq) X(i_ne) X(i_floordiv) X(i_mod)             \
  X(i_and) X(i_or) X(i_xor) X(i_not) X(i_shl) X(i_shr) X(b_and) X(b_or) X(b_xor) X(b_not) X(b_eq) X(b_ne) X(b_lt) X(b_le)           \
  X(first_place) X(place) X(f_load) X(i_load) X(b_load) X(f_far) X(i_far) X(b_far)
#define ENUM(op) OP_##op,
#define NAME(op) #op " "
enum { PROGRAM_OPS(ENUM) };
static const char *program_ops(void) { return PROGRAM_OPS(NAME); }
#undef ENUM
#undef NAME

enum { SCORE = -1, MOST_AXES = 8 };
enum { TO_WIDE = 1, A_WIDE = 2, B_WIDE = 4, C_WIDE = 8 };
enum { DT_BOOL = 4, DT_I32 = 16, DT_I64 = 17 };
enum { NONE, SOME, ALL }; /* of the pairs of some rows and keys, those that a mask leaves */

/* `to`, `a`, `b` and `c` are registers: their bytes from the start, or SCORE. (In `bounds` they are numbers of lines.) `k` is a constant,
 * or for place, load and far an array; `axis` one of its axes, or where in `lists` the registers of its indices are. */
typedef struct {
  int32_t op, flags, to, a, b, c;
  union {
    double f;
    int64_t i;
  } k;
  int32_t axis, spare;
} Line;

/* An array that is loaded from. All lengths are at least 1: an empty array is replaced by a zero. */
typedef struct {
  const char *ptr;
  int64_t by[MOST_AXES], length[MOST_AXES]; /* strides in bytes */
  int32_t axes, dtype;
} Captured;

/* An element that is loaded has a gradient: dS times the `factor`, a register. lists[list] are the registers of its indices. */
typedef struct { int32_t array, factor, wide, list; } Scatter;

typedef struct {
  const Line *lines;
  long once, end;                 /* lines before `once` are done once for a head and tile; the others, up to `end`, for each row */
  const Line *bounds;             /* the same in the order of the program, for `bounds_of`; `end_bounds` of them */
  long end_bounds;
  const Captured *arrays;
  const int32_t *lists;
  int32_t out, out_wide;          /* the register of the first output: the new score, or which keys are attended */
  int32_t batch, head, q;         /* narrow registers, or SCORE if they are not used */
  int by_head;                    /* whether the lines before `once` depend on the head */
  const Scatter *scatters;        /* gradients of captured arrays; then the first output is the derivative by the score */
  long end_scatters;
  long bytes;                     /* of all registers */
} Program;

/* What a thread keeps of a program: its registers, and for which keys the lines of a tile were run. */
typedef struct {
  char *registers;
  long batch, head, key, width; /* width: keys of a tile */
} Registers;

ALWAYS_INLINE int64_t within(int64_t i, int64_t length) { return i < 0 ? 0 : i < length ? i : length - 1; }
ALWAYS_INLINE double load_any(const char *p, int dtype) {
  switch (dtype) {
    case DT_BOOL: return *(const uint8_t *)p ? -1 : 0;
    case DT_I32: {
      int32_t x;
      memcpy(&x, p, 4);
      return x;
    }
    case DT_I64: {
      int64_t x;
      memcpy(&x, p, 8);
      return (int32_t)x;
    }
    default: return load_element(p, dtype);
  }
}

/* ------------------------------------------------------------------ bounds
 * A mask's value for all pairs of some rows and keys, by interval arithmetic on integers and booleans: NONE, ALL, or SOME, which also
 * means unknown. Anything on floating point numbers is unknown. */
typedef struct { int64_t low, high; } Interval;
enum { MOST_BOUNDS = 256, MOST_SCANNED = 1024 };
static const Interval anything = {INT32_MIN, INT32_MAX}, any_boolean = {-1, 0};

ALWAYS_INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
ALWAYS_INLINE int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }
ALWAYS_INLINE int64_t floor_of(int64_t x, int64_t y) { return x / y - (x % y != 0 && (x < 0) != (y < 0)); }
static Interval boolean_of(int always, int never) { return always ? (Interval){-1, -1} : never ? (Interval){0, 0} : any_boolean; }
static Interval product_of(Interval x, Interval y) {
  const int64_t p = x.low * y.low, q = x.low * y.high, r = x.high * y.low, s = x.high * y.high;
  return (Interval){smaller(smaller(p, q), smaller(r, s)), larger(larger(p, q), larger(r, s))};
}
/* the smallest and largest of the elements whose indices are in these intervals; places are those of the elements before */
static int scan(const Captured *x, const Interval *index, int axis, const char *p, Interval *found) {
  if (axis == x->axes) {
    const int64_t value = (int64_t)load_any(p, x->dtype);
    *found = (Interval){smaller(found->low, value), larger(found->high, value)};
    return 1;
  }
  for (int64_t i = index[axis].low; i <= index[axis].high; i++) scan(x, index, axis + 1, p + i * x->by[axis], found);
  return 1;
}
static Interval loaded(const Program *p, const Line *line, const Interval *v) {
  const Captured *x = &p->arrays[line->k.i];
  const Interval unknown = x->dtype == DT_BOOL ? any_boolean : anything;
  Interval index[MOST_AXES], found = {INT64_MAX, INT64_MIN};
  int64_t count = 1;
  for (int axis = 0; axis < x->axes; axis++) {
    const Interval i = v[p->lists[line->axis + axis]];
    index[axis] = (Interval){within(i.low, x->length[axis]), within(i.high, x->length[axis])};
    count *= index[axis].high - index[axis].low + 1;
    if (count > MOST_SCANNED) return unknown;
  }
  scan(x, index, 0, x->ptr, &found);
  return found;
}
static Interval bound(const Program *p, const Line *line, const Interval *v) {
  const Interval x = line->a >= 0 ? v[line->a] : anything, y = line->b >= 0 ? v[line->b] : anything;
  switch (line->op) {
    case OP_i_const: return (Interval){line->k.i, line->k.i};
    case OP_i_add: return (Interval){x.low + y.low, x.high + y.high};
    case OP_i_sub: return (Interval){x.low - y.high, x.high - y.low};
    case OP_i_mul: return product_of(x, y);
    case OP_i_neg: return (Interval){-x.high, -x.low};
    case OP_i_abs: return x.low >= 0 ? x : x.high <= 0 ? (Interval){-x.high, -x.low} : (Interval){0, larger(-x.low, x.high)};
    case OP_i_min: return (Interval){smaller(x.low, y.low), smaller(x.high, y.high)};
    case OP_i_max: return (Interval){larger(x.low, y.low), larger(x.high, y.high)};
    case OP_i_floordiv: return y.low == y.high && y.low > 0 ? (Interval){floor_of(x.low, y.low), floor_of(x.high, y.low)} : anything;
    case OP_i_mod:
      if (y.low != y.high || y.low <= 0) return anything;
      if (floor_of(x.low, y.low) != floor_of(x.high, y.low)) return (Interval){0, y.low - 1};
      return (Interval){x.low - floor_of(x.low, y.low) * y.low, x.high - floor_of(x.low, y.low) * y.low};
    case OP_i_shr: return y.low == y.high && y.low >= 0 && y.low < 32 ? (Interval){x.low >> y.low, x.high >> y.low} : anything;
    case OP_i_and: return y.low == y.high && y.low >= 0 ? (Interval){0, y.low} : x.low == x.high && x.low >= 0 ? (Interval){0, x.low} : anything;
    case OP_i_not: return (Interval){-1 - x.high, -1 - x.low};
    case OP_i_lt: return boolean_of(x.high < y.low, x.low >= y.high);
    case OP_i_le: return boolean_of(x.high <= y.low, x.low > y.high);
    case OP_i_eq:
    case OP_b_eq: return boolean_of(x.low == y.high && x.high == y.low, x.high < y.low || x.low > y.high);
    case OP_i_ne:
    case OP_b_ne:
    case OP_b_xor: return boolean_of(x.high < y.low || x.low > y.high, x.low == y.high && x.high == y.low);
    case OP_b_and: return (Interval){larger(x.low, y.low), larger(x.high, y.high)};
    case OP_b_or: return (Interval){smaller(x.low, y.low), smaller(x.high, y.high)};
    case OP_b_not: return (Interval){-1 - x.high, -1 - x.low};
    case OP_i_of_b: return (Interval){-x.high, -x.low};
    case OP_where: {
      const Interval z = v[line->c];
      return x.high < 0 ? y : x.low == 0 ? z : (Interval){smaller(y.low, z.low), larger(y.high, z.high)};
    }
    case OP_i_load:
    case OP_b_load: return loaded(p, line, v);
    case OP_f_lt:
    case OP_f_le:
    case OP_f_eq:
    case OP_f_ne:
    case OP_b_lt:
    case OP_b_le: return any_boolean;
    default: return anything;
  }
}
/* What a mask leaves of rows [q0, q1) and keys [k0, k1). The first four lines of `bounds` are batch, head, q and k. */
static int bounds_of(const Program *p, long batch, long head, long q0, long q1, long k0, long k1) {
  Interval v[MOST_BOUNDS];
  if (p->end_bounds > MOST_BOUNDS || p->end_bounds == 0) return SOME;
  v[0] = (Interval){batch, batch}, v[1] = (Interval){head, head}, v[2] = (Interval){q0, q1 - 1}, v[3] = (Interval){k0, k1 - 1};
  for (long n = 4; n < p->end_bounds; n++) {
    Interval x = bound(p, &p->bounds[n], v);
    if (x.low < INT32_MIN || x.high > INT32_MAX) x = anything; /* it may wrap */
    v[n] = x;
  }
  const Interval out = v[p->end_bounds - 1];
  return out.high < 0 ? ALL : out.low == 0 ? NONE : SOME;
}

/* The bits of keys [first, last) of a tile become `value`. */
static void set_bits(uint64_t *bits, long first, long last, int value) {
  for (long word = first / 64; word * 64 < last; word++) {
    const long begin = first - word * 64, end = last - word * 64;
    const uint64_t here = (begin > 0 ? ~(uint64_t)0 << begin : ~(uint64_t)0) & (end < 64 ? ~(~(uint64_t)0 << end) : ~(uint64_t)0);
    bits[word] = value ? bits[word] | here : bits[word] & ~here;
  }
}
/* `all` gets the bits of `seen`, or all if that is NULL, for keys [first, last) of a tile. */
static void add_bits(uint64_t *all, const uint64_t *seen, long first, long last) {
  for (long word = first / 64; word * 64 < last; word++) {
    const long begin = first - word * 64, end = last - word * 64;
    const uint64_t here = (begin > 0 ? ~(uint64_t)0 << begin : ~(uint64_t)0) & (end < 64 ? ~(~(uint64_t)0 << end) : ~(uint64_t)0);
    all[word] |= seen ? seen[word] & here : here;
  }
}
/* A byte for each of n bits. */
static void bytes_of(uint8_t *bytes, const uint64_t *bits, long n) {
  for (long j = 0; j < n; j++) bytes[j] = bits[j / 64] >> j % 64 & 1;
}
/* The keys [first, last) of a tile cut to those between the first and the last one whose bit is set; empty if none is. Returns whether
 * some key in between is not set. */
static int narrow_keys(const uint64_t *seen, long *first, long *last) {
  long count = 0, low = *last, high = *first;
  for (long word = *first / 64; word * 64 < *last; word++) {
    const long begin = *first - word * 64, end = *last - word * 64;
    uint64_t bits = seen[word];
    if (begin > 0) bits &= ~(uint64_t)0 << begin;
    if (end < 64) bits &= ~(~(uint64_t)0 << end);
    if (!bits) continue;
    if (low == *last) low = word * 64 + __builtin_ctzll(bits);
    high = word * 64 + 64 - __builtin_clzll(bits);
    count += __builtin_popcountll(bits);
  }
  *first = low, *last = low < high ? high : low;
  return count < high - low;
}
