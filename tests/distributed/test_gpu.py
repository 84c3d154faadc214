"""Distributed calls on real devices: ranks as threads on one device; over NCCL where there are two, and nccl4py."""
from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from tests.tools.devices import requires_gpu, requires_two_gpus

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

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
