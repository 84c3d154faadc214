# One call in C: tensors as pointer and byte strides, the Problem's numbers, and the rows and keys of a sequence.
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t, INT64_MAX
from libc.math cimport exp, log, INFINITY
from libc.string cimport memcpy, memset
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF, Py_DECREF
cimport cython
import threading
import numpy as np

cdef extern from "kernels.h" nogil:
    const int BLOCK_N, GRAD_M, GRAD_N, VBYTES
    ctypedef struct GradBlock:
        long ldq, ldv, rows, keys
        void* P
        void* dS
        void* Q
        void* dO
        void* dK
        void* dV
        void* scratch
        long* lo
        long* hi
    ctypedef struct TileRows:
        long row, ahead
        const long* places
    ctypedef struct Line:
        pass
    ctypedef struct Captured:
        pass
    ctypedef struct Scatter:
        pass
    ctypedef struct Program:
        const Line* lines
        const Line* bounds
        const Captured* arrays
        const int32_t* lists
        long once, end, end_bounds, bytes
        int32_t out, out_wide, batch, head, q
        int by_head
        const Scatter* scatters
        long end_scatters
    ctypedef struct Registers:
        char* registers
        long batch, head, key, width
    const int NONE, SOME, ALL, SCORE
    const char* program_ops()
    void add_bits(uint64_t* all, const uint64_t* seen, long first, long last)
    void bytes_of(uint8_t* bytes, const uint64_t* bits, long n)
    void set_bits(uint64_t* bits, long first, long last, bint value)
    bint narrow_keys(const uint64_t* seen, long* first, long* last)
    int bounds_of(const Program* p, long batch, long head, long q0, long q1, long k0, long k1)
    ctypedef struct Kernels:
        long real, operand, panel, cols, block_n, align
        int half
        void (*load_row)(void* dst, long padded, const char* src, long stride, int dtype, long n) noexcept nogil
        void (*store_row)(char* dst, long stride, int dtype, const void* src, double scale, long n) noexcept nogil
        void (*pack_rows)(void* to, long ld, const char* src, long row, const long* places, long dim, int dtype, long first, long last, long padded, long n_dim, const uint8_t* attended) noexcept nogil
        void (*pack_columns)(void* to, const char* src, long row, const long* places, long dim, int dtype, long first, long last, long n_dim, const uint8_t* attended) noexcept nogil
        void (*pack_values)(void* to, long ld, const char* src, long row, const long* places, long dim, int dtype, long first, long last, long capacity, long n_dim, const uint8_t* attended) noexcept nogil
        void (*scores)(long mr, long n_dim, const void* A, long lda, const void* columns, long first, long last, void* S, long lds) noexcept nogil
        void (*weighted_sum)(long mr, long first, long last, const void* P, long ldp, const void* V, long ldv, long capacity, void* O, long ldo, const void* rescale) noexcept nogil
        const void* (*grad_operands)(const GradBlock* block) noexcept nogil
        void (*key_gradients)(const GradBlock* block) noexcept nogil
        const void* (*key_row)(const void* G, long ld, long j, void* scratch) noexcept nogil
        void (*direct_scores)(long mr, long n_dim, const void* A, long lda, const char* K, const TileRows* rows, int dtype, long first, long last, void* S, long lds) noexcept nogil
        void (*direct_sum)(long mr, long first, long last, const void* P, long ldp, const char* V, const TileRows* rows, int dtype, long n_dim, void* O, long ldo, const void* rescale) noexcept nogil
        void (*score_row)(void* row, long first, long last, double scale, double softcap, double slope, double distance, const void* bias, void* slope_out) noexcept nogil
        void (*mask_row)(void* row, long first, long last, const char* mask, long stride) noexcept nogil
        void (*fill_outside)(void* row, long first, long lo, long hi, long last, double value) noexcept nogil
        uint32_t (*optimistic)(long mr, long n_dim, const void* A, long lda, const void* columns, long first, long last, const long* lo, const long* hi, long n0, void* S, void* P, long ldp, double c2, void* row_max, void* row_sum, void* rescale) noexcept nogil
        void (*softmax)(long mr, uint32_t rows, void* S, long lds, void* P, long ldp, long first, long last, double c2, void* row_max, void* row_sum, void* rescale) noexcept nogil
        void (*short_rows)(const ShortRows* w) noexcept nogil
        double (*rounding_of_unit)(double m, double c2) noexcept nogil
        void (*drop_row)(void* row, const uint64_t* keep, long first, long last) noexcept nogil
        void (*grad_row)(void* score, void* dprob, long first, long last, double scale, double lse, double delta, const uint64_t* keep, double keep_scale) noexcept nogil
        void (*uncap_row)(void* grad, const void* slope, long first, long last) noexcept nogil
        void (*add_row)(void* to, long stride, const void* src, long first, long last) noexcept nogil
        double (*dot_row)(const void* a, const void* b, long n) noexcept nogil
        void (*add_scaled)(void* to, const void* src, double factor, long n) noexcept nogil
        void (*run_program)(const Program* p, Registers* r, long batch, long head, long q, long key, const void* score, long first, long last) noexcept nogil
        void (*modify_row)(const Program* p, Registers* r, long batch, long head, long q, long key, void* row, long first, long last) noexcept nogil
        void (*see_row)(const Program* p, Registers* r, long batch, long head, long q, long key, uint64_t* seen, long first, long last) noexcept nogil
        void (*hide_row)(void* row, const uint64_t* seen, long first, long last) noexcept nogil
        void (*slope_row)(const Program* p, const Registers* r, const void* score, void* grad, long first, long last) noexcept nogil
        void (*scatter_row)(const Program* p, const Registers* r, double** sums, const void* score, const void* grad, long first, long last) noexcept nogil
    ctypedef struct ShortRows:
        long rows, keys, head_dim, head_dim_v, reach
        const void* q
        const void* columns
        const void* v
        long q_row, v_row
        double c2
        void* out
        long out_row
        void* row_max
        void* row_sum
    const Kernels* kernels_for(int dtype, int in_parts)
    long ahead_of(long row)
    void fetch_lines(const char* start, long bytes)
    TileRows rows_apart(long row)
    void amx_begin()
    void amx_end()
    long pairs_scratch(long ldq, long ldv, long parts)
    double load_element(const char* p, int dtype)
    void store_element(char* p, int dtype, double x)
    bint mark_attended(uint8_t* attended, const char* mask, long stride, const uint64_t* seen, long first, long last)
    void keep_tile(uint64_t* keep, long ld, long row_first, long row_last, long key_first, long n, uint32_t head, uint32_t offset, uint64_t seed, uint32_t threshold)

