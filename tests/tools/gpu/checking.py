"""A Launcher that checks the values of each launch, and launches nothing."""
from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

from fastattn.gpu.runtime import compile
from fastattn.gpu.runtime.launcher import Listing
from fastattn.gpu.sm80 import launch as sm80
from fastattn.gpu.sm90 import launch as sm90


class Checking(Listing):
    """A Listing that packs the values of each launch as a device would."""

    def load(self, source: compile.Source) -> Any:
        return Checked(super().load(source), source)


class Checked:
    def __init__(self, kernel: Any, source: compile.Source) -> None:
        self.kernel, self.source = kernel, source

    def launch(self, grid: int, values: list[Any], stream: int) -> None:
        assert 0 <= grid < 2**31, f"{self.source.key}: {grid} thread blocks"
        assert len(values) == len(self.source.fields), self.source.key
        for (name, letter), value in zip(self.source.fields, values, strict=True):
            assert letter not in "fd" or np.isfinite(value), f"{self.source.key}: {name} is {value}"
        misaligned(self.source, values)
        unread(self.source, values)
        struct.pack("@" + "".join(compile._LETTERS[letter] for _, letter in self.source.fields), *values)
        self.kernel.launch(grid, values, stream)


def unread(source: compile.Source, values: list[Any]) -> None:
    """Fail for a launch whose kernel reads an element of an array that has none, because it cuts an index to the last one, or because
    rows of no sequence have what the last sequence has."""
    given = dict(zip([name for name, _ in source.fields], values, strict=True))
    for name, value in given.items():
        if re.fullmatch(r"(score|seen)\d+_n\d+", name):
            assert value > 0, f"{source.key}: {name} is {value}, and the index is cut to the last element"
    for name in {"diagonals", "alibi"} & given.keys():
        assert given["batch"] > 0, f"{source.key}: {name} of no batch entry"


@contextmanager
def first_tilings() -> Iterator[None]:
    """Inside, a kernel with functions has the first tiling of its ladder: which one does not spill only compiling them tells."""
    forget = sm80._forward_config.cache_clear, sm80._backward_config.cache_clear, sm90._choice.cache_clear, sm90._fitting.clear
    with ExitStack() as stack:
        for memory in forget:
            memory()
            stack.callback(memory)
        for module in (sm80, sm90):
            stack.enter_context(mock.patch.object(module, "first_that_fits", lambda configs, *_: next(iter(configs))))
        yield


def misaligned(source: compile.Source, values: list[Any]) -> None:
    """Fail for a launch whose kernel loads several elements at once that are not aligned as one."""
    words, given = source.key.split(), dict(zip([name for name, _ in source.fields], values, strict=True))
    at = {name: given[name] for name in ("bias", "bias_batch", "bias_head", "bias_row") if "bias_pairs" in words or "bias_whole" in words}
    if at and "first_key" in given:         # a step may begin at any key that a split begins at
        at |= {name: given[name] * given["bias_col"] for name in ("first_key", "split_keys")}
    size = 16 if "bias_whole" in words else 4
    for name, byte in at.items():
        assert byte % size == 0, f"{source.key}: {name} is at byte {byte}, loads are of {size}"
    if words[0] == "forward_decode" or (words[0] == "preprocess" and "whole" in words):
        for name in {"q", "k", "v", "dout", "out"} & given.keys() - ({"out"} if words[0] == "forward_decode" else set()):
            assert given[name] % 16 == 0, f"{source.key}: {name} is at {given[name]}, loads are of 16 bytes"
