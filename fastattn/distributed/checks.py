"""What is checked before the first message."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from .. import registry
from ..arrays.streams import Stream, capturing, on_device
from ..arrays.view import View
from ..errors import UnsupportedError
from ..options import LENGTH, Check
from ..problem import Problem
from .group import group as make_group
from .memory import memory_of
from .messages import Group, Message, RankError, exchange
from .spans import SHARDS, Spans, total


def group_of(check: Check, group: Any) -> Group:
    if group is None:
        raise check.type("group", "is None", "a group of ranks", "group=fastattn.distributed.group(comm) makes one")
    return make_group(group)


def check_memory(check: Check, group: Group, x: View) -> None:
    if group.reads not in ("", x.device[0]):
        raise check.value("q", f"is on device {x.device}", f"an array in {group.reads} memory, which the group exchanges",
                          "group() takes a communicator of mpi4py for host arrays and of nccl4py for CUDA arrays")


def shared_facts(p: Problem) -> dict[str, Any]:
    """What a Problem tells that all ranks must have in common."""
    names = "dtype", "batch", "num_heads", "num_heads_k", "head_dim", "head_dim_v", "seqlen_q", "seqlen_k"
    return {name: getattr(p, name) for name in names} | {
        "alibi_slopes": p.score.alibi, "bias": p.score.bias, "mask": p.score.mask, "sinks": p.score.sinks}


def shard_of(check: Check, shard: Any) -> str:
    if shard not in SHARDS:
        raise check.value("shard", f"is {shard!r}", "'zigzag' or 'contiguous'")
    return str(shard)


def whole_length(check: Check, argument: str, given: Any, local: int, size: int) -> int:
    """The length of a whole sequence: what the caller says, else as many rows in every rank as here."""
    return local * size if given is None else check.integer(argument, given, *LENGTH)


def local_rows(check: Check, argument: str, rows: int, length_name: str, seqlen: int, spans: Spans, rank: int) -> None:
    if rows != total(spans):
        owned = " and ".join(f"[{span.start}, {span.stop})" for span in spans)
        raise check.value(argument, f"has {rows} rows", f"{total(spans)}, which rank {rank} owns of {length_name} = {seqlen}: {owned}",
                          f"shard() cuts an array, and {length_name}= is needed where ranks own different numbers of rows")


# ---------------------------------------------------------------- do the ranks agree?
TEXT_BYTES = 4096


class Facts:
    """What all ranks must have in common, by name, if it is `wanted`. `captured`: the call is refused, and nothing may be sent."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.captured = wanted, False
        self.known: dict[str, str] = {}

    def add(self, **facts: Any) -> None:
        if self.wanted:
            self.known |= {name: str(x) for name, x in facts.items()}

    def text(self) -> str:
        return "\n".join(f"{name} = {x}" for name, x in self.known.items())


def refuse_graph(call: str, facts: Facts, stream: Stream | None, packed: bool = False) -> None:
    """UnsupportedError where the call's stream is captured into a CUDA graph, and the call would need the host."""
    if stream is None or not (packed or facts.wanted):
        return
    with on_device(stream.device):
        facts.captured = capturing(stream.handle)
    if facts.captured and packed:
        raise UnsupportedError(f"{call}(): its stream is being captured into a CUDA graph, which has no row numbers of packed sequences; "
                               "dense calls can be captured.")
    if facts.captured:
        raise UnsupportedError(f"{call}(): its stream is being captured into a CUDA graph, where ranks cannot compare their arguments; "
                               "capture with FASTATTN_CHECK_RANKS=0, after a call that has compared them.")


def asked() -> bool:
    return os.environ.get("FASTATTN_CHECK_RANKS", "0") not in ("", "0")


@contextlib.contextmanager
def ranks_agree(call: str, group: Group) -> Iterator[Facts]:
    """Runs the checks of a call, which add its Facts. With FASTATTN_CHECK_RANKS=1 ranks tell each other then; if their facts differ, or if
    the checks of some fail, all ranks raise, and the group stays usable.
    """
    quiet = group.size == 1 or not asked() or registry.remarks.get() is not None
    facts, error = Facts(not quiet), None
    try:
        yield facts
    except Exception as found:
        if quiet or facts.captured:
            raise
        error = found
    if quiet:
        return
    facts.add(call=call)
    texts = everyones(group, f"{type(error).__name__}: {error}" if error else facts.text(), error is not None)
    if error is not None and len(set(texts)) == 1:
        raise error
    if error is not None or len(set(texts)) > 1:
        raise RankError(f"{call}(): {_difference(texts).removesuffix('.')}.") from error


def everyones(group: Group, text: str, failed: bool) -> list[str]:
    """The texts of all ranks, with a mark before those of ranks whose checks failed."""
    words = ("!" if failed else " ").encode() + text.encode()[:TEXT_BYTES - 1]
    memory = memory_of(None)
    if group.reads == "cuda":
        from ..arrays.streams import LEGACY, Stream

        memory = memory_of(Stream(LEGACY, group.device))  # type: ignore[attr-defined]
    mine = memory.upload(words.ljust(TEXT_BYTES, b"\0"))
    others = [rank for rank in range(group.size) if rank != group.rank]
    found = {rank: memory.empty(mine.shape, mine.dtype) for rank in others}
    exchange(group, [Message(mine, rank) for rank in others], [Message(found[rank], rank) for rank in others],
             getattr(memory, "stream", None)).wait()
    found[group.rank] = mine
    return [memory.download(found[rank]).rstrip(b"\0").decode(errors="replace") for rank in range(group.size)]


def _difference(texts: list[str]) -> str:
    """In words, how ranks differ."""
    failed = [f"rank {rank} raises {text[1:]}" for rank, text in enumerate(texts) if text[0] == "!"]
    if failed:
        return "; ".join(failed)
    facts = [dict(line.split(" = ", 1) for line in text[1:].splitlines()) for text in texts]
    parts = list[str]()
    for name in dict.fromkeys(name for own in facts for name in own):
        values = [own.get(name, "nothing") for own in facts]
        if len(set(values)) > 1:
            parts.append(f"{name} is " + ", ".join(f"{value} in rank {rank}" for rank, value in enumerate(values)))
    return "ranks do not agree: " + "; ".join(parts)