cdef extern from "tasks.h" nogil:
    int tasks_setup()
    void trim_workspace(int which)
    const int OF_CALL, NO_MEMORY, INTERRUPTED, FORKED
    const int64_t LOOK_NS
    const long REDZONE
    void poison(const char* begin, const char* end)
    ctypedef struct Stop:
        int state
        int64_t next_look
        void* raised
    int64_t now()
    void begin_call(Stop* stop, void (*look)(Stop*) noexcept nogil)
    void stop_call(Stop* stop, int why)
    int is_stopped(const Stop* stop)
    int stopped_in_task(Stop* stop)
    char* task_memory(size_t size, Stop* stop)
    char* call_memory(size_t size, Stop* stop)
    int await_turn(const int* counter, int turn, Stop* stop)
    void pass_turn(int* counter, Stop* stop)
    ctypedef struct Chain:
        int length, started
    ctypedef struct Chains:
        Chain* chain
        long count, first
    Chain* take_item(Chains* chains, int* item)
    bint leave_chain(Chain* chain)
    void run_tasks(void (*task)(const void* call, long number) noexcept nogil, const void* call, long tasks, int threads, bint brief, Stop* stop)
    void lend(void* parallel, void* max_threads)

cdef double LOG2E = 1.4426950408889634

cdef struct Tensor:                     # canonical axes; strides in bytes
    char* ptr
    long batch, row, head, dim
    int dtype

