"""Every bad input raises its error, which names the call, the argument, what
it has and what was expected. Nothing is written."""
from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastattn
from fastattn import registry
from fastattn.arrays import streams

Q, K = (2, 6, 4, 8), (2, 9, 2, 8)


def _array(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def _dense() -> dict[str, Any]:
    return {"q": _array(Q), "k": _array(K), "v": _array(K)}


def _packed() -> dict[str, Any]:
    return {"q": _array((10, 4, 8)), "k": _array((12, 2, 8)), "v": _array((12, 2, 8)), "cu_seqlens_q": np.array([0, 4, 10]),
            "cu_seqlens_k": np.array([0, 7, 12])}


def _misaligned(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytearray(4 * int(np.prod(shape)) + 1), np.float32, offset=1).reshape(shape)


def _object() -> np.ndarray[Any, Any]:
    return np.ones(K).astype(object)


def _readonly() -> np.ndarray[Any, Any]:
    out = _array(Q)
    out.flags.writeable = False
    return out


Bad = tuple[dict[str, Any], type[Exception], str]
DENSE: dict[str, Bad] = {
    # ranks, shapes and heads
    "q_rank": ({"q": _array((6, 4, 8))}, ValueError,
      ("attention(): q has 3 axes, shape (6, 4, 8); expected 4 axes (batch, seqlen, num_heads, "
               "head_dim); use attention_varlen for packed (total, num_heads, head_dim) arrays.")),
    "v_rank": ({"v": _array((2, 9, 2, 8, 1))}, ValueError, "v has 5 axes"),
    "q_scalar": ({"q": np.float32(1)}, TypeError, "q is a float32; expected a NumPy array"),
    "batch": ({"k": _array((3, 9, 2, 8)), "v": _array((3, 9, 2, 8))}, ValueError, "k has batch 3; expected q's batch, 2."),
    "head_dim": ({"k": _array((2, 9, 2, 7))}, ValueError, "k has head_dim 7; expected q's head_dim, 8."),
    "head_dim_0": ({"q": _array((2, 6, 4, 0)), "k": _array((2, 9, 2, 0))}, ValueError, "head_dim is 0; expected an integer in [1, "),
    "head_dim_huge": ({"q": _array((1, 1, 1, 9999)), "k": _array((1, 1, 1, 9999)), "v": _array((1, 1, 1, 8))}, ValueError,
      "head_dim is 9999"),
    "heads": ({"k": _array((2, 9, 3, 8)), "v": _array((2, 9, 3, 8))}, ValueError,
              "k has 3 heads; expected a divisor of q's num_heads = 4; num_heads_k = 2 works."),
    "heads_0": ({"k": _array((2, 9, 0, 8)), "v": _array((2, 9, 0, 8))}, ValueError, "k has 0 heads"),
    "v_shape": ({"v": _array((2, 8, 2, 8))}, ValueError, "v has shape (2, 8, 2, 8); expected k's shape but for the last axis, (2, 9, 2)"),
    # dtypes and kinds
    "dtype_mix": ({"v": _array(K, np.float16)}, TypeError,
      "v has dtype float16; expected q's dtype, float32; v.astype(q.dtype) works."),
    "dtype_int": ({"q": _array(Q, np.int32)}, TypeError,
      "q has dtype int32; expected float32 or float64 or float16 or bfloat16; q.astype(np.float32) works."),
    "dtype_int8": ({"q": _array(Q, np.int8)}, TypeError,
      "q has dtype int8; expected float32 or float64 or float16 or bfloat16; q.astype(np.float32) works."),
    "dtype_complex": ({"q": _array(Q, complex)}, TypeError, "q has dtype complex128; expected float32 or float64"),
    "dtype_float8": ({"q": _array(Q, ml_dtypes.float8_e3m4)}, TypeError, "q has dtype float8_e3m4; expected float32"),
    "object": ({"k": _object()}, TypeError,
      "k has dtype object; expected q's dtype; k.astype(q.dtype) works if it holds real numbers."),
    "big_endian": ({"v": _array(K, ">f4")}, TypeError, "v has dtype float32 in the other byte order (>f4); expected q's dtype in this"),
    "big_endian_hint": ({"v": _array(K, ">f4")}, TypeError, "v.astype(v.dtype.newbyteorder('=')) works."),
    "list": ({"q": [[[[1.0]]]]}, TypeError, "q is a list; expected a NumPy array or an array that speaks DLPack; np.asarray(q) makes one"),
    "none": ({"k": None}, TypeError, "k is a NoneType; expected a NumPy array"),
    "masked_array": ({"k": np.ma.masked_equal(_array(K), 2)}, TypeError, "k is a masked array; expected a plain array"),
    "misaligned_input": ({"q": _misaligned(Q)}, ValueError, "q is misaligned"),
    # options
    "causal": ({"causal": "left"}, ValueError, "causal is 'left'; expected False, True, 'bottom_right' or 'top_left'."),
    "window_int": ({"window": 5}, ValueError,
      "window is 5; expected a pair (left, right) of counts, None for no limit; window=(5, 0) looks back"),
    "window_negative": ({"window": (-1, 0)}, ValueError, "window is -1; expected an integer in [0, 2147483647]; None means no limit."),
    "window_float": ({"window": (1.5, 0)}, TypeError, "window is 1.5; expected an integer"),
    "scale_nan": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale is nan; expected a finite number."),
    "scale_inf": ({"softmax_scale": np.inf}, ValueError, "softmax_scale is inf; expected a finite number."),
    "scale_text": ({"softmax_scale": "0.5"}, TypeError, "softmax_scale is '0.5'; expected a finite number."),
    "scale_array": ({"softmax_scale": np.ones(2)}, TypeError, "softmax_scale is array"),
    "softcap_0": ({"softcap": 0.0}, ValueError, "softcap is 0.0; expected a positive number, or None for no cap."),
    "softcap_negative": ({"softcap": -3}, ValueError, "softcap is -3.0; expected a positive number"),
    "softcap_nan": ({"softcap": float("nan")}, ValueError, "softcap is nan; expected a positive number"),
    "seed_missing": ({"dropout_p": 0.1}, ValueError,
      ("seed is None; expected a 64-bit integer, because dropout_p = 0.1; pass seed=..., a fresh "
                     "one each step; backward takes the same one.")),
    "dropout_above_1": ({"dropout_p": 1.5, "seed": 1}, ValueError, "dropout_p is 1.5; expected a probability in [0, 1]."),
    "dropout_nan": ({"dropout_p": float("nan"), "seed": 1}, ValueError, "dropout_p is nan; expected a probability in [0, 1]."),
    "seed_float": ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed is 1.5; expected an integer"),
    "seed_big": ({"dropout_p": 0.1, "seed": 2**64}, ValueError, "seed is 18446744073709551616; expected an integer"),
    "offset": ({"dropout_p": 0.1, "seed": 1, "offset": -1}, ValueError, "offset is -1; expected an integer in [0, 4294967295]."),
    # score operands
    "alibi_shape": ({"alibi_slopes": np.ones(3)}, ValueError, "alibi_slopes has shape (3,); expected (4,) or (2, 4)."),
    "alibi_dtype": ({"alibi_slopes": np.ones(4, bool)}, TypeError, "alibi_slopes has dtype bool; expected float32 or float64"),
    "sinks_shape": ({"sinks": [1.0, 2.0]}, ValueError, "sinks has shape (2,); expected (num_heads,) = (4,)."),
    "bias_shape": ({"bias": _array((4, 6, 8))}, ValueError,
      ("bias has shape (4, 6, 8); expected a shape that broadcasts to (batch, num_heads, "
                   "seqlen_q, seqlen_k) = (2, 4, 6, 9).")),
    "bias_rank": ({"bias": _array((1, 2, 4, 6, 9))}, ValueError, "bias has shape (1, 2, 4, 6, 9)"),
    "bias_dtype": ({"bias": _array((6, 9), np.float64)}, TypeError,
      "bias has dtype float64; expected float32; bias.astype(np.float32) works."),
    "bias_list": ({"bias": [0.0]}, TypeError, "bias is a list; expected a NumPy array"),
    "mask_dtype": ({"mask": _array((6, 9))}, TypeError,
      ("mask has dtype float32; expected bool, True where a query may attend; an additive "
                   "float mask goes in bias=.")),
    "mask_shape": ({"mask": _array((9, 6), bool)}, ValueError, "mask has shape (9, 6); expected a shape that broadcasts to"),
    # out
    "out_shape": ({"out": _array((2, 6, 4, 9))}, ValueError, "out has shape (2, 6, 4, 9); expected the shape = (2, 6, 4, 8)."),
    "out_dtype": ({"out": _array(Q, np.float64)}, TypeError, "out has dtype float64; expected float32."),
    "out_readonly": ({"out": _readonly()}, ValueError, "out is read-only; expected a writable array."),
    "out_misaligned": ({"out": _misaligned(Q)}, ValueError, "out is misaligned"),
    "out_broadcast": ({"out": np.lib.stride_tricks.as_strided(_array((8,)), Q, (0, 0, 0, 4))}, ValueError, ("out has strides (0, 0, 0, 4); "
                      "expected no two elements at one address.")),
    "out_folded": ({"out": np.lib.stride_tricks.as_strided(_array(Q), Q, (768, 128, 16, 4))}, ValueError,
      "expected no two elements at one"),
    "out_list": ({"out": [1.0]}, TypeError, "out is a list"),
    # layout, stream, engine
    "layout": ({"layout": "sbhd"}, ValueError, "layout is 'sbhd'; expected 'bshd' or 'bhsd'"),
    "layout_thd": ({"layout": "thd"}, ValueError, "layout is 'thd'; expected 'bshd' or 'bhsd'; attention_varlen takes packed arrays"),
    "stream": ({"stream": 7}, ValueError, "stream is 7; expected None, because q is in host memory."),
    "engine": ({"engine": "tpu"}, ValueError, "engine is 'tpu'; expected None or one of "),
    "engine_gpu": ({"engine": "gpu"}, ValueError,
      "engine is 'gpu' but q is on device ('cpu', 0); expected an engine that reads that memory"),
}
PACKED: dict[str, Bad] = {
    "rank": ({"q": _array(Q)}, ValueError,
      "attention_varlen(): q has 4 axes, shape (2, 6, 4, 8); expected 3 axes (total, num_heads, head_dim)"),
    "layout": ({"layout": "bshd"}, ValueError, "layout is 'bshd'; expected 'thd'; attention takes 'bshd' and 'bhsd'."),
    "cu_dtype": ({"cu_seqlens_q": np.array([0.0, 4, 10])}, TypeError,
      "cu_seqlens_q has dtype float64; expected int32 or int64; cu_seqlens_q.astype(np.int32) works."),
    "cu_rank": ({"cu_seqlens_q": np.array([[0, 4, 10]])}, ValueError, "cu_seqlens_q has shape (1, 3); expected one axis"),
    "cu_empty": ({"cu_seqlens_q": np.array([], np.int32)}, ValueError, "cu_seqlens_q has shape (0,)"),
    "cu_none": ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k is a NoneType"),
    "cu_start": ({"cu_seqlens_q": [1, 4, 10]}, ValueError,
      "cu_seqlens_q starts [1, 4, 10], entry 0 is 1; expected cumulative lengths: 0 first"),
    "cu_decreasing": ({"cu_seqlens_k": [0, 7, 5]}, ValueError, "cu_seqlens_k starts [0, 7, 5], entry 2 is 5; expected cumulative lengths"),
    "cu_negative": ({"cu_seqlens_k": [0, -3, 12]}, ValueError, "entry 1 is -3; expected cumulative lengths: 0 first, never decreasing."),
    "cu_beyond": ({"cu_seqlens_q": [0, 4, 11]}, ValueError, "cu_seqlens_q ends at 11; expected at most the 10 rows of the packed array."),
    "cu_count": ({"cu_seqlens_k": [0, 12]}, ValueError, "cu_seqlens_k describes 1 sequences; expected as many as cu_seqlens_q, 2."),
    "max_small": ({"max_seqlen_q": 5}, ValueError, "max_seqlen_q is 5; expected at least the longest sequence of cu_seqlens_q, 6."),
    "max_negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k is -1; expected an integer"),
    "used_shape": ({"seqused_k": [1, 2, 3]}, ValueError, "seqused_k has shape (3,); expected (number of sequences,) = (2,)."),
    "used_dtype": ({"seqused_k": np.ones(2)}, TypeError,
      "seqused_k has dtype float64; expected int32 or int64; seqused_k.astype(np.int32) works."),
    "used_beyond": ({"seqused_k": [8, 1]}, ValueError, "seqused_k has 8 for sequence 0; expected a count from 0 to its length, 7."),
    "used_negative": ({"seqused_k": [1, -1]}, ValueError, "seqused_k has -1 for sequence 1; expected a count from 0 to its length, 5."),
    "bias": ({"bias": _array((2, 4, 6, 12))}, ValueError, "broadcasts to (batch, num_heads, max_seqlen_q, max_seqlen_k) = (2, 4, 6, 7)"),
}
BACKWARD: dict[str, Bad] = {
    "dout_shape": ({"dout": _array((2, 6, 4, 7))}, ValueError,
      "attention_backward(): dout has shape (2, 6, 4, 7); expected the shape = (2, 6, 4, 8)."),
    "dout_dtype": ({"dout": _array(Q, np.float64)}, TypeError, "dout has dtype float64; expected float32; dout.astype(np.float32) works."),
    "out_shape": ({"out": _array((2, 6, 8))}, ValueError, "out has shape (2, 6, 8)"),
    "lse_dtype": ({"lse": _array((2, 4, 6), np.float64)}, TypeError,
      "lse has dtype float64; expected float32; lse.astype(np.float32) works."),
    "lse_shape": ({"lse": _array((2, 6, 4))}, ValueError, "lse has shape (2, 6, 4); expected the shape = (2, 4, 6)."),
    "lse_none": ({"lse": None}, TypeError, "lse is a NoneType"),
    "dlse_shape": ({"dlse": _array((2, 4, 7))}, ValueError, "dlse has shape (2, 4, 7)"),
    "dbias": ({"need_dbias": True}, ValueError, "need_dbias is True; expected a bias to differentiate"),
    "seed": ({"dropout_p": 0.5}, ValueError, "seed is None"),
}


