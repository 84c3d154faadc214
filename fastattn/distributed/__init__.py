"""Context parallelism: attention, forward and backward, of sequences whose rows lie on several ranks, over MPI, NCCL or threads.

    import fastattn.distributed as fd

    group = fd.group(MPI.COMM_WORLD)
    mine = [fd.shard(x, group) for x in (q, k, v)]              # each rank's rows
    out = fd.attention(*mine, group=group, seqlen=len, causal=True)

How a call flows, file by file:

    api.py, api_packed.py   signatures and documentation
    checks.py               what is checked before the first message; whether ranks agree
    spans.py                who owns which rows (sharding.py: the public functions about it)
    reach.py                which keys rows attend, and the calls that compute it
    plan.py                 the method, and why
    dense.py, packed.py     from arguments to a method and back; stages.py: groups of heads, and what Ulysses exchanges of them
    gather.py, ring.py, heads.py    the methods; run.py and shares.py are what they have in common, steps.py the order of "gather"
    packed_gather.py, packed_ring.py, packed_heads.py   those of packed sequences; packed_plan.py and packed_calls.py likewise
    saved.py                what a forward keeps for its backward
    memory.py, device.py    buffers in host and CUDA memory
    messages.py             what a group is; group.py makes one of a communicator, connect.py without MPI
    threads.py, mpi.py, nccl.py, process_group.py, sockets.py       transports
"""
from __future__ import annotations

from .api import attention, attention_backward
from .api_packed import attention_varlen, attention_varlen_backward
from .connect import connect
from .group import group
from .messages import Group, RankError
from .sharding import chunks, positions, shard, unshard
from .threads import threads

__all__ = ["Group", "RankError", "attention", "attention_backward", "attention_varlen", "attention_varlen_backward", "chunks", "connect",
           "group", "positions", "shard", "threads", "unshard"]
