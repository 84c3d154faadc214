"""cp.async for interpreter.py: a copy reads when it is issued and lands when its thread waits for it, so what reads too early finds what
was there before."""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class _Copy(NamedTuple):
    """A copy of each of some threads that is on its way, in group number `group` of its thread."""

    threads: Array
    group: Array
    to: Array
    data: Array


class Copies:
    """Threads with copies on their way. The group that a thread has not committed yet is its last."""

    count: int
    block: Array
    shared: Any
    memory: Any
    address: Any
    get: Any

    def _cp(self, op: list[str], x: list[Any], active: Array) -> None:
        if not hasattr(self, "groups"):
            self.groups, self.on_the_way = np.zeros(self.count, np.int64), list[_Copy]()
        if op[2] == "commit_group":
            self.groups[active] += 1
        elif op[2] == "wait_all":
            self._land(active, self.groups + 1)
        elif op[2] == "wait_group":
            self._land(active, self.groups - int(x[0]))
        else:
            assert "shared" in op
            total, source = x[2], self.address(x[1], active, False)
            to = self.shared.words(self.address(x[0], active, True), total, self.block[active])
            size = np.full(len(active), total) if len(x) < 4 else np.broadcast_to(self.get(x[3], active, "s32"), len(active))
            assert not (source[size > 0] % total).any(), f"misaligned copy of {total} bytes"
            data = np.zeros((len(active), total), np.uint8)         # what is past the source's size is 0
            for k in range(0, total, 4):
                there = size > k
                if there.any():
                    data[there, k:k + 4] = self.memory.bytes.reshape(-1, 4)[self.memory.words(source[there] + k, 4)]
            self.on_the_way.append(_Copy(active.copy(), self.groups[active], to, data))

    def _land(self, active: Array, before: Array) -> None:
        """Let land the copies of these threads whose groups' numbers are below `before`."""
        waits, left = np.zeros(self.count, bool), list[_Copy]()
        waits[active] = True
        for copy in self.on_the_way:
            lands = waits[copy.threads] & (copy.group < before[copy.threads])
            self.shared.bytes.reshape(-1, copy.data.shape[1])[copy.to[lands]] = copy.data[lands]
            if not lands.all():
                left.append(_Copy(*(field[~lands] for field in copy)))
        self.on_the_way = left
