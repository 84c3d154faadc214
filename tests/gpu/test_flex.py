"""score_mod, mask_mod and block_mask in GPU kernels.

Without a GPU the kernels on plain threads run in Python (tools/gpu/emulator.py) and those of sm80 from their PTX, against the reference;
bitmaps of tiles are compared with the mask of all pairs, and kernels of all families are compiled and checked for spills.
"""
from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import gpu
from fastattn.explanation import _catch
from fastattn.flex.evaluate import evaluate, places
from fastattn.flex.operands import Functions
from fastattn.gpu import precompile
from fastattn.gpu.flex import fixed
from fastattn.gpu.flex.bitmap import EMPTY, FULL, PARTIAL
from fastattn.gpu.flex.launch import bitmap, round_fixed_source
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.spec import make_spec
from tests.tools.compare import close_captured
from tests.tools.gpu.builds import build
from tests.tools.gpu.calls import host_view
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.gpu.flex import MASKS, SCORES, Mod, call_of, emulate, interpret
from tests.tools.problems import NUMPY

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(5)
SLOPES, TABLE = RNG.uniform(0.1, 1, 4).astype(np.float32), RNG.standard_normal((4, 9)).astype(np.float16)
DOC = np.sort(RNG.integers(0, 3, (2, 90)), 1).astype(np.int32)


def capped(s: Any, b: Any, h: Any, q: Any, k: Any, slopes: Any, table: Any) -> Any:
    """Two arrays, one of 16 bits, and indices that leave them on both sides."""
    return 3 * np.tanh((s - slopes[h] * abs(q - k) * 0.1 + table[h, q - k]) / 3)


def logarithm(s: Any, b: Any, h: Any, q: Any, k: Any, slopes: Any, scale: Any) -> Any:
    """A branch whose derivative is no number where it is not taken; an array without axes."""
    return np.where(s > 0, np.log(s) * slopes[h], s * scale)


def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return ((DOC[b, q] == DOC[b, k]) & (q >= k)) | ((k < 3) & (q % 5 != 1))


def draw(lengths: tuple[int, int], heads: tuple[int, int], dim: int, dtype: Any, batch: int | None = None) -> tuple[Array, ...]:
    """q, k, v, dout."""
    lead = () if batch is None else (batch,)
    shapes = [(*lead, n, h, dim) for n, h in zip((*lengths, lengths[1], lengths[0]), (heads[0], heads[1], heads[1], heads[0]), strict=True)]
    return tuple(RNG.standard_normal(shape).astype(dtype) for shape in shapes)


def near(got: Any, want: Any, dtype: Any, what: str) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    assert np.array_equal(np.isfinite(got), finite), what
    error = np.abs(got[finite] - want[finite]).max(initial=0) / max(1.0, np.abs(want[finite]).max(initial=0))
    assert error < {2: 2e-3, 4: 2e-5, 8: 1e-12}[np.dtype(dtype).itemsize], (what, error)


def agree(arrays: tuple[Array, ...], functions: Functions, **options: Any) -> list[str]:
    """The kernels that ran, whose results are those of the reference."""
    *qkv, dout = arrays
    lengths, need = options.get("lengths"), bool(options.get("need_dbias"))
    out, lse, grads, launched = emulate(tuple(qkv), functions, dout=dout, **options)
    own = {name: x for name, x in options.items() if name not in ("lengths", "need_dbias", "deterministic", "max_seqlen_q", "max_seqlen_k")}
    own |= {name: x for name, x in zip(functions._fields, functions, strict=True) if x is not None}
    cu = () if lengths is None else lengths[:2]
    forward, backward = (fastattn.attention, fastattn.attention_backward) if lengths is None else (
        fastattn.attention_varlen, fastattn.attention_varlen_backward)
    want, want_lse = forward(*qkv, *cu, **own, return_lse=True, engine="reference")
    near(out, want, dout.dtype, "out")
    near(lse, want_lse, np.float64 if dout.dtype == np.float64 else np.float32, "lse")
    asked = {"need_dcaptured": True} if functions.captured else {}
    wanted = backward(dout, *qkv, want, want_lse, *cu, **own, **asked, need_dbias=need, engine="reference")
    for name, got, x in zip(("dq", "dk", "dv", "dbias", "dsinks"), grads, wanted, strict=True):
        if x is not None:
            near(got.reshape(x.shape), x, dout.dtype, name)
    for n, (got, x) in enumerate(zip(grads.dcaptured, wanted.dcaptured or (), strict=False)):
        near(got, x, x.dtype, f"dcaptured[{n}]")
    return launched


