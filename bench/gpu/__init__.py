"""The GPU benchmark: `python -m bench gpu`. It needs torch with CUDA. Every rival is optional.

    cases.py     what is measured, and the bars
    run.py       the parent: starts children, writes each row as it comes, survives a case that crashes or hangs
        |
    worker.py    the child: for each case runs every implementation once, checks, then times all round robin -> rows
        |        rivals.py: fastattn, torch SDPA, varlen_attn, FlashAttention-4 as calls on the same tensors
        |        check.py:  float64 attention of some of the heads, and the error of each implementation
        |        device.py: CUDA events, clock, versions, what the card can do
    table.py     the short table on the terminal, the README's tables, the geometric mean
    plot.py      the PNG

`python -m bench workloads` measures problems of published models the same way: workloads.py has their list, and workloads_table.py their
table and picture.

Tensors are (batch, seqlen, num_heads, head_dim), packed (total, num_heads, head_dim). SDPA gets transposed views of
the same memory.
"""
