"""What a forward keeps for its backward: nothing of it is sent again, and it fits its own call only."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
import fastattn.distributed as fd

Q, K, V, DOUT = np.random.default_rng(0).standard_normal((4, 1, 256, 4, 8))
KEYWORDS: dict[str, Any] = {"causal": True, "return_lse": True, "return_saved": True}


class Counting:
    """A group that counts the messages that it takes."""

    def __init__(self, group: Any) -> None:
        self.group, self.taken = group, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def exchange(self, give: Any, take: Any, stream: Any) -> Any:
        self.taken += len(take)
        return self.group.exchange(give, take, stream)


@pytest.mark.parametrize(("method", "pieces"), [("gather", 1), ("gather", 2), ("ulysses", 1), ("ulysses", 2)])
def test_only_gradients_are_sent(method: str, pieces: int) -> None:
    def work(group: Any) -> tuple[int, int]:
        mine = [fd.shard(x, group) for x in (Q, K, V)]
        out, lse, saved = fd.attention(*mine, group=group, method=method, pieces=pieces, **KEYWORDS)
        assert saved.nbytes >= 2 * mine[1].nbytes and repr(saved) == f"Saved({method}, {saved.nbytes} bytes)"
        found, counts = [], []
        for more in ({"saved": saved}, {"method": method, "pieces": pieces}):
            counted = Counting(group)
            found.append(fd.attention_backward(fd.shard(DOUT, group), *mine, out, lse, group=counted, causal=True, **more))
            counts.append(counted.taken)
        for a, b in zip(*found, strict=True):
            assert a is b is None or np.array_equal(a, b), "the same bits"
        return counts[0], counts[1]
    for with_saved, without in fd.threads(2, work, timeout=20):
        assert with_saved < without


def test_it_fits_its_own_call_only() -> None:
    def work(group: Any) -> list[str]:
        mine = [fd.shard(x, group) for x in (Q, K, V)]
        out, lse, saved = fd.attention(*mine, group=group, pieces=2, **KEYWORDS)
        found = []
        for kind, more in ((TypeError, {"saved": 3}), (ValueError, {"saved": saved, "causal": True, "method": "ring"}),
                           (ValueError, {"saved": saved, "causal": True, "pieces": 1}), (ValueError, {"saved": saved})):
            with pytest.raises(kind) as caught:
                fd.attention_backward(fd.shard(DOUT, group), *mine, out, lse, group=group, **more)
            found.append(str(caught.value).removeprefix("distributed.attention_backward(): "))
        with pytest.raises(ValueError) as caught:
            fd.attention(*mine, group=group, method="ring", **KEYWORDS)
        return [*found, str(caught.value).removeprefix("distributed.attention(): ")]
    again = "; saved=None sends keys and values again."
    for texts in fd.threads(2, work, timeout=20):
        assert texts == [
            "saved is int; expected what attention(..., return_saved=True) returned last.",
            "saved is of method gather in 2 pieces; expected what a forward with method ring returned" + again,
            "saved is of method gather in 2 pieces; expected what a forward with pieces=1 returned" + again,
            "saved is of another problem or rank; expected what this call's forward returned: the same shapes, options and ranks" + again,
            "return_saved is True; expected a method that holds all keys of its rows at once, 'gather' or 'ulysses'; "
            "this call runs ring (method='ring')."]


def test_explain_keeps_nothing() -> None:
    def work(group: Any) -> str:
        mine = [fd.shard(x, group) for x in (Q, K, V)]
        return fastattn.explain(fd.attention, *mine, group=group, **KEYWORDS).engine
    assert fd.threads(2, work, timeout=20) == ["cpu", "cpu"]
