# The CPU engine: one source, compiled once per instruction set (isa/). Read forward.pxi, then backward.pxi. kernels.h lists
# the operations on a tile.
include "call.pxi"
include "forward.pxi"
include "backward.pxi"
include "backward_call.pxi"
include "transform.pxi"

if tasks_setup():
    raise ImportError("fastattn: pthread setup failed")


def borrow(size_t parallel, size_t max_threads):
    """The entry points of an OpenMP runtime whose threads calls shall use (borrowed.h); 0 and 0 for none."""
    lend(<void*>parallel, <void*>max_threads)


def row_bounds(long row, long seqlen_q, long seqlen_k, left, right, bint top_left):
    """masks.row_bounds in C, for the test that compares the two."""
    cdef Call c
    cdef long lo, hi
    c.left, c.right, c.top_left = (1 << 40) if left is None else left, (1 << 40) if right is None else right, top_left
    row_interval(&c, row, seqlen_q, seqlen_k, &lo, &hi)
    return lo, hi


def vector_length(dtype):
    """(elements to which packed rows are padded, whether 16-bit floats are read in place)."""
    cdef const Kernels* g = kernels_for(DTYPE[dtype], True)
    return g.align, bool(g.half)


cdef struct ArrayStruct:                # NumPy's PyArrayInterface
    int two, nd
    char kind
    int itemsize, flags
    Py_ssize_t* shape
    Py_ssize_t* strides
    void* data


def address(array):
    """The address of an ndarray's memory, in a quarter of the time of arrays.dlpack.address."""
    capsule = array.__array_struct__    # owns what it points to
    return <size_t>(<ArrayStruct*>PyCapsule_GetPointer(capsule, NULL)).data
