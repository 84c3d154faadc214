"""What the GPU forward promises besides right results. Needs torch.

The same bits every run, no races, graphs, streams, sizes past 32 bits, the exact dropout mask, NaN that does not spread, and an error no
larger than that of torch's flash backend.
"""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

import fastattn
from fastattn import UnsupportedError
from tests.tools.devices import requires_gpu
from tests.tools.gpu.cases import (
    LARGE,
    Judge,
    device_arguments,
    families_here,
    for_family,
    forward,
    function_of,
    to_host,
    torch,
    using,
)
from tests.tools.problems import BY_NAME, Case, Inputs

pytestmark = [requires_gpu, pytest.mark.gpu, pytest.mark.usefixtures("kernels"),
              pytest.mark.skipif(torch() is None, reason="needs torch with CUDA")]
ALL = {**BY_NAME, **{case.name: case for case in LARGE}}


def pairs(*names: str) -> Any:
    given = [pytest.param(for_family(ALL[name], family), family, id=f"{name}-{family}") for name in names for family in families_here()]
    return pytest.mark.parametrize(("case", "family"), given)


def plain(*dims: int, dtype: str = "bfloat16", **settings: Any) -> Any:
    """A mark: the kernels of calls with these head sizes are compiled beforehand. Such calls return lse."""
    return pytest.mark.kernels(*(Case("plain", dtype, head_dim=dim, **settings) for dim in dims))


def bits(x: Any) -> Any:
    """A tensor as integers: equal means the same bits, NaN and the sign of 0 included."""
    return x.view({2: torch().int16, 4: torch().int32, 8: torch().int64}[x.element_size()])


def normal(*shape: int, dtype: str = "bfloat16", seed: int = 0) -> Any:
    generator = torch().Generator("cuda").manual_seed(seed)
    return torch().randn(*shape, device="cuda", generator=generator, dtype=torch().float32).to(getattr(torch(), dtype))


def call(inputs: Inputs, **more: Any) -> Any:
    """A function that launches the problem again, and the arguments on the device."""
    args, kwargs = device_arguments(inputs)
    return lambda: function_of(inputs)(*args, **kwargs, return_lse=True, **more)


# ---------------------------------------------------------------- the same bits
REPEATED = ("large_gqa_128", "large_window_64", "large_packed_128", "large_dropout_64", "everything_bfloat16", "decode_bfloat16")


@pairs(*REPEATED)
def test_same_bits_every_run(case: Case, family: str) -> None:
    """1000 launches in a row, compared on the device. Concurrent matrix products of other sizes shift their timing."""
    noise = normal(777, 777)
    with using(family):
        launch = call(case.make())
        try:
            first, first_lse = launch()
        except UnsupportedError as error:
            pytest.skip(str(error))
        first, first_lse = first.clone(), first_lse.clone()
        different = torch().zeros(1, dtype=torch().int64, device="cuda")
        for i in range(1000):
            if i % 7 == 0:
                torch().mm(noise[:100 + i % 600], noise)
            out, lse = launch()
            different += (bits(out) != bits(first)).any() | (bits(lse) != bits(first_lse)).any()
    assert int(different) == 0, f"{int(different)} of 1000 runs differ from the first"


@plain(64, 128, 256)
@plain(64, 128, 256, causal=True)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_tiles_a_block_race(dim: int) -> None:
    """Enough tiles for every multiprocessor to take several, in an order that differs from run to run."""
    q, k, v = (normal(4, 1500, 16, dim, seed=s) for s in range(3))
    for settings in ({}, {"causal": True}):
        first = fastattn.attention(q, k, v, **settings, return_lse=True)[0].clone()
        different = torch().zeros(1, dtype=torch().int64, device="cuda")
        for _ in range(300):
            different += (bits(fastattn.attention(q, k, v, **settings, return_lse=True)[0]) != bits(first)).any()
        assert int(different) == 0, f"{int(different)} of 300 runs differ, {settings}"


