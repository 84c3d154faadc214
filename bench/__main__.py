"""The benchmark's command line.

`python -m bench cpu` and `python -m bench gpu` measure, write CSV and PNG, and print the table. `python -m bench workloads`
does so for problems of published models. `python -m bench busy` shares the processors with other processes and with torch.
`python -m bench flex` measures score and mask functions, `decode`, `paged` and `fp8` attention over key and value caches.
`python -m bench ladder` measures each rung of the reading course.
`python -m bench paired OLD_TREE` compares two trees of fastattn.
`python -m bench distributed` spreads one sequence over several devices.
`--help` lists the options.
"""
from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from fastattn.cli.pipes import until_closed

from . import busy, cpu, flex, machine, paired, plot, results, serve, table
from .distributed import cases as distributed_cases
from .distributed import report as distributed_report
from .distributed import run as distributed
from .gpu import ladder, workloads, workloads_table
from .gpu import plot as gpu_plot
from .gpu import run as gpu
from .gpu import table as gpu_table
from .results import Row

ROOT = Path(__file__).resolve().parent.parent
README, BENCHMARKS, HEADLINE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images" / "speed-gpu.svg"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Arguments after `python -m bench`. Default: those of the process.

    Raises
    ------
    SystemExit
        With a message if nothing can be measured. With status 1 if a GPU result is wrong or failed, or if a paired
        cell is over its bar or was not measured.
    """
    options = _parser().parse_args(arguments)
    if getattr(options, "update_readme", False) and options.only:
        raise SystemExit("--update-readme writes whole tables; it does not go with --only")
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of fastattn against other libraries.", **_example(
        "cpu --quick", "For one shape of your own: python -m fastattn bench --help"))
    targets = parser.add_subparsers(required=True, metavar="cpu|busy|gpu|workloads|flex|decode|paged|fp8|ladder|paired|distributed")
    target = targets.add_parser("cpu", help="against torch and onnxruntime on this machine's processor",
                                **_example("cpu --only decode --threads 2"))
    length = target.add_mutually_exclusive_group()
    length.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a third of the cases, fewer rounds")
    length.add_argument("--long", dest="mode", action="store_const", const="long", help="16384 keys too")
    target.add_argument("--threads", type=int, help="for every library (default: the processors this process may use)")
    target.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR",
                        help="for cpu.csv and cpu.png (cpu-quick, cpu-only for parts)")
    _common(target)
    target.set_defaults(mode="full", run=_cpu)

    target = targets.add_parser("busy", help="beside torch while other processes want the processors, and between torch's operators",
                                **_example("busy --only forward.*512 --seconds 10"))
    target.add_argument("--threads", type=int, help="for both libraries (default: the processors this process may use)")
    target.add_argument("--processes", type=int, help="other processes that compute (default: one a processor)")
    target.add_argument("--seconds", type=float, default=8.0, help="for each case (default: 8)")
    _choice(target)
    target.set_defaults(run=_busy)

    target = targets.add_parser("gpu", help="against torch's SDPA and varlen_attn and FlashAttention-4 on one CUDA device",
                                **_example("gpu --quick --backward"))
    target.add_argument("--quick", dest="mode", action="store_const", const="quick", help="bf16 and a few of the others, fewer rounds")
    target.add_argument("--backward", action="store_true", help="the backward's cases instead of the forward's")
    _on_a_device(target, "6 with --quick, else 120", "; the PNG and a .log go next to it (default: bench/results/gpu.csv, with -backward, "
                 "-quick and -only for parts)")
    _common(target)
    target.set_defaults(mode="full", run=_gpu)

    target = targets.add_parser("workloads", help="the attention of published models, beside the same rivals on one CUDA device",
                                **_example("workloads --only 'Llama'"))
    _on_a_device(target, f"{workloads.MINUTES:.0f}", "; the PNG and a .log go next to it (default: bench/results/workloads.csv, with -only "
                 "for parts)")
    target.add_argument("--from-csv", action="store_true", help="measure nothing; plot and table from the CSV")
    target.add_argument("--update-docs", action="store_true", help="rewrite the table of docs/benchmarks.md")
    _choice(target)
    target.set_defaults(run=_workloads)

    target = targets.add_parser("flex", help="score and mask functions beside built-in features and torch's flex_attention",
                                **_example("flex --device cuda --backward"))
    target.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    target.add_argument("--quick", action="store_true", help=f"at {flex.QUICK} instead of {flex.SHAPE}")
    target.add_argument("--dtype", choices=tuple(flex.TOLERANCE), help="(default: bfloat16 on a device, float32 on the host)")
    target.add_argument("--backward", action="store_true", help="the backward instead of the forward")
    target.add_argument("--engine", help="of fastattn (default: the one that a call takes)")
    target.add_argument("--csv", type=Path, metavar="PATH", help="write the table there, too")
    _choice(target)
    target.set_defaults(run=_flex)

    for group, what in (("decode", "contiguous caches"), ("paged", "caches in pages"), ("fp8", "8-bit caches in pages")):
        target = targets.add_parser(group, help=f"attention over {what}, on one CUDA device", **_example(f"{group} --only '16 x'"))
        target.add_argument("--csv", type=Path, metavar="PATH", help="write the table there, too")
        _choice(target)
        target.set_defaults(run=_serve, group=group)

    target = targets.add_parser("ladder", help="each rung of the reading course (docs/course) and the rivals, on one CUDA device",
                                **_example("ladder --quick"))
    target.add_argument("--quick", dest="mode", action="store_const", const="quick", help="fewer rounds")
    _on_a_device(target, "6 with --quick, else 120", " (default: bench/results/ladder.csv, with -quick and -only for parts)")
    target.add_argument("--from-csv", action="store_true", help="measure nothing; the table from the CSV, or from rows of bench gpu")
    target.add_argument("--update-course", action="store_true", help="rewrite the table of docs/course/index.md")
    _choice(target)
    target.set_defaults(mode="full", run=_ladder)

    target = targets.add_parser("distributed", help="one sequence over several devices: efficiency, error, traces",
                                **_example("distributed --quick --ranks 1 2"))
    target.add_argument("--quick", dest="mode", action="store_const", const="quick", help="fewer lengths")
    target.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda, over NCCL; cpu: over TCP)")
    target.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks (default: 1 2 4 8)")
    target.add_argument("--seconds", type=float, default=distributed.SECONDS, help="that the ranks of one number may take")
    target.add_argument("--leave", type=int, default=0, metavar="N", help="multiprocessors that forwards leave free, for transfers")
    target.add_argument("--json", type=Path, metavar="PATH", help="to write, or to read with --from-json; the PNG goes next to it "
                        "(default: bench/results/distributed.json, with -quick, -only and -cpu for parts)")
    target.add_argument("--from-json", action="store_true", help="measure nothing; table and picture from the file")
    _choice(target)
    target.set_defaults(mode="full", run=_distributed)

    target = targets.add_parser("paired", help="an older tree of fastattn against this one: the ratio of each cell, round robin in one run",
                                **_example("paired ../old --quick"))
    target.add_argument("old", type=Path, metavar="OLD_TREE", help="a folder with the older fastattn, its CPU engine built in place")
    target.add_argument("--new", type=Path, default=ROOT, metavar="TREE", help="(default: this one); OLD_TREE itself shows the noise")
    target.add_argument("--gpu", dest="on", action="store_const", const="gpu", default="cpu", help="the GPU's grid, device time; bar 1 %%")
    target.add_argument("--cpu", dest="on", action="store_const", const="cpu", help="the CPU's cases, wall time; bar 2 %% (default)")
    target.add_argument("--backward", action="store_true", help="on a GPU: the backward's cases instead of the forward's")
    length = target.add_mutually_exclusive_group()
    length.add_argument("--quick", dest="mode", action="store_const", const="quick", help="fewer cases")
    length.add_argument("--long", dest="mode", action="store_const", const="long", help="on a CPU: 16384 keys too")
    target.add_argument("--threads", type=int, help="on a CPU (default: the processors this process may use)")
    target.add_argument("--csv", type=Path, metavar="PATH", help="write the table there, too")
    _choice(target)
    target.set_defaults(mode="full", run=_paired)
    return parser


def _example(command: str, more: str = "") -> dict[str, Any]:
    """Keywords of a parser: an example below its help."""
    epilog = f"example:\n  python -m bench {command}\n{more}"
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


def _on_a_device(target: argparse.ArgumentParser, minutes: str, csv: str) -> None:
    """Options of what runs beside rivals on one CUDA device. `minutes` is the default, `csv` the end of that option's help."""
    target.add_argument("--skip-fa4", action="store_true", help="leave FlashAttention-4 out: it compiles for seconds per variant")
    target.add_argument("--minutes", type=float, help=f"start no case after so many minutes (default: {minutes})")
    target.add_argument("--jobs", type=int, help="processes that compile at once (default: the processors, 16 at most); 1: nothing ahead")
    target.add_argument("--csv", type=Path, metavar="PATH", help=f"to write, or to read with --from-csv{csv}")


