"""Streams, events and buffers of CUDA calls, without a GPU: everything is enqueued first, and runs in a random order then
(tools/stream_machine.py). Two ranks with a device each, over a fake NCCL, and over the transport of threads.
"""
from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

import fastattn
import fastattn.distributed as fd
from fastattn.arrays.streams import CudaError, Stream
from fastattn.distributed import device
from fastattn.distributed.messages import Message
from tests.tools import packed_ranks, ranks
from tests.tools.stream_machine import DeviceInput, Machine, Nccl, content, machine

NAMES = ["gather", "gather in pieces", "gather saved", "gather halo", "gather everything", "gather bias of keys", "ring", "ring in pieces",
         "ring everything", "ulysses", "ulysses everything", "ulysses in pieces", "ulysses x ring"]


def run(group: Any, whole: ranks.Whole, m: Machine) -> dict[str, Any]:
    """Results of a rank, on its device, beside what one rank computes."""
    m.contexts.append(group.rank)
    return ranks.results(group, whole, lambda x: DeviceInput(m, x, group.rank), stream=5)


def check(of_ranks: list[dict[str, Any]], m: Machine) -> None:
    """Run what was enqueued, and compare."""
    m.run()
    for found in of_ranks:
        errors = {key: ranks.error(content(x), expected) for key, (x, expected) in found.items()}
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_nccl(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ranks.CASES[name]
    size = case.size[-1 if seed == 2 else 0]
    with machine(monkeypatch, seed) as m:
        nccl = Nccl(m, size)
        monkeypatch.setitem(sys.modules, "nccl.bindings.nccl", nccl)
        from fastattn.distributed.nccl import NcclGroup

        def work(group: Any) -> Any:
            return run(NcclGroup(nccl.comms[group.rank], 60), whole, m)
        whole = ranks.Whole(name, ranks.shorter(case, 136))
        check(fd.threads(size, work, timeout=60), m)
        assert not m.mail


@pytest.mark.parametrize("name", ["gather short", "gather everything", "ring short queries", "ring everything", "ulysses everything"])
def test_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_packed(group: Any, whole: packed_ranks.Whole) -> dict[str, Any]:
        m.contexts.append(group.rank)
        return packed_ranks.results(group, whole, lambda x: DeviceInput(m, x, group.rank), stream=5)
    with machine(monkeypatch, 4) as m:
        check(fd.threads(2, run_packed, packed_ranks.Whole(name), timeout=60), m)


@pytest.mark.parametrize("name", ["gather", "ring", "ulysses"])
def test_threads_on_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(monkeypatch, 3) as m:
        check(fd.threads(2, run, ranks.Whole(name, ranks.shorter(ranks.CASES[name], 136)), m, timeout=60), m)


@pytest.mark.parametrize("name", ["gather in pieces", "ring", "ulysses"])
def test_buffers_are_used_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By later calls of the same stream, whose results stay right."""
    whole = ranks.Whole(name, ranks.shorter(ranks.CASES[name], 136))

    def work(group: Any) -> Any:
        nccl_group = NcclGroup(nccl.comms[group.rank], 60)
        found = [run(nccl_group, whole, m)]
        before = m.pooled[group.rank]
        found.append(run(nccl_group, whole, m))
        assert m.pooled[group.rank] == before > 0, "a second call needs no more memory"
        return found
    with machine(monkeypatch, 5, 1 << 24) as m:
        nccl = Nccl(m, ranks.CASES[name].size[0])
        monkeypatch.setitem(sys.modules, "nccl.bindings.nccl", nccl)
        from fastattn.distributed.nccl import NcclGroup

        of_ranks = fd.threads(len(nccl.comms), work, timeout=60)
        check([found for of_rank in of_ranks for found in of_rank], m)
        for rank in range(len(of_ranks)):
            free = device.free_blocks(rank)
            assert 0 < free.bytes == sum(block.size for blocks in free._blocks.values() for block in blocks)


def test_free_buffers_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(monkeypatch, 6, 4096) as m:
        stream = Stream(5, 0)
        for size in (1000, 1000, 2000, 3000, 5000):
            device.Buffer(size, stream)
        free = device.free_blocks(0)
        assert free.bytes == 3072 and [key for key, blocks in free._blocks.items() if blocks] == [(5, 3072)]
        again = device.Buffer(3000, stream)
        assert not free.bytes and device.Buffer(3000, Stream(6, 0)).ptr != again.ptr
        m.capturing.add(5)
        del again
        assert device.Buffer(3000, stream)._captured
        m.run()


def test_kept_buffers_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is missing is asked for again once nothing is kept; then the error is raised."""
    with machine(monkeypatch, 7, 1 << 20) as m:
        stream, allocate = Stream(5, 0), m.cuMemAllocFromPoolAsync
        device.Buffer(1000, stream)
        free = device.free_blocks(0)
        full = types.SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")
        monkeypatch.setattr(m, "cuMemAllocFromPoolAsync", lambda *a: (full, 0) if free.bytes else allocate(*a), raising=False)
        assert free.bytes == 1024 and device.Buffer(2000, stream).ptr
        monkeypatch.setattr(m, "cuMemAllocFromPoolAsync", lambda *a: (full, 0), raising=False)
        with pytest.raises(CudaError, match="cuMemAllocFromPoolAsync of 3072 bytes failed with CUDA_ERROR_OUT_OF_MEMORY"):
            device.Buffer(3000, stream)
        m.run()


def test_blocks_that_a_graph_may_use_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of a call before, as what is saved for a backward, that goes away while its stream is captured."""
    with machine(monkeypatch, 8, 1 << 20) as m:
        stream = Stream(5, 0)
        before = device.Buffer(1000, stream)
        ptr = before.ptr
        m.capturing.add(5)
        del before
        m.capturing.clear()
        assert not device.free_blocks(0).bytes and device.Buffer(1000, stream).ptr != ptr
        m.run()


def test_transfers_of_a_graph_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may ask whether their events have happened."""
    from fastattn.distributed.nccl import NcclGroup

    with machine(monkeypatch, 1) as m:
        nccl, memory = Nccl(m, 2), device.Cuda(Stream(5, 0))
        monkeypatch.setitem(sys.modules, "nccl.bindings.nccl", nccl)
        group = NcclGroup(nccl.comms[0], 1000)
        x, y = memory.empty((4,), "float32"), memory.empty((4,), "float32")
        for captured, under_way in ((True, 0), (False, 1)):
            m.capturing = {5, device.transfer_stream(0).handle} if captured else set()
            group.exchange([Message(x, 1)], [Message(y, 1)], memory.stream).wait()
            assert len(group._under_way) == under_way


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_refused_in_a_graph(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent; the group goes on."""
    from fastattn.distributed.nccl import NcclGroup

    with machine(monkeypatch, 1) as m:
        nccl = Nccl(m, 2)
        monkeypatch.setitem(sys.modules, "nccl.bindings.nccl", nccl)
        group, x = NcclGroup(nccl.comms[0], 1000), DeviceInput(m, np.ones((1, 64, 2, 8)), 0)
        row = DeviceInput(m, np.ones((64, 2, 8)), 0)
        m.capturing.add(5)
        if packed:
            with pytest.raises(fastattn.UnsupportedError, match=r"attention_varlen.*being captured into a CUDA graph, which has no"):
                fd.attention_varlen(row, row, row, [0, 128], group=group, stream=5)
        else:
            monkeypatch.setenv("FASTATTN_CHECK_RANKS", "1")
            with pytest.raises(fastattn.UnsupportedError, match="where ranks cannot compare their arguments; capture with"):
                fd.attention(x, x, x, group=group, stream=5)
        assert not any(m.queues.values()) and not group.failed


@pytest.mark.parametrize("size", [1, 511, 512, 513, 10_000, (1 << 20) + 1, (1 << 30) - 1])
def test_sizes_of_buffers(size: int) -> None:
    found = device.rounded(size)
    assert found >= size and found % 512 == 0 and found - size <= max(512, size / 8) and device.rounded(found) == found


@pytest.mark.parametrize("kind", ["error", "time"])
def test_a_group_over_nccl_that_fails_raises(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error that NCCL reports, and a transfer that does not end: the communicator is aborted, and the next call raises."""
    from fastattn.distributed.nccl import NcclGroup

    with machine(monkeypatch, 1) as m:
        nccl = Nccl(m, 2)
        comm = nccl.comms[0]
        monkeypatch.setitem(sys.modules, "nccl.bindings.nccl", nccl)
        group = NcclGroup(comm, 1000)
        x = DeviceInput(m, np.ones((1, 64, 2, 8)), 0)
        fd.attention(x, x, x, group=group, stream=5)            # the other rank sends nothing
        group.look()
        assert not group.failed
        if kind == "error":
            comm.result = 6
        else:
            group.timeout = 0.0
        group.look()
        reason = "NCCL: a peer is gone" if kind == "error" else "a transfer has not ended in 0 seconds"
        assert group.failed == reason and not comm.is_valid
        assert f"rank 0 ends its group: {reason}" in capsys.readouterr().err
        with pytest.raises(fd.RankError, match=reason):
            fd.attention(x, x, x, group=group, stream=5)
