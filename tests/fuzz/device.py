"""Where arrays live while a problem runs: the host, or a GPU. All that is special to a GPU is here."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fastattn
from tests.tools.problems import NUMPY

from . import memory
from .inputs import Arguments
from .spec import Spec

Array = np.ndarray[Any, Any]


@dataclass
class Place:
    """An out= of the caller's: `array` on the device, all NaN, and whether the bytes between its elements are as they were."""

    array: Any
    untouched: Callable[[], bool]


class Device:
    """The host: arrays are ndarrays."""

    def poison(self) -> None:
        """Fill free memory with 0xFF where that is possible: here results are filled instead (judge.poisoned_results)."""

    def put(self, s: Spec, given: Arguments) -> Arguments:
        """The arguments there. ndarrays of positional and named arguments become the spec's library's; numbers stay."""
        fastattn.set_num_threads(s.threads)
        return Arguments(dict(given.arrays), given.lengths, dict(given.options))

    def lay(self, s: Spec, x: Array) -> Any:
        """One more array, in the spec's memory."""
        return memory.laid(np.random.default_rng([s.seed, 3]), x, s.memory)

    def get(self, x: Any) -> Array:
        return np.asarray(x)

    def place(self, s: Spec, shape: tuple[int, ...], dtype: str, kind: str) -> Place:
        whole, view = memory.place(np.random.default_rng([s.seed, 4]), shape, NUMPY[dtype], kind)
        return Place(view, lambda: memory.untouched(whole, view))

    def call(self, s: Spec, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    def finish(self) -> None:
        """Wait for all work; errors of the device are raised."""

    def healthy(self) -> bool:
        """Whether the next problem can be run in this process."""
        return True


def make_device(name: str) -> Device:
    if name == "cpu":
        return Device()
    from .gpu import Gpu

    return Gpu()
