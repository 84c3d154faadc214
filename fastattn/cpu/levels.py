"""The instruction-set levels: how each is compiled, and which one this machine gets.

setup.py compiles fastattn/cpu/isa/<level>.pyx with these flags; the engine imports the best level. This file imports
nothing from the package, so that setup.py can load it by its path.
"""
from __future__ import annotations

import ctypes
import os
import platform

COMMON = ["-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fopenmp",
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

# level -> what /proc/cpuinfo must list
NEEDS: dict[str, set[str]] = {
    "baseline": set(),
    "x86_64_v3": {"avx2", "fma", "f16c", "bmi2"},
    "x86_64_v4": {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"},
}
NEEDS["x86_64_v4_bf16"] = NEEDS["x86_64_v4"] | {"avx512_bf16"}
NEEDS["x86_64_amx"] = NEEDS["x86_64_v4_bf16"] | {"amx_tile", "amx_bf16"}


def levels() -> dict[str, list[str]]:
    """Levels of this architecture and their flags, worst first."""
    return X86 if platform.machine() in ("x86_64", "AMD64") else AARCH64


def cpu_flags() -> set[str]:
    """Feature names of this CPU as Linux spells them. Empty without /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def available() -> list[str]:
    """Levels this CPU can run, worst first."""
    flags = cpu_flags()
    usable = [level for level in levels() if NEEDS[level] <= flags]
    if "x86_64_amx" in usable and not _amx_allowed():
        usable.remove("x86_64_amx")
    return usable


def _amx_allowed() -> bool:
    """Request the AMX tile registers from the kernel (arch_prctl ARCH_REQ_XCOMP_PERM, feature 18). Once per process is enough."""
    try:
        return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)
    except (OSError, AttributeError):
        return False


def choose() -> str:
    """The best level, or the one that FASTATTN_ISA forces. ValueError if this CPU cannot run that."""
    usable, forced = available(), os.environ.get("FASTATTN_ISA")
    if not forced:
        return usable[-1]
    if forced not in usable:
        raise ValueError(f"FASTATTN_ISA is {forced!r}; expected one that this CPU has: {', '.join(usable)}.")
    return forced
