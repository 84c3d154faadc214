# Traced functions (rowcode.py) in C, and what a thread keeps of them.
cdef char* memory_of(array, list alive) except? NULL:
    """Where an array of records is. `alive` keeps it."""
    cdef int8_t[::1] a
    if array.size == 0:
        return NULL
    a = array.reshape(-1).view(np.int8)
    alive.append(a)
    return <char*>&a[0]


cdef const Program* program_of(code, arrays, list alive) except? NULL:
    """A rowcode.Code and the arrays that it loads from, records of rowcode.captured. NULL for None."""
    if code is None:
        return NULL
    cdef Program* p = <Program*>memory_of(np.zeros(sizeof(Program), np.int8), alive)
    p.lines, p.bounds = <const Line*>memory_of(code.lines, alive), <const Line*>memory_of(code.bounds, alive)
    p.arrays = <const Captured*>memory_of(arrays, alive)
    p.lists = <const int32_t*>memory_of(code.lists, alive)
    p.once, p.end, p.end_bounds, p.bytes = code.once, code.lines.size, code.bounds.size, code.bytes
    p.out, p.out_wide = code.outputs[0].at, code.outputs[0].wide
    p.scatters, p.end_scatters = <const Scatter*>memory_of(code.scatters, alive), code.scatters.size
    p.batch, p.head, p.q, p.by_head = code.batch, code.head, code.q, code.by_head
    return p


cdef inline Registers open_registers(const Program* p, long width, Memory* memory) noexcept nogil:
    """A thread's registers for tiles of `width` keys. No lines of a tile have been run yet."""
    cdef Registers r
    r.registers = carve(memory, p.bytes) if p != NULL else NULL
    r.batch = r.head = r.key = -1
    r.width = width
    return r


cdef enum:
    TILE_KEYS = 256                     # BLOCK_N


cdef struct Seen:                       # which keys of a tile a mask_mod and a block_mask leave to the rows of a task
    Registers mask_mod
    uint64_t* bits                      # [rows][ld], of the rows that are `partly` seen
    uint8_t* partly                     # [rows] whether there are keys between a row's first and last one that it does not attend
    long ld                             # words of a row


cdef struct Marks:                      # keys of a tile that some row attends: of a boolean mask a byte each, else bits
    uint8_t keys[256]
    uint64_t bits[4]


cdef enum:
    SEEN_ROWS = 32                      # rows whose keys are bounded together, before a mask_mod is run for each row
    WORD = 64                           # and so many keys


cdef inline Seen open_seen(const Call* c, long rows, long width, Memory* memory) noexcept nogil:
    cdef Seen w
    w.mask_mod = open_registers(c.mask_mod, width, memory)
    w.ld = (width + 63) // 64
    w.bits = <uint64_t*>carve(memory, rows * w.ld * 8) if c.narrows else NULL
    w.partly = <uint8_t*>carve(memory, rows) if c.narrows else NULL
    return w


