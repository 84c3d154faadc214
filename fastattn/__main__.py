"""`python -m fastattn`: show-config (the default) prints what a bug report needs, precompile fills the GPU engine's
kernel cache, cache shows or clears it."""
from __future__ import annotations

import argparse
import sys

from .report import show_config


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("show-config", help="versions, devices, instruction set, cache folder")
    pre = commands.add_parser("precompile", help="compile GPU kernels into the cache, for the device here or for another architecture",
                              description="Compiles GPU kernels into the cache, so that no later call waits for the compiler. Needs no GPU "
                                          "when --arch is given. FASTATTN_CACHE names the folder; one that root filled serves all users.")
    pre.add_argument("--arch", type=_words, default=[], help=f"{_known_archs()}; comma-separated, default: the device here")
    pre.add_argument("--head-dim", type=_words, default=["64", "128"], help="comma-separated, default 64,128")
    pre.add_argument("--dtype", type=_words, default=["float16", "bfloat16"], help="comma-separated, default float16,bfloat16")
    pre.add_argument("--features", type=_words, default=["full", "causal"],
                     help="comma-separated, default full,causal; also window, dropout, softcap, alibi, sinks, mask, bias, several at once "
                          "as causal+alibi, and their backward as backward+causal. Each dense and packed, forward with lse and without")
    pre.add_argument("--processes", type=int, default=None, help="compilers at once, default: one a processor")
    kept = commands.add_parser("cache", help="folder, entries and size of the kernel cache", description="Shows where compiled kernels are "
                               "kept, how many there are and how large they are (limit: FASTATTN_CACHE_MB, default 512).")
    kept.add_argument("--clear", action="store_true", help="remove them; they are compiled again when they are needed")
    return parser


def _known_archs() -> str:
    """Names of all architectures, for the help text; an example where the GPU engine's packages are missing."""
    try:
        from .gpu.runtime.arch import ARCHITECTURES
    except ImportError:
        return "sm_90a, for example"
    return ", ".join(ARCHITECTURES)


def _arch(text: str) -> str:
    from .gpu.runtime.arch import parse_arch
    try:
        return parse_arch(text).name
    except ValueError as error:
        raise ValueError(f"--arch {error}") from error


def _precompile(given: argparse.Namespace) -> int:
    try:
        from .gpu import precompile
        from .gpu.runtime.compile import build  # noqa: F401
        for package in ("numba.cuda", "cuda.core"):
            __import__(package)
    except ImportError as error:
        raise SystemExit(f"precompile needs the packages of the GPU engine ({error}): pip install 'fastattn[gpu]'.") from error
    dtypes = [d for d in given.dtype if d not in ("float16", "bfloat16", "float32", "float64")]
    if dtypes:
        raise SystemExit(f"--dtype {dtypes[0]}: expected float16, bfloat16, float32 or float64.")
    dims = [int(d) if d.isdigit() else 0 for d in given.head_dim]
    if not all(1 <= d <= 512 for d in dims):
        raise SystemExit(f"--head-dim {','.join(given.head_dim)}: expected sizes from 1 to 512.")
    if given.processes is not None and given.processes < 1:
        raise SystemExit(f"--processes {given.processes}: expected 1 or more.")
    try:
        archs = [_arch(text) for text in given.arch] or [precompile.arch_here()]
        return precompile.command(archs, dims, given.dtype, given.features, given.processes)
    except (LookupError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _cache(clear: bool) -> int:
    """Show or clear the folders where kernels are looked for. Only the last one, the user's own, is cleared."""
    try:
        from .gpu.runtime import cache
    except ImportError as error:
        raise SystemExit(f"cache needs the packages of the GPU engine ({error}): pip install 'fastattn[gpu]'.") from error
    folders, status = cache.folders(), 0
    for folder in folders:
        clears = clear and folder == folders[-1]
        try:
            found = (cache.clear if clears else cache.entries)(folder)
        except OSError as error:
            print(f"{folder}: not used: {error}")
            status = 1
        else:
            print(f"{folder}: {len(found)} entries, {sum(entry.size for entry in found) / 1e6:.1f} MB{' removed' if clears else ''}")
    return status


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.command == "precompile":
        return _precompile(given)
    if given.command == "cache":
        return _cache(given.clear)
    show_config()
    return 0


if __name__ == "__main__":
    sys.exit(main())
