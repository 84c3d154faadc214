"""Packed distributed calls, forward and backward, against one rank; ranks are threads."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn.distributed as fd
from tests.tools.packed_ranks import CASES, Whole, run, wrong

PAIRS = [pytest.param(name, size, id=f"{name}-{size}") for name, case in CASES.items() for size in case.size]


@pytest.mark.parametrize(("name", "size"), PAIRS)
def test_threads(name: str, size: int) -> None:
    whole = Whole(name)
    for found in fd.threads(size, run, whole, timeout=60):
        assert wrong(whole.case, found) == []


def test_the_work_is_balanced() -> None:
    """Unmasked pairs of each rank, lengths that nothing divides: within 7 % of the mean."""
    lengths = np.random.default_rng(0).integers(1, 3000, 40)
    work = [sum(sum(range(a + 1, b + 1)) for n, length in enumerate(lengths) for a, b in fd.chunks(int(length), 4, (rank + n) % 4))
            for rank in range(4)]
    assert max(work) / np.mean(work) < 1.07


def test_errors() -> None:
    x = np.ones((32, 4, 8))

    def work(group: Any) -> list[str]:
        found = []
        for cu, keywords in (([0, 100], {}), ([0, 64], {"method": (2, 1)}), ([0, 64], {"cu_seqlens_k": [0, 32, 64]}), ([3, 64], {})):
            with pytest.raises(ValueError) as caught:
                fd.attention_varlen(x, x, x, cu, group=group, **keywords)
            found.append(str(caught.value))
        return found
    first = fd.threads(2, work, timeout=20)[0]
    assert first[0] == ("distributed.attention_varlen(): q has 32 rows; expected 52, which rank 0 owns of 100 rows in 1 sequences; "
                        "shard(x, group, 0, cu_seqlens=...) cuts them.")
    assert "method is (2, 1); expected 'auto', 'gather', 'ring' or 'ulysses', because sequences are packed" in first[1]
    assert "cu_seqlens_k describes 2 sequences; expected as many as cu_seqlens, 1" in first[2]
    assert "cu_seqlens is [3, 64]; expected cumulative lengths: 0 first, never decreasing" in first[3]
