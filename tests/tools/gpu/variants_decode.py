"""Tilings of the split-key kernel beside each other, in one run: `python -m tests.tools.gpu.variants_decode [--only "1 x 1024"]`.

Each line is a case: microseconds of each tiling in a CUDA graph that goes round copies of the cache, of torch's backends where the cache is
contiguous, and of attention_with_kvcache as it is. First the largest error of each tiling beside float64. Medians of rounds in which all
take turns. `--compile` needs no GPU: registers, and what the compiler complains about.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import fastattn
from bench import serve
from fastattn.arrays.view import numpy_dtype
from fastattn.explanation import _catch
from fastattn.gpu.decode import launch as decode
from fastattn.gpu.decode.config import choose_cached
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.launcher import Launcher, Listing, on_device
from fastattn.gpu.spec import Call, Launch, make_spec

ARCH = "sm_90a"
WIDE, RING = {"warps": 8, "blocks_per_sm": 1}, {"stages": 3}
EARLY, TWO = {"early": True}, {"row_tiles": 2, "keep_q": True}
CLUSTER: dict[str, Any] = {"overhead": 1, "early": True}
TURNED: dict[str, Any] = {"columns": True}          # the queries
T16, T32 = (TURNED | {"keys": n} for n in (16, 32))
KEPT, EIGHT = {"keep_q": True}, WIDE | EARLY
THREE, FIVE = ({"blocks_per_sm": n} for n in (3, 5))
PAIR: dict[str, Any] = {"cluster": 2, "overhead": 1, "early": True}
SMALL: dict[str, dict[str, Any]] = {
    "8 warps": EIGHT, "cluster 8": CLUSTER | {"cluster": 8}, "T16, 8 warps": T16 | EIGHT, "T16, cluster 8": T16 | CLUSTER | {"cluster": 8}}
LARGE: dict[str, dict[str, Any]] = {"registers": {}, "8 warps": EIGHT, "T16": T16, "T16, 8 warps": T16 | EIGHT}
HUGE = {"8 keys": {}, "8 keys, 8 warps": EIGHT, "T16": T16 | KEPT, "T16, 8 warps": T16 | KEPT | EIGHT}
HALF = {"registers": {}, "8 warps": EIGHT, "T32, 8 warps": T32 | EIGHT}
HEADS = {"16 keys, 3": EARLY | THREE | KEPT | {"keys": 16}, "T16, 3": T16 | EARLY | THREE, "T32, 3": T32 | EARLY | THREE,
         "T32, 2 of 3 warps": T32 | PAIR | FIVE | {"warps": 3}, "T16, 2 of 3 warps": T16 | PAIR | FIVE | {"warps": 3}}
ROWS = {"registers": {}, "2 tiles, early": TWO | EARLY | {"row_warps": 1}, "2 tiles, 8 warps, early": TWO | WIDE | EARLY | {"row_warps": 1}}
MORE_ROWS = {"registers": {}, "ring 3": RING, "ring 3, early": RING | EARLY, "2 x 2 tiles, early": TWO | EARLY,
             "2 x 2 tiles, 8 warps, early": TWO | WIDE | EARLY, "2 x 2 tiles, ring 2, early": TWO | EARLY | {"stages": 2}}


@dataclass(frozen=True)
class Group:
    """Cases with the tilings that run them."""

    name: str
    cases: tuple[serve.Case, ...]
    variants: dict[str, dict[str, Any]]


def _case(name: str, batch: int, keys: int, **more: Any) -> serve.Case:
    return serve.Case(name, (keys,) * batch, **{"page": 0, **more})


def _ragged(name: str, **more: Any) -> serve.Case:
    return serve.Case(name, (65536,) + (512,) * 255, **more)


GROUPS = (
    Group("rows", (_case("8 speculative rows", 16, 8192, rows=8), _case("8 rows, 1 x 8192", 1, 8192, rows=8)), ROWS),
    Group("heads", (_case("Whisper, 320 heads x 1500", 16, 1500, dim=64, heads=20, heads_k=20),), HEADS),
    Group("huge", (_case("head_dim 256", 16, 8192, dim=256), _case("head_dim 256, page 64", 16, 8192, dim=256, page=64)), HUGE),
    Group("more rows", (_case("16 speculative rows", 16, 8192, rows=16),), MORE_ROWS),
    Group("eight", (_case("8 bits, 8 speculative rows", 16, 8192, rows=8, page=64, eight=True),),
          {"registers": {}, "2 tiles, early": TWO | EARLY | {"row_warps": 1, "keys": 16},
           "2 tiles, 8 warps, early": TWO | WIDE | EARLY | {"row_warps": 1, "keys": 16}}),
    Group("eight", (_case("8 bits 16 x 8192", 16, 8192, page=64, eight=True),),
          {"registers": {}, "early": EARLY, "3 blocks, 16 keys, early": THREE | KEPT | EARLY | {"keys": 16}}),
    Group("ragged", (_ragged("ragged"),), {"registers": {}, "T16, 3": T16 | THREE, "T32": T32}),
    Group("large", (_case("16 x 1024", 16, 1024), _case("64 x 1024", 64, 1024), _case("16 x 8192", 16, 8192), _case("64 x 8192", 64, 8192),
                    _case("page 64 16 x 8192", 16, 8192, page=64), _case("page 64 64 x 1024", 64, 1024, page=64)), LARGE),
    Group("half", (_case("head_dim 64", 16, 8192, dim=64), _case("1 x 8192, head_dim 64", 1, 8192, dim=64)), HALF),
    Group("small", (_case("1 x 8192", 1, 8192), _case("1 x 1024", 1, 1024), _case("1 x 2048", 1, 2048), _case("1 x 32768", 1, 32768),
                    _case("page 64 1 x 8192", 1, 8192, page=64)), SMALL))


def chosen(only: str) -> Iterator[tuple[serve.Case, dict[str, dict[str, Any]]]]:
    for group in GROUPS:
        for case in group.cases:
            if re.search(only, f"{group.name}: {case.name}"):
                yield case, group.variants


# ---------------------------------------------------------------- a tiling's launches
def launch_of(call: Call, launcher: Launcher, settings: dict[str, Any] | None) -> Launch:
    """decode.prepare_caches with a tiling that differs from the plain one by `settings`; None: the chosen one."""
    def table(call: Call) -> Any:
        assert call.operands.cache is not None
        return call.operands.cache.block_table
    p, spec, cache = call.problem, make_spec(call.problem, call.operands, False), decode.KeyCache(False, table, None)
    assert p.cache is not None
    if settings is None:
        return decode.prepare(call, spec, launcher, cache)
    if p.eight_bit is not None:
        spec = replace(spec, cache_dtype=call.operands.k.dtype, out_dtype=p.eight_bit.out_dtype)
    base = replace(choose_cached(spec, p, None), native=p.eight_bit is not None, warps=4, blocks_per_sm=2, stages=0, cluster=1, early=False,
                   overhead=4)
    config = replace(base, **settings)
    return decode.prepare(call, make_spec(p, call.operands, False), launcher, cache, config)


def call_of(arguments: tuple[Any, ...], options: dict[str, Any]) -> Call:
    caught = _catch(fastattn.attention_with_kvcache, arguments, options)
    operands, out, *_ = caught.where
    return Call(caught.problem, operands, out, None)


def sources_of(case: serve.Case, settings: dict[str, Any] | None) -> list[compiler.Source]:
    """A tiling's kernels. No GPU is needed, and arrays are not touched."""
    size, batch = case.page or max(case.lengths), len(case.lengths)
    pages = [-(-n // size) for n in case.lengths]
    kind = numpy_dtype("float8_e4m3fn" if case.eight else "bfloat16")
    k, v = (np.empty((sum(pages), size, case.heads_k, case.dim), kind) for _ in range(2))
    q, table = np.empty((batch, case.rows, case.heads, case.dim), numpy_dtype("bfloat16")), np.zeros((batch, max(pages)), np.int32)
    launcher = Listing(absent_device(ARCH))
    call = call_of((q, k, v), {"cache_seqlens": np.array(case.lengths, np.int32), "block_table": table})
    launch_of(call, launcher, settings)
    return launcher.sources


def compiled(case: serve.Case, settings: dict[str, Any] | None, only_report: bool) -> str:
    """What the compiler says about a tiling's kernels; or put them into the cache."""
    sources = sources_of(case, settings)
    if not only_report:
        return "" if all(compiler.cached(source, ARCH) for source in sources) else "not in the cache"
    reports = [compiler.build(source, ARCH)[1] for source in sources]
    return ", ".join(f"{compiler.registers(report)} {'; '.join(compiler.complaints(report)) or 'clean'}" for report in reports)


def compile_all(only: str, workers: int, only_report: bool) -> None:
    jobs, seen = dict[tuple[str, str], Any](), set[tuple[str, ...]]()
    for case, variants in chosen(only):
        for name, settings in {**variants, "as it is": None}.items():
            keys = tuple(source.key for source in sources_of(case, settings))
            if keys not in seen:
                seen.add(keys)
                jobs[case.name, name] = case, settings, only_report
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = {key: pool.submit(compiled, *job) for key, job in jobs.items()}
        for (case, name), future in found.items():
            try:
                said = future.result()
            except Exception as error:          # one tiling must not end the others
                said = f"failed: {type(error).__name__} {' '.join(str(error).split())[:100]}"
            if said:
                print(f"{case:28} {name:24} {said}", flush=True)


# ---------------------------------------------------------------- on a device
def wanted(inputs: serve.Inputs) -> dict[int, Any]:
    """The output in float64 of the first and the last request."""
    import torch
    case, found = inputs.case, dict[int, Any]()
    for b in {0, len(case.lengths) - 1}:
        n, pages, group = case.lengths[b], inputs.table[b, :inputs.needed[b]].long(), case.heads // case.heads_k
        k, v = (x[pages].flatten(0, 1)[:n].float().double().repeat_interleave(group, 1) for x in (inputs.k_cache, inputs.v_cache))
        s = torch.einsum("rhd,khd->hrk", inputs.q[b].double(), k) * case.dim ** -0.5
        hidden = torch.arange(n, device="cuda") > torch.arange(case.rows, device="cuda")[:, None] + (n - case.rows)
        found[b] = torch.einsum("hrk,khd->rhd", s.masked_fill(hidden, float("-inf")).softmax(-1), v)
    return found


def error_of(want: dict[int, Any], out: Any) -> float:
    """The largest difference of all rows and heads, relative to the largest number."""
    return max(float((out[b].double() - x).abs().max() / x.abs().max()) for b, x in want.items())


def running(inputs: serve.Inputs, settings: dict[str, Any]) -> Callable[[], Any]:
    """Runs a tiling and returns its output."""
    import torch

    from fastattn.gpu.runtime.device import current
    out, launcher = torch.empty_like(inputs.q), on_device(0)
    call = call_of((inputs.q, inputs.k_cache, inputs.v_cache), {"cache_seqlens": inputs.before, "block_table": inputs.table, "out": out})
    with current(launcher.device):
        launch = launch_of(call, launcher, settings)

    def run() -> Any:
        with current(launcher.device):
            launch(call, torch.cuda.current_stream().cuda_stream)
        return out
    return run


def in_graph(calls: list[Callable[[], Any]], count: int) -> Any:
    """A graph of `count` calls, in turns."""
    import torch
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for n in range(count):
                calls[n % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def times(graphs: dict[str, Any], count: int, rounds: int) -> dict[str, float]:
    """Median microseconds of a call of each graph, in turns."""
    import torch
    found: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(rounds):
        for name, graph in graphs.items():
            torch.cuda._sleep(100_000)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end) * 1e3 / count)
    return {name: statistics.median(x) for name, x in found.items()}


def measure(case: serve.Case, variants: dict[str, dict[str, Any]], rounds: int) -> str:
    """A line of times, and one of what failed."""
    import torch
    copies = max(1, min(16, -(-(200 << 20) // case.cache_bytes)))
    inputs, graphs, notes = [serve.Inputs(case, seed) for seed in range(copies)], dict[str, Any](), list[str]()
    kept = list[Any]()          # what graphs write to: they do not keep it
    want = wanted(inputs[0])
    count = copies * max(1, 48 // copies) if case.cache_bytes < 1 << 28 else 2 * copies
    makers: dict[str, Callable[[serve.Inputs], Callable[[], Any]]] = {
        **{name: partial(running, settings=settings) for name, settings in variants.items()}, "as it is": lambda x: x.fastattn(),
        "cuDNN": lambda x: x.sdpa("cuDNN"), "flash": lambda x: x.sdpa("flash")}
    for name, make in makers.items():
        try:
            calls = [make(x) for x in inputs]
            kept.append(calls)
            out = calls[0]()
            torch.cuda.synchronize()
            if name not in ("cuDNN", "flash") and not (error := error_of(want, out)) < serve.TOLERANCE:   # whose requests have other rows
                notes.append(f"{name} WRONG {error:.1e}")
            graphs[name] = in_graph(calls, count)
        except Exception as error:              # one of them must not end the others
            if name in variants or not isinstance(error, NotImplementedError):
                notes.append(f"{name}: {type(error).__name__} {' '.join(str(error).split())[:90]}")
    text = "  ".join(f"{name} {us:.1f}" for name, us in times(graphs, count, rounds).items())
    return f"{case.name}: {text}" + "".join(f"\n    {note}" for note in notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="groups and cases that this expression is found in, as in 'small: 1 x 1024'")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="only compile, and say what the compiler says, without a GPU")
    parser.add_argument("--prepare", action="store_true", help="only compile into the cache, without a GPU")
    given = parser.parse_args()
    compile_all(given.only, given.workers, given.compile)
    if not given.compile and not given.prepare:
        print(f"compiled in {time.perf_counter() - START:.0f} s", flush=True)
        for case, variants in chosen(given.only):
            print(measure(case, variants, given.rounds), flush=True)
        print(f"{time.perf_counter() - START:.0f} s", flush=True)


START = time.perf_counter()

if __name__ == "__main__":
    main()
