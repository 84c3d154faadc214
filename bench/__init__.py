"""Benchmarks of fastattn: `python -m bench cpu`. Run from the repository's root with the package installed.

How a run flows, file by file:

    __main__.py     the command line
    cpu.py          the list of CPU cases; each pair (case, rival) in a fresh process -> rows
        |
    worker.py       the child: builds inputs, checks that both answers agree, times both, answers in JSON
        |           rivals.py: fastattn, torch, onnxruntime as calls;  ceilings.py: what the hardware can do
        |           timing.py: paired and interleaved;                 memory.py: peak memory of one call
    results.py      rows -> CSV and back, verdicts
        |
    table.py        the table on the terminal, and the README's table between its markers
    plot.py         the PNG

`python -m bench paired OLD_TREE` measures an older tree of fastattn against this one, by turns:

    paired.py           a process for each tree; their rounds -> ratios, the table
        |
    paired_worker.py    the child: the fastattn of its tree, a turn at a time

case.py says what is measured. case, timing, results, table, plot and machine know nothing of CPUs or GPUs.
"""
