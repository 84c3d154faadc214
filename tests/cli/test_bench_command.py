"""`python -m fastattn bench`: the exact result, each implementation, the children, the table and its files."""
from __future__ import annotations

import csv
import json
import math
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import report
from fastattn.benchmark import events, exact, implementations, measure, pair, torch_calls
from fastattn.benchmark.implementations import RIVALS, Inputs, Rival, Runner, make_fastattn, make_inputs
from fastattn.benchmark.measure import Row, Table
from fastattn.benchmark.pair import Measured, Pair
from fastattn.benchmark.shape import Shape, flops
from fastattn.benchmark.timing import Spread, rotate
from fastattn.cli import bench
from fastattn.cli.main import main

SMALL = Shape(2, 20, 4, 16, 33, 2, 8, "float32", True)
SQUARE = replace(SMALL, seqlen_k=20, head_dim_v=16)
NO_CUDA = {"driver": None, "version": None, "error": "no driver", "devices": []}


def results(shape: Shape, x: Inputs, rival: str | None = None) -> Any:
    runner = RIVALS[rival].make(shape, x, "cpu") if rival else make_fastattn(shape, x, "cpu")
    return runner.results(runner.call())


# ---------------------------------------------------------------- what is measured, and what is right
def test_flop() -> None:
    assert SMALL.pairs == 2 * 4 * sum(range(14, 34)) and SMALL.flops == 2 * SMALL.pairs * (16 + 8)
    assert replace(SMALL, backward=True).flops == 2 * SMALL.pairs * (3 * 16 + 2 * 8)
    assert flops("forward+backward", 10, 8, 8) == 14 * 10 * 8
    assert SMALL.input_bytes == 4 * sum(x.nbytes // 4 for x in (make_inputs(SMALL).q, make_inputs(SMALL).k, make_inputs(SMALL).v))
    assert SMALL.unit == "TFLOP/s" and SMALL.speed(2.0) == SMALL.flops / 2e12
    decode = replace(SMALL, seqlen_q=1)
    assert decode.unit == "GB/s" and decode.speed(2.0) == 4 * 2 * 33 * 2 * (16 + 8) / 2e9
    assert str(SMALL) == "forward float32 causal (2,20,4,16) over 33,2,8" and str(replace(SQUARE, num_heads_k=4)).endswith("(2,20,4,16)")


@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, backward=True), replace(SMALL, causal=False, backward=True),
                                   replace(SMALL, seqlen_q=40, backward=True), replace(SMALL, seqlen_q=1)], ids=str)
