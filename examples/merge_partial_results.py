"""
Merge partial results
=====================

Attention over many keys can be computed in parts: each part sees some of the keys, and the parts are merged exactly by
their log-sum-exps (lse). This is what ring attention does when the keys lie on several devices, what a server does when
requests share a prompt, and what out-of-core code does when keys do not fit into memory.

The example plays a ring of four ranks in one process, forward and backward, and compares it with one call.
"""
import numpy as np

from fastattn import attention, attention_backward, merge_states

ranks, rows, num_heads, head_dim = 4, 96, 4, 64
rng = np.random.default_rng(0)
q, k, v, dout = rng.standard_normal((4, 1, ranks * rows, num_heads, head_dim), np.float32)
mine = [np.s_[:, rank * rows:(rank + 1) * rows] for rank in range(ranks)]     # the rows that each rank holds

# %%
# Forward
# -------
#
# Under a causal mask rank r attends the keys of the ranks before it completely, its own keys causally, and later ones not at
# all. Each part returns (out, lse); ``merge_states`` weighs the parts by ``exp(lse)``.


def forward(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one rank, with the keys of one other rank at a time, as they would come round the ring."""
    parts = [attention(q[mine[rank]], k[mine[other]], v[mine[other]], causal=other == rank, return_lse=True)
             for other in range(rank + 1)]
    return merge_states(*zip(*parts, strict=True))


results = [forward(rank) for rank in range(ranks)]
out, lse = np.concatenate([out for out, _ in results], axis=1), np.concatenate([lse for _, lse in results], axis=2)
whole_out, whole_lse = attention(q, k, v, causal=True, return_lse=True)
print("out, largest difference:", abs(out - whole_out).max())
print("lse, largest difference:", abs(lse - whole_lse).max())

# %%
# Backward
# --------
#
# The backward knows the softmax through out and lse alone. Given those of *all* keys, a call over some of the keys returns exactly
# their dk and dv, and their share of dq. So the parts' dq are added, and nothing else has to be exchanged.

dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
for rank in range(ranks):
    saved = dout[mine[rank]], q[mine[rank]]
    for other in range(rank + 1):
        grads = attention_backward(*saved, k[mine[other]], v[mine[other]], *results[rank], causal=other == rank)
        dq[mine[rank]] += grads.dq
        dk[mine[other]] += grads.dk
        dv[mine[other]] += grads.dv

whole = attention_backward(dout, q, k, v, whole_out, whole_lse, causal=True)
for name, got, want in zip(("dq", "dk", "dv"), (dq, dk, dv), whole, strict=False):
    print(f"{name}, largest difference: {abs(got - want).max():.1e} of values up to {abs(want).max():.1f}")

# %%
# Sinks belong to one part only, because every part would add them to the sum. A bias, a mask or a window is cut like the keys.
# Dropout is addressed by the position inside a call, so the parts of a ring drop other elements than one call over everything does.
