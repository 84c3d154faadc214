"""The architectures that kernels are compiled for. Whatever depends on an architecture asks this table."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """An architecture.

    Parameters
    ----------
    number
        Ten times the compute capability.
    shared_memory
        KiB that a thread block may use at most.
    processors
        Streaming multiprocessors of a typical device: what `explain` and `precompile` assume where there is none.
    suffix
        "a" where kernels use instructions that no other architecture has: wgmma on sm_90a.
    """

    number: int
    shared_memory: int
    processors: int
    suffix: str = ""

    @property
    def name(self) -> str:
        """The compiler's target: "sm_90a"."""
        return f"sm_{self.number}{self.suffix}"

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor)."""
        return self.number // 10, self.number % 10


ARCHITECTURES = {arch.name: arch for arch in (
    Arch(number=80, shared_memory=163, processors=108),                     # A100
    Arch(number=86, shared_memory=99, processors=84),                       # A10
    Arch(number=89, shared_memory=99, processors=128),                      # L40
    Arch(number=90, shared_memory=227, processors=132, suffix="a"),         # H100
    Arch(number=120, shared_memory=99, processors=170),                     # RTX 5090
)}
LEAST = 99          # KiB of shared memory of a block that every architecture since sm_80 has
_BY_NUMBER = {arch.number: arch for arch in ARCHITECTURES.values()}


def arch_of_number(number: int) -> Arch:
    """The architecture of this number. One that is not in the table runs code of its own number and has the least
    shared memory."""
    return _BY_NUMBER.get(number) or Arch(number=number, shared_memory=LEAST, processors=1)


@cache
def arch_of(name: str) -> Arch:
    """The architecture of this name ("sm_90a")."""
    return ARCHITECTURES.get(name) or arch_of_number(int(name.removeprefix("sm_").rstrip("af")))


def parse_arch(text: str) -> Arch:
    """The architecture that a user means by sm_90a, sm_90, 90 or 9.0. ValueError: not in the table."""
    number = text.strip().lower().removeprefix("sm_").replace(".", "").rstrip("af")
    arch = _BY_NUMBER.get(int(number)) if number.isdecimal() else None
    if arch is None:
        raise ValueError(f"{text}: kernels are compiled for {', '.join(ARCHITECTURES)}.")
    return arch
