"""`Recent`: the one bounded cache of this package."""
from __future__ import annotations

from typing import TypeVar

MOST = 1000
K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dictionary that is emptied when it has MOST entries: a new seed each step would fill it without end.

    Keys hold plain values, never an object that a caller may change later.
    """

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(key, value)
