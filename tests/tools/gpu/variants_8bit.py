"""Tilings of the 8-bit forward beside each other, in one run: `python -m tests.tools.gpu.variants_8bit [--dim 128] [--only parked]`.

Each line is a tiling of sm90/forward_8bit.py: TFLOP/s full and causal at 4096, 8192 and 16384 keys (16384 tokens, 16 heads, bfloat16
output, V's transposition included), and rms errors over 16384 keys against float64 of the quantised inputs, for a normal and a positive V,
and for scores that few keys dominate. Above them are our kernels on 16-bit operands. Medians of rounds in which all take turns. `--compile`
needs no GPU: registers, and what the compiler complains about.
"""
from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.sm90 import launch_8bit
from fastattn.gpu.sm90.config_8bit import Forward8BitConfig
from fastattn.gpu.spec import Call, Spec

TOKENS, HEADS, KEYS = 16384, 16, (4096, 8192, 16384)
E4M3 = "float8_e4m3fn"
BASE: dict[str, Any] = {"block_m": 128, "block_n": 128, "out_panels": 2, "optimistic": False, "turns": True}
HURRIED: dict[str, Any] = {"optimistic": True, "offset": 3}
THREE: dict[str, Any] = {"block_m": 192, "out_panels": 1, "parked": True, "gather": 4}
# "sure": maxima in every step. gather N: sums of N blocks. parked: O in shared memory. 3 x: three consumer warpgroups
VARIANTS: dict[int, dict[str, dict[str, Any]]] = {
    128: {
        "shipped, turns": {}, "shipped, no turns": {"turns": False},
        "gather 2": {"gather": 2}, "gather 2, no turns": {"gather": 2, "turns": False}, "gather 4": {"gather": 4},
        "optimistic": HURRIED, "optimistic gather 2": {**HURRIED, "gather": 2},
        "optimistic gather 2, no turns": {**HURRIED, "gather": 2, "turns": False}, "optimistic gather 4": {**HURRIED, "gather": 4},
        "optimistic gather 2, 1/8 polynomial": {**HURRIED, "gather": 2, "polynomial": 8, "degree": 3},
        "optimistic gather 2, 1/4 polynomial": {**HURRIED, "gather": 2, "polynomial": 4, "degree": 2},
        "160 parked 2": {"block_n": 160, "parked": True, "gather": 2},
        "192 parked 2": {"block_n": 192, "parked": True, "gather": 2},
        "192 parked 2, no turns": {"block_n": 192, "parked": True, "gather": 2, "turns": False},
        "224 parked 2": {"block_n": 224, "parked": True, "gather": 2, "out_panels": 0},
        "192 parked 2 optimistic": {**HURRIED, "block_n": 192, "parked": True, "gather": 2},
        "192 parked 2 optimistic, no turns": {**HURRIED, "block_n": 192, "parked": True, "gather": 2, "turns": False},
        "192 parked 2 optimistic, 1/8 polynomial": {**HURRIED, "block_n": 192, "parked": True, "gather": 2, "polynomial": 8},
        "3 x 64 parked 4": {**THREE, "block_n": 64}, "3 x 96 parked 4": {**THREE, "block_n": 96},
        "3 x 96 parked 4, no turns": {**THREE, "block_n": 96, "turns": False},
        "3 x 96 parked 4 optimistic": {**THREE, **HURRIED, "block_n": 96},
        "3 x 96 parked 4 optimistic, no turns": {**THREE, **HURRIED, "block_n": 96, "turns": False},
    },
    64: {
        "shipped": {"block_n": 192, "out_panels": 1}, "gather 2": {"block_n": 192, "out_panels": 1, "gather": 2},
        "optimistic gather 2": {**HURRIED, "block_n": 192, "out_panels": 1, "gather": 2},
        "optimistic gather 2, 1/4 polynomial": {**HURRIED, "block_n": 192, "out_panels": 1, "gather": 2, "polynomial": 4, "degree": 2},
    },
}


def configs(dim: int, only: str) -> Iterator[tuple[str, Forward8BitConfig]]:
    for name, settings in VARIANTS[dim].items():
        if only in name:
            yield name, Forward8BitConfig(**{**BASE, **settings})


