/* Programs (program.h) on a row of scores: one switch, whose every case is a loop over the vectors of a row. No compiler at run time,
 * no Python. Included after functions.h, once per type. */

typedef struct { char *to; const char *a, *b, *c; long to_by, a_by, b_by, c_by; } name(operands);

ALWAYS_INLINE const char *name(operand)(const char *registers, const void *score, int32_t at, int wide, long first, long *by) {
  *by = wide || at == SCORE ? VBYTES : 0;
  return (at == SCORE ? (const char *)score : registers + at) + (*by ? first * (long)sizeof(REAL) : 0);
}

/* to = c + the place of index a, cut to the array's axis. Bytes, within 31 bits: rowcode.py sees to that. */
ALWAYS_INLINE ivec name(place)(const Captured *x, int axis, ivec i, ivec before) {
  const ivec zero = {0}, most = (INT)(x->length[axis] - 1) - zero;
  i &= ~(ivec)(i < zero);
  i = (i & (ivec)(i < most)) | (most & ~(ivec)(i < most));
  return before + i * (INT)x->by[axis];
}

/* elements at these places. `kind`: a load's, f, i or b */
ALWAYS_INLINE vec name(pick)(const char *p, ivec at, int dtype) {
  ivec v;
#if REAL_BITS == 32 && defined(__AVX512F__)
  if (dtype == DT_F32 || dtype == DT_I32) return (vec)_mm512_i32gather_epi32((__m512i)at, p, 1);
#elif REAL_BITS == 32 && defined(__AVX2__)
  if (dtype == DT_F32 || dtype == DT_I32) return (vec)_mm256_i32gather_epi32((const int *)(const void *)p, (__m256i)at, 1);
#endif
  if (dtype == DT_I32 || dtype == DT_I64 || dtype == DT_BOOL) {
    for (long i = 0; i < VL; i++) v[i] = (INT)load_any(p + at[i], dtype);
    return (vec)v;
  }
  vec x;
  for (long i = 0; i < VL; i++) x[i] = (REAL)load_element(p + at[i], dtype);
  return x;
}
static void name(load_places)(const Captured *x, const name(operands) *o, long count) {
  char *to = o->to;
  const char *a = o->a;
#define PICK(T)                                                                                        \
  case T:                                                                                              \
    for (long n = 0; n < count; n++, to += o->to_by, a += o->a_by) STORE(to, name(pick)(x->ptr, *(const ivec *)a, T)); \
    return
  switch (x->dtype) {
    PICK(DT_F32);
    PICK(DT_F64);
    PICK(DT_F16);
    PICK(DT_BOOL);
    PICK(DT_I32);
    PICK(DT_I64);
    default: PICK(DT_BF16);
  }
#undef PICK
}

/* An axis's index, cut to the array. `list` has two numbers an axis: the register, and whether it is wide. */
ALWAYS_INLINE int64_t name(index_at)(const Captured *x, const char *registers, const int32_t *list, int axis, long j) {
  const INT *index = (const INT *)(const void *)(registers + list[2 * axis]);
  return within(index[list[2 * axis + 1] ? j : 0], x->length[axis]);
}
static void name(load_far)(const Program *p, const Line *line, const char *registers, char *to, long first, long last) {
  const Captured *x = &p->arrays[line->k.i];
  const int32_t *list = p->lists + line->axis;
  const int whole = line->op != OP_f_far;
  for (long j = first; j < last; j++) {
    int64_t place = 0;
    for (int axis = 0; axis < x->axes; axis++) place += name(index_at)(x, registers, list, axis, j) * x->by[axis];
    const double value = load_any(x->ptr + place, x->dtype);
    if (whole) ((INT *)(void *)to)[j] = (INT)value;
    else ((REAL *)(void *)to)[j] = (REAL)value;
  }
}

/* One operation on vectors: A, B and C are floats, I, J and K integers, of operands a, b and c. */
#define EACH(result)                                                                                                 \
  {                                                                                                                  \
    char *to = o->to;                                                                                                \
    const char *a = o->a, *b = o->b, *c = o->c;                                                                      \
    for (long n = 0; n < count; n++, to += o->to_by, a += o->a_by, b += o->b_by, c += o->c_by) STORE(to, (vec)(result)); \
    (void)b, (void)c;                                                                                                \
    break;                                                                                                           \
  }
