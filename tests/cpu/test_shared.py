"""Requests that share pages, on the CPU: which are computed together, and that the results stay right."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.cpu import shared
from tests.tools.caches import Case, Eight

CASES = [
    *[Case(f"decode {dtype}", dtype=dtype, shared=3, keys=(50, 60, 48, 90)) for dtype in ("float32", "float64", "float16", "bfloat16")],
    Case("several rows", shared=2, keys=(40, 60), rows=5),
    Case("packed", shared=2, keys=(40, 60, 33), rows=(5, 1, 30), spare=3),
    Case("packed, one without rows", shared=2, keys=(40, 60, 33), rows=(2, 0, 3)),
    Case("nothing new", shared=2, keys=(40, 33, 32), append=False),
    Case("nothing new, some see less", shared=2, keys=(40, 33, 35), append=False, rows=5),
    Case("not causal", shared=2, keys=(40, 33), options={"causal": False}, rows=3),
    Case("limit to the right", shared=2, keys=(40, 33), options={"causal": False, "window": (None, 3)}, rows=3),
    Case("sinks", shared=2, keys=(40, 33), sinks=True, rows=2),
    Case("softcap, scale", shared=2, keys=(40, 33), options={"softcap": 2.0, "softmax_scale": 0.4}),
    Case("rotary", shared=2, keys=(40, 33), rotary=(16, True)),
    Case("bhsd", shared=2, keys=(40, 33), layout="bhsd", rows=3),
    Case("strided", shared=2, keys=(40, 33), strided=True, rows=3, dtype="bfloat16"),
    Case("values of another size", shared=2, keys=(40, 33), head_dim=24, head_dim_v=40),
    Case("pages of 100", shared=2, keys=(240, 233, 600), page_size=100, num_heads=2, num_heads_k=1),
    Case("8-bit caches", shared=2, keys=(40, 33), dtype="bfloat16", eight=Eight("float8_e4m3fn", ("none", "head", "number"))),
    Case("8-bit q", shared=2, keys=(40, 33), dtype="bfloat16", eight=Eight("float8_e5m2", ("head", "one", "head"), q=True, new=True)),
]
ALONE = [
    Case("window", shared=2, keys=(40, 33), options={"window": (20, 0)}),
    Case("alibi", shared=2, keys=(40, 33), alibi="heads"),
    Case("scales by request", shared=2, keys=(40, 33), dtype="bfloat16", eight=Eight("float8_e4m3fn", ("none", "batch", "none"))),
    Case("many rows", shared=2, keys=(40, 33), rows=200),
    Case("no page is shared", keys=(40, 33)),
    Case("contiguous", keys=(40, 33), page_size=None),
    Case("no row sees a page", shared=1, keys=(16, 16), rows=16, append=False),
]


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Any group is computed together. The list gets the groups."""
    found: list[Any] = []
    attend = shared.attend

    def noted(p: Any, o: Any, lengths: Any, out: Any, lse: Any, groups: Any, run: Any) -> None:
        found.extend(groups)
        attend(p, o, lengths, out, lse, groups, run)
    monkeypatch.setattr(shared, "LEAST_SAVED", 0)
    monkeypatch.setattr(shared, "attend", noted)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shared_keys_are_computed_once(case: Case, attended: list[Any]) -> None:
    case.make().check("cpu")
    (group,) = attended
    assert group.keys == (case.shared - (case.name == "nothing new, some see less")) * (case.page_size or 0)
    assert group.requests.tolist() == [b for b, n in enumerate(case.lengths) if n]


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_other_calls_are_computed_request_by_request(case: Case, attended: list[Any]) -> None:
    case.make().check("cpu")
    assert attended == []


@pytest.mark.parametrize(("given", "keys"), [(None, 48), (48, 48), (47, 32), (1000, 48), (15, None), (0, None)])
def test_argument_limits_what_is_shared(given: int | None, keys: int | None, attended: list[Any]) -> None:
    call = Case("decode", shared=3, keys=(50, 60, 48)).make()
    if given == 1000:
        call = Case("decode", shared=3, keys=(48, 47, 40)).make()
        keys = 32                           # of request 2, the third page has 41 keys
    call.check("cpu", shared_prefix=given)
    assert [x.keys for x in attended] == ([] if keys is None else [keys])


def test_one_split_keeps_requests_apart(attended: list[Any]) -> None:
    """A request has the same bits whatever it is batched with."""
    Case("decode", shared=3, keys=(50, 60, 48)).make().check("cpu", num_splits=1)
    assert attended == []


def test_groups_of_several_prompts(attended: list[Any]) -> None:
    """Two prompts, requests of both in any order, and one of its own."""
    random = np.random.default_rng(0)
    k, v = random.standard_normal((2, 40, 8, 2, 16), np.float32)
    table = np.array([[1, 2, 3, 10], [5, 6, 7, 11], [1, 2, 4, 12], [20, 21, 22, 23], [5, 6, 7, 13]], np.int32)
    q = random.standard_normal((5, 1, 4, 16), np.float32)
    out, lse = fastattn.attention_with_kvcache(q, k, v, cache_seqlens=[30, 29, 28, 27, 26], block_table=table, return_lse=True)
    assert [(x.requests.tolist(), x.keys) for x in attended] == [([0, 2], 16), ([1, 4], 24)]
    for b, n in enumerate((30, 29, 28, 27, 26)):
        keys, values = (x[table[b]].reshape(1, 32, 2, 16)[:, :n].astype(np.float64) for x in (k, v))
        exact, exact_lse = fastattn.attention(q[b:b + 1].astype(np.float64), keys, values, return_lse=True)
        np.testing.assert_allclose(out[b:b + 1], exact, atol=2e-6)
        np.testing.assert_allclose(lse[b:b + 1], exact_lse, atol=2e-6)


def test_huge_scores_keep_their_weights(attended: list[Any]) -> None:
    """All scores are 2**30, so each key has the same weight, of the prefix and of the others: the log of a sum is lost beside that."""
    k, v = np.full((6, 16, 1, 16), 2.0**13, np.float32), np.zeros((6, 16, 1, 16), np.float32)
    v[:3] = 1
    q = np.full((2, 1, 2, 16), 2.0**13, np.float32)
    out = fastattn.attention_with_kvcache(q, k, v, cache_seqlens=[64, 50], block_table=np.array([[0, 1, 2, 3], [0, 1, 2, 4]], np.int32),
                                          softmax_scale=1.0)
    assert len(attended) == 1
    np.testing.assert_allclose(out[0], 48 / 64, rtol=1e-6)
    np.testing.assert_allclose(out[1], 48 / 50, rtol=1e-6)


def test_threads_give_the_same_bits(attended: list[Any]) -> None:
    call = Case("decode bfloat16", dtype="bfloat16", shared=3, keys=(50, 60, 48, 90)).make()
    results = []
    for threads in (1, 3):
        fastattn.set_num_threads(threads)
        results.append(call.expected_later().run("cpu"))
    assert len(attended) == 2
    assert results[0].tobytes() == results[1].tobytes()
