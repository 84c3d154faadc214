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
    p.batch, p.head, p.q, p.by_head = code.batch, code.head, code.q, code.by_head
    return p


cdef inline Registers open_registers(const Program* p, Memory* memory) noexcept nogil:
    """A thread's registers. No lines of a tile have been run yet."""
    cdef Registers r
    r.registers = carve(memory, p.bytes) if p != NULL else NULL
    r.batch = r.head = r.key = -1
    return r


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
    r.registers, r.batch, r.head, r.key = memory_of(np.zeros(p.bytes + 64, np.int8), alive), -1, -1, -1
    padded = np.zeros(BLOCK_N, scores.dtype)
    padded[:count] = scores
    cdef const char* row = memory_of(padded, alive)
    g.run_program(p, &r, batch, head, q, key, count, row, first, round_up(count, g.cols))
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