cdef int blocks_of(const Call* c, long b, long head, long q0, long q1, long k0, long k1) noexcept nogil:
    """NONE, SOME or ALL of a block_mask's blocks that rows [q0, q1) and keys [k0, k1) touch."""
    cdef long i, j, some = 0, count = 0
    if c.blocks.ptr == NULL:
        return ALL
    for i in range(q0 // c.block_rows, (q1 - 1) // c.block_rows + 1):
        for j in range(k0 // c.block_keys, (k1 - 1) // c.block_keys + 1):
            some += at(&c.blocks, b, i, head)[j * c.blocks.dim] != 0
            count += 1
            if 0 < some < count:
                return SOME
    return ALL if some else NONE


cdef int seen_of(const Call* c, long b, long head, long q0, long q1, long k0, long k1) noexcept nogil:
    """What both leave of all pairs of rows [q0, q1) and keys [k0, k1). SOME may also be none or all."""
    cdef int what
    if k0 >= k1:
        return NONE
    what = blocks_of(c, b, head, q0, q1, k0, k1)
    return what if c.mask_mod == NULL or what == NONE else min(what, bounds_of(c.mask_mod, b, head, q0, q1, k0, k1))


cdef void ask_rows(const Call* c, Seen* w, long b, long head, long row, long first, long rows, long n0, long begin, long end) noexcept nogil:
    """The bits of rows `first` to `first` + `rows` of the task, for keys [begin, end) of the tile at key n0, row by row."""
    cdef long i
    if begin < end:
        for i in range(rows):
            see_row(c, w, first + i, b, head, row + i, n0, begin, end)


cdef void see_rows(const Call* c, Seen* w, long b, long head, long row, long first, long rows, long n0, long begin, long end) noexcept nogil:
    """The same, but words of keys that are all or not attended are not asked for."""
    cdef long word, i, at, last, asked = begin
    cdef int what
    for word in range(begin // WORD, (end + WORD - 1) // WORD):
        at, last = max(word * WORD, begin), min((word + 1) * WORD, end)
        what = seen_of(c, b, head, row, row + rows, n0 + at, n0 + last)
        if what != SOME:
            ask_rows(c, w, b, head, row, first, rows, n0, asked, at)
            asked = last
            for i in range(first, first + rows):
                w.bits[i * w.ld + word] = ~<uint64_t>0 if what == ALL else 0
    ask_rows(c, w, b, head, row, first, rows, n0, asked, end)


cdef inline bint mark_row(const Call* c, Marks* marks, const Seen* seen, long i, long b, long head, long row, long n0, long first, long last) noexcept nogil:
    """Mark the keys [first, last) of the tile that the masks leave to a row, row i of `seen`. Returns whether there are any."""
    cdef const uint64_t* bits = seen.bits + i * seen.ld if c.narrows and seen.partly[i] else NULL
    if c.mask.ptr != NULL:
        return mark_attended(marks.keys, at(&c.mask, b, row, head) + n0 * c.mask.dim, c.mask.dim, bits, first, last)
    add_bits(marks.bits, bits, first, last)
    return first < last


cdef inline bint all_marked(const Call* c, const Marks* marks, long n) noexcept nogil:
    """Whether all n keys are known to be attended, so that no row more need be asked."""
    cdef long first = 0, last = n
    return c.mask.ptr == NULL and not narrow_keys(marks.bits, &first, &last) and first == 0 and last == n


cdef inline void end_marks(const Call* c, Marks* marks, uint8_t* attended) noexcept nogil:
    """The marks of all rows, a byte for each key."""
    if c.mask.ptr == NULL:
        bytes_of(marks.keys, marks.bits, BLOCK_N)
    memcpy(attended, marks.keys, BLOCK_N)


cdef void see_row(const Call* c, Seen* w, long i, long b, long head, long row, long n0, long first, long last) noexcept nogil:
    """The bits of a row, row i of the task: of keys [first, last) of the tile at key n0. The other bits of the words that it has are 0."""
    cdef uint64_t* bits = w.bits + i * w.ld
    cdef long key = n0 + first, end
    if c.mask_mod != NULL:
        c.mask_kernels.see_row(c.mask_mod, &w.mask_mod, b, head, row, n0, bits, first, last)
    else:
        memset(bits + first // WORD, 0, ((last + WORD - 1) // WORD - first // WORD) * 8)
        set_bits(bits, first, last, True)
    while c.blocks.ptr != NULL and key < n0 + last:
        end = min((key // c.block_keys + 1) * c.block_keys, n0 + last)
        if not at(&c.blocks, b, row // c.block_rows, head)[key // c.block_keys * c.blocks.dim]:
            set_bits(bits, key - n0, end - n0, False)
        key = end


cdef bint see(const Call* c, Seen* w, long b, long head, long row, long first, long rows, long n0, long n, long origin, long* lo, long* hi) noexcept nogil:
    """Narrow the keys [lo, hi) of rows `first` to `first` + `rows` of the task to those that are left in the tile at key n0.

    `row`: the query row of the first. lo and hi count keys from `origin`. Returns whether any row has one."""
    cdef long i, begin = n0 + n, end = n0, j, k
    cdef int what
    cdef bint some = False
    for i in range(first, first + rows):
        lo[i], hi[i] = max(lo[i], n0 - origin), min(hi[i], n0 + n - origin)
        if lo[i] < hi[i]:
            begin, end = min(begin, lo[i] + origin), max(end, hi[i] + origin)
        w.partly[i] = False
    what = seen_of(c, b, head, row, row + rows, begin, end)
    if what == SOME and rows > SEEN_ROWS:
        i = 0
        while i < rows:
            some |= see(c, w, b, head, row + i, first + i, min(SEEN_ROWS, rows - i), n0, n, origin, lo, hi)
            i += SEEN_ROWS
        return some
    if what == SOME:
        see_rows(c, w, b, head, row, first, rows, n0, begin - n0, end - n0)
    for i in range(first, first + rows):
        j, k = lo[i] + origin - n0, hi[i] + origin - n0
        if what == NONE or j >= k:
            j = k = 0
        elif what == SOME:
            w.partly[i] = narrow_keys(w.bits + i * w.ld, &j, &k)
        lo[i], hi[i] = j + n0 - origin, k + n0 - origin
        some |= j < k
    return some


def machine():
    """Bytes of a vector, keys of a wide register, and the names of the operations, for rowcode.Machine."""
    return VBYTES, BLOCK_N, tuple(program_ops().decode().split())


def run_program(code, arrays, str dtype, long batch, long head, long q, long key, scores):
    """All outputs of a program for one row of scores of a tile, for the test that compares them with the specification's."""
    cdef list alive = []
    cdef const Program* p = program_of(code, arrays, alive)
    cdef const Kernels* g = kernels_for(DTYPE[dtype], False)
    cdef Registers r
    cdef long first = 0, count = scores.size, i
    r.registers, r.batch, r.head, r.key, r.width = memory_of(np.zeros(p.bytes + 64, np.int8), alive), -1, -1, -1, count
    padded = np.zeros(BLOCK_N, scores.dtype)
    padded[:count] = scores
    cdef const char* row = memory_of(padded, alive)
    g.run_program(p, &r, batch, head, q, key, row, first, round_up(count, g.cols))
    found = []
    for x in code.outputs:
        values = np.zeros(count, np.int64 if g.real == 8 else np.int32)
        for i in range(count):
            at = (<const char*>row if x.at == SCORE else r.registers + <long>x.at) + (i * g.real if x.wide else 0)
            values[i] = (<const int64_t*>at)[0] if g.real == 8 else (<const int32_t*>at)[0]
        found.append(values)
    return found


def program_bounds(code, arrays, long batch, long head, long q0, long q1, long k0, long k1):
    """What interval arithmetic says of a mask over rows [q0, q1) and keys [k0, k1): -1 none is attended, 1 all are, 0 unknown."""
    cdef list alive = []
    return bounds_of(program_of(code, arrays, alive), batch, head, q0, q1, k0, k1) - SOME