def _common(target: argparse.ArgumentParser) -> None:
    _choice(target)
    target.add_argument("--from-csv", action="store_true", help="measure nothing; plot and table from the CSV")
    target.add_argument("--update-readme", action="store_true", help="rewrite the tables of the README and docs/benchmarks.md, "
                        "and the README's picture, from the CSV")


def _choice(target: argparse.ArgumentParser) -> None:
    target.add_argument("--only", metavar="PATTERN", help="cases whose name contains this regular expression")
    target.add_argument("--list", action="store_true", help="print the names of the cases and stop")


def _cpu(options: argparse.Namespace) -> None:
    if options.list:
        print("\n".join(case.name for case in cpu.select(options.mode, options.only)))
        return
    # Only a whole run writes cpu.csv; a partial run does not overwrite it.
    part = "-only" if options.only else "-quick" if options.mode == "quick" else ""
    path = options.out / f"cpu{part}.csv"
    if not options.from_csv:
        results.write_csv(cpu.run(options.mode, options.only, options.threads), path)
    report(path, "cpu", options.update_readme)


def _busy(options: argparse.Namespace) -> None:
    """Print the table as it is measured."""
    chosen = [case for case in busy.cases() if options.only is None or re.search(options.only, case.name)]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    processors = machine.available_threads()
    threads, processes = options.threads or processors, processors if options.processes is None else options.processes
    print(f"{machine.cpu_model()}, {threads} threads, {processes} other processes\n\n{busy.HEAD}", flush=True)
    for case, found in busy.run(chosen, threads, processes, options.seconds):
        print(busy.lines(case, found), flush=True)


