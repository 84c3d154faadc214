# Forward. A task is a block of query rows of one head and a range of keys. If a GQA group has few rows, a task has all of them.
#
#   for each tile of block_n keys:   pack K transposed, pack V, unless the masks leave none of it to any row
#       for each panel of rows:      S = Q K^T, score, mask, softmax (P, rescale), dropout, O = O * rescale + P V
#   out = O / row_sum,  lse = row_max + log(row_sum)
#
# On AMX, scores that need no pass of their own take a shorter way to P: `optimistic` in pairs.h. Rows for which it fails
# are done as above.
#
# A panel's scores (6 rows x 256 keys) stay in L1. Only tiles within the rows' key intervals are visited, so causal and
# windowed problems do only the work they need. With few rows, K and V are read in place (`direct`) and the keys are split
# over tasks; splits are merged by their maxima and sums. If a row of K holds all heads, such a task has all heads
# (`all_heads`), so that it reads memory in order.

cdef enum:
    # Keys of a tile of a task with all heads. Against 64 keys, float32 with 32 key heads runs 1.33 times as fast with 16
    # (prefetch 12 rows ahead) and 1.05 with 32 (48 ahead); bfloat16 2.02 and 1.24 (docs/log-cpu.md).
    STREAM_KEYS = 16
    PREFETCH_AHEAD = 32                 # keys from such a tile to the one that is fetched, a head's piece of each row being read at a time
    MOST_AHEAD = 64                     # at least ahead_of any row

cdef struct Task:
    long b, head_k, head, heads         # `heads` query heads from `head`; head_k: the key head of `head`
    long m0, nq, rows                   # query rows m0 to m0 + nq of each head; rows = heads * nq
    long rows_k                         # rows of one key head: `rows`, unless the task has all heads
    long key_begin, key_end             # keys of this split that some row attends
    Sequence s

cdef struct Work:                       # a thread's workspace
    char* Q                             # [rows][ldq]
    char* K                             # packed columns
    char* V                             # [block_n][ldv]
    char* S                             # [panel][block_n]
    char* P                             # the same memory as S, or [panel][block_n] operands
    char* O                             # [rows][ldv]
    char* row_max
    char* row_sum
    char* rescale
    char* bias                          # one row of a tile
    long* lo                            # each row's keys in this task
    long* hi
    long* begin                         # and in this tile, where a mask_mod or block_mask narrows them; else the same memory
    long* end
    Seen seen
    Registers score_mod
    uint64_t* keep                      # [rows][block_n / 64] bits
    long* k_places                      # [tile + MOST_AHEAD] rows of a tile's keys in a cache of pages (key_row); NULL without pages
    long* v_places
    TileRows k_rows, v_rows             # rows of a tile's keys that are read in place
    long k_start, v_start               # bytes from tile_at to the tile's first row
    uint8_t* attended                   # [TILE_KEYS] keys that the masks leave to some row; NULL without a mask

cdef struct Forward:
    Call c
    const int64_t* order                # sequences, longest first
    const int64_t* first_block          # number of blocks of rows before each
    long sequences, block_m, splits, split_keys
    bint folded
    bint all_heads                      # a task has all heads, and reads K and V in the order of memory
    long tile                           # keys of a tile
    bint few                            # scores are dot products with rows of K
    bint direct                         # rows of K and V are read in place
    bint in_one_page                    # each tile is in one page, and its rows at one distance
    bint fetches                        # tiles of all heads are fetched in the order of memory
    bint optimistic                     # a tile is first tried under the maxima of the tiles before
    bint one_tile                       # all keys are one tile, full or causal: tasks are those of short_task
    char* partial                       # splits: O, row_max, row_sum of each task
    long partial_size


