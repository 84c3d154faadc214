# The gradients of captured arrays: a pass of its own, which computes dS once more. An element may be loaded anywhere, so its sum has a fixed
# order only if one task after another adds to it. A unit of work is a sequence, a head and DBIAS_M query rows. Units that differ
# in an axis on which every gradient's place depends in the plainest way (table[head, ...]: by_head) never meet, so they are different
# tasks. Of the others a task does a part in order; with several `lanes` each has sums of its own (flex.py).
cdef long row_blocks(const Backward* f) noexcept nogil:
    return (f.c.seqlen_q + DBIAS_M - 1) // DBIAS_M


cdef long captured_groups(const Backward* f, bint apart) noexcept nogil:
    """How many units there are of those axes that keep gradients apart, or of the others."""
    return ((f.c.batch if f.by_batch == apart else 1) * (f.c.heads if f.by_head == apart else 1) * (row_blocks(f) if f.by_rows == apart else 1))


cdef void captured_unit(const Backward* f, long group, long rest, GradWork* w) noexcept nogil:
    """The unit that is number `group` by the axes that keep gradients apart, and number `rest` by the others."""
    cdef long blocks = row_blocks(f), b, head, m, n0 = 0
    if f.by_rows:
        m, group = group % blocks, group // blocks
    else:
        m, rest = rest % blocks, rest // blocks
    if f.by_head:
        head, group = group % f.c.heads, group // f.c.heads
    else:
        head, rest = rest % f.c.heads, rest // f.c.heads
    b = group if f.by_batch else rest
    while n0 < f.c.seqlen_k and not stopped_in_task(f.c.stop):
        shared_block(f, b, head, m * DBIAS_M, n0, w)
        n0 += GRAD_N


cdef void captured_task(const void* call, long number) noexcept nogil:
    cdef const Backward* f = <const Backward*>call
    cdef long group = number // f.lanes, lane = number % f.lanes, units = captured_groups(f, False), i
    cdef GradWork w
    if not open_memory(f, &w):
        return
    w.dbias.ptr = NULL
    w.captured = f.captured + lane * f.captured_arrays
    amx_begin()
    for i in range(lane * units // f.lanes, (lane + 1) * units // f.lanes):
        captured_unit(f, group, i, &w)
    amx_end()


cdef void sum_captured(Backward* f, functions, captured, int threads, bint brief, list alive) except *:
    """Fill captured.sums, (lanes, elements of all arrays)."""
    cdef int64_t[:, ::1] where = captured.addresses
    f.c.derivative = program_of(functions.captured, functions.score_arrays, alive)
    f.captured, f.captured_arrays, f.lanes = <double**>&where[0, 0], where.shape[1], where.shape[0]
    f.by_batch, f.by_head, f.by_rows = captured.by_batch, captured.by_head, captured.by_rows
    with nogil:
        if not is_stopped(f.c.stop):
            run_tasks(captured_task, f, captured_groups(f, True) * f.lanes, threads, brief, f.c.stop)
