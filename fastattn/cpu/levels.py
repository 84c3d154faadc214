"""The instruction-set levels: how each is compiled, and which one this machine gets.

setup.py compiles fastattn/cpu/isa/<level>.pyx with these flags; the engine imports the best level that was built. This
file imports the package's modules only inside functions, so that setup.py can load it by its path.
"""
from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
import warnings

COMMON = ["-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
          "-fvisibility=hidden", "-Wno-unused-function"]
WIDE = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

# level -> compiler flags, best last. Never -ffast-math: -inf masks and the rounding in exp2 would be undefined
X86 = {
    "baseline": ["-march=x86-64"],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": WIDE,
    "x86_64_v4_bf16": [*WIDE, "-mavx512bf16"],
    "x86_64_amx": [*WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
AARCH64 = {"baseline": ["-march=armv8-a"]}
OTHERS: dict[str, list[str]] = {"baseline": []}         # what the compiler takes for granted

# level -> what the CPU must have: all that the compiler may use under the level's flags, as /proc/cpuinfo spells it
NEEDS: dict[str, set[str]] = {"baseline": set(), "x86_64_v3": {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "popcnt", "abm"}}
NEEDS["x86_64_v4"] = NEEDS["x86_64_v3"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
NEEDS["x86_64_v4_bf16"] = NEEDS["x86_64_v4"] | {"avx512_bf16"}
NEEDS["x86_64_amx"] = NEEDS["x86_64_v4_bf16"] | {"amx_tile", "amx_bf16"}


def levels() -> dict[str, list[str]]:
    """Levels of this architecture and their flags, worst first."""
    machine = platform.machine().lower()
    return X86 if machine in ("x86_64", "amd64") else AARCH64 if machine in ("aarch64", "arm64") else OTHERS


def cpu_features() -> set[str] | None:
    """Names of what this CPU can run. None: unknown."""
    try:
        from . import detect
    except ImportError:                     # a source tree that is not built yet
        return _proc_flags()
    return detect.cpu_features()


def _proc_flags() -> set[str] | None:
    """The same from /proc/cpuinfo. None where it cannot be read or has no flags."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return None


def available() -> list[str]:
    """Levels this CPU can run, built or not, worst first."""
    features = cpu_features() or set()
    usable = [level for level in levels() if NEEDS[level] <= features]
    if "x86_64_amx" in usable and not _amx_allowed():
        usable.remove("x86_64_amx")
    return usable


def _amx_allowed() -> bool:
    """Request the AMX tile registers from Linux (arch_prctl ARCH_REQ_XCOMP_PERM, feature 18). Once per process is enough."""
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)
    except (OSError, AttributeError):
        return False


def built() -> list[str]:
    """Levels that were compiled, worst first. The compiler may have refused some; FASTATTN_LEVELS names others."""
    return [level for level in levels() if importlib.util.find_spec(f"{__package__}.isa.{level}") is not None]


def choose() -> str:
    """The best level that this CPU can run and that was built, or the one that FASTATTN_ISA forces.

    Returns
    -------
    str
        A key of `levels()`.

    Raises
    ------
    ValueError
        If this CPU cannot run the forced level, or it was not built.
    ImportError
        If there is no level to choose.
    """
    usable, forced = available(), os.environ.get("FASTATTN_ISA")
    if forced and forced not in usable:
        raise ValueError(f"FASTATTN_ISA is {forced!r}; expected one that this CPU has: {', '.join(usable)}.")
    compiled = built()
    found = [level for level in usable if level in compiled]
    if not compiled:
        raise ImportError("fastattn's compiled CPU engine is missing: install fastattn with pip (it needs gcc or clang), "
                          "or run `python setup.py build_ext --inplace` in its source tree.")
    if not found:
        raise ImportError(f"fastattn's CPU engine was built for {', '.join(compiled)}, and this CPU has {', '.join(usable)}: "
                          "build it again without FASTATTN_LEVELS.")
    if forced and forced not in found:
        raise ValueError(f"FASTATTN_ISA is {forced!r}, which was not built; expected one of: {', '.join(found)}.")
    if levels() is X86 and cpu_features() is None:
        warnings.warn("fastattn cannot find out what this CPU supports: fastattn.cpu.detect is not built, and /proc/cpuinfo has no flags. "
                      f"It uses the level {found[-1]!r}, which is several times slower than the best. `pip install` builds all modules; "
                      "in a source tree `python setup.py build_ext --inplace` does.", RuntimeWarning, stacklevel=2)
    return forced or found[-1]
