"""A recorded call, launched at other addresses, launches what the call at these addresses launches. Without a GPU: the
driver's launch reads its arguments and notes them."""
from __future__ import annotations

import ctypes
import gc
import struct
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from cuda.bindings import driver

from fastattn import UnsupportedError, gpu
from fastattn.arrays import convert
from fastattn.arrays.view import EIGHT_BIT, ITEMSIZE, View, contiguous
from fastattn.gpu import caches, precompile
from fastattn.gpu.precompile import HERE, Want
from fastattn.gpu.rows import accumulate_launch, merge_launch
from fastattn.gpu.runtime import compile, device, recording, tensormap, workspace
from fastattn.gpu.runtime.launcher import OnDevice
from fastattn.gpu.runtime.recording import Address, Recorder, Recording, addressed
from fastattn.gpu.spec import AnyCall, Call
from fastattn.memo import Recent
from tests.fuzz.__main__ import today
from tests.fuzz.draw import draw
from tests.fuzz.inputs import make
from tests.fuzz.spec import Spec
from tests.tools.caches import Case
from tests.tools.gpu import jobs
from tests.tools.gpu.calls import serving_call
from tests.tools.gpu.drawn import calls
from tests.tools.gpu.roles_pages import requests

LETTERS = {"l": "Q", "q": "q", "i": "i", "I": "I", "f": "f", "d": "d"}
FIRST_MEMORY, FIRST_MAP, COUNTER, ARRIVALS = 1 << 44, 1 << 46, 1 << 47, 1 << 48
STREAM = 0x60


class Noted(compile.Kernel):
    """A kernel that notes the values that the driver would read."""

    def __init__(self, source: compile.Source, log: list[Any]) -> None:
        self.source, self.log, self.shared_memory = source, log, 1024
        self.lay_out()

    def enqueue(self, config: Any, arguments: int) -> None:
        pointers = (ctypes.c_uint64 * len(self.source.fields)).from_address(arguments)
        values = [struct.unpack(LETTERS[letter], ctypes.string_at(pointer, struct.calcsize(LETTERS[letter])))[0]
                  for pointer, (_, letter) in zip(pointers, self.source.fields, strict=True)]
        assert (config.blockDimX, config.sharedMemBytes, config.gridDimY, config.gridDimZ) == (self.source.threads, 1024, 1, 1)
        assert config.numAttrs == self.source.early + (self.source.cluster > 1)
        sizes = [x.value.clusterDim for x in config.attrs if x.id == driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION]
        assert [(size.x, size.y, size.z) for size in sizes] == [(self.source.cluster, 1, 1)] * (self.source.cluster > 1)
        self.log.append((self.source.key, config.gridDimX, values, int(config.hStream)))


class Machine:
    """A device that notes launches. Pieces of temporary memory follow each other, as if they were one."""

    def __init__(self, arch: str) -> None:
        self.log: list[Any] = []
        self.size, self.held, self.most, self.mark, self.capturing = 0, 0, 0, 0, False
        self.launcher = OnDevice(precompile.absent_device(arch))
        kernels: dict[str, Noted] = {}
        own: dict[str, Any] = {
            "load": lambda source: kernels.setdefault(source.key, Noted(source, self.log)), "mark": self._mark, "clear": self.clear,
            "capturing": lambda stream: self.capturing,
            "_memory": SimpleNamespace(counters=SimpleNamespace(take=lambda captured: COUNTER + captured),
                                       arrivals=SimpleNamespace(take=lambda captured: ARRIVALS + captured))}
        self.launcher.__dict__.update(own)

    def _mark(self) -> int:
        self.mark += 1
        return self.mark

    def allocate(self, size: int, ordinal: int, stream: int) -> int:
        assert stream == STREAM
        address, self.size, self.held = FIRST_MEMORY + self.size, self.size + -(-size // 256) * 256, self.held + 1
        return address

    def free(self, memory: int, stream: int) -> None:
        assert stream == STREAM
        self.held -= 1

    def clear(self, memory: int, size: int, stream: int) -> None:
        self.log.append(("clear", memory, size, stream))

    def taken(self) -> list[Any]:
        """What was launched since the last time. Then everything is as before it."""
        assert self.held == 0
        log, self.log[:], self.size, self.mark = list(self.log), [], 0, 0
        return log


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Machine] = []

    def of(arch: str) -> Machine:
        made[:] = [Machine(arch)]
        return made[0]
    encoded: list[Any] = []

    def add(self: Any, key: Any, encode: Any, captured: bool) -> int:
        encode()
        return FIRST_MAP + (hash((encoded[-1], captured)) & 0xFFFFFFFF)

    def note(*what: Any) -> int:
        encoded.append(what)
        return 0
    monkeypatch.setattr(tensormap, "_encoded", note)
    monkeypatch.setattr(tensormap._Maps, "__init__", lambda self: self.__dict__.update(newer={}, captured={}))
    monkeypatch.setattr(tensormap._Maps, "add", add)
    monkeypatch.setattr(tensormap, "_devices", {0: tensormap._Maps()})
    for name in ("allocate", "free", "clear"):
        monkeypatch.setattr(workspace, name, lambda *where, name=name: getattr(made[0], name)(*where))
    monkeypatch.setattr(recording, "capturing", lambda stream: made[0].capturing)
    monkeypatch.setattr(device.current, "__enter__", lambda self: None)
    monkeypatch.setattr(recording, "is_current", lambda d: True)
    monkeypatch.setattr(gpu, "on_device", lambda ordinal: made[0].launcher)
    monkeypatch.setattr(gpu, "_recordings", Recent())
    return of