cdef struct Call:
    const Kernels* g
    long batch, heads, heads_k, group, seqlen_q, seqlen_k, head_dim, head_dim_v
    Tensor q, k, v, out, lse, bias, mask
    Tensor dout, dq, dk, dv, dbias
    Stop* stop
    const int64_t* cu_q                 # NULL for a dense problem
    const int64_t* cu_k
    const int64_t* used_k
    const int64_t* table                # k and v are caches: the pages of each request, (batch, table_width). NULL for arrays
    long table_width, page_size         # page_size 0: each request's keys are all in its first page
    const double* slopes                # (batch, heads)
    const double* sinks                 # (heads,)
    const double* q_scales              # (batch, heads_k), of 8-bit operands
    const double* k_scales
    const double* v_scales
    const Program* score_mod            # NULL: none
    const Program* mask_mod
    Tensor blocks                       # of a block_mask: bool, (batch, heads, blocks of rows, blocks of keys)
    long block_rows, block_keys
    const Kernels* mask_kernels         # run mask_mod: float64's where it has floats
    bint narrows                        # there is a mask_mod or a block_mask
    const Program* derivative           # of score_mod, in a backward; NULL where it is 1
    double scale, softcap, keep_scale
    double out_factor                   # of 8-bit operands
    bint scored                         # scores need a pass before the softmax. Else its exponent includes the scale, a positive normal float
    long left, right
    bint given_diagonal                 # `diagonal` is the key of row 0; otherwise the diagonal is bottom-right
    long diagonal
    const int64_t* diagonals            # of each sequence; NULL where they are alike
    bint dropout
    uint64_t seed
    uint32_t offset, threshold
    long first_row, first_column        # of the mask that dropout draws; multiples of 16
    long first_plane, plane_heads       # sequence b and head h have plane first_plane + b * plane_heads + h
    long ldq, ldv                       # padded head_dim and head_dim_v of packed rows

cdef struct Sequence:
    long q0, nq, k0, nk                 # first row and length of queries and keys
    long diagonal                       # the key on which row 0 stands; masks, windows and ALiBi count from it


cdef Sequence sequence_of(const Call* c, long b) noexcept nogil:
    cdef Sequence s
    s.q0 = s.k0 = 0
    s.nq, s.nk = c.seqlen_q, c.seqlen_k
    if c.cu_q != NULL:
        s.q0, s.nq = c.cu_q[b], c.cu_q[b + 1] - c.cu_q[b]
    if c.cu_k != NULL:
        s.k0, s.nk = c.cu_k[b], c.cu_k[b + 1] - c.cu_k[b]
    if c.used_k != NULL:
        s.nk = c.used_k[b]
    s.diagonal = c.diagonals[b] if c.diagonals != NULL else c.diagonal if c.given_diagonal else s.nk - s.nq
    return s


cdef void row_interval(const Call* c, const Sequence* s, long row, long* lo, long* hi) noexcept nogil:
    """masks.row_bounds in C. No limit is a distance larger than any sequence."""
    cdef long diagonal = s.diagonal + row
    lo[0] = min(max(diagonal - c.left, 0), s.nk)
    hi[0] = max(lo[0], min(max(diagonal + c.right + 1, 0), s.nk))


cdef inline uint32_t plane_of(const Call* c, long b, long head) noexcept nogil:
    """The third word of philox.py's counter."""
    return <uint32_t>(c.first_plane + b * c.plane_heads + head)


cdef inline char* at(const Tensor* x, long batch, long row, long head) noexcept nogil:
    return x.ptr + batch * x.batch + row * x.row + head * x.head


