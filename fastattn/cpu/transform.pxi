# transform_bias_rescale_qkv: qkv (batch, seqlen, 3, heads, head_dim), or packed rows of it, to contiguous q, k, v (batch, heads, seqlen, head_dim).
#
# A forward task is TILE rows of one sequence. Its reads stay in L2; its writes are TILE neighbouring rows of each head. A
# backward task is GROUP consecutive rows of qkv, of any sequences, so that sums over rows have one order.
cdef extern from "transform.h" nogil:
    void rescale_rows(char* to, long to_row, const char* source, long from_row, long dim, const void* bias, double factor, long rows, long n, int dtype, int stream)
    ctypedef struct HeadRows:
        const char* source "from"[3]
        long head[3]
        long dim[3]
    void join_row(char* to, const HeadRows* x, long heads, long n, void* sums, double factor, int dtype)
    void stream_end()
    long element_size(int dtype)

cdef enum:
    TILE = 16
    GROUP = 64                          # terms of a float32 sum of the bias's gradient; groups are summed in float64

cdef struct Transform:
    Tensor qkv                          # batch, row and dim; packed: row and dim
    Tensor heads[3]                     # q, k, v or their gradients
    long batch, num_heads, seqlen, head_dim, rows
    const int64_t* cu                   # NULL for a dense problem
    const char* bias
    char* sums                          # [groups][3 * num_heads * head_dim]
    double scale
    long size, real                     # bytes of an element, and of a real of the arithmetic
    int stream


cdef void transform_task(const void* call, long number) noexcept nogil:
    cdef const Transform* f = <const Transform*>call
    cdef long tiles = (f.seqlen + TILE - 1) // TILE, b = number // tiles, t0 = (number - b * tiles) * TILE, part, h, column
    cdef long rows = min(TILE, f.seqlen - t0), row = f.head_dim * f.size, there = rows
    cdef const char* x = f.qkv.ptr + b * f.qkv.batch + t0 * f.qkv.row
    cdef char* to
    if f.cu != NULL:
        x = f.qkv.ptr + (f.cu[b] + t0) * f.qkv.row
        there = max(0, min(rows, f.cu[b + 1] - f.cu[b] - t0))
    for part in range(3):
        for h in range(f.num_heads):
            column = (part * f.num_heads + h) * f.head_dim
            to = f.heads[part].ptr + ((b * f.num_heads + h) * f.seqlen + t0) * row
            rescale_rows(to, row, x + column * f.qkv.dim, f.qkv.row, f.qkv.dim, f.bias + column * f.real, f.scale if part == 0 else 1.0, there,
                         f.head_dim, f.qkv.dtype, f.stream)
            if there < rows:
                memset(to + there * row, 0, (rows - there) * row)
    if f.stream:
        stream_end()


cdef long sequence_at(const Transform* f, long row) noexcept nogil:
    """The last sequence that starts at or before packed row `row`; `batch` if the row belongs to none."""
    cdef long low = 0, high = f.batch, middle
    while low < high:
        middle = (low + high + 1) // 2
        if f.cu[middle] <= row:
            low = middle
        else:
            high = middle - 1
    return low


cdef void transform_backward_task(const void* call, long number) noexcept nogil:
    cdef const Transform* f = <const Transform*>call
    cdef long row = number * GROUP, end = min(row + GROUP, f.rows), b, start, stop, part
    cdef char* sums = f.sums + number * 3 * f.num_heads * f.head_dim * f.real
    cdef HeadRows x
    for part in range(3):
        x.head[part], x.dim[part] = f.heads[part].head, f.heads[part].dim
    while row < end:
        if f.cu == NULL:
            b = row // f.seqlen
            start = b * f.seqlen
            stop = min(end, start + f.seqlen)
        else:
            b = sequence_at(f, row)
            start = f.cu[b]
            stop = min(end, f.cu[b + 1]) if b < f.batch else end
        if b == f.batch:
            memset(f.qkv.ptr + row * f.qkv.row, 0, (stop - row) * f.qkv.row)
            row = stop
        while row < stop:
            for part in range(3):
                x.source[part] = f.heads[part].ptr + b * f.heads[part].batch + (row - start) * f.heads[part].row
            join_row(f.qkv.ptr + row * f.qkv.row, &x, f.num_heads, f.head_dim, sums, f.scale, f.qkv.dtype)
            row += 1


cdef void fill_transform(Transform* f, heads, cu_seqlens, double scale, Stop* stop, list alive) except *:
    memset(f, 0, sizeof(Transform))
    begin_call(stop, look)
    f.batch, f.num_heads, f.seqlen, f.head_dim = heads[0].shape
    for i in range(3):
        f.heads[i] = tensor(heads[i], "bhrd")
    f.cu, f.scale = integers(cu_seqlens, alive), scale
    f.size = element_size(f.heads[0].dtype)
    f.real = 8 if f.size == 8 else 4


def transform(qkv, bias, cu_seqlens, heads, double scale, bint stream, int threads):
    """Write q, k and v (`heads`, contiguous Views). bias: contiguous, in the dtype of the arithmetic. cu_seqlens: int64, private
    to the call. `stream`: write past the caches."""
    cdef Transform f
    cdef Stop stop
    cdef list alive = []
    fill_transform(&f, heads, cu_seqlens, scale, &stop, alive)
    f.qkv, f.stream = tensor(qkv, "brd" if cu_seqlens is None else "rd"), stream
    f.bias = tensor(bias, "d").ptr
    cdef long tasks = f.batch * ((f.seqlen + TILE - 1) // TILE)
    with nogil:
        run_tasks(transform_task, &f, tasks, threads, False, &stop)
    end_call(&stop)


def transform_backward(heads, cu_seqlens, dqkv, double scale, int threads):
    """Write dqkv (rows, columns), contiguous. Return the sums of each GROUP of its rows, (groups, columns)."""
    cdef Transform f
    cdef Stop stop
    cdef list alive = []
    fill_transform(&f, heads, cu_seqlens, scale, &stop, alive)
    f.qkv, f.rows = tensor(dqkv, "rd"), dqkv.shape[0]
    cdef long tasks = (f.rows + GROUP - 1) // GROUP
    sums = np.zeros((tasks, dqkv.shape[1]), np.float64 if f.real == 8 else np.float32)
    cdef size_t address = sums.ctypes.data
    f.sums = <char*>address
    with nogil:
        run_tasks(transform_backward_task, &f, tasks, threads, False, &stop)
    end_call(&stop)
    return sums
