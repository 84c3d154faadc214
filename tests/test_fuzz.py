"""A seeded fuzzer: random Problems on the CPU engine against the reference; the same every run. FASTATTN_FUZZ=10: ten times as many."""
from __future__ import annotations

import os
from typing import Any

from compare import Judge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import NUMPY, Case

_ALL = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
TIMES = float(os.environ.get("FASTATTN_FUZZ", "1"))
MAYBE = st.booleans()
SHORT = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 130]))
LONG = st.one_of(SHORT, st.integers(131, 700), st.sampled_from([191, 192, 193, 255, 256, 257, 383, 385, 511, 513, 577]))  # around the tiles
SMALL_DIMS = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 65, 80, 96, 128]))
LARGE_DIMS = st.one_of(SMALL_DIMS, st.integers(129, 512), st.sampled_from([256, 512]))
CAUSAL: list[bool | str] = [False, True, "top_left"]


def _or_none(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Absent three times in four, so that features meet without all being there always."""
    return st.integers(0, 3).flatmap(lambda n: strategy if n == 3 else st.none())


@st.composite
def _broadcast(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to `shape`."""
    axes = draw(st.integers(2, 4))
    return tuple(n if draw(MAYBE) else 1 for n in shape[4 - axes:])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any Problem of small sizes; one in eight has few heads and longer sequences, several tiles of an engine."""
    long, packed = draw(st.integers(0, 7)) == 0, draw(st.integers(0, 3)) == 0
    heads_k, group = draw(st.integers(1, 1 if long else 3)), draw(st.integers(1, 3 if long else 4))
    lengths_of, dims = (LONG, LARGE_DIMS) if long else (SHORT, SMALL_DIMS)
    counts = st.one_of(st.none(), st.integers(0, 600 if long else 40))
    shape: dict[str, Any]
    if packed:
        lengths = draw(st.lists(st.tuples(lengths_of, lengths_of), min_size=0, max_size=2 if long else 4))
        lengths_q, lengths_k = tuple(n for n, _ in lengths), tuple(n for _, n in lengths)
        used = tuple(draw(st.integers(0, n)) for n in lengths_k) if draw(MAYBE) else None
        shape = {"lengths_q": lengths_q, "lengths_k": lengths_k, "used_k": used, "spare": draw(st.sampled_from([0, 0, 3]))}
        full = (len(lengths), heads_k * group, max(lengths_q, default=0), max(lengths_k, default=0))
    else:
        shape = {"batch": draw(st.integers(0, 2)), "seqlen_q": draw(lengths_of), "seqlen_k": draw(lengths_of),
                 "layout": draw(st.sampled_from(["bshd", "bhsd"]))}
        full = (shape["batch"], heads_k * group, shape["seqlen_q"], shape["seqlen_k"])
    dtype = draw(st.sampled_from(list(NUMPY)))
    bias = draw(_or_none(_broadcast(full)))
    return Case(f"fuzz_{draw(st.integers(0, 2**32))}", dtype, num_heads=heads_k * group, num_heads_k=heads_k, head_dim=draw(dims),
                head_dim_v=draw(_or_none(dims)), causal=draw(st.sampled_from(CAUSAL)),
                window=draw(_or_none(st.tuples(counts, counts))), softcap=draw(_or_none(st.floats(0.5, 30))),
                softmax_scale=draw(_or_none(st.floats(0.01, 0.5))), alibi=draw(_or_none(st.sampled_from(["heads", "batch"]))), bias=bias,
                bias_dtype=draw(st.sampled_from([None, "float32"])), bias_inf=bias is not None and draw(MAYBE),
                mask=draw(_or_none(_broadcast(full))), sinks=draw(_or_none(st.just(True))) is True,
                dropout_p=draw(_or_none(st.sampled_from([0.05, 0.3, 0.9, 1.0]))) or 0.0, dlse=draw(MAYBE),
                memory=draw(st.sampled_from(["contiguous", "contiguous", "sliced", "transposed", "dim_first", "reversed"])), **shape)


def _run(case: Case, backward: bool, engine: str = "cpu") -> None:
    inputs = case.make()
    judge = Judge(inputs)
    out, lse = inputs.forward(engine)
    judge.forward(out, lse)
    if backward:
        judge.backward(inputs.backward(out, lse, engine))


@settings(_ALL, max_examples=int(1200 * TIMES))
@given(cases())
def test_forward_and_backward(case: Case) -> None:
    _run(case, backward=True)


@settings(_ALL, max_examples=int(1000 * TIMES))
@given(cases())
def test_forward(case: Case) -> None:
    _run(case, backward=False)


@settings(_ALL, max_examples=int(200 * TIMES))
@given(cases())
def test_reference(case: Case) -> None:
    """The fuzzer's problems are valid ones, and the tolerance is one that rounding alone passes."""
    _run(case, backward=True, engine="reference")