# ---------------------------------------------------------------- graphs and streams
@pairs("large_gqa_128", "large_dropout_64", "large_packed_128", "large_bias_64")
def test_graph_replays_with_new_inputs(case: Case, family: str) -> None:
    one, other = case.make(), replace(case, name=case.name + "_other").make()
    args, kwargs = device_arguments(one)
    function = function_of(one)
    with using(family):
        try:
            expected = [function(*device_arguments(x)[0], **device_arguments(x)[1], return_lse=True) for x in (one, other)]
        except UnsupportedError as error:
            pytest.skip(str(error))
        graph, side = torch().cuda.CUDAGraph(), torch().cuda.Stream()
        side.wait_stream(torch().cuda.current_stream())
        with torch().cuda.stream(side):
            function(*args, **kwargs, return_lse=True)
        torch().cuda.current_stream().wait_stream(side)
        with torch().cuda.graph(graph):
            out, lse = function(*args, **kwargs, return_lse=True)
    for inputs, (expected_out, expected_lse) in zip((one, other, one), (*expected, expected[0]), strict=True):
        new_args, new_kwargs = device_arguments(inputs)
        for x, y in zip([*args, *kwargs.values()], [*new_args, *new_kwargs.values()], strict=True):
            if isinstance(x, torch().Tensor):
                x.copy_(y)
        out.fill_(math.nan)
        graph.replay()
        assert (bits(out) == bits(expected_out)).all() and (bits(lse) == bits(expected_lse)).all()


@plain(64, lengths_q=(9,), causal=True)
def test_graph_of_packed_lengths_that_change() -> None:
    """The replay reads the lengths, not the capture."""
    q, k, v = (normal(700, 4, 64, seed=s) for s in range(3))
    cu = torch().tensor([0, 300, 700], dtype=torch().int32, device="cuda")
    other = torch().tensor([0, 50, 60], dtype=torch().int32, device="cuda")
    settings = {"causal": True, "max_seqlen_q": 700, "max_seqlen_k": 700, "return_lse": True}
    expected = [fastattn.attention_varlen(q, k, v, x, x, **settings)[0] for x in (cu, other)]
    graph = torch().cuda.CUDAGraph()
    with torch().cuda.graph(graph):
        out, _ = fastattn.attention_varlen(q, k, v, cu, cu, **settings)
    for x, y in ((cu.clone(), expected[0]), (other, expected[1])):
        cu.copy_(x)
        out.fill_(math.nan)
        graph.replay()
        assert (bits(out) == bits(y)).all()
    assert (expected[1][60:] == 0).all()


def test_two_streams_at_once() -> None:
    cases = [for_family(ALL[name], "any") for name in ("large_gqa_128", "large_packed_128")]
    launches = [call(case.make()) for case in cases]
    expected = [launch()[0].clone() for launch in launches]
    torch().cuda.synchronize()
    found: list[list[Any]] = [[], []]
    side = [torch().cuda.Stream(), torch().cuda.Stream()]
    for _ in range(200):
        for n in range(2):
            with torch().cuda.stream(side[n]):
                found[n].append((bits(launches[n]()[0]) != bits(expected[n])).any())
    torch().cuda.synchronize()
    assert not any(bool(torch().stack(flags).any()) for flags in found)


