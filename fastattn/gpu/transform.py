"""transform_bias_rescale_qkv and its backward on CUDA memory, as cpu/transform.py is on host memory. No attention."""
from __future__ import annotations

from ..arrays.view import View
from .rows import launch as rows
from .runtime.device import current
from .runtime.launcher import on_device


def forward(qkv: View, qkv_bias: View, cu_seqlens: View | None, q: View, k: View, v: View, scale: float,
            stream: int) -> None:
    """rows.launch.transform on the device of q."""
    launcher = on_device(q.device[1])
    with current(launcher.device):
        rows.transform(qkv, qkv_bias, cu_seqlens, q, k, v, scale, launcher, stream)


def backward(dq: View, dk: View, dv: View, cu_seqlens: View | None, dqkv: View, dqkv_bias: View, scale: float,
             stream: int) -> None:
    """rows.launch.transform_backward on the device of dqkv."""
    launcher = on_device(dqkv.device[1])
    with current(launcher.device):
        rows.transform_backward(dq, dk, dv, cu_seqlens, dqkv, dqkv_bias, scale, launcher, stream)
