# The forward of short sequences: all keys are one tile, and a row attends all of them or, under a causal mask, the first ones. A task
# packs K, and short_rows (short.h) does the rest, with Q, V and out where they are. Results are those of forward_task to the bit.


cdef long short_memory(const Forward* f, long rows, char* start, Work* w) noexcept nogil:
    """The workspace of short_task: what it needs of forward_memory's. Columns are packed in blocks of at most 64."""
    cdef const Kernels* g = f.c.g
    cdef Memory memory = Memory(start, start)
    w.K = carve(&memory, round_up(f.c.seqlen_k, 64) * f.c.head_dim * g.real)
    w.V = carve(&memory, f.c.seqlen_k * f.c.ldv * g.real)
    if f.c.lse.ptr != NULL:
        w.O = carve(&memory, rows * f.c.ldv * g.real)
        w.row_max = carve(&memory, rows * g.real)
        w.row_sum = carve(&memory, rows * g.real)
    return memory.next - start


cdef inline bint readable(const Kernels* g, const Tensor* x) noexcept nogil:
    """Whether the kernels read and write its rows in place: contiguous reals."""
    return x.dtype == (1 if g.real == 8 else 0) and x.dim == g.real and (<long>x.ptr | x.batch | x.row | x.head) % g.real == 0


cdef bint is_short(const Forward* f) noexcept nogil:
    """Whether short_task can do it: a plain problem of few keys whose rows kernels can read in place."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long far = c.seqlen_q + c.seqlen_k + abs(c.diagonal)
    if g.short_rows == NULL or f.few or f.splits > 1 or c.cu_q != NULL or c.cu_k != NULL or c.used_k != NULL or c.table != NULL:
        return False
    if c.scored or masked(c) or c.dropout or c.sinks != NULL or c.v_scales != NULL or c.out_factor != 1 or c.left < far:
        return False
    return (0 < c.seqlen_k <= g.block_n and c.head_dim_v == c.ldv and readable(g, &c.q) and readable(g, &c.k) and readable(g, &c.v)
            and readable(g, &c.out))


cdef void short_task(const void* call, long number) noexcept nogil:
    """forward_task, for what is_short: the rows of one key head's query heads, or a block of one query head's."""
    cdef const Forward* f = <const Forward*>call
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef Task t
    cdef Work w
    cdef ShortRows s
    cdef long h
    if not make_task(f, number, &t):
        return
    cdef char* memory = task_memory(short_memory(f, t.rows, NULL, &w), c.stop)
    if memory == NULL:
        return
    short_memory(f, t.rows, memory, &w)
    g.pack_columns(w.K, at(&c.k, t.b, 0, t.head_k), c.k.row, NULL, c.k.dim, c.k.dtype, 0, c.seqlen_k, c.head_dim, NULL)
    s.reach = t.s.diagonal + t.m0 + c.right + 1
    s.rows, s.keys, s.head_dim, s.head_dim_v, s.c2 = t.nq, c.seqlen_k, c.head_dim, c.head_dim_v, c2(c)
    s.columns, s.q_row, s.v, s.v_row = w.K, c.q.row // g.real, at(&c.v, t.b, 0, t.head_k), c.v.row // g.real
    if c.v.row != c.ldv * g.real:       # rows far apart compete for few lines of the cache
        g.pack_values(w.V, c.ldv, <char*>s.v, c.v.row, NULL, c.v.dim, c.v.dtype, 0, c.seqlen_k, g.block_n, c.head_dim_v, NULL)
        s.v, s.v_row = w.V, c.ldv
    for h in range(t.heads):
        s.q = at(&c.q, t.b, t.m0, t.head + h)
        if c.lse.ptr == NULL:
            s.out, s.out_row, s.row_max, s.row_sum = at(&c.out, t.b, t.m0, t.head + h), c.out.row // g.real, NULL, NULL
        else:
            s.out, s.out_row = w.O + h * t.nq * c.ldv * g.real, c.ldv
            s.row_max, s.row_sum = w.row_max + h * t.nq * g.real, w.row_sum + h * t.nq * g.real
        g.short_rows(&s)
    if c.lse.ptr != NULL:
        epilogue(f, &t, &w)
