"""Arrays in, and arrays of the caller's own kind out. Nothing here copies an input.

A chain: each file imports only from those above it.

    words.py          error texts: what a caller writes in torch, NumPy, CuPy or JAX
    streams.py        CUDA streams, and the driver
    dlpack.py         DLPack capsules
    view.py           View: pointer, shape, strides, dtype, device; Output and Library
    device_array.py   DeviceArray: CUDA memory of our own, where the caller's library allocates none
    protocols.py      readers of NumPy's slow cases, DLPack and the CUDA Array Interface
    libraries.py      readers of torch, CuPy, Numba and cuda.core, and how each allocates
    readers.py        which of them reads an array
    convert.py        Caller: one call's arguments -> canonical Views, results -> arrays of the caller's kind and layout

protocols.py, libraries.py and device_array.py are imported when an array comes in that needs them.
"""