def _raises(function: Callable[..., Any], arguments: dict[str, Any], bad: Bad) -> None:
    """The error has the message, and no argument changed."""
    changes, error, text = bad
    arguments = arguments | changes
    before = {name: x.copy() for name, x in arguments.items() if isinstance(x, np.ndarray)}
    with pytest.raises(error, match=re.escape(text)) as caught:
        function(**arguments)
    assert str(caught.value).startswith(f"{function.__name__}(): ") and str(caught.value).endswith(".")
    for name, x in before.items():
        np.testing.assert_array_equal(arguments[name], x)


@pytest.mark.parametrize("name", DENSE)
def test_attention(name: str) -> None:
    arguments = _dense()
    if "out" not in DENSE[name][0]:
        arguments["out"] = np.full(Q, 7, np.float32)            # would be written if the error came late
    _raises(fastattn.attention, arguments, DENSE[name])


@pytest.mark.parametrize("name", PACKED)
def test_attention_varlen(name: str) -> None:
    _raises(fastattn.attention_varlen, _packed() | {"out": np.full((10, 4, 8), 7, np.float32)}, PACKED[name])


@pytest.mark.parametrize("name", BACKWARD)
def test_attention_backward(name: str) -> None:
    arguments = _dense() | {"dout": _array(Q), "out": _array(Q), "lse": _array((2, 4, 6))}
    _raises(fastattn.attention_backward, arguments, BACKWARD[name])


