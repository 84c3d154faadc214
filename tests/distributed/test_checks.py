"""What a call checks before it sends anything, in words; what ranks tell each other with FASTATTN_CHECK_RANKS; groups."""
from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import fastattn
import fastattn.distributed as fd

X = np.ones((1, 64, 4, 8))


def raised(size: int, call: Any) -> list[str]:
    """The error of each rank."""
    def work(group: Any) -> str:
        try:
            call(group)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""
    return fd.threads(size, work, timeout=20)


@pytest.mark.parametrize(("keywords", "text"), [
    ({"shard": "zig"}, "ValueError: distributed.attention(): shard is 'zig'; expected 'zigzag' or 'contiguous'."),
    ({"method": "rings"}, "ValueError: distributed.attention(): method is 'rings'; expected 'auto', 'gather', 'ring', 'ulysses' or a pair "
                          "(ulysses, ring)."),
    ({"method": (3, 1)}, "ValueError: distributed.attention(): method is (3, 1); expected a pair whose product is the number of ranks, 2."),
    ({"pieces": 0}, "ValueError: distributed.attention(): pieces is 0; expected an integer in [1, 32768]."),
    ({"seqlen": -1}, "ValueError: distributed.attention(): seqlen is -1; expected an integer in [0, 2147483647]."),
    ({"causal": "so"}, "ValueError: distributed.attention(): causal is 'so'; expected False, True, 'bottom_right' or 'top_left'."),
    ({"bias": np.ones((64, 64))}, "ValueError: distributed.attention(): bias has shape (64, 64); expected a shape that broadcasts to "
                                  "(batch, num_heads, seqlen_q, seqlen_k) = (1, 4, 64, 128)."),
    ({"turn": 1}, "TypeError: attention(): turn is no keyword of it"),
])
def test_arguments(keywords: dict[str, Any], text: str) -> None:
    assert all(found.startswith(text[:120]) for found in raised(2, lambda group: fd.attention(X, X, X, group=group, **keywords)))


def test_a_wrong_length_says_what_the_rank_owns() -> None:
    first, second = raised(2, lambda group: fd.attention(X, X, X, group=group, seqlen=100))
    assert first == ("ValueError: distributed.attention(): q has 64 rows; expected 52, which rank 0 owns of seqlen = 100: [0, 32) and "
                     "[80, 100); shard() cuts an array, and seqlen= is needed where ranks own different numbers of rows.")
    assert "expected 48, which rank 1 owns of seqlen = 100: [32, 48) and [48, 80)" in second


def test_too_few_heads_for_ulysses() -> None:
    x = X[:, :, :1]
    assert set(raised(2, lambda group: fd.attention(X, x, x, group=group, method="ulysses"))) == {
        "ValueError: distributed.attention(): method is 'ulysses'; expected at most one rank for each of num_heads_k = 1 to exchange "
        "heads; method='gather' takes any number of heads."}


def test_no_group() -> None:
    with pytest.raises(TypeError, match=r"group is None; expected a group of ranks; group=fastattn.distributed.group\(comm\) makes one"):
        fd.attention(X, X, X)
    with pytest.raises(TypeError, match="comm is int; expected a communicator of mpi4py or nccl4py, or a ProcessGroup of torch"):
        fd.attention(X, X, X, group=3)


def test_nothing_is_sent_before_all_is_checked() -> None:
    """A rank that raises leaves no message behind: the next call of all ranks is right."""
    def work(group: Any) -> bool:
        if group.rank == 1:
            with pytest.raises(ValueError):
                fd.attention(X, X, X, group=group, causal="so")
        return bool(np.isfinite(fd.attention(X, X, X, group=group)).all())
    assert fd.threads(2, work, timeout=20) == [True, True]


@pytest.mark.parametrize("method", ["gather", "ring", "ulysses"])
def test_an_engine_that_refuses_leaves_the_group_as_it_was(method: str) -> None:
    """It does so after the first messages: they have come and gone when all ranks raise."""
    def work(group: Any) -> bool:
        for _ in range(2):
            with pytest.raises(fastattn.UnsupportedError, match="it is tired"):
                fd.attention(X, X, X, group=group, method=method, engine="tired")
            with pytest.raises(fastattn.UnsupportedError, match="it is tired"):
                fd.attention_varlen(X[0], X[0], X[0], [0, 128], group=group, method=method, engine="tired")
        return bool(np.isfinite(fd.attention(X, X, X, group=group, method=method)).all())

    def nothing(*arguments: Any) -> None:
        raise AssertionError("it was asked to run")
    with fastattn.register_engine("tired", nothing, None, lambda problem: "it is tired", "cpu"):
        assert fd.threads(2, work, timeout=20) == [True, True]


@pytest.mark.parametrize(("of_first", "of_second", "text"), [
    ({"causal": True}, {}, "ranks do not agree: causal is True in rank 0, False in rank 1"),
    ({"method": "ring"}, {"method": "gather"}, "ranks do not agree: method is ring in rank 0, gather in rank 1"),
    ({"sinks": np.ones(4)}, {}, "ranks do not agree: sinks is True in rank 0, False in rank 1"),
    ({"causal": "so"}, {}, "rank 0 raises ValueError: distributed.attention(): causal is 'so'; expected False, True"),
    ({"seqlen": 100}, {}, "rank 0 raises ValueError: distributed.attention(): q has 64 rows"),
])
def test_ranks_that_disagree(of_first: dict[str, Any], of_second: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CHECK_RANKS", "1")

    def work(group: Any) -> str:
        with pytest.raises(fd.RankError) as found:
            fd.attention(X, X, X, group=group, **(of_second if group.rank else of_first))
        fd.attention(X, X, X, group=group)              # the group can go on
        return str(found.value)
    for found in fd.threads(2, work, timeout=20):
        assert found.startswith(f"distributed.attention(): {text}")


def test_ranks_that_fail_in_the_same_way_raise_their_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CHECK_RANKS", "1")
    for text in raised(2, lambda group: fd.attention(X, X, X, group=group, causal="so")):
        assert text.startswith("ValueError: distributed.attention(): causal is 'so'")


def test_different_lengths_of_messages_are_found() -> None:
    def work(group: Any) -> None:
        fd.attention(X[..., :4 * (1 + group.rank)], X[..., :4 * (1 + group.rank)], X, group=group)
    start = time.monotonic()
    with pytest.raises(fd.RankError, match=r"gives float64 .* where rank . expects float64 .*; FASTATTN_CHECK_RANKS=1 says which argument"):
        fd.threads(2, work, timeout=20)
    assert time.monotonic() - start < 10


def test_a_thread_that_fails_ends_the_others() -> None:
    def work(group: Any) -> None:
        if group.rank == 1:
            raise RuntimeError("ill")
        fd.attention(X, X, X, group=group)
    with pytest.raises(RuntimeError, match="ill"):
        fd.threads(3, work, timeout=20)


def test_a_message_that_does_not_come() -> None:
    def work(group: Any) -> None:
        if group.rank == 0:
            fd.attention(X, X, X, group=group)
    with pytest.raises(fd.RankError, match=r"rank 0: a message of rank 1 did not come in 0\.2 seconds"):
        fd.threads(2, work, timeout=0.2)
