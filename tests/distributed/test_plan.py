"""Who owns and who needs which rows, and the calls that compute it, against masks drawn element by element."""
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import fastattn
import fastattn.distributed as fd
from fastattn.distributed import plan, reach, spans, steps
from fastattn.options import Check
from fastattn.problem import Mask, Problem, Score

MASKS = [Mask(), Mask(None, 0), Mask(30, 0), Mask(100, 57), Mask(3, None), Mask(None, 0, True), Mask(0, 40, True)]
LENGTHS = [(0, 0), (5, 5), (64, 64), (301, 301), (1003, 1003), (100, 300), (300, 100)]


def problem(seqlen_q: int, seqlen_k: int, mask: Mask, **more: Any) -> Problem:
    return Problem("test", "bfloat16", 1, 8, 2, seqlen_q, seqlen_k, 128, 128, Score(0.1), mask, **more)


def attended(mask: Mask, seqlen_q: int, seqlen_k: int) -> Any:
    """(seqlen_q, seqlen_k) bool."""
    found = np.zeros((seqlen_q, seqlen_k), bool)
    for row in range(seqlen_q):
        found[row, slice(*mask.bounds(row, seqlen_q, seqlen_k))] = True
    return found


@pytest.mark.parametrize("shard", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_chunks_are_all_rows_once(size: int, shard: str) -> None:
    for seqlen in (0, 1, 15, 16, 17, 100, 1003, 4096, 32768, 100_001):
        of_all = [fd.chunks(seqlen, size, rank, shard) for rank in range(size)]
        edges = sorted(itertools.chain(*of_all))
        assert [a for a, _ in edges] == [0, *[b for _, b in edges[:-1]]] and edges[-1][1] == seqlen
        unit = 128 if seqlen >= 256 * size * (2 if shard == "zigzag" else 1) else 16
        assert all(a % unit == 0 or a == seqlen for a, _ in edges)
        lengths = [sum(b - a for a, b in own) for own in of_all]
        assert max(lengths) - min(lengths) <= 4 * unit


def test_zigzag_gives_all_ranks_the_same_work() -> None:
    for size in (2, 4, 8):
        work = [sum(sum(range(a + 1, b + 1)) for a, b in fd.chunks(32768, size, rank)) for rank in range(size)]
        assert max(work) == min(work)


def calls(pieces: list[reach.Piece], rows: Any, keys: Any, mask: Mask, at: reach.Reach) -> Any:
    """How often each pair of a rank's rows and of the keys in memory is computed."""
    found = np.zeros((len(rows), len(keys)), int)
    for piece in pieces:
        n, m = piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start
        if piece.spans is not None:
            assert (rows[piece.rows] == np.arange(*piece.spans[0])).all() and (keys[piece.keys] == np.arange(*piece.spans[1])).all()
        diagonal = m - n if piece.spans is None else at.diagonal(*piece.spans)
        i, j = np.arange(n)[:, None], np.arange(m)
        seen = np.ones((n, m), bool)
        if piece.masked:
            seen &= (j >= i + diagonal - mask.left) if mask.left is not None else True
            seen &= (j <= i + diagonal + mask.right) if mask.right is not None else True
        found[piece.rows, piece.keys] += seen
    return found


@pytest.mark.parametrize("shard", ["zigzag", "contiguous"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_pair_is_computed_once(mask: Mask, size: int, shard: str) -> None:
    for seqlen_q, seqlen_k in LENGTHS:
        at, whole = reach.Reach.of(mask, seqlen_q, seqlen_k), attended(mask, seqlen_q, seqlen_k)
        q, k = plan.rows_of(seqlen_q, size, shard), plan.rows_of(seqlen_k, size, shard)
        if size == 1:
            q, k = plan.teams(q, 1), plan.teams(k, 1)
        index = [[np.concatenate([np.arange(*span) for span in own] or [np.arange(0)]) for own in side] for side in (q, k)]
        for rank in range(size):
            rows, own = index[0][rank], spans.parts(q[rank])
            held = spans.parts(reach.keys_needed(at, q[rank]))
            keys = np.concatenate([np.arange(*part.span) for part in held] or [np.arange(0)]).astype(int)
            expected = whole[rows][:, keys]
            assert (calls(reach.gathered(at, own, held), rows, keys, mask, at) == expected).all()
            assert expected.sum() == whole[rows].sum(), "a key that is attended is not held"
            for source in range(size):
                for exact in (False, True):
                    pieces = reach.paired(at, own, spans.parts(k[source]), exact)
                    assert (calls(pieces, rows, index[1][source], mask, at) == whole[rows][:, index[1][source]]).all()
                    assert not exact or all(p.spans[0].start % 16 == p.spans[1].start % 16 == 0 for p in pieces if p.spans)


@pytest.mark.parametrize("shard", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_keys_come_before_their_call_and_shares_leave_after_the_last(mask: Mask, shard: str) -> None:
    for (seqlen_q, seqlen_k), size, upwards in itertools.product(LENGTHS, (2, 3), (True, False)):
        at = reach.Reach.of(mask, seqlen_q, seqlen_k)
        q, k = plan.rows_of(seqlen_q, size, shard), plan.rows_of(seqlen_k, size, shard)
        order = tuple(range(len(q[0])))[::1 if upwards else -1]
        of_all = [steps.steps_of(at, q, k, rank, order) for rank in range(size)]
        for me, own in enumerate(of_all):
            rows = spans.total([part.span for part in own.held])
            here, left, mine = np.zeros(rows, int), np.zeros(rows, int), np.zeros(rows, bool)
            for _, held in own.own:
                here[held] += 1
                mine[held] = True
            for step in range(len(order)):
                for take in own.take[step]:
                    here[take.rows] += 1
                for piece in own.pieces[step]:
                    assert (here[piece.keys] == 1).all(), "a key has not come"
                    assert not left[piece.keys].any(), "a share has left"
                for give in own.back[step]:
                    left[give.rows] += 1
                for other in range(size):       # what one gives is what the other takes, in the same order
                    given = [x.rows.stop - x.rows.start for x in own.give[step] if x.to == other]
                    assert given == [x.rows.stop - x.rows.start for x in of_all[other].take[step] if x.source == me]
                    back = [x.rows.stop - x.rows.start for x in own.back[step] if x.to == other]
                    assert back == [x.rows.stop - x.rows.start for x in of_all[other].returned[step] if x.source == me]
            assert (here == 1).all() and (left == ~mine).all()


def test_a_causal_ring_has_one_call_a_step() -> None:
    rows = plan.rows_of(4096, 4, "zigzag")
    at = reach.Reach.of(Mask(None, 0), 4096, 4096)
    for rank, source in itertools.product(range(4), range(4)):
        pieces = reach.paired(at, spans.parts(rows[rank]), spans.parts(rows[source]), False)
        assert len(pieces) == 1 and pieces[0].masked == (rank == source)


def test_a_window_needs_its_halo_only() -> None:
    rows = plan.rows_of(65536, 8, "contiguous")
    at = reach.Reach.of(Mask(1000, 0), 65536, 65536)
    for rank in range(1, 8):
        needed = spans.total(reach.keys_needed(at, rows[rank]))
        assert 8192 + 1000 <= needed <= 8192 + 1000 + 256


def test_auto_says_why() -> None:
    check = Check("test")
    short = plan.choose(check, "auto", 8, problem(32768, 32768, Mask(None, 0)), "zigzag", False)
    assert str(short) == "gather" and short.why == "auto: whole calls, 0.03 GiB of keys and values in a rank, limit 16 GiB"
    long = plan.choose(check, "auto", 8, problem(2**24, 2**24, Mask(None, 0)), "zigzag", True)
    assert str(long) == "ring" and "\"gather\" holds 48.00 GiB" in long.why
    halo = plan.choose(check, "auto", 8, problem(2**24, 2**24, Mask(4096, 0)), "contiguous", True)
    assert str(halo) == "gather"
    assert str(plan.choose(check, (2, 4), 8, problem(64, 64, Mask()), "zigzag", False)) == "ulysses 2 x ring 4"


def test_pieces() -> None:
    """Two on a device that half of the heads keep busy."""
    long = problem(131072, 131072, Mask(None, 0))
    assert plan.pieces_of(None, 2, long, "zigzag", ("cuda", 0)) == 2 and plan.pieces_of(None, 2, long, "zigzag", ("cpu", 0)) == 1
    assert plan.pieces_of(None, 1, long, "zigzag", ("cuda", 0)) == plan.pieces_of(None, 16, long, "zigzag", ("cuda", 0)) == 1
    assert plan.pieces_of(None, 2, problem(131072, 131072, Mask(4096, 0)), "contiguous", ("cuda", 0)) == 1
    assert plan.pieces_of(5, 8, long, "zigzag", ("cpu", 0)) == 2, "no piece without a key head"


@pytest.mark.parametrize("method", ["auto", "ring", "ulysses"])
def test_explain_sends_nothing(method: str) -> None:
    x = np.ones((1, 64, 4, 16), np.float32)

    def work(group: Any) -> Any:
        if group.rank == 0:                                 # alone
            for call in (fd.attention, lambda *a, **k: fd.attention_varlen(*[x[0] for x in a], [0, 128], **k)):
                found = fastattn.explain(call, x, x, x, group=group, causal=True, method=method)
                assert found.engine == "cpu" and found.call.startswith("distributed.attention")
            return found.notes
        return ()
    notes = fd.threads(2, work, timeout=20)[0]
    expected = {"auto": "gather (auto: whole calls, 0.00 GiB of keys and values in a rank, limit 16 GiB)", "ring": "ring (method='ring')",
                "ulysses": "ulysses (method='ulysses')"}
    assert notes == (f"rank 0 of 2 runs method {expected[method]}; this is its first call",)