cdef long forward_memory(const Forward* f, long rows, char* start, Work* w) noexcept nogil:
    cdef const Kernels* g = f.c.g
    cdef Memory memory = Memory(start, start)
    rows = round_up(rows, g.panel)
    w.Q = carve(&memory, rows * f.c.ldq * g.operand)
    w.K = carve(&memory, 0 if f.direct else g.block_n * f.c.ldq * g.operand)
    w.V = carve(&memory, 0 if f.direct else g.block_n * f.c.ldv * g.operand)
    w.S = carve(&memory, g.panel * g.block_n * g.real)
    w.P = carve(&memory, g.panel * g.block_n * g.operand) if g.align == 32 else w.S
    w.O = carve(&memory, rows * f.c.ldv * g.real)
    w.row_max = carve(&memory, round_up(rows, g.align) * g.real + 64)
    w.row_sum = carve(&memory, round_up(rows, g.align) * g.real + 64)
    w.rescale = carve(&memory, round_up(g.panel, g.align) * g.real)
    w.bias = carve(&memory, g.block_n * g.real)
    w.lo = <long*>carve(&memory, rows * sizeof(long))
    w.hi = <long*>carve(&memory, rows * sizeof(long))
    w.begin, w.end = w.lo, w.hi
    if f.c.narrows:
        w.begin = <long*>carve(&memory, rows * sizeof(long))
        w.end = <long*>carve(&memory, rows * sizeof(long))
    w.seen = open_seen(&f.c, rows, g.block_n, &memory)
    w.score_mod = open_registers(f.c.score_mod, g.block_n, &memory)
    w.keep = <uint64_t*>carve(&memory, rows * g.block_n // 8 if f.c.dropout else 0)
    w.k_places = <long*>carve(&memory, (f.tile + MOST_AHEAD) * sizeof(long)) if f.c.page_size else NULL
    w.v_places = w.k_places             # rows of K and V mostly lie alike
    if f.c.k.batch != f.c.v.batch or f.c.k.row != f.c.v.row:
        w.v_places = <long*>carve(&memory, (f.tile + MOST_AHEAD) * sizeof(long)) if f.c.page_size else NULL
    w.attended = <uint8_t*>carve(&memory, TILE_KEYS) if masked(&f.c) else NULL
    return memory.next - start


cdef bint make_task(const Forward* f, long number, Task* t) noexcept nogil:
    """Task `number`. False if it has no rows.

    Tasks go sequence by sequence and head by head, so that K and V stay in the cache. A head's last rows, the longest under a
    causal mask, come first."""
    cdef const Call* c = &f.c
    cdef long heads = 1 if f.all_heads else c.heads_k if f.folded else c.heads
    cdef long split = number % f.splits, block = number // f.splits, low = 0, high = f.sequences, middle, blocks
    while high - low > 1:
        middle = (low + high) // 2
        if f.first_block[middle] * heads <= block:
            low = middle
        else:
            high = middle
    block -= f.first_block[low] * heads
    blocks = f.first_block[low + 1] - f.first_block[low]
    t.head_k = block // blocks
    t.head, t.heads = t.head_k * c.group, c.heads if f.all_heads else c.group
    if not f.folded and not f.all_heads:
        t.head, t.heads = t.head_k, 1
        t.head_k = t.head // c.group
    t.b, t.m0 = f.order[low], (blocks - 1 - block % blocks) * f.block_m
    t.s = sequence_of(c, t.b)
    t.nq = min(f.block_m, t.s.nq - t.m0)
    t.rows = t.heads * t.nq
    t.rows_k = c.group * t.nq if f.all_heads else t.rows
    t.key_begin, t.key_end = split * f.split_keys, min((split + 1) * f.split_keys, t.s.nk)
    return t.rows > 0


cdef void load_queries(const Forward* f, Task* t, Work* w) noexcept nogil:
    """Pack Q, find each row's interval of keys, clear the accumulators, and narrow the task's keys to the attended ones.

    A split may begin past the last key of a sequence that is shorter than others; then it has no keys."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long h, r, i = 0, begin = t.key_end, end = 0
    for h in range(t.heads):
        g.pack_rows(w.Q + h * t.nq * c.ldq * g.operand, c.ldq, at(&c.q, t.b, t.s.q0 + t.m0, t.head + h), c.q.row, NULL, c.q.dim, c.q.dtype,
                    0, t.nq, t.nq, c.head_dim, NULL)
        for r in range(t.nq):
            row_interval(c, &t.s, t.m0 + r, &w.lo[i], &w.hi[i])
            w.lo[i], w.hi[i] = max(w.lo[i], t.key_begin), min(w.hi[i], t.key_end)
            if w.lo[i] < w.hi[i]:
                begin, end = min(begin, w.lo[i]), max(end, w.hi[i])
            store_element(w.row_max + i * g.real, 1 if g.real == 8 else 0, -INFINITY)
            i += 1
    memset(w.row_sum, 0, t.rows * g.real)
    memset(w.O, 0, t.rows * c.ldv * g.real)
    if begin >= end:
        begin = end = 0
    t.key_begin, t.key_end = begin, end


cdef inline char* tile_at(const Call* c, const Tensor* x, const Task* t, long n0, long head) noexcept nogil:
    """A head's row of key n0 of k or v; in pages, what a tile's `places` count from."""
    if c.page_size:
        return x.ptr + head * x.head
    return at(x, t.b if c.table == NULL else c.table[t.b * c.table_width], t.s.k0 + n0, head)


cdef inline long one_page(const Forward* f, const Tensor* x, long b, long n0, long end, TileRows* rows) noexcept nogil:
    """The distance in bytes of a tile's first row from the start of a cache in pages. What it prefetches is in one page too."""
    cdef long start = key_row(&f.c, x, b, n0), tiles = 1 if f.fetches else ahead_of(x.row) // STREAM_KEYS
    rows.ahead = key_row(&f.c, x, b, min(n0 + tiles * STREAM_KEYS, end - 1)) - start
    return start


cdef inline void fetch_tile(const Call* c, const Tensor* x, const Task* t, long n0) noexcept nogil:
    fetch_lines(x.ptr + key_row(c, x, t.b, n0) if c.page_size else tile_at(c, x, t, n0, 0), STREAM_KEYS * x.row)


cdef void open_rows(const Forward* f, Work* w) noexcept nogil:
    """Rows that are read in place: at one distance, or at places that load_tile finds."""
    w.k_rows, w.v_rows, w.k_start, w.v_start = rows_apart(f.c.k.row), rows_apart(f.c.v.row), 0, 0
    if not f.in_one_page:
        w.k_rows.places, w.v_rows.places = w.k_places, w.v_places


cdef inline bint masked(const Call* c) noexcept nogil:
    """Whether a row may attend some keys of an interval and not others."""
    return c.mask.ptr != NULL or c.narrows


cdef bint see_tile(const Forward* f, const Task* t, Work* w, long n0) noexcept nogil:
    """Which keys of the tile at key n0 each row attends, and which some row does. False if none does."""
    cdef const Call* c = &f.c
    cdef long h, i
    cdef bint some = not c.narrows
    cdef Marks marks
    if c.narrows:
        memcpy(w.begin, w.lo, t.rows * sizeof(long))
        memcpy(w.end, w.hi, t.rows * sizeof(long))
        for h in range(t.heads):
            some |= see(c, &w.seen, t.b, t.head + h, t.m0, h * t.nq, t.nq, n0, f.tile, 0, w.begin, w.end)
    if some and w.attended != NULL:
        memset(&marks, 0, sizeof(Marks))
        for i in range(t.rows):
            mark_row(c, &marks, &w.seen, i, t.b, t.head + i // t.nq, t.m0 + i % t.nq, n0, max(w.begin[i] - n0, 0), min(w.end[i] - n0, c.g.block_n))
        end_marks(c, &marks, w.attended)
    return some


cdef void load_tile(const Forward* f, const Task* t, Work* w, long n0) noexcept nogil:
    """Pack K and V of the tile at key n0, and draw its dropout bits. Keys that no row attends are packed as zeros."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long h, first = max(t.key_begin - n0, 0), last = min(t.key_end - n0, f.tile)
    if f.fetches and n0 + PREFETCH_AHEAD + STREAM_KEYS <= t.key_end:
        fetch_tile(c, &c.k, t, n0 + PREFETCH_AHEAD)
        fetch_tile(c, &c.v, t, n0 + PREFETCH_AHEAD)
    if f.in_one_page:
        w.k_start = one_page(f, &c.k, t.b, n0, t.key_end, &w.k_rows)
        w.v_start = one_page(f, &c.v, t.b, n0, t.key_end, &w.v_rows)
    elif c.page_size:
        key_rows(c, &c.k, t.b, n0, f.tile + ahead_of(c.k.row), t.key_end, w.k_places)
        if w.v_places != w.k_places:
            key_rows(c, &c.v, t.b, n0, f.tile + ahead_of(c.v.row), t.key_end, w.v_places)
    if f.few and not f.direct:
        g.pack_rows(w.K, c.ldq, tile_at(c, &c.k, t, n0, t.head_k), c.k.row, w.k_places, c.k.dim, c.k.dtype, first, last, last, c.head_dim, w.attended)
    elif not f.few:
        g.pack_columns(w.K, tile_at(c, &c.k, t, n0, t.head_k), c.k.row, w.k_places, c.k.dim, c.k.dtype, first, last, c.head_dim, w.attended)
    if not f.direct:
        g.pack_values(w.V, c.ldv, tile_at(c, &c.v, t, n0, t.head_k), c.v.row, w.v_places, c.v.dim, c.v.dtype, first, last, g.block_n, c.head_dim_v, w.attended)
    if c.dropout:
        for h in range(t.heads):
            keep_tile(w.keep + h * t.nq * (g.block_n // 64), g.block_n // 64, c.first_row + t.m0, c.first_row + t.m0 + t.nq,
                      c.first_column + n0, last, plane_of(c, t.b, t.head + h), c.offset, c.seed, c.threshold)


cdef inline double scale_of(const Call* c, long b, long head) noexcept nogil:
    """The factor of a head's dot products: softmax_scale, and the scales of 8-bit operands."""
    cdef long i = b * c.heads_k + head // c.group
    return c.scale * (c.q_scales[i] if c.q_scales != NULL else 1.0) * (c.k_scales[i] if c.k_scales != NULL else 1.0)


cdef void score(const Call* c, long b, long head, long row, const Sequence* s, long n0, long first, long hi, long last, char* S, char* bias,
                char* slope_out, Registers* score_mod, char* before) noexcept nogil:
    """Turn one row of S, [first, last) of the tile at key n0, from dot products into scores. bias and mask end at column hi.

    before: if not NULL, gets the scores that score_mod was given."""
    cdef const Kernels* g = c.g
    cdef double slope = c.slopes[b * c.heads + head] if c.slopes != NULL else 0.0
    if c.bias.ptr != NULL:
        g.load_row(bias + first * g.real, last - first, at(&c.bias, b, row, head) + (n0 + first) * c.bias.dim, c.bias.dim, c.bias.dtype, hi - first)
    if c.scored:
        g.score_row(S, first, last, scale_of(c, b, head), c.softcap, slope, s.diagonal + row - n0, bias if c.bias.ptr != NULL else NULL, slope_out)
    if c.score_mod != NULL:
        if before != NULL:
            memcpy(before + first * g.real, S + first * g.real, (last - first) * g.real)
        g.modify_row(c.score_mod, score_mod, b, head, row, n0, S, first, last)
    if c.mask.ptr != NULL:
        g.mask_row(S, first, hi, at(&c.mask, b, row, head) + n0 * c.mask.dim, c.mask.dim)


cdef void direct_values(const Forward* f, const Task* t, Work* w, long n0, long i0, long mr, long lo, long hi) noexcept nogil:
    """O = O * rescale + P V with V read in place, over runs of keys that the masks leave to some row."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long begin = lo, end, r
    while begin < hi:
        end = hi
        if w.attended != NULL:
            while begin < hi and not w.attended[begin]:
                begin += 1
            end = begin
            while end < hi and w.attended[end]:
                end += 1
        if begin < end:
            g.direct_sum(mr, begin, end, w.S, g.block_n, tile_at(c, &c.v, t, n0, t.head_k + i0 // t.rows_k) + w.v_start, &w.v_rows, c.v.dtype, c.head_dim_v,
                         w.O + i0 * c.ldv * g.real, c.ldv, w.rescale)
            for r in range(mr):
                store_element(w.rescale + r * g.real, 1 if g.real == 8 else 0, 1.0)
        begin = end


cdef void tile_softmax(const Forward* f, const Task* t, Work* w, long n0, long i0, long mr, long first, long hi, long last, uint32_t rows) noexcept nogil:
    """S, score, mask, softmax of the panel at row i0. `rows`: the bits of the rows whose P, row_max and row_sum are wanted."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long r, i, lds = g.block_n * g.real
    cdef TileRows packed = rows_apart(c.ldq * g.real)
    cdef char* Q = w.Q + i0 * c.ldq * g.operand
    if f.direct:
        g.direct_scores(mr, c.head_dim, Q, c.ldq, tile_at(c, &c.k, t, n0, t.head_k + i0 // t.rows_k) + w.k_start, &w.k_rows, c.k.dtype,
                        first, hi, w.S, g.block_n)
    elif f.few:
        g.direct_scores(mr, c.ldq, Q, c.ldq, w.K, &packed, 1 if g.real == 8 else 0, first, hi, w.S, g.block_n)
    else:
        g.scores(mr, c.head_dim, Q, c.ldq, w.K, first, hi, w.S, g.block_n)
    for r in range(mr):
        i = i0 + r
        if c.scored or c.mask.ptr != NULL:
            score(c, t.b, t.head + i // t.nq, t.m0 + i % t.nq, &t.s, n0, first, hi, last, w.S + r * lds, w.bias, NULL, &w.score_mod, NULL)
        if c.narrows and w.seen.partly[i]:
            g.hide_row(w.S + r * lds, w.seen.bits + i * w.seen.ld, first, hi)
        if w.begin[i] - n0 > first or w.end[i] - n0 < last:
            g.fill_outside(w.S + r * lds, first, w.begin[i] - n0, w.end[i] - n0, last, -INFINITY)
    g.softmax(mr, rows, w.S, g.block_n, w.P, g.block_n, first, last, c2(c), w.row_max + i0 * g.real, w.row_sum + i0 * g.real, w.rescale)


cdef void step(const Forward* f, const Task* t, Work* w, long n0, long i0, long mr) noexcept nogil:
    """Rows i0 to i0 + mr of the task against the tile at key n0."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long r, i, lo = f.tile, hi = 0
    cdef uint32_t rows = 0xffffffff
    for i in range(i0, i0 + mr):
        if w.begin[i] < w.end[i]:
            lo, hi = min(lo, w.begin[i] - n0), max(hi, w.end[i] - n0)
    lo, hi = max(lo, 0), min(hi, f.tile)
    if lo >= hi:
        return
    cdef long first = lo // g.cols * g.cols, last = round_up(hi, g.cols)
    if f.optimistic:
        rows = g.optimistic(mr, c.head_dim, w.Q + i0 * c.ldq * g.operand, c.ldq, w.K, first, last, w.lo + i0, w.hi + i0, n0, w.S, w.P, g.block_n, c2(c),
                            w.row_max + i0 * g.real, w.row_sum + i0 * g.real, w.rescale)
    if rows:
        tile_softmax(f, t, w, n0, i0, mr, first, hi, last, rows)
    if c.dropout:
        for r in range(mr):
            g.drop_row(w.P + r * g.block_n * g.operand, w.keep + (i0 + r) * (g.block_n // 64), first, hi)
    if f.direct:
        direct_values(f, t, w, n0, i0, mr, lo, hi)
    else:
        g.weighted_sum(mr, lo, hi, w.P, g.block_n, w.V, c.ldv, g.block_n, w.O + i0 * c.ldv * g.real, c.ldv, w.rescale)


cdef inline void finish_row(const Call* c, long b, long head, long row, const char* O, const char* row_max, const char* row_sum) noexcept nogil:
    """out = O / row_sum, and lse. A sink adds to the sum only. A row that attends nothing gets 0 and -inf."""
    cdef const Kernels* g = c.g
    cdef int real = 1 if g.real == 8 else 0
    cdef double top = -INFINITY, total = load_element(row_sum, real), sink, factor = 1.0, rounding = 0.0, m
    if c.sinks != NULL or c.lse.ptr != NULL:
        top = m = load_element(row_max, real)
        rounding = g.rounding_of_unit(m, c2(c))
        if not c.scored:
            top = m = m * (c.scale if real else <float>c.scale)     # in the precision in which the backward scales the scores
        if c.sinks != NULL:
            sink, factor, rounding = c.sinks[head], exp(rounding), 0.0
            if sink > m:
                top, factor = sink, factor * exp(m - sink)
        total *= factor
        if c.sinks != NULL and top > -INFINITY:
            total += exp(sink - top)
    factor = 0.0 if total == 0 else factor * c.keep_scale * c.out_factor / total
    if c.v_scales != NULL:
        factor *= c.v_scales[b * c.heads_k + head // c.group]
    g.store_row(at(&c.out, b, row, head), c.out.dim, c.out.dtype, O, factor, c.head_dim_v)
    if c.lse.ptr != NULL:
        total *= exp(rounding)
        store_element(at(&c.lse, b, row, head), c.lse.dtype, -INFINITY if top == -INFINITY and total == 0 else top + log(total))


cdef void epilogue(const Forward* f, const Task* t, Work* w) noexcept nogil:
    """The rows of a task: out, and lse if it is wanted."""
    cdef const Call* c = &f.c
    cdef const Kernels* g = c.g
    cdef long h, row, i = 0
    for h in range(t.head, t.head + t.heads):
        for row in range(t.s.q0 + t.m0, t.s.q0 + t.m0 + t.nq):
            finish_row(c, t.b, h, row, w.O + i * c.ldv * g.real, w.row_max + i * g.real, w.row_sum + i * g.real)
            i += 1


cdef void forward_task(const void* call, long number) noexcept nogil:
    cdef const Forward* f = <const Forward*>call
    cdef const Kernels* g = f.c.g
    cdef Task t
    cdef Work w
    cdef long n0, i0, mr, rows, size
    cdef char* partial
    if not make_task(f, number, &t):
        return
    rows = f.block_m * t.heads
    size = forward_memory(f, rows, NULL, &w)
    cdef char* memory = task_memory(size, f.c.stop)
    if memory == NULL:
        return
    forward_memory(f, rows, memory, &w)
    open_rows(f, &w)
    if f.splits > 1:
        partial = f.partial + number * f.partial_size
        w.O, w.row_max = partial, partial + round_up(t.rows, g.panel) * f.c.ldv * g.real
        w.row_sum = w.row_max + t.rows * g.real
    amx_begin()
    load_queries(f, &t, &w)
    n0 = t.key_begin // f.tile * f.tile
    while n0 < t.key_end:
        if n0 % g.block_n == 0 and stopped_in_task(f.c.stop):
            break
        if not see_tile(f, &t, &w, n0):
            n0 += f.tile
            continue
        load_tile(f, &t, &w, n0)
        i0 = 0
        while i0 < t.rows:
            mr = min(g.panel, t.rows_k - i0 % t.rows_k)
            step(f, &t, &w, n0, i0, mr)
            i0 += mr
        n0 += f.tile
    amx_end()
    if f.splits == 1 and not is_stopped(f.c.stop):
        epilogue(f, &t, &w)


cdef void merge_task(const void* call, long number) noexcept nogil:
    """Merge the splits of one task, in order: rescale to the common maximum, then add sums and O."""
    cdef const Forward* f = <const Forward*>call
    cdef const Kernels* g = f.c.g
    cdef int real = 1 if g.real == 8 else 0
    cdef Task t
    cdef Work w
    cdef long i, s, row_max
    cdef double top, m, total, factor
    cdef char* part
    if not make_task(f, number * f.splits, &t):
        return
    cdef char* memory = task_memory(forward_memory(f, f.block_m * t.heads, NULL, &w), f.c.stop)
    if memory == NULL:
        return
    forward_memory(f, f.block_m * t.heads, memory, &w)
    memset(w.O, 0, t.rows * f.c.ldv * g.real)
    row_max = round_up(t.rows, g.panel) * f.c.ldv
    for i in range(t.rows):
        top, total = -INFINITY, 0.0
        for s in range(f.splits):
            part = f.partial + (number * f.splits + s) * f.partial_size
            top = max(top, load_element(part + (row_max + i) * g.real, real))
        for s in range(f.splits):
            part = f.partial + (number * f.splits + s) * f.partial_size
            m = load_element(part + (row_max + i) * g.real, real)
            factor = 0.0 if m == -INFINITY else exp((m - top) * c2(&f.c) / LOG2E + g.rounding_of_unit(m, c2(&f.c)) - g.rounding_of_unit(top, c2(&f.c)))
            total += factor * load_element(part + (row_max + t.rows + i) * g.real, real)
            g.add_scaled(w.O + i * f.c.ldv * g.real, part + i * f.c.ldv * g.real, factor, f.c.ldv)
        store_element(w.row_max + i * g.real, real, top)
        store_element(w.row_sum + i * g.real, real, total)
    epilogue(f, &t, &w)


cdef void run_forward(const Forward* f, long tasks, int threads, bint brief) noexcept nogil:
    run_tasks(short_task if f.one_tile else forward_task, f, tasks * f.splits, threads, brief, f.c.stop)
    if f.splits > 1:
        run_tasks(merge_task, f, tasks, 1, brief, f.c.stop)


@cython.auto_pickle(False)
cdef class Prepared:
    """A forward of a Problem as C runs it. It can run again on other arrays of the same shapes and strides."""

    cdef Forward f
    cdef long tasks
    cdef int threads
    cdef bint brief
    cdef readonly bint one_tile         # f's, for the tests
    cdef list alive                     # the arrays behind f's pointers

    def __call__(self, size_t q, size_t k, size_t v, size_t out, size_t lse):
        """Run it on arrays at these addresses; lse is 0 if the Problem has none."""
        cdef Forward f = self.f         # each call has its own, so that several threads may run it
        cdef Stop stop
        cdef int8_t[::1] partial
        f.c.q.ptr, f.c.k.ptr, f.c.v.ptr, f.c.out.ptr, f.c.lse.ptr = <char*>q, <char*>k, <char*>v, <char*>out, <char*>lse
        begin(&f.c, &stop)
        if f.splits > 1:
            partial = np.empty(self.tasks * f.splits * f.partial_size, np.int8)
            f.partial = <char*>&partial[0]
        with nogil:
            run_forward(&f, self.tasks, self.threads, self.brief)
        end_call(&stop)


def prepare(p, o, lengths, out, lse, const int64_t[::1] order, const int64_t[::1] first_block, long block_m, long splits, long split_keys, bint folded,
            bint all_heads, bint few, bint direct, bint in_parts, int threads, bint brief, functions=None):
    """The forward of a Problem into Views like out and lse. The arguments after lse are the plan (plan.py) and flex.Functions."""
    cdef Prepared ready = Prepared()
    cdef Forward* f = &ready.f
    ready.alive, ready.threads, ready.brief = [order, first_block], threads, brief
    fill(&f.c, p, o, lengths, functions, in_parts, ready.alive)
    packed = p.total_q is not None
    f.c.out, f.c.lse = tensor(out, "rhd" if packed else "brhd"), tensor(lse, "hr" if packed else "bhr")
    f.sequences, f.block_m, f.splits, f.split_keys = order.shape[0], block_m, splits, split_keys
    f.folded, f.all_heads, f.few, f.direct = folded, all_heads, few, direct
    if f.sequences == 0 or f.c.heads == 0:
        return ready                    # without tasks
    if few and f.c.g.align == 32:
        use_kernels(&f.c, kernels_for(DTYPE["float32"], False))
    f.optimistic = f.c.g.optimistic != NULL and not f.c.scored and not masked(&f.c)
    f.tile = f.c.g.block_n if not all_heads else STREAM_KEYS
    f.in_one_page = all_heads and f.c.page_size > 0 and f.c.page_size % STREAM_KEYS == 0
    f.one_tile = ready.one_tile = is_short(f)
    # not contiguous 8-bit rows, which are read at the pace of their conversion
    f.fetches = (all_heads and (f.in_one_page or (f.c.page_size == 0 and o.k.itemsize > 1))
                 and f.c.k.row == f.c.heads_k * f.c.k.head and f.c.v.row == f.c.heads_k * f.c.v.head)
    f.order, f.first_block = &order[0], &first_block[0]
    ready.tasks = first_block[f.sequences] * (1 if all_heads else f.c.heads_k if folded else f.c.heads)
    if splits > 1:
        f.partial_size = round_up(round_up(block_m * (f.c.heads if all_heads else f.c.group if folded else 1), f.c.g.panel) * (f.c.ldv + 2) * f.c.g.real, 64) + 128
    return ready
