"""`precompile`: compile GPU kernels into the cache, so that no later call waits for the compiler."""
from __future__ import annotations

import argparse

from .packages import needed

DESCRIPTION = """\
Compiles GPU kernels into the cache, so that no later call waits for the compiler. Needs no GPU when --arch is given.
FASTATTN_CACHE names the folder; one that root filled serves all users."""
EXAMPLE = "precompile --arch sm_90a --head-dim 128 --dtype bfloat16 --features causal,backward+causal"
DTYPES = ("float16", "bfloat16", "float32", "float64")


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=_words, default=[], help=f"{_known_archs()}; comma-separated, default: the device here")
    parser.add_argument("--head-dim", type=_words, default=["64", "128"], help="comma-separated, default 64,128")
    parser.add_argument("--dtype", type=_words, default=["float16", "bfloat16"], help="comma-separated, default float16,bfloat16")
    parser.add_argument("--features", type=_words, default=["full", "causal"],
                        help="comma-separated, default full,causal; also window, dropout, softcap, alibi, sinks, mask, bias, "
                             "float32_out, several at once as causal+alibi, and their backward as backward+causal. Each dense and "
                             "packed, forward with lse and without")
    parser.add_argument("--processes", type=int, default=None, help="compilers at once, default: one a processor")


def _known_archs() -> str:
    """Names of all architectures, for the help text; an example where the GPU engine's packages are missing."""
    try:
        from ..gpu.runtime.arch import ARCHITECTURES
    except (ImportError, AttributeError):
        return "sm_90a, for example"
    return ", ".join(ARCHITECTURES)


def _arch(text: str) -> str:
    from ..gpu.runtime.arch import parse_arch
    try:
        return parse_arch(text).name
    except ValueError as error:
        raise ValueError(f"--arch {error}") from error


def run(given: argparse.Namespace) -> int:
    from ..problem import MAX_HEAD_DIM

    precompile, *_ = needed("precompile", ".gpu.precompile", ".gpu.runtime.compile", "numba.cuda", "cuda.core")
    unknown = [dtype for dtype in given.dtype if dtype not in DTYPES]
    if unknown:
        raise SystemExit(f"--dtype {unknown[0]}: expected float16, bfloat16, float32 or float64.")
    dims = [int(d) if d.isdigit() else 0 for d in given.head_dim]
    if not all(1 <= d <= MAX_HEAD_DIM for d in dims):
        raise SystemExit(f"--head-dim {','.join(given.head_dim)}: expected sizes from 1 to {MAX_HEAD_DIM}.")
    if given.processes is not None and given.processes < 1:
        raise SystemExit(f"--processes {given.processes}: expected 1 or more.")
    try:
        archs = [_arch(text) for text in given.arch] or [precompile.arch_here()]
        return int(precompile.command(archs, dims, given.dtype, given.features, given.processes))
    except (LookupError, ValueError) as error:
        raise SystemExit(str(error)) from error