# ---------------------------------------------------------------- sizes
def exact(q: Any, k: Any, v: Any, causal: bool = False) -> tuple[Any, Any]:
    """(out, lse) of (batch, seqlen, heads, dim) tensors in float64, plainly."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        rows, keys = scores.shape[-2:]
        scores.masked_fill_(torch().ones(rows, keys, dtype=torch().bool, device="cuda").triu(keys - rows + 1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def relative(x: Any, y: Any) -> float:
    return float((x.double() - y).norm() / y.norm())


@plain(64)
@pytest.mark.parametrize("family", families_here())
def test_more_than_65535_batches_and_heads(family: str) -> None:
    with using(family):
        for batch, heads in ((70001, 1), (1, 70001), (300, 300)):
            q, k, v = (normal(batch, 5, heads, 64, seed=s) for s in range(3))
            assert relative(fastattn.attention(q, k, v, return_lse=True)[0], exact(q, k, v)[0]) < 5e-3


@plain(64, lengths_q=(9,))
def test_more_than_65535_sequences() -> None:
    q, k, v = (normal(3 * 70001, 1, 64, seed=s) for s in range(3))
    cu = torch().arange(0, 3 * 70001 + 1, 3, dtype=torch().int32, device="cuda")
    out, _ = fastattn.attention_varlen(q, k, v, cu, cu, max_seqlen_q=3, max_seqlen_k=3, return_lse=True)
    assert relative(out.view(70001, 3, 1, 64), exact(*(x.view(70001, 3, 1, 64) for x in (q, k, v)))[0]) < 5e-3


@plain(128, causal=True, window=(100, 0))
@pytest.mark.parametrize("family", families_here())
def test_more_than_2_to_the_31_elements(family: str) -> None:
    """The last rows of tensors of 4.3 GB each, with a window, so that it takes little time."""
    if torch().cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free memory")
    shape = (2, 66000, 128, 128)
    q, k, v, out = (torch().zeros(shape, dtype=torch().bfloat16, device="cuda") for _ in range(4))
    ends = [normal(2, 400, 128, 128, seed=s) for s in range(3)]
    for x, end in zip((q, k, v), ends, strict=True):
        x[:, -400:] = end
    with using(family):
        fastattn.attention(q, k, v, causal=True, window=(100, 0), out=out, return_lse=True)
        # the first 100 of these rows would see keys before; the others see the same keys in both
        expected, _ = fastattn.attention(*ends, causal=True, window=(100, 0), return_lse=True)
    # blocks of keys begin elsewhere, so sums are rounded otherwise; a wrong element would be far off
    assert relative(out[:, -300:], expected[:, -300:].double()) < 5e-3
    assert math.isfinite(float(out[:, :-400].abs().max())) and float(out[:, :-400].abs().max()) == 0.0
    del q, k, v, out
    torch().cuda.empty_cache()


# ---------------------------------------------------------------- dropout
@plain(64, head_dim_v=104, dtype="float16", dropout_p=0.1)
@pytest.mark.parametrize("p", [0.1, 0.7])
@pytest.mark.parametrize("family", families_here())
def test_dropout_drops_what_dropout_mask_says(family: str, p: float) -> None:
    """V is a part of the identity matrix, so the output is a range of columns of the probabilities."""
    settings: dict[str, Any] = {"dropout_p": p, "seed": 0xFEDC_BA98_7654_3210, "offset": 7}
    q, k = normal(2, 200, 3, 64, dtype="float16"), normal(2, 300, 3, 64, dtype="float16", seed=1)
    keep = fastattn.dropout_mask(2, 3, 200, 300, **settings)
    _, lse = exact(q, k, k)
    probabilities = to_host(torch().exp(torch().einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8 - lse[..., None])) / (
        1 - round(p * 65536) / 65536)
    for start in range(0, 300, 104):
        count = min(104, 300 - start)
        v = torch().zeros(2, 300, 3, 104, dtype=torch().float16, device="cuda")
        v[:, start:start + count] = torch().eye(count, 104, device="cuda", dtype=torch().float16)[None, :, None]
        with using(family):
            out = to_host(fastattn.attention(q, k, v, **settings, return_lse=True)[0]).astype(np.float64).transpose(0, 2, 1, 3)
        out, stretch = out[..., :count], np.s_[:, :, :, start:start + count]
        visible = probabilities[stretch] > 1e-5                      # float16 rounds smaller ones to 0
        np.testing.assert_array_equal(out[visible] != 0, keep[stretch][visible])
        assert (out[~keep[stretch]] == 0).all()
        np.testing.assert_allclose(out, np.where(keep[stretch], probabilities[stretch], 0), rtol=4e-3, atol=1e-5)


# ---------------------------------------------------------------- NaN stays where it is
def same(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# tensor-core kernels multiply V by the 0 of what is masked, and 0 * NaN is NaN (docs/contracts.md, "Masked keys")
FINITE_V_NOT_NEEDED = [family for family in families_here() if family == "simt"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("family", FINITE_V_NOT_NEEDED)
@plain(64, causal="top_left")
def test_keys_that_no_row_attends_to_may_hold_anything(family: str, bad: float) -> None:
    """Past the last diagonal: in blocks that are visited and in blocks that are not."""
    case = for_family(Case("beyond", "bfloat16", seqlen_q=150, seqlen_k=400, head_dim=64, causal="top_left"), family)
    inputs = case.make()
    before = forward(inputs, family)
    inputs.args[1][:, 150:] = inputs.args[2][:, 150:] = bad
    same(forward(inputs, family), before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("family", families_here())
@plain(64, lengths_q=(9,), used_k=(9,))
def test_keys_of_other_sequences_may_hold_anything(family: str, bad: float) -> None:
    case = Case("others", "bfloat16", lengths_q=(100, 70, 30), lengths_k=(90, 200, 33), used_k=(80, 77, 33), head_dim=64)
    inputs = for_family(case, family).make()
    cu = inputs.args[4]
    expected = forward(inputs, family)
    for n, rows in ((0, slice(0, 100)), (2, slice(170, 200))):
        others = inputs.map(np.copy)
        for x in others.args[1:3]:
            keep = x[cu[n]:cu[n + 1]].copy()
            x[...] = bad
            x[cu[n]:cu[n + 1]] = keep
        out, lse = forward(others, family)
        np.testing.assert_array_equal(out[rows], expected[0][rows])
        np.testing.assert_array_equal(lse[:, rows], expected[1][:, rows])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("family", FINITE_V_NOT_NEEDED)
@plain(64, mask=(2, 1, 37, 37))
def test_keys_that_a_mask_excludes_may_hold_anything(family: str, bad: float) -> None:
    """As on the CPU: a key that the boolean mask excludes for every row, and a row for which it excludes every key."""
    case = Case("hidden", "bfloat16", num_heads=4, num_heads_k=2, seqlen_q=140, seqlen_k=190, head_dim=64, mask=(2, 1, 140, 190))
    inputs = for_family(case, family).make()
    inputs.kwargs["mask"][:, :, :, [3, 17, 64, 88, 189]] = False
    inputs.kwargs["mask"][:, :, [0, 21, 139], :] = False
    before = forward(inputs, family)
    assert (before[0][:, [0, 21, 139]] == 0).all() and (before[1][:, :, [0, 21, 139]] == -np.inf).all()
    q, k, v = inputs.args
    k[:, [3, 17, 64, 88, 189]] = v[:, [3, 17, 64, 88, 189]] = bad
    q[:, [0, 21, 139]] = bad
    same(forward(inputs, family), before)


# ---------------------------------------------------------------- and the rest of the signature
@pairs("large_gqa_128", "large_packed_128", "everything_bfloat16", "head_dim_3", "no_keys", "empty_batch")
@pytest.mark.parametrize("lse", [False])
def test_without_lse_and_without_out(case: Case, family: str, lse: bool) -> None:
    inputs = case.make()
    args, kwargs = device_arguments(inputs)
    with using(family):
        try:
            out = function_of(inputs)(*args, **kwargs, return_lse=lse)
        except UnsupportedError as error:
            pytest.skip(str(error))
    assert isinstance(out, torch().Tensor) and out.is_contiguous()
    judge = Judge(inputs)
    judge.forward(to_host(out), judge.exact[1].astype("float64" if case.dtype == "float64" else "float32"))


def test_inputs_are_not_written() -> None:
    inputs = BY_NAME["everything_bfloat16"].make()
    args, kwargs = device_arguments(inputs)
    before = [bits(x).clone() for x in args]
    fastattn.attention(*args, **kwargs)
    assert all((bits(x) == y).all() for x, y in zip(args, before, strict=True))


@plain(64, 128, 256)
@plain(64, 128, 256, causal=True)
@plain(64, 128, 256, dtype="float16")
@plain(64, 128, 256, dtype="float16", causal=True)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", [f for f in families_here() if f != "simt"])
def test_error_is_at_most_that_of_torch_flash(dim: int, dtype: str, causal: bool, family: str) -> None:
    """Relative Frobenius error against float64, 1.1x allowed; lse within 2e-6."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (normal(2, 1100, 4, dim, dtype=dtype, seed=s) for s in range(3))
    expected, expected_lse = exact(q, k, v, causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        swapped = [x.transpose(1, 2) for x in (q, k, v)]
        rival = torch().nn.functional.scaled_dot_product_attention(*swapped, is_causal=causal).transpose(1, 2)
    with using(family):
        out, lse = fastattn.attention(q, k, v, causal=causal, return_lse=True)
    ours, theirs = relative(out, expected), relative(rival, expected)
    assert ours <= 1.1 * theirs, f"error {ours:.3e}, torch's flash {theirs:.3e}"
    assert relative(lse, expected_lse) <= 2e-6


@plain(64, 128, dtype="float32")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("family", [f for f in families_here() if f != "simt"])
def test_float32_error_is_at_most_that_of_torch_efficient(dim: int, family: str) -> None:
    """Relative Frobenius error of out and of each gradient against float64, over 2100 keys and queries."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, dout = (normal(2, 2100, 4, dim, dtype="float32", seed=s) for s in range(4))

    def gradients(dtype: Any) -> list[Any]:
        """out, dq, dk, dv of torch's attention."""
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        rival = torch().nn.functional.scaled_dot_product_attention(*[x.transpose(1, 2) for x in leaves]).transpose(1, 2)
        return [rival.detach(), *torch().autograd.grad(rival, leaves, dout.to(dtype))]
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients(torch().float64)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        theirs = gradients(torch().float32)
    with using(family):
        out, lse = fastattn.attention(q, k, v, return_lse=True)
        ours = [out, *fastattn.attention_backward(dout, q, k, v, out, lse)[:3]]
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), ours, theirs, expected, strict=True):
        assert relative(x, z) <= relative(y, z), f"{name}: error {relative(x, z):.3e}, torch's efficient kernel {relative(y, z):.3e}"
