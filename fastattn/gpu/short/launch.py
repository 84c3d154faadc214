"""The launch of the backward of short sequences. Without Numba: see runtime/compile.py."""
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ..rows.launch import dbias_sums, row_strides, sums_dbias
from ..rows.mask_words import mask_words
from ..runtime.compile import late
from ..runtime.launcher import PROGRAMS, Launcher, Program, program
from ..spec import Arguments, BackwardCall, Spec, unfit, whole_chunks
from .config import BLOCK_M, BLOCK_N, MOST_DIM, MOST_ROWS, WARPS, ShortConfig, choose_backward

make_backward = late("short.backward", "make_backward")
BACKWARD = ("lse_in:l lse_batch:q lse_head:q lse_row:q dlse:l dlse_batch:q dlse_head:q dlse_row:q entries:i grad_scale:f "
            "sums:l sums_batch:q sums_head:q sums_row:i")


def accepts(call: BackwardCall) -> bool:
    """Whether one kernel is the whole backward: all keys are one tile. dsinks, and a dbias that is not of every score, need more."""
    p, g = call.problem, call.grads
    short = 0 < p.seqlen_k <= BLOCK_N and 0 < p.seqlen_q <= MOST_ROWS and max(p.head_dim, p.head_dim_v) <= MOST_DIM
    sums = g.dbias is None or (sums_dbias(call) and not call.deterministic)
    contiguous = all(x.strides[-1] == x.itemsize or x.shape[-1] == 1 for x in (g.dq, g.dk, g.dv))
    halves = p.dtype != "float32" and not p.float32_out
    plain = not p.packed and p.flex is None and g.dsinks is None
    return short and sums and contiguous and halves and plain and unfit(p, MOST_DIM) is None


@lru_cache(maxsize=PROGRAMS)
def backward_program(spec: Spec, config: ShortConfig) -> Program:
    return program(f"backward_short {spec.text} | {config.text}", lambda: make_backward(spec, config),
                   Arguments(spec, BACKWARD, ("q", "k", "v", "dout", "out", "dq", "dk", "dv")), 32 * WARPS, config.blocks_per_sm)


def backward(call: BackwardCall, spec: Spec, launcher: Launcher, stream: int) -> None:
    """Enqueue the kernel of all gradients. Before it, the words of a mask; dbias is rounded from sums."""
    p, o, g = call.problem, call.operands, call.grads
    keep_bias = o.bias is not None and o.bias.strides[0] == 0 and not p.score.mask and p.group == 1 and p.seqlen_q <= BLOCK_M
    spec = replace(spec, sinks=None, dbias=None if g.dbias is None else "float32", deterministic=False, bias_pairs=False, bias_whole=False)
    config = choose_backward(spec, keep_bias, call.dlse is not None, all(whole_chunks(x) for x in (o.q, o.k, o.v, call.dout, call.out)),
                             all(whole_chunks(x) for x in (g.dq, g.dk, g.dv)))
    # a block goes through several batch entries with one bias: as few blocks as fill every multiprocessor once
    parts = max(1, launcher.device.num_sms * config.blocks_per_sm // p.num_heads_k) if keep_bias else p.batch
    entries = -(-p.batch // parts)
    with dbias_sums(g.dbias, launcher, stream) as sums, mask_words(call, BLOCK_M, launcher, stream, True) as words:
        own = (*row_strides(call.lse, False), *row_strides(call.dlse, False), entries, p.score.softmax_scale, *sums)
        backward_program(spec, config).launch(launcher, p.num_heads_k * -(-p.batch // entries), words, own, stream)
