"""scaled_dot_product_attention and its backward: 500 random calls against torch's
own on the CPU, and a float64 formula without torch."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn.compat import translate
from fastattn.compat.sdpa import scaled_dot_product_attention, scaled_dot_product_attention_backward
from tests.tools.formulas import Array, check_gradients, formula, normal

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


# ---------------------------------------------------------------- a random call
class Drawn:
    """Arguments of one call as NumPy float64 arrays, shapes and flags drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        r = self.random = np.random.default_rng(seed)
        self.dtype = str(r.choice(["float64", "float64", "float32", "bfloat16", "float16"]))
        self.gqa = bool(r.random() < 0.25)
        rank = int(r.choice([3, 3, 4, 4, 4, 5, 6] if self.gqa else [2, 3, 3, 4, 4, 4, 5, 6]))
        L, S = (int(x) for x in r.choice([0, 1, 2, 3, 5, 8, 17, 33, 64], 2, p=[0.03, 0.1, 0.1, 0.12, 0.15, 0.15, 0.15, 0.15, 0.05]))
        E, E_v = (int(x) for x in r.choice([1, 2, 3, 7, 8, 16, 33, 64, 96, 129, 255, 256], 2))
        E_v = E if r.random() < 0.6 else E_v
        batch = tuple(int(x) for x in r.choice([1, 2, 3], max(rank - 3, 0)))
        heads = () if rank == 2 else (int(r.choice([1, 2, 4, 6])),)
        self.shape = (*batch, *heads, L, S)
        q_shape = (*batch, *heads, L, E)
        k_heads = v_heads = heads
        if self.gqa:
            k_heads = v_heads = (int(r.choice([d for d in range(1, heads[0] + 1) if heads[0] % d == 0])),)
            if r.random() < 0.2:
                v_heads = (int(r.choice([d for d in range(1, heads[0] + 1) if heads[0] % d == 0])),)
        k_shape, v_shape = (*batch, *k_heads, S, E), (*batch, *v_heads, S, E_v)
        if r.random() < 0.3 and L and S:                    # some broadcast; torch forgets to when there is nothing to sum
            q_shape, k_shape, v_shape = (self._broadcast(shape, 2 + self.gqa) for shape in (q_shape, k_shape, v_shape))
        self.q, self.k, self.v = self._normal(q_shape), self._normal(k_shape), self._normal(v_shape)
        self.causal = bool(r.random() < 0.3)
        self.mask = None if self.causal or r.random() < 0.35 else self._mask()
        # torch's causal kernel multiplies its -inf by the scale, so is_causal with a scale of 0 or less gives NaN there: a test of its own
        self.scale = None if r.random() < 0.6 else float(r.choice([0.05, 1.0] if self.causal else [0.0, -0.3, 0.05, 1.0]))

    def _normal(self, shape: tuple[int, ...]) -> Array:
        x = self.random.standard_normal(shape)
        if len(shape) > 2 and self.random.random() < 0.3:   # (..., L, H, E) in memory
            x = np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
        return x

    def _broadcast(self, shape: tuple[int, ...], keep: int) -> tuple[int, ...]:
        n = len(shape) - keep
        if n > 0 and self.random.random() < 0.3:
            return shape[int(self.random.integers(1, n + 1)):]
        return tuple(1 if i < n and self.random.random() < 0.5 else m for i, m in enumerate(shape))

    def _mask(self) -> Array:
        r = self.random
        if self.gqa:
            out = (*np.broadcast_shapes(self.q.shape[:-3], self.k.shape[:-3]), self.q.shape[-3])
        else:
            out = np.broadcast_shapes(self.q.shape[:-2], self.k.shape[:-2])
        shape = [m if r.random() < 0.6 else 1 for m in (*out, *self.shape[-2:])]
        shape = shape[int(r.integers(0, len(shape) - 1)):]
        if r.random() < 0.4:
            mask = r.random(shape) < 0.7
        else:
            mask = r.standard_normal(shape)
            if r.random() < 0.5:
                mask[r.random(shape) < 0.25] = -np.inf
        if mask.shape[-2] > 1:
            mask[..., 1, :] = False if mask.dtype == bool else -np.inf  # rows that see nothing
        return mask

    def arguments(self) -> dict[str, Any]:
        return {"is_causal": self.causal, "scale": self.scale, "enable_gqa": self.gqa}


