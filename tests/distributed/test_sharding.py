"""shard, unshard and positions, of dense and of packed arrays, and of CPU tensors."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn.distributed as fd

CU = [0, 301, 306, 434, 434, 511, 1024]


@pytest.mark.parametrize("shard", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_dense(axis: int, size: int, shard: str) -> None:
    x = np.random.default_rng(0).integers(0, 100, (70, 70, 70)).astype(np.int32)

    def work(group: Any) -> bool:
        mine = fd.shard(x, group, axis, shard=shard)
        rows = fd.positions(70, group, shard=shard)
        same = np.array_equal(mine, np.take(x, rows, axis)) and mine.flags.c_contiguous
        return same and np.array_equal(fd.unshard(mine, group, 70, axis, shard=shard), x)
    assert fd.threads(size, work, timeout=20) == [True] * size


@pytest.mark.parametrize("shard", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed(size: int, shard: str) -> None:
    x = np.arange(1024.0).reshape(-1, 1)

    def work(group: Any) -> Any:
        mine = fd.shard(x, group, 0, shard=shard, cu_seqlens=CU)
        rows = mine[:, 0].astype(int)
        starts = np.array(CU)[np.searchsorted(CU, rows, "right") - 1]
        assert np.array_equal(fd.positions(None, group, shard=shard, cu_seqlens=CU), rows - starts)
        assert np.array_equal(fd.unshard(mine, group, axis=0, shard=shard, cu_seqlens=np.array(CU)), x)
        return len(mine)
    lengths = fd.threads(size, work, timeout=20)
    assert sum(lengths) == 1024 and max(lengths) - min(lengths) <= 96


def test_short_sequences_go_round() -> None:
    """Each goes to one rank whole; they do not all go to the same."""
    x, cu = np.arange(160).reshape(-1, 1), list(range(0, 161, 10))
    lengths = fd.threads(4, lambda group: len(fd.shard(x, group, 0, cu_seqlens=cu)), timeout=20)
    assert lengths == [40] * 4


def test_tensors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(200).reshape(2, 100)

    def work(group: Any) -> bool:
        whole = fd.unshard(fd.shard(x, group), group, 100)
        return type(whole) is torch.Tensor and bool((whole == x).all())
    assert fd.threads(2, work, timeout=20) == [True, True]


@pytest.mark.parametrize(("call", "text"), [
    (lambda group: fd.shard(np.ones(4), group, 1), r"distributed.shard\(\): axis is 1; expected an integer in \[-1, 0\]"),
    (lambda group: fd.shard(np.ones(4), group, 0, cu_seqlens=[0, 3]), "x has 4 rows; expected the last of cu_seqlens, 3"),
    (lambda group: fd.shard(np.ones(4), group, 0, cu_seqlens=[1, 3]), r"cu_seqlens is \[1, 3\]; expected cumulative lengths: 0 first"),
    (lambda group: fd.unshard(np.ones(4), group, 100, 0), r"x has 4 rows on axis 0; expected this rank's \d+; seqlen is taken to be 100"),
    (lambda group: fd.chunks(10, 2, 2), r"distributed.chunks\(\): rank is 2; expected an integer in \[0, 1\]"),
    (lambda group: fd.chunks(10, 2, 1, "zig"), "shard is 'zig'; expected 'zigzag' or 'contiguous'"),
])
def test_errors(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fd.threads(2, call, timeout=20)
