"""Tilings of the Hopper kernels beside each other and beside torch's backends, in one run: `python -m tests.tools.gpu.variants`.

A trial (trials.py) is a call and several ways to run it. Each line has a trial's times in microseconds, medians of rounds in which all take
turns, and behind them the largest difference of any variant's results from those of the first, relative to their largest element.
`--compile` needs no GPU: registers, and what the compiler complains about.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from fastattn import gpu
from fastattn.gpu.precompile import absent_device, sources
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.sm90 import launch
from fastattn.gpu.spec import BackwardCall, Call, Spec

from .trials import TRIALS, Trial, Variant

ARCH = "sm_90a"


@contextmanager
def chosen(variant: Variant) -> Iterator[None]:
    """Inside, launches are what the variant says."""
    tiling, own = variant.tiling, launch._backward_config

    def choice(spec: Spec, seqlen_k: int, seqlen_q: int, *more: Any) -> Any:
        return tiling, launch.forward_program(spec, tiling)

    def backward(spec: Spec, *given: Any) -> Any:
        return replace(own(spec, *given), **variant.backward)
    one = (lambda call: True) if variant.sm80 else launch.sm80.one_tile
    with (patch.object(launch.sm80, "one_tile", one), patch.object(launch.sm80, "_forward_config", (lambda *_: variant.sm80) if variant.sm80
                                                                   else launch.sm80._forward_config),
          patch.object(launch, "_choice", choice if tiling else launch._choice),
          patch.object(launch, "choose_dq", (lambda *_: variant.dq) if variant.dq else launch.choose_dq),
          patch.object(launch, "_backward_config", backward if variant.backward else own),
          patch.object(launch, "head_group", (lambda *_: variant.heads) if variant.heads else launch.head_group)):
        yield


# ---------------------------------------------------------------- compiling
def kernels(trials: list[Trial]) -> Iterator[tuple[str, str, str]]:
    """(trial, variant, key) of each kernel, once; the backwards, which take longest, first."""
    found: dict[str, tuple[str, str, str]] = {}
    for trial in trials:
        for name, variant in trial.variants.items():
            with chosen(variant):
                for source in sources(*trial.want.call(), absent_device(ARCH)):
                    found.setdefault(source.key, (trial.name, name, source.key))
        if trial.want.backward:         # its lse
            for source in sources(*replace(trial.want, backward=False, lse=True).call(), absent_device(ARCH)):
                found.setdefault(source.key, (trial.name, "", source.key))
    return iter(sorted(found.values(), key=lambda job: not job[2].startswith("backward")))


def build(trial: str, variant: str, key: str) -> str:
    """In a worker process: compile a kernel into the cache."""
    of = TRIALS[trial]
    want, how = (of.want, of.variants[variant]) if variant else (replace(of.want, backward=False, lse=True), Variant())
    try:
        with chosen(how):
            source = next(source for source in sources(*want.call(), absent_device(ARCH)) if source.key == key)
            compiler.binary(source, ARCH, announce=False)
        return f"{key}: compiled"
    except Exception as error:
        return f"{key}: FAILED {type(error).__name__} {str(error)[:120]}"


def report(trial: Trial, name: str) -> Iterator[str]:
    """What the compilers say of a variant's kernels."""
    with chosen(trial.variants[name]):
        for source in sources(*trial.want.call(), absent_device(ARCH)):
            if source.key.startswith(("forward", "backward")):
                said = compiler.build(source, ARCH)[1]
                found = [line.split(" for the function")[0] for line in compiler.complaints(said)]
                yield f"{compiler.registers(said)}, {source.make()[1]} bytes shared; {'; '.join(found) or 'clean'} | {source.key[:100]}"


# ---------------------------------------------------------------- on a device
def tensors(call: Any, lengths: list[int] | None) -> list[Any]:
    """A tensor for each view of the call, in their order."""
    import torch
    torch.manual_seed(1)
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32}

    def fill(x: Any) -> Any:
        if x.dtype == "int32":
            steps = [0, *(lengths or [])]
            return torch.tensor(steps, dtype=torch.int32, device="cuda").cumsum(0).int()
        return torch.randn(x.shape, device="cuda", dtype=kinds[x.dtype])
    found: dict[int, Any] = {}
    return [found.setdefault(id(x), fill(x)) for x in call.views if x is not None]