def _serve(options: argparse.Namespace) -> None:
    """Print the table as it is measured. Exit status 1 if a number is wrong."""
    if options.list:
        print("\n".join(case.name for case in serve.cases(options.group)))
        return
    rows = list[serve.Row]()
    print(serve.HEAD, flush=True)
    for row in serve.run(options.group, options.only):
        rows.append(row)
        print(serve.line(row), flush=True)
    if options.csv and rows:
        serve.write_csv(rows, options.csv)
    if any(row.wrong for row in rows):
        raise SystemExit("WRONG, see above: a fast wrong answer means nothing")


def _flex(options: argparse.Namespace) -> None:
    """Print the table as it is measured. Exit status 1 if a number is wrong."""
    shape = flex.QUICK if options.quick else flex.SHAPE
    if options.list:
        print("\n".join(kind.name for kind in flex.kinds(shape[1], shape[2], "cpu")))
        return
    dtype, rows = options.dtype or ("bfloat16" if options.device == "cuda" else "float32"), []
    print(f"{shape}, {dtype}, {'backward' if options.backward else 'forward'}", flush=True)
    reason = flex.flex_fa4.missing(options.device)
    print(f"no FA4: {reason}\n\n{flex.HEAD}" if reason else f"\n{flex.HEAD}", flush=True)
    for row in flex.run(options.device, shape, dtype, options.backward, options.only, options.engine):
        rows.append(row)
        print(flex.line(row), flush=True)
    if options.csv and rows:
        flex.write_csv(rows, options.csv)
    if any("WRONG" in row.note for row in rows):
        raise SystemExit("WRONG, see above: a fast wrong answer means nothing")


