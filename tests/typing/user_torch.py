"""As user.py, with torch's tensors."""
from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

import fastattn.torch
from fastattn import Grads, attention, attention_backward, attention_varlen, merge_states


def tensors(q: Tensor, scale: Tensor) -> None:
    assert_type(attention(q, q, q, causal=True, softmax_scale=scale, stream=torch.cuda.current_stream()), Tensor)
    assert_type(attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(attention_varlen(q, q, q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(attention_backward(q, q, q, q, q, q), Grads[Tensor])
    assert_type(merge_states([q, q], [q, q]), tuple[Tensor, Tensor])


def with_gradients(q: Tensor, seed: Tensor, lse: bool) -> None:
    assert_type(fastattn.torch.attention(q, q, q, causal=True, dropout_p=0.1, seed=seed, deterministic=True), Tensor)
    assert_type(fastattn.torch.attention(q, q, q, return_lse=True), tuple[Tensor, Tensor])
    assert_type(fastattn.torch.attention(q, q, q, return_lse=lse), Tensor | tuple[Tensor, Tensor])
    assert_type(fastattn.torch.attention_varlen(q, q, q, q, q, max_seqlen_q=7, return_lse=True), tuple[Tensor, Tensor])
