# Backward: its waves, which follow each other because their dQ sums need memory, and what Python calls.
cdef long wave_memory(Backward* f, char* start) noexcept nogil:
    """Lay out what the threads of a wave share; return its size."""
    cdef long heads = (f.head_k1 - f.head_k0) * f.c.group
    cdef Memory memory = Memory(start, start)
    f.dq_sum = carve(&memory, heads * f.rows * f.c.ldq * f.c.g.real)
    f.turns = <int*>carve(&memory, heads * f.turn_rows * sizeof(int))
    f.chains.chain = <Chain*>carve(&memory, f.chains.count * sizeof(Chain))
    return memory.next - start


cdef long open_wave(Backward* f) noexcept nogil:
    """Get the wave's memory, reset its turns and chains; return the number of tasks. 0 if there is no memory."""
    cdef long nb = 1 if f.all_batch else f.b1 - f.b0, nh = chains_across(f), n, b, keys, tasks = 0
    cdef Chain* chain
    f.chains.count, f.chains.first = nb * nh, 0
    f.turn_rows = f.rows // GRAD_M + (f.b1 - f.b0) + 1
    cdef char* memory = call_memory(wave_memory(f, NULL), f.c.stop)
    if memory == NULL:
        return 0
    wave_memory(f, memory)
    memset(f.turns, 0, (f.head_k1 - f.head_k0) * f.c.group * f.turn_rows * sizeof(int))
    memset(f.chains.chain, 0, f.chains.count * sizeof(Chain))
    for n in range(f.chains.count):
        keys = 1                        # without keys there is a task for the rows
        for b in range(f.b0 if f.all_batch else f.b0 + n // nh, f.b1 if f.all_batch else f.b0 + n // nh + 1):
            keys = max(keys, sequence_of(&f.c, b).nk)
        chain = &f.chains.chain[n]
        chain.length = <int>((keys + GRAD_N - 1) // GRAD_N)
        tasks += chain.length
    return tasks


cdef void run_waves(Backward* f, list waves, int threads, bint brief) except *:
    """All waves, [(b0, b1, head_k0, head_k1, rows)] of plan.py, unless the call is stopped."""
    cdef Chains chains
    f.chains = &chains
    for b0, b1, head_k0, head_k1, rows in waves:
        f.b0, f.b1, f.head_k0, f.head_k1, f.rows = b0, b1, head_k0, head_k1, rows
        f.row_origin = f.c.cu_q[f.b0] if f.c.cu_q != NULL else 0
        with nogil:
            run_tasks(backward_task, f, open_wave(f), threads, brief, f.c.stop)
        if is_stopped(f.c.stop):
            break


cdef void fill_backward(Backward* f, p, o, lengths, dout, out, lse, dlse, dq, dk, dv, bint few, bint in_parts, functions, list alive) except *:
    """Fill `f` but for dbias, delta and what a wave has."""
    memset(f, 0, sizeof(Backward))
    fill(&f.c, p, o, lengths, functions, in_parts, alive)
    if functions is not None:
        f.c.derivative = program_of(functions.derivative, functions.score_arrays, alive)
    f.few = few
    if few and f.c.g.align == 32:
        use_kernels(&f.c, kernels_for(DTYPE["float32"], False))
    packed = p.total_q is not None
    rows_axes, lse_axes = ("rhd", "hr") if packed else ("brhd", "bhr")
    f.c.out, f.c.dout, f.c.dq = tensor(out, rows_axes), tensor(dout, rows_axes), tensor(dq, rows_axes)
    f.c.dk, f.c.dv = tensor(dk, rows_axes), tensor(dv, rows_axes)
    f.c.lse, f.dlse = tensor(lse, lse_axes), tensor(dlse, lse_axes)
    f.delta_batch, f.delta_head = (0, p.total_q) if packed else (p.num_heads * p.seqlen_q, p.seqlen_q)


@cython.auto_pickle(False)
cdef class PreparedBackward:
    """A backward of a dense Problem without dbias and dsinks, as C runs it. It can run again on other arrays of the same shapes and
    strides."""

    cdef Backward f
    cdef long deltas                    # bytes
    cdef int threads
    cdef bint brief
    cdef list waves, alive              # `alive`: the arrays behind f's pointers

    def __call__(self, size_t q, size_t k, size_t v, size_t dout, size_t out, size_t lse, size_t dlse, size_t dq, size_t dk, size_t dv):
        """Run it on arrays at these addresses; dlse is 0 if there is none."""
        cdef Backward f = self.f        # each call has its own, so that several threads may run it
        cdef Stop stop
        cdef int8_t[::1] delta = np.empty(self.deltas, np.int8)
        f.c.q.ptr, f.c.k.ptr, f.c.v.ptr, f.c.dout.ptr, f.c.out.ptr, f.c.lse.ptr = <char*>q, <char*>k, <char*>v, <char*>dout, <char*>out, <char*>lse
        f.dlse.ptr, f.c.dq.ptr, f.c.dk.ptr, f.c.dv.ptr = <char*>dlse, <char*>dq, <char*>dk, <char*>dv
        f.delta = <char*>&delta[0]
        begin(&f.c, &stop)
        run_waves(&f, self.waves, self.threads, self.brief)
        end_call(&stop)


def prepare_backward(p, o, lengths, dout, out, lse, dlse, dq, dk, dv, list waves, bint few, bint in_parts, int threads, bint brief):
    """The backward of a dense Problem with arrays like these Views, none of them empty."""
    cdef PreparedBackward ready = PreparedBackward()
    ready.waves, ready.threads, ready.brief, ready.alive = waves, threads, brief, []
    fill_backward(&ready.f, p, o, lengths, dout, out, lse, dlse, dq, dk, dv, few, in_parts, None, ready.alive)
    ready.deltas = p.batch * p.num_heads * p.seqlen_q * ready.f.c.g.real
    return ready


def backward(p, o, lengths, dout, out, lse, dlse, dq, dk, dv, dbias, way, delta, dbias_rows, waves, bint few, bint in_parts, int threads, bint brief, functions=None,
             captured=None):
    """Gradients of a Problem.

    way: a dbias.Way. dbias: the View that it writes, four axes. dbias_rows: reals shaped as lse, for way "rows". delta: reals
    shaped as lse; dsinks needs them later. waves: [(b0, b1, head_k0, head_k1, rows)], see plan.py.
    functions: flex.Functions. captured: flex.Sums, where gradients of captured arrays are wanted."""
    cdef Backward f
    cdef Stop stop
    cdef list alive = []
    cdef int8_t[::1] deltas = delta.reshape(-1).view(np.int8)
    fill_backward(&f, p, o, lengths, dout, out, lse, dlse, dq, dk, dv, few, in_parts, functions, alive)
    begin(&f.c, &stop)
    if deltas.shape[0]:
        f.delta = <char*>&deltas[0]
    cdef int8_t[::1] sums
    if dbias_rows is not None and dbias_rows.size:
        sums = dbias_rows.reshape(-1).view(np.int8)
        f.dbias_rows = <char*>&sums[0]
    cdef Tensor gradient = tensor(dbias, "bhrd")
    if dbias is not None:
        # the stride of an axis of length 1 has no meaning
        gradient.batch, gradient.head, gradient.row = [0 if n == 1 else s for n, s in zip(dbias.shape[:3], dbias.strides[:3])]
    if way == "pass":
        f.shared = gradient
    else:
        f.c.dbias, f.dbias_once = gradient, way == "once"
        f.all_batch = way == "sums" and gradient.batch == 0 and p.batch > 1
        f.all_heads = way == "sums" and gradient.head == 0 and p.num_heads > 1
    run_waves(&f, list(waves), threads, brief)
    with nogil:
        if f.shared.ptr != NULL:
            run_tasks(shared_task, &f, shared_tasks(&f), threads, brief, &stop)
    if captured is not None:
        sum_captured(&f, functions, captured, threads, brief, alive)
    end_call(&stop)