#define A LOAD(a)
#define B LOAD(b)
#define C LOAD(c)
#define I (*(const ivec *)a)
#define J (*(const ivec *)b)
#define K (*(const ivec *)c)
static void name(run_real)(int op, const name(operands) *o, long count) {
  switch (op) {
    case OP_f_of_i: EACH(__builtin_convertvector(I, vec))
    case OP_f_of_b: EACH(I & (ivec)SPLAT(1))
    case OP_f_add: EACH(A + B)
    case OP_f_sub: EACH(A - B)
    case OP_f_mul: EACH(A * B)
    case OP_f_muladd: EACH(A * B + C)
    case OP_f_submul: EACH(C - A * B)
    case OP_f_div: EACH(A / B)
    case OP_f_reciprocal: EACH(SPLAT(1) / A)
    case OP_f_neg: EACH(-A)
    case OP_f_abs: EACH(name(absolute)(A))
    case OP_f_min: EACH(name(choose)((ivec)(A < B) | (ivec)(A != A), A, B))
    case OP_f_max: EACH(name(choose)((ivec)(A > B) | (ivec)(A != A), A, B))
    case OP_f_lt: EACH(A < B)
    case OP_f_le: EACH(A <= B)
    case OP_f_eq: EACH(A == B)
    case OP_f_ne: EACH(A != B)
    case OP_f_exp: EACH(name(exp)(A))
    case OP_f_exp2: EACH(name(full_exp2)(A))
    case OP_f_log: EACH(name(log)(A))
    case OP_f_log2: EACH(name(log2)(A))
    case OP_f_tanh: EACH(name(saturated_tanh)(A))
    case OP_f_sigmoid: EACH(name(sigmoid)(A))
    case OP_f_erf: EACH(name(erf)(A))
    case OP_f_sqrt: EACH(name(root)(A))
    case OP_f_sin: EACH(name(sin)(A))
    case OP_f_cos: EACH(name(cos)(A))
    case OP_f_floor: EACH(name(floor)(A))
    case OP_f_round: EACH(name(nearest)(A))
    default: break;
  }
}
static void name(run_whole)(int op, const name(operands) *o, long count) {
  switch (op) {
    case OP_where: EACH(name(choose)(I, B, C))
    case OP_i_of_f: EACH(name(whole)(A))
    case OP_i_of_b:
    case OP_i_neg: EACH(name(wrap)(-I))
    case OP_i_add: EACH(name(wrap)(I + J))
    case OP_i_sub: EACH(name(wrap)(I - J))
    case OP_i_mul: EACH(name(wrap)(I * J))
    case OP_i_abs: EACH(name(wrap)((I ^ (ivec)(I < 0)) - (ivec)(I < 0)))
    case OP_i_min: EACH(name(choose)((ivec)(I < J), (vec)I, (vec)J))
    case OP_i_max: EACH(name(choose)((ivec)(I > J), (vec)I, (vec)J))
    case OP_i_lt: EACH(I < J)
    case OP_i_le: EACH(I <= J)
    case OP_i_eq:
    case OP_b_eq: EACH(I == J)
    case OP_i_ne:
    case OP_b_ne: EACH(I != J)
    case OP_b_lt: EACH(I > J)
    case OP_b_le: EACH(I >= J)
    case OP_i_floordiv: { ivec r; EACH(name(floor_divide)(I, J, &r)) }
    case OP_i_mod: { ivec r; EACH((name(floor_divide)(I, J, &r), r)) }
    case OP_i_and:
    case OP_b_and: EACH(I & J)
    case OP_i_or:
    case OP_b_or: EACH(I | J)
    case OP_i_xor:
    case OP_b_xor: EACH(I ^ J)
    case OP_i_not:
    case OP_b_not: EACH(~I)
    case OP_i_shl: EACH(name(shift_left)(I, J))
    case OP_i_shr: EACH(name(shift_right)(I, J))
    default: break;
  }
}
/* Lines [begin, end). Wide registers are done for keys [first, last) of the tile at this key, whole vectors; narrow ones have one vector. */
static void name(run_lines)(const Program *p, const Line *begin, const Line *end, char *registers, const void *score, long key, long first, long last) {
  for (const Line *l = begin; l < end; l++) {
    name(operands) operands, *o = &operands;
    const int wide = l->flags & TO_WIDE;
    const long from = wide ? first : 0, count = wide ? (last - first) / VL : 1;
    o->to = (char *)name(operand)(registers, score, l->to, wide, from, &o->to_by);
    o->a = name(operand)(registers, score, l->a, l->flags & A_WIDE, from, &o->a_by);
    o->b = name(operand)(registers, score, l->b, l->flags & B_WIDE, from, &o->b_by);
    o->c = name(operand)(registers, score, l->c, l->flags & C_WIDE, from, &o->c_by);
    switch (l->op) {
      case OP_f_const: { const vec x = SPLAT((REAL)l->k.f); EACH(x) }
      case OP_i_const: { const ivec x = (INT)l->k.i - (ivec){0}; EACH(x) }
      case OP_column: {
        ivec x = (INT)(key + from) - (ivec){0};
        for (long i = 0; i < VL; i++) x[i] += (INT)i;
        x -= (INT)VL;
        EACH(x += (INT)VL)
      }
      case OP_first_place: EACH(name(place)(&p->arrays[l->k.i], l->axis, I, (ivec){0}))
      case OP_place: EACH(name(place)(&p->arrays[l->k.i], l->axis, I, K))
      case OP_f_load:
      case OP_i_load:
      case OP_b_load: name(load_places)(&p->arrays[l->k.i], o, count); break;
      case OP_f_far:
      case OP_i_far:
      case OP_b_far: name(load_far)(p, l, registers, registers + l->to, from, wide ? last : VL); break;
      default:
        if (l->op >= OP_f_add && l->op <= OP_f_submul) name(run_real)(l->op, o, count);
        else name(run_whole)(l->op, o, count);
    }
  }
}
#undef EACH
#undef A
#undef B
#undef C
#undef I
#undef J
#undef K

