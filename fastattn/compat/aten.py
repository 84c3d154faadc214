"""PyTorch's ATen level, the operators below scaled_dot_product_attention, as functions on any array.

flash (aten_flash.py)
    (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim); causal is bottom-right
efficient (aten_efficient.py)
    the same layouts, with an additive bias and a custom mask type
cudnn (aten_cudnn.py)
    (batch, heads, seqlen, head_dim), or packed (total, heads, head_dim); causal is top-left
scaled_dot_product_{flash,efficient,cudnn}_attention
    the same three for (batch, heads, seqlen, head_dim)

Besides out, each forward returns what its backward needs:

logsumexp
    natural log, float32, (batch, heads, seqlen_q) or packed (heads, total_q), never padded
philox_seed, philox_offset
    Python integers. The host draws them, so nothing waits for a device. The keywords seed and offset set them.
debug mask, if requested
    the encoded softmax, (batch, heads, seqlen_q, seqlen_k), query's dtype: probabilities, negative where dropped. It
    works with any dropout_p and takes O(seqlen_q * seqlen_k) memory.

What differs from the originals:

- A row that attends nothing has out 0 and logsumexp -inf, in every operator.
- A batch above 65535 works with dropout too, because dropout is addressed by position.
- dropout_mask stands for _fill_mem_eff_dropout_mask_. It returns the mask itself, (batch, heads, seqlen_q, seqlen_k)
  bool, True = kept. The original returns random numbers that are to be compared with dropout_p.

Source: PyTorch 2.13, aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu,
native_functions.yaml.
"""
from __future__ import annotations

from ..dropout import dropout_mask
from .aten_cudnn import (
    cudnn_attention_backward,
    cudnn_attention_forward,
    scaled_dot_product_cudnn_attention,
    scaled_dot_product_cudnn_attention_backward,
)
from .aten_efficient import (
    CustomMaskType,
    efficient_attention_backward,
    efficient_attention_forward,
    scaled_dot_product_efficient_attention,
    scaled_dot_product_efficient_attention_backward,
)
from .aten_flash import (
    flash_attention_backward,
    flash_attention_forward,
    scaled_dot_product_flash_attention,
    scaled_dot_product_flash_attention_backward,
)
from .probabilities import encoded_softmax

__all__ = ["CustomMaskType", "cudnn_attention_backward", "cudnn_attention_forward", "dropout_mask", "efficient_attention_backward",
           "efficient_attention_forward", "encoded_softmax", "flash_attention_backward", "flash_attention_forward",
           "scaled_dot_product_cudnn_attention", "scaled_dot_product_cudnn_attention_backward", "scaled_dot_product_efficient_attention",
           "scaled_dot_product_efficient_attention_backward", "scaled_dot_product_flash_attention",
           "scaled_dot_product_flash_attention_backward"]