def error(got: Any, exact: Any) -> float:
    a, b = (np.asarray(x.double() if hasattr(x, "double") else x, np.float64) for x in (got, exact))
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    return float(np.linalg.norm((a - b).ravel()))


def norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


# ---------------------------------------------------------------- against torch
def torch_results(torch: Any, drawn: Drawn, tensors: list[Any], dout: Any) -> list[Any]:
    """out and the gradients of all float arguments, by torch's autograd."""
    leaves = [None if x is None else x.clone().requires_grad_(x.dtype != torch.bool) for x in tensors]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, **drawn.arguments())
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    grads = torch.autograd.grad(out, wanted, dout, allow_unused=True)
    return [out.detach(), *[torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]]


@pytest.mark.parametrize("block", range(10))
def test_500_random_calls_equal_torch(torch: Any, block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        drawn = Drawn(seed)
        dtype = getattr(torch, drawn.dtype)
        rival_in = [None if x is None else torch.from_numpy(x) for x in (drawn.q, drawn.k, drawn.v, drawn.mask)]
        rival_in = [x if x is None or x.dtype == torch.bool else x.to(dtype) for x in rival_in]
        exact_in = [x if x is None or x.dtype == torch.bool else x.double() for x in rival_in]
        shape = torch.nn.functional.scaled_dot_product_attention(*exact_in, **drawn.arguments()).shape
        dout = torch.from_numpy(drawn.random.standard_normal(tuple(shape))).to(dtype)
        exact = torch_results(torch, drawn, exact_in, dout.double())
        rival = torch_results(torch, drawn, rival_in, dout)
        array: Callable[[Any], Any] = (lambda x: x.numpy()) if seed % 2 and drawn.dtype != "bfloat16" else (lambda x: x)
        q, k, v, mask = (None if x is None else array(x) for x in rival_in)
        out, lse = scaled_dot_product_attention(q, k, v, mask, **drawn.arguments(), return_lse=True)
        assert type(out) is type(q)
        grads = scaled_dot_product_attention_backward(array(dout), q, k, v, out, lse, mask, **drawn.arguments())
        assert (grads.dmask is None) == (mask is None or drawn.mask.dtype == bool)
        got = [out, *[x for x in grads if x is not None]]
        # beyond twice torch's own error: rounding of the result and of dout, and in the long formats, where scores of 60 lose more
        # digits in exp than anything else does, of the scores
        rounding = EPS[drawn.dtype] * (1 if drawn.dtype in ("bfloat16", "float16") else 16)
        for name, g, e, n in zip(("out", "dq", "dk", "dv", "dmask"), got, exact, rival, strict=False):
            assert str(g.dtype).removeprefix("torch.") == drawn.dtype, f"call {seed}: {name}"
            allowed = 2 * error(n, e) + rounding * (norm(e) + norm(dout.double()))
            assert error(g, e) <= allowed, f"call {seed}, {drawn.dtype} {drawn.shape}: {name} is off by {error(g, e):.2e} of {allowed:.2e}"


def test_lse_is_torchs(torch: Any) -> None:
    q, k, v = (torch.from_numpy(x) for x in normal((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8)))
    for causal in (False, True):
        _, want = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=0.7)
        _, lse = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.7, return_lse=True)
        torch.testing.assert_close(lse, want)


def test_signature_is_torchs() -> None:
    names = list(inspect.signature(scaled_dot_product_attention).parameters)
    assert names[:8] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


