"""A group over a ProcessGroup of torch.distributed: what its backend takes, host tensors with gloo, CUDA tensors with NCCL."""
from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from ..arrays.streams import Stream
from ..arrays.view import View, size_of
from .messages import Message, Pending, RankError


class TorchGroup:
    """Messages are bytes: tensors of uint8 that share the memory of a View."""

    def __init__(self, process_group: Any, timeout: float) -> None:
        self._torch, self._group, self._timeout = sys.modules["torch"], process_group, timeout
        self.rank, self.size = int(process_group.rank()), int(process_group.size())
        devices = {device.type for device in getattr(process_group, "_device_types", ())}
        self.reads = devices.pop() if len(devices) == 1 and devices <= {"cpu", "cuda"} else ""

    def exchange(self, give: list[Message], take: list[Message], stream: Stream | None) -> Pending:
        torch = self._torch
        if stream is not None:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream.handle, device=stream.device)):
                return _Exchange(self, self._start(give, take), stream, (give, take))
        return _Exchange(self, self._start(give, take), None, (give, take))

    def _start(self, give: list[Message], take: list[Message]) -> list[Any]:
        """One group of messages: with NCCL one by one would wait for each other for ever."""
        distributed = self._torch.distributed
        found = [distributed.P2POp(distributed.irecv, self._bytes(view), group=self._group, group_peer=rank) for view, rank in take]
        found += [distributed.P2POp(distributed.isend, self._bytes(view), group=self._group, group_peer=rank) for view, rank in give]
        return list(distributed.batch_isend_irecv(found))

    def _bytes(self, view: View) -> Any:
        flat = View(view.ptr, (size_of(view),), (1,), "bool", view.device, view)
        return self._torch.from_dlpack(flat).view(self._torch.uint8)

    def abort(self, reason: str) -> None:
        end = getattr(self._group, "abort", None)
        if end is not None:
            end()


class _Exchange:
    def __init__(self, group: TorchGroup, works: list[Any], stream: Stream | None, kept: Any) -> None:
        self.group, self.works, self.stream, self.kept = group, works, stream, kept

    def wait(self) -> None:
        torch = self.group._torch
        try:
            if self.stream is None:
                for work in self.works:
                    work.wait(timedelta(seconds=self.group._timeout))
            else:
                with torch.cuda.stream(torch.cuda.ExternalStream(self.stream.handle, device=self.stream.device)):
                    for work in self.works:
                        work.wait()
        except RuntimeError as error:
            raise RankError(f"rank {self.group.rank}: {error}") from error
        self.kept = None
