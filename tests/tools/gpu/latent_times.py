"""Tilings of the Hopper kernel over latent caches beside each other, in one run: `python -m tests.tools.gpu.latent_times [--compile]`.

First the errors of calls of every kind against float64. Then microseconds of decode steps of 128 heads over one latent cache of 576
columns, bfloat16, shuffled pages of 64, beside two batched matrix products and a softmax of torch's over contiguous keys. Medians of rounds
in which all take turns. `--compile` compiles all kernels in parallel and needs no GPU.
"""
from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.sm90 import launch_latent
from fastattn.gpu.sm90.config_latent import LatentConfig
from fastattn.gpu.spec import Call, Spec, make_spec
from tests.tools.gpu.variants_8bit import seconds

HEADS, DIM, DIM_V, PAGE = 128, 576, 512, 64
SHAPES = ((64, 8192), (16, 8192), (1, 8192), (100, 8192), (4, 8192), (1, 131072), (64, 1024))      # requests, keys
VARIANTS: dict[str, LatentConfig] = {
    "shipped": LatentConfig(), "unplanned": LatentConfig(),
}


def sources() -> dict[str, compiler.Source]:
    """The kernels of all calls here."""
    spec = Spec("bfloat16", DIM, DIM_V, right=True, lse=False, lengths=True, paged=True)
    found = dict[str, compiler.Source]()

    def add(name: str, spec: Spec, config: LatentConfig, box: int = PAGE, page: int = PAGE, plans: tuple[bool, ...] = (False,)) -> None:
        box = min(config.block_n, box)
        for planned in plans:
            of, text = replace(spec, planned=planned), name + " planned" * planned
            found[text] = launch_latent.latent_program(of, replace(config, box=box, whole=box == page))[0]
            found[f"merge of {text}"] = launch_latent.merge_program(of, config.block_n, config.overhead)[0]
    for name, config in VARIANTS.items():
        if name != "unplanned":
            add(name, spec, config, plans=(False, True))
    lse, shipped = replace(spec, lse=True), LatentConfig()
    add("lse", lse, shipped, plans=(False, True))
    add("pages of 16", lse, shipped, 16, 16)
    add("pages of 256", lse, shipped, 64, 256)
    add("packed", replace(lse, packed=True), shipped)
    add("float16", replace(lse, dtype="float16"), shipped)
    of_8bit = replace(lse, cache_dtype="float8_e4m3fn", out_dtype="bfloat16")
    add("8 bits with lse", of_8bit, shipped, plans=(False, True))
    add("8 bits", replace(of_8bit, lse=False), shipped, plans=(True,))
    arrays = replace(lse, lengths=False, paged=False)
    add("arrays", arrays, shipped, page=0)
    add("arrays without lse", replace(arrays, lse=False), shipped, page=0)
    return found


def built(name: str) -> str:
    source = sources()[name]
    report = compiler.build(source, "sm_90a")[1]
    return f"{name:24} {compiler.registers(report)} {'; '.join(compiler.complaints(report)) or 'clean'}"


def stored(name: str) -> str:
    compiler.binary(sources()[name], "sm_90a", announce=False)
    return f"{name:24} is in the cache"


def compile_all(processes: int, one: Callable[[str], str]) -> None:
    names = sorted(sources(), key=lambda name: name.startswith("merge"))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for line in pool.map(one, names):
            if one is built:
                print(line[:150], flush=True)