@pytest.mark.parametrize("name", [n for n in DENSE if not n.startswith(("out", "layout_"))])
def test_the_backward_checks_the_same(name: str) -> None:
    changes, error, text = DENSE[name]
    arguments = _dense() | {"dout": _array(Q), "out": _array(Q), "lse": _array((2, 4, 6))} | changes
    with pytest.raises(error, match=re.escape(text.removeprefix("attention(): "))):
        fastattn.attention_backward(**arguments)


@pytest.mark.parametrize("name", [n for n in PACKED if n != "layout"])
def test_the_packed_backward_checks_the_same(name: str) -> None:
    changes, error, text = PACKED[name]
    arguments = _packed() | {"dout": _array((10, 4, 8)), "out": _array((10, 4, 8)), "lse": _array((4, 10))} | changes
    with pytest.raises(error, match=re.escape(text.removeprefix("attention_varlen(): "))):
        fastattn.attention_varlen_backward(**arguments)


def _of_torch() -> Any:
    return pytest.importorskip("torch")


MESSAGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "mask_uint8": (lambda: {"mask": _array((6, 9), np.uint8)}, "mask has dtype uint8; expected bool; mask.astype(bool) works."),
    "mask_int32": (lambda: {"mask": _array((6, 9), np.int32)}, "expected bool, True where a query may attend; mask.astype(bool) works."),
    "mask_padding": (lambda: {"mask": _array((2, 9), bool)},
                     "= (2, 4, 6, 9); mask[:, None, None, :] gives one of (batch, keys) these axes."),
    "bias_bool": (lambda: {"bias": _array((6, 9), bool)}, "expected float32; a boolean mask goes in mask=, True where a query may attend."),
    "bias_uint8": (lambda: {"bias": _array((6, 9), np.uint8)},
                   "bias.astype(np.float32) works, and a mask of what may be attended goes in mask=, as bias.astype(bool)."),
    "bias_float64": (lambda: {"bias": _array((6, 9), np.float64)}, "expected float32; bias.astype(np.float32) works."),
    "bfloat16": (lambda: {"q": _array(Q, ml_dtypes.bfloat16)},
                 "k has dtype float32; expected q's dtype, bfloat16; k.astype(q.dtype) works."),
    "uint8": (lambda: {"q": _array(Q, np.uint8)}, "expected float32 or float64 or float16 or bfloat16; q.astype(np.float32) works."),
    "float8": (lambda: {"k": _array(K, ml_dtypes.float8_e5m2)}, "k has dtype float8_e5m2"),
    "window_array": (lambda: {"window": np.array([3, 0, 1])}, "window is array([3, 0, 1]); expected a pair (left, right) of counts"),
    "window_floats": (lambda: {"window": np.array([3.0, 0.0])}, "window is 3.0; expected an integer in"),
    "causal_array": (lambda: {"causal": np.tril(_array((6, 9), bool))}, "or 'top_left'; an array of what may be attended goes in mask=."),
    "huge": (lambda: {"softmax_scale": 10**400}, "softmax_scale is an integer of 1329 bits, beyond float64; expected a finite number."),
    "huge_window": (lambda: {"window": (10**5000, 0)}, "window is an integer of 16610 bits; expected an integer in [0, 2147483647]"),
    "dask": (lambda: {"q": type("Array", (), {"__module__": "dask.array.core"})()},
             "q is a dask array; expected a NumPy array or an array that speaks DLPack; q.compute() gives one."),
    "torch_dtype": (lambda: {"q": _of_torch().ones(Q), "k": _of_torch().ones(K).half()},
                    "k has dtype float16; expected q's dtype, float32; k.to(q.dtype) works."),
    "torch_uint8": (lambda: {"q": _of_torch().ones(Q, dtype=_of_torch().uint8)}, "q.to(torch.float32) works."),
    "torch_mask": (lambda: {"mask": _of_torch().ones(6, 9, dtype=_of_torch().uint8)}, "mask.bool() works."),
    "torch_bias": (lambda: {"bias": _of_torch().ones(6, 9, dtype=_of_torch().float64)}, "bias.to(torch.float32) works."),
    "is_causal": (lambda: {"is_causal": True}, "is_causal is no keyword of it; here it is causal=; fastattn.compat.sdpa and"),
    "attn_mask": (lambda: {"attn_mask": None}, "here it is mask= (boolean) or bias= (additive);"),
    "scale": (lambda: {"scale": 1.0}, "here it is softmax_scale=;"),
    "casual": (lambda: {"casual": True}, "casual is no keyword of it; here it is causal=;"),
    "wombat": (lambda: {"wombat": 1}, "wombat is no keyword of it; it has causal, window, softmax_scale,"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_name_what_would_work(name: str) -> None:
    make, text = MESSAGES[name]
    backward = {"dout": _array(Q), "out": _array(Q), "lse": _array((2, 4, 6))}
    for function, arguments in ((fastattn.attention, _dense()), (fastattn.attention_backward, _dense() | backward)):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**(arguments | make()))
        assert text in str(caught.value) and str(caught.value).startswith(f"{function.__name__}(): "), str(caught.value)


