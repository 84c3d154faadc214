"""Options are values: whatever object holds a number, a call reads it once and keeps no reference to the object.

Each option of each public function, and of compat, comes in an object that is changed in place between two calls. The results are those of
plain numbers.
"""
from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat import aten, flash_attn, multi_head, probabilities, sdpa, transform, varlen, vllm
from fastattn.options import Options, read_options

torch = pytest.importorskip("torch")
draw = np.random.default_rng(0)
Q, K, V, DOUT = (draw.standard_normal(shape, np.float32) for shape in ((2, 6, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), (2, 6, 4, 8)))
PACKED = tuple(x.reshape(-1, *x.shape[2:]) for x in (Q, K, V))
QH, KH, VH, DOUTH = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (Q, K, V, DOUT))
CU_Q, CU_K = np.array([0, 4, 12], np.int32), np.array([0, 7, 18], np.int32)
OUT, LSE = fastattn.attention(Q, K, V, return_lse=True)
OUT_PACKED, LSE_PACKED = fastattn.attention_varlen(*PACKED, CU_Q, CU_K, return_lse=True)
DROPPED = {"dropout_p": 0.5, "seed": 1}
Pair = tuple[Any, Any]
SCORES: dict[str, Pair] = {"softmax_scale": (0.25, 2.0), "softcap": (0.5, 5.0), "causal": (False, True), "window": ([2, 0], [0, 3])}
DROPOUT: dict[str, Pair] = {"dropout_p": (0.3, 0.8), "seed": (1, 2), "offset": (0, 7)}
SDPA: dict[str, Pair] = {"scale": (0.25, 2.0), "is_causal": (False, True)}
FLASH: dict[str, Pair] = {"softmax_scale": (0.25, 2.0), "softcap": (0.5, 5.0), "causal": (False, True), "window_size": ([2, 0], [0, 3])}
BACK = (DOUT.reshape(PACKED[0].shape), *PACKED, OUT_PACKED, LSE_PACKED, CU_Q, CU_K)
X, WEIGHT, BIAS, SQUARE = (draw.standard_normal(shape, np.float32) for shape in ((2, 5, 8), (24, 8), (24,), (8, 8)))


def _metadata(**options: Any) -> Any:
    return vllm.triton_attention_rocm(Q, K, V, None, vllm.MetaData(layout="bshd", **options))[0]


def _flash_forward(**options: Any) -> Any:
    first = [options.pop(name, default) for name, default in (("max_q", 6), ("max_k", 9), ("dropout_p", 0.0), ("is_causal", False))]
    return aten.flash_attention_forward(Q, K, V, None, None, *first, False, **options)


def _flash_backward(**options: Any) -> Any:
    first = [options.pop(name, default) for name, default in (("dropout_p", 0.0), ("is_causal", False), ("philox_seed", 1),
                                                              ("philox_offset", 0))]
    return aten.flash_attention_backward(DOUT, Q, K, V, OUT, LSE, None, None, 6, 9, *first, **options)


def _efficient_forward(**options: Any) -> Any:
    first = [options.pop(name, default) for name, default in (("dropout_p", 0.0), ("custom_mask_type", 1))]
    return aten.efficient_attention_forward(Q, K, V, None, None, None, 6, 9, *first, **options)


def _efficient_backward(**options: Any) -> Any:
    first = [options.pop(name, default) for name, default in (("dropout_p", 0.0), ("philox_seed", 1), ("philox_offset", 0),
                                                              ("custom_mask_type", 1))]
    return aten.efficient_attention_backward(DOUT, Q, K, V, None, OUT, None, None, 6, 9, LSE, *first, False, **options)


def _cudnn_forward(**options: Any) -> Any:
    return aten.cudnn_attention_forward(QH, KH, VH, None, None, None, 6, 9, True, **options)


def _cudnn_backward(**options: Any) -> Any:
    first = [options.pop(name, default) for name, default in (("philox_seed", 1), ("philox_offset", 0))]
    rest = [options.pop(name, default) for name, default in (("dropout_p", 0.0), ("is_causal", False))]
    out = np.ascontiguousarray(OUT.swapaxes(1, 2))
    return aten.cudnn_attention_backward(DOUTH, QH, KH, VH, out, LSE, *first, None, None, None, 6, 9, *rest, **options)