def report(path: Path, name: str, update_pages: bool) -> None:
    """Picture, pages and printed table of a CSV. Everything comes from the CSV, so `--from-csv` gives the same."""
    rows = results.read_csv(path)
    drawn = plot.plot(rows, path.with_suffix(".png"))
    if update_pages:
        table.update_readme(README, name, table.summary(rows))
        table.update_readme(BENCHMARKS, name, table.markdown(rows))
    if table.warning(rows):
        print(table.warning(rows))
    first = rows[0]
    print(f"\n{table.console(rows)}\n\n{first.machine}, {first.threads} threads, {first.instruction_set}; {first.versions}")
    print(f"ceilings: {first.ceilings}\nwritten: {path}" + (f", {path.with_suffix('.png')}" if drawn else ""))


def _read(path: Path) -> list[Row]:
    rows = results.read_csv(path)
    if not rows:
        raise SystemExit(f"{path} has no rows: nothing was measured")
    return rows


def _measured(row: Row, path: Path) -> str:
    """On what, against what, and where it was written."""
    return f"\n{row.machine}, {row.instruction_set}; {row.versions}\nceilings: {row.ceilings}\nwritten: {path}"


def _fail_if_wrong(rows: list[Row]) -> None:
    if any(row.verdict == "WRONG" or (row.implementation == "fastattn" and row.note.startswith("failed")) for row in rows):
        raise SystemExit("WRONG or FAILED, see above: a fast wrong answer means nothing")


def _gpu(options: argparse.Namespace) -> None:
    chosen = gpu.choose(options.backward, options.mode, options.only, ("FA4",) if options.skip_fa4 else ())
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    part = ("-backward" if options.backward else "") + ("-only" if options.only else "-quick" if options.mode == "quick" else "")
    path: Path = options.csv or ROOT / "bench" / "results" / f"gpu{part}.csv"
    if not options.from_csv:
        gpu.check_device()
        gpu.run(chosen, options.mode, path, options.minutes, jobs=options.jobs)
    report_gpu(path, options.update_readme)


def report_gpu(path: Path, update_pages: bool) -> None:
    """The same for the GPU, the table last. Exit status 1 if a row is wrong.

    The picture and the pages are made of the forward's and the backward's CSV together, where both are there.
    """
    rows = _read(path)
    forward = path.with_stem(path.stem.removesuffix("-backward"))
    pair = (forward, forward.with_stem(f"{forward.stem}-backward"))
    both = [row for one in pair if one.is_file() for row in results.read_csv(one)]
    gpu_plot.plot(both, forward.with_suffix(".png"))
    if update_pages:
        gpu_plot.headline(both, HEADLINE)
        table.update_readme(README, "gpu", gpu_table.summary(both))
        table.update_readme(BENCHMARKS, "gpu", gpu_table.markdown(both))
    print(_measured(rows[0], path))
    print(f"{gpu_table.notes(rows)}\n")
    print(f"{gpu_table.console(rows)}\n\n{gpu_table.closing(rows)}", flush=True)
    _fail_if_wrong(rows)


