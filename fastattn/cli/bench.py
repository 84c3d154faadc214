"""`bench`: what do I get for my shape, beside the libraries that are installed?"""
from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..benchmark.measure import Row, Table
    from ..benchmark.shape import Shape

DESCRIPTION = """\
Measures attention of one shape, and the same by every library here that has it: torch's SDPA backends, flash_attn,
FlashAttention-4, xformers, jax.nn. Each is measured beside fastattn in a process of its own, in turns (A B, B A):
medians of public calls with their allocations, on a GPU device time by CUDA events. Inputs are random and the same in
every run. The exit status is 1 if fastattn's result is wrong."""
EXAMPLE = "bench --shape 2,4096,16,128 --kv 4096,8,128 --dtype bfloat16 --causal --csv mine.csv"
DTYPES = ("float32", "float64", "float16", "bfloat16")


def _sizes(text: str, names: str) -> tuple[int, ...]:
    """Comma-separated positive numbers, one for each of the names."""
    words, count = text.split(","), len(names.split(","))
    if len(words) != count or not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"is {text!r}; expected {names}, {count} positive numbers")
    return tuple(map(int, words))


def _shape_of_q(text: str) -> tuple[int, ...]:
    return _sizes(text, "BATCH,SEQLEN,HEADS,HEAD_DIM")


def _shape_of_kv(text: str) -> tuple[int, ...]:
    return _sizes(text, "SEQLEN,HEADS,HEAD_DIM")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=_shape_of_q, required=True, metavar="B,S,H,D", help="of q: batch, seqlen, num_heads, head_dim")
    parser.add_argument("--kv", type=_shape_of_kv, metavar="S,H,D",
                        help="of k and v, where they differ from q: seqlen, num_heads_k, head_dim of v (k has q's)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument("--causal", action="store_true", help="the diagonal is bottom-right")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--backward", action="store_true", help="the gradients alone, of q, k and v, instead of the forward")
    what.add_argument("--decode", action="store_true", help="one query row a sequence; --shape's seqlen is then the number of keys")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a device, else cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure each library, at least (default 2)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there; needs matplotlib")


def shape_of(given: argparse.Namespace) -> Shape:
    from ..benchmark.shape import Shape
    from ..problem import MAX_HEAD_DIM

    batch, seqlen, heads, dim = given.shape
    keys, heads_k, dim_v = given.kv or (seqlen, heads, dim)
    if heads % heads_k:
        raise SystemExit(f"bench: --kv has {heads_k} heads; expected a divisor of --shape's {heads}.")
    if max(dim, dim_v) > MAX_HEAD_DIM:
        raise SystemExit(f"bench: head_dim is {max(dim, dim_v)}; expected {MAX_HEAD_DIM} or less.")
    return Shape(batch, 1 if given.decode else seqlen, heads, dim, keys, heads_k, dim_v, given.dtype, given.causal, given.backward)


def _device(asked: str | None) -> str:
    """The device, after a look whether it can be measured: events and arrays on a GPU are torch's."""
    from ..report import cuda_facts

    cuda = cuda_facts()
    there = not cuda["error"] and bool(cuda["devices"])
    device = asked or ("cuda" if there else "cpu")
    if device == "cuda":
        if not there:
            raise SystemExit(f"bench --device cuda: no CUDA device here ({cuda['error'] or 'the driver finds none'}); --device cpu works.")
        if importlib.util.find_spec("torch") is None:
            raise SystemExit("bench --device cuda needs torch with CUDA for arrays and events: pip install torch; --device cpu works.")
    return device


def run(given: argparse.Namespace) -> int:
    from ..report import cpu_engine_facts

    shape, device = shape_of(given), _device(given.device)
    absent = cpu_engine_facts()["error"]
    if device == "cpu" and absent:
        raise SystemExit(f"bench: the CPU engine cannot be loaded: {absent}")
    if given.png and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("bench --png needs matplotlib: pip install matplotlib; without --png everything works.")
    if not given.seconds >= 0:
        raise SystemExit(f"bench: --seconds is {given.seconds}; expected 0 or more.")
    for path in filter(None, (given.csv, given.png)):
        if not path.absolute().parent.is_dir():
            raise SystemExit(f"bench: {path} cannot be written: its folder does not exist.")
    from ..benchmark.measure import measure

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(f"measuring: {what}", file=sys.stderr, flush=True)
    table = measure(shape, device, given.seconds, say)
    print(text(table), flush=True)
    if given.csv:
        write_csv(table, given.csv)
    if given.png:
        draw(table, given.png)
    own = table.rows[0]
    return 1 if own.time is None or own.wrong(shape) else 0