Function = Callable[..., Any]
PHILOX = {"dropout_p": (0.3, 0.8), "philox_seed": (1, 2), "philox_offset": (0, 7)}
CALLS: dict[str, tuple[Function, dict[str, Pair]]] = {
    "attention": (lambda **o: fastattn.attention(Q, K, V, **o), SCORES | DROPOUT | {"return_lse": (False, True)}),
    "attention_backward": (lambda **o: fastattn.attention_backward(DOUT, Q, K, V, OUT, LSE, **o), SCORES | DROPOUT),
    "attention_varlen": (lambda **o: fastattn.attention_varlen(*PACKED, o.pop("cu_seqlens_q", CU_Q), CU_K, **o),
                         SCORES | DROPOUT | {"max_seqlen_q": (8, 5), "max_seqlen_k": (11, 10), "cu_seqlens_q": ([0, 4, 12], [0, 6, 11]),
                                             "seqused_k": ([7, 11], [2, 5])}),
    "attention_varlen_backward": (lambda **o: fastattn.attention_varlen_backward(*BACK, **o),
                                  SCORES | DROPOUT | {"max_seqlen_q": (8, 5), "seqused_k": ([7, 11], [2, 5])}),
    "dropout_mask": (lambda **o: fastattn.dropout_mask(*[o.pop(name, 9) for name in ("batch", "seqlen_q")], 8, 9, **(DROPPED | o)),
                     DROPOUT | {"batch": (2, 3), "seqlen_q": (4, 5)}),
    "sdpa": (lambda **o: sdpa.scaled_dot_product_attention(QH, KH, VH, enable_gqa=True, **o), SDPA | DROPOUT),
    "sdpa_gqa": (lambda **o: sdpa.scaled_dot_product_attention(QH, KH, VH, **o), {"enable_gqa": (True, False)}),
    "sdpa_backward": (lambda **o: sdpa.scaled_dot_product_attention_backward(DOUTH, QH, KH, VH, OUT.swapaxes(1, 2), LSE, enable_gqa=True,
                                                                             **o), SDPA | DROPOUT),
    "varlen_attn": (lambda **o: varlen.varlen_attn(*PACKED, CU_Q, CU_K, o.pop("max_q", 8), o.pop("max_k", 11), enable_gqa=True, **o),
                    SDPA | {"window_size": ([2, 0], [0, 3]), "max_q": (8, 5), "max_k": (11, 10)}),
    "varlen_attn_backward": (lambda **o: varlen.varlen_attn_backward(*BACK, o.pop("max_q", 8), 11, enable_gqa=True, **o),
                             SDPA | {"window_size": ([2, 0], [0, 3]), "max_q": (8, 5)}),
    "flash_attn_func": (lambda **o: flash_attn.flash_attn_func(Q, K, V, **o), FLASH | DROPOUT),
    "flash_attn_backward": (lambda **o: flash_attn.flash_attn_backward(DOUT, Q, K, V, OUT, LSE, **o), FLASH | DROPOUT),
    "flash_attn_varlen_func": (lambda **o: flash_attn.flash_attn_varlen_func(*PACKED, CU_Q, CU_K, o.pop("max_seqlen_q", 8), 11, **o),
                               FLASH | DROPOUT | {"max_seqlen_q": (8, 5)}),
    "flash_attn_varlen_backward": (lambda **o: flash_attn.flash_attn_varlen_backward(*BACK, o.pop("max_seqlen_q", 8), 11, **o),
                                   FLASH | DROPOUT | {"max_seqlen_q": (8, 5)}),
    "flash_forward": (_flash_forward, SDPA | DROPOUT | {"max_q": (6, 5), "window_size_left": (2, 0), "window_size_right": (0, 3)}),
    "flash_backward": (_flash_backward, SDPA | PHILOX | {"window_size_left": (2, 0)}),
    "efficient_forward": (_efficient_forward, {"scale": (0.25, 2.0), "custom_mask_type": (1, 2), "window_size": (2, 4)} | DROPOUT),
    "efficient_backward": (_efficient_backward, {"scale": (0.25, 2.0), "custom_mask_type": (1, 2), "window_size": (2, 4)} | PHILOX),
    "cudnn_forward": (_cudnn_forward, SDPA | DROPOUT),
    "cudnn_backward": (_cudnn_backward, SDPA | PHILOX),
    "encoded_softmax": (lambda **o: probabilities.encoded_softmax(Q, K, **o), SCORES | DROPOUT),
    "multi_head_attention": (lambda **o: multi_head.multi_head_attention(X, X, X, 8, o.pop("num_head", 2), WEIGHT, BIAS, SQUARE, BIAS[:8],
                                                                         **o), {"num_head": (2, 4)}),
    "transform": (lambda **o: transform.transform_bias_rescale_qkv(np.ascontiguousarray(np.tile(X, 3)), BIAS, **o), {"num_heads": (2, 4)}),
    "triton_attention": (lambda **o: vllm.triton_attention(*PACKED, None, CU_Q, CU_K, o.pop("max_seqlens_q", 8), 11, **o),
                         {"sm_scale": (0.25, 2.0), "causal": (False, True), "max_seqlens_q": (8, 5)}),
    "triton_attention_rocm": (_metadata, {"sm_scale": (0.25, 2.0), "causal": (False, True), "seqlen_q": (6, 5)}),
}
HOLDERS: dict[str, Function] = {"numpy": np.array, "torch": torch.tensor}