def moved(call: AnyCall, seed: int) -> AnyCall:
    """The call with every array elsewhere."""
    draw = np.random.default_rng(seed)
    return call.at([x and replace(x, ptr=int(draw.integers(1 << 20, 1 << 40)) * 16) for x in call.views])


def record(call: AnyCall, *families: str) -> Recording:
    return gpu._record(call, families or gpu.FAMILIES)


def addresses(call: AnyCall) -> list[int]:
    return [x.ptr for x in call.views if x]


WANTS = {(job.want, job.family, job.arch): job.id for job in jobs.JOBS}


@pytest.mark.parametrize(("want", "family", "arch"), [pytest.param(*key, id=name) for key, name in WANTS.items()])
def test_the_same_is_launched(want: Want, family: str, arch: str, machine: Any) -> None:
    made, (call, _) = machine(arch), want.call()
    repeated = record(moved(call, 1), family)
    assert not made.taken()                                 # recording launches nothing
    for seed, made.capturing in ((2, False), (3, True), (2, False)):
        at = moved(call, seed)
        gpu._launch(at, made.launcher, (family,), STREAM)
        expected = made.taken()
        repeated(addresses(at), STREAM)
        assert made.taken() == expected and expected


@pytest.mark.slow
def test_random_problems_repeat(machine: Any) -> None:
    """Forwards and backwards of the day's problems: whatever is empty, a call that repeats launches what the call launches."""
    made, launched = machine("sm_90a"), 0
    for index in range(0, 2400, 8):                         # four problems of each kernel
        spec = draw(today(), index, "cuda")
        if spec.call != "attention":
            continue
        families = (spec.engine,) if spec.engine else gpu.FAMILIES
        # calls with functions are not repeated
        plain = replace(spec, numbers="float", score_mod=None, mask_mod=None, block_mask=None, need_dcaptured=False)
        for call in calls(make(plain)):
            try:
                repeated = record(moved(call, 1), *families)
            except UnsupportedError:
                continue
            at = moved(call, 2)
            gpu._launch(at, made.launcher, families, STREAM)
            expected = made.taken()
            repeated(addresses(at), STREAM)
            assert made.taken() == expected, spec
            launched += len(expected)
    assert launched > 300, "most problems are refused: nothing was tested"


@pytest.mark.parametrize("case", [
    Case("read", dtype="bfloat16", append=False, rows=2), Case("append", dtype="float16", alibi="batch", sinks=True, page_size=None),
    Case("rotary", dtype="bfloat16", rotary=(32, False), rows=3), Case("packed", dtype="bfloat16", rows=(5, 1, 30), rotary=(16, True)),
    Case("slices", dtype="bfloat16", head_dim=64, head_dim_v=512, page_size=None, batch_idx=True)], ids=lambda case: case.name)
