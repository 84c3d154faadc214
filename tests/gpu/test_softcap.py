"""softcap of any size on the GPU: capped scores are right to a few units in the last place of themselves, or of a cap of 64."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.tools.devices import device_count, requires_gpu
from tests.tools.problems import NUMPY

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import gpu
from fastattn.gpu.spec import WIDE_CAP, Spec
from fastattn.gpu.tile import scores
from tests.tools.gpu.cases import on_device, to_host
from tests.tools.gpu.emulator import replaced

Array = np.ndarray[Any, Any]
F = np.float32
EPS = 2.0**-24
CAPS = (1e-3, 1.0, 50.0, 64.0, 65.0, 128.0, 1e3, 1e5, 1e9, 1e30, 1.5e38)


def _each(f: Any) -> Any:
    """elementwise, on an ndarray."""
    return lambda acc, row, col, extra: np.array([f(x, row, col, *extra) for x in acc.ravel()], F).reshape(acc.shape)


LINES = {"float32": F, "int32": int, "inline": lambda f: f, "elementwise": _each, "exp2": lambda x: np.exp2(x),
         "reciprocal": lambda x: F(1) / x, "make_pack": lambda dtype: lambda acc: acc.astype(dtype)}


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("scale", [1.0, 0.125, -1.0, 1e-20])
def test_capped_scores(cap: float, scale: float) -> None:
    """The forward's lines and the backward's, on float32 of numpy: of products from next to nothing to far beyond the cap."""
    draw = np.random.default_rng(0)
    size = 10.0 ** draw.uniform(-12, min(np.log10(cap / abs(scale)) + 4, 37), 3000)
    most = np.inf if F(scale) / F(cap) != 0 else 1.0
    products = np.concatenate([draw.choice([-1, 1], size.size) * size, [0.0, most, -most]]).astype(F)
    x = products.astype(np.float64) * np.float64(F(scale)) / np.float64(F(cap))
    exact, slope = np.float64(F(cap)) * np.tanh(x), 1 / np.cosh(np.minimum(abs(x), 300)) ** 2
    a = SimpleNamespace(softcap=F(cap), softmax_scale=F(scale))
    with replaced(("tile.scores",), LINES), np.errstate(all="ignore"):
        forward, alone = (scores.make_cap(Spec("bfloat16", 64, 64, softcap=True, cap=form))(a, products)
                          for form in (None, "wide" if cap > WIDE_CAP else "narrow"))
        backward, got_slope = scores.make_cap_of(Spec("float16", 64, 64, softcap=True, scaled=True))(a, products)
    np.testing.assert_array_equal(alone, forward)
    np.testing.assert_array_less(abs(forward - exact), 12 * EPS * abs(exact) + 4 * EPS * min(cap, 64) + 1e-37)
    np.testing.assert_array_less(abs(backward - forward), 2 * EPS * abs(exact) + EPS * min(cap, 64) + 1e-37)
    np.testing.assert_allclose(got_slope, slope, rtol=2.0**-10, atol=6e-7)
    assert (got_slope[abs(x) > 20] == 0).all()


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("cap", CAPS[1:])
@pytest.mark.parametrize("family", ["sm90", "sm80", "simt", "decode"])
def test_on_a_gpu(family: str, cap: float) -> None:
    """Against float64: lse and out, then dq, of scores of a tenth of the cap at most."""
    from fastattn.gpu.runtime.device import device
    if family == "sm90" and device_count() and device(0).arch != "sm_90a":
        pytest.skip("no sm90 here")
    draw = np.random.default_rng(1)
    dtype, rows = "float32" if family == "simt" else "bfloat16", 2 if family == "decode" else 70
    for dim, scale in ((64, 0.125), (128, -0.3)):
        q, k, v, dout = (draw.standard_normal((1, n, 2, dim), dtype=F).astype(NUMPY[dtype]) for n in (rows, 700, 700, rows))
        wide_q, wide_k, wide_v, wide_dout = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, dout))
        tanh = np.tanh(wide_q @ wide_k.swapaxes(-1, -2) * np.float64(F(scale)) / cap)
        s = cap * tanh
        lse = np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1)) + s.max(-1)
        p = np.exp(s - lse[..., None])
        out = p @ wide_v
        ds = p * (wide_dout @ wide_v.swapaxes(-1, -2) - (wide_dout * out).sum(-1, keepdims=True)) * (1 - tanh**2)
        args = [on_device(x) for x in (q, k, v)]
        with gpu.use("sm80" if family == "decode" else family):
            got, got_lse = fastattn.attention(*args, softmax_scale=scale, softcap=cap, return_lse=True)
            np.testing.assert_allclose(to_host(got_lse), lse, rtol=2e-6, atol=2e-5)
            np.testing.assert_allclose(to_host(got).astype(np.float64).swapaxes(1, 2), out, atol=1e-3 if dtype == "float32" else 2e-2)
            if family != "decode":
                grads = fastattn.attention_backward(on_device(dout), *args, got, got_lse, softmax_scale=scale, softcap=cap)
                dq = scale * ds @ wide_k
                limit = (1e-4 if dtype == "float32" else 2e-2) * abs(dq).max()
                np.testing.assert_allclose(to_host(grads.dq).astype(np.float64).swapaxes(1, 2), dq, atol=limit, rtol=0)
