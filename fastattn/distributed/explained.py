"""A call that `explain` stops at its first engine call: nothing is sent, and nothing is written."""
from __future__ import annotations

from typing import Any

from .. import registry
from ..arrays.streams import Stream
from ..arrays.view import Shape, View
from .memory import Memory
from .messages import Done, Group, Message, Pending
from .plan import Method
from .run import Run


class Silent:
    """The group, without messages."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self.reads = group.rank, group.size, group.reads

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        return Done()

    def abort(self, reason: str) -> None:
        pass


class Unwritten:
    """The memory: buffers are made, and stay as they are."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.device, self.handle = memory, memory.device, memory.handle

    def empty(self, shape: Shape, dtype: str) -> View:
        return self.memory.empty(shape, dtype)

    def numbers(self, numbers: Any) -> View:
        return self.memory.numbers(numbers)

    def upload(self, words: bytes) -> View:
        return self.memory.upload(words)

    def download(self, x: View) -> bytes:
        return b""

    def _nothing(self, *arguments: Any, **keywords: Any) -> None:
        pass

    zero = copy = add = merge = move = _nothing


def explained(run: Run, method: Method, pieces: int = 1) -> Run:
    """The call's Run; inside `explain` one that sends and writes nothing, and the reasons go into the notes."""
    remarks = registry.remarks.get()
    if remarks is None:
        return run
    remarks.append(f"rank {run.group.rank} of {run.group.size} runs method {method} ({method.why})"
                   + f", heads in {pieces} pieces" * (pieces > 1) + "; this is its first call")
    return Run(run.engine, Unwritten(run.memory), Silent(run.group), run.stream, run.deterministic)