class Timed:
    """A trial on the device: its tensors, and calls by the variants' and rivals' names."""

    def __init__(self, trial: Trial) -> None:
        self.trial, (call, _) = trial, trial.want.call()
        self.call, self.tensors = call, tensors(call, trial.lengths)
        self.calls: dict[str, Callable[[], Any]] = {}
        self.results: dict[str, list[Any]] = {}
        self.count = sum(x is not None for x in call.views)

    def prepare(self) -> None:
        if isinstance(self.call, BackwardCall):
            self._forward()
        for name, variant in self.trial.variants.items():
            try:
                with chosen(variant):
                    recording = gpu._record(self.call, gpu.FAMILIES)
                self.calls[name] = self._runner(recording)
                for x in self._outputs():
                    x.fill_(float("nan"))
                self.calls[name]()
                self.results[name] = [x.float().clone() for x in self._outputs()]
            except Exception as error:
                self.calls.pop(name, None)
                print(f"{self.trial.name}, {name}: FAILED {type(error).__name__} {str(error)[:200]}", flush=True)
        self._rivals()

    def _runner(self, recording: Any) -> Callable[[], None]:
        import torch
        addresses = [x.data_ptr() for x in self.tensors]
        return lambda: recording(addresses, torch.cuda.current_stream().cuda_stream)

    def _at(self, name: str) -> Any:
        """The tensor of an operand or result."""
        views = [x for x in self.call.views if x is not None]
        o = self.call.operands
        owner = {"q": o.q, "k": o.k, "v": o.v, "bias": o.bias, "sinks": o.sinks, "out": self.call.out, "lse": self.call.lse}
        if isinstance(self.call, BackwardCall):
            g = self.call.grads
            owner |= {"dq": g.dq, "dk": g.dk, "dv": g.dv, "dout": self.call.dout}
        wanted = owner[name]
        return next(t for t, x in zip(self.tensors, views, strict=True) if x is wanted)

    def _outputs(self) -> list[Any]:
        names = ("dq", "dk", "dv") if isinstance(self.call, BackwardCall) else ("out",)
        return [self._at(name) for name in names]

    def _forward(self) -> None:
        """out and lse of a backward; both views of the Want's out are one, so dout gets a tensor of its own."""
        import torch
        views = [x for x in self.call.views if x is not None]
        first = next(n for n, x in enumerate(views) if x is self.call.dout)     # dout, out
        self.tensors[first] = torch.randn_like(self.tensors[first])
        c = self.call
        forward = Call(c.problem, c.operands, c.out, c.lse)
        recording = gpu._record(forward, gpu.FAMILIES)
        wanted = [x for x in forward.views if x is not None]
        addresses = [self.tensors[max(n for n, y in enumerate(views) if y is x)].data_ptr() for x in wanted]
        recording(addresses, torch.cuda.current_stream().cuda_stream)

    def _rivals(self) -> None:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        w = self.trial.want
        if w.packed or w.window or w.sinks:
            return
        backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
        backward = isinstance(self.call, BackwardCall)
        q, k, v = (self._at(name).transpose(1, 2).detach().requires_grad_(backward) for name in "qkv")
        group = q.shape[1] != k.shape[1]
        bias = self._at("bias") if w.bias else None
        for name in self.trial.rivals:
            def forward(backend: Any = backends[name]) -> Any:
                with sdpa_kernel([backend]):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, is_causal=bool(w.causal), enable_gqa=group)
            try:
                if backward:
                    out, dout = forward(), self._at("dout").transpose(1, 2)
                    self.calls[name] = lambda out=out, dout=dout: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
                    self.results[name] = [x.transpose(1, 2).float() for x in self.calls[name]()]
                else:
                    self.calls[name] = forward
                    self.results[name] = [forward().transpose(1, 2).float()]
            except Exception as error:
                self.calls.pop(name, None)
                print(f"{self.trial.name}, {name}: {type(error).__name__} {str(error)[:80]}", flush=True)

    def difference(self) -> str:
        """The largest one of each result from the first variant's."""
        names = list(self.results)
        found = []
        for name in names[1:]:
            pairs = zip(self.results[names[0]], self.results[name], strict=True)
            found.append(max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs))
        return " ".join(f"{x:.0e}" for x in found)

    def times(self, rounds: int) -> dict[str, float]:
        """Median microseconds of each, in turns."""
        import torch
        found: dict[str, list[float]] = {name: [] for name in self.calls}
        repeats = self.trial.repeats
        for n in range(rounds + 1):
            for name, call in self.calls.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(1_500_000 if repeats > 1 else 1000)
                begin.record()
                for _ in range(repeats):
                    call()
                end.record()
                end.synchronize()
                if n:
                    found[name].append(begin.elapsed_time(end) * 1e3 / repeats)
        return {name: statistics.median(x) for name, x in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="trials whose name matches this expression")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="no trial begins later than so long after the start")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--compile", action="store_true", help="only compile, without a GPU")
    given = parser.parse_args()
    start, trials = time.perf_counter(), [x for name, x in TRIALS.items() if re.search(given.only, name)]
    if given.compile:
        for trial in trials:
            for name in trial.variants:
                for line in report(trial, name):
                    print(f"{trial.name}, {name}: {line}", flush=True)
        return
    needed = list(kernels(trials))
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(build, *job) for job in needed]):
            if "FAILED" in done.result():
                print(done.result(), flush=True)
    print(f"{len(needed)} kernels in {time.perf_counter() - start:.0f} s", flush=True)
    for trial in trials:
        if time.perf_counter() - start > given.seconds:
            print(f"{trial.name}: no time left", flush=True)
            continue
        try:
            timed = Timed(trial)
            timed.prepare()
            text = " ".join(f"{name} {us:.1f}," for name, us in timed.times(given.rounds).items())
            print(f"{trial.name}: {text} differences {timed.difference()}", flush=True)
        except Exception:
            print(f"{trial.name}: FAILED {traceback.format_exc(limit=-2)[-300:]}", flush=True)


if __name__ == "__main__":
    main()
