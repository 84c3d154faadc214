"""What a call with functions refuses, and that no engine computes without them."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import attention, attention_backward, block_mask

X = np.ones((2, 4, 2, 8), np.float32)
TABLE = np.ones((2, 3), np.float32)


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"captured": (TABLE,)}, ValueError, "captured has 1 arrays without score_mod; .* mask_mod closes over its arrays"),
    ({"captured": TABLE, "score_mod": lambda s, b, h, q, k, t: s}, TypeError, "captured is an ndarray; expected a tuple of arrays"),
    ({"block_mask": causal}, TypeError, "block_mask is a function; expected what fastattn.block_mask returns"),
    ({"mask_mod": True}, TypeError, "mask_mod is True; expected a function"),
    ({"score_mod": lambda s, b, h, q, k, t: s + t[h], "captured": (np.ones(0),)}, ValueError,
     r"captured\[0\] has shape \(0,\); .* at least one element"),
    ({"score_mod": lambda s, b, h, q, k, t: s + t[h], "captured": (np.ones(2, np.complex64),)}, TypeError,
     r"captured\[0\] has dtype complex64"),
    ({"block_mask": block_mask(causal, 3, None, 4, 4)}, ValueError, "block_mask has batch = 3; expected the call's, 2"),
    ({"block_mask": block_mask(causal, None, 5, 4, 4)}, ValueError, "block_mask has num_heads = 5; expected the call's, 2"),
    ({"block_mask": block_mask(None, None, None, 8, 8, blocks=np.ones((2, 2), bool), block=4)}, ValueError,
     r"block_mask has blocks of shape \(2, 2\); .* = \(2, 2, 1, 1\); for seqlen_q = 4 and seqlen_k = 4 in blocks of 4 x 4"),
    ({"block_mask": block_mask(causal, None, None, 4, 4, device="cuda")}, ValueError,
     r"block_mask is for device \('cuda', 0\); expected q's device"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_arguments(number: int) -> None:
    given, error, text = WRONG[number]
    with pytest.raises(error, match=rf"^attention\(\): {text}"):
        attention(X, X, X, engine="reference", **given)


def test_an_array_of_a_closure_is_named() -> None:
    table = np.ones(2, np.complex64)
    with pytest.raises(TypeError, match="table in score_mod has dtype complex64") as caught:
        attention(X, X, X, score_mod=lambda s, b, h, q, k: s + table[h], engine="reference")
    assert "score_mod= holds it" in caught.value.__notes__[0]


def test_gradients_need_arrays() -> None:
    out, lse = attention(X, X, X, return_lse=True)
    for flex in ({}, {"score_mod": lambda s, b, h, q, k: s}):
        with pytest.raises(ValueError, match="need_dcaptured is True; expected a score_mod with arrays to differentiate"):
            attention_backward(X, X, X, X, out, lse, need_dcaptured=True, engine="reference", **flex)  # type: ignore[arg-type]


def test_out_shares_no_memory_with_captured() -> None:
    out = np.empty_like(X)
    with pytest.raises(ValueError, match=r"out shares memory with captured\[0\]"):
        attention(X, X, X, score_mod=lambda s, b, h, q, k, t: s + t[h], captured=(out[0, 0, 0],), out=out, engine="reference")


def test_engines_of_others_refuse_and_explain_says_so() -> None:
    def never(*_: Any) -> None:
        raise AssertionError
    with fastattn.register_engine("mine", never, never, lambda problem: None, "cpu"):
        with pytest.raises(fastattn.UnsupportedError, match="mine: score_mod, mask_mod and block_mask are for the built-in engines"):
            attention(X, X, X, mask_mod=causal, engine="mine")
        found = fastattn.explain(attention, X, X, X, mask_mod=causal)
    assert found.reasons["mine"]
    assert found.engine == "cpu"
    assert fastattn.explain(attention, X, X, X, mask_mod=causal, engine="reference").engine == "reference"


def test_explain_takes_backwards_and_problems() -> None:
    flex: dict[str, Any] = {"score_mod": lambda s, b, h, q, k, t: s + t[h, 0], "captured": (TABLE,), "engine": "reference",
                            "block_mask": block_mask(causal, None, None, 4, 4, blocks=np.ones((2, 2), bool), block=2)}
    found = fastattn.explain(attention_backward, X, X, X, need_dcaptured=True, **flex)
    assert found.engine == "reference" and found.call == "attention_backward"
    from fastattn.explanation import _catch

    caught = _catch(attention, (X, X, X), flex)
    assert fastattn.explain(caught.problem, device="cpu", engine="reference").engine == "reference"
    assert fastattn.explain(caught.problem, device="cpu").engine in (None, "cpu")


def test_no_engine_computes_without_the_function() -> None:
    v = X * np.arange(4, dtype=np.float32)[:, None, None]
    got = attention(X, X, v, mask_mod=lambda b, h, q, k: k < 1)
    assert not got.any()
