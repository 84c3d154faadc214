"""Which engine runs a call: torch's kernels as engines of another package, and the order in which engines are tried."""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import UnsupportedError, attention, attention_backward, explain, register_engine, registry, use_engine
from fastattn.arrays.convert import view
from fastattn.arrays.view import View
from fastattn.problem import Operands, Problem
from tests.tools.compare import distance
from tests.tools.devices import requires_gpu
from tests.tools.fake_cuda import Cuda, installed
from tests.tools.other_engines import Cudnn, Noter, Sdpa, torch_on_the_cpu
from tests.tools.problems import CASES, Case

Q = (2, 6, 4, 8)


pytestmark = pytest.mark.usefixtures("log")


# ---------------------------------------------------------------- torch's kernels as engines
@pytest.fixture
def torch_engine() -> Iterator[Sdpa]:
    with torch_on_the_cpu() as engine:
        yield engine


def taken(case: Case) -> bool:
    """Whether Sdpa should accept a named problem."""
    plain = Case(case.name, case.dtype, **{name: getattr(case, name) for name in ("batch", "num_heads", "seqlen_q", "seqlen_k", "head_dim",
                                                                                  "causal", "memory", "layout")})
    return case == plain


CLOSE = {"float32": 1e-4, "float64": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}     # of the norm; torch's exponentials are rough


def test_every_named_problem_that_torch_supports(torch_engine: Sdpa) -> None:
    for case in (case for case in CASES if taken(case)):
        inputs = case.make()
        exact = inputs.float64()
        with use_engine("torch", "cpu"):
            out, lse = inputs.forward()
            results = out, lse, *inputs.backward(out, lse)
        expected = exact.forward("reference")
        for got, wanted in zip(results, (*expected, *exact.backward(*expected, "reference")), strict=True):
            if wanted is not None:
                assert distance(got, wanted) <= CLOSE[case.dtype] * (1 + np.linalg.norm(wanted[np.isfinite(wanted)])), case.name
    assert torch_engine.calls.count("forward") > 20 and torch_engine.calls.count("backward") > 20


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_gives_our_results(torch_engine: Sdpa, dtype: str, layout: str) -> None:
    inputs = Case("torch", dtype, num_heads=4, seqlen_q=70, head_dim=64, causal=True, layout=layout).make()
    ours = inputs.forward("cpu")
    theirs = inputs.forward("torch")
    for a, b in zip((*ours, *inputs.backward(*ours, "cpu")[:3]), (*theirs, *inputs.backward(*ours, "torch")[:3]), strict=True):
        assert distance(a, b) <= CLOSE[dtype] * (1 + np.linalg.norm(b.astype(np.float64)))
    assert torch_engine.calls == ["forward", "backward"]


def test_torch_refuses_by_name(torch_engine: Sdpa) -> None:
    x = np.ones(Q, np.float32)
    with pytest.raises(UnsupportedError) as caught:
        attention(x, x, x, softcap=1.0, engine="torch")
    assert str(caught.value) == ("attention(): no engine takes this call: torch: torch's kernel has no softcap "
                                 "(engine='torch' allows no other).")
    assert caught.value.reasons == {"torch": "torch's kernel has no softcap"}
    with pytest.raises(UnsupportedError, match="torch: torch's kernel wants rows in one piece, and no negative strides"):
        attention(x[:, ::-1], x, x, engine="torch")
    out, lse = attention(x, x, x, bias=np.ones((6, 6), np.float32), return_lse=True, engine="torch")
    arguments = {"bias": np.ones((6, 6), np.float32), "need_dbias": True}
    with pytest.raises(UnsupportedError, match=r"attention_backward\(\): .*: torch: torch's kernel has no gradient of bias, nor of lse \("):
        attention_backward(x, x, x, x, out, lse, **arguments, engine="torch")
    with use_engine("torch", "cpu"):                        # falls through
        grads = attention_backward(x, x, x, x, out, lse, **arguments)
        attention(x[:, ::-1], x, x)
        attention(x, x, x, softcap=1.0)
    np.testing.assert_array_equal(grads.dbias, attention_backward(x, x, x, x, out, lse, **arguments).dbias)
    assert torch_engine.calls == ["forward"]