def _plain(x: Any) -> Any:
    return tuple(x) if isinstance(x, list) else x


def _result(function: Function, **options: Any) -> Any:
    """The results as a flat list, or the text of the error."""
    try:
        result = function(**options)
    except (TypeError, ValueError) as error:
        return str(error)
    return [x if np.ndim(x) == 0 else np.asarray(x) for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, str) or isinstance(b, str) or len(a) != len(b):
        return a is b or (isinstance(a, str) and a == b)
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [*HOLDERS, "list"])
def test_options_changed_in_place(call: str, kind: str) -> None:
    function, options = CALLS[call]
    for name, (before, after) in options.items():
        if kind == "list" and not isinstance(before, list):
            continue
        with_it: dict[str, Any] = {}
        if name in DROPOUT or name in PHILOX:
            with_it = DROPPED if "seed" in options else {"dropout_p": 0.5}
        holder = list(before) if kind == "list" else HOLDERS[kind](before)
        for _ in range(3):
            first = _result(function, **(with_it | {name: holder}))
        assert _same(first, _result(function, **(with_it | {name: _plain(before)}))), name
        holder[... if kind != "list" else slice(None)] = after if kind != "torch" else torch.tensor(after)
        second = _result(function, **(with_it | {name: holder}))
        assert _same(second, _result(function, **(with_it | {name: _plain(after)}))), name
        assert not _same(first, second), name
        if not isinstance(first, str):                      # nothing of the caller's is given back, either: a seed is its number
            assert all(x is not holder for x in first)


def test_a_drawn_seed_is_a_number() -> None:
    seed = np.array(5)
    result = aten.flash_attention_forward(Q, K, V, None, None, 6, 9, 0.5, False, False, seed=seed, offset=np.array(3))
    seed += 1
    assert (type(result.philox_seed), result.philox_seed, type(result.philox_offset), result.philox_offset) == (int, 5, int, 3)


def test_read_options() -> None:
    plain = Options(True, (3, None), 0.5, 2.0, 0.25, 7, 1, 6, 9)
    given = [np.bool_(True), [np.int64(3), None], fractions.Fraction(1, 2), np.float32(2), torch.tensor(0.25), torch.tensor(7), np.array(1),
             np.uint8(6), torch.tensor(9)]
    for kinds in (given, ["bottom_right", np.array([3, 0]), np.array(0.5), 2, np.float64(0.25), 7, True, 6, np.array(9)], list(plain)[:9]):
        found = read_options("f", *kinds)
        assert [type(x) for x in found] == [type(x) for x in plain] and found._replace(window=None) == plain._replace(window=None)
    assert read_options("f", np.str_("top_left"), None, 1, None, 0, None, 0) == Options("top_left", None, 1.0)
    assert [type(x) for x in read_options("f", False, (True, np.int8(2)), None, None, 0.0, None, 0).window or ()] == [int, int]


class _OnDevice:
    """A number in CUDA memory: reading it fails the test."""

    shape = ()
    requires_grad = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def item(self) -> float:
        raise AssertionError("the host would wait")

    __float__ = __index__ = __bool__ = __repr__ = item  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "dropout_p", "seed", "offset", "causal"])
def test_numbers_on_a_device_are_refused(name: str) -> None:
    text = rf"attention\(\): {name} is in device memory; expected .*, because the host never waits for a device; pass {name}\.item\(\)"
    with pytest.raises(TypeError, match=text):
        fastattn.attention(Q, K, V, **({"seed": 1} | {name: _OnDevice()}))
    with pytest.raises(TypeError, match="window is in device memory"):
        fastattn.attention(Q, K, V, window=(_OnDevice(), 0))
    with pytest.raises(TypeError, match="is_causal is in device memory"):
        sdpa.scaled_dot_product_attention(Q, Q, Q, is_causal=_OnDevice())
    with pytest.raises(TypeError, match="dropout_p is in device memory"):
        flash_attn.flash_attn_func(Q, K, V, dropout_p=_OnDevice())
    with pytest.raises(TypeError, match="max_seqlen_q is in device memory"):
        flash_attn.flash_attn_varlen_func(*PACKED, CU_Q, CU_K, _OnDevice(), 11)


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_numbers_that_require_grad_are_refused(name: str) -> None:
    number = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=rf"{name} requires grad, which fastattn would drop from the graph; .* pass {name}\.item\(\)"):
        fastattn.attention(Q, K, V, **{name: number})
    with torch.no_grad():
        np.testing.assert_array_equal(fastattn.attention(Q, K, V, **{name: number}), fastattn.attention(Q, K, V, **{name: 0.5}))