ALWAYS_INLINE void name(set_narrow)(char *registers, int32_t at, long value) {
  if (at != SCORE) *(ivec *)(void *)(registers + at) = (INT)value - (ivec){0};
}
/* Run a program for keys [first, last) of the tile at key n0, whole vectors, of one row. `score`: the row of scores, from key n0. */
static void name(run_program)(const Program *p, Registers *r, long batch, long head, long q, long key, const void *score, long first, long last) {
  const Line *l = p->lines;
  if (r->batch != batch || r->key != key || (r->head != head && p->by_head)) {
    name(set_narrow)(r->registers, p->batch, batch);
    name(set_narrow)(r->registers, p->head, head);
    name(run_lines)(p, l, l + p->once, r->registers, 0, key, 0, (r->width + VL - 1) / VL * VL);
  }
  r->batch = batch, r->head = head, r->key = key;
  name(set_narrow)(r->registers, p->q, q);
  name(run_lines)(p, l + p->once, l + p->end, r->registers, score, key, first, last);
}
/* score_mod: scores of a row become new ones */
static void name(modify_row)(const Program *p, Registers *r, long batch, long head, long q, long key, void *row, long first, long last) {
  name(run_program)(p, r, batch, head, q, key, row, first, last);
  if (p->out == SCORE) return;
  long by;
  const char *from = name(operand)(r->registers, row, p->out, p->out_wide, first, &by);
  for (long j = first; j < last; j += VL, from += by) STORE((REAL *)row + j, LOAD(from));
}
/* bits of the lanes whose value is -1 */
ALWAYS_INLINE uint64_t name(bits_of)(ivec x) {
#if defined(__AVX512F__)
  return REAL_BITS == 32 ? _mm512_movepi32_mask((__m512i)x) : _mm512_movepi64_mask((__m512i)x);
#elif defined(__AVX2__)
  return (uint64_t)(REAL_BITS == 32 ? _mm256_movemask_ps((__m256)x) : _mm256_movemask_pd((__m256d)x));
#else
  uint64_t bits = 0;
  for (long i = 0; i < VL; i++) bits |= (uint64_t)(x[i] & 1) << i;
  return bits;
#endif
}
/* mask_mod: seen[j / 64] gets the bits of the keys [first, last) of the tile that the row attends, from whole vectors; the words' other
 * bits are 0. */