def test_torchs_seed_decides_the_dropout(torch: Any) -> None:
    q = torch.randn(2, 3, 40, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_requires_grad_is_refused_with_advice(torch: Any) -> None:
    q = torch.randn(2, 3, 4, 8, requires_grad=True)
    with pytest.raises(TypeError, match=r"^scaled_dot_product_attention\(\): query requires grad.*query.detach\(\)"):
        scaled_dot_product_attention(q, q, q)


def test_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    arrays = [x.astype(np.float32) for x in normal((2, 3, 4, 5, 8), (1, 1, 2, 6, 8), (3, 2, 6, 8), (2, 1, 1, 5, 6), (2, 3, 4, 5, 8))]
    *ours, dout = map(jax.numpy.asarray, arrays)
    out, lse = scaled_dot_product_attention(*ours, enable_gqa=True, return_lse=True)
    grads = scaled_dot_product_attention_backward(dout, *ours[:3], out, lse, ours[3], enable_gqa=True)
    *theirs, dout = arrays
    want, lse = scaled_dot_product_attention(*theirs, enable_gqa=True, return_lse=True)
    for a, b in zip((out, *grads), (want, *scaled_dot_product_attention_backward(dout, *theirs[:3], want, lse, theirs[3], enable_gqa=True)),
                    strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- against a formula


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 3, 1, 2)], ids=str)
def test_any_number_of_leading_axes(lead: tuple[int, ...]) -> None:
    q, k, v, bias = normal((*lead, 5, 7), (*lead, 9, 7), (*lead, 9, 3), (*lead[-2:], 5, 9))
    bias[..., 2, 4:] = -np.inf
    out, lse = scaled_dot_product_attention(q, k, v, bias, return_lse=True)
    np.testing.assert_allclose(out, formula(q, k, v, bias=bias), rtol=1e-12, atol=1e-12)
    assert lse.shape == (*lead, 5)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(7) + bias
    np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(axis=-1)), rtol=1e-12)
    weight = np.random.default_rng(1).standard_normal(out.shape)
    grads = scaled_dot_product_attention_backward(weight, q, k, v, out, lse, bias)
    check_gradients(lambda q, k, v, bias: float((weight * formula(q, k, v, bias=bias)).sum()), [q, k, v, bias], list(grads))


@pytest.mark.parametrize(("heads_k", "heads_v"), [(1, 2), (2, 1), (2, 3), (6, 1)])
def test_key_and_value_may_have_their_own_numbers_of_heads(heads_k: int, heads_v: int) -> None:
    q, k, v, dout = normal((2, 6, 5, 4), (2, heads_k, 7, 4), (2, heads_v, 7, 3), (2, 6, 5, 3))

    def loss(q: Array, k: Array, v: Array) -> Array:
        return formula(q, k.repeat(6 // heads_k, axis=1), v.repeat(6 // heads_v, axis=1))
    out, lse = scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True)
    np.testing.assert_allclose(out, loss(q, k, v), rtol=1e-12, atol=1e-12)
    grads = scaled_dot_product_attention_backward(dout, q, k, v, out, lse, enable_gqa=True)
    check_gradients(lambda *x: float((dout * loss(*x)).sum()), [q, k, v], list(grads[:3]))


def test_gradients_of_what_is_broadcast_are_summed_in_float32() -> None:
    n = 5000                                                # float16 counts to 2048
    q, k = np.zeros((n, 1, 1, 8), np.float16), np.zeros((1, 1, 1, 8), np.float16)
    out, lse = scaled_dot_product_attention(q, k, k, return_lse=True)
    grads = scaled_dot_product_attention_backward(np.ones_like(out), q, k, k, out, lse)
    assert grads.dv.dtype == np.float16 and (grads.dv == n).all()


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_causal_is_top_left_for_any_scale(scale: float) -> None:
    q, k, v = normal((2, 3, 6, 5), (2, 3, 4, 5), (2, 3, 4, 5))
    for x, y, z in ((q, k, v), (k, q, q)):
        visible = np.tril(np.ones((x.shape[2], y.shape[2]), bool))
        got = scaled_dot_product_attention(x, y, z, is_causal=True, scale=scale)
        np.testing.assert_allclose(got, formula(x, y, z, visible, scale=scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 5, 31, 63, 65, 100, 127, 191, 255, 256])
def test_head_sizes(dim: int) -> None:
    q, k, v = (x.astype(np.float32) for x in normal((2, 2, 17, dim), (2, 2, 19, dim), (2, 2, 19, 257 - dim)))
    out = scaled_dot_product_attention(q, k, v)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, formula(*(x.astype(np.float64) for x in (q, k, v))), atol=2e-6)


