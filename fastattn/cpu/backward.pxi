# Backward: one pass with five GEMMs. A task is a tile of keys of one key head. It loops over the group's query heads and the
# blocks of query rows that attend the tile:
#
#   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   with S = score(Q K^T), delta = rowsum(dO out) - dlse
#   dQ += dS K    dV += P^T dO    dK += dS^T Q
#
# dK and dV stay with the task. Tiles add to dQ of a block of rows in key order; each waits for the one before. So every sum
# has one order, results are bitwise the same from run to run and for any number of threads, and dQ needs no partial copies.

cdef struct Backward:
    Call c
    long b0, b1, head_k0, head_k1       # this wave: sequences and key heads
    long row_origin, rows               # first packed row; rows of dQ per head in this wave
    char* delta                         # reals, (batch, heads, seqlen_q) or (heads, total_q)
    long delta_batch, delta_head        # in reals
    Tensor dlse
    char* dq_sum                        # reals, [heads of the wave][rows][ldq]
    int* turns                          # [heads of the wave][blocks of rows]
    long turn_rows
    bint dbias_once                     # each element of dbias is one dS, rounded and stored; else dbias is of reals, to which dS are added
    char* dbias_rows                    # a bias broadcast over keys: sums of dS, reals laid out as delta
    Tensor shared                       # dbias, if it has a pass of its own; c.dbias is then NULL
    Chains* chains                      # of tiles: a chain for each pair (sequence, key head)
    bint few                            # scores and dP are dot products with rows of K and V
    double** captured                   # [lanes][arrays]: sums of gradients of captured arrays (captured.pxi)
    long captured_arrays, lanes
    bint by_batch, by_head, by_rows
    bint all_batch, all_heads           # one task does every sequence, every key head, because they share dbias

cdef struct GradWork:
    char* K                             # packed columns, for S; unused if `few`
    char* V                             # packed columns, for dP; [GRAD_N][ldv] if `few`
    char* K_rows                        # [GRAD_N][ldq], for dQ
    char* dK                            # [GRAD_N][ldq] reals, or transposed (see key_row)
    char* dV
    char* Q                             # [GRAD_M][ldq]
    char* dO                            # [GRAD_M][ldv]
    char* P                             # [GRAD_M][GRAD_N]
    char* dS
    char* slope                         # the softcap's derivative, [GRAD_N], of one row
    char* bias
    char* scratch                       # for grad_operands and key_row
    char* bias_sum                      # [GRAD_M]
    char* ones                          # [panel]
    long* lo                            # each row's keys, relative to the tile
    long* hi
    long* rising_lo                     # the same, but both rise with the row; where a mask_mod or block_mask makes others, some more keys
    long* rising_hi
    uint64_t* keep                      # [GRAD_M][GRAD_N / 64] bits
    Seen seen                           # of the block's rows
    Registers score_mod
    Registers derivative
    double** captured                   # sums of the gradients of captured arrays, in the pass that wants them; else NULL
    char* before                        # [GRAD_N] one row of scores before score_mod; NULL if nobody asks for its derivative
    uint8_t* attended                   # [TILE_KEYS] keys that the masks leave to some row; NULL without a mask
    uint8_t* attends                    # [GRAD_M] rows that attend a key of the tile
    Tensor dbias                        # where dS is added: c.dbias or, in the extra pass, dbias_sum
    char* dbias_sum                     # [DBIAS_M][GRAD_N] reals


cdef enum:
    DBIAS_M = 768                       # rows of a task of the dbias pass, which packs K and V of its tile once: 600 KB of sums, in L2


