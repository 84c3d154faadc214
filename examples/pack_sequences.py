"""
Pack sequences without padding
==============================

Sentences, documents and proteins have different lengths. A padded batch computes its longest length for each of them. A
packed batch puts them one after the other along one axis, and ``cu_seqlens`` says where each begins. Nothing is computed
for padding, forward or backward.
"""
import matplotlib.pyplot as plt
import numpy as np

from fastattn import attention, attention_backward, attention_varlen, attention_varlen_backward

rng = np.random.default_rng(0)
lengths = np.minimum(rng.lognormal(4.2, 0.8, 24).astype(int) + 4, 512)      # many short ones, a few long ones
num_heads, head_dim, longest = 4, 32, int(lengths.max())
cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)     # where each begins, and the end
total = int(cu_seqlens[-1])

_, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.bar(range(len(lengths)), lengths, color="#0072B2", label=f"rows of a packed batch: {total}")
axis.bar(range(len(lengths)), longest - lengths, bottom=lengths, color="#DDDDDD", hatch="///",
         edgecolor="#999999", label=f"padding: {len(lengths) * longest - total}")
axis.set(xlabel="sequence", ylabel="rows")
_ = axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)

# %%
# Packed
# ------
#
# Everything in a network but attention works row by row and needs no notion of a sequence. Attention keeps sequences apart.

q, k, v, dout = rng.standard_normal((4, total, num_heads, head_dim), np.float32)
out, lse = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True, return_lse=True)
grads = attention_varlen_backward(dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, causal=True)
print("out", out.shape, "lse", lse.shape, "dq", grads.dq.shape)

# %%
# Padded
# ------
#
# The same numbers from a padded batch. Its keys beyond the end of a sequence are hidden by a mask of shape (batch, 1, 1, seqlen).

real = np.arange(longest) < lengths[:, None]                                # (batch, seqlen)


def padded(x: np.ndarray) -> np.ndarray:
    """(total, num_heads, head_dim) to (batch, seqlen, num_heads, head_dim)."""
    wide = np.zeros((len(lengths), longest, *x.shape[1:]), x.dtype)
    wide[real] = x
    return wide


options = {"causal": "top_left", "mask": real[:, None, None, :]}
wide = [padded(x) for x in (q, k, v)]
wide_out, wide_lse = attention(*wide, return_lse=True, **options)
wide_grads = attention_backward(padded(dout), *wide, wide_out, wide_lse, **options)
print("largest difference of out:", abs(wide_out[real] - out).max())
print("largest difference of dk:", abs(wide_grads.dk[real] - grads.dk).max())
waste = 1 - (lengths ** 2).sum() / (len(lengths) * longest ** 2)
print(f"of the pairs of the padded batch, {waste:.0%} are padding")
