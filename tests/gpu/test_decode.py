"""Few queries and many keys: which calls run the split-key kernels, how the keys
are split, and what some kernels compute, from their PTX. test_forward.py runs the cases."""
from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import gpu
from fastattn.gpu.decode import launch as launch_decode
from fastattn.gpu.decode.config import MOST_SPLITS, DecodeConfig, choose_decode
from fastattn.gpu.precompile import Want, absent_device, sources
from fastattn.gpu.runtime import workspace
from tests.tools.compare import Judge
from tests.tools.devices import requires_gpu
from tests.tools.gpu.calls import interpreted
from tests.tools.gpu.cases import DECODE, device_arguments, for_family, sources_of, to_host
from tests.tools.problems import Case


def kernels_of(case: Case, family: str, arch: str) -> list[str]:
    return [source.key.split()[0] for source in sources_of(case, family, arch)]


@pytest.mark.parametrize(("family", "arch"), [("sm90", "sm_90a"), ("sm80", "sm_90a"), ("sm80", "sm_80"), ("sm80", "sm_120"),
                                              ("any", "sm_89")])
def test_what_runs_the_cases(family: str, arch: str) -> None:
    for case in DECODE:
        assert kernels_of(for_family(case, family), family, arch) == ["forward_decode"], case.name


# the numbers of kernels that run from their PTX here; a device runs all cases
@pytest.mark.parametrize("name", [
    "128_128_bfloat16", "64_128_float16", "all_64", "float32_all_128", "float32_huge_64", "float32_36_60", "float32_window_both_64",
    "all_40_24", "80_80", "all_96_256", "256_256", "rows_20_128_bfloat16", "rows_52_128_float32", "rows_64_80_float16", "many_64",
    "alibi_batch_64_bfloat16", "bias_odd_128_float16", "bias_inf_64_bfloat16", "mask_padding_128_float32", "mask_blocks_64_bfloat16",
    "many_128_float32", "many_32", "many_256"])
def test_numbers(name: str) -> None:
    inputs = {case.name: case for case in DECODE}[f"decode_{name}"].make()
    out, lse, kernels = interpreted(inputs)
    assert [key.split()[0] for key in kernels] == [*(["pack_mask"] if "mask" in inputs.kwargs else []), "forward_decode"]
    Judge(inputs).forward(out, lse)


@pytest.mark.parametrize("changes", [
    {"seqlen_q": 17}, {"seqlen_k": 255}, {"head_dim": 264}, {"head_dim": 124}, {"head_dim_v": 512}, {"dropout": True}, {"packed": True}],
    ids=str)
def test_other_calls_are_not_split(changes: dict[str, object]) -> None:
    usual = {"seqlen_q": 4, "seqlen_k": 1000, "num_heads_k": 4, "head_dim": 128}
    for arch in ("sm_90a", "sm_80"):
        assert sources(*Want(**usual).call(), absent_device(arch))[0].key.startswith("forward_decode")
        call = Want(**{**usual, **changes}).call()
        if gpu.refuses("sm80", call[0], absent_device("sm_80")) is not None:
            continue
        assert not any(source.key.startswith("forward_decode") for source in sources(*call, absent_device(arch)))


def test_more_rows_than_an_mma() -> None:
    """Up to 64 rows of a key head, where tiles of 64 rows would read K and V again or not fill the device."""
    def taken(**changes: int) -> bool:
        call, spec = Want(**{"seqlen_q": 32, "seqlen_k": 4096, "num_heads": 8, "num_heads_k": 8, "batch": 4, **changes}).call()
        return launch_decode.accepts(call, spec, absent_device("sm_90a"))
    assert taken() and taken(seqlen_q=64) and not taken(seqlen_q=65)
    assert not taken(batch=17)                                      # 136 tiles fill 132 multiprocessors
    assert taken(batch=17, seqlen_q=16)
    assert taken(batch=64, seqlen_q=8, num_heads=32) and taken(batch=64, seqlen_q=16, num_heads=32)
    assert not taken(batch=64, seqlen_q=17, num_heads=32)


