"""`Recent`: what calls remember of earlier ones."""
from __future__ import annotations

from typing import TypeVar

MOST = 1000
K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dictionary that begins anew when it has MOST entries, because a new seed each step would fill it for ever.

    Keys hold plain values: never an object that a caller may change later.
    """

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, value)
