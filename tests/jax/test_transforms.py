"""Transformations: vmap in all its combinations against a loop, scan, remat, several devices, ahead-of-time compilation, export; and what
is refused."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import fastattn  # noqa: E402
from fastattn.jax import attention, attention_varlen, call, record  # noqa: E402

ROOT = Path(__file__).parents[2]
N, S, T, H, HK, D = 2, 5, 6, 4, 2, 8


class Draw:
    """Random arrays, one after the other."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self, *shape: int) -> Any:
        return jnp.asarray(self.random.standard_normal(shape), jnp.float32)

    def mapped(self, shape: tuple[int, ...], axis: int | None) -> Any:
        return self(*shape) if axis is None else self(*shape[:axis], N, *shape[axis:])


@pytest.fixture
def draw() -> Draw:
    return Draw()


# ---------------------------------------------------------------- vmap
def judge_vmap(f: Any, axes: tuple[int | None, ...], arrays: tuple[Any, ...]) -> None:
    """f under vmap: the results of a loop bit for bit, and its gradients in all arrays of floats."""
    def loop(*x: Any) -> Any:
        return jnp.stack([f(*[y if a is None else jnp.take(y, i, axis=a) for y, a in zip(x, axes, strict=True)]) for i in range(N)])
    mapped = jax.vmap(f, axes)
    differentiated = tuple(i for i, x in enumerate(arrays) if x.dtype == jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(jax.eval_shape(loop, *arrays).shape), jnp.float32)

    def of(function: Any) -> Any:
        def loss(*x: Any) -> Any:
            out = function(*x)
            return jnp.vdot(weight, out), out
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, differentiated, has_aux=True))(*arrays)
        return out, gradients
    (got, got_gradients), (want, want_gradients) = of(mapped), of(loop)
    np.testing.assert_array_equal(got, want)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """For the direction of each call that vmap met: whether it became one call."""
    found: dict[str, bool] = {}
    fold = call.fold

    def noted(record: Any, *more: Any) -> Any:
        result = fold(record, *more)
        assert found.setdefault("backward" if record.backward else "forward", result is not None) == (result is not None)
        return result
    monkeypatch.setattr(call, "fold", noted)
    return found


TOGETHER = {"forward": True, "backward": True}
STOP = jax.lax.stop_gradient
FEATURES = {
    "bias_of_rows": ((S, T), lambda x: {"bias": x}), "bias_of_heads": ((H, 1, T), lambda x: {"bias": x}),
    "bias_of_batch": ((2, 1, S, T), lambda x: {"bias": x}), "bias_of_one": ((1, H, S, T), lambda x: {"bias": x}),
    "constant_bias": ((H, S, T), lambda x: {"bias": STOP(x)}), "mask": ((S, T), lambda x: {"mask": x > -0.5}),
    "mask_of_keys": ((2, 1, 1, T), lambda x: {"mask": x > -0.5}), "alibi_of_heads": ((H,), lambda x: {"alibi_slopes": STOP(x)}),
    "alibi_of_batch": ((2, H), lambda x: {"alibi_slopes": STOP(x)}), "sinks": ((H,), lambda x: {"sinks": x}),
    "constant_sinks": ((H,), lambda x: {"sinks": STOP(x)}),
}
ONE_BY_ONE = {("bias_of_rows", 0), ("bias_of_rows", "gradient"), ("bias_of_heads", 0), ("bias_of_heads", "gradient"), ("bias_of_one", 0),
              ("bias_of_one", "gradient"), ("constant_bias", 0), ("mask", 0), ("sinks", 0), ("sinks", "gradient"), ("constant_sinks", 0)}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(("axes", "axis"), [((0, 0, 0), None), ((1, None, 4), 0)])
def test_vmap_of_features(name: str, axes: tuple[int | None, ...], axis: int | None, draw: Draw, folds: dict[str, bool]) -> None:
    shape, keywords = FEATURES[name]
    shapes = (2, S, H, D), (2, T, HK, D), (2, T, HK, D), shape
    arrays = tuple(draw.mapped(s, a) for s, a in zip(shapes, (*axes, axis), strict=True))
    judge_vmap(lambda q, k, v, x: attention(q, k, v, **keywords(x), causal=True), (*axes, axis), arrays)
    alone = (name, axis) in ONE_BY_ONE
    assert folds == {"forward": not alone, "backward": not (alone or (name, "gradient") in ONE_BY_ONE)}


@pytest.mark.parametrize("axis", [None, 0])
def test_vmap_over_the_batch(axis: int | None, draw: Draw, folds: dict[str, bool]) -> None:
    """The usual vmap: a function of one sequence. Every bias and mask then fits one call."""
    arrays = (draw(N, S, H, D), draw(N, T, HK, D), draw(N, T, HK, D), draw.mapped((H, S, T), axis))
    judge_vmap(lambda q, k, v, x: attention(q[None], k[None], v[None], bias=x, mask=x > -1, layout="bshd"), (0, 0, 0, axis), arrays)
    assert folds == TOGETHER


