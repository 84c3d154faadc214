"""fastattn.jax in training: one jitted step over two layers, on the CPU or a GPU.

    python train_jax.py                     # compares gradients with jax.nn's attention, then trains for 200 steps
    python train_jax.py --attention jax     # the same training with jax.nn.dot_product_attention: the losses agree

The model learns to name the token three positions before. It knows positions only by a learned bias for each distance,
so it can learn this only if the bias gets its gradient. Each head has a learned sink. The layers run in a scan, and each
is checkpointed: nothing of size seqlen x seqlen is stored.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastattn.jax import attention

VOCABULARY, BATCH, SEQLEN, HEADS, HEAD_DIM, LAYERS, BACK = 16, 16, 48, 4, 16, 2, 3
WIDTH = HEADS * HEAD_DIM
Params = dict[str, Any]
Attend = Callable[[Any, Any, Any, Any, Any], Any]       # q, k, v, bias, sinks -> out


# ---------------------------------------------------------------- the two attentions
def fastattns(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
    return attention(q, k, v, bias=bias, sinks=sinks, causal=True)


def jaxs(q: Any, k: Any, v: Any, bias: Any, sinks: Any) -> Any:
    """The same by JAX alone. A sink is one more key, whose score is the sink and whose value is 0."""
    batch, seqlen, heads, dim = q.shape
    zero = jnp.zeros((batch, 1, heads, dim), k.dtype)
    scores = jnp.where(jnp.tri(seqlen, dtype=bool), bias, -jnp.inf)
    scores = jnp.concatenate((scores, jnp.broadcast_to(sinks[:, None, None], (heads, seqlen, 1))), axis=2)
    return jax.nn.dot_product_attention(q, jnp.concatenate((k, zero), axis=1), jnp.concatenate((v, zero), axis=1), scores[None])


# ---------------------------------------------------------------- the model
def initial(seed: int) -> Params:
    draw = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> Any:
        return jnp.asarray(scale * draw.standard_normal(shape), jnp.float32)
    return {"embedding": normal(VOCABULARY, WIDTH, scale=1.0), "head": normal(WIDTH, VOCABULARY, scale=WIDTH**-0.5),
            "layers": {"qkv": normal(LAYERS, WIDTH, 3, HEADS, HEAD_DIM, scale=WIDTH**-0.5),
                       "out": normal(LAYERS, HEADS, HEAD_DIM, WIDTH, scale=WIDTH**-0.5),
                       "bias": jnp.zeros((LAYERS, HEADS, SEQLEN)), "sinks": jnp.zeros((LAYERS, HEADS))}}


def loss_of(attend: Attend, params: Params, tokens: Any) -> Any:
    """Mean cross entropy of the token BACK positions before, wherever there is one."""
    distance = jnp.maximum(jnp.arange(SEQLEN)[:, None] - jnp.arange(SEQLEN), 0)

    def layer(x: Any, weights: Params) -> tuple[Any, None]:
        q, k, v = jnp.einsum("bsw,wchd->cbshd", x, weights["qkv"])
        y = attend(q, k, v, weights["bias"][:, distance], weights["sinks"])
        return x + jnp.einsum("bshd,hdw->bsw", y, weights["out"]), None
    x, _ = jax.lax.scan(jax.checkpoint(layer), params["embedding"][tokens], params["layers"])
    logits = jax.nn.log_softmax(x @ params["head"])[:, BACK:]
    return -jnp.take_along_axis(logits, tokens[:, :-BACK, None], axis=2).mean()


@partial(jax.jit, static_argnums=0)
def step(attend: Attend, params: Params, moments: Any, tokens: Any, number: Any) -> Any:
    """One step of Adam."""
    loss, grads = jax.value_and_grad(partial(loss_of, attend))(params, tokens)
    first, second = moments
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, second, grads)
    rate = 0.01 * jnp.sqrt(1 - 0.99**number) / (1 - 0.9**number)
    params = jax.tree.map(lambda p, m, s: p - rate * m / (jnp.sqrt(s) + 1e-8), params, first, second)
    return params, (first, second), loss


def train(attend: Attend, steps: int, seed: int = 0) -> list[float]:
    """The loss of each step."""
    params, draw, losses = initial(seed), np.random.default_rng(seed + 1), []
    moments = jax.tree.map(jnp.zeros_like, (params, params))
    for number in range(1, steps + 1):
        tokens = draw.integers(0, VOCABULARY, (BATCH, SEQLEN))
        params, moments, loss = step(attend, params, moments, tokens, number)
        losses.append(float(loss))
    return losses


def gradient_error() -> float:
    """The largest difference between the gradients of the two attentions, relative to the largest gradient of its kind."""
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (BATCH, SEQLEN))
    ours, own = (jax.jit(jax.grad(partial(loss_of, attend)))(initial(0), tokens) for attend in (fastattns, jaxs))
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(own), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=("fastattn", "jax"), default="fastattn")
    parser.add_argument("--steps", type=int, default=200)
    chosen = parser.parse_args()
    print(f"gradients: {gradient_error():.1e} from those of jax.nn.dot_product_attention")
    losses = train(fastattns if chosen.attention == "fastattn" else jaxs, chosen.steps)
    for number in sorted({*range(0, chosen.steps, 25), chosen.steps - 1}):
        print(f"step {number:4}  loss {losses[number]:.4f}")


if __name__ == "__main__":
    main()
