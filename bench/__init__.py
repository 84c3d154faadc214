"""Benchmarks of fastattn. Run from the repository's root, with the package installed.

`python -m bench cpu` (for `gpu` see bench/gpu/__init__.py), file by file:

    __main__.py     the command line
    cpu.py          the list of CPU cases; measures each (case, rival) in a fresh process -> rows
        |
    worker.py       the child: makes inputs, checks that both results agree, times both, answers in JSON
        |           rivals.py: fastattn, torch, onnxruntime as calls;  ceilings.py: what the hardware can do
        |           timing.py: round robin;                            memory.py: peak memory of one call
    results.py      rows -> CSV and back, verdicts
        |
    table.py        the table on the terminal, and the README's table between its markers
    plot.py         the PNG

masks.py has the boolean masks of models. They say which pairs a case visits.

`python -m bench paired OLD_TREE` compares an older tree of fastattn with this one, round robin:

    paired.py           one process for each tree; rounds -> ratios, the table
        |
    paired_worker.py    the child: imports the fastattn of its tree, measures one turn at a time

case.py says what is measured. case, timing, results, table, plot and machine are the same for CPUs and GPUs. Modules that
are not here are in fastattn/benchmark: the wheel has them too.
"""
from pathlib import Path

# timing, events, machine, arrays, shape, text and torch_calls serve `python -m fastattn bench` too. They are found by their place, not
# through fastattn: a child of `bench paired` imports an older fastattn, which need not have them.
__path__.append(str(Path(__file__).resolve().parent.parent / "fastattn" / "benchmark"))
