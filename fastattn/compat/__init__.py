"""Other libraries' attention signatures over fastattn's public functions: they translate arguments and call, and compute nothing.

sdpa.py         torch.nn.functional.scaled_dot_product_attention, and its backward
varlen.py       torch.nn.attention.varlen.varlen_attn, and its backward
flash_attn.py   flash_attn_func and its packed and varlen relatives, and their backwards
aten.py         PyTorch's ATen level: flash, memory-efficient and cuDNN forward and backward, dropout mask, encoded softmax
multi_head.py   ... and above it: transform_bias_rescale_qkv (transform.py) and native_multi_head_attention, with their backwards
vllm.py         vLLM's triton_attention and its MetaData: 8-bit operands, 8-bit keys and values, quantisation; forward, as the original

translate.py holds what they share, arrays.py the few array operations, probabilities.py the encoded softmax, float8.py 8-bit
arrays and their scales. Arrays are what
fastattn takes: NumPy, torch, CuPy, JAX, anything on the CPU with DLPack, CUDA arrays; results are of the caller's kind. Nothing
is imported before it is asked for: `from fastattn.compat.sdpa import scaled_dot_product_attention`. docs/parity.md says what lives where.

Errors quote the function and the argument by the names of the signature that was called.
"""
from __future__ import annotations
