"""Arrays in, and the caller's own kind of array out. Nothing here copies an input.

A chain; each file imports only from those above it:

    errors' words      words.py         what a caller would write in torch, NumPy, CuPy or JAX
    protocols' ground  dlpack.py        DLPack capsules        streams.py   CUDA streams and the driver
    the noun           view.py          View: address, shape, strides, dtype, device; Output; Library
    our own array      device_array.py  DeviceArray: CUDA memory for callers whose library allocates none
    readers            protocols.py     NumPy, DLPack, the CUDA Array Interface
                       libraries.py     torch, CuPy, Numba, cuda.core: read without a protocol, and allocated from
    a call             convert.py       Caller: each argument -> its canonical View; results -> arrays of the caller's kind
"""
