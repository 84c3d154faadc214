"""`python -m bench cpu`: measure, write CSV and PNG, print the table; `--help` for the rest."""
from __future__ import annotations

import argparse
from pathlib import Path

from . import cpu, plot, results, table

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.update_readme and options.only:
        raise SystemExit("--update-readme writes the whole table; it does not go with --only")
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of fastattn against other libraries.")
    targets = parser.add_subparsers(required=True, metavar="cpu")
    target = targets.add_parser("cpu", help="against torch and onnxruntime on this machine's processor")
    length = target.add_mutually_exclusive_group()
    length.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a third of the cases, fewer rounds")
    length.add_argument("--long", dest="mode", action="store_const", const="long", help="16384 keys too")
    target.add_argument("--only", metavar="PATTERN", help="cases whose name contains this regular expression")
    target.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    target.add_argument("--threads", type=int, help="for every library (default: the processors this process may use)")
    target.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="DIR",
                        help="for cpu.csv and cpu.png (cpu-quick, cpu-only for parts)")
    target.add_argument("--from-csv", action="store_true", help="measure nothing; plot and table from the CSV in DIR")
    target.add_argument("--update-readme", action="store_true", help="rewrite the README's table from the CSV")
    target.set_defaults(mode="full", run=_cpu)
    return parser


def _cpu(options: argparse.Namespace) -> None:
    if options.list:
        print("\n".join(case.name for case in cpu.select(options.mode, options.only)))
        return
    # Only a whole run is cpu.csv: a part does not overwrite it.
    part = "-only" if options.only else "-quick" if options.mode == "quick" else ""
    path = options.out / f"cpu{part}.csv"
    if not options.from_csv:
        results.write_csv(cpu.run(options.mode, options.only, options.threads), path)
    report(path, "cpu", options.update_readme)


def report(path: Path, name: str, update_readme: bool) -> None:
    """Plot, README and table of a CSV; the files see what the CSV holds, nothing else."""
    rows = results.read_csv(path)
    drawn = plot.plot(rows, path.with_suffix(".png"))
    if update_readme:
        table.update_readme(ROOT / "README.md", name, table.markdown(rows))
    if table.warning(rows):
        print(table.warning(rows))
    first = rows[0]
    print(f"\n{table.console(rows)}\n\n{first.machine}, {first.threads} threads, {first.instruction_set}; {first.versions}")
    print(f"ceilings: {first.ceilings}\nwritten: {path}" + (f", {path.with_suffix('.png')}" if drawn else ""))


if __name__ == "__main__":
    main()