static void name(see_row)(const Program *p, Registers *r, long batch, long head, long q, long key, uint64_t *seen, long first, long last) {
  const long begin = first / VL * VL, end = (last + VL - 1) / VL * VL;
  name(run_program)(p, r, batch, head, q, key, 0, begin, end);
  long by;
  const char *from = name(operand)(r->registers, 0, p->out, p->out_wide, begin, &by);
  for (long j = begin / 64; j < (end + 63) / 64; j++) seen[j] = 0;
  for (long j = begin; j < end; j += VL, from += by) seen[j / 64] |= name(bits_of)(*(const ivec *)(const void *)from) << j % 64;
}
/* -inf where the bits are 0 */
static void name(hide_row)(void *row, const uint64_t *seen, long first, long last) {
  REAL *s = (REAL *)row;
  for (long j = first / VL * VL; j < last; j += VL) {
    const uint64_t bits = seen[j / 64] >> j % 64;
#if defined(__AVX512F__)
    const vec hidden = SPLAT(-INFINITY), x = LOAD(s + j);
    STORE(s + j, (REAL_BITS == 32 ? (vec)_mm512_mask_mov_ps((__m512)hidden, (__mmask16)bits, (__m512)x)
                                  : (vec)_mm512_mask_mov_pd((__m512d)hidden, (__mmask8)bits, (__m512d)x)));
#else
    ivec bit;
    for (long i = 0; i < VL; i++) bit[i] = (INT)1 << i;
    STORE(s + j, name(choose)((ivec)((((INT)(bits & 0xff) - (ivec){0}) & bit) == bit), LOAD(s + j), SPLAT(-INFINITY)));
#endif
  }
}
/* dS *= a program's first output, the derivative by the score. 0 stays 0, whatever the derivative is there. */
static void name(slope_row)(const Program *p, const Registers *r, const void *score, void *grad, long first, long last) {
  REAL *g = (REAL *)grad;
  long by;
  const char *slope = name(operand)(r->registers, score, p->out, p->out_wide, first, &by);
  for (long j = first; j < last; j += VL, slope += by) {
    const vec x = LOAD(g + j);
    STORE(g + j, name(choose)((ivec)(x == (vec){0}), (vec){0}, x * LOAD(slope)));
  }
}
/* Add dS times its factor to sums[array], for each element that was loaded. Where dS is 0 there is none. Sums are laid out as C does. */
static void name(scatter_row)(const Program *p, const Registers *r, double *const *sums, const void *score, const void *grad, long first, long last) {
  const REAL *g = (const REAL *)grad;
  for (const Scatter *s = p->scatters; s < p->scatters + p->end_scatters; s++) {
    const Captured *x = &p->arrays[s->array];
    const int32_t *list = p->lists + s->list;
    const vec zero = {0};
    vec total = zero;
    long by;
    const char *factor = name(operand)(r->registers, score, s->factor, s->wide, first, &by);
    int everywhere = 1; /* one element for the whole row */
    for (int axis = 0; axis < x->axes; axis++) everywhere &= !list[2 * axis + 1];
    for (long j = first; j < last; j += VL, factor += by) {
      const vec d = LOAD(g + j), share = name(choose)((ivec)(d == zero), zero, d * LOAD(factor));
      total += share;
      for (long i = 0; !everywhere && i < VL; i++) {
        int64_t place = 0;
        if (share[i] == 0) continue;
        for (int axis = 0; axis < x->axes; axis++) place = place * x->length[axis] + name(index_at)(x, r->registers, list, axis, j + i);
        sums[s->array][place] += (double)share[i];
      }
    }
    if (everywhere) {
      int64_t place = 0;
      for (int axis = 0; axis < x->axes; axis++) place = place * x->length[axis] + name(index_at)(x, r->registers, list, axis, 0);
      sums[s->array][place] += (double)name(reduce_add)(total);
    }
  }
}
