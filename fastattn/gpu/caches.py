"""Calls of attention_with_kvcache on the GPU: what comes before attention. Without Numba.

The new keys and values go into the caches and q is rotated into memory of its own (rows/append.py). What is left is attention of that q over
the caches, which a kernel family runs. It finds lengths and tables on the device; `Cache.append` says whether q's rows are counted with
the keys.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from .rows import append_launch
from .runtime.launcher import Launcher
from .spec import Call, Launch, Spec, make_spec

ALIGNED = 256               # an address as good as any of the temporary memory


class Forward(Protocol):
    """What a kernel family does with a call."""

    def prepare(self, call: Call, spec: Spec, launcher: Launcher) -> Launch:
        """As Family.prepare."""


def refuses(call: Call) -> str | None:
    """None, or why no family runs the call."""
    return append_launch.refuses_append(call)


def attention_alone(call: Call, address: int = ALIGNED) -> tuple[Call, int]:
    """The call after the append, with the rotated q at an address, and the bytes of q there."""
    p = call.problem
    if p.cache is None or p.cache.rotary is None:
        return call, 0
    q, size = append_launch.workspace_of(call.operands.q, address)
    return replace(call, operands=replace(call.operands, q=q)), size


def prepare(call: Call, family: Forward, launcher: Launcher) -> Launch:
    """What enqueues this call, or one that differs in addresses only."""
    assert call.problem.cache is not None
    alone, size = attention_alone(call)
    attend = family.prepare(alone, make_spec(alone.problem, alone.operands, alone.lse is not None), launcher)
    if not call.problem.cache.append:
        return attend
    append = append_launch.prepare(call, launcher)

    def launch(call: Call, stream: int) -> None:
        append(call, 0, stream)
        attend(call, stream)

    def launch_rotated(call: Call, stream: int) -> None:
        with launcher.temporary(size, stream) as memory:
            append(call, memory, stream)
            attend(attention_alone(call, memory)[0], stream)
    return launch_rotated if size else launch