# ---------------------------------------------------------------- the table
def _machine(table: Table) -> str:
    from .. import cpu
    from ..benchmark.machine import cpu_model
    from ..report import cuda_facts

    if table.device == "cuda":
        return ", ".join(f"{device['name']} ({device['arch']})" for device in cuda_facts()["devices"][:1])
    return f"{cpu_model()}, {cpu.get_num_threads()} threads, {cpu.instruction_set()}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:#.3g}".rstrip(".") if seconds < 0.9995 else f"{1e3 * seconds:.0f}"


def _cells(row: Row, shape: Shape) -> tuple[str, ...]:
    error = "" if row.error is None else "WRONG" if row.wrong(shape) else f"{row.error:.1e}"
    if row.time is None:
        return row.name, "", "", "", "", error, row.note
    time, ratio = row.time, row.ratio
    return (row.name, _milliseconds(time.median), f"{_milliseconds(time.low)}-{_milliseconds(time.high)}",
            f"{shape.speed(time.median):.3g}", "1.00x" if ratio is None else f"{ratio.median:.2f}x", error, row.label)


def text(table: Table) -> str:
    """The table, under a line that says what was measured where, over what its columns mean."""
    from ..benchmark.measure import BUSY
    from ..benchmark.text import aligned

    lines = [("", "ms", "20-80 %", table.shape.unit, "time", "max error", ""), *(_cells(row, table.shape) for row in table.rows)]
    parts = [f"{table.shape}\non {_machine(table)}\n", aligned(lines), "",
             "time: over fastattn's, in the same process and rounds; above 1 is slower than fastattn."]
    if table.precision:
        parts.append(f"max error: from the {table.precision} result of the first and the last key head, relative to its largest element.")
    else:
        parts.append("max error: not computed, the problem is too large.")
    if table.absent:
        parts.append(f"not installed: {', '.join(table.absent)}.")
    if table.others > BUSY:
        parts.append(f"WARNING: other processes kept up to {table.others:.1f} processors busy; these numbers mean little.")
    return "\n".join(parts)


# ---------------------------------------------------------------- files
def _records(table: Table) -> list[dict[str, Any]]:
    from ..benchmark.machine import today
    from ..version import __version__

    where = {"date": today(), "machine": _machine(table), "device": table.device, "fastattn": __version__}
    what = {**asdict(table.shape), "direction": table.shape.direction}

    def record(row: Row) -> dict[str, Any]:
        low, median, high = (None, None, None) if row.time is None else (row.time.low, row.time.median, row.time.high)
        return {**where, **what, "name": row.name, "label": row.label, "ms": median and 1e3 * median, "ms_p20": low and 1e3 * low,
                "ms_p80": high and 1e3 * high, "speed": median and table.shape.speed(median), "unit": table.shape.unit,
                "time_over_fastattn": row.ratio and row.ratio.median, "max_error": row.error, "error_against": table.precision,
                "wrong": row.wrong(table.shape), "note": row.note}
    return list(map(record, table.rows))


def write_csv(table: Table, path: Path) -> None:
    records = _records(table)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in record.items()} for record in records)
    print(f"written: {path}")


def draw(table: Table, path: Path) -> None:
    """Horizontal bars of the speed with their spread, fastattn first. Wrong results have none."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    rows = [row for row in table.rows if row.time is not None and not row.wrong(table.shape)]
    if not rows:
        print(f"not written: {path}: nothing was measured")
        return
    figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.45 * len(rows)), layout="constrained")
    for n, row in enumerate(rows):
        assert row.time is not None
        low, median, high = map(table.shape.speed, (row.time.high, row.time.median, row.time.low))
        axis.barh(n, median, xerr=[[median - low], [high - median]], color="#0072b2" if row.name == "fastattn" else "#b0b0b0", capsize=2)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"{table.shape.unit}, higher is better")
    axis.set_title(f"{table.shape}\n{_machine(table)}", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written: {path}")
