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
            to = self.shared.words(self.address(x[0], active, True), 16, self.block[active])
            size = np.full(len(active), 16) if len(x) < 4 else np.broadcast_to(self.get(x[3], active, "s32"), len(active))
            there, data = size > 0, np.zeros((len(active), 16), np.uint8)
            if there.any():
                data[there] = self.memory.bytes.reshape(-1, 16)[self.memory.words(self.address(x[1], active, False)[there], 16)]
            self.on_the_way.append(_Copy(active.copy(), self.groups[active], to, data))

    def _land(self, active: Array, before: Array) -> None:
        """Let land the copies of these threads whose groups' numbers are below `before`."""
        memory = self.shared.bytes[:self.shared.bytes.size // 16 * 16].reshape(-1, 16)
        waits, left = np.zeros(self.count, bool), list[_Copy]()
        waits[active] = True
        for copy in self.on_the_way:
            lands = waits[copy.threads] & (copy.group < before[copy.threads])
            memory[copy.to[lands]] = copy.data[lands]
            if not lands.all():
                left.append(_Copy(*(field[~lands] for field in copy)))
        self.on_the_way = left