def test_messages_about_lengths() -> None:
    torch = _of_torch()
    for cu, text in ((np.array([0, 4, 10], np.int16), "cu_seqlens_q.astype(np.int32) works."),
                     (np.array([0, 4, 10], np.uint32), "cu_seqlens_q.astype(np.int32) works."),
                     (torch.tensor([0, 4, 10], dtype=torch.int16), "cu_seqlens_q.to(torch.int32) works.")):
        with pytest.raises(TypeError, match=rf"cu_seqlens_q has dtype u?int\d\d; expected int32 or int64; .*{re.escape(text)}"):
            fastattn.attention_varlen(**(_packed() | {"cu_seqlens_q": cu}))


def test_positional_arguments_that_are_too_many() -> None:
    q, k = _array(Q), _array(K)
    dense: Any = fastattn.attention
    packed: Any = fastattn.attention_varlen
    for call, text in ((lambda: dense(q, k, k, None), "attention(): 4 positional arguments are given; expected 3, q, k, v; all others go"),
                       (lambda: packed(*_packed().values(), 6, 7), "attention_varlen(): 7 positional arguments are given; expected 5")):
        with pytest.raises(TypeError, match=re.escape(text)):
            call()


def test_signatures_are_clean() -> None:
    for function in (fastattn.attention, fastattn.attention_backward, fastattn.attention_varlen, fastattn.attention_varlen_backward):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def test_help_shows_one_readable_signature() -> None:
    """The overloads for type checkers and the collectors of wrong arguments are not in it, and types have no quotes."""
    text = pydoc.plain(pydoc.render_doc(fastattn.attention))
    assert text.count("attention(q: Array, k: Array, v: Array, *, causal: Causal = False, window: Window | None = None,") == 1
    assert "dropout_p : float, default 0.0\n" in text and "unknown" not in text and "more: " not in text
    assert "lse: Array, *, causal: Causal = False," in pydoc.plain(pydoc.render_doc(fastattn.attention_backward))
    assert pydoc.plain(pydoc.render_doc(fastattn.attention_backward)).splitlines()[2].endswith(") -> Grads[A]")


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask"])
def test_out_shares_memory(name: str) -> None:
    x = np.ones((2, 6, 4, 8), np.float32)
    arguments: dict[str, Any] = {"q": x.copy(), "k": x.copy(), "v": x.copy(), "out": x}
    arguments[name] = {"bias": x.reshape(-1)[:36].reshape(6, 6), "mask": x.view(bool).reshape(-1)[:36].reshape(6, 6)}.get(name, x)
    before = x.copy()
    with pytest.raises(ValueError, match=rf"attention\(\): out shares memory with {name}; expected memory of its own"):
        fastattn.attention(**arguments)
    np.testing.assert_array_equal(x, before)


