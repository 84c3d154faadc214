"""8-bit caches widened for tensor-core forwards: the kernel run from its PTX, all parts, and which calls are widened."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import gpu
from fastattn.arrays import convert
from fastattn.gpu import caches
from fastattn.gpu.decode import caches as decode
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.ptx.wgmma_8bit import KEY_OF
from fastattn.gpu.rows import widen_launch
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.launcher import Listing
from fastattn.gpu.sm90 import launch as sm90
from fastattn.gpu.sm90 import launch_8bit
from fastattn.gpu.spec import Call, Spec, make_spec
from tests.tools.gpu import interpreter
from tests.tools.gpu.caches_8bit import EIGHT, Eight, judge_eight
from tests.tools.gpu.calls import serving_call
from tests.tools.gpu.emulator import Memory, emulated
from tests.tools.gpu.roles_8bit import check, play
from tests.tools.problems import NUMPY

WIDENED = [Eight("bfloat16", "float8_e5m2", scales="batch", new="sixteen"), Eight("float16", page=None),
           Eight("float8_e4m3fn", scales="batch", rows=5)]


def attended(call: Call, spec: Spec, launcher: Any) -> Any:
    """The call over widened caches, which the split-key kernel runs here: the interpreter has no wgmma."""
    return widen_launch.prepare(
        call, lambda wide: decode.prepare_caches(wide, make_spec(wide.problem, wide.operands, spec.lse), launcher), launcher)


@pytest.mark.parametrize(("given", "most"), [*((given, 1 << 30) for given in WIDENED), (Eight(scales="batch"), 40000),
                                             (Eight(scales="number", page=None), 1 << 17),
                                             (Eight(scales="head", rows=(2, 0, 3)), 1 << 18)], ids=str)
def test_a_widened_call(given: Eight, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widen_launch, "WIDEN_BYTES", most)
    made, memory = given.make(), interpreter.Memory()
    call = serving_call(made, lambda x: memory.place(x, convert.view(x, "test", "x")))
    alone = caches.attention_alone(call)[0]
    assert widen_launch.refuses(alone) is None and (most > 1 << 20) == (len(widen_launch.parts_of(alone) or ()) == 1)
    launcher = interpreter.Launcher(memory)
    family = caches.Cached(SimpleNamespace(refuses=lambda call, d: None, prepare=attended))
    family.prepare(call, make_spec(call.problem, call.operands, True), launcher)(call, 0)
    found = [memory.read(x, y.dtype) for x, y in zip((call.operands.k, call.operands.v), made.arrays[1:3], strict=True)]
    assert call.lse is not None
    judge_eight(given, memory.read(call.out, NUMPY[call.problem.out_dtype]), memory.read(call.lse, np.float32), *found, most_lse=2e-3)


def call_of(given: Eight, **more: Any) -> Call:
    memory = interpreter.Memory()
    call = serving_call(given.make(), lambda x: memory.place(x, convert.view(x, "test", "x")), **more)
    return caches.attention_alone(call)[0]


@pytest.mark.parametrize(("given", "reason"), [
    (Eight("float16", scales="head"), "may leave float16"), (Eight(dim=72), "whole, aligned pieces"),
    (EIGHT[0]._replace(q="float16", scales="number"), "may leave float16")], ids=str)
def test_what_is_not_widened(given: Eight, reason: str) -> None:
    assert reason in (widen_launch.refuses(call_of(given)) or "")


def test_a_window_is_not_widened() -> None:
    call = call_of(Eight())
    windowed = replace(call, problem=replace(call.problem, mask=replace(call.problem.mask, left=5)))
    assert "window" in (widen_launch.refuses(windowed) or "")


def test_many_rows_are_widened_on_hopper() -> None:
    """Prompts are, steps of decoding are not."""
    for rows, kernels in ((300, ["widen_keys", "forward_sm90"]), (1, ["forward_decode"])):
        call, launcher = call_of(Eight(rows=rows, dim=128)), Listing(absent_device("sm_90a"))
        assert sm90.refuses(call, launcher.device) is None
        sm90.prepare(call, make_spec(call.problem, call.operands, False), launcher)
        assert [source.key.split()[0] for source in launcher.sources] == kernels


@pytest.mark.parametrize("arguments", [("float8_e4m3fn", "float8_e4m3fn", "bfloat16", False, True),
                                       ("float8_e5m2", "float8_e4m3fn", "float16", True, False)])
def test_the_kernel_compiles(arguments: tuple[Any, ...]) -> None:
    assert compiler.complaints(compiler.build(widen_launch.widen_source(*arguments), "sm_90a")[1]) == []


# ---------------------------------------------------------------- 8-bit q, too: 8-bit products
@pytest.mark.parametrize(("page", "most"), [(16, 1 << 30), (None, 1 << 30), (16, 60000)])
def test_what_8_bit_products_read_in_python(page: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """K beside itself and V transposed, of the keys that each request has, in all parts; and the values that the forward gets."""
    monkeypatch.setattr(widen_launch, "WIDEN_BYTES", most)
    made, memory = Eight("float8_e4m3fn", scales="batch", page=page, rows=30).make(), Memory()
    call = serving_call(made, lambda x: convert.view(x, "test", "x"))
    for x in (*caches.views_of(call), call.operands.seqused_k):
        memory.allow(x)
    made_of, config = [], launch_8bit.choose_forward_8bit(launch_8bit.spec_of(call))
    order = (np.array(KEY_OF) + 32 * np.arange(config.block_n // 32)[:, None]).ravel()
    for part in widen_launch.parts_of(call) or ():
        some = widen_launch.of_part(call, part)
        p, (b, _), (h, _) = some.problem, part.requests, part.heads
        vt = np.full(launch_8bit.transposed(some, config, 0).shape, 0xEE, np.uint8)
        k = np.full((p.batch, p.seqlen_k, p.num_heads_k, p.head_dim), 0xEE, np.uint8)
        scales = np.full((p.batch, p.num_heads_k, 2), np.nan, np.float32)
        for x in (vt.view(np.int32), k.view(np.int32), scales):
            memory.allow(convert.view(x, "test", "x"))
        with emulated(memory) as machine:
            launch_8bit.transpose_cached(some, config, vt.ctypes.data, scales.ctypes.data, k.ctypes.data, machine.launcher(), 0)
        vt = vt.reshape(p.batch, p.num_heads_k, -1, config.block_n // config.panel, p.head_dim, config.panel)
        for i in range(p.batch):
            keys = made.case.keys[b + i]
            own = [x[b + i] for x in made.arrays[1:3]]
            if page is not None:        # entries that are not read may be anything
                table = np.clip(made.options["block_table"][b + i], 0, len(made.arrays[1]) - 1)
                own = [x[table].reshape(-1, *x.shape[2:]) for x in made.arrays[1:3]]
            rows = [np.ascontiguousarray(x[:, h:h + p.num_heads_k]).view(np.uint8) for x in own]
            assert np.array_equal(k[i, :keys], rows[0][:keys]) and (k[i, keys:] == 0xEE).all()
            for n in range(max(-(-keys // config.block_n), 1)):
                block = np.zeros((config.block_n, p.num_heads_k, p.head_dim), np.uint8)
                there = max(min(keys - n * config.block_n, config.block_n), 0)
                block[:there] = rows[1][n * config.block_n:n * config.block_n + there]
                want = block[order].reshape(-1, config.panel, p.num_heads_k, p.head_dim).transpose(2, 0, 3, 1)
                assert np.array_equal(vt[i, :, n], want)
        k_scale, q_scale = (made.options[name][b:, h:][:p.batch, :p.num_heads_k] for name in ("k_scale", "q_scale"))
        np.testing.assert_allclose(scales[..., 0], p.head_dim**-0.5 * np.log2(np.e) * k_scale * q_scale, rtol=1e-6)
        made_of.append(part)
    assert (len(made_of) == 1) == (most > 1 << 20)


@pytest.mark.parametrize(("rows", "dim", "kernels"), [
    (300, 128, ["transpose_8bit", "forward_sm90_8bit"]), (1, 128, ["forward_decode", "rescale"]),
    (300, 96, ["forward_sm90", "rescale", "widen_keys"])])
def test_many_rows_of_an_8_bit_q(rows: int, dim: int, kernels: list[str]) -> None:
    memory, launcher = interpreter.Memory(), Listing(absent_device("sm_90a"))
    call = serving_call(Eight("float8_e4m3fn", rows=rows, dim=dim).make(), lambda x: memory.place(x, convert.view(x, "test", "x")))
    gpu._launch(call, launcher, ("sm90",), 0)
    assert sorted({source.key.split()[0] for source in launcher.sources}) == sorted(kernels)


@pytest.mark.parametrize("new", ["eight", None])
def test_every_block_of_each_request_once(new: str | None) -> None:
    """The forward's protocol over K and V of requests with lengths of their own, one of them with none before the call."""
    made = Eight("float8_e4m3fn", rows=200, dim=128, new=new).make()
    call = serving_call(made, lambda x: convert.view(x, "test", "x"))
    call = replace(call, lse=None)
    after = [n + 200 * (new is not None) for n in made.case.keys]
    for seed in range(2):
        check(play(call, seed), call, [(b, 0, 200, 0, n) for b, n in enumerate(after)])


def test_the_forward_over_caches_compiles() -> None:
    spec = Spec("float8_e4m3fn", 128, 128, right=True, out_dtype="bfloat16", lengths=True)
    made = launch_8bit.forward_program(spec, launch_8bit.choose_forward_8bit(spec), "float8_e4m3fn", "float8_e4m3fn")
    assert compiler.complaints(compiler.build(made.source, "sm_90a")[1]) == []