# ---------------------------------------------------------------- in the type they are computed in
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_scales_that_round_to_0(engine: str) -> None:
    for scale in (1e-46, -1e-60):
        for x, y in zip(fastattn.attention(Q, K, V, softmax_scale=scale, return_lse=True, engine=engine),
                        fastattn.attention(Q, K, V, softmax_scale=0.0, return_lse=True, engine=engine), strict=True):
            np.testing.assert_array_equal(x, y)
    wide = [x.astype(np.float64) for x in (Q, K, V)]
    tiny = fastattn.attention(wide[0] * 1e23, wide[1] * 1e23, wide[2], softmax_scale=1e-46, engine=engine)
    np.testing.assert_allclose(tiny, fastattn.attention(*wide, softmax_scale=1.0, engine="reference"), rtol=1e-12)


@pytest.mark.parametrize("options, text", [
    ({"softmax_scale": 1e39}, "softmax_scale is 1e+39; expected a finite number of at most 1.7e+38, because scores are float32."),
    ({"softmax_scale": -3e38}, "softmax_scale is -3e+38; expected a finite number of at most 1.7e+38"),
    ({"softcap": 1e39}, "softcap is 1e+39; expected a positive number, or None for no cap of at most 1.7e+38"),
    ({"softcap": 1e-46}, "softcap is 1e-46, which float32 rounds to 0; expected a positive number"),
    ({"softcap": 1e-44}, "softcap is 1e-44 with softmax_scale = 0.35"),
    ({"softmax_scale": 10**400}, "softmax_scale is an integer of 1329 bits, beyond float64; expected a finite number."),
    ({"seed": 10**5000, "dropout_p": 0.5}, "seed is an integer of 16610 bits; expected an integer in ["),
])
def test_numbers_out_of_range(options: dict[str, Any], text: str) -> None:
    for call in (lambda: fastattn.attention(Q, K, V, **options), lambda: fastattn.attention_backward(DOUT, Q, K, V, OUT, LSE, **options)):
        with pytest.raises(ValueError) as caught:
            call()
        assert text in str(caught.value)


def test_large_scales_and_caps_that_fit() -> None:
    for options in ({"softcap": 1.6e38}, {"softmax_scale": 1.6e38, "softcap": 1.0}, {"softcap": 1e-36}):
        for engine in ("cpu", "reference"):
            out, lse = fastattn.attention(Q, K, V, **options, return_lse=True, engine=engine)
            assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_dropout_below_half_a_step_drops_nothing() -> None:
    assert fastattn.dropout_mask(4, 8, 128, 128, dropout_p=7.6e-6, seed=0).all()
    assert not fastattn.dropout_mask(4, 8, 128, 128, dropout_p=7.7e-6, seed=0).all()


# ---------------------------------------------------------------- merge_states
def _merged(outs: list[float], lses: list[float]) -> tuple[float, float]:
    parts = [np.full((1, 1, 1, 1), x, np.float32) for x in outs]
    out, lse = fastattn.merge_states(parts, [np.full((1, 1, 1), x, np.float32) for x in lses])
    return out.item(), lse.item()


def test_merge_states_of_empty_and_extreme_parts() -> None:
    inf, nan = float("inf"), float("nan")
    assert _merged([3.0, nan], [1.0, inf]) == (3.0, 1.0)        # FlashAttention's mark of an empty part
    assert _merged([3.0, inf], [1.0, -inf]) == (3.0, 1.0)
    assert _merged([nan, nan], [inf, -inf]) == (0.0, -inf)
    assert _merged([nan], [inf]) == (0.0, -inf)
    assert _merged([3.0, nan], [3e38, -3e38]) == (3.0, float(np.float32(3e38)))
    assert _merged([3.0, nan], [0.0, -200.0]) == (3.0, 0.0)     # a weight of 0
    assert _merged([3e38, 3e38], [0.0, 0.0])[0] == np.float32(3e38)
    assert np.isnan(_merged([3.0, 3.0], [1.0, nan])).all()
    assert np.isnan(_merged([3.0, nan], [1.0, 1.0])[0])
