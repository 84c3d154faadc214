"""Tilings of the float32 forward beside torch's backends, in one run: `python -m tests.tools.gpu.float_times [--rounds 5]`.

First the errors of small calls, relative to float64 (Frobenius), beside those of torch's efficient kernel. Then microseconds: medians
of rounds in which all take turns. Every kernel is compiled before, in as many processes as asked for. A tiling that fails does not end the
others.
"""
from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from fastattn import gpu
from fastattn.gpu import precompile
from fastattn.gpu.precompile import Want
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.sm90 import config_float, launch_float
from fastattn.gpu.sm90.config_float import ForwardFloatConfig

CHOOSE, SPLITS = config_float.choose_forward, launch_float.splits_of


def tiling(**fields: Any) -> Callable[..., ForwardFloatConfig]:
    return lambda *_: ForwardFloatConfig(slices=1, block_n=64, **fields)


VARIANTS: dict[str, dict[str, Any]] = {
    "chosen": {}, "one split": {"splits": lambda *_: 1}, "parts": {"choose": tiling(stages=4)},
    "two consumers": {"choose": tiling(stages=4, split=True)}, "one consumer": {"choose": tiling(stages=2, split=True, consumers=1)},
}
BACKWARD = (((8, 16, 1024, 128), False), ((4, 16, 2048, 64), True))
# (batch, heads, rows, head_dim), settings, variants
TIMES: tuple[tuple[tuple[int, int, int, int], dict[str, Any], tuple[str, ...]], ...] = (
    ((1, 1, 4096, 512), {}, ("chosen", "one split")), ((4, 1, 4096, 512), {}, ("chosen",)), ((8, 16, 1024, 128), {}, ("chosen", "parts")),
    ((4, 16, 2048, 64), {"causal": True}, ("chosen", "parts")), ((64, 12, 128, 64), {"mask": True}, ("chosen", "two consumers")),
    ((64, 12, 512, 64), {}, ("chosen", "one consumer")), ((4, 8, 2048, 256), {}, ("chosen",)), ((2, 16, 4096, 96), {}, ("chosen", "parts")),
)
PACKED: dict[str, Any] = {"packed": True, "causal": True}
CHECKS: tuple[tuple[int, dict[str, Any]], ...] = (
    (64, {}), (64, {"mask": True}), (64, PACKED), (96, {"causal": True}), (128, {}), (128, {"bias": "float32"}), (128, PACKED),
    (160, {"causal": True}), (256, {}), (256, {"mask": True}), (256, PACKED), (320, {}), (512, {}), (512, {"bias": "float32"}),
    (512, PACKED), (576, {"causal": True}))


def use(variant: str) -> None:
    """The kernel's choice, from now on."""
    own = VARIANTS[variant]
    launch_float.choose_forward, launch_float.splits_of = own.get("choose", CHOOSE), own.get("splits", SPLITS)


def build(want: Want, variant: str) -> str:
    """Compile the kernels of a call into the cache."""
    use(variant)
    try:
        with gpu.use("sm90", "simt"):
            needed = precompile.sources(*want.call(), precompile.absent_device("sm_90a"))
        for source in needed:
            compiler.cached(source, "sm_90a")
    except Exception as error:
        return f"{want} {variant}: {error!r}"[:200]
    return ""


def wants() -> list[tuple[Want, str]]:
    timed = [(Want("float32", dim, batch=batch, num_heads=heads, seqlen_q=rows, **settings), variant)
             for (batch, heads, rows, dim), settings, variants in TIMES for variant in variants]
    small: dict[str, Any] = {"batch": 2, "num_heads": 4, "num_heads_k": 2, "seqlen_q": 200, "seqlen_k": 330}
    timed += [(Want("float32", dim, batch=batch, num_heads=heads, seqlen_q=rows, causal=causal, **more), "chosen")
              for (batch, heads, rows, dim), causal in BACKWARD for more in ({"lse": True}, {"backward": True})]
    return timed + [(Want("float32", dim, min(dim, 512), **small, **settings), "chosen") for dim, settings in CHECKS]


def exact(q: Any, k: Any, v: Any, causal: bool, mask: Any, bias: Any) -> Any:
    import torch
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    s = s if bias is None else s + bias.double()
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).tril(s.shape[3] - s.shape[2]), -torch.inf)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return (s.softmax(3) @ v).transpose(1, 2)


def check(dim: int, settings: dict[str, Any]) -> tuple[float, float]:
    """(error, that of torch's efficient kernel) of a call; of several sequences where they are packed."""
    import torch

    import fastattn
    torch.manual_seed(dim)
    causal, packed = settings.get("causal", False), settings.get("packed", False)
    q, k, v = (torch.randn(2, rows, heads, d, device="cuda") for rows, heads, d in ((200, 4, dim), (330, 2, dim), (330, 2, min(dim, 512))))
    mask = (torch.rand(2, 1, 1, 330, device="cuda") < 0.7) if settings.get("mask") else None
    bias = torch.randn(1, 4, 200, 330, device="cuda") if settings.get("bias") else None
    if packed:
        v[1, 170:] = torch.nan          # keys of the next sequence, which nobody may read
        lengths_q, lengths_k = (200, 77), (330, 170)
        flat = [torch.cat([x[i, :n] for i, n in enumerate(lengths)]) for x, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k))]
        cu = [torch.tensor([0, n[0], sum(n)], dtype=torch.int32, device="cuda") for n in (lengths_q, lengths_k)]
        out = fastattn.attention_varlen(*flat, *cu, causal=causal)
        wanted = torch.cat([exact(q[i:i + 1, :m], k[i:i + 1, :n], v[i:i + 1, :n], causal, None, None)[0]
                            for i, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True))])
        return float((out - wanted).norm() / wanted.norm()), float("nan")
    more = {name: x for name, x in (("mask", mask), ("bias", bias)) if x is not None}
    out, wanted = fastattn.attention(q, k, v, causal=causal, **more), exact(q, k, v, causal, mask, bias)
    rival = float("nan")
    if not causal:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            given = mask.expand(2, 4, 200, 330) if mask is not None else bias
            try:
                theirs = torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))), attn_mask=given)
                rival = float((theirs.transpose(1, 2) - wanted).norm() / wanted.norm())
            except RuntimeError:
                pass
    return float((out - wanted).norm() / wanted.norm()), rival


