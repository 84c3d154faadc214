"""Distributed calls on real devices: ranks as threads on one device; over NCCL where there are two, and nccl4py."""
from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tools.devices import requires_gpu, requires_two_gpus

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
import fastattn.distributed as fd
from tests.tools import ranks
from tests.tools.gpu.cases import on_device, to_host
from tests.tools.rank_processes import of_environment

pytestmark = requires_gpu


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name, case in ranks.CASES.items() if "nothing" not in name])
def test_threads_on_one_device(name: str, dtype: str) -> None:
    case = replace(ranks.CASES[name], dtype=dtype, dim=64, dim_v=64)
    size = 2 if 2 in case.size else case.size[-1]
    whole = ranks.Whole(name, case)
    for found in fd.threads(size, ranks.run, whole, on_device, to_host, timeout=60):
        assert ranks.wrong(case, found) == []


class Inputs:
    """A case's arrays on the device, of each rank, in the order in which tools/ranks.py asks for them: made once, then filled anew."""

    def __init__(self, size: int) -> None:
        self.of_ranks: list[list[Any]] = [[] for _ in range(size)]

    def made(self, rank: int, x: Any) -> Any:
        self.of_ranks[rank].append(on_device(np.ascontiguousarray(x)))
        return self.of_ranks[rank][-1]

    def again(self, rank: int) -> Any:
        held = iter(self.of_ranks[rank])
        return lambda x: next(held)

    def fill(self, rank: int, whole: ranks.Whole, group: Any) -> Any:
        """The numbers of another problem into the same memory; what one rank computes of it."""
        held = iter(self.of_ranks[rank])

        def copied(x: Any) -> Any:
            next(held).copy_(on_device(np.ascontiguousarray(x)))
            return x
        return ranks.results(group, whole, copied)


GRAPHS = [("gather", 1), ("gather", 2), ("gather in pieces", 2), ("gather everything", 2), ("gather saved", 2), ("ring", 1), ("ring", 2),
          ("ring in pieces everything", 2), ("ring alibi and dropout", 2), ("ulysses", 2), ("ulysses in pieces everything", 2)]


@pytest.mark.parametrize(("name", "size"), GRAPHS)
def test_a_cuda_graph(name: str, size: int) -> None:
    """A forward and a backward of all ranks in one graph, replayed over other numbers: streams fork from the captured one and join it."""
    torch = pytest.importorskip("torch")
    case = ranks.shorter(replace(ranks.CASES[name], dtype="float16", dim=64, dim_v=64), 300)
    whole, other, inputs = ranks.Whole(name, case), ranks.Whole(f"{name}, other numbers", case), Inputs(size)
    streams = [torch.cuda.Stream() for _ in range(size)]

    def work(group: Any, to: Any) -> Any:
        with torch.cuda.stream(streams[group.rank]):
            return ranks.results(group, whole, to(group.rank))
    fd.threads(size, work, lambda rank: lambda x: inputs.made(rank, x), timeout=60)         # compiled and loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[0], capture_error_mode="relaxed"):          # threads are not the one that captures
        for stream in streams[1:]:
            stream.wait_stream(streams[0])
        found = fd.threads(size, work, inputs.again, timeout=60)
        for stream in streams[1:]:
            streams[0].wait_stream(stream)
    for problem in (whole, other, whole):
        wanted = fd.threads(size, lambda group, problem=problem: inputs.fill(group.rank, problem, group))
        for results in found:
            for x, _ in results.values():
                x.zero_()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for mine, of_one in zip(found, wanted, strict=True):
            errors = {key: ranks.error(to_host(x), of_one[key][1]) for key, (x, _) in mine.items()}
            assert ranks.wrong(case, errors | {"bits": 1.0}) == []
    assert not np.array_equal(whole.out, other.out)


def test_what_is_refused_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed sequences, whose row numbers the host uploads, and ranks that compare their arguments. The graph is made all the same."""
    torch = pytest.importorskip("torch")
    x, stream = torch.ones((1, 256, 2, 64), device="cuda", dtype=torch.float16), torch.cuda.Stream()

    def dense(group: Any) -> Any:
        with torch.cuda.stream(stream):
            return fd.attention(x, x, x, group=group)

    def packed(group: Any) -> Any:
        with torch.cuda.stream(stream):
            return fd.attention_varlen(x[0], x[0], x[0], [0, 256], group=group)
    torch.cuda.synchronize()
    fd.threads(1, dense)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        with pytest.raises(fastattn.UnsupportedError, match="being captured into a CUDA graph, which has no row numbers"):
            fd.threads(1, packed)
        with monkeypatch.context() as asked:
            asked.setenv("FASTATTN_CHECK_RANKS", "1")
            with pytest.raises(fastattn.UnsupportedError, match="where ranks cannot compare their arguments"):
                fd.threads(2, dense)
        [out] = fd.threads(1, dense)
    out.zero_()
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 1).all())


@requires_two_gpus
@pytest.mark.skipif(importlib.util.find_spec("nccl") is None, reason="nccl4py is not installed")
def test_nccl() -> None:
    code = """
import os
rank = int(os.environ["RANK"])
import fastattn.distributed as fd
from cuda.core import Device
Device(rank).set_current()
from dataclasses import replace
from tests.tools import ranks
from tests.tools.gpu.cases import on_device, to_host
group = fd.connect(rank, timeout=60)
for name, case in ranks.CASES.items():
    if 2 in case.size and "nothing" not in name:
        case = replace(case, dtype="bfloat16", dim=64, dim_v=64)
        print(*[f"{name}: {text}\\n" for text in ranks.wrong(case, ranks.run(group, ranks.Whole(name, case), on_device, to_host))], end="")
print("done")
"""
    for status, output in of_environment(2, "-c", code, NCCL_NVLS_ENABLE="0", seconds=300):
        assert status == 0 and output.splitlines()[-1] == "done" and len(output.splitlines()) == 1, output


@requires_two_gpus
@pytest.mark.skipif(importlib.util.find_spec("nccl") is None, reason="nccl4py is not installed")
def test_a_rank_that_is_killed_ends_the_other() -> None:
    code = """
import os
rank = int(os.environ["RANK"])
import numpy as np, fastattn.distributed as fd
from cuda.core import Device
device = Device(rank)
device.set_current()
from tests.tools.gpu.cases import on_device
group, x = fd.connect(rank, timeout=60), on_device(np.ones((1, 64, 2, 64), np.float16))
fd.attention(x, x, x, group=group)
device.sync()
if group.rank == 1:
    os.kill(os.getpid(), 9)
fd.attention(x, x, x, group=group)
device.sync()
print("went on")
"""
    (status, output), (killed, _) = of_environment(2, "-c", code, NCCL_NVLS_ENABLE="0", seconds=60)
    assert killed == -9 and status == 1 and "rank 0 ends: rank 1 has ended" in output and "went on" not in output, output
