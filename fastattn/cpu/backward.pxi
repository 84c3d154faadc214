# Backward, in one pass with five products. A task is one tile of keys of one key head; it loops over the group's query heads and the
# blocks of query rows that see the tile:
#
#   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   with S = score(Q K^T), delta = rowsum(dO out) - dlse
#   dQ += dS K    dV += P^T dO    dK += dS^T Q
#
# dK and dV stay with the task. dQ of a block of rows receives the tiles in key order, each waiting for its turn, so every sum has one
# order: results are bitwise the same from run to run and for any number of threads, without partial copies of dQ.

cdef struct Backward:
    Call c
    long b0, b1, head_k0, head_k1       # this wave: sequences and key heads
    long row_origin, rows               # packed: first row; rows of dQ per head in this wave
    char* delta                         # reals, (batch, heads, seqlen_q) or (heads, total_q)
    long delta_batch, delta_head        # in reals
    Tensor dlse
    char* dq_sum                        # reals, [heads of the wave][rows][ldq]
    int* turns                          # [heads of the wave][blocks of rows]
    long turn_rows
    char* dbias                         # reals; element strides, 0 where the bias is broadcast
    long dbias_batch, dbias_head, dbias_row, dbias_col
    long together                       # pairs of sequence and key head that run side by side
    bint few                            # scores and dP are dot products with rows of K and V
    bint all_batch, all_heads           # one task takes every sequence, every key head, because they share dbias

cdef struct GradWork:
    char* K                             # packed columns, for S; unused with few rows
    char* V                             # packed columns, for dP; [GRAD_N][ldv] with few rows
    char* K_rows                        # [GRAD_N][ldq], for dQ
    char* dK                            # [GRAD_N][ldq] reals, or its transpose (see key_row)
    char* dV
    char* Q                             # [GRAD_M][ldq]
    char* dO                            # [GRAD_M][ldv]
    char* P                             # [GRAD_M][GRAD_N]
    char* dS
    char* slope                         # of the softcap, [GRAD_N], one row
    char* bias
    char* scratch                       # what grad_operands and key_row need
    char* bias_sum                      # [GRAD_M]
    char* ones                          # [panel]
    long* lo                            # keys of each row, relative to the tile
    long* hi
    uint64_t* keep                      # [GRAD_M][GRAD_N / 64] bits
    uint8_t* seen                       # [GRAD_N] keys that the boolean mask shows to some row; NULL without one
    uint8_t* sees                       # [GRAD_M] rows that see some key of the tile


