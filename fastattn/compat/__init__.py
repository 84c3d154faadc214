"""Attention functions of other libraries, under their own names and signatures, over fastattn's public functions.

They translate arguments, call, and compute nothing themselves.

sdpa.py         torch.nn.functional.scaled_dot_product_attention
varlen.py       torch.nn.attention.varlen.varlen_attn
flash_attn.py   flash_attn_func and its kvpacked, qkvpacked and varlen forms
kvcache.py      flash_attn_with_kvcache, FlashAttention-2's and -3's; forward only
aten.py         PyTorch's ATen level: flash, memory-efficient and cuDNN operators, dropout mask, encoded softmax
multi_head.py   ATen's multi-head attention: native_multi_head_attention, transform_bias_rescale_qkv (transform.py)
vllm.py         vLLM's triton_attention and its MetaData: 8-bit operands, quantisation; forward only, as the original
vllm_flash.py   vLLM's flash_attn_varlen_func: packed queries over keys in pages; forward only

All others have a backward too. Shared: translate.py (names, options, lengths), arrays.py (the few array
operations), probabilities.py (the encoded softmax), float8.py (8-bit arrays and their scales).

Arrays are those that fastattn takes: NumPy, torch, CuPy, JAX, anything on the CPU with DLPack, CUDA arrays. Results are
of the caller's kind. Nothing is imported before it is used:
`from fastattn.compat.sdpa import scaled_dot_product_attention`. docs/parity.md lists every function.

Errors name the function and the argument as the called signature does.
"""
from __future__ import annotations