cdef inline long key_row(const Call* c, const Tensor* x, long b, long key) noexcept nogil:
    """The distance in bytes of a request's key from the start of a cache in pages: the one place in C that reads a block table."""
    return c.table[b * c.table_width + key // c.page_size] * x.batch + key % c.page_size * x.row


cdef void key_rows(const Call* c, const Tensor* x, long b, long first, long count, long end, long* places) noexcept nogil:
    """key_row of `count` keys from `first`. Past the last key, end - 1, it is the last key's again."""
    cdef long i = 0, j, run, place
    while i < count:
        place = key_row(c, x, b, min(first + i, end - 1))
        run = min(count - i, c.page_size - (first + i) % c.page_size, end - first - i)
        for j in range(i, i + run):
            places[j] = place + (j - i) * x.row
        if run <= 0:
            for j in range(i, count):
                places[j] = place
            return
        i += run


cdef inline double c2(const Call* c) noexcept nogil:
    """P = 2^((s - maximum) c2)."""
    return LOG2E if c.scored else c.scale * LOG2E


cdef inline long round_up(long n, long step) noexcept nogil:
    return (n + step - 1) // step * step


cdef struct Memory:                     # a workspace from `start`; if that is NULL, sizes are only added up
    char* start
    char* next


cdef inline char* carve(Memory* memory, long size) noexcept nogil:
    """Allocate the next `size` bytes, 64-byte aligned."""
    cdef char* p = memory.next
    memory.next = p + round_up(size, 64) + REDZONE
    if memory.start != NULL:
        poison(p + size, memory.next)
    return p


# ---------------------------------------------------------------- Python side
cdef dict DTYPE = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3, "bool": 4, "float8_e4m3fn": 5, "float8_e5m2": 6}


cdef Tensor tensor(view, str axes):
    """A View as Tensor. `axes` names its axes in order, e.g. "brhd"; a missing axis has stride 0."""
    cdef Tensor x
    cdef Py_UCS4 axis
    cdef long i
    memset(&x, 0, sizeof(x))
    if view is None:
        return x
    cdef size_t ptr = view.ptr
    x.ptr = <char*>ptr
    x.dtype = DTYPE[view.dtype]
    cdef tuple strides = view.strides
    for i, axis in enumerate(axes):
        if axis == "b":
            x.batch = strides[i]
        elif axis == "r":
            x.row = strides[i]
        elif axis == "h":
            x.head = strides[i]
        else:
            x.dim = strides[i]
    return x


cdef void look(Stop* stop) noexcept nogil:
    """Run pending signal handlers. Only the main thread has any, so other threads do not look again."""
    with gil:
        try:
            PyErr_CheckSignals()
            stop.next_look = now() + LOOK_NS if threading.get_ident() == threading.main_thread().ident else INT64_MAX
        except BaseException as error:
            Py_INCREF(error)
            stop.raised = <void*>error
            stop_call(stop, INTERRUPTED)


cdef void end_call(Stop* stop) except *:
    """Raise what stopped the call, if it was stopped: the exception of a signal's handler, MemoryError, or RuntimeError in a child
    that a handler forked."""
    trim_workspace(OF_CALL)
    if stop.state == NO_MEMORY:
        raise MemoryError("fastattn: no memory for a thread's workspace")
    if stop.state == FORKED:
        raise RuntimeError("fastattn: a signal handler forked this process during a call; the call has no result here")
    if stop.raised != NULL:
        error = <object>stop.raised
        Py_DECREF(error)
        raise error


cdef const int64_t* integers(array, list alive) except? NULL:
    """Pointer to an array that is private to the call, such as those of plan.Lengths."""
    if array is None:
        return NULL
    cdef const int64_t[::1] a = array
    alive.append(a)
    return &a[0] if a.shape[0] else NULL


cdef const double* doubles(view, list alive) except? NULL:
    if view is None:
        return NULL
    cdef const double[::1] a = np.ascontiguousarray(view.numpy().astype(np.float64)).reshape(-1)
    alive.append(a)
    return &a[0] if a.shape[0] else NULL