# ---------------------------------------------------------------- on a device
class Inputs:
    """A call over a latent cache."""

    def __init__(self, lengths: list[int], rows: int | list[int] = 1, page: int | None = PAGE, dtype: Any = None,
                 heads: int = HEADS) -> None:
        import torch

        self.lengths, self.rows, self.heads = lengths, rows, heads
        torch.manual_seed(1)
        dtype = dtype or torch.bfloat16
        size, batch = page or max(lengths), len(lengths)
        each = -(-max(lengths) // size)
        self.table = torch.randperm(batch * each, device="cuda", dtype=torch.int32).reshape(batch, each)
        self.cache = torch.randn(batch * each, size, 1, DIM, device="cuda", dtype=dtype)
        lead = (sum(rows),) if isinstance(rows, list) else (batch, rows)
        self.q = torch.randn(*lead, heads, DIM, device="cuda", dtype=dtype)
        self.options: dict[str, Any] = {"cache_seqlens": torch.tensor(lengths, device="cuda", dtype=torch.int32)}
        self.options |= {"block_table": self.table} if page else {"cache_batch_idx": self.table[:, 0].contiguous()}
        if isinstance(rows, list):
            cu = [sum(rows[:n]) for n in range(batch + 1)]
            self.options |= {"cu_seqlens_q": torch.tensor(cu, device="cuda", dtype=torch.int32), "max_seqlen_q": max(rows)}
        for b, n in enumerate(lengths):         # what is behind the keys may be anything
            self.cache[self.table[b].long()[n // size:n // size + 1], n % size:] = float("nan")

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.q, self.cache, self.cache[..., :DIM_V]

    def call(self, **more: Any) -> Any:
        import fastattn

        return fastattn.attention_with_kvcache(*self.arrays, **self.options, **more)

    def exact(self) -> tuple[Any, Any]:
        """(out, lse) in float64."""
        import torch

        outs, lses, start = [], [], 0
        for b, n in enumerate(self.lengths):
            rows = self.rows[b] if isinstance(self.rows, list) else self.rows
            k = self.cache[self.table[b].long()].reshape(-1, DIM)[:n].double()
            q = self.q[start:start + rows] if isinstance(self.rows, list) else self.q[b]
            s = torch.einsum("rhd,kd->hrk", q.double(), k) * DIM**-0.5
            hidden = torch.arange(n, device="cuda") > torch.arange(rows, device="cuda")[:, None] + n - rows
            s = s.masked_fill(hidden, float("-inf"))
            p = torch.softmax(s, -1).nan_to_num(0)
            outs.append(torch.einsum("hrk,kd->rhd", p, k[:, :DIM_V]))
            lses.append(torch.logsumexp(s, -1))
            start += rows
        joined = (torch.cat(outs), torch.cat(lses, 1)) if isinstance(self.rows, list) else (torch.stack(outs), torch.stack(lses))
        return joined


def errors() -> None:
    """Of each kind of call: rms of the difference over rms of the result, and the largest difference of lse; the time of `attention`."""
    import torch

    import fastattn
    taken = list[int]()
    shipped = launch_latent.prepare

    def counted(*given: Any) -> Any:
        taken.append(1)
        return shipped(*given)
    launch_latent.prepare = counted
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "one split": (partial(Inputs, [200, 64, 1, 4099]), {"num_splits": 1}), "splits": (partial(Inputs, [5000, 37, 700]), {}),
        "one request": (partial(Inputs, [8192]), {}), "pages of 16": (partial(Inputs, [1000, 333], 1, 16), {}),
        "pages of 256, 4 rows": (partial(Inputs, [1000, 333], 4, 256), {}), "rows of the cache": (partial(Inputs, [900, 333], 2, None), {}),
        "packed": (partial(Inputs, [900, 33, 5, 129], [3, 1, 0, 7], 64, None, 16), {}),
        "packed, one split": (partial(Inputs, [900, 33, 20, 129], [3, 1, 2, 7], 64, None, 20), {"num_splits": 1}),
        "float16, 20 heads": (partial(Inputs, [900, 70], 3, 64, torch.float16, 20), {}),
        "more rows than keys": (partial(Inputs, [5, 70], 9), {}), "128 requests": (partial(Inputs, [500] * 128), {})}
    for name, (make, options) in kinds.items():
        try:
            inputs, count = make(), len(taken)
            (out, lse), (want, want_lse) = inputs.call(return_lse=True, **options), inputs.exact()
            seen = torch.isfinite(want_lse)
            error = float((out.double() - want).norm() / want.norm())
            off = float((lse.double() - want_lse)[seen].abs().max())
            same = bool((torch.isfinite(lse) == seen).all())
            good = error < (2**-7 if out.dtype == torch.bfloat16 else 2**-9) and off < 1e-4 and same and len(taken) > count
            again = torch.equal(out, inputs.call(return_lse=True, **options)[0])
            print(f"{name:22} {'ok' if good and again else 'WRONG'} error {error:.1e} lse {off:.1e} same bits again {again} "
                  f"latent {len(taken) > count}", flush=True)
        except Exception as error:      # of one kind: the others are tried
            print(f"{name:22} WRONG {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc()
    try:
        inputs = Inputs([4096] * 32)
        k = inputs.cache[inputs.table.long()].reshape(32, -1, 1, DIM)
        call = partial(fastattn.attention, inputs.q, k, k[..., :DIM_V], causal=True)
        (out, lse), (want, want_lse), count = call(return_lse=True), inputs.exact(), len(taken)
        good = float((out.double() - want).norm() / want.norm()) < 2**-7 and float((lse.double() - want_lse).abs().max()) < 1e-4
        time = seconds({"arrays": call}, 5)["arrays"] * 1e6
        print(f"{'attention, 32 x 4096':22} {'ok' if good and count else 'WRONG'} {time:.1f} us", flush=True)
    except Exception as error:
        print("attention WRONG", str(error)[:300], flush=True)
    try:
        inputs = Inputs([700, 33, 4000])
        together = inputs.call(num_splits=1)
        alone = Inputs.__new__(Inputs)
        alone.__dict__ |= inputs.__dict__ | {"q": inputs.q[2:], "options": {"cache_seqlens": inputs.options["cache_seqlens"][2:],
                                                                            "block_table": inputs.table[2:]}}
        print(f"{'bits in any batch':22} {'ok' if torch.equal(alone.call(num_splits=1)[0], together[2]) else 'WRONG'}", flush=True)
    except Exception as error:
        print("bits in any batch WRONG", str(error)[:300], flush=True)
    launch_latent.prepare = shipped


def prepared(inputs: Inputs, name: str) -> Callable[[], Any]:
    """What runs the call with this tiling."""
    import torch

    import fastattn
    from fastattn.explanation import _catch
    from fastattn.gpu.runtime.device import current
    from fastattn.gpu.runtime.launcher import on_device
    out = torch.empty(*inputs.q.shape[:-1], DIM_V, dtype=inputs.q.dtype, device="cuda")
    caught = _catch(fastattn.attention_with_kvcache, inputs.arrays, inputs.options | {"out": out})
    operands, view, *_ = caught.where
    call, launcher = Call(caught.problem, operands, view, None), on_device(0)
    shipped = launch_latent.plans
    if name == "unplanned":
        launch_latent.plans = lambda p: False
    with current(launcher.device):
        launch = launch_latent.prepare(call, make_spec(call.problem, call.operands, False), launcher, VARIANTS[name])
    launch_latent.plans = shipped

    def run() -> Any:
        with current(launcher.device):
            launch(call, torch.cuda.current_stream().cuda_stream)
        return out
    return run


def products(inputs: Inputs) -> Callable[[], Any]:
    """torch's: contiguous keys, no lengths."""
    import torch

    k = inputs.cache.reshape(len(inputs.lengths), -1, DIM)
    q, k_t, v = inputs.q[:, 0], k.transpose(1, 2), k[..., :DIM_V]
    return lambda: torch.bmm(torch.softmax(torch.bmm(q, k_t) * DIM**-0.5, -1), v)


def tables(only: str, rounds: int) -> None:
    import torch

    names = [name for name in VARIANTS if only in name]
    print(f"{'us':16}" + "".join(f"{name:>15}" for name in (*names, "torch")), " floor (memory, products)", flush=True)
    for batch, keys in SHAPES:
        inputs = Inputs([keys] * batch)
        inputs.cache.nan_to_num_(0)
        calls = dict[str, Callable[[], Any]]()
        for name in names:
            try:
                run = prepared(inputs, name)
                wanted = inputs.call()
                error = float((run().float() - wanted.float()).norm() / wanted.float().norm())
                if not error < 1e-2:
                    print(f"{name} WRONG {error}", flush=True)
                calls[name] = run
            except Exception as error:
                print(f"{name} failed: {str(error)[:200]}", flush=True)
        if batch * keys <= 1 << 19:
            calls["torch"] = products(inputs)
        found = seconds(calls, rounds)
        memory, flops = batch * keys * DIM * 2 / 4.2e12, 2 * batch * HEADS * keys * (DIM + DIM_V) / 8e14
        cells = [f"{found[name] * 1e6:15.1f}" if name in found else " " * 15 for name in (*names, "torch")]
        print(f"{batch} x {keys}".ljust(16) + "".join(cells) + f"   {memory * 1e6:.0f} {flops * 1e6:.0f}", flush=True)
        del inputs, calls
        torch.cuda.empty_cache()


def eight() -> None:
    """8-bit caches: errors against float64 of the same numbers, and times."""
    import torch

    import fastattn
    for lengths, rows in (([900, 70], 3), ([8192] * 16, 1), ([8192] * 64, 1)):
        inputs = Inputs(lengths, rows)
        inputs.cache = (inputs.cache.nan_to_num(0)).to(torch.float8_e4m3fn)
        scales = {name: torch.tensor([x], device="cuda") for name, x in (("k_scale", 0.75), ("v_scale", 1.5))}
        call = partial(fastattn.attention_with_kvcache, *inputs.arrays, **inputs.options, **scales)
        out, lse = call(return_lse=True)
        inputs.cache = (inputs.cache.float() * 0.75).double()
        want, want_lse = inputs.exact()
        error, off = float((out.double() - 2 * want).norm() / (2 * want).norm()), float((lse.double() - want_lse).abs().max())
        good = error < 2**-7 and off < 1e-3
        print(f"8 bits {len(lengths)} x {lengths[0]}".ljust(22), "ok" if good else "WRONG", f"error {error:.1e} lse {off:.1e} "
              f"{seconds({'eight': call}, 5)['eight'] * 1e6:.1f} us", flush=True)
        del inputs, want


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tilings whose name has this text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="only compile, without a GPU")
    given = parser.parse_args()
    if given.compile:
        compile_all(given.processes, built)
    else:
        compile_all(given.processes, stored)
        errors()
        tables(given.only, given.rounds)
        eight()


if __name__ == "__main__":
    main()
