"""What users run into, a test each: hints that work when they are followed, arrays of other libraries, and what is silent.

The hints are taken from the messages and run as Python, until the call works.
"""
from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fastattn import attention, attention_backward, attention_varlen, attention_varlen_backward, explain, merge_states

Array = np.ndarray[Any, Any]


def draw(*shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


Q, K, V = draw(2, 16, 4, 8), draw(2, 16, 2, 8), draw(2, 16, 2, 8)


def tensors(library: str) -> tuple[Callable[[Array], Any], dict[str, Any]]:
    """What makes an array of a library, and the names that its users have."""
    if library == "numpy":
        return lambda x: x, {}
    if library == "torch":
        torch = pytest.importorskip("torch")
        return torch.from_numpy, {"torch": torch}
    jnp = pytest.importorskip("jax.numpy")
    return jnp.asarray, {"jnp": jnp}


def follow(function: Callable[..., Any], names: dict[str, Any], **arguments: Any) -> tuple[Any, list[str]]:
    """The result, and the errors on the way: each one's "X works" is run as Python, and its argument is replaced."""
    said: list[str] = []
    while len(said) < 4:
        try:
            return function(**arguments), said
        except (TypeError, ValueError) as error:
            said.append(str(error))
            hints = [re.match(r"((?:np\.asarray\()?(\w+)\W.*?) (?:works|gives|makes)", part) for part in str(error).split("; ")[1:]]
            [(hint, argument)] = [found.groups() for found in hints if found and found[2] in arguments]
            arguments[argument] = eval(hint, {"np": np, "ml_dtypes": ml_dtypes, **names}, dict(arguments))
    raise AssertionError(said)


# ---------------------------------------------------------------- hints
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_the_hint_of_a_cast_runs(library: str) -> None:
    """`k.astype(bfloat16)` was no Python."""
    make, names = tensors(library)
    for cast in ("float16", "bfloat16"):
        q = make(Q).to(getattr(names["torch"], cast)) if library == "torch" else make(Q).astype(cast if library != "numpy" else
                                                                                            np.dtype(cast))
        out, said = follow(attention, names, q=q, k=make(K), v=make(V))
        assert out.dtype == q.dtype and len(said) == 2, said
        assert said[0].endswith(f"expected q's dtype, {cast}; k.{'to' if library == 'torch' else 'astype'}(q.dtype) works.")


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_a_mask_of_integers_is_named_boolean(library: str, dtype: str) -> None:
    """The hint was a cast to float32, which the next error refused."""
    make, names = tensors(library)
    allowed = np.tril(np.ones((16, 16), dtype))
    out, said = follow(attention, names, q=make(Q), k=make(K), v=make(V), mask=make(allowed))
    assert len(said) == 1 and "expected bool" in said[0]
    np.testing.assert_array_equal(out, attention(make(Q), make(K), make(V), causal=True))


ARGUMENTS = {"q": Q, "k": K, "v": V, "mask": np.ones((16, 16), bool), "bias": draw(16, 16), "sinks": draw(4), "alibi_slopes": draw(4),
             "out": Q, "dout": Q, "lse": draw(2, 4, 16), "dlse": draw(2, 4, 16)}
STRANGE = {"uint8": np.uint8, "object": object, "structured": [("a", "f4")], "complex64": np.complex64, "int4": ml_dtypes.int4,
           "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz, "bytes": "S3"}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", STRANGE)
def test_the_expected_dtypes_are_those_of_the_argument(name: str, dtype: str) -> None:
    """Every dtype that the message names is accepted. It listed bool, int32 and int64 for q."""
    backward = name in ("out", "dout", "lse", "dlse")
    function = attention_backward if backward else attention
    shown = {"q": Q, "k": K, "v": V} | ({"dout": Q, "out": Q, "lse": ARGUMENTS["lse"]} if backward else {})
    with pytest.raises(TypeError, match=rf"\(\): {name} has dtype .*; expected (.*?)[;.]") as caught:
        function(**(shown | {name: np.zeros(ARGUMENTS[name].shape, STRANGE[dtype])}))
    expected = re.findall(r"q's dtype|float\d+|bfloat16|bool|int\d+", re.search(r"expected (.*?)[;.]", str(caught.value))[1])  # type: ignore[index]
    assert expected
    for accepted in expected:
        if name in ("lse", "dlse") and accepted == "float64":
            continue                                        # "float64 for float64 input"
        given = ARGUMENTS[name].astype(np.float32 if accepted == "q's dtype" else np.dtype(accepted))
        if name == "q":
            shown |= {other: shown[other].astype(given.dtype) for other in ("k", "v")}
        function(**(shown | {name: given}))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_bias_of_numpys_default_dtype(library: str) -> None:
    make, names = tensors(library)
    out, said = follow(attention, names, q=make(Q), k=make(K), v=make(V), bias=make(draw(4, 16, 16, dtype=np.float64)))
    assert len(said) == 1 and "bias has dtype float64; expected float32;" in said[0] and out.shape == Q.shape


def test_parts_of_merge_states_have_lists_of_their_own() -> None:
    with pytest.raises(TypeError, match=r"lses\[0\] has dtype uint8; expected float32 or float64 for float64 input; lses\[0\]\.astype\(np"):
        merge_states([Q], [np.ones((2, 4, 16), np.uint8)])


def test_expected_dtypes_are_listed_once() -> None:
    with pytest.raises(TypeError, match=r"sinks has dtype bfloat16; expected float32 or float64; sinks\.astype"):
        attention(Q, K, V, sinks=np.zeros(4, ml_dtypes.bfloat16))


def test_a_padding_mask_is_told_how_to_broadcast() -> None:
    keep = np.arange(16) < np.array([[5], [16]])
    out, said = follow(attention, {}, q=Q, k=K, v=V, mask=keep)
    assert len(said) == 1 and said[0].endswith("mask[:, None, None, :] gives one of (batch, keys) these axes.")
    np.testing.assert_allclose(out[0], attention(Q[:1], K[:1, :5], V[:1, :5])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [attention, attention_backward, attention_varlen, attention_varlen_backward])
def test_other_libraries_keywords_are_translated(function: Any) -> None:
    for theirs, ours in {"is_causal": "causal=", "attn_mask": "mask= (boolean) or bias= (additive)", "scale": "softmax_scale=",
                         "casual": "causal=", "window_size": "window=", "enable_gqa": "nothing"}.items():
        with pytest.raises(TypeError, match=re.escape(f"{function.__name__}(): {theirs} is no keyword of it; here it is {ours}")) as caught:
            positional = [None for parameter in inspect.signature(function).parameters.values() if parameter.default is parameter.empty]
            function(*positional, **{theirs: True})
        assert "fastattn.compat.sdpa" in str(caught.value)
    with pytest.raises(TypeError, match=r"attention\(\): 4 positional arguments are given; expected 3, q, k, v; all others go by keyword"):
        attention(Q, K, V, True)  # type: ignore[call-overload]


# ---------------------------------------------------------------- explain
def test_explain_notes_heads_and_sequence_that_look_swapped() -> None:
    """Arrays with the heads first and no layout= attend over heads, which no check can find."""
    x = np.ones((2, 4, 32, 8), np.float32)                  # torch's order: 4 heads, 32 rows
    found = explain(attention, x, x, x)
    assert found.notes == ("num_heads = 32 is above seqlen_q = 4 and seqlen_k = 4; if the arrays are (batch, num_heads, seqlen, head_dim), "
                           "as torch has them, pass layout='bhsd'",)
    assert f"\n  note: {found.notes[0]}" in str(found)
    assert explain(attention_backward, x, x, x).notes == found.notes
    assert explain(attention, x, x, x, layout="bhsd").notes == ()
    few = np.ones((2, 32, 4, 8), np.float32)                # 32 heads, 4 rows, said with layout= or by its strides
    assert explain(attention, few, few, few, layout="bhsd").notes == explain(attention, *[few.swapaxes(1, 2)] * 3).notes == ()
    decode = np.ones((2, 1, 32, 8), np.float32)
    assert explain(attention, decode, *[np.ones((2, 64, 8, 8), np.float32)] * 2).notes == ()


def test_explain_notes_a_mask_that_may_be_one_of_padding() -> None:
    """Where batch == seqlen_q both readings have the same shape."""
    q, k, v = draw(16, 16, 4, 8), draw(16, 16, 2, 8), draw(16, 16, 2, 8)
    keep = np.ones((16, 16), bool)
    note = "mask has two axes and is read as (seqlen_q, seqlen_k); if it is (batch, seqlen_k), pass mask[:, None, None, :]"
    assert explain(attention, q, k, v, mask=keep).notes == explain(attention, q, k, v, mask=keep, layout="bshd").notes == (note,)
    for plain in (keep[:, None, None, :], keep[None, None]):
        assert explain(attention, q, k, v, mask=plain).notes == ()
    assert explain(attention, Q, K, V, mask=keep).notes == ()


def test_explain_of_a_large_shape_needs_no_memory() -> None:
    """Arrays of np.empty, 0.3 GB each: none is written, so the process stays small."""
    code = ("import resource, numpy, fastattn; x = numpy.ones((1, 4, 2, 64), 'f2'); fastattn.explain(fastattn.attention, x, x, x)\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); x = [numpy.empty((1, 32768, 32, 128), numpy.float16) for _ in range(3)]\n"
            "found = fastattn.explain(fastattn.attention_backward, *x, causal=True); print(found.engine, (peak() - before) // 1024)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    engine, megabytes = done.stdout.split()
    assert engine == "cpu" and int(megabytes) < 50


def test_explain_takes_a_backward_without_its_forwards_results() -> None:
    full = explain(attention_backward, Q, Q, K, V, Q, draw(2, 4, 16), causal=True)
    assert explain(attention_backward, Q, K, V, causal=True) == explain(attention_backward, q=Q, k=K, v=V, causal=True) == full
    assert full.call == "attention_backward" and full.engine == "cpu"
    packed = draw(7, 4, 8)
    found = explain(attention_varlen_backward, packed, packed, packed, [0, 3, 7], [0, 3, 7])
    assert (found.call, found.engine) == ("attention_varlen_backward", "cpu")


# ---------------------------------------------------------------- arrays of other libraries
class Tensor:
    """A tensor as TensorFlow's: DLPack, and no array namespace."""

    def __init__(self, values: Array) -> None:
        self.values = values

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.values.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()


def test_tensorflow_gets_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """It got NumPy arrays. A stand-in here: the module's name, and its from_dlpack, which takes a capsule."""
    of_tensorflow = type("EagerTensor", (Tensor,), {"__module__": "tensorflow.python.framework.ops"})

    def from_dlpack(capsule: Any) -> Any:
        gives = type("Gives", (), {"__dlpack__": lambda self, **_: capsule, "__dlpack_device__": lambda self: (1, 0)})
        return of_tensorflow(np.from_dlpack(gives()))
    experimental = types.SimpleNamespace(dlpack=types.SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(experimental=experimental))  # type: ignore[arg-type]
    q, k, v = of_tensorflow(Q), of_tensorflow(K), of_tensorflow(V)
    out, lse = attention(q, k, v, return_lse=True)
    assert type(out) is type(lse) is of_tensorflow
    plain, plain_lse = attention(Q, K, V, return_lse=True)
    np.testing.assert_array_equal(out.values, plain)
    grads = attention_backward(out, q, k, v, out, lse)
    assert type(grads.dq) is type(grads.dv) is of_tensorflow
    np.testing.assert_array_equal(grads.dk.values, attention_backward(plain, Q, K, V, plain, plain_lse).dk)


def test_tensorflow_itself() -> None:
    tf = pytest.importorskip("tensorflow")
    q, k, v = (tf.constant(x) for x in (Q, K, V))
    out = attention(q, k, v)
    assert isinstance(out, tf.Tensor)
    np.testing.assert_array_equal(out.numpy(), attention(Q, K, V))
    assert follow(attention, {}, q=tf.Variable(q), k=k, v=v)[1][0].endswith("q.value() gives one.")


def test_an_array_of_no_known_library_gives_numpy_arrays() -> None:
    q, k, v = Tensor(Q), Tensor(K), Tensor(V)
    assert type(attention(q, k, v)) is np.ndarray


HOLDERS = {"xarray.core.dataarray.DataArray": ("an xarray DataArray", "q.data"), "dask.array.core.Array": ("a dask array", "q.compute()"),
           "pandas.core.frame.DataFrame": ("a pandas DataFrame", "q.to_numpy()"), "h5py._hl.dataset.Dataset": ("a h5py Dataset", "q[...]"),
           "zarr.core.array.Array": ("a zarr array", "q[...]"), "somewhere.Array": ("a somewhere array", "np.asarray(q)")}


@pytest.mark.parametrize("name", HOLDERS)
def test_an_object_that_holds_an_array(name: str) -> None:
    """The message names the module and what gives the array; the array is of whatever library it is."""
    (module, _, kind), (shown, gives) = name.rpartition("."), HOLDERS[name]

    def held(self: Any, *_: Any, **__: Any) -> Array:
        return Q
    methods = {"data": property(held), **dict.fromkeys(("compute", "to_numpy", "__getitem__", "__array__"), held)}
    x = type(kind, (), {"__module__": module, **methods})()
    out, said = follow(attention, {}, q=x, k=K, v=V)
    assert said[0].startswith(f"attention(): q is {shown}; expected a NumPy array or an array that speaks DLPack; {gives} ")
    np.testing.assert_array_equal(out, attention(Q, K, V))


def test_xarray_and_dask_themselves() -> None:
    xarray, dask = pytest.importorskip("xarray"), pytest.importorskip("dask.array")
    for x in (xarray.DataArray(Q), dask.from_array(Q)):
        np.testing.assert_array_equal(follow(attention, {}, q=x, k=K, v=V)[0], attention(Q, K, V))


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_8_bit_floats_as_the_messages_say(library: str) -> None:
    """8-bit q alone: the messages lead to a call that works."""
    make, names = tensors(library)
    eight = [make(x).to(names["torch"].float8_e4m3fn) if library == "torch" else make(x).astype(ml_dtypes.float8_e4m3fn) for x in (Q, K, V)]
    for x, other in (("q", "k"), ("k", "v"), ("v", "k")):
        wide = {"q": make(Q), "k": make(K), "v": make(V)}
        with pytest.raises(TypeError) as caught:
            attention(**(wide | {x: eight["qkv".index(x)]}))
        expected = f"attention(): {other} has dtype float32; expected float8_e4m3fn or float8_e5m2, because {x} has"
        assert str(caught.value).startswith(expected)
        assert str(caught.value).endswith(f"quantize_fp8({other}) gives it, and its scale.")
    out = np.asarray(attention(*eight, out_dtype="float32"), np.float32)
    wide_again = [np.asarray(x.float() if library == "torch" else x, np.float32) for x in eight]
    np.testing.assert_allclose(out, attention(*wide_again), rtol=1e-5, atol=1e-6)


def test_other_8_bit_floats_are_refused() -> None:
    for dtype in (ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e3m4):
        with pytest.raises(TypeError, match="; of 8-bit floats float8_e4m3fn and float8_e5m2 are taken; "):
            attention(Q.astype(dtype), K, V)


# ---------------------------------------------------------------- what is silent
def test_a_subclass_of_ndarray_gives_a_plain_array() -> None:
    class Labelled(np.ndarray[Any, Any]):
        pass
    out, lse = attention(Q.view(Labelled), K, V, return_lse=True)
    assert type(out) is type(lse) is np.ndarray


def test_autocast_changes_no_dtype() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in (Q, K, V))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.float32


def test_a_kernel_that_one_user_compiled_can_be_read_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries were readable by their owner alone, and others compiled again without a word. More in gpu/test_cache.py."""
    pytest.importorskip("numba.cuda")
    from fastattn.gpu.runtime import cache

    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o022)
    try:
        cache.write("ab" * 32, cache.Binary(b"\x7fELF and more", 48))
    finally:
        os.umask(before)
    [entry] = (tmp_path / "cache").iterdir()
    assert entry.stat().st_mode & 0o777 == 0o644 and entry.parent.stat().st_mode & 0o777 == 0o755
