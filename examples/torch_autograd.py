"""Training with fastattn.torch: a tiny layer whose attention has a learned bias, sinks, dropout, and a loss on lse.

    python torch_autograd.py                  # compares gradients with torch's own attention, then trains
    python torch_autograd.py --compile        # the layer under torch.compile, as one graph
    python torch_autograd.py --device cuda    # the same code: results come on the tensors' device and torch's stream

The layer learns to name the token three positions before. It knows positions only by a learned bias for each
distance, so it can learn this only if the bias gets its gradient. Each head has a learned sink. The loss also
penalises lse, the second result of attention, which has a gradient too. Dropout needs no seed: each step draws one
from torch's generator, compiled or not.
"""
from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastattn.torch import attention


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What `attention` with causal=True and return_lse=True should return, by torch alone.

    A sink is one more key, whose score is the sink and whose value is 0.
    """
    batch, seqlen, heads_k, dim = k.shape
    zero = k.new_zeros(batch, 1, heads_k, dim)
    future = torch.ones(seqlen, seqlen, dtype=torch.bool, device=k.device).triu(1)
    bias = torch.cat((bias.masked_fill(future, -torch.inf), sinks[:, None, None].expand(-1, seqlen, 1)), dim=2)
    q, k, v = q.transpose(1, 2), torch.cat((k, zero), dim=1).transpose(1, 2), torch.cat((v, zero), dim=1).transpose(1, 2)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    scores = q @ k.repeat_interleave(q.shape[1] // heads_k, dim=1).transpose(2, 3) * dim**-0.5 + bias
    return out.transpose(1, 2), scores.logsumexp(dim=3)


class Layer(nn.Module):
    """Tokens (batch, seqlen) -> logits (batch, seqlen, vocab) and lse (batch, heads, seqlen).

    One attention, two query heads per key head.
    """

    def __init__(self, vocab: int = 16, seqlen: int = 32, heads: int = 4, dim: int = 16, dropout_p: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dim, self.dropout_p = heads, dim, dropout_p
        self.embed, self.head = nn.Embedding(vocab, heads * dim), nn.Linear(heads * dim, vocab)
        self.qkv = nn.Linear(heads * dim, 2 * heads * dim, bias=False)        # q has as many heads as k and v together
        self.near, self.sinks = nn.Parameter(torch.zeros(heads, seqlen)), nn.Parameter(torch.zeros(heads))

    def forward(self, tokens: Tensor, own: bool = False) -> tuple[Tensor, Tensor]:
        """`own`: with torch's attention, and without dropout."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        bias = self.near[:, (positions[:, None] - positions).clamp(min=0)]    # (heads, seqlen, seqlen), shared by the batch
        qkv = self.qkv(self.embed(tokens)).unflatten(2, (-1, self.dim))
        q, k, v = qkv.split((self.heads, self.heads // 2, self.heads // 2), dim=2)
        if own:
            out, lse = sdpa(q, k, v, bias=bias, sinks=self.sinks)
        else:
            out, lse = attention(q, k, v, bias=bias, sinks=self.sinks, causal=True, return_lse=True,
                                 dropout_p=self.dropout_p if self.training else 0.0)
        return self.head(out.flatten(2)), lse


BACK = 3                                                     # each position is to name the token so many positions before


def loss_of(layer: Callable[..., tuple[Tensor, Tensor]], tokens: Tensor, **keywords: Any) -> Tensor:
    """Mean loss in nats of naming the token BACK positions before, plus a small penalty on lse."""
    logits, lse = layer(tokens, **keywords)
    loss = functional.cross_entropy(logits[:, BACK:].flatten(0, 1), tokens[:, :-BACK].flatten())
    return loss + 1e-3 * lse.square().mean()


def compare(device: str = "cpu", seed: int = 0) -> dict[str, float]:
    """Largest error of each parameter's gradient against torch's attention in float64, relative to the largest gradient."""
    torch.manual_seed(seed)
    layer = Layer().to(device).eval()
    with torch.no_grad():
        layer.near.normal_()
        layer.sinks.normal_()
    exact = copy.deepcopy(layer).double()
    tokens = torch.randint(16, (2, 32)).to(device)
    loss_of(layer, tokens).backward()
    loss_of(exact, tokens, own=True).backward()
    got, want = ({name: x.grad.double() for name, x in m.named_parameters() if x.grad is not None} for m in (layer, exact))
    return {name: float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want}


def train(device: str = "cpu", steps: int = 150, seed: int = 0, compiled: bool = False) -> list[float]:
    """The loss of each step. Chance is ln 16 = 2.77."""
    torch.manual_seed(seed)
    layer, losses = Layer().to(device), []
    if compiled:
        layer.compile(fullgraph=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(steps):
        loss = loss_of(layer, torch.randint(16, (16, 32)).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Training with fastattn.torch.")
    parser.add_argument("--device", default="cpu", help="of torch: cpu, cuda, cuda:1, ...")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--compile", action="store_true", help="train under torch.compile")
    args = parser.parse_args()
    for name, error in compare(args.device).items():
        print(f"gradient of {name:12} is {error:.1e} from torch's in float64")
    losses = train(args.device, args.steps, compiled=args.compile)
    for step in range(0, len(losses), 25):
        print(f"step {step:4}  loss {losses[step]:.3f}")
    print(f"step {len(losses) - 1:4}  loss {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