@pytest.mark.slow
def test_emulated_with_captured_gradients_and_documents() -> None:
    launched = agree(draw((20, 70), (2, 1), 5, np.float32, 1), Functions(capped, documents, (SLOPES, TABLE), None))
    assert [key.split()[0] for key in launched] == ["bitmap", "forward_simt", "preprocess", "bitmap", "backward_simt", "bitmap",
                                                    "backward_simt", "bitmap", "captured", "round_captured"]


@pytest.mark.slow
def test_emulated_beside_built_in_features() -> None:
    bias, sinks = RNG.standard_normal((2, 20, 70)).astype(np.float32), RNG.standard_normal(2).astype(np.float32)
    agree(draw((20, 70), (2, 1), 5, np.float32, 1), Functions(capped, None, (SLOPES, TABLE), None), bias=bias, need_dbias=True, sinks=sinks,
          softcap=2.0, causal=True, dropout_p=0.3, seed=5)


@pytest.mark.slow
def test_emulated_float64_where_derivatives_are_no_numbers() -> None:
    agree(draw((20, 33), (2, 2), 4, np.float64, 1), Functions(logarithm, lambda b, h, q, k: q % 4 != 1, (SLOPES[:2], np.array(0.5)), None))


@pytest.mark.slow
def test_emulated_packed() -> None:
    cu_q, cu_k = np.array([0, 9, 9, 25], np.int32), np.array([0, 20, 31, 98], np.int32)
    agree(draw((27, 99), (2, 1), 5, np.float32), Functions(capped, documents_of_three, (SLOPES, TABLE), None),
          lengths=(cu_q, cu_k, None, None))


@pytest.mark.slow
def test_emulated_captured_gradients_are_those_of_the_out_that_was_given() -> None:
    """Several blocks add to an element, for two query heads of one key head. Against an out of float64 their delta is too far off."""
    arrays = draw((40, 70), (2, 1), 8, NUMPY["bfloat16"], 2)
    alibi, slopes = SCORES["alibi"].function, SLOPES[:2] * np.float32(0.05)
    out, lse, grads, _ = emulate(arrays[:3], Functions(alibi, None, (slopes,), None), dout=arrays[3])
    close_captured(grads.dcaptured, fastattn.attention_backward, arrays, (slopes,), (out, lse), score_mod=alibi)


