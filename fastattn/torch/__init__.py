"""fastattn for PyTorch: the functions of fastattn, which torch differentiates, compiles, exports and casts.

    from fastattn.torch import attention
    out = attention(q, k, v, causal=True)                   # tensors that may require grad, (batch, seqlen, num_heads, head_dim)

    functions.py        attention and attention_varlen: fastattn's keywords
    autograd.py         the derivative, and how torch records it
    operators.py        the operators that torch's compiler knows, with the rules it asks for
    sdpa.py             torch's scaled_dot_product_attention: the function, and putting it in a model's place
    transformers.py     attn_implementation="fastattn" in Hugging Face's transformers

Importing this package imports torch; `import fastattn` does not. docs/torch.md is its guide.
"""
from .functions import attention, attention_varlen

__all__ = ["attention", "attention_varlen"]
