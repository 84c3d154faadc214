"""PyTorch's ATen level, the operators below scaled_dot_product_attention, as functions on any array.

flash          (batch, seqlen, heads, head_dim) or packed (total, heads, head_dim); causal is bottom-right       aten_flash.py
efficient      the same layouts, an additive bias and a custom mask type                                         aten_efficient.py
cudnn          (batch, heads, seqlen, head_dim) or packed (total, heads, head_dim); causal is top-left           aten_cudnn.py
scaled_dot_product_{flash,efficient,cudnn}_attention: the same three for (batch, heads, seqlen, head_dim)

Each forward returns, beside out, what its backward needs: logsumexp (natural log, float32, (batch, heads, seqlen_q) or packed
(heads, total_q), never padded) and philox_seed and philox_offset. These two are Python integers: the host draws them, and nothing waits for
the device. They may be given by the keywords seed and offset. The debug mask is the encoded softmax, (batch, heads, seqlen_q, seqlen_k)
in query's dtype: probabilities, negative where dropped; it is made when asked for, with any dropout_p, O(seqlen_q * seqlen_k) memory.

Two differences from the originals are on purpose: out of a row that sees nothing is 0 and its logsumexp -inf, whichever operator it is;
and a batch above 65535 works with dropout too, because dropout is addressed by position. dropout_mask is what
_fill_mem_eff_dropout_mask_ is for: the mask itself, (batch, heads, seqlen_q, seqlen_k) bool, True = kept, where the original fills in the
random numbers to be compared with dropout_p.

Source: PyTorch 2.13, aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu, native_functions.yaml.
"""
from __future__ import annotations

from ..api import dropout_mask
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