@pytest.mark.parametrize("shape", [(2, 3, 0, 5, 4), (2, 3, 6, 0, 4), (0, 3, 6, 5, 4), (2, 3, 0, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    batch, heads, L, S, E = shape
    q, k = np.ones((batch, heads, L, E)), np.ones((batch, heads, S, E))
    out, lse = scaled_dot_product_attention(q, k, k, return_lse=True)
    assert out.shape == q.shape and not out.any() and (lse == -np.inf).all()
    grads = scaled_dot_product_attention_backward(q, q, k, k, out, lse)
    assert [x.shape for x in grads[:3]] == [q.shape, k.shape, k.shape] and not any(x.any() for x in grads[:3])


def test_dropout_is_the_mask_of_seed_and_offset() -> None:
    q, k, v, dout = normal((2, 3, 4, 33, 8), (2, 3, 2, 21, 8), (2, 3, 2, 21, 6), (2, 3, 4, 33, 6))
    options = {"dropout_p": 0.3, "seed": 7, "offset": 5}
    keep = fastattn.dropout_mask(6, 4, 33, 21, **options).reshape(2, 3, 4, 33, 21) / (1 - round(0.3 * 65536) / 65536)
    out, lse = scaled_dot_product_attention(q, k, v, enable_gqa=True, return_lse=True, **options)

    def expected(q: Array, k: Array, v: Array) -> Array:
        return formula(q, k.repeat(2, axis=2), v.repeat(2, axis=2), keep=keep)
    np.testing.assert_allclose(out, expected(q, k, v), rtol=1e-12, atol=1e-12)
    grads = scaled_dot_product_attention_backward(dout, q, k, v, out, lse, enable_gqa=True, **options)
    check_gradients(lambda *x: float((dout * expected(*x)).sum()), [q, k, v], list(grads[:3]))
    assert not np.array_equal(*(scaled_dot_product_attention(q, k, v, dropout_p=0.3, enable_gqa=True) for _ in range(2)))
    assert not scaled_dot_product_attention(q, k, v, dropout_p=1.0, enable_gqa=True).any()


def test_leading_axes_are_merged_and_broadcast_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def attention(*args: Any, **options: Any) -> Any:
        seen.extend((*args, options["bias"]))
        return fastattn.attention(*args, **options)
    monkeypatch.setattr(translate, "attention", attention)
    q, k, v, bias = normal((2, 3, 4, 6, 8), (1, 1, 4, 6, 8), (4, 6, 8), (2, 3, 1, 1, 6))
    scaled_dot_product_attention(q, k, v, bias)
    assert [x.shape for x in seen] == [(6, 4, 6, 8), (6, 4, 6, 8), (6, 4, 6, 8), (6, 1, 1, 6)]
    assert all(np.shares_memory(x, y) for x, y in zip(seen, (q, k, v, bias), strict=True))


class Bare:
    """A host array that has DLPack and nothing else, like a plain device array."""

    def __init__(self, x: Array) -> None:
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.x.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.x.__dlpack_device__()


def test_arrays_without_operations_work_where_none_is_needed() -> None:
    q, k, v, mask = normal((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), (4, 5))
    got = scaled_dot_product_attention(Bare(q), Bare(k), Bare(v), Bare(mask > 0))
    np.testing.assert_allclose(np.asarray(got), formula(q, k, v, mask > 0), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match=r"attention\(\): query is a Bare of shape \(3, 4, 8\) without a reshape method"):
        scaled_dot_product_attention(Bare(q[0]), Bare(k[0]), Bare(v[0]))


Q, K = np.zeros((2, 4, 5, 8), np.float32), np.zeros((2, 4, 6, 8), np.float32)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"query has shape \(8,\); expected \(\.\.\., sequence, head_dim\)", {"query": Q[0, 0, 0]}),
    (TypeError, "query is a list; expected an array", {"query": [[1.0]]}),
    (ValueError, "key has shape .* expected leading axes .* enable_gqa=True", {"key": K[:, :2], "value": K[:, :2]}),
    (ValueError, "key has 3 heads, .*a divisor of query's 4", {"key": K[:, :3], "value": K[:, :3], "enable_gqa": True}),
    (ValueError, "key has shape .*leading axes", {"key": np.zeros((3, 4, 6, 8), np.float32)}),
    (ValueError, "query has shape .* because enable_gqa is True", {"query": Q[0, 0], "enable_gqa": True}),
    (ValueError, r"value has 5 rows, shape \(2, 4, 5, 8\); expected as many as key, 6", {"value": Q}),
    (ValueError, "key has head_dim 7; expected query's head_dim, 8", {"key": K[..., :7]}),
    (TypeError, "key has dtype float64; expected query's dtype", {"key": K.astype(np.float64)}),
    (ValueError, "attn_mask is given beside is_causal=True; expected one", {"attn_mask": np.ones((5, 6), bool), "is_causal": True}),
    (TypeError, "attn_mask has dtype int32; expected float32", {"attn_mask": np.ones((5, 6), np.int32)}),
    (TypeError, "attn_mask has dtype float64; expected float32", {"attn_mask": np.ones((5, 6))}),
    (ValueError, r"attn_mask has shape \(5, 5\); expected a shape that broadcasts", {"attn_mask": np.ones((5, 5), bool)}),
    (ValueError, "attn_mask has shape .*expected at most the 4 axes", {"attn_mask": np.ones((1, 2, 4, 5, 6), bool)}),
    (ValueError, "attn_mask has shape .*leading axes", {"attn_mask": np.ones((3, 1, 1, 6), bool)}),
    (ValueError, "dropout_p is 1.5; expected a probability", {"dropout_p": 1.5}),
    (ValueError, "scale is inf; expected a finite number", {"scale": np.inf}),
]


@pytest.mark.parametrize(("kind", "text", "changes"), WRONG, ids=[text[:40] for _, text, _ in WRONG])
def test_errors_use_torchs_names(kind: type[Exception], text: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"query": Q, "key": K, "value": K, **changes}
    with pytest.raises(kind, match=r"^scaled_dot_product_attention\(\): " + text):
        scaled_dot_product_attention(**arguments)
    with pytest.raises(kind, match=r"^scaled_dot_product_attention_backward\(\): "):
        scaled_dot_product_attention_backward(Q, lse=Q[..., 0], out=Q, **arguments)


def test_backward_checks_what_the_forward_gave() -> None:
    out, lse = scaled_dot_product_attention(Q, K, K, return_lse=True)
    with pytest.raises(ValueError, match=r"backward\(\): grad_out has shape \(2, 4, 6, 8\); expected the forward's, \(2, 4, 5, 8\)"):
        scaled_dot_product_attention_backward(K, Q, K, K, out, lse)
    with pytest.raises(ValueError, match=r"backward\(\): lse has shape"):
        scaled_dot_product_attention_backward(Q, Q, K, K, out, lse[:1])
    with pytest.raises(ValueError, match=r"backward\(\): seed is None"):
        scaled_dot_product_attention_backward(Q, Q, K, K, out, lse, dropout_p=0.5)
    bias = np.zeros((5, 6), np.float32)
    assert scaled_dot_product_attention_backward(Q, Q, K, K, out, lse, bias, need_dmask=False).dmask is None