def _workloads(options: argparse.Namespace) -> None:
    """Measure and print the table last. Exit status 1 if a row is wrong or fastattn failed."""
    chosen = workloads.choose(options.only, ("FA4",) if options.skip_fa4 else ())
    if options.list:
        print("\n".join(case.name for case in chosen))
        print(f"{len(chosen)} cases, about {workloads.seconds(chosen) / 60:.0f} minutes on one H200 with 16 processors: an estimate, "
              "from flop counts and compile times")
        return
    if options.update_docs and options.only:
        raise SystemExit("--update-docs writes a whole table; it does not go with --only")
    path: Path = options.csv or ROOT / "bench" / "results" / f"workloads{'-only' if options.only else ''}.csv"
    if not options.from_csv:
        gpu.check_device()
        gpu.run(chosen, "workloads", path, options.minutes, jobs=options.jobs, split=workloads.split)
    rows = _read(path)
    workloads_table.plot(rows, path.with_suffix(".png"))
    if options.update_docs:
        table.update_readme(BENCHMARKS, "workloads", workloads_table.markdown(rows))
    print(_measured(rows[0], path))
    print(f"{gpu_table.notes(rows)}\n\n{workloads_table.console(rows)}", flush=True)
    _fail_if_wrong(rows)


def _ladder(options: argparse.Namespace) -> None:
    """Measure and print the course's table last. Exit status 1 if a row is wrong."""
    chosen = ladder.choose(options.mode, options.only, ("FA4",) if options.skip_fa4 else ())
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    folder = ROOT / "bench" / "results"
    part = "-only" if options.only else "-quick" if options.mode == "quick" else ""
    path: Path = options.csv or folder / f"ladder{part}.csv"
    if not options.from_csv:
        gpu.check_device()
        gpu.run(chosen, options.mode, path, options.minutes, jobs=options.jobs)
    rows = ladder.read(path) if options.csv or not options.from_csv else ladder.rows_of(folder)
    if options.update_course:
        table.update_readme(ROOT / "docs" / "course" / "index.md", "ladder", ladder.markdown(rows))
    print(f"{gpu_table.notes(rows)}\n\n{ladder.markdown(rows)}")
    if any(row.verdict == "WRONG" for row in rows):
        raise SystemExit("WRONG, see above: a fast wrong answer means nothing")


def _distributed(options: argparse.Namespace) -> None:
    """Print each line as it is measured, then the table. Exit status 1 if ranks failed."""
    chosen = distributed_cases.select(options.mode, options.device, options.only)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    if options.leave and options.device == "cpu":
        raise SystemExit("--leave: a CPU has no multiprocessors")
    part = ("-cpu" if options.device == "cpu" else "") + ("-only" if options.only else "-quick" if options.mode == "quick" else "")
    path: Path = options.json or ROOT / "bench" / "results" / f"distributed{part}.json"
    if not options.from_json:
        rows = []
        for row in distributed.run(chosen, options.ranks, options.device, options.seconds, options.leave):
            rows.append(row)
            print(distributed_report.lines([row], options.device).splitlines()[-1], flush=True)
        distributed_report.write(rows, distributed.versions(), path)
    rows, versions = distributed_report.read(path)
    drawn = distributed_report.picture(rows, path.with_suffix(".png"))
    print(f"\n{distributed_report.lines(rows, options.device)}\n\n{versions}")
    print(f"written: {path}" + (f", {path.with_suffix('.png')}" if drawn else ""))
    if any("ended with" in row.get("note", "") for row in rows):
        raise SystemExit(1)


def _paired(options: argparse.Namespace) -> None:
    """Measure and print the table last. Exit status 1 if a cell is over the bar or was not measured."""
    chosen = paired.select(options.on, options.mode, options.only, options.backward)
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    trees = paired.tree(options.old), paired.tree(options.new)
    if options.on == "gpu":
        gpu.check_device()
    work, bar = machine.OtherWork(), paired.BARS[options.on]
    cells = paired.run(trees, chosen, options.on, options.threads)
    others = work.processors() or 0.0
    if options.csv:
        paired.write_csv(cells, options.csv)
    if options.on == "cpu" and others > results.BUSY:
        print(table.busy(others))
    print(f"\nold: {trees[0]}\nnew: {trees[1]}\n\n{paired.table(cells, bar)}", flush=True)
    if any(cell.note or cell.over(bar) for cell in cells):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(until_closed(main))