def test_tilings() -> None:
    """What the table says: 16 to 64 registers for K of a step, and as many for V."""
    for dtype, dim, dim_v in itertools.product(("bfloat16", "float32"), range(16, 257, 16), (16, 128, 256)):
        if dtype == "float32" and max(dim, dim_v) > 128:
            continue
        for rows in (1, 16, 17, 32, 33, 64):
            call, spec = Want(dtype, dim, dim_v, seqlen_q=rows, seqlen_k=512, num_heads=1, batch=1).call()
            config = choose_decode(spec, call.problem)
            registers = config.keys * max(dim, dim_v) * (4 if dtype == "float32" else 2) / 128
            assert registers <= 64 and (registers > 16 or config.keys == 32), (dtype, dim, dim_v)
            assert config.exact and rows <= config.rows < max(2 * rows, 17) and config.key_warps * config.row_warps == config.warps


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 1000, 8192, 131072, 2**31 - 1])
def test_splits_cover_the_keys(keys: int) -> None:
    for tiling in (DecodeConfig(keys=8), DecodeConfig(keys=16, row_warps=4), DecodeConfig(keys=32)):
        step = tiling.keys * tiling.key_warps
        for planes in (1, 8, 100, 132, 133, 1000, 100_000):
            count, each = launch_decode.split_keys(planes, keys, tiling, 132)
            assert 1 <= count <= MOST_SPLITS and each % step == 0
            assert (count - 1) * each < keys <= count * each


def test_splits_fill_the_device() -> None:
    for tiling in (DecodeConfig(keys=16), DecodeConfig(keys=32)):
        slots = 132 * tiling.blocks_per_sm
        for planes in (1, 2, 8, 32, 100, 132):
            blocks = planes * launch_decode.split_keys(planes, 65536, tiling, 132)[0]
            assert blocks / (-(-blocks // slots) * slots) > (0.45 if planes == 1 else 0.9), planes      # of the last wave, too
        assert launch_decode.split_keys(5000, 300, tiling, 132)[0] == 1      # enough without


def test_counter_slots_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that each launch finds zero and leaves zero. Half of the slots are for
    graphs, and a slot is reused only after all others."""
    monkeypatch.setattr(workspace, "private_stream", lambda: 7)
    cleared = []
    monkeypatch.setattr(workspace, "driver", SimpleNamespace(
        cuMemAlloc=lambda size: (0, 4096), cuMemsetD8Async=lambda *where: (cleared.append(where) or 0,),
        cuStreamSynchronize=lambda stream: (0,)))
    zeros = workspace._Zeros(64, 8)
    assert cleared == [(4096, 0, 512, 7)]
    assert [zeros.take(False) for _ in range(5)] == [4096, 4160, 4224, 4288, 4096]
    assert [zeros.take(True) for _ in range(5)] == [4352, 4416, 4480, 4544, 4352]


@requires_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("case", DECODE[::7], ids=lambda case: case.name)
def test_same_bits_from_run_to_run(case: Case) -> None:
    args, kwargs = device_arguments(case.make())
    first = None
    for _ in range(20):
        out, lse = (to_host(x) for x in fastattn.attention(*args, **kwargs, return_lse=True))
        bits = out.view(np.uint16).tobytes() + lse.tobytes()
        first = first or bits
        assert bits == first


@requires_gpu
@pytest.mark.gpu
def test_streams_at_once_and_graphs() -> None:
    """Launches count their blocks in slots that later launches reuse; launches
    that run at the same time have different slots."""
    torch = pytest.importorskip("torch")

    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    q = torch.randn(2, 1, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 5000, 2, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    wanted, wanted_lse = fastattn.attention(q, k, v, return_lse=True)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    for n in range(400):
        with torch.cuda.stream(streams[n % 4]):
            results.append(fastattn.attention(q, k, v, return_lse=True))
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            results += [fastattn.attention(q, k, v, return_lse=True) for _ in range(3)]
    for n in range(40):
        with torch.cuda.stream(streams[n % 2]):
            graphs[n % 2].replay()
    torch.cuda.synchronize()
    for out, lse in results:
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