def compile_all(dim: int, only: str) -> None:
    for name, config in configs(dim, only):
        for right in (False, True):
            spec = Spec(E4M3, dim, dim, right=right, lse=False, out_dtype="bfloat16")
            source, _ = launch_8bit.forward_program(spec, config, E4M3, E4M3)
            report = compiler.build(source, "sm_90a")[1]
            found = [line.split(" for the function")[0] for line in compiler.complaints(report)]
            print(f"{name:44} {'causal' if right else 'full':6} {compiler.registers(report)} {'; '.join(found) or 'clean'}", flush=True)


# ---------------------------------------------------------------- on a device
def prepared(q: Any, k: Any, v: Any, causal: bool, config: Forward8BitConfig) -> tuple[Callable[[], Any], Any]:
    """(what runs the forward with this tiling, its output and what must live as long)."""
    import torch

    import fastattn
    from fastattn.explanation import _catch
    from fastattn.gpu.runtime.device import current
    from fastattn.gpu.runtime.launcher import on_device
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    caught = _catch(fastattn.attention, (q, k, v), {"causal": causal, "out": out})
    operands, view, *_ = caught.where
    call, launcher = Call(caught.problem, operands, view, None), on_device(0)
    with current(launcher.device):
        launch = launch_8bit.prepare_as(call, config, launcher)

    def run() -> Any:
        with current(launcher.device):
            launch(call, torch.cuda.current_stream().cuda_stream)
    return run, (out, q, k, v)


def seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median device seconds of each, in turns."""
    import torch
    found: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds + 1):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            call()
            torch.cuda._sleep(400_000)
            begin.record()
            for _ in range(4):
                call()
            end.record()
            end.synchronize()
            if n:
                found[name].append(begin.elapsed_time(end) * 1e-3 / 4)
    return {name: statistics.median(x) for name, x in found.items()}


def errors(dim: int, config: Forward8BitConfig, kind: str) -> float:
    """Of 128 rows of one head over 16384 keys: rms of the difference over rms of the exact output."""
    import torch
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 16384, 1, dim, device="cuda") for _ in range(3))
    if kind == "positive":
        v = v.abs()
    if kind == "spread":
        q = 3 * q
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (q[:, -128:], k, v))
    run, (out, *_) = prepared(q, k, v, False, config)
    run()
    torch.cuda.synchronize()
    a, b, c = (x.double()[0, :, 0] for x in (q, k, v))
    exact = torch.softmax(a @ b.T * dim ** -0.5, dim=-1) @ c
    return float((out.double()[0, :, 0] - exact).norm() / exact.norm())


def tables(dim: int, only: str, rounds: int) -> None:
    import torch

    import fastattn
    heads = HEADS * 128 // dim
    rates: dict[str, list[str]] = {}
    for causal in (False, True):
        for keys in KEYS:
            batch = TOKENS // keys
            wide = [torch.randn(batch, keys, heads, dim, device="cuda").bfloat16() for _ in range(3)]
            narrow = [x.to(torch.float8_e4m3fn) for x in wide]
            calls: dict[str, Callable[[], Any]] = {"bfloat16 operands": partial(fastattn.attention, *wide, causal=causal)}
            kept = []
            for name, config in configs(dim, only):
                calls[name], alive = prepared(*narrow, causal, config)
                kept.append(alive)
            flops = 4 * batch * heads * keys * keys * dim / (2 if causal else 1)
            for name, s in seconds(calls, rounds).items():
                rates.setdefault(name, []).append(f"{flops / s / 1e12:6.0f}")
    print(f"\nhead_dim {dim}, TFLOP/s      {'full 4k, 8k, 16k':24} {'causal':24} rms error: normal, positive, spread")
    for name, row in rates.items():
        config = dict(configs(dim, only)).get(name)
        found = "" if config is None else " ".join(f"{errors(dim, config, kind):.1e}" for kind in ("normal", "positive", "spread"))
        print(f"{name:42} {' '.join(row[:3]):24} {' '.join(row[3:]):24} {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, choices=sorted(VARIANTS), default=128)
    parser.add_argument("--only", default="", help="tilings whose name has this text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="only compile, without a GPU")
    given = parser.parse_args()
    if given.compile:
        compile_all(given.dim, given.only)
    else:
        tables(given.dim, given.only, given.rounds)


if __name__ == "__main__":
    main()