def documents_of_three(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (DOC[b % 2, q] == DOC[b % 2, k]) | (k == b)


@pytest.mark.slow
def test_emulated_deterministic_sums_are_those_of_the_reference() -> None:
    """In two passes: the largest exponent of each array, then whole numbers. Two arrays, one of 16 bits, two heads for each element."""
    launched = agree(draw((8, 40), (2, 1), 4, np.float32, 1), Functions(capped, documents, (SLOPES, TABLE), None), deterministic=True)
    assert [key.split()[0] for key in launched][-5:] == ["bitmap", "captured", "captured", "round_captured", "round_captured"]
    assert " exponents | " in launched[-4] and " units | " in launched[-3]


@pytest.mark.parametrize("values", [[1e30, -1e30, 1e-30], [1e300, 3.0, -1e300], [5e-324, 2e-300], [0.0, -0.0], [math.inf, 1.0],
                                    [math.inf, -math.inf], [math.nan, 2.0], [1.0, 2**-53, -1.0], []])
def test_fixed_sums(values: list[float]) -> None:
    """Sums in any order have the same bits, those of the exact sum where units are small enough, and keep what is no number."""
    memory, records, out = Memory(), np.zeros(6, np.int64), np.full(2, np.nan)
    records_view, out_view, bits = host_view(records), host_view(out), 50
    memory.allow(records_view)
    memory.allow(out_view)
    found = set()
    with emulated(memory) as machine:
        for order in (values, values[::-1]):
            records[:] = 0
            top = max([fixed.exponent_of(x) for x in order], default=0)
            records[5] = top
            for x in order:
                fixed.add_fixed(records_view.ptr, x, top, bits)
            own = [records_view.ptr, out_view.ptr, records_view.ptr + 40, 1, bits]
            machine.load(round_fixed_source("float64")).launch(1, own, 0)
            found.add(out[0].tobytes())
    want = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    largest = max(map(abs, values), default=0.0)
    assert len(found) == 1
    assert np.isnan(out[0]) if math.isnan(want) else out[0] == want or abs(out[0] - want) <= max(largest * 2.0**-80, 2.0**-970)


@pytest.mark.slow
def test_emulated_block_mask_of_a_function_and_blocks() -> None:
    blocks = RNG.random((1, 2, 3, 5)) < 0.5
    made = fastattn.block_mask(lambda b, h, q, k: q + 50 >= k, None, 2, 20, 70, blocks=blocks, block=(8, 16))
    agree(draw((20, 70), (2, 2), 4, np.float32, 1), Functions(None, None, (), made))


def test_emulated_numbers_that_change() -> None:
    """From its second value on a number is an argument of the kernel."""
    for width in (4, 9):
        launched = agree(draw((12, 40), (1, 1), 4, np.float32, 1), Functions(lambda s, b, h, q, k, w=width: s * (w / 8), None, (), None))
    assert "=number(" in launched[0]


# ---------------------------------------------------------------- bitmaps of tiles
def kinds(mask: Mod, arrays: list[Array], shape: tuple[int, int, int, int], block: tuple[int, int], by_keys: bool) -> Array:
    """The kind of each tile, from the bitmap that the kernel makes: (batch, heads, tiles of rows, tiles of keys)."""
    batch, heads, seqlen_q, seqlen_k = shape
    from fastattn.arrays.view import View
    from fastattn.flex.operands import Flex, FlexOperands
    from fastattn.gpu.spec import Call
    from fastattn.problem import Operands, make_problem

    flex = FlexOperands(Flex(None, mask.program(True)), mask_arrays=tuple(host_view(x) for x in arrays))
    q, k = (View(1 << 20, (batch, n, heads, 8), (n * heads * 32, heads * 32, 32, 4), "float32") for n in (seqlen_q, seqlen_k))
    problem, o = make_problem("test", Operands(q, k, k, flex=flex), packed=False)
    call, memory = Call(problem, o, q, None), Memory()
    for x in flex.mask_arrays:
        memory.allow(x)
    with emulated(memory) as machine, bitmap(call, make_spec(problem, o, False), *block, machine.launcher(), 0, by_keys) as values:
        at, words, _, by_batch, by_head, last = values
        tiles = [-(-n // size) for n, size in zip((seqlen_q, seqlen_k), block, strict=True)]
        found = np.zeros((batch, heads, *tiles), np.int64)
        for b, h, m, n in np.ndindex(found.shape):
            line, column = (n, m) if by_keys else (m, n)
            place = at + 8 * words * (min(b, last) * by_batch + h * by_head + line) + 8 * (column // 32)
            seen, full = (machine.load_b32(place + 4 * i) >> (column % 32) & 1 for i in range(2))
            found[b, h, m, n] = EMPTY if not seen else FULL if full else PARTIAL
    return found


BITMAPS = {
    "causal": ((1, 1, 200, 150), []), "document": ((2, 1, 90, 90), [DOC]), "prefix": ((2, 1, 60, 100), [np.array([37, 64], np.int32)]),
    "natten": ((1, 1, 32, 640), []),
    "tree": ((1, 1, 70, 64), [RNG.random((64, 64)) < np.where(np.arange(64) < 32, 0.1, 0)]), "dilated": ((1, 1, 40, 70), []),
    "local_global": ((1, 2, 64, 400), [np.array([True, False])]),
}


@pytest.mark.parametrize("name", BITMAPS)
@pytest.mark.parametrize("by_keys", [False, True])
def test_a_bitmap_says_what_the_pairs_say(name: str, by_keys: bool) -> None:
    shape, arrays = BITMAPS[name]
    block, (batch, heads, rows, keys) = (16, 32), shape
    found = kinds(MASKS[name], arrays, shape, block, by_keys)
    for b in range(batch):
        seen = np.broadcast_to(evaluate(MASKS[name].program(True), places(b, heads, rows, keys), arrays)[0], (heads, rows, keys))
        for m, n in np.ndindex(found.shape[2:]):
            part = seen[:, m * block[0]:(m + 1) * block[0], n * block[1]:(n + 1) * block[1]].reshape(heads, -1)
            assert np.array_equal(found[b, :, m, n], np.where(part.all(1), FULL, np.where(part.any(1), PARTIAL, EMPTY))), (name, b, m, n)
    assert len(set(found.ravel().tolist())) > 1


def test_a_block_mask_keeps_its_bitmap_for_each_stream() -> None:
    memory, call = Memory(), call_of(None, MASKS["causal"], seqlen=64, dtype="float32")[0]
    flex = call.operands.flex
    assert flex is not None
    flex.kept, spec = {}, make_spec(call.problem, call.operands, False)
    with emulated(memory) as machine:
        launcher = machine.launcher()

        def lasting(size: int, stream: int) -> Any:
            words = np.zeros(size // 4, np.int32)
            memory.allow(host_view(words))
            return SimpleNamespace(view=lambda: host_view(words), words=words)
        launcher.lasting = lasting
        found = []
        for stream, block in ((0, 32), (0, 32), (1, 32), (0, 64)):
            with bitmap(call, spec, block, 32, launcher, stream) as values:
                found.append(values[0])
        launcher.capturing = lambda stream: True
        with bitmap(call, spec, 32, 32, launcher, 0) as values:
            found.append(values[0])
    assert found[0] == found[1] and len(set(found)) == 4 and len(flex.kept) == 3
    assert len(machine.launched) == 4           # the second call made none


def test_calls_are_described_without_a_device() -> None:
    call, spec = call_of(None, MASKS["causal"])
    assert spec.mask_mod is not None and "mask_mod=[" in spec.text and call.problem.flex is not None


def test_explain_counts_the_tiles_and_registers() -> None:
    x = np.empty((2, 300, 2, 64), np.float16)
    doc = np.repeat(np.arange(3, dtype=np.int32), 100)
    flex: dict[str, Any] = {"mask_mod": lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k), "device": "sm_80"}
    found = fastattn.explain(fastattn.attention, x, x, x, **flex)
    [bitmap_key] = [key for key in found.kernels if key.startswith("bitmap ")]
    rows, keys = map(int, bitmap_key.split()[1].split("x"))
    block_mask = fastattn.block_mask(flex["mask_mod"], None, None, 300, 300)
    states = block_mask.tiles((rows, keys))
    registers, tiles = found.notes
    assert registers.startswith("forward_sm80: ") and registers.endswith(" registers a thread at its start, nothing in local memory")
    assert tiles == (f"tiles of {rows} rows x {keys} keys: of {4 * states.size}, {4 * (states == EMPTY).sum()} are skipped, in "
                     f"{4 * (states == PARTIAL).sum()} pairs are masked, {4 * (states == FULL).sum()} are whole")
    problem = _catch(fastattn.attention, (x, x, x), {"mask_mod": flex["mask_mod"]}).problem
    assert fastattn.explain(problem, device="sm_80").notes[-1].endswith("which are skipped, print(block_mask(...)) shows")


@pytest.mark.slow
def test_forwards_with_functions_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other arrays take the same launch, other numbers, strides and functions another one."""
    q, k, v, _ = draw((5, 9), (2, 1), 4, np.float32, 1)
    prepared = list[Any]()
    monkeypatch.setattr(gpu, "_prepared", lambda *given, own=gpu._prepared: prepared.append(given) or own(*given))
    monkeypatch.setattr(gpu, "current", lambda device: nullcontext())

    def check(x: Any, slopes: Any, number: float, mask: Any = None) -> int:
        def score(s: Any, b: Any, h: Any, i: Any, j: Any, m: Any) -> Any:
            return s * number - m[h] * abs(i - j)
        options: dict[str, Any] = {"score_mod": score, "captured": (slopes,)} | ({} if mask is None else {"mask_mod": mask})
        caught = _catch(fastattn.attention, (x, k, v), options)
        o, out, lse, stream = caught.where
        memory.kept.append((o, out))
        for view in (o.q, o.k, o.v, out, *o.flex.views.values()):
            memory.allow(view)
        gpu.forward(caught.problem, o, out, lse, stream, ("simt",))
        near(out.numpy(), fastattn.attention(x, k, v, **options, engine="reference"), np.float32, "out")
        return len(prepared)
    with emulated(Memory()) as machine:
        memory, launcher = machine.memory, machine.launcher()
        monkeypatch.setattr(gpu, "on_device", lambda ordinal: launcher)
        first, second = SLOPES[:2].copy(), SLOPES[2:].copy()
        counts = [check(q, first, 2.0), check(q, first, 3.0)]       # a number is an argument from its second value on
        counts += [check(q, second, 3.0), check(q, first, 3.0), check(q, first, 4.0), check(q + 1, first, 4.0)]
        counts += [check(np.repeat(q, 2, -1)[..., ::2], first, 4.0), check(q, first, 4.0, lambda b, h, i, j: j != 3), check(q, second, 4.0)]
    assert counts == [1, 2, 2, 2, 3, 3, 4, 5, 5]


@pytest.mark.slow
def test_tilings_of_functions() -> None:
    """Optimistic steps where a score can be made twice; small tiles for a BlockMask of small blocks."""
    def config(**flex: Any) -> str:
        x = np.empty((1, 4096, 2, 128), np.float16)
        return str(fastattn.explain(fastattn.attention, x, x, x, device="sm_90a", **flex).config)
    slopes = np.ones(2, np.float32)
    assert config(score_mod=lambda s, b, h, q, k: s - slopes[h] * abs(q - k)) == "forward_sm90 128x128 stages 2 out 4 optimistic turns"
    causal = MASKS["causal"].function
    assert config(mask_mod=causal) == "forward_sm90 128x128 stages 2 out 4 optimistic turns"
    fine, coarse = (fastattn.block_mask(causal, None, None, 4096, 4096, block=block) for block in (64, 128))
    assert config(block_mask=fine) == "forward_sm90 64x64 stages 2 out 2 blocks 2"
    assert config(block_mask=coarse) == config(mask_mod=causal)


# ---------------------------------------------------------------- kernels of the tensor cores
INTERPRETED = {
    "rated": ((1, 40, 70, 2, 1, 16), Functions(capped, documents, (SLOPES, TABLE), None), {}),
    "biased and causal": ((2, 20, 150, 2, 2, 64), Functions(lambda s, b, h, q, k, t: s + t[h, k % 9], lambda b, h, q, k: (q < 9) & (k != q),
                                                            (TABLE,), None), {"causal": True}),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_sm80_from_its_ptx(name: str) -> None:
    (batch, rows, keys, heads, heads_k, dim), functions, options = INTERPRETED[name]
    q, k, v, dout = draw((rows, keys), (heads, heads_k), dim, np.float16, batch)
    out, lse, grads, launched = interpret((q, k, v), functions, "sm80", dout=dout, **options)
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    own = {name: x for name, x in zip(functions._fields, functions, strict=True) if x is not None} | options
    want, want_lse = fastattn.attention(*wide[:3], **own, return_lse=True, engine="reference")
    wanted = fastattn.attention_backward(wide[3], *wide[:3], want, want_lse, **own, engine="reference")
    near(out, want, np.float16, "out")
    near(lse, want_lse, np.float32, "lse")
    for what, got, x in zip(("dq", "dk", "dv"), grads, wanted, strict=False):
        near(got, x, np.float16, what)
    own.pop("captured")
    close_captured(tuple(grads[3:]), fastattn.attention_backward, (q, k, v, dout), functions.captured, (out, lse), **own)
    assert {key.split()[0] for key in launched} >= {"bitmap", "forward_sm80", "backward_sm80", "captured"}


@pytest.mark.parametrize(("dtype", "deterministic"), [(np.float16, False), (np.float32, False), (np.float32, True)])
def test_captured_gradients_on_plain_threads_from_their_ptx(dtype: Any, deterministic: bool) -> None:
    """As emulated, and with the machine's own sums: atomic, or whole numbers in two passes."""
    arrays = draw((5, 24), (2, 1), 8, dtype, 1)
    functions = Functions(capped, documents, (SLOPES, TABLE), None)
    out, lse, grads, launched = interpret(arrays[:3], functions, "simt", dout=arrays[3], deterministic=deterministic)
    own = {"score_mod": capped, "mask_mod": documents}
    close_captured(tuple(grads[3:]), fastattn.attention_backward, arrays, functions.captured, (out, lse), **own)
    wide = [x.astype(np.float64) for x in arrays]
    want, want_lse = fastattn.attention(*wide[:3], **own, captured=functions.captured, return_lse=True, engine="reference")
    wanted = fastattn.attention_backward(wide[3], *wide[:3], want, want_lse, **own, captured=functions.captured, engine="reference")
    for what, got, x in zip(("dq", "dk", "dv"), grads, wanted, strict=False):
        near(got, x, dtype, what)
    assert [key.split()[0] for key in launched].count("captured") == 1 + deterministic


def test_few_queries_from_their_ptx() -> None:
    """Split keys: the two rows of a thread are of different heads."""
    q, k, v, _ = draw((2, 260), (2, 1), 16, np.float16, 1)
    functions = Functions(capped, lambda b, h, q, k: (DOC[b, k % 90] < 2) & (abs(h - k) % 7 != 3) & (k + q != 9), (SLOPES, TABLE), None)
    out, lse, _, launched = interpret((q, k, v), functions, "sm80")
    wide = [x.astype(np.float64) for x in (q, k, v)]
    own = {"score_mod": functions.score_mod, "mask_mod": functions.mask_mod, "captured": functions.captured}
    want, want_lse = fastattn.attention(*wide, **own, return_lse=True, engine="reference")
    near(out, want, np.float16, "out")
    near(lse, want_lse, np.float32, "lse")
    assert {key.split()[0] for key in launched} == {"forward_decode"}


# sm_120 is covered by the same kernels with less shared memory
COMPILED = [
    ("sm90", "sm_90a", "alibi", None, {"causal": True}), ("sm90", "sm_90a", "softcap", "document", {}),
    ("sm90", "sm_90a", "relative", "causal", {}), ("sm90", "sm_90a", None, "natten", {"head_dim": 64}),
    ("sm90", "sm_90a", "softcap", "document", {"backward": True}), ("sm90", "sm_90a", "alibi", None, {"backward": True, "captured": False}),
    ("sm80", "sm_80", "swin", None, {"backward": True}), ("sm80", "sm_80", "softcap", "prefix", {"backward": True, "head_dim": 64}),
    ("sm80", "sm_120", "alibi", "sliding", {}), ("sm90", "sm_90a", "relative", "document", {"few": 2, "heads_k": 1}),
    ("simt", "sm_80", "gated", "local_global", {"dtype": "float32", "backward": True}),
    ("simt", "sm_80", "swin", None, {"dtype": "bfloat16", "backward": True, "deterministic": True}),
]


@pytest.mark.parametrize(("family", "arch", "score", "mask", "options"), COMPILED)
def test_functions_compile_without_spills(family: str, arch: str, score: str | None, mask: str | None, options: dict[str, Any],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "build", build)           # the choice of a tile compiles it too
    call, spec = call_of(SCORES.get(score or ""), MASKS.get(mask or ""), **options)
    with gpu.use(family):
        assert gpu.choose(call, precompile.absent_device(arch)) is gpu.family(family)
        for source in precompile.sources(call, spec, precompile.absent_device(arch)):
            _, report = build(source, arch)
            assert not compiler.complaints(report), (source.key, compiler.complaints(report))


def test_refusals_say_what_works() -> None:
    device = precompile.absent_device("sm_90a")
    wide = Mod(lambda s, b, h, q, k, x: s + x[h], (("float64", ("H",)),))
    for call, words in ((call_of(wide, None)[0], "captured[0] is float64"),
                        (call_of(SCORES["alibi"], None, dtype="float32")[0], "plain threads"),
                        (call_of(SCORES["softcap"], None, backward=True, softcap=2.0)[0], "cap * tanh(score / cap)")):
        found = dict(gpu.reasons(call, device, gpu.FAMILIES))
        assert any(words in (reason or "") for reason in found.values()), found
        assert found["simt"] is None