cdef long backward_memory(const Call* c, bint shared, char* start, GradWork* w) noexcept nogil:
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
    w.rising_lo, w.rising_hi = w.lo, w.hi
    if c.narrows:
        w.rising_lo = <long*>carve(&memory, GRAD_M * sizeof(long))
        w.rising_hi = <long*>carve(&memory, GRAD_M * sizeof(long))
    w.keep = <uint64_t*>carve(&memory, GRAD_M * GRAD_N // 8 if c.dropout else 0)
    w.seen = open_seen(c, GRAD_M, GRAD_N, &memory)
    w.score_mod = open_registers(c.score_mod, GRAD_N, &memory)
    w.derivative = open_registers(c.derivative, GRAD_N, &memory)
    w.before = carve(&memory, GRAD_N * g.real) if c.derivative != NULL else NULL
    w.attended = <uint8_t*>carve(&memory, TILE_KEYS) if masked(c) else NULL
    w.attends = <uint8_t*>carve(&memory, GRAD_M)
    w.dbias = c.dbias
    w.captured = NULL
    w.dbias_sum = carve(&memory, DBIAS_M * GRAD_N * g.real if shared else 0)
    return memory.next - start


cdef bint open_memory(const Backward* f, GradWork* w) noexcept nogil:
    """Get this thread's workspace. False if there is no memory."""
    cdef const Call* c = &f.c
    cdef bint shared = f.shared.ptr != NULL
    cdef char* memory = task_memory(backward_memory(c, shared, NULL, w), c.stop)
    cdef long i
    if memory == NULL:
        return False
    backward_memory(c, shared, memory, w)
    for i in range(c.g.panel):
        store_element(w.ones + i * c.g.real, 1 if c.g.real == 8 else 0, 1.0)
    return True


cdef inline long first_row(const Backward* f, const Sequence* s, long b) noexcept nogil:
    """Row of the wave's dQ at which sequence b starts: a multiple of 32, so that whole panels can be added."""
    if f.c.cu_q == NULL:
        return (b - f.b0) * round_up(f.c.seqlen_q, 32)
    return round_up(s.q0 - f.row_origin, 32) + 32 * (b - f.b0)


cdef inline char* delta_at(const Backward* f, long b, long head, long row) noexcept nogil:
    return f.delta + (b * f.delta_batch + head * f.delta_head + row) * f.c.g.real


cdef inline char* dq_row(const Backward* f, const Sequence* s, long b, long head, long row) noexcept nogil:
    return f.dq_sum + ((head - f.head_k0 * f.c.group) * f.rows + first_row(f, s, b) + row) * f.c.ldq * f.c.g.real


cdef bint attends(const Call* c, const Sequence* s, Seen* seen, long b, long head, long row) noexcept nogil:
    """Whether the masks leave the row any key. `seen` has room for one row."""
    cdef Marks ignored
    cdef long lo, hi, n0, first, last
    row_interval(c, s, row, &lo, &hi)
    if not masked(c):
        return lo < hi
    n0 = lo // GRAD_N * GRAD_N
    while n0 < hi:
        first, last = max(lo - n0, 0), min(hi - n0, GRAD_N)
        if not c.narrows or see(c, seen, b, head, row, 0, 1, n0, GRAD_N, n0, &first, &last):
            if mark_row(c, &ignored, seen, 0, b, head, row, n0, first, last):
                return True
        n0 += GRAD_N
    return False


cdef void rows_of(const Backward* f, long b, long head, bint finish) noexcept nogil:
    """The rows of one head and sequence. Before the tiles: delta, and dQ sums set to 0. After (`finish`): dQ to the caller's array."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long i
    cdef Sequence s = sequence_of(c, b)
    cdef int real = 1 if g.real == 8 else 0
    cdef Memory memory = Memory(NULL, NULL)
    cdef Seen seen = open_seen(c, 1, GRAD_N, &memory)
    cdef char* a = task_memory(2 * c.ldv * g.real + memory.next - memory.start, c.stop)
    cdef double delta
    if a == NULL:
        return
    memory.start = memory.next = a + 2 * c.ldv * g.real
    seen = open_seen(c, 1, GRAD_N, &memory)
    if not finish:
        memset(dq_row(f, &s, b, head, 0), 0, round_up(s.nq, 32) * c.ldq * g.real)
    for i in range(s.nq):
        if finish:
            g.store_row(at(&c.dq, b, s.q0 + i, head), c.dq.dim, c.dq.dtype, dq_row(f, &s, b, head, i), c.scale, c.head_dim)
            continue
        g.load_row(a, c.ldv, at(&c.dout, b, s.q0 + i, head), c.dout.dim, c.dout.dtype, c.head_dim_v)
        g.load_row(a + c.ldv * g.real, c.ldv, at(&c.out, b, s.q0 + i, head), c.out.dim, c.out.dtype, c.head_dim_v)
        delta = g.dot_row(a, a + c.ldv * g.real, c.ldv)
        if delta - delta != 0 and not attends(c, &s, &seen, b, head, i):       # NaN in dout of a row whose out is 0
            delta = 0
        if f.dlse.ptr != NULL:
            delta -= load_element(at(&f.dlse, b, s.q0 + i, head), f.dlse.dtype)
        store_element(delta_at(f, b, head, s.q0 + i), real, delta)


cdef bint see_block(const Call* c, const Sequence* s, GradWork* w, long b, long head, long m0, long nq, long n0, long n) noexcept nogil:
    """The keys in the tile of query rows m0 to m0 + nq. False if the tile has none for them."""
    cdef long i
    cdef bint some = False
    for i in range(nq):
        row_interval(c, s, m0 + i, &w.lo[i], &w.hi[i])
        w.lo[i], w.hi[i] = max(w.lo[i] - n0, 0), min(w.hi[i] - n0, n)
        some |= w.lo[i] < w.hi[i]
    return some if not c.narrows else see(c, &w.seen, b, head, m0, 0, nq, n0, n, n0, w.lo, w.hi)


cdef void rise(GradWork* w, long nq, long n) noexcept nogil:
    """rising_lo: the smallest lo of a row and those after it; rising_hi: the largest hi of a row and those before it."""
    cdef long i, lo = n, hi = 0
    for i in range(nq - 1, -1, -1):
        lo = min(lo, w.lo[i]) if w.lo[i] < w.hi[i] else lo
        w.rising_lo[i] = lo
    for i in range(nq):
        hi = max(hi, w.hi[i]) if w.lo[i] < w.hi[i] else hi
        w.rising_hi[i] = hi


cdef void load_block(const Backward* f, const Sequence* s, GradWork* w, long b, long head, long m0, long nq, long n0, long n) noexcept nogil:
    """Q and dO of query rows m0 to m0 + nq packed (0 for rows that attend none of the tile), after see_block; dropout bits."""
    cdef const Call* c = &f.c
    cdef Marks ignored
    cdef long i
    if c.narrows:
        rise(w, nq, n)
    for i in range(nq):
        w.attends[i] = w.lo[i] < w.hi[i]
        if c.mask.ptr != NULL:
            w.attends[i] = mark_row(c, &ignored, &w.seen, i, b, head, m0 + i, n0, w.lo[i], w.hi[i])
    c.g.pack_rows(w.Q, c.ldq, at(&c.q, b, s.q0 + m0, head), c.q.row, NULL, c.q.dim, c.q.dtype, 0, nq, round_up(nq, 32), c.head_dim, w.attends)
    c.g.pack_rows(w.dO, c.ldv, at(&c.dout, b, s.q0 + m0, head), c.dout.row, NULL, c.dout.dim, c.dout.dtype, 0, nq, round_up(nq, 32), c.head_dim_v, w.attends)
    if c.dropout:
        keep_tile(w.keep, GRAD_N // 64, c.first_row + m0, c.first_row + m0 + nq, c.first_column + n0, n, plane_of(c, b, head), c.offset, c.seed,
                  c.threshold)


cdef void modified(const Call* c, GradWork* w, long b, long head, long row, long n0, long first, long last, char* ds) noexcept nogil:
    """score_mod's backward for one row: gradients of captured arrays where they are wanted, then dS *= its derivative by the score."""
    cdef const Kernels* g = c.g
    g.run_program(c.derivative, &w.derivative, b, head, row, n0, w.before, first, last)
    if w.captured != NULL:
        g.scatter_row(c.derivative, &w.derivative, w.captured, w.before, ds, first, last)
    g.slope_row(c.derivative, &w.derivative, w.before, ds, first, last)


cdef void grad_step(const Backward* f, const Sequence* s, GradWork* w, long b, long head, long m0, long i0, long mr, long n0, long n) noexcept nogil:
    """P and dS of rows i0 to i0 + mr of the block. Columns that no row of the panel attends are 0."""
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
    cdef TileRows apart_q, apart_v
    cdef char* p
    cdef char* ds
    cdef char* row
    if f.few:
        apart_q, apart_v = rows_apart(c.ldq * g.real), rows_apart(c.ldv * g.real)
        g.direct_scores(mr, c.ldq, w.Q + i0 * c.ldq * g.real, c.ldq, w.K_rows, &apart_q, real, first, hi, w.P + i0 * lds, GRAD_N)
        g.direct_scores(mr, c.ldv, w.dO + i0 * c.ldv * g.real, c.ldv, w.V, &apart_v, real, first, hi, w.dS + i0 * lds, GRAD_N)
    else:
        g.scores(mr, c.head_dim, w.Q + i0 * c.ldq * g.operand, c.ldq, w.K, first, hi, w.P + i0 * lds, GRAD_N)
        g.scores(mr, c.head_dim_v, w.dO + i0 * c.ldv * g.operand, c.ldv, w.V, first, hi, w.dS + i0 * lds, GRAD_N)
    for i in range(i0, i0 + mr):
        p, ds, row = w.P + i * lds, w.dS + i * lds, at(&c.lse, b, s.q0 + m0 + i, head)
        if not w.attends[i]:
            memset(p, 0, lds)
            memset(ds, 0, lds)
            store_element(w.bias_sum + i * g.real, real, 0)
            continue
        if c.scored or c.mask.ptr != NULL:
            score(c, b, head, m0 + i, s, n0, first, hi, last, p, w.bias, w.slope, &w.score_mod, w.before)
        if c.narrows and w.seen.partly[i]:
            g.hide_row(p, w.seen.bits + i * w.seen.ld, first, hi)
        if w.lo[i] > first or w.hi[i] < last:
            g.fill_outside(p, first, w.lo[i], w.hi[i], last, -INFINITY)
            g.fill_outside(ds, first, w.lo[i], w.hi[i], last, 0)
        g.grad_row(p, ds, first, last, 1.0 if c.scored else c.scale, load_element(row, c.lse.dtype),
                   load_element(delta_at(f, b, head, s.q0 + m0 + i), real), w.keep + i * (GRAD_N // 64) if c.dropout else NULL, c.keep_scale)
        if c.derivative != NULL:
            modified(c, w, b, head, m0 + i, n0, first, last, ds)
        if w.dbias.ptr != NULL:
            row = at(&w.dbias, b, m0 + i, head) + n0 * w.dbias.dim
            if f.dbias_once:
                g.store_row(row + w.lo[i] * w.dbias.dim, w.dbias.dim, w.dbias.dtype, ds + w.lo[i] * g.real, 1.0, w.hi[i] - w.lo[i])
            else:
                g.add_row(row, 1, ds, w.lo[i], w.hi[i])
        elif f.dbias_rows != NULL:
            store_element(w.bias_sum + i * g.real, real, 0)
            g.add_row(w.bias_sum + i * g.real, 0, ds, w.lo[i], w.hi[i])
        if c.softcap > 0:
            g.uncap_row(ds, w.slope, first, last)
        g.fill_outside(p, 0, first, last, width, 0)
        g.fill_outside(ds, 0, first, last, width, 0)


cdef bint add_dq(const Backward* f, const Sequence* s, GradWork* w, long b, long head, long m0, long nq, long n, long turn, const char* dS) noexcept nogil:
    """dQ += dS K for the block, once the tiles before this one have added theirs. dS: operand rows. False if the call is stopped."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long i, i0, lo, hi
    cdef int* counter = f.turns + (head - f.head_k0 * c.group) * f.turn_rows + first_row(f, s, b) // GRAD_M + (b - f.b0) + m0 // GRAD_M
    if not await_turn(counter, <int>turn, c.stop):
        return False
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
    if f.dbias_rows != NULL:
        g.add_row(f.dbias_rows + (delta_at(f, b, head, s.q0 + m0) - f.delta), 1, w.bias_sum, 0, nq)
    pass_turn(counter, c.stop)
    return True


cdef void mark_keys(const Backward* f, const Sequence* s, GradWork* w, long b, long head0, long heads, long m0, long m1, long n0, long n) noexcept nogil:
    """Mark the keys of the tile that the masks leave to some row from m0 to m1 of these heads."""
    cdef const Call* c = &f.c
    cdef long head, m, i, nq
    cdef Marks marks
    if w.attended == NULL:
        return
    memset(&marks, 0, sizeof(Marks))
    for head in range(head0, head0 + heads):
        m = m0
        while m < m1:
            nq = min(GRAD_M, m1 - m)
            if see_block(c, s, w, b, head, m, nq, n0, n):
                for i in range(nq):
                    mark_row(c, &marks, &w.seen, i, b, head, m + i, n0, w.lo[i], w.hi[i])
            m = m1 if all_marked(c, &marks, n) else m + nq
    end_marks(c, &marks, w.attended)


cdef void tile_task(const Backward* f, long b, long head_k, long n0, GradWork* w) noexcept nogil:
    """dK and dV of the tile at key n0, and its part of dQ."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef Sequence s = sequence_of(c, b)
    cdef long n = min(GRAD_N, s.nk - n0), head, m, m0, nq, i0, lo, hi, unused, first, last, j
    cdef GradBlock block
    cdef const char* dS
    if n <= 0:
        return
    mark_keys(f, &s, w, b, head_k * c.group, c.group, 0, s.nq, n0, n)
    row_interval(c, &s, 0, &lo, &unused)            # both bounds rise with the row, so the keys of all rows are one interval
    row_interval(c, &s, s.nq - 1, &unused, &hi)
    first, last = max(lo - n0, 0), max(min(hi - n0, n), 0)
    if f.few:
        g.pack_rows(w.V, c.ldv, at(&c.v, b, s.k0 + n0, head_k), c.v.row, NULL, c.v.dim, c.v.dtype, first, last, n, c.head_dim_v, w.attended)
    else:
        g.pack_columns(w.K, at(&c.k, b, s.k0 + n0, head_k), c.k.row, NULL, c.k.dim, c.k.dtype, first, last, c.head_dim, w.attended)
        g.pack_columns(w.V, at(&c.v, b, s.k0 + n0, head_k), c.v.row, NULL, c.v.dim, c.v.dtype, first, last, c.head_dim_v, w.attended)
    g.pack_values(w.K_rows, c.ldq, at(&c.k, b, s.k0 + n0, head_k), c.k.row, NULL, c.k.dim, c.k.dtype, first, last, GRAD_N, c.head_dim, w.attended)
    memset(w.dK, 0, GRAD_N * c.ldq * g.real)
    memset(w.dV, 0, GRAD_N * c.ldv * g.real)
    block.ldq, block.ldv, block.keys, block.scratch = c.ldq, c.ldv, n, w.scratch
    block.P, block.dS, block.Q, block.dO, block.dK, block.dV, block.lo, block.hi = w.P, w.dS, w.Q, w.dO, w.dK, w.dV, w.rising_lo, w.rising_hi
    for head in range(head_k * c.group, (head_k + 1) * c.group):
        for m in range((s.nq + GRAD_M - 1) // GRAD_M - 1, -1, -1):      # from the last row: under a causal mask all tiles of a chain start there
            m0 = m * GRAD_M
            nq = min(GRAD_M, s.nq - m0)
            row_interval(c, &s, m0, &lo, &unused)
            row_interval(c, &s, m0 + nq - 1, &unused, &hi)
            if lo >= hi or lo >= n0 + n or hi <= n0:
                continue
            if stopped_in_task(c.stop):
                return
            if not see_block(c, &s, w, b, head, m0, nq, n0, n):      # the tiles after this one wait for its turn all the same
                memset(w.bias_sum, 0, nq * g.real)
                if not add_dq(f, &s, w, b, head, m0, nq, n, n0 // GRAD_N - lo // GRAD_N, w.dS):
                    return
                continue
            load_block(f, &s, w, b, head, m0, nq, n0, n)
            i0 = 0
            while i0 < nq:
                grad_step(f, &s, w, b, head, m0, i0, min(g.panel, nq - i0), n0, n)
                i0 += g.panel
            block.rows = nq
            dS = <const char*>g.grad_operands(&block) if g.grad_operands != NULL else w.dS
            if not add_dq(f, &s, w, b, head, m0, nq, n, n0 // GRAD_N - lo // GRAD_N, dS):
                return
            g.key_gradients(&block)
    for j in range(n):
        g.store_row(at(&c.dk, b, s.k0 + n0 + j, head_k), c.dk.dim, c.dk.dtype, g.key_row(w.dK, c.ldq, j, w.scratch), c.scale, c.head_dim)
    for j in range(n):
        g.store_row(at(&c.dv, b, s.k0 + n0 + j, head_k), c.dv.dim, c.dv.dtype, g.key_row(w.dV, c.ldv, j, w.scratch), 1.0, c.head_dim_v)


cdef long chains_across(const Backward* f) noexcept nogil:
    """Chains of one sequence. If heads or sequences share dbias, a tile of all of them is one task."""
    return 1 if f.all_heads else f.head_k1 - f.head_k0


cdef void backward_task(const void* call, long number) noexcept nogil:
    """The next tile of some chain. The chain's first task prepares its rows before, and its last one finishes them."""
    cdef const Backward* f = <const Backward*>call
    cdef Stop* stop = f.c.stop
    cdef int tile
    cdef Chain* chain = take_item(f.chains, &tile)
    cdef long nh = chains_across(f), pair = chain - f.chains.chain, b0 = f.b0 + pair // nh, head0 = f.head_k0 + pair % nh
    cdef long b1 = f.b1 if f.all_batch else b0 + 1, head1 = f.head_k1 if f.all_heads else head0 + 1, b, head
    cdef GradWork w
    amx_begin()
    if tile == 0:
        for b in range(b0, b1):
            for head in range(head0 * f.c.group, head1 * f.c.group):
                rows_of(f, b, head, False)
        pass_turn(&chain.started, stop)
    if await_turn(&chain.started, 1, stop) and open_memory(f, &w):
        for b in range(b0, b1):
            for head in range(head0, head1):
                if not stopped_in_task(stop):
                    tile_task(f, b, head, tile * GRAD_N, &w)
    amx_end()
    if leave_chain(chain) and not is_stopped(stop):
        for b in range(b0, b1):
            for head in range(head0 * f.c.group, head1 * f.c.group):
                rows_of(f, b, head, True)


cdef void shared_block(const Backward* f, long b, long head, long m, long n0, GradWork* w) noexcept nogil:
    """Add dS of a sequence and head to the sums of dbias: DBIAS_M rows from m, and the tile at key n0."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef Sequence s = sequence_of(c, b)
    cdef long n = min(GRAD_N, s.nk - n0), end = min(m + DBIAS_M, s.nq), head_k = head // c.group, m0 = m, nq, i0, lo, hi, unused
    if n <= 0 or end <= m:
        return
    row_interval(c, &s, m, &lo, &unused)
    row_interval(c, &s, end - 1, &unused, &hi)
    lo, hi = max(lo - n0, 0), min(hi - n0, n)
    if lo >= hi:
        return
    mark_keys(f, &s, w, b, head, 1, m, end, n0, n)
    if f.few:
        g.pack_rows(w.K_rows, c.ldq, at(&c.k, b, s.k0 + n0, head_k), c.k.row, NULL, c.k.dim, c.k.dtype, lo, hi, n, c.head_dim, w.attended)
        g.pack_rows(w.V, c.ldv, at(&c.v, b, s.k0 + n0, head_k), c.v.row, NULL, c.v.dim, c.v.dtype, lo, hi, n, c.head_dim_v, w.attended)
    else:
        g.pack_columns(w.K, at(&c.k, b, s.k0 + n0, head_k), c.k.row, NULL, c.k.dim, c.k.dtype, lo, hi, c.head_dim, w.attended)
        g.pack_columns(w.V, at(&c.v, b, s.k0 + n0, head_k), c.v.row, NULL, c.v.dim, c.v.dtype, lo, hi, c.head_dim_v, w.attended)
    while m0 < end and not stopped_in_task(c.stop):
        nq = min(GRAD_M, end - m0)
        i0 = nq
        if see_block(c, &s, w, b, head, m0, nq, n0, n):
            load_block(f, &s, w, b, head, m0, nq, n0, n)
            i0 = 0
        while i0 < nq:
            grad_step(f, &s, w, b, head, m0, i0, min(g.panel, nq - i0), n0, n)
            i0 += g.panel
        m0 += nq


cdef long shared_heads(const Backward* f) noexcept nogil:
    return f.c.heads if f.shared.head else 1


cdef long shared_tasks(const Backward* f) noexcept nogil:
    return (f.c.batch if f.shared.batch else 1) * shared_heads(f) * ((f.c.seqlen_q + DBIAS_M - 1) // DBIAS_M) * ((f.c.seqlen_k + GRAD_N - 1) // GRAD_N)


cdef void shared_task(const void* call, long number) noexcept nogil:
    """A piece of a dbias that sequences or heads share. It has its own pass: real sums of all of dbias could be larger than dbias."""
    cdef const Backward* f = <const Backward*>call
    cdef const Kernels* g = f.c.g
    cdef long tiles = (f.c.seqlen_k + GRAD_N - 1) // GRAD_N, blocks = (f.c.seqlen_q + DBIAS_M - 1) // DBIAS_M, plane = number // (tiles * blocks)
    cdef long n0 = number % tiles * GRAD_N, m = number // tiles % blocks * DBIAS_M, b = plane // shared_heads(f), head = plane % shared_heads(f), i, j
    cdef GradWork w
    if not open_memory(f, &w):
        return
    memset(w.dbias_sum, 0, DBIAS_M * GRAD_N * g.real)
    w.dbias.row, w.dbias.dim, w.dbias.ptr = GRAD_N * g.real, g.real, w.dbias_sum - (m * GRAD_N + n0) * g.real
    amx_begin()
    for i in range(b if f.shared.batch else 0, b + 1 if f.shared.batch else f.c.batch):
        for j in range(head if f.shared.head else 0, head + 1 if f.shared.head else f.c.heads):
            shared_block(f, i, j, m, n0, &w)
    amx_end()
    for i in range(min(DBIAS_M, f.c.seqlen_q - m)):
        g.store_row(at(&f.shared, b, m + i, head) + n0 * f.shared.dim, f.shared.dim, f.shared.dtype, w.dbias_sum + i * GRAD_N * g.real, 1.0,
                    min(GRAD_N, f.c.seqlen_k - n0))
