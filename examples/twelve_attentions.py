"""
Twelve kinds of attention
=========================

``score_mod`` changes the score of a pair, ``mask_mod`` says whether a row attends a key. Both are plain Python functions of the place:
batch entry, query head, row and key. Here are twelve that models use, each with the picture of its weights: a row is a query, a column
is a key, dark is a large weight.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from fastattn import attention, block_mask

SEQLEN, HEADS, SIDE = 64, 2, 8                      # SIDE x SIDE: the tokens as an image
draw = np.random.default_rng(0)


class Kind(NamedTuple):
    """The functions of one kind of attention, and the arrays that score_mod gets."""

    mask_mod: Callable[..., Any] | None = None
    score_mod: Callable[..., Any] | None = None
    captured: tuple[Any, ...] = ()


def weights(kind: Kind, size: float = 0.0) -> np.ndarray:
    """P of the last head; with the identity as v, out is P. `size` is that of the scores before score_mod."""
    q, k = (draw.standard_normal((1, SEQLEN, HEADS, 16), np.float32) * size for _ in "qk")
    v = np.tile(np.eye(SEQLEN, dtype=np.float32)[None, :, None, :], (1, 1, HEADS, 1))
    return attention(q, k, v, **kind._asdict())[0, :, -1]


def show(**kinds: np.ndarray) -> None:
    """Pictures next to each other, each row scaled by its largest weight."""
    _, axes = plt.subplots(1, len(kinds), figsize=(3 * len(kinds), 3), layout="constrained")
    for axis, (title, P) in zip(axes, kinds.items(), strict=True):
        axis.imshow(P / np.maximum(P.max(axis=1, keepdims=True), 1e-9), cmap="Blues", vmin=0, vmax=1)
        axis.set(title=title.replace("_", " "), xlabel="key", ylabel="query", xticks=[], yticks=[])


# %%
# Masks of distance
# -----------------
#
# Causal, a sliding window, and a dilated window, whose step grows with the head: every second key for head 1.

WINDOW = 16
causal = Kind(lambda b, h, q, k: q >= k)
sliding = Kind(lambda b, h, q, k: (q >= k) & (q - k < WINDOW))
dilated = Kind(lambda b, h, q, k: (q >= k) & ((q - k) % (h + 1) == 0) & (q - k < 2 * WINDOW))
show(causal=weights(causal), sliding=weights(sliding), dilated=weights(dilated))

# %%
# Masks that read arrays
# ----------------------
#
# Documents: a token attends its own document, whose number stands in an array that the function closes over. Prefix-LM: the prompt, of
# another length in each batch entry, attends itself both ways. A tree of guesses, for speculative decoding: a token attends its
# ancestors; here node n has the children 2 n + 1 and 2 n + 2.

document_of = np.repeat(np.arange(4, dtype=np.int32), [20, 9, 25, 10])
prompt = np.array([24], np.int32)
parents = np.maximum((np.arange(SEQLEN) - 1) // 2, 0)
ancestor = np.eye(SEQLEN, dtype=bool)
for node in range(1, SEQLEN):
    ancestor[node] |= ancestor[parents[node]]
document = Kind(lambda b, h, q, k: (document_of[q] == document_of[k]) & (q >= k))
prefix = Kind(lambda b, h, q, k: (q >= k) | (k < prompt[b]))
tree = Kind(lambda b, h, q, k: ancestor[q, k])
show(document=weights(document), prefix_LM=weights(prefix), tree=weights(tree))

# %%
# Images
# ------
#
# The 64 tokens are an image of 8 x 8. Neighbourhood attention (NATTEN): a pixel attends 5 x 5 pixels around it. Swin: a learned bias
# for each offset of two pixels of a window.

offsets = draw.standard_normal((HEADS, 2 * SIDE - 1, 2 * SIDE - 1)).astype(np.float32)
natten = Kind(lambda b, h, q, k: (abs(q // SIDE - k // SIDE) <= 2) & (abs(q % SIDE - k % SIDE) <= 2))


def swin_bias(score, b, h, q, k, table):
    return score + table[h, q // SIDE - k // SIDE + SIDE - 1, q % SIDE - k % SIDE + SIDE - 1]


swin = Kind(None, swin_bias, (offsets,))
show(NATTEN=weights(natten), Swin=weights(swin))

# %%
# Scores
# ------
#
# ALiBi with learned slopes. T5's relative bias: a learned number for each bucket of distances, the buckets wider the farther. Both have
# gradients: ``attention_backward(..., need_dcaptured=True)``, or torch's own through ``fastattn.torch``. A softcap flattens
# scores that stand out: left the weights without it.

slopes = np.array([0.5, 0.125], np.float32)
distance = np.arange(SEQLEN)
buckets = np.where(distance < 8, distance, np.minimum(8 + np.log2(np.maximum(distance, 8) / 8) * 2.67, 15)).astype(np.int32)
relative = draw.standard_normal((HEADS, 16)).astype(np.float32)
alibi = Kind(causal.mask_mod, lambda score, b, h, q, k, slope: score - slope[h] * abs(q - k), (slopes,))
t5 = Kind(causal.mask_mod, lambda score, b, h, q, k, table: score + table[h, buckets[q - k]], (relative,))
softcap = Kind(None, lambda score, b, h, q, k: 2 * np.tanh(score / 2))
show(ALiBi=weights(alibi), T5=weights(t5))
show(no_softcap=weights(Kind(), 1.5), softcap_2=weights(softcap, 1.5))

# %%
# Layers that differ
# ------------------
#
# Gemma: five layers with a window, then one without. The number of the layer is a number of the function: it may change from call to
# call, and nothing is compiled again.


def gemma(layer: int) -> Kind:
    return Kind(lambda b, h, q, k: (q >= k) & ((q - k < WINDOW) | (layer % 6 == 5)), lambda score, b, h, q, k: 50 * np.tanh(score / 50))


show(local_layer=weights(gemma(0)), global_layer=weights(gemma(5)))

# %%
# What is skipped
# ---------------
#
# ``block_mask`` keeps a mask for many calls. Its picture says which blocks a call skips (·), which it computes with the mask (▒), and
# which without (█).

print(block_mask(document.mask_mod, None, None, SEQLEN, SEQLEN, block=4))

KINDS = {"causal": causal, "sliding": sliding, "dilated": dilated, "document": document, "prefix": prefix, "tree": tree, "natten": natten,
         "swin": swin, "alibi": alibi, "t5": t5, "softcap": softcap, "gemma": gemma(0)}
plt.show()