cdef void use_kernels(Call* c, const Kernels* g) noexcept:
    c.g = g
    c.ldq, c.ldv = round_up(c.head_dim, g.align), round_up(c.head_dim_v, g.align)


cdef void begin(Call* c, Stop* stop) noexcept:
    """Start a call: from here on it may be stopped."""
    begin_call(stop, look)
    c.stop = stop


cdef void fill(Call* c, p, o, lengths, functions, bint in_parts, list alive) except *:
    """Fill `c` from a Problem, its Operands, plan.Lengths and flex.Functions. `alive` keeps the arrays behind its pointers."""
    memset(c, 0, sizeof(Call))
    longest_q, longest_k, cu_q, cu_k, used_k, table, page_size, diagonals = lengths
    cdef long unlimited = 1 << 40
    c.batch, c.heads, c.heads_k, c.group = p.batch, p.num_heads, p.num_heads_k, p.num_heads // p.num_heads_k
    c.seqlen_q, c.seqlen_k, c.head_dim, c.head_dim_v = longest_q, longest_k, p.head_dim, p.head_dim_v
    axes = "rhd" if p.total_q is not None else "brhd"
    axes_k = axes if table is None else "brhd"
    c.q, c.k, c.v = tensor(o.q, axes), tensor(o.k, axes_k), tensor(o.v, axes_k)
    if table is not None:
        c.table, c.table_width, c.page_size = integers(table.reshape(-1), alive), table.shape[1], page_size
    c.q_scales, c.k_scales, c.v_scales = doubles(o.q_scale, alive), doubles(o.k_scale, alive), doubles(o.v_scale, alive)
    c.out_factor = 1.0 if p.eight_bit is None else p.eight_bit.factor
    if o.out_scale is not None:
        c.out_factor /= o.out_scale.numpy()[0]
    score, mask, drop = p.score, p.mask, p.dropout
    if o.bias is not None:
        c.bias = tensor(o.bias, "bhrd")
    if o.mask is not None:
        c.mask = tensor(o.mask, "bhrd")
    c.cu_q, c.cu_k, c.used_k = integers(cu_q, alive), integers(cu_k, alive), integers(used_k, alive)
    c.slopes, c.sinks = doubles(o.alibi_slopes, alive), doubles(o.sinks, alive)
    c.scale, c.softcap, c.keep_scale = score.softmax_scale, score.softcap or 0.0, 1.0
    c.scored = (c.softcap > 0 or c.slopes != NULL or c.bias.ptr != NULL or c.q_scales != NULL or c.k_scales != NULL
                or not 1e-37 < c.scale * LOG2E < 1e38)
    if functions is not None:
        c.score_mod = program_of(functions.score_mod, functions.score_arrays, alive)
        c.mask_mod = program_of(functions.mask_mod, functions.mask_arrays, alive)
        c.mask_kernels = kernels_for(DTYPE["float64" if functions.mask_real == 8 else "float32"], False)
        c.scored = c.scored or c.score_mod != NULL
        c.blocks = tensor(functions.blocks, "bhrd")
        c.block_rows, c.block_keys = functions.block
        c.narrows = c.mask_mod != NULL or c.blocks.ptr != NULL
    c.left = unlimited if mask.left is None else mask.left
    c.right = unlimited if mask.right is None else mask.right
    c.given_diagonal, c.diagonal = mask.top_left or mask.first is not None, mask.first or 0
    c.diagonals = integers(diagonals, alive)
    if drop is not None:
        c.first_row, c.first_column = drop.row, drop.column
        c.first_plane, c.plane_heads = drop.plane(p.num_heads)
        c.dropout, c.seed, c.offset, c.threshold, c.keep_scale = True, drop.seed, drop.offset, drop.threshold, drop.keep_scale
    use_kernels(c, kernels_for(DTYPE[p.dtype], in_parts))