def test_calls_over_caches_repeat(case: Case, machine: Any) -> None:
    """Also where the caches share memory in one of the calls: then their kernels are others."""
    made, given = machine("sm_90a"), serving_call(case.make(), lambda x: replace(convert.view(x, "test", "x"), device=HERE))

    def elsewhere(seed: int) -> Any:
        draw = np.random.default_rng(seed)
        return caches.at(given, [x and replace(x, ptr=int(draw.integers(1 << 20, 1 << 40)) * 16) for x in caches.views_of(given)])
    first = elsewhere(1)
    repeated = gpu.prepare(first.problem, first.operands, first.out, first.lse)
    assert not made.taken() and repeated is not None
    shared = elsewhere(3)
    shared.operands.v = replace(shared.operands.v, ptr=shared.operands.k.ptr)
    for at in (elsewhere(2), shared, elsewhere(4)):
        gpu._launch(at, made.launcher, gpu.FAMILIES, STREAM)
        expected = made.taken()
        repeated([x.ptr for x in caches.views_of(at) if x], STREAM)
        assert made.taken() == expected and expected
        assert sum(key.startswith("append") for key, *_ in expected) == case.append * (1 + (at is shared))


@pytest.mark.parametrize("shape", [(2, 300, 4, 64), (3, 5, 1, 7), (0, 4, 8, 16), (1 << 16, 1, 16, 2048)], ids=str)
def test_copies_sums_and_merges_repeat(shape: tuple[int, ...], machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, draw = machine("sm_90a"), np.random.default_rng(0)
    monkeypatch.setattr(gpu, "_repeats", Recent())

    def view(dtype: str, *axes: int) -> View:
        return View(int(draw.integers(1 << 20, 1 << 40)) * 16, axes, contiguous(axes, ITEMSIZE[dtype]), dtype, ("cuda", 0))
    for dtype, target in (("float32", "float32"), ("float32", "bfloat16"), ("float16", "float32")) * 2:
        out, x, numbers = view(target, *shape), view(dtype, *shape), view("int32", shape[0]).ptr
        part = view(dtype, *shape)
        lse, part_lse = [view("float32", shape[0], shape[2], shape[1]) for _ in range(2)]
        for x_rows, out_rows in ((0, 0), (numbers, 0), (0, numbers), (numbers, numbers + 16)):
            accumulate_launch.accumulate_rows(out, x, shape[0], accumulate_launch.Rows(x_rows, out_rows), True, made.launcher, STREAM)
            expected = made.taken()
            gpu.accumulate_rows(out, x, shape[0], x_rows, out_rows, True, STREAM)
            assert made.taken() == expected and bool(expected) == (0 not in shape)
        for add in (False, True):
            accumulate_launch.accumulate(out, x, add, made.launcher, STREAM)
            expected = made.taken()
            gpu.accumulate(out, x, add, STREAM)
            assert made.taken() == expected
        if target == "float32":
            merge_launch.merge_into(part, part_lse, out, lse, made.launcher, STREAM)
            expected = made.taken()
            gpu.merge_states([out, part], [lse, part_lse], out, lse, STREAM)
            assert made.taken() == expected
    assert len(gpu._repeats) == 3 * 6 + 2 or 0 in shape


@pytest.mark.parametrize(("keys", "rows"), [((300, 20), 1), ((3000, 20), 2), ((300,) * 99, 1), (None, 1)],
                         ids=("splits", "plan", "one split", "arrays"))
def test_latent_calls_repeat(keys: tuple[int, ...] | None, rows: int, machine: Any) -> None:
    """MLA's decode, whose kernel is another one where the values are not the first columns of the keys."""
    made = machine("sm_90a")
    if keys is None:
        given, _ = Want("bfloat16", 576, 512, seqlen_q=rows, seqlen_k=4096, num_heads=128, num_heads_k=1).call()
        assert isinstance(given, Call)
        given.operands.v = replace(given.operands.v, strides=given.operands.k.strides)
    else:
        given = requests(list(keys), rows, 64, 576, heads=128, head_dim_v=512).call

    def elsewhere(seed: int, latent: bool) -> Any:
        draw, plain = np.random.default_rng(seed), given.problem.cache is None
        views = given.views if plain else caches.views_of(given)
        views = [x and replace(x, ptr=int(draw.integers(1 << 20, 1 << 40)) * 16, device=HERE) for x in views]
        call = given.at(views) if plain else caches.at(given, views)
        if latent:
            call.operands.v = replace(call.operands.v, ptr=call.operands.k.ptr)
        return call
    first = elsewhere(1, True)
    repeated = gpu.prepare(first.problem, first.operands, first.out, first.lse)
    assert not made.taken() and repeated is not None
    for seed, latent in ((2, True), (3, False), (4, True), (5, True)):
        at = elsewhere(seed, latent)
        gpu._launch(at, made.launcher, gpu.FAMILIES, STREAM)
        expected = made.taken()
        repeated([x.ptr for x in (at.views if keys is None else caches.views_of(at)) if x], STREAM)
        assert made.taken() == expected and any(key.startswith("latent_sm90") for key, *_ in expected) == latent
        if keys is None:
            gpu._enqueue(at, STREAM, gpu.FAMILIES)
            assert made.taken() == expected


@pytest.mark.parametrize("empty", ["seqlen_q", "num_heads"])
def test_a_backward_without_queries_repeats(empty: str, machine: Any) -> None:
    """Its temporary memory is empty."""
    made = machine("sm_90a")
    spec = Spec(seed=1, num_heads_k=1, head_dim=16, head_dim_v=16, backward=True, engine="simt", library="cupy")
    _, call = calls(make(replace(spec, **{empty: 0})))
    record(moved(call, 1), "simt")(addresses(call), STREAM)
    assert {name.split()[0] for name, *_ in made.taken()} == {"backward_simt"}


def test_a_recording_is_kept_for_the_same_alignments_and_strides_only(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config of sm80 depends on whether q, k and v are aligned and on whether out is; the backward's kernels depend on
    other pairs of them."""
    made, recorded = machine("sm_80"), []
    real = gpu._record
    monkeypatch.setattr(gpu, "_record", lambda *call: (recorded.append(call), real(*call))[1])
    call, _ = Want("float16", 64).call()
    o, aligned = call.operands, 1 << 20
    for q, out, expected in ((aligned, aligned, 1), (aligned + 16, aligned, 1), (aligned + 8, aligned, 2), (aligned, aligned + 8, 3),
                             (aligned + 32, aligned + 16, 3)):
        at = replace(call, operands=replace(o, q=replace(o.q, ptr=q)), out=replace(call.out, ptr=out))
        gpu._enqueue(at, STREAM, ("sm80",))
        repeated = made.taken()
        gpu._launch(at, made.launcher, ("sm80",), STREAM)
        assert len(recorded) == expected and made.taken() == repeated
    backward, _ = Want("float16", 64, packed=True, causal=True, backward=True, lengths="int64").call()
    views = backward.views
    for n, x in enumerate(views):
        if x is None:
            continue
        for changed in (replace(x, ptr=x.ptr + 8), replace(x, strides=tuple(2 * s for s in x.strides))):
            before = len(recorded)
            at = backward.at([*views[:n], changed, *views[n + 1:]])
            gpu._enqueue(at, STREAM, ("sm80", "simt"))
            repeated = made.taken()
            gpu._launch(at, made.launcher, ("sm80", "simt"), STREAM)
            assert len(recorded) == before + 1 and made.taken() == repeated


def test_no_memory_of_the_caller_is_kept(machine: Any) -> None:
    made, (call, _) = machine("sm_90a"), Want("float16", 64, backward=True).call()
    owners = [np.zeros(1) for _ in call.views]
    gone = [weakref.ref(x) for x in owners]
    at = call.at([x and replace(x, owner=owner) for x, owner in zip(call.views, owners, strict=True)])
    gpu._enqueue(at, STREAM, gpu.FAMILIES)
    assert made.taken() and len(gpu._recordings) == 1
    del at, owners
    gc.collect()
    assert not any(x() is not None for x in gone)


def test_a_launch_that_fails(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is freed, and the next call is not disturbed."""
    made, (call, _) = machine("sm_90a"), Want("float16", 64, backward=True).call()
    repeated, enqueue = record(call), Noted.enqueue

    def fails(self: Any, config: Any, arguments: int) -> None:
        if "round_dq" in self.source.key:
            raise RuntimeError("no")
        enqueue(self, config, arguments)
    monkeypatch.setattr(Noted, "enqueue", fails)
    with pytest.raises(RuntimeError, match="no"):
        repeated(addresses(call), STREAM)
    assert len(made.taken()) == 2
    monkeypatch.setattr(Noted, "enqueue", enqueue)
    repeated(addresses(call), STREAM)
    assert len(made.taken()) == 3


def test_streams(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch is on its call's stream, and so is the temporary memory."""
    made, (call, _) = machine("sm_90a"), Want("float16", 64, backward=True).call()
    repeated = record(call)
    for stream in (0x60, 0x70, 1, 0x60):
        monkeypatch.setitem(globals(), "STREAM", stream)
        repeated(addresses(call), stream)
        assert [step[-1] for step in made.taken()] == [stream] * 3


def test_another_device_is_current(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, (call, _) = machine("sm_90a"), Want("float16", 64, backward=True).call()
    repeated = record(call)
    repeated(addresses(call), STREAM)
    expected, entered = made.taken(), list[bool]()
    monkeypatch.setattr(recording, "is_current", lambda d: bool(entered))
    monkeypatch.setattr(device.current, "__enter__", lambda self: entered.append(True))
    monkeypatch.setattr(device.current, "__exit__", lambda self, *error: made.log.append("left"))
    repeated(addresses(call), STREAM)
    assert made.taken() == [*expected, "left"] and entered == [True]


def test_a_call_inside_a_call(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python may run another call of the same Recording, in a thread or in a signal's handler, between two launches."""
    made, (call, _) = machine("sm_90a"), Want("float16", 64, backward=True).call()
    other, repeated, enqueue = moved(call, 1), record(call), Noted.enqueue
    repeated(addresses(call), STREAM)
    expected = made.taken()
    inside: list[int] = []

    def twice(self: Any, config: Any, arguments: int) -> None:
        if not inside:
            inside.append(1)
            size, made.size, before = made.size, 1 << 30, list(made.log)
            repeated(addresses(other), STREAM)
            made.size, made.log[:] = size, before
            made.mark -= 1
        enqueue(self, config, arguments)
    monkeypatch.setattr(Noted, "enqueue", twice)
    repeated(addresses(call), STREAM)
    assert made.taken() == expected and inside


def test_addresses() -> None:
    x = Address(0x1000, 3)
    assert (x + 16) == 0x1010 and ((x + 16).base, (x + 16).offset) == (3, 16) and (16 + x).offset == 16
    assert (x - 16).offset == -16 and (x + 48) - (x + 16) == 32 and type((x + 48) - (x + 16)) is int and x % 16 == 0
    with pytest.raises(AssertionError):
        x - Address(0x2000, 4)
    call, _ = Want("float16", 64).call()
    views = addressed(call.views)
    assert [x.ptr.base for x in views if x] == [0, 1, 2, 3] and [x is None for x in views] == [x is None for x in call.views]


def test_an_address_that_would_not_change_is_an_error(machine: Any) -> None:
    made = machine("sm_90a")
    kernel = Recorder(made.launcher, 1).load(compile.Source("some kernel", lambda: None, (("x", "l"), ("n", "i")), 32))
    for values in ([0x1000, 3], [Address(0x1000, 0), Address(5, 0)]):
        with pytest.raises(RuntimeError, match=r"some kernel: [xn], of type '[li]', is .*: an address"):
            kernel.launch(1, values, 0)
    kernel.launch(1, [0, 3], 0)


def test_l2_completes_whole_rows_where_heads_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 bytes, but 128 for heads side by side of 65 to 127 and of 256 numbers."""
    found: list[Any] = []
    monkeypatch.setattr(tensormap, "_encoded", lambda *what: found.append(what[-1]) or 0)

    def promotion(dim: int, by_head: int, dtype: str = "bfloat16") -> Any:
        size = 1 if dtype in EIGHT_BIT else 2
        tensormap._encode((2, 64, 3, dim), (1 << 20, 4096, by_head, size), dtype, 64, 0)
        return found[-1]
    assert [promotion(dim, 2 * dim) for dim in (40, 64, 72, 80, 96, 128, 192, 256, 512)] == [256, 256, 128, 128, 128, 256, 256, 128, 256]
    assert promotion(72, 1024) == 256 and promotion(144, 144, "float8_e4m3fn") == 256
    tensormap._encode_rows(100, 512, 64, 0)
    assert found[-1] == 256
