"""
Decode with a cache
===================

A language model writes one token at a time. The keys and values of earlier tokens do not change, so they are kept in a
cache, and each step computes those of one token only. This example writes with a cache in the two usual situations:
requests of one length, and requests of different lengths. It checks both against attention over the whole text.

fastattn reads arrays in place at any strides. So a cache is a plain array that you allocate once, and a call takes a
view of its filled part. Nothing is copied, neither by NumPy nor by fastattn.
"""
import numpy as np

from fastattn import attention, attention_varlen

rng = np.random.default_rng(0)
batch, num_heads, num_heads_k, head_dim = 3, 8, 2, 64      # four query heads share a key head
longest = 512                                              # room for so many keys in each request
q_all = rng.standard_normal((batch, longest, num_heads, head_dim), np.float32)
k_all, v_all = rng.standard_normal((2, batch, longest, num_heads_k, head_dim), np.float32)
whole = attention(q_all, k_all, v_all, causal=True)        # what the steps below must repeat

# %%
# Requests of one length
# ----------------------
#
# First the prompt: one causal call over 100 tokens. Then one token at a time. A single query row at the end of the keys attends
# all of them, so decoding needs no mask. With several new rows, say a prompt that comes in pieces or tokens that a smaller model
# proposed, pass ``causal=True``: the diagonal is aligned bottom-right, at the last row and the last key.

k_cache = np.empty((batch, longest, num_heads_k, head_dim), np.float32)
v_cache = np.empty_like(k_cache)


def step(length: int, new: int) -> np.ndarray:
    """Append the keys of `new` tokens behind `length` earlier ones, and attend all of them."""
    now = slice(length, length + new)
    k_cache[:, now], v_cache[:, now] = k_all[:, now], v_all[:, now]
    return attention(q_all[:, now], k_cache[:, :now.stop], v_cache[:, :now.stop], causal=True)


prompt = step(0, 100)
tokens = [step(length, 1) for length in range(100, 120)]
pieces = step(120, 7)
written = np.concatenate([prompt, *tokens, pieces], axis=1)
print("largest difference to one call over the whole text:", abs(written - whole[:, :127]).max())

# %%
# Requests of different lengths
# -----------------------------
#
# Requests of a server have different numbers of keys. ``attention_varlen`` takes the whole cache as one packed array: request n has
# the rows from ``n * longest`` on, and ``seqused_k[n]`` of them are filled. What lies behind them is never used, so the cache
# need not be cleared when a request ends and another one takes its place.

lengths = np.array([37, 411, 230], np.int32)               # filled keys of each request, the new one counted
k_cache[:], v_cache[:] = np.nan, np.nan                    # to show that the rest does not matter
for n, length in enumerate(lengths):
    k_cache[n, :length], v_cache[n, :length] = k_all[n, :length], v_all[n, :length]

q = np.stack([q_all[n, length - 1] for n, length in enumerate(lengths)])      # (requests, num_heads, head_dim)
rows_q = np.arange(batch + 1, dtype=np.int32)                                 # one query row a request
rows_k = np.arange(batch + 1, dtype=np.int32) * longest
packed_k, packed_v = (x.reshape(-1, num_heads_k, head_dim) for x in (k_cache, v_cache))      # views
out = attention_varlen(q, packed_k, packed_v, rows_q, rows_k, seqused_k=lengths)
expected = np.stack([whole[n, length - 1] for n, length in enumerate(lengths)])
print("largest difference:", abs(out - expected).max())

# %%
# On a GPU
# --------
#
# The same calls take CuPy arrays or CUDA tensors. Dense calls with head_dim 64 or 128 and up to 16 query rows for each key head
# are decoded by kernels that divide the keys over thread blocks. ``seqused_k`` may lie in device memory, and the host never reads
# it. Paged caches are not supported yet: gather the pages first.
