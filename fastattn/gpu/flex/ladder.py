"""Tilings for functions that nobody knew beforehand: the first one whose registers do not spill."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...flex.program import Program
from ..runtime.compile import Source, binary
from ..runtime.frame import frame_bytes
from ..runtime.launcher import Program as Kernel

log = logging.getLogger("fastattn")
Config = TypeVar("Config", bound=Any)


def simple(p: Program | None) -> bool:
    """Whether a score_mod is made of the score alone. Its scores can be computed twice without keeping anything for it."""
    return p is None or (p.used <= {"score"} and not any(x.op in ("load", "length", "number") for x in p.lines))


def first_that_fits(configs: Sequence[Config], kernel: Callable[[Config], Kernel], arch: str,
                    others: Callable[[Config], Sequence[Source]]) -> Config:
    """The first of the tilings whose kernel keeps all in registers, or the last one. Each that is tried is compiled, into the cache.

    others: the other kernels that a call with this tiling launches, compiled while its linker runs.
    """
    for config in configs:
        size = frame_bytes(binary(kernel(config).source, arch, warn=False, overlapped=others(config)).code)
        if not size:
            return config
    log.warning("fastattn: %s for %s keeps %d bytes in local memory, which makes it slow", kernel(configs[-1]).source.key, arch, size)
    return configs[-1]
