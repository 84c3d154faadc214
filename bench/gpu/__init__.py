"""The GPU benchmark: `python -m bench gpu`. It needs torch with CUDA; every rival is optional.

    cases.py     what is measured, and the bars
    run.py       the parent: starts the child, writes each row as it comes, goes on past a case that crashes or hangs
        |
    worker.py    the child: for each case runs everybody once, checks, then times all in turns -> rows
        |        rivals.py: fastattn, torch SDPA, varlen_attn, FlashAttention-4 as calls on the same tensors
        |        check.py:  float64 attention on a part of the heads, and everybody's error against it
        |        device.py: CUDA events, clock, versions, what the card itself can do
    table.py     the short table on the terminal, the README's tables, the geometric mean
    plot.py      the PNG

Tensors are (batch, seqlen, num_heads, head_dim), packed (total, num_heads, head_dim); SDPA gets transposed views of the same memory.
"""
