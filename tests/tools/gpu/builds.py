"""Kernels compiled once in a process: several tests run the same one, or look at what its compiler said."""
from __future__ import annotations

import functools
from typing import Any

from fastattn.gpu.runtime import compile as compiler


class _Key:
    """A Source that is its key: two of one key make one kernel."""

    def __init__(self, source: compiler.Source) -> None:
        self.source = source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (self.source.key, self.source.fields) == (other.source.key, other.source.fields)

    def __hash__(self) -> int:
        return hash(self.source.key)


_compile = compiler.build               # as it is before a test replaces it


@functools.lru_cache(400)
def _built(key: _Key, arch: str, output: str) -> tuple[bytes, str]:
    return _compile(key.source, arch, output)


def build(source: Any, arch: str, output: str = "cubin") -> tuple[bytes, str]:
    """compiler.build."""
    return _built(_Key(source), arch, output)