def test_vmap_of_layout_lse_and_shared_operands(draw: Draw, folds: dict[str, bool]) -> None:
    def f(q: Any, k: Any, v: Any) -> Any:
        out, lse = attention(q, k, v, layout="bhsd", return_lse=True)
        return jnp.concatenate((out, lse[..., None]), axis=-1)
    judge_vmap(f, (None, 2, None), (draw(2, H, S, D), draw(2, HK, N, T, D), draw(2, HK, T, D)))
    assert folds == TOGETHER


def test_vmap_over_nothing(draw: Draw) -> None:
    x, bias = draw(0, 2, S, H, D), draw(H, S, S)
    out, pull = jax.vjp(jax.vmap(lambda q, bias: attention(q, q, q, bias=bias, sinks=bias[:, 0, 0]), (0, None)), x, bias)
    dq, dbias = pull(out)
    assert out.shape == dq.shape == x.shape and dbias.shape == bias.shape and not dbias.any()


def test_nested_vmap(draw: Draw, folds: dict[str, bool]) -> None:
    inner = jax.vmap(lambda q, k, v: attention(q, k, v, causal=True), (0, None, 1))
    judge_vmap(inner, (0, 1, None), (draw(N, 2, 2, S, H, D), draw(2, N, T, HK, D), draw(2, 2, T, HK, D)))
    assert folds == TOGETHER


def test_vmap_that_runs_one_by_one(draw: Draw, folds: dict[str, bool]) -> None:
    """Dropout depends on the position in the batch, packed lengths on each element."""
    arrays = draw(N, 2, S, H, D), draw(2, T, HK, D), draw(N, 2, T, HK, D)
    judge_vmap(lambda q, k, v: attention(q, k, v, dropout_p=0.3, seed=3), (0, None, 0), arrays)
    seeds = jnp.arange(N, dtype=jnp.uint32)
    judge_vmap(lambda q, k, v, seed: attention(q, k, v, dropout_p=0.3, seed=seed), (0, None, 0, 0), (*arrays, seeds))
    lengths = jnp.array([[0, 2, 6], [0, 0, 5]])
    judge_vmap(lambda q, k, v, x: attention_varlen(q, k, v, x, x, causal=True), (0, None, 0, 0),
               (draw(N, 6, H, D), draw(6, HK, D), draw(N, 6, HK, D), lengths))
    assert folds == {"forward": False, "backward": False}


# ---------------------------------------------------------------- loops and checkpoints
def test_scan_remat_and_cond(draw: Draw) -> None:
    """Layers in a scan, each checkpointed: the gradients of a plain loop."""
    x, bias = draw(2, S, H, D), draw(2, H, S, S)

    def layer(x: Any, bias: Any) -> Any:
        return x + attention(x, x, x, bias=bias, causal=True)

    def looped(x: Any, bias: Any) -> Any:
        for i in range(2):
            x = layer(x, bias[i])
        return (x**2).sum()

    def scanned(x: Any, bias: Any) -> Any:
        return (jax.lax.scan(lambda x, b: (jax.checkpoint(layer)(x, b), None), x, bias)[0] ** 2).sum()

    def chosen(x: Any, bias: Any) -> Any:
        return jax.lax.cond(x.sum() > -1e9, looped, lambda x, bias: x.sum(), x, bias)
    want = jax.value_and_grad(looped, (0, 1))(x, bias)
    for f in (scanned, chosen):
        for a, b in zip(jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(x, bias)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_what_is_refused(draw: Draw) -> None:
    q, slopes = draw(1, S, H, D), draw(H)

    def loss(q: Any) -> Any:
        return (attention(q, q, q) ** 2).sum()
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(loss, (q,), (q,))
    with pytest.raises(TypeError, match=r"^attention\(\): a derivative of its derivative is wanted; expected gradients of first order"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(q)
    text = "alibi_slopes is differentiated; expected a constant, because fastattn has no gradient of it; jax.lax.stop_gradient("
    for transform in (lambda f: f, jax.jit, jax.checkpoint):
        with pytest.raises(TypeError, match=re.escape(text)):
            jax.grad(transform(lambda slopes: attention(q, q, q, alibi_slopes=slopes).sum()))(slopes)
    assert not jax.grad(lambda slopes: attention(q, q, q, alibi_slopes=STOP(slopes)).sum())(slopes).any()


# ---------------------------------------------------------------- several devices
DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from fastattn.jax import attention
P = jax.sharding.PartitionSpec
draw = np.random.default_rng(0)
q, k, v, bias = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in ((2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8), (4, 16, 16)))
def f(q, k, v, bias): return attention(q, k, v, bias=bias, causal=True)
def gradients(f): return jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2, 3))
def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True): np.testing.assert_allclose(x, y, atol=2e-5)
want, want_gradients = f(q, k, v, bias), gradients(f)(q, k, v, bias)
assert len(jax.devices()) == 2
for devices in jax.devices()[:1], jax.devices():
    mesh = jax.sharding.Mesh(devices, ("x",))
    for check in True, False:
        mapped = jax.shard_map(f, mesh=mesh, in_specs=(P("x"), P("x"), P("x"), P()), out_specs=P("x"), check_vma=check)
        same(mapped(q, k, v, bias), want)
        same(jax.jit(mapped)(q, k, v, bias), want)
        same(gradients(mapped)(q, k, v, bias), want_gradients)          # of bias: summed over the devices
        same(jax.jit(gradients(mapped))(q, k, v, bias), want_gradients)