@requires_gpu
@pytest.mark.gpu
def test_cudnn_through_torch() -> None:
    engine = Cudnn()
    torch = engine.torch
    if not torch.backends.cudnn.is_available():
        pytest.skip("torch has no cuDNN")
    q, k, v, dout = torch.randn(4, 2, 256, 8, 64, device="cuda", dtype=torch.bfloat16).unbind()
    ours, lse = attention(q, k, v, causal=True, return_lse=True)
    expected = attention_backward(dout, q, k, v, ours, lse, causal=True)
    with register_engine("cudnn", engine.forward, engine.backward, engine.supports).activate():
        for stream in (None, torch.cuda.Stream()):
            out, sums = attention(q, k, v, causal=True, return_lse=True, stream=stream)
            grads = attention_backward(dout, q, k, v, out, sums, causal=True, stream=stream)
            torch.cuda.synchronize()
            torch.testing.assert_close(out, ours, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(sums, lse, atol=2e-3, rtol=1e-3)
            for a, b in zip(grads[:3], expected[:3], strict=True):
                torch.testing.assert_close(a, b, atol=6e-2, rtol=5e-2)
        assert engine.calls == ["forward", "backward"] * 2
        assert explain(attention, q, k, v, causal=True).engine == "cudnn"
        attention(q.float(), k.float(), v.float())          # simt
        with use_engine("sm80", "simt"):
            attention(q, k, v)
            assert explain(attention, q, k, v).engine == "sm80"
    assert len(engine.calls) == 4


# ---------------------------------------------------------------- who is asked
def call(engine: str | None = None) -> None:
    x = np.ones((1, 2, 1, 8), np.float32)
    attention(x, x, x, engine=engine)


def test_registering_changes_nothing_and_activating_does(log: list[str]) -> None:
    with Noter("one").registered() as one, Noter("two").registered() as two:
        call()
        assert log == [] and not one.active
        two.activate()
        call()
        one.activate()
        call()
        assert log == ["two", "one"] and one.active         # in the order of registration
        one.restore()
        call()
        call("one")
        call("cpu")
        assert log == ["two", "one", "two", "one"]
    call()
    assert len(log) == 4


def test_a_handle(log: list[str]) -> None:
    handle = Noter("one").registered().activate()
    handle.remove()
    handle.remove()
    handle.restore()
    with pytest.raises(ValueError, match=r"activate\(\): engine 'one' was removed"):
        handle.activate()
    with Noter("one").registered().activate() as again:     # a stale handle does not touch the name's new owner
        handle.remove()
        call()
        assert log == ["one"] and again.active
    call()
    with use_engine("cpu"), pytest.raises(ValueError, match=r"engine is 'one'; expected None or one of 'naive', 'cpu', .*'simt', 'gpu'"):
        call("one")
    assert log == ["one"]


def test_refusals_fall_through(log: list[str]) -> None:
    with Noter("one", "it is Sunday").registered().activate(), Noter("two", "it is late").registered().activate():
        call()
        assert log == []
        with use_engine("two", "one"), pytest.raises(UnsupportedError) as caught:
            call()
    assert str(caught.value) == ("attention(): no engine takes this call: two: it is late; one: it is Sunday "
                                 "(use_engine('two', 'one') allows no other).")
    assert list(caught.value.reasons) == ["two", "one"]


def test_forward_alone() -> None:
    x = np.ones((1, 2, 1, 8), np.float32)
    with Noter("one").registered().activate():
        attention_backward(x, x, x, x, x, np.ones((1, 1, 2), np.float32))
        with pytest.raises(UnsupportedError, match=r"attention_backward\(\): .*one: it has no backward"):
            attention_backward(x, x, x, x, x, np.ones((1, 1, 2), np.float32), engine="one")


def test_use_engine_nests_and_engine_is_stronger(log: list[str]) -> None:
    with Noter("one").registered(), Noter("two").registered():
        with use_engine("one"):
            call()
            with use_engine("two"):
                call()
                call("one")
                call("reference")
            call()
        assert log == ["one", "two", "one", "one"]
        with use_engine("cpu", "one"):
            call()
        with pytest.raises(RuntimeError), use_engine("one"):
            raise RuntimeError
        call()
        assert len(log) == 4


def test_errors_of_use_engine() -> None:
    with pytest.raises(ValueError, match=r"use_engine\(\): names are none; expected some of .*'cpu'"):
        use_engine()
    with pytest.raises(ValueError, match=r"use_engine\(\): name is 'sm70'; expected one of .*'sm80'"):
        use_engine("sm80", "sm70")
    with use_engine("gpu"), pytest.raises(ValueError, match=r"engine is chosen by use_engine\('gpu'\) but q is on device \('cpu', 0\); "
                                          "expected an engine that reads that memory"):
        call()
    for engine in (7, ["cpu"]):
        with pytest.raises(ValueError, match=r"engine is .*; expected None or one of"):
            call(engine)  # type: ignore[arg-type]
    handle = Noter("one").registered()
    with use_engine("one"):
        handle.remove()
        with pytest.raises(ValueError, match=r"attention\(\): use_engine names 'one'; expected one of 'naive', 'cpu'"):
            call()


def test_errors_of_register_engine() -> None:
    def f(*_: Any) -> None: ...
    for name in ("", "a b", "a,b", 7):
        with pytest.raises(ValueError, match=r"register_engine\(\): name is .*; expected a name of letters, digits"):
            register_engine(name, f, f, f)  # type: ignore[arg-type]
    for name in ("cpu", "gpu", "sm80"):
        with pytest.raises(ValueError, match=f"name is '{name}', which is taken; expected a new one"):
            register_engine(name, f, f, f)
    with Noter("one").registered(), pytest.raises(ValueError, match=r"which is taken; .*; remove\(\) of its handle frees it"):
        register_engine("one", f, f, f)
    with pytest.raises(ValueError, match="device is 'tpu'; expected 'cpu' or 'cuda'"):
        register_engine("one", f, f, f, device="tpu")
    for arguments, name in (((None, f, f), "forward"), ((f, 3, f), "backward"), ((f, f, None), "supports")):
        with pytest.raises(TypeError, match=f"{name} is .*; expected a function"):
            register_engine("one", *arguments)  # type: ignore[arg-type]
    text = r"engine 'one': supports\(problem\) gave True; expected None, or a str"
    with register_engine("one", f, f, lambda problem: True, device="cpu"), pytest.raises(TypeError, match=text):  # type: ignore[arg-type,return-value]
        call("one")


def test_an_error_of_an_engine_reaches_the_caller() -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of order")
    broken_one = register_engine("one", broken, None, lambda problem: None, device="cpu").activate()
    with broken_one, pytest.raises(RuntimeError, match="out of order"):
        call()


def test_threads_and_tasks_have_their_own_use_engine(log: list[str]) -> None:
    barrier = threading.Barrier(2)

    def in_thread(name: str) -> None:
        with use_engine(name):
            barrier.wait()
            for _ in range(50):
                call()
            barrier.wait()

    async def in_task(name: str) -> None:
        with use_engine(name):
            for _ in range(3):
                await asyncio.sleep(0)
                before = len(log)
                call()
                assert log[before:] == [name]

    async def tasks() -> None:
        await asyncio.gather(in_task("one"), in_task("two"))
    with Noter("one").registered(), Noter("two").registered(), ThreadPoolExecutor(2) as pool:
        list(pool.map(in_thread, ("one", "two")))
        assert log.count("one") == log.count("two") == 50
        asyncio.run(tasks())


def test_engines_may_change_while_calls_run(log: list[str]) -> None:
    stop = threading.Event()

    def calls() -> int:
        return next(n for n in itertools.count() if call() or stop.is_set())  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(calls) for _ in range(3)]
        for _ in range(200):
            with Noter("one").registered().activate():
                before = len(log)
                call()
                assert "one" in log[before:]
        stop.set()
        assert all(future.result() >= 0 for future in running)
    log.clear()
    call()
    assert log == []


