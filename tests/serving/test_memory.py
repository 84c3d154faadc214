"""Whose arrays the caches may be, and what a call leaves alone."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from tests.tools.caches import Case

CASE = Case("memory", rows=2, keys=(3, 21))


def test_a_read_only_cache_is_read() -> None:
    call = Case("memory, nothing new", append=False).make()
    for x in call.arrays[1:3]:
        x.flags.writeable = False
    assert np.isfinite(call.run()).all()


def test_arguments_are_left_alone() -> None:
    """q is rotated in a copy, and so is k."""
    call = Case("memory, rotary", rotary=(16, True), rows=2).make()
    kept = [x.copy() for x in call.arrays[::3]] + [x.copy() for x in call.options.values() if isinstance(x, np.ndarray)]
    call.run()
    now = call.arrays[::3] + [x for x in call.options.values() if isinstance(x, np.ndarray)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(kept, now, strict=True))


def test_lists_are_lengths() -> None:
    call = CASE.make()
    for name in ("cache_seqlens", "block_table"):
        call.options[name] = call.options[name].tolist()
    call.check()


def test_a_list_of_no_lengths() -> None:
    """A batch of no request: NumPy makes an array of float64 of it."""
    q, cache = np.ones((0, 1, 2, 8), np.float32), np.ones((3, 4, 2, 8), np.float32)
    out = fastattn.attention_with_kvcache(q, cache, cache, cache_seqlens=[], cache_batch_idx=[])
    assert out.shape == q.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch(dtype: str) -> None:
    """torch's tensors, their versions raised where memory was written."""
    torch: Any = pytest.importorskip("torch")
    call = Case("memory, torch " + dtype, rows=2, dtype=dtype, rotary=(8, False)).make()
    k_cache, v_cache = call.caches_after()
    right = call.expected_later().run()

    def there(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)
    tensors = [there(x) for x in call.arrays]
    versions = [x._version for x in tensors]
    out = fastattn.attention_with_kvcache(*tensors, **{name: there(x) for name, x in call.options.items()})
    assert type(out) is torch.Tensor and out.dtype is getattr(torch, dtype)
    assert out.float().numpy().tobytes() == right.astype(np.float32).tobytes()
    assert call.arrays[1].tobytes() == k_cache.tobytes() and call.arrays[2].tobytes() == v_cache.tobytes()
    assert [x._version - n for x, n in zip(tensors, versions, strict=True)] == [0, 1, 1, 0, 0]


def test_jax_arrays_are_not_written() -> None:
    """JAX's arrays are immutable: refused where the call would write. In host memory, where JAX's default device is a GPU too."""
    jax: Any = pytest.importorskip("jax")
    call, cpu = CASE.make(), jax.devices("cpu")[0]
    with pytest.raises(ValueError, match="k_cache is read-only; expected a writable array"):
        fastattn.attention_with_kvcache(*(jax.device_put(x, cpu) for x in call.arrays), **call.options)
