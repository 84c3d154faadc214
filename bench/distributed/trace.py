"""When calls of the engine and transfers run on a rank's device: events around them, on the streams where they are."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fastattn.arrays.streams import check, driver, on_device
from fastattn.distributed.run import Run

Mark = tuple[str, float, float]         # what, and milliseconds from the first event to its begin and its end


class Trace:
    """Empty on a CPU, whose work has no streams."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.events = stream, list[tuple[str, Any, Any]]()

    def _event(self, stream: Any) -> Any:
        d = driver()
        with on_device(stream.device):
            event = check(d.cuEventCreate(d.CUevent_flags.CU_EVENT_DEFAULT), "cuEventCreate")
            check(d.cuEventRecord(event, stream.handle), "cuEventRecord")
        return event

    @contextmanager
    def _around(self, name: str, stream: Any) -> Iterator[None]:
        begin = self._event(stream)
        yield
        self.events.append((name, begin, self._event(stream)))

    def of(self, rank: Any, call: Callable[[], Any]) -> list[Mark]:
        """The marks of one call."""
        if self.stream is None or rank.group.size == 1:
            return []
        from fastattn.distributed.device import transfer_stream

        transfers, nccl, (forward, backward) = transfer_stream(self.stream.device), rank.group._nccl, (Run.forward, Run.backward)

        begun = list[Any]()

        def start() -> None:
            begun.append(self._event(transfers))
            nccl.group_start()

        def end() -> None:
            nccl.group_end()
            self.events.append(("transfer", begun.pop(), self._event(transfers)))
        bindings = mock.Mock(group_start=start, group_end=end, send=nccl.send, recv=nccl.recv)

        def marked(name: str, work: Callable[..., None]) -> Callable[..., None]:
            def run(*arguments: Any) -> None:
                with self._around(name, self.stream):
                    work(*arguments)
            return run
        self.events.clear()
        rank.barrier()
        first = self._event(self.stream)
        with (mock.patch.object(rank.group, "_nccl", bindings),
              mock.patch.object(Run, "forward", marked("forward", forward)),
              mock.patch.object(Run, "backward", marked("backward", backward))):
            call()
        rank.synchronize()
        time.sleep(0.01)
        d = driver()

        def at(event: Any) -> float:
            return float(check(d.cuEventElapsedTime(first, event), "cuEventElapsedTime"))
        return [(name, at(begin), at(end)) for name, begin, end in self.events]