# ---------------------------------------------------------------- CUDA memory, without a GPU
def test_cuda_memory_with_the_built_in_families_behind(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    ran: list[Any] = []

    class Gpu:
        @staticmethod
        def forward(problem: Problem, operands: Operands, out: View, lse: View | None, stream: int, families: Any = None) -> None:
            ran.append(families)
            if problem.dtype == "float32" and "simt" not in families:
                raise UnsupportedError("no", dict.fromkeys(families, "it has no float32 products"))

    monkeypatch.setattr(registry, "_runs", {})
    monkeypatch.setattr("fastattn.engine._loaded", {"gpu": Gpu})
    with installed(monkeypatch) as driver, Noter("one", "it is late").registered("cuda") as one, Noter("two").registered("cuda"):
        q = Cuda(driver, Q)
        out = fastattn.attention(q, q, q)
        for engine in ("gpu", "sm80", "simt"):
            with contextlib.suppress(UnsupportedError):
                attention(q, q, q, engine=engine, out=out)
        assert ran == [registry.FAMILIES, registry.FAMILIES, ("sm80",), ("simt",)]
        ran.clear()
        with use_engine("one", "sm80", "sm90", "two", "simt", "cpu"):       # families are asked together as far as they stand together
            attention(q, q, q, out=out)
        assert ran == [("sm80", "sm90")] and log == ["two"]
        one.activate()
        with use_engine("one", "sm80", "sm90"), pytest.raises(UnsupportedError) as caught:
            attention(q, q, q, out=out)
        assert list(caught.value.reasons) == ["one", "sm80", "sm90"]
        with use_engine("reference"), pytest.raises(ValueError, match=r"use_engine\('reference'\) but q is on device \('cuda', 0\)"):
            attention(q, q, q)
        attention(q, q, q, out=out)
        assert ran[-1] == registry.FAMILIES


def test_gpu_use_is_use_engine(log: list[str]) -> None:
    pytest.importorskip("numba.cuda")
    from fastattn import gpu

    assert registry.families_in_use() == gpu.FAMILIES
    with gpu.use("simt", "sm80"):
        assert registry.families_in_use() == ("simt", "sm80") and registry.in_use() == ("simt", "sm80", "cpu")
        call()                                              # host memory as ever
    with use_engine("gpu"):
        assert registry.families_in_use() == gpu.FAMILIES
    with pytest.raises(ValueError, match=r"use\(\): 'cpu' given, the kernel families are sm90, sm80, simt"):
        gpu.use("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "bool", "int32", "int64"])
def test_a_view_is_an_array_of_other_libraries(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))[:, ::2]
    v = view(x, "f", "x")
    y = torch.from_dlpack(v)
    assert y.data_ptr() == x.data_ptr() and y.stride() == x.stride() and torch.equal(x, y)
    if dtype != "bfloat16":
        np.testing.assert_array_equal(np.from_dlpack(v), x.numpy())
    assert not hasattr(v, "__cuda_array_interface__")
    on_device = View(0x1000, (2, 3), (16, 4), "float32", ("cuda", 1))
    assert on_device.__dlpack_device__() == (2, 1)
    assert on_device.__cuda_array_interface__["strides"] == (16, 4)
    for keywords in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="without a copy, on its own device"):
            on_device.__dlpack__(**keywords)


