# The CPU engine: one source, compiled once per instruction set (isa/). Read forward.pxi, then backward.pxi. kernels.h lists
# the operations on a tile.
include "call.pxi"
include "program.pxi"
include "forward.pxi"
include "short.pxi"
include "backward.pxi"
include "captured.pxi"
include "backward_call.pxi"
include "transform.pxi"

if tasks_setup():
    raise ImportError("fastattn: pthread setup failed")


def borrow(size_t parallel, size_t max_threads):
    """The entry points of an OpenMP runtime whose threads calls shall use (borrowed.h); 0 and 0 for none."""
    lend(<void*>parallel, <void*>max_threads)


def row_bounds(long row, long seqlen_q, long seqlen_k, left, right, bint top_left, first=None):
    """masks.row_bounds in C, for the test that compares the two."""
    cdef Call c
    cdef Sequence s
    cdef long lo, hi
    memset(&c, 0, sizeof(Call))
    c.seqlen_q, c.seqlen_k = seqlen_q, seqlen_k
    c.left, c.right = (1 << 40) if left is None else left, (1 << 40) if right is None else right
    c.given_diagonal, c.diagonal = top_left or first is not None, first or 0
    s = sequence_of(&c, 0)
    row_interval(&c, &s, row, &lo, &hi)
    return lo, hi


def vector_length(dtype, bint in_parts):
    """(elements to which packed rows are padded, whether 16-bit floats are read in place)."""
    cdef const Kernels* g = kernels_for(DTYPE[dtype], in_parts)
    return g.align, bool(g.half)


cdef struct ArrayStruct:                # NumPy's PyArrayInterface
    int two, nd
    char kind
    int itemsize, flags
    Py_ssize_t* shape
    Py_ssize_t* strides
    void* data


cdef enum:
    ALIGNED = 0x100                     # NumPy's NPY_ARRAY_ALIGNED


def address(array):
    """The address of an ndarray's memory, in a quarter of the time of arrays.dlpack.address."""
    capsule = array.__array_struct__    # owns what it points to
    return <size_t>(<ArrayStruct*>PyCapsule_GetPointer(capsule, NULL)).data


cdef object ndarray = np.ndarray


cdef class Forms:
    """The dtypes, shapes and strides of ndarrays. Called with as many arrays, whether they have the same and are aligned."""

    cdef tuple dtypes
    cdef int64_t[::1] sizes             # of each array: number of axes, shape, strides

    def __init__(self, arrays):
        self.dtypes = tuple([x.dtype for x in arrays])
        self.sizes = np.array([n for x in arrays for n in (x.ndim, *x.shape, *x.strides)], np.int64)

    def __call__(self, *arrays):
        cdef ArrayStruct* a
        cdef Py_ssize_t at = 0, axis
        for x, dtype in zip(arrays, self.dtypes):
            if type(x) is not ndarray or x.dtype is not dtype:
                return False
            capsule = x.__array_struct__
            a = <ArrayStruct*>PyCapsule_GetPointer(capsule, NULL)
            if not a.flags & ALIGNED or a.nd != self.sizes[at]:
                return False
            for axis in range(a.nd):
                if a.shape[axis] != self.sizes[at + 1 + axis] or a.strides[axis] != self.sizes[at + 1 + a.nd + axis]:
                    return False
            at += 1 + 2 * a.nd
        return True
