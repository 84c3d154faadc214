"""What tests of real CUDA arrays share: operands on the host and in each library, and their results as numbers."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.arrays.view import numpy_dtype

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K, DIM = 2, 130, 150, 4, 2, 64
SHAPES = ((BATCH, SEQLEN_Q, HEADS, DIM), (BATCH, SEQLEN_K, HEADS_K, DIM), (BATCH, SEQLEN_K, HEADS_K, DIM))
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-3, "bfloat16": 2e-2}
Array = np.ndarray[Any, Any]


def host(dtype: str = "float16", seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32).astype(numpy_dtype(dtype)) for shape in SHAPES]


def expected(arrays: list[Array], **keywords: Any) -> tuple[Array, Array]:
    out, lse = fastattn.attention(*[a.astype(np.float64) for a in arrays], return_lse=True, engine="reference", **keywords)
    return out, lse


def close(actual: Any, wanted: Array, dtype: str) -> None:
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), wanted, rtol=0, atol=TOLERANCE[dtype])


def to_torch(arrays: list[Array], device: str = "cuda") -> list[Any]:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    name = arrays[0].dtype.name
    return [torch.from_numpy(a.astype(np.float32)).to(device).to(getattr(torch, name)) for a in arrays]


def numbers(x: Any) -> Array:
    """The values of a torch tensor, or of anything that torch imports by DLPack on its current stream."""
    torch = pytest.importorskip("torch")

    tensor = x if isinstance(x, torch.Tensor) else torch.from_dlpack(x)
    result: Array = tensor.double().cpu().numpy()
    return result


def to_cupy(arrays: list[Array]) -> list[Any]:
    cupy = pytest.importorskip("cupy")
    return [cupy.asarray(a) for a in arrays]


class DlpackOnly:
    """A torch tensor that is known only by DLPack."""

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.streams = tensor, []

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **keywords: Any) -> Any:
        self.streams.append(keywords["stream"])
        return self.tensor.__dlpack__(**keywords)


class InterfaceOnly:
    """A tensor that is known only by __cuda_array_interface__, made on `stream`."""

    def __init__(self, tensor: Any, stream: Any) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {**tensor.__cuda_array_interface__, "stream": stream.cuda_stream or 1, "version": 3}
