"""CUDA arrays of a fake torch."""
from __future__ import annotations

import types
from typing import Any

from fastattn.arrays.view import contiguous


class Tensor:
    """The part of a CUDA torch tensor that fastattn reads."""

    def __init__(self, shape: tuple[int, ...], dtype: str = "bfloat16", ptr: int = 0x1000, device: int = 0) -> None:
        self.shape, self.dtype, self.ptr, self.number, self.device = shape, dtype, ptr, device, f"cuda:{device}"
        self.requires_grad, self.is_cuda, self.is_cpu, self.negative, self.recorded, self._version = False, True, False, False, [], 0

    def data_ptr(self) -> int:
        if self.ptr < 0:
            raise RuntimeError("cannot access data pointer")
        return self.ptr

    def get_device(self) -> int:
        return self.number

    def stride(self) -> tuple[int, ...]:
        return contiguous(self.shape, 1)

    def is_neg(self) -> bool:
        return self.negative

    def new_empty(self, *shape: Any, dtype: str | None = None) -> Tensor:
        shape = shape if isinstance(shape[0], int) else shape[0]
        return Tensor(shape, dtype or self.dtype, 0x9000, self.number)

    def is_inference(self) -> bool:
        return False

    def untyped_storage(self) -> Any:
        return types.SimpleNamespace(resize_=lambda size: None)

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


class TorchStream:
    cuda_stream = 0x50