cdef long backward_memory(const Call* c, char* start, GradWork* w) noexcept nogil:
    cdef const Kernels* g = c.g
    cdef Memory memory = Memory(start, start)
    w.K = carve(&memory, GRAD_N * c.ldq * g.operand)
    w.V = carve(&memory, GRAD_N * c.ldv * g.operand)
    w.K_rows = carve(&memory, GRAD_N * c.ldq * g.operand)
    w.dK = carve(&memory, GRAD_N * c.ldq * g.real)
    w.dV = carve(&memory, GRAD_N * c.ldv * g.real)
    w.Q = carve(&memory, GRAD_M * c.ldq * g.operand)
    w.dO = carve(&memory, GRAD_M * c.ldv * g.operand)
    w.P = carve(&memory, GRAD_M * GRAD_N * g.real)
    w.dS = carve(&memory, GRAD_M * GRAD_N * g.real)
    w.slope = carve(&memory, GRAD_N * g.real)
    w.bias = carve(&memory, GRAD_N * g.real)
    w.scratch = carve(&memory, max(pairs_scratch(c.ldq, c.ldv, g.operand // 2), 16 * max(c.ldq, c.ldv) * g.real) if g.grad_operands != NULL else 0)
    w.bias_sum = carve(&memory, GRAD_M * g.real)
    w.ones = carve(&memory, g.panel * g.real)
    w.lo = <long*>carve(&memory, GRAD_M * sizeof(long))
    w.hi = <long*>carve(&memory, GRAD_M * sizeof(long))
    w.keep = <uint64_t*>carve(&memory, GRAD_M * GRAD_N // 8 if c.dropout else 0)
    w.seen = <uint8_t*>carve(&memory, GRAD_N) if c.mask.ptr != NULL else NULL
    w.sees = <uint8_t*>carve(&memory, GRAD_M)
    return memory.next - start


cdef inline long first_row(const Backward* f, const Sequence* s, long b) noexcept nogil:
    """Row of the wave's dQ where sequence b starts: multiples of 32, so that whole panels can be added."""
    if f.c.cu_q == NULL:
        return (b - f.b0) * round_up(f.c.seqlen_q, 32)
    return round_up(s.q0 - f.row_origin, 32) + 32 * (b - f.b0)


cdef inline char* delta_at(const Backward* f, long b, long head, long row) noexcept nogil:
    return f.delta + (b * f.delta_batch + head * f.delta_head + row) * f.c.g.real


cdef inline char* dq_row(const Backward* f, const Sequence* s, long b, long head, long row) noexcept nogil:
    return f.dq_sum + ((head - f.head_k0 * f.c.group) * f.rows + first_row(f, s, b) + row) * f.c.ldq * f.c.g.real


cdef bint attends(const Call* c, const Sequence* s, long b, long head, long row) noexcept nogil:
    """Whether the masks leave the row a key."""
    cdef long lo, hi, j
    row_interval(c, row, s.nq, s.nk, &lo, &hi)
    if c.mask.ptr == NULL:
        return lo < hi
    for j in range(lo, hi):
        if at(&c.mask, b, row, head)[j * c.mask.dim]:
            return True
    return False


cdef void rows_task(const Backward* f, long number, bint finish) noexcept nogil:
    """Rows of one head and sequence, before (delta, and zeros for the sums of dQ) or after (dQ from its float sum to the caller's array)."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long heads = (f.head_k1 - f.head_k0) * c.group
    cdef long b = f.b0 + number // heads, head = f.head_k0 * c.group + number % heads, i
    cdef Sequence s = sequence_of(c, b)
    cdef int real = 1 if g.real == 8 else 0
    cdef char* a = workspace(2 * c.ldv * g.real)
    cdef double delta
    if a == NULL:
        c.failed[0] = 1
        return
    if not finish:
        memset(dq_row(f, &s, b, head, 0), 0, round_up(s.nq, 32) * c.ldq * g.real)
    for i in range(s.nq):
        if finish:
            g.store_row(at(&c.dq, b, s.q0 + i, head), c.dq.dim, c.dq.dtype, dq_row(f, &s, b, head, i), c.scale, c.head_dim)
            continue
        g.load_row(a, c.ldv, at(&c.dout, b, s.q0 + i, head), c.dout.dim, c.dout.dtype, c.head_dim_v)
        g.load_row(a + c.ldv * g.real, c.ldv, at(&c.out, b, s.q0 + i, head), c.out.dim, c.out.dtype, c.head_dim_v)
        delta = g.dot_row(a, a + c.ldv * g.real, c.ldv)
        if delta - delta != 0 and not attends(c, &s, b, head, i):       # NaN in the dout of a row whose out is 0
            delta = 0
        if f.dlse.ptr != NULL:
            delta -= load_element(at(&f.dlse, b, s.q0 + i, head), f.dlse.dtype)
        store_element(delta_at(f, b, head, s.q0 + i), real, delta)


cdef void load_block(const Backward* f, const Sequence* s, GradWork* w, long b, long head, long m0, long nq, long n0, long n) noexcept nogil:
    """Query rows m0 .. m0 + nq: their key intervals in the tile, Q and dO packed (zeros for rows that see none of it), dropout decisions."""
    cdef const Call* c = &f.c
    cdef uint8_t ignored[GRAD_N]
    cdef long i
    for i in range(nq):
        row_interval(c, m0 + i, s.nq, s.nk, &w.lo[i], &w.hi[i])
        w.lo[i], w.hi[i] = max(w.lo[i] - n0, 0), min(w.hi[i] - n0, n)
        w.sees[i] = w.lo[i] < w.hi[i]
        if c.mask.ptr != NULL:
            w.sees[i] = mark_seen(ignored, at(&c.mask, b, m0 + i, head) + n0 * c.mask.dim, c.mask.dim, w.lo[i], w.hi[i]) != 0
    c.g.pack_rows(w.Q, c.ldq, at(&c.q, b, s.q0 + m0, head), c.q.row, c.q.dim, c.q.dtype, 0, nq, round_up(nq, 32), c.head_dim, w.sees)
    c.g.pack_rows(w.dO, c.ldv, at(&c.dout, b, s.q0 + m0, head), c.dout.row, c.dout.dim, c.dout.dtype, 0, nq, round_up(nq, 32), c.head_dim_v, w.sees)
    if c.dropout:
        keep_tile(w.keep, GRAD_N // 64, m0, m0 + nq, n0, n, <uint32_t>(b * c.heads + head), c.offset, c.seed, c.threshold)


cdef void grad_step(const Backward* f, const Sequence* s, GradWork* w, long b, long head, long m0, long i0, long mr, long n0, long n) noexcept nogil:
    """P and dS of rows i0 .. i0 + mr of the block; columns that no row of the panel sees are 0."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef int real = 1 if g.real == 8 else 0
    cdef long i, lo = GRAD_N, hi = 0, width = round_up(n, g.cols), lds = GRAD_N * g.real
    for i in range(i0, i0 + mr):
        if w.lo[i] < w.hi[i]:
            lo, hi = min(lo, w.lo[i]), max(hi, w.hi[i])
    if lo >= hi:
        memset(w.P + i0 * lds, 0, mr * lds)
        memset(w.dS + i0 * lds, 0, mr * lds)
        memset(w.bias_sum + i0 * g.real, 0, mr * g.real)
        return
    cdef long first = lo // g.cols * g.cols, last = round_up(hi, g.cols)
    cdef char* p
    cdef char* ds
    cdef char* row
    if f.few:
        g.direct_scores(mr, c.ldq, w.Q + i0 * c.ldq * g.real, c.ldq, w.K_rows, c.ldq * g.real, real, first, hi, w.P + i0 * lds, GRAD_N)
        g.direct_scores(mr, c.ldv, w.dO + i0 * c.ldv * g.real, c.ldv, w.V, c.ldv * g.real, real, first, hi, w.dS + i0 * lds, GRAD_N)
    else:
        g.scores(mr, c.head_dim, w.Q + i0 * c.ldq * g.operand, c.ldq, w.K, first, hi, w.P + i0 * lds, GRAD_N)
        g.scores(mr, c.head_dim_v, w.dO + i0 * c.ldv * g.operand, c.ldv, w.V, first, hi, w.dS + i0 * lds, GRAD_N)
    for i in range(i0, i0 + mr):
        p, ds, row = w.P + i * lds, w.dS + i * lds, at(&c.lse, b, s.q0 + m0 + i, head)
        if not w.sees[i]:
            memset(p, 0, lds)
            memset(ds, 0, lds)
            store_element(w.bias_sum + i * g.real, real, 0)
            continue
        if c.scored or c.mask.ptr != NULL:
            score(c, b, head, m0 + i, s, n0, first, hi, last, p, w.bias, w.slope)
        if w.lo[i] > first or w.hi[i] < last:
            g.fill_outside(p, first, w.lo[i], w.hi[i], last, -INFINITY)
            g.fill_outside(ds, first, w.lo[i], w.hi[i], last, 0)
        g.grad_row(p, ds, first, last, 1.0 if c.scored else c.scale, load_element(row, c.lse.dtype),
                   load_element(delta_at(f, b, head, s.q0 + m0 + i), real), w.keep + i * (GRAD_N // 64) if c.dropout else NULL, c.keep_scale)
        if f.dbias != NULL:
            if f.dbias_col:
                row = f.dbias + (b * f.dbias_batch + head * f.dbias_head + (m0 + i) * f.dbias_row + n0) * g.real
                g.add_row(row, 1, ds, w.lo[i], w.hi[i])
            else:
                store_element(w.bias_sum + i * g.real, real, 0)
                g.add_row(w.bias_sum + i * g.real, 0, ds, w.lo[i], w.hi[i])
        if c.softcap > 0:
            g.uncap_row(ds, w.slope, first, last)
        g.fill_outside(p, 0, first, last, width, 0)
        g.fill_outside(ds, 0, first, last, width, 0)


cdef void add_dq(const Backward* f, const Sequence* s, GradWork* w, long b, long head, long m0, long nq, long n, long turn, const char* dS) noexcept nogil:
    """dQ += dS K for the block, when the tiles before this one have added theirs; dS as operand rows."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long i, i0, lo, hi
    cdef int* counter = f.turns + (head - f.head_k0 * c.group) * f.turn_rows + first_row(f, s, b) // GRAD_M + (b - f.b0) + m0 // GRAD_M
    await_turn(counter, <int>turn)
    i0 = 0
    while i0 < nq:
        lo, hi = n, 0
        for i in range(i0, min(i0 + g.panel, nq)):
            if w.lo[i] < w.hi[i]:
                lo, hi = min(lo, w.lo[i]), max(hi, w.hi[i])
        if lo < hi:
            g.weighted_sum(min(g.panel, nq - i0), lo, hi, dS + i0 * GRAD_N * g.operand, GRAD_N, w.K_rows, c.ldq, GRAD_N, dq_row(f, s, b, head, m0 + i0),
                           c.ldq, w.ones)
        i0 += g.panel
    if f.dbias != NULL and not f.dbias_col:
        for i in range(nq):
            g.add_row(f.dbias + (b * f.dbias_batch + head * f.dbias_head + (m0 + i) * f.dbias_row) * g.real, 1, w.bias_sum + i * g.real, 0, 1)
    pass_turn(counter)


cdef void mark_keys(const Backward* f, const Sequence* s, GradWork* w, long b, long head_k, long n0, long n) noexcept nogil:
    """Which keys of the tile the boolean mask shows to some row of some head of the group."""
    cdef const Call* c = &f.c
    cdef long head, i, lo, hi
    if w.seen == NULL:
        return
    memset(w.seen, 0, GRAD_N)
    for head in range(head_k * c.group, (head_k + 1) * c.group):
        for i in range(s.nq):
            row_interval(c, i, s.nq, s.nk, &lo, &hi)
            mark_seen(w.seen, at(&c.mask, b, i, head) + n0 * c.mask.dim, c.mask.dim, max(lo - n0, 0), min(hi - n0, n))


cdef void tile_task(const Backward* f, long b, long head_k, long n0, GradWork* w) noexcept nogil:
    """dK and dV of the tile at key n0, and its share of dQ."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef Sequence s = sequence_of(c, b)
    cdef long n = min(GRAD_N, s.nk - n0), head, m, m0, nq, i0, lo, hi, unused, first, last, j
    cdef GradBlock block
    cdef const char* dS
    if n <= 0:
        return
    mark_keys(f, &s, w, b, head_k, n0, n)
    row_interval(c, 0, s.nq, s.nk, &lo, &unused)            # both bounds rise with the row: the keys of all rows are one interval
    row_interval(c, s.nq - 1, s.nq, s.nk, &unused, &hi)
    first, last = max(lo - n0, 0), max(min(hi - n0, n), 0)
    if f.few:
        g.pack_rows(w.V, c.ldv, at(&c.v, b, s.k0 + n0, head_k), c.v.row, c.v.dim, c.v.dtype, first, last, n, c.head_dim_v, w.seen)
    else:
        g.pack_columns(w.K, at(&c.k, b, s.k0 + n0, head_k), c.k.row, c.k.dim, c.k.dtype, first, last, c.head_dim, w.seen)
        g.pack_columns(w.V, at(&c.v, b, s.k0 + n0, head_k), c.v.row, c.v.dim, c.v.dtype, first, last, c.head_dim_v, w.seen)
    g.pack_values(w.K_rows, c.ldq, at(&c.k, b, s.k0 + n0, head_k), c.k.row, c.k.dim, c.k.dtype, first, last, GRAD_N, c.head_dim, w.seen)
    memset(w.dK, 0, GRAD_N * c.ldq * g.real)
    memset(w.dV, 0, GRAD_N * c.ldv * g.real)
    block.ldq, block.ldv, block.keys, block.scratch = c.ldq, c.ldv, n, w.scratch
    block.P, block.dS, block.Q, block.dO, block.dK, block.dV, block.lo, block.hi = w.P, w.dS, w.Q, w.dO, w.dK, w.dV, w.lo, w.hi
    for head in range(head_k * c.group, (head_k + 1) * c.group):
        for m in range((s.nq + GRAD_M - 1) // GRAD_M):
            m0 = m * GRAD_M
            nq = min(GRAD_M, s.nq - m0)
            row_interval(c, m0, s.nq, s.nk, &lo, &unused)
            row_interval(c, m0 + nq - 1, s.nq, s.nk, &unused, &hi)
            if lo >= hi or lo >= n0 + n or hi <= n0:
                continue
            load_block(f, &s, w, b, head, m0, nq, n0, n)
            i0 = 0
            while i0 < nq:
                grad_step(f, &s, w, b, head, m0, i0, min(g.panel, nq - i0), n0, n)
                i0 += g.panel
            block.rows = nq
            dS = <const char*>g.grad_operands(&block) if g.grad_operands != NULL else w.dS
            add_dq(f, &s, w, b, head, m0, nq, n, n0 // GRAD_N - lo // GRAD_N, dS)
            g.key_gradients(&block)
    for j in range(n):
        g.store_row(at(&c.dk, b, s.k0 + n0 + j, head_k), c.dk.dim, c.dk.dtype, g.key_row(w.dK, c.ldq, j, w.scratch), c.scale, c.head_dim)
    for j in range(n):
        g.store_row(at(&c.dv, b, s.k0 + n0 + j, head_k), c.dv.dim, c.dv.dtype, g.key_row(w.dV, c.ldv, j, w.scratch), 1.0, c.head_dim_v)


cdef void backward_task(const Backward* f, long number) noexcept nogil:
    """Task `number`: a few (sequence, key head) pairs at a time, so that their rows stay in the cache; their tiles in key order, so that a tile
    never waits for a later task."""
    cdef const Call* c = &f.c
    cdef long nb = 1 if f.all_batch else f.b1 - f.b0, nh = 1 if f.all_heads else f.head_k1 - f.head_k0
    cdef long tiles = round_up(c.seqlen_k, GRAD_N) // GRAD_N, first = number // (f.together * tiles) * f.together
    cdef long together = min(f.together, nb * nh - first), rest = number - first * tiles, pair = first + rest % together
    cdef long n0 = rest // together * GRAD_N, b = f.b0 + pair // nh, head_k = f.head_k0 + pair % nh, i, j
    cdef GradWork w
    cdef char* memory = workspace(backward_memory(c, NULL, &w))
    if memory == NULL:
        c.failed[0] = 1
        return
    backward_memory(c, memory, &w)
    for i in range(c.g.panel):
        store_element(w.ones + i * c.g.real, 1 if c.g.real == 8 else 0, 1.0)
    amx_begin()
    for i in range(f.b0 if f.all_batch else b, f.b1 if f.all_batch else b + 1):
        for j in range(f.head_k0 if f.all_heads else head_k, f.head_k1 if f.all_heads else head_k + 1):
            tile_task(f, i, j, n0, &w)
    amx_end()


cdef void run_backward(const Backward* f, int threads) noexcept nogil:
    cdef long t, rows = (f.b1 - f.b0) * (f.head_k1 - f.head_k0) * f.c.group
    cdef long tiles = round_up(f.c.seqlen_k, GRAD_N) // GRAD_N
    cdef long tasks = tiles * (1 if f.all_batch else f.b1 - f.b0) * (1 if f.all_heads else f.head_k1 - f.head_k0)
    if threads <= 1 or in_forked_child:
        for t in range(rows):
            rows_task(f, t, False)
        for t in range(tasks):
            backward_task(f, t)
        for t in range(rows):
            rows_task(f, t, True)
        return
    for t in prange(rows, schedule="dynamic", chunksize=1, num_threads=threads):
        rows_task(f, t, False)
    for t in prange(tasks, schedule="dynamic", chunksize=1, num_threads=threads):
        backward_task(f, t)
    for t in prange(rows, schedule="dynamic", chunksize=1, num_threads=threads):
        rows_task(f, t, True)


def backward(p, o, dout, out, lse, dlse, dq, dk, dv, dbias_sum, delta, waves, bint few, int threads):
    """Gradients of a Problem. dbias_sum: reals, (batch, heads, rows, keys) with length 1 where broadcast, or None. delta: reals shaped as lse,
    left for dsinks. waves: [(b0, b1, head_k0, head_k1, rows)], see plan.py."""
    cdef Backward f
    cdef int failed = 0
    cdef list alive = []
    cdef int8_t[::1] deltas = delta.reshape(-1).view(np.int8)
    cdef int[::1] turns
    memset(&f, 0, sizeof(f))
    fill(&f.c, p, o, True, alive)
    f.c.failed, f.together, f.few = &failed, threads, few
    if few and f.c.g.align == 32:
        use_kernels(&f.c, kernels_for(DTYPE["float32"], False))
    packed = p.total_q is not None
    rows_axes, lse_axes = ("rhd", "hr") if packed else ("brhd", "bhr")
    f.c.out, f.c.dout, f.c.dq = tensor(out, rows_axes), tensor(dout, rows_axes), tensor(dq, rows_axes)
    f.c.dk, f.c.dv = tensor(dk, rows_axes), tensor(dv, rows_axes)
    f.c.lse, f.dlse = tensor(lse, lse_axes), tensor(dlse, lse_axes)
    if deltas.shape[0]:
        f.delta = <char*>&deltas[0]
    f.delta_batch, f.delta_head = (0, delta.shape[1]) if packed else (delta.shape[1] * delta.shape[2], delta.shape[2])
    cdef int8_t[::1] sums
    if dbias_sum is not None and dbias_sum.size:
        sums = dbias_sum.reshape(-1).view(np.int8)
        f.dbias = <char*>&sums[0]
        f.dbias_batch, f.dbias_head, f.dbias_row, f.dbias_col = [
            0 if n == 1 else s // dbias_sum.itemsize for s, n in zip(dbias_sum.strides, dbias_sum.shape)]
        f.all_batch = f.dbias_batch == 0 and f.dbias_col != 0 and p.batch > 1
        f.all_heads = f.dbias_head == 0 and f.dbias_col != 0 and p.num_heads > 1
    for b0, b1, head_k0, head_k1, rows in waves:
        rows += 32 * (b1 - b0 + 1)
        f.b0, f.b1, f.head_k0, f.head_k1, f.rows = b0, b1, head_k0, head_k1, rows
        f.row_origin = f.c.cu_q[f.b0] if f.c.cu_q != NULL else 0
        heads = (head_k1 - head_k0) * f.c.group
        f.turn_rows = rows // GRAD_M + (b1 - b0) + 1
        turns = np.zeros(heads * f.turn_rows, np.intc)
        f.dq_sum, f.turns = call_workspace(heads * rows * f.c.ldq * f.c.g.real), &turns[0]
        if f.dq_sum == NULL:
            raise MemoryError("fastattn: no memory for the sums of dq")
        with nogil:
            run_backward(&f, threads)
        if failed:
            raise MemoryError("fastattn: no memory for a thread's workspace")