def calls_of(shape: tuple[int, int, int, int], settings: dict[str, Any], variants: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Each variant has its own row stride, so that what is remembered of one's calls is not used for another."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import fastattn
    batch, heads, rows, dim = shape
    base = [torch.randn(batch, rows, heads, dim, device="cuda") for _ in range(3)]
    lengths = torch.randint(rows // 4, rows + 1, (batch, 1, 1, 1), device="cuda")
    mask = (torch.arange(rows, device="cuda") < lengths) if settings.get("mask") else None
    causal, calls = settings.get("causal", False), dict[str, Callable[[], Any]]()
    more = {} if mask is None else {"mask": mask}
    for n, variant in enumerate(variants):
        own = [torch.zeros(batch, rows, heads + n, dim, device="cuda")[:, :, :heads].copy_(x) for x in base]

        def ours(own: Any = own, variant: str = variant) -> Any:
            use(variant)
            return fastattn.attention(*own, causal=causal, **more)
        calls[variant] = ours
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        def theirs(backend: Any = backend) -> Any:
            with sdpa_kernel(backend):
                q, k, v = (x.transpose(1, 2) for x in base)
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, attn_mask=mask)
        calls[backend.name.split("_")[0].lower()] = theirs
    wanted = exact(base[0][:1, :, :1], base[1][:1, :, :1], base[2][:1, :, :1], causal, None if mask is None else mask[:1], None)
    for name in list(calls):
        try:
            out = calls[name]()
            out = out if out.shape == base[0].shape else out.transpose(1, 2)
            error = float((out[:1, :, :1] - wanted).norm() / wanted.norm())
            assert error < 5e-6, f"error {error:.1e}"
        except Exception as error:
            print(f"{shape} {name}: {error!r}"[:150], flush=True)
            del calls[name]
    return calls


def gradients(dim: int) -> str:
    """Errors of dq, dk and dv."""
    import torch

    import fastattn
    torch.manual_seed(dim)
    q, k, v, dout = (torch.randn(1, 300, 2, dim, device="cuda") for _ in range(4))
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    found = fastattn.attention_backward(dout, q, k, v, out, lse, causal=True)
    given = [x.double().requires_grad_() for x in (q, k, v)]
    exact(*given, True, None, None).backward(dout.double())
    return " ".join(f"{float((x - y.grad).norm() / y.grad.norm()):.1e}" for x, y in zip(found[:3], given, strict=True))


def backward_calls(shape: tuple[int, int, int, int], causal: bool) -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import fastattn
    batch, heads, rows, dim = shape
    q, k, v, dout = (torch.randn(batch, rows, heads, dim, device="cuda") for _ in range(4))
    use("chosen")
    out, lse = fastattn.attention(q, k, v, causal=causal, return_lse=True)
    calls: dict[str, Callable[[], Any]] = {"backward": lambda: fastattn.attention_backward(dout, q, k, v, out, lse, causal=causal)}
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        given = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(backend):
            result = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=causal)
        calls[backend.name.split("_")[0].lower()] = lambda result=result, given=given: torch.autograd.grad(
            result, given, dout.transpose(1, 2), retain_graph=True)
    return calls


def seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median device seconds of each, in turns."""
    from tests.tools.gpu.variants_8bit import seconds
    return seconds(calls, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="only compile")
    given = parser.parse_args()
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        for failed in pool.map(build, *zip(*wants(), strict=True)):
            if failed:
                print(failed, flush=True)
    if given.compile:
        return
    use("chosen")
    worst = list[str]()
    for dim, settings in CHECKS:
        try:
            error, rival = check(dim, settings)
            worst.append(f"{dim}{''.join(' ' + name for name, on in settings.items() if on)} {error * 1e7:.1f} ({rival * 1e7:.1f})")
        except Exception as error:
            print(f"{dim} {settings}: {error!r}"[:150], flush=True)
    for n in range(0, len(worst), 6):
        print("e-7: " + ", ".join(worst[n:n + 6]), flush=True)
    for dim in (64, 96, 128):
        try:
            print(f"gradients {dim}: {gradients(dim)}", flush=True)
        except Exception as error:
            print(f"gradients {dim}: {error!r}"[:150], flush=True)
    for shape, causal in BACKWARD:
        try:
            found = seconds(backward_calls(shape, causal), given.rounds)
            print(f"{shape} backward: " + ", ".join(f"{name} {s * 1e6:.0f}" for name, s in found.items()), flush=True)
        except Exception as error:
            print(f"{shape} backward: {error!r}"[:150], flush=True)
    for shape, settings, variants in TIMES:
        try:
            found = seconds(calls_of(shape, settings, variants), given.rounds)
            print(f"{shape}{''.join(' ' + name for name in settings)}: " + ", ".join(f"{name} {s * 1e6:.0f}" for name, s in found.items()),
                  flush=True)
        except Exception as error:
            print(f"{shape} {settings}: {error!r}"[:150], flush=True)


if __name__ == "__main__":
    main()