same(jax.pmap(lambda q, k, v: f(q, k, v, bias))(*(x.reshape(2, 1, *x.shape[1:]) for x in (q, k, v))).reshape(want.shape), want)
parts = [jax.device_put(x, jax.sharding.NamedSharding(mesh, P("x"))) for x in (q, k, v)]
same(f(*parts, bias), want)                                             # jit without a map: gathered
same(jax.jit(gradients(f))(*parts, bias), want_gradients)
with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))):
    try: f(*[jax.device_put(x, P("x")) for x in (q, k, v)], bias)
    except TypeError as error: print(error)
"""


def test_several_devices() -> None:
    """shard_map on one device and on two, pmap, arrays that are spread over devices: a process with two CPU devices."""
    done = python(DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.startswith("attention(): q is float32[2@x,16,4,8], sharded over axes of an explicit mesh; expected an array of one ")


def python(program: str, **environment: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path)), "JAX_PLATFORMS": "cpu", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- ahead of time
def test_compiled_ahead_of_time(draw: Draw) -> None:
    """A compiled program stays right whatever was traced and called since."""
    q = draw(1, S, H, D)
    compiled = jax.jit(lambda q: attention(q, q, q, causal=True, window=(2, None), softmax_scale=0.1 + 0.2)).lower(q).compile()
    want = attention(q, q, q, causal=True, window=(2, None), softmax_scale=0.1 + 0.2)
    for i in range(3):
        attention(q, q, q, window=(i, 1)).block_until_ready()
    record._read.clear()                                    # a cache of what programs say, not the place where they say it
    np.testing.assert_array_equal(compiled(q), want)


def test_exported_with_a_symbolic_shape(draw: Draw) -> None:
    """A program without a batch size: the Problem is made when it runs."""
    checks = [jax.export.DisabledSafetyCheck.custom_call("fastattn")]

    def gradient(q: Any) -> Any:
        return jax.grad(lambda q: (attention(q, q, q, causal=True) ** 2).sum())(q)
    shape = jax.export.symbolic_shape("b, s, 4, 8")
    program = jax.export.export(jax.jit(gradient), disabled_checks=checks)(jax.ShapeDtypeStruct(shape, np.float32))
    for q in (draw(1, 5, 4, 8), draw(3, 9, 4, 8)):
        np.testing.assert_allclose(program.call(q), gradient(q), atol=1e-6)
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("t, 4, 8"), np.float32)

    def packed(x: Any, cu: Any, **maxima: Any) -> Any:
        return attention_varlen(x, x, x, cu, cu, **maxima)
    arguments = x, jax.ShapeDtypeStruct((3,), np.int32)
    with pytest.raises(ValueError, match=r"attention_varlen\(\): max_seqlen_q is None; expected an int, because q has a symbolic shape\."):
        jax.export.export(jax.jit(packed), disabled_checks=checks)(*arguments)
    bounded = jax.export.export(jax.jit(lambda x, cu: packed(x, cu, max_seqlen_q=9, max_seqlen_k=9)), disabled_checks=checks)(*arguments)
    q, cu = draw(9, 4, 8), np.array([0, 4, 9], np.int32)
    np.testing.assert_array_equal(bounded.call(q, cu), packed(q, cu))


CACHED = """
import numpy as np, jax
from fastattn.jax import attention
x = np.linspace(-1, 1, 160, dtype=np.float32).reshape(1, 5, 4, 8)
if FIRST: attention(x, x, x, window=(1, 1)).block_until_ready()          # other calls came first
print(repr(float(np.asarray(jax.jit(lambda q: attention(q, q, q, causal="top_left", softcap=1.5))(x)).sum(dtype=np.float64))))
"""


def test_cached_for_another_process(tmp_path: Path) -> None:
    """A program in JAX's persistent cache carries its options: another process runs it."""
    x = np.linspace(-1, 1, 160, dtype=np.float32).reshape(1, 5, 4, 8)
    want = float(fastattn.attention(x, x, x, causal="top_left", softcap=1.5).sum(dtype=np.float64))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    assert float(python(CACHED.replace("FIRST", "True"), **cache)) == want
    entries = {file.name for file in tmp_path.glob("*-cache")}
    assert any("lambda" in name for name in entries)
    assert float(python(CACHED.replace("FIRST", "False"), **cache)) == want
    assert {file.name for file in tmp_path.glob("*-cache")} == entries