# ---------------------------------------------------------------- other packages
@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, where entry points were not loaded yet. Restores the engines."""
    before = registry._registered, registry._active
    monkeypatch.setattr(registry, "_broken", None)
    monkeypatch.setattr(registry, "_runs", {})
    yield
    registry._change(*before)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Iterator[None]:
    """An installed package with an engine "elsewhere", and an entry point that fails."""
    (tmp_path / "fastattn_elsewhere.py").write_text(
        "import fastattn\nran = []\ndef register():\n"
        "    fastattn.register_engine('elsewhere', lambda *_: ran.append(1), None, lambda problem: None, device='cpu')\n")
    folder = tmp_path / "fastattn_elsewhere-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastattn-elsewhere\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[fastattn.engines]\nelsewhere = fastattn_elsewhere:register\nbad = no_such_module:register\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("fastattn_elsewhere", None)


def ran() -> int:
    return len(sys.modules["fastattn_elsewhere"].ran)


def test_entry_points_are_called_when_needed(package: None) -> None:
    call()
    call("reference")
    with use_engine("cpu"):
        call()
    assert "fastattn_elsewhere" not in sys.modules
    call("elsewhere")
    assert ran() == 1
    call()
    assert ran() == 1
    with use_engine("elsewhere"):
        call()
    assert ran() == 2
    with pytest.raises(ValueError, match=r"engine is 'bad'; .*; entry point 'bad' failed with ModuleNotFoundError: No module named 'no_"):
        call("bad")


def test_engines_lists_entry_points(package: None, capsys: pytest.CaptureFixture[str]) -> None:
    names = [engine.name for engine in fastattn.engines()]
    assert names[-5:] == ["cpu", "reference", "sm90", "sm80", "simt"] and "elsewhere" in names
    assert "Engine(name='elsewhere', device='cpu', built_in=False)" in map(repr, fastattn.engines())
    call()
    assert ran() == 0                                       # not activated
    config = fastattn.show_config()
    assert "elsewhere, cpu, reference" in config["engines"] and "entry point bad failed (ModuleNotFoundError" in config["engines"]


def test_the_environment_names_engines(package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_ENGINES", "elsewhere, cpu")
    call()
    assert ran() == 1
    call("cpu")
    with use_engine("cpu"):
        call()
    assert ran() == 1
    x = np.ones((1, 2, 1, 8), np.float32)
    attention_backward(x, x, x, x, x, np.ones((1, 1, 2), np.float32))       # elsewhere has none
    assert explain(attention, x, x, x).reasons["reference"] == "FASTATTN_ENGINES=elsewhere, cpu does not name it"
    monkeypatch.setattr(registry, "_runs", {})
    monkeypatch.setenv("FASTATTN_ENGINES", "nobody")
    with pytest.raises(ValueError, match=r"attention\(\): FASTATTN_ENGINES names 'nobody'; expected one of .*'cpu'"):
        call()
    monkeypatch.setenv("FASTATTN_ENGINES", "gpu")
    with pytest.raises(ValueError, match="engine is chosen by FASTATTN_ENGINES=gpu but q is on device"):
        call()