@pytest.mark.parametrize("chunk", [70, 1 << 21])
def test_the_exact_result(shape: Shape, chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In chunks of rows or at once, by the reference or by the formula, it is what the reference says of the whole problem."""
    monkeypatch.setattr(exact, "CHUNK", chunk)
    x = make_inputs(shape)
    q, k, v, dout = (a.astype(np.float64) for a in (x.q, x.k, x.v, x.dout))
    options: Any = {"causal": shape.causal, "engine": "reference"}
    out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
    whole = {"out": out}
    if shape.backward:
        whole = dict(zip(("dq", "dk", "dv"), fastattn.attention_backward(dout, q, k, v, out, lse, **options), strict=False))
    found = exact.exact(shape, x)
    assert found.precision == "float64" and found.error(shape, whole) < 1e-13
    monkeypatch.setattr(exact, "FLOAT64_PAIRS", 0)
    rough = exact.exact(shape, x)
    assert rough.precision == "float32" and rough.error(shape, whole) < 1e-5
    found.save(tmp_path / "exact.npz")
    again = exact.Exact.load(tmp_path / "exact.npz")
    assert again.error(shape, whole) == found.error(shape, whole) and len(again.found) == 2
    for name in whole:      # an error in the last key head, and NaN
        wrong = whole | {name: whole[name].copy()}
        wrong[name][-1, -1, -1, -1] += np.abs(whole[name]).max()
        assert found.error(shape, wrong) > 0.1
        wrong[name][0, -1, 0, 0] = np.nan
        assert found.error(shape, wrong) > 1e300


def test_of_the_largest_problems_some_rows_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FLOAT64_PAIRS", 0), ("FLOAT32_PAIRS", 0), ("CHUNK", 99)):
        monkeypatch.setattr(exact, name, value)
    x = make_inputs(SMALL)
    found, right = exact.exact(SMALL, x), results(SMALL, x)
    assert found.rows.tolist() == [0, 1, 2, 17, 18, 19] and found.error(SMALL, right) < 1e-5
    right["out"][0, 18] += 1
    assert found.error(SMALL, right) > 0.1
    none = exact.exact(replace(SMALL, backward=True), x)
    assert none.precision == "" and none.error(SMALL, {}) is None


# ---------------------------------------------------------------- implementations
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rival", [None, "torch flash", "torch math", "jax.nn"])
def test_every_implementation_computes_the_same(rival: str | None, backward: bool) -> None:
    if rival:
        pytest.importorskip(RIVALS[rival].module)
    for shape in (replace(SQUARE, backward=backward), replace(SQUARE, backward=backward, causal=False, dtype="bfloat16", seqlen_k=33)):
        x = make_inputs(shape)
        error = exact.exact(shape, x).error(shape, results(shape, x, rival))
        assert error is not None and error < (1e-5 if shape.dtype == "float32" else 0.02)


def test_what_a_library_would_compute_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for rival in ("torch flash", "jax.nn"):
        with pytest.raises(NotImplementedError, match="causal diagonal is top-left"):
            RIVALS[rival].make(SMALL, make_inputs(SMALL), "cpu")
    monkeypatch.setitem(implementations.MOST_SCORES, "cpu", 100)
    for rival in ("torch math", "jax.nn"):
        with pytest.raises(NotImplementedError, match="GB of scores"):
            RIVALS[rival].make(SQUARE, make_inputs(SQUARE), "cpu")


def test_libraries_of_a_gpu_by_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attn, FlashAttention-4 and xformers, with fastattn's results on CPU tensors: the arguments are theirs, and xformers' groups of
    heads are in order."""
    pytest.importorskip("torch")

    def flash(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
        return fastattn.attention(q, k, v, causal=causal), "lse"

    def grouped(q: Any, k: Any, v: Any, attn_bias: Any = None) -> Any:
        assert q.ndim == 5 and q.shape == k.shape[:1] + q.shape[1:2] + k.shape[2:]
        out = [fastattn.attention(q[:, :, g], k[:, :, g], v[:, :, g], causal=attn_bias == "bottom-right") for g in range(q.shape[2])]
        return __import__("torch").stack(out, dim=2)

    modules = {"flash_attn": {"flash_attn_func": flash, "__version__": "2"}, "flash_attn.cute": {"flash_attn_func": flash},
               "flash_attn.flash_attn_interface": {}, "xformers": {}, "xformers.ops": {"memory_efficient_attention": grouped},
               "xformers.ops.fmha.attn_bias": {"LowerTriangularFromBottomRightMask": lambda: "bottom-right"}}
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(implementations, "version", lambda name: "2")
    for causal in (True, False):
        shape = replace(SMALL, causal=causal, head_dim_v=16)
        x = make_inputs(shape)
        for rival in ("flash_attn", "FlashAttention-4", "xformers"):
            error = exact.exact(shape, x).error(shape, results(shape, x, rival))
            assert error is not None and error < 1e-5, rival


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Rival(lambda *_: None, "no_such_package.inside")  # type: ignore[arg-type, return-value]
    assert nothing.missing() and not Rival(nothing.make, "json").missing()
    monkeypatch.setattr(measure, "RIVALS", {"a": replace(nothing, module="json", devices=("cpu",)), "b": replace(nothing, devices=("cpu",)),
                                            "c": nothing})
    assert measure.installed("cpu") == (["a"], ["b"]) and measure.installed("cuda") == ([], ["c"])


# ---------------------------------------------------------------- turns
def test_rounds_swing() -> None:
    order: list[str] = []
    rotate([lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0], 3, 0.0, swing=True)
    assert order == ["a", "b", "b", "a", "a", "b"]


class Event:
    """Of a device that takes 2 ms a call and that nobody has to wait for."""

    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.calls

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 2.0 * (end.at - self.at)


def test_device_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    cuda = types.SimpleNamespace(synchronize=lambda: None, Event=Event, _sleep=slept.append,
                                 get_device_properties=lambda n: types.SimpleNamespace(L2_cache_size=1000))
    torch = types.ModuleType("torch")
    torch.cuda = cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    used: list[int] = []

    def call(n: int) -> Any:
        def counted() -> None:
            used.append(n)
            Event.calls += 1
        return counted
    measured = events.Events().turn([call(0), call(1)], 0.02)
    del used[:], slept[:]
    assert measured() == pytest.approx(0.002) and used == [0, 1] * 5 and 0 < slept[0] <= 0.02 * events.CYCLES_PER_SECOND
    assert [events.sets_of(size, 1000) for size in (10, 500, 2000, 2001)] == [16, 6, 2, 1]
    clock = pair.Clock("cuda", SMALL)
    assert clock.sets == 1 and clock.events is not None
    waited: list[Any] = []
    runner = Runner(lambda: 7, "", lambda result: {}, waited.append)        # JAX has a stream of its own
    assert clock.turn([runner])() > 0 and set(waited) == {7}


# ---------------------------------------------------------------- children and rows
def test_a_rival_that_fails_leaves_fastattns_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor you")
    monkeypatch.setitem(RIVALS, "x", Rival(fails, "json", ("cpu",)))
    x = make_inputs(SMALL)
    found = pair.measure(SMALL, "cpu", "x", exact.exact(SMALL, x), 0.0)
    assert found.theirs == Measured(note="failed: RuntimeError: no kernel") and len(found.ours.samples) == pair.ROUNDS["cpu"]
    assert Pair.from_json(json.loads(json.dumps(asdict(found)))) == found
    monkeypatch.setattr(pair, "make_fastattn", fails)
    found = pair.measure(SMALL, "cpu", None, exact.exact(SMALL, x), 0.0)
    assert found.theirs is None and found.ours.note == "failed: RuntimeError: no kernel" and not found.ours.samples


def test_rows_of_pairs_and_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ends or hangs costs one line; fastattn is measured alone if no pair has its time."""
    pairs = {"a": Pair(Measured("f", (1.0, 1.0), 1e-7), Measured("a", (2.0, 3.0), 1e-7), 0.5), "b": "failed: exit status -11",
             "c": Pair(Measured("f", (4.0,), 1e-7), Measured(note="no: reason"), 0.1)}
    asked: list[str | None] = []

    def child(shape: Shape, device: str, rival: str | None, path: Path, seconds: float) -> Any:
        asked.append(rival)
        return pairs[rival] if rival else Pair(Measured("f", (9.0,)), None)
    monkeypatch.setattr(measure, "_child", child)
    monkeypatch.setattr(measure, "installed", lambda device: (list(pairs), ["d"]))
    said: list[str] = []
    table = measure.measure(SMALL, "cpu", 0.0, said.append)
    own, a, b, c = table.rows
    assert own.time and own.time.median == 1.0 and a.ratio and a.ratio.median == 2.5 and own.ratio is None
    assert (b.note, c.note, table.absent, table.others, asked) == ("failed: exit status -11", "no: reason", ["d"], 0.5, ["a", "b", "c"])
    assert said == ["exact result", "a", "b", "c"]
    del pairs["a"], pairs["c"]
    own, b = measure.measure(SMALL, "cpu", 0.0, said.append).rows
    assert own.time and own.time.median == 9.0 and b.time is None


def test_children_that_end_or_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measure._child(SMALL, "cpu", None, tmp_path / "missing.npz", 0.0)
    assert isinstance(found, str) and found.startswith("failed: FileNotFoundError")
    monkeypatch.setattr(measure, "PATIENCE", 0.01)
    assert measure._child(SMALL, "cpu", None, tmp_path / "missing.npz", 0.0) == "failed: no answer for 0 s"


# ---------------------------------------------------------------- the command
def rows(error: float = 1e-7) -> Table:
    time = Spread(0.0012, 0.0011, 0.0013)
    found = [Row("fastattn", "fastattn 1", time, None, error), Row("torch flash", "torch 2", time.scaled(2), Spread(2, 2, 2), 5.0),
             Row("xformers", "", note="no: reason")]
    return Table(SMALL, "cpu", found, ["jax.nn"], "float64", 0.0)


def test_the_command_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its arguments through a real child to the files."""
    pytest.importorskip("torch")
    monkeypatch.setattr(measure, "installed", lambda device: (["torch flash"], ["xformers"]))
    monkeypatch.setattr(report, "cuda_facts", lambda: NO_CUDA)
    path = tmp_path / "mine.csv"
    arguments = ["bench", "--shape", "1,64,4,32", "--kv", "64,2,32", "--dtype", "float32", "--causal", "--backward", "--seconds", "0"]
    assert main([*arguments, "--csv", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "backward float32 causal (1,64,4,32) over 64,2,32" and lines[-1] == f"written: {path}"
    own, flash = (line.split() for line in lines if line.startswith(("fastattn", "torch flash")))
    assert own[4] == "1.00x" and 0 < float(own[5]) < 1e-5 and flash[5].endswith("x") and 0 < float(flash[6]) < 1e-5
    assert "not installed: xformers." in lines
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert (first["name"], first["direction"], first["seqlen_k"], first["wrong"]) == ("fastattn", "backward", "64", "False")
    assert float(second["ms"]) > 0 and float(second["time_over_fastattn"]) > 0 and second["error_against"] == "float64"


def parsed(*arguments: str) -> Any:
    from fastattn.cli.main import parser

    return parser().parse_args(["bench", *arguments])


def test_shapes_of_arguments() -> None:
    assert bench.shape_of(parsed("--shape", "2,4096,16,128")) == Shape(2, 4096, 16, 128, 4096, 16, 128)
    decode = bench.shape_of(parsed("--shape", "2,4096,16,128", "--decode", "--causal", "--kv", "512,4,64", "--dtype", "float16"))
    assert decode == Shape(2, 1, 16, 128, 512, 4, 64, "float16", True) and not decode.masked


@pytest.mark.parametrize(("arguments", "said"), [
    (["--shape", "2,8,3,8", "--kv", "8,2,8"], "--kv has 2 heads; expected a divisor of --shape's 3"),
    (["--shape", "2,8,3,577"], "head_dim is 577; expected 576 or less"),
    (["--shape", "2,8,3,8", "--device", "cuda"], "no CUDA device here"),
    (["--shape", "2,8,3,8", "--seconds", "nan"], "--seconds is nan"),
    (["--shape", "2,8,3,8", "--csv", "/no/such/folder/x.csv"], "cannot be written")])
def test_what_is_wrong_is_said_before_anything_is_measured(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "cuda_facts", lambda: NO_CUDA)
    with pytest.raises(SystemExit, match=said):
        main(["bench", *arguments])


@pytest.mark.parametrize(("arguments", "said"), [
    (["--shape", "2,8,3"], "is '2,8,3'; expected BATCH,SEQLEN,HEADS,HEAD_DIM, 4 positive numbers"), (["--shape", "2,0,3,8"], "positive"),
    (["--shape", "2,8,3,8", "--kv", "8,x,8"], "expected SEQLEN,HEADS,HEAD_DIM"),
    (["--shape", "2,8,3,8", "--decode", "--backward"], "not allowed with"), (["--shape", "2,8,3,8", "--dtype", "int8"], "bfloat16")])
def test_arguments_that_cannot_be_read(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("module", "arguments"), [("matplotlib", ["--png", "x.png"]), ("torch", ["--device", "cuda"])])
def test_packages_that_an_option_needs(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"error": None, "devices": [{"name": "A card", "arch": "sm_90", "ordinal": 0}]}
    monkeypatch.setattr(report, "cuda_facts", lambda: NO_CUDA | card)
    find = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(SystemExit, match=rf"needs {module}.*pip install {module}"):
        main(["bench", "--shape", "2,8,3,8", *(["--device", "cpu"] if module == "matplotlib" else []), *arguments])


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong rival is marked and does not matter; a wrong fastattn is status 1, as one that was not measured."""
    monkeypatch.setattr(report, "cuda_facts", lambda: NO_CUDA)
    for table, status in ((rows(), 0), (rows(math.inf), 1), (replace(rows(), rows=[Row("fastattn", "", note="failed: x")]), 1)):
        monkeypatch.setattr(measure, "measure", lambda *_, table=table: table)
        assert main(["bench", "--shape", "2,20,4,16"]) == status
        out = capsys.readouterr().out
    assert "failed: x" in out
    text = bench.text(replace(rows(), others=1.5))
    cells = [line.split() for line in text.splitlines()]
    assert ["fastattn", "1.20", "1.10-1.30", "0.00015", "1.00x", "1.0e-07", "fastattn", "1"] in cells
    assert ["torch", "flash", "2.40", "2.20-2.60", "7.52e-05", "2.00x", "WRONG", "torch", "2"] in cells
    assert "no: reason" in text and "not installed: jax.nn." in text and "up to 1.5 processors busy" in text
    assert "not computed" in bench.text(replace(rows(), precision=""))


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    bench.draw(rows(), tmp_path / "mine.png")
    assert (tmp_path / "mine.png").read_bytes()[:4] == b"\x89PNG" and capsys.readouterr().out == f"written: {tmp_path / 'mine.png'}\n"
    bench.draw(rows(math.inf), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists() and "nothing was measured" in capsys.readouterr().out


def test_torch_calls_name_their_backends() -> None:
    """Those of bench/gpu are among them."""
    assert {"cuDNN", "flash", "efficient", "math", "sdpa"} == set(torch_calls.BACKENDS)