def test_interleaved_out_does_not_overlap() -> None:
    """Slices of one buffer that share no element are fine."""
    x = np.ones((2, 6, 8, 8), np.float32)
    out = x[:, :, 4:]
    assert fastattn.attention(x[:, :, :4], x[:, :, :4], x[:, :, :4], out=out, engine="reference") is out


def test_bhsd_errors_name_their_axis_order() -> None:
    arguments = {name: x.swapaxes(1, 2) for name, x in _dense().items()} | {"v": _array((2, 2, 8, 8))}
    with pytest.raises(ValueError, match="v has shape") as caught:
        fastattn.attention(**arguments, layout="bhsd")
    assert "(batch, seqlen, num_heads, head_dim)" in caught.value.__notes__[0]


class _Cuda:
    """Claims to be on a GPU."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": (4096, False), "version": 3, "strides": None}


def _missing(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(registry, "_runs", {})
    monkeypatch.setattr("fastattn.engine._loaded", {})
    monkeypatch.setattr("fastattn.engine._MODULES", {module: ".no_such_module", "reference": ".reference"})


def test_cuda_arrays_never_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "device_of", lambda pointer: 0)
    _missing(monkeypatch, "gpu")
    q, k = _Cuda(Q), _Cuda(K)
    for engine in (None, "gpu", "sm80"):
        text = r"attention\(\): CUDA arrays need the GPU engine, which cannot be loaded .* pip install 'fastattn\[gpu\]'"
        with pytest.raises(ImportError, match=text):
            fastattn.attention(q, k, k, engine=engine)
    for name in ("cpu", "reference"):
        with pytest.raises(ValueError, match=f"engine is '{name}' but q is on device"):
            fastattn.attention(q, k, k, engine=name)
    with pytest.raises(ValueError, match=r"k is on device \('cpu', 0\); expected q's device, \('cuda', 0\)"):
        fastattn.attention(q, _array(K), k)
    with pytest.raises(ValueError, match=r"bias is on device \('cuda', 0\); expected q's device, \('cpu', 0\)"):
        fastattn.attention(_array(Q), _array(K), _array(K), bias=_Cuda((6, 9)))
    assert issubclass(fastattn.UnsupportedError, NotImplementedError)


def test_missing_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    _missing(monkeypatch, "cpu")
    with pytest.raises(ImportError, match=r"attention\(\): the compiled cpu engine cannot be loaded .* `pip install \.` .* builds it"):
        fastattn.attention(**_dense())


def test_dropout_mask_and_merge_states() -> None:
    with pytest.raises(ValueError, match=r"dropout_mask\(\): seqlen_q is -1; expected an integer"):
        fastattn.dropout_mask(1, 1, -1, 4, dropout_p=0.5, seed=0)
    with pytest.raises(ValueError, match=r"dropout_mask\(\): seed is None"):
        fastattn.dropout_mask(1, 1, 1, 4, dropout_p=0.5, seed=None)
    out, lse = _array(Q), _array((2, 4, 6))
    for arguments, text in ((([out], []), "lses has 0 parts; expected one for each of at least one out, 1"), (([], []), "lses has 0 parts"),
                            (([out, out[:, :5]], [lse, lse]), "outs[1] has shape (2, 5, 4, 8)"),
                            (([out], [lse[..., :5]]), "lses[0] has shape (2, 4, 5)"), (([out[0]], [lse]), "outs[0] has shape (6, 4, 8)")):
        with pytest.raises(ValueError, match=re.escape(text)):
            fastattn.merge_states(*arguments)
    with pytest.raises(ValueError, match="layout is 'x'"):
        fastattn.merge_states([out], [lse], layout="x")  # type: ignore[arg-type]
