"""
See the masks
=============

Which keys does a query attend? The pictures show P, the softmax's weights, of small calls: a row is a query, a column is
a key, dark is a large weight. P comes out of ``attention`` itself: with the identity as v, out is P.
"""
import matplotlib.pyplot as plt
import numpy as np

from fastattn import attention


def weights(seqlen_q: int, seqlen_k: int, **options: object) -> np.ndarray:
    """P of a call whose scores are all equal before biases and masks."""
    q = np.zeros((1, seqlen_q, 1, 8), np.float32)
    k = np.zeros((1, seqlen_k, 1, 8), np.float32)
    v = np.eye(seqlen_k, dtype=np.float32)[None, :, None, :]
    return attention(q, k, v, **options)[0, :, 0]


def show(**panels: np.ndarray) -> None:
    """Pictures next to each other, each row scaled by its largest weight."""
    _, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3), layout="constrained")
    for axis, (title, P) in zip(axes, panels.items(), strict=True):
        axis.imshow(P / np.maximum(P.max(axis=1, keepdims=True), 1e-9), cmap="Blues", vmin=0, vmax=1)
        axis.set(title=title.replace("_", " "), xlabel="key", ylabel="query", xticks=[], yticks=[])


# %%
# Causal masks
# ------------
#
# With as many queries as keys both alignments are the same. With fewer queries, as in decoding, ``causal=True`` aligns the last
# query with the last key. ``causal="top_left"``, torch's rule, aligns the first with the first.

show(square=weights(12, 12, causal=True),
     bottom_right=weights(5, 12, causal=True),
     top_left=weights(5, 12, causal="top_left"))

# %%
# Windows
# -------
#
# ``window=(left, right)`` counts keys from the diagonal, inclusive. None is no limit. A window and causal go together.

show(window_3_1=weights(12, 12, window=(3, 1)),
     window_3_None=weights(12, 12, window=(3, None)),
     causal_and_window_3=weights(12, 12, causal=True, window=(3, None)))

# %%
# Masks and biases of your own
# ----------------------------
#
# A boolean mask is True where a query may attend a key. A padding mask of shape (batch, seqlen_k) is passed as
# ``mask[:, None, None, :]``. A bias is added to the scores, and ALiBi is a bias that grows with the distance from the diagonal.

real = np.arange(12) < 8
documents = np.repeat([0, 1, 2], [3, 5, 4])
show(padding=weights(12, 12, mask=real[None, None, None, :]),
     documents=weights(12, 12, mask=documents[:, None] == documents[None, :], causal=True),
     ALiBi=weights(12, 12, alibi_slopes=[0.3], causal=True))

# %%
# Dropout
# -------
#
# Whether a weight is dropped depends on seed, offset and its position alone. So the same call repeats its mask, on every engine,
# and another offset gives another mask.

show(seed_1=weights(12, 12, dropout_p=0.3, seed=1),
     seed_1_again=weights(12, 12, dropout_p=0.3, seed=1),
     offset_1=weights(12, 12, dropout_p=0.3, seed=1, offset=1))
plt.show()
