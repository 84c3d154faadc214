"""The workloads: their list, their masks and counts, tables of invented rows, and every case small, on CPU tensors, beside torch.

No GPU: fastattn is the reference engine, and torch's CPU attention stands in for every backend of SDPA.
"""
from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.timing import Spread

from bench import masks, results
from bench.__main__ import main
from bench.case import Case
from bench.gpu import run, workloads, workloads_table
from bench.results import Row
from tests.tools.bench import WHERE, Processor

CASES = workloads.choose(None)


def small(case: Case) -> Case:
    """The same features at a size for the reference engine. GQA keeps its grouping, decode its few queries."""
    heads_k = 2 if case.num_heads_k > 1 else case.num_heads_k
    lengths = tuple(n // 256 + 1 for n in case.lengths[:3])
    keys = {"seqlen_k": 40} if case.seqlen_k else {}
    seqlen = max(lengths, default=min(case.seqlen, 5 if case.few_queries else 24))
    dims = {"head_dim": 16, "head_dim_v": 8 if case.head_dim_v else 0}
    return replace(case, batch=len(lengths) or 2, num_heads=4 if heads_k else 2, num_heads_k=heads_k, seqlen=seqlen, lengths=lengths,
                   window=case.window and 9, **keys, **dims)


def test_names_are_unique_and_say_what() -> None:
    works = workloads.workloads()
    assert len({work.name for work in works}) == len(works) >= 60 and len({case.name for case in CASES}) == len(CASES)
    assert all(work.source and work.case.group in workloads.GROUPS for work in works)
    assert {work.case.group for work in works} == set(workloads.GROUPS)
    trained = [work for work in works if work.use == "training"]
    assert sum(not case.alone for case in CASES) == len(works)
    assert sum(case.alone and not case.need_dbias for case in CASES) == len(trained) > 30
    assert not any(case.need_dbias and not case.alone for case in CASES)
    assert all(case.name.rpartition(", ")[2] in ("forward", "backward", "backward with dbias") for case in CASES)
    assert all(Case.from_json(json.loads(json.dumps(asdict(case)))) == case for case in CASES)


def test_they_span_what_people_have() -> None:
    dims, keys = {case.head_dim for case in CASES}, {case.shape_k[2] for case in CASES}
    assert min(dims) == 16 and max(dims) == 576 and min(keys) == 49 and max(keys) == 65536
    features = {feature for case in CASES for feature in case.features}
    assert features == {"causal", "window", "alibi", "softcap", "dropout", "bias", "mask", "sinks", "dbias"}
    for case in CASES:
        assert set(case.against) == ({"FA4", "varlen_attn"} if case.lengths else {"cuDNN", "flash", "efficient", "math", "FA4"})


def test_a_run_is_short_and_fits() -> None:
    assert workloads.seconds(CASES) < 600 and workloads.seconds(CASES) > workloads.seconds(CASES[:9])
    parts = workloads.split(CASES, 16)
    assert len(parts) == 16 and sorted(case.name for part in parts for case in part) == sorted(case.name for case in CASES)
    homes: dict[Any, set[int]] = {}
    for n, part in enumerate(parts):
        for case in part:
            homes.setdefault(workloads.kernels(case), set()).add(n)
    assert all(len(home) == 1 for home in homes.values())       # shared kernels are compiled once
    together = sum(max(map(workloads.gigabytes, part)) for part in parts)       # while all compile
    assert together < 100 and max(map(workloads.gigabytes, CASES)) + workloads.CHECK_GIGABYTES < 100


def test_choose() -> None:
    assert {case.title for case in workloads.choose("Swin-L")} == {"Swin-L 384, stage 3"}
    assert not any("FA4" in case.against for case in workloads.choose(None, ("FA4",)))
    with pytest.raises(SystemExit, match="no workload has a name that matches 'nothing'"):
        workloads.choose("nothing")


# ---------------------------------------------------------------- masks and counts
def test_masks_hold_what_they_say() -> None:
    kinds: dict[masks.Kind, tuple[int, ...]] = {"padding": (3, 1, 1, 40), "left": (3, 1, 40, 40), "documents": (1, 1, 40, 40),
                                                "prefix": (1, 1, 40, 40)}
    causal = np.tri(40, dtype=bool)
    for kind, shape in kinds.items():
        mask = masks.make(kind, 3, 40, 40)
        assert mask.shape == shape and mask.dtype == bool and mask.any(axis=3).all() and not mask.all(), kind
        assert kind == "padding" or (mask | causal != causal).any() == (kind == "prefix")
    assert masks.make("prefix", 1, 40, 40)[0, 0, 0].sum() == 8
    document = masks.make("documents", 1, 40, 40)[0, 0]
    assert (np.flatnonzero(document.diagonal()) == np.arange(40)).all() and not document[39, 0]
    with pytest.raises(ValueError, match="'random' has no definition here"):
        masks.make("random", 1, 2, 2)


def test_empty_tiles_are_not_counted() -> None:
    """Against a count tile by tile."""
    for kind in ("padding", "left", "documents", "prefix"):
        mask = masks.make(kind, 2, 300, 300)
        count = 0
        for plane in np.broadcast_to(mask, (2, 1, 300, 300))[:, 0]:
            for row in range(0, 300, masks.TILE):
                for key in range(0, 300, masks.TILE):
                    tile = plane[row:row + masks.TILE, key:key + masks.TILE]
                    count += tile.size if tile.any() else 0
        assert masks.visited(kind, 2, 300, 300) == count < 2 * 300 * 300, kind
        case = Case("masks", 2, 3, 300, 16, mask=True, mask_kind=kind)
        assert case.pairs == 3 * count
    assert Case("masks", 2, 3, 300, 16, mask=True).pairs == 2 * 3 * 300 * 300


def test_flops_and_bytes_of_named_workloads() -> None:
    named = {case.name: case for case in CASES}
    mla = named["DeepSeek V3, MLA, forward"]
    pairs = 128 * 4096 * 4097 // 2
    assert mla.flops == 2 * pairs * (192 + 128) and mla.shape == "(1,128,4096,192/128)"
    assert named["DeepSeek V3, MLA, backward"].flops == 2 * pairs * (3 * 192 + 2 * 128)
    assert named["Mistral 7B v0.1, forward"].pairs == 32 * (4096 * 4097 // 2 + (16384 - 4096) * 4096)
    assert named["Llama 3.1 8B, chunked prefill, forward"].pairs == 32 * sum(range(30721, 32769))
    assert named["Llama 3.1 8B, 16 requests over 8k, forward"].kv_bytes == 2 * 16 * 8192 * 8 * 128 * 2
    assert named["DeepSeek V3, absorbed MLA decode, forward"].kv_bytes == 32 * 4096 * 576 * 2       # V is a part of K
    assert sum(case.few_queries for case in CASES) == 11


# ---------------------------------------------------------------- every case, small
def bench_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torch")
    from bench.gpu import rivals, worker

    sdpa = rivals.make_sdpa
    for name in ("cuDNN", "efficient", "math"):     # each with the mask that it would get
        def maker(case: Case, x: Any, backend: str) -> Any:
            make = rivals.torch_calls.sdpa
            monkeypatch.setattr(rivals.torch_calls, "sdpa", lambda _, **extra: make("sdpa", **extra))
            try:
                return sdpa(case, x, backend)
            finally:
                monkeypatch.setattr(rivals.torch_calls, "sdpa", make)
        monkeypatch.setitem(rivals.MAKERS, name, maker)
    monkeypatch.setattr(rivals, "missing", lambda name: f"not installed: {name}" if name in ("FA4", "varlen_attn", "flash") else None)
    monkeypatch.setattr(worker, "WALL_CALLS", 1)
    return worker.Bench(Processor(), WHERE, worker.Budget(1, 0.0), "reference")


@pytest.mark.parametrize("group", workloads.GROUPS)
def test_every_case_agrees_with_torch(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fastattn and torch against the check's float64 formula. Whoever does not run says why."""
    bench = bench_without_a_gpu(monkeypatch)
    for case in map(small, (case for case in CASES if case.group == group)):
        rows = {row.implementation: row for row in bench.rows(case)}
        limit = 1e-5 if case.dtype == "float32" else 0.015
        own = rows["fastattn"]
        assert own.median_ms and own.verdict != "WRONG" and own.error is not None and own.error < limit, (case.name, own)
        assert (own.gigabytes is not None) == case.few_queries
        for name in ("cuDNN", "efficient", "math"):
            row = rows.get(name)
            if case.softcap or case.sinks or (case.need_dbias and case.mask):
                assert row is not None and row.note.startswith("no: "), (case.name, name, row)
            elif not case.lengths:
                assert row is not None and row.median_ms and not row.note, (case.name, name, row)
                assert case.dropout_p or (row.error is not None and row.error < limit), (case.name, name, row.error)
        assert rows["FA4"].note == "not installed: FA4"


def test_the_gradient_of_a_bias_is_that_of_torch() -> None:
    """The check leaves it out, because it sums over all sequences."""
    torch = pytest.importorskip("torch")
    from bench.gpu import rivals

    cases = [small(case) for case in CASES if case.need_dbias]
    assert len(cases) == 4
    for case in cases:
        x = rivals.make_inputs(case, "cpu")
        ours, theirs = (runner.named(runner.call())["dbias"].double() for runner in (
            rivals.make_fastattn(case, x, "reference"), rivals.make_sdpa(case, x, "math")))
        assert ours.shape == theirs.shape and torch.linalg.norm(ours - theirs) < 0.02 * torch.linalg.norm(theirs), case.name


def test_the_check_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from bench.gpu import check, rivals

    for name in ("Mistral 7B v0.1, backward", "PaliGemma, prefix mask, backward", "Gemma 2 9B, local layer, forward"):
        case = small(next(case for case in CASES if case.name == name))
        x = rivals.make_inputs(case, "cpu")
        whole = check.reference(case, x, check.Part(1, 0))
        monkeypatch.setattr(check, "CHUNK", 7 * 24 * case.num_heads)
        chunks = check.reference(case, x, check.Part(1, 0))
        monkeypatch.undo()
        assert whole.keys() == chunks.keys() and all(torch.allclose(whole[name], chunks[name], rtol=1e-12, atol=1e-12) for name in whole)


def test_wall_time_waits_for_the_device() -> None:
    from fastattn.benchmark.events import Events

    device = object.__new__(Events)
    device.synchronize = lambda: time.sleep(0.03)       # type: ignore[method-assign]
    assert device.host_seconds([lambda: None], 2) < 0.01 < device.host_seconds([lambda: None], 2, finish=True)


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_without_a_gpu(monkeypatch)
    from bench.gpu import rivals

    case = small(next(case for case in CASES if case.name == "BERT-base, padded, forward"))
    make = rivals.make_fastattn
    monkeypatch.setattr(rivals, "make_fastattn", lambda case, x, engine=None: make(case, replace(x, mask=None), engine))
    rows = list(bench.rows(case))
    assert rows[0].verdict == "WRONG" and workloads_table.fastest({row.implementation: row for row in rows}) is None


def test_who_cannot_run_says_why() -> None:
    pytest.importorskip("torch")
    from bench.gpu import rivals

    named = {case.name: case for case in CASES}
    padded = small(named["BERT-base, padded, forward"])
    with pytest.raises(NotImplementedError, match="flash takes no attn_mask"):
        rivals.make_sdpa(padded, rivals.make_inputs(padded, "cpu"), "flash")
    with pytest.raises(NotImplementedError, match="FA4 has no mask"):
        rivals.make_fa4(padded, rivals.make_inputs(padded, "cpu"), "FA4")
    long, tiny = named["Llama 3.1 8B, 64k, forward"], small(named["Llama 3.1 8B, 64k, forward"])
    with pytest.raises(NotImplementedError, match="math would store 1100 GB of scores"):
        rivals.make_sdpa(long, rivals.make_inputs(tiny, "cpu"), "math")


def test_small_calls_are_measured_last_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their time is the host's too, so no other process may work meanwhile."""
    jobs: list[tuple[list[Case], dict[str, Any]]] = []
    monkeypatch.setattr(run, "_measure", lambda cases, job, *_: jobs.append((list(cases), job)))
    run.run(CASES, "workloads", tmp_path / "workloads.csv", jobs=4, split=workloads.split)
    last, job = jobs[-1]
    assert len(jobs) == 5 and {case.group for case in last} == {"small"} and job["lock"] is None and job["budget"]["rounds"] == 7
    assert not any(case.wall or other["lock"] is None for cases, other in jobs[:-1] for case in cases)
    assert sum(len(cases) for cases, _ in jobs) == len(CASES)


# ---------------------------------------------------------------- tables of invented rows
def invented() -> list[Row]:
    """Two forwards, a backward, one that fastattn does not run, one whose fastest rival is wrong. The order is not the list's."""
    named = {case.name: case for case in CASES}

    def timed(name: str, implementation: str, ms: float, value: float | None = None, **more: Any) -> Row:
        return results.make_row(WHERE, named[name], implementation, time=Spread(ms / 1e3, ms / 1e3, ms / 1e3),
                                measure="speedup" if value else "time", value=value and Spread(value, value, value), **more)

    bert, small_, mla = "BERT-base, padded, forward", "64 tokens, backward", "DeepSeek V3, absorbed MLA decode, forward"
    whisper = "Whisper large, encoder, forward"
    return [timed(whisper, "fastattn", 2.0), timed(whisper, "math", 0.2, 0.1, agree=False), timed(whisper, "FA4", 4.0, 2.0),
            timed(small_, "fastattn", 0.1), timed(small_, "flash", 0.06, 0.6),
            results.make_row(WHERE, named[mla], "fastattn", note="no: out of memory"), timed(mla, "efficient", 1.0),
            timed(bert, "fastattn", 1.0), timed(bert, "cuDNN", 0.5, 0.5), timed(bert, "efficient", 3.0, 3.0),
            results.make_row(WHERE, named[bert], "FA4", note="no: FA4 has no mask")]


def test_means_and_the_worst() -> None:
    rows = invented()
    forward = workloads_table.mean(rows, "forward")
    assert forward and forward.value == pytest.approx(1.0) and forward[1:] == (2, 0.5, "BERT-base, padded, forward")
    assert str(workloads_table.mean(rows, "backward")) == "0.60 (1), worst 0.60: 64 tokens, backward"
    assert workloads_table.mean(rows, "forward", "grid") == (2.0, 1, 2.0, "Whisper large, encoder, forward")
    assert workloads_table.mean(rows, "backward", "masks") is None


def test_table_and_picture_of_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "workloads.csv"
    results.write_csv(invented(), path)
    with pytest.raises(SystemExit, match="WRONG or FAILED"):        # a rival is wrong
        main(["workloads", "--from-csv", "--csv", str(path)])
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[-1] == "without a ratio: DeepSeek V3, absorbed MLA decode, forward (no: out of memory)"
    assert lines[-3] == "forward: geometric mean 1.00 (2), worst 0.50: BERT-base, padded, forward"
    table = next(n for n, line in enumerate(lines) if line.startswith("workload what"))
    assert lines[table] == "workload what fastattn cuDNN flash efficient math FA4 ratio"
    assert lines[table + 2].startswith("BERT-base, padded, forward") and lines[table + 2].endswith("0.50 (cuDNN)")
    assert any(line.endswith("100.0 us 60.0 us 0.60 (flash)") for line in lines)
    assert any("WRONG" in line and line.endswith("2.00 (FA4)") for line in lines)
    assert "FA4: no: FA4 has no mask (1x, first BERT-base, padded, forward)" in lines
    if pytest.importorskip("matplotlib"):
        assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_the_page() -> None:
    text = workloads_table.markdown(invented())
    assert "| all | 1.00 (2), worst 0.50: BERT-base, padded, forward | 0.60 (1), worst 0.60: 64 tokens, backward |" in text
    assert "**Boolean masks and key padding**" in text and "- BERT-base, padded: BERT (1810.04805)" in text
    assert "Why cells are empty:\n\n- DeepSeek" not in text and "- FA4: no: FA4 has no mask (1x, first BERT-base, padded, forward)" in text
    assert "**Float32**" not in text        # nothing of it was measured


def test_the_docs_show_the_results_that_are_there() -> None:
    root = Path(__file__).parents[1]
    text, path = (root / "docs" / "benchmarks.md").read_text(), root / "bench" / "results" / "workloads.csv"
    if path.is_file():
        assert workloads_table.markdown(results.read_csv(path)) in text
    else:
        assert "<!-- bench:workloads:begin -->\nNot measured yet" in text


def test_the_list_has_an_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    main(["workloads", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES) + 1 and f"{len(CASES)} cases, about " in lines[-1] and "an estimate" in lines[-1]
    with pytest.raises(SystemExit, match="does not go with --only"):
        main(["workloads", "--only", "Swin", "--update-docs"])
