"""
Train a language model in NumPy
===============================

A small character-level language model, trained with a hand-written backward pass on NumPy or CuPy arrays. ::

    python train_char_gpt.py --seconds 120                   # trains; writes char_gpt/weights.safetensors and loss.png
    python train_char_gpt.py --seconds 120 --device cuda     # the same on a GPU, on CuPy arrays
    python train_char_gpt.py --generate 500 --prompt "The "  # writes text with the saved weights

The text is Python's own: the topics of ``help()``. The network is a GPT (Radford et al. 2019) without biases. Positions
come from ALiBi alone (Press et al. 2022), so one network reads any length, and generates with a sliding window of keys.

Each ``f`` is followed by its ``f_backward``. ``forward`` pushes what the backward needs on a stack, and ``backward`` pops it
in reverse order: read the two next to each other. Array code says ``xp``, which is NumPy, or CuPy with ``--device cuda``.
Text, random numbers and files are NumPy's; ``xp.asarray`` converts them.
"""
from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from fastattn import attention, attention_backward

xp: Any = np                    # the library of the arrays; see `use`
Array = Any                     # of the library that xp names
Weights = dict[str, Array]
Numbers = np.ndarray[Any, Any]
History = list[tuple[int, float, float | None]]      # step, training loss, validation loss now and then


@dataclass(frozen=True)
class Config:
    vocab: int
    context: int = 256          # length of a training sequence, and how many characters back attention reaches
    layers: int = 4
    heads: int = 4
    width: int = 128

    def looks(self, dtype: Any) -> dict[str, Any]:
        """Positions for attention: a window of `context` characters, and ALiBi with slopes from steep to almost flat."""
        slopes = 2.0 ** (xp.arange(1, self.heads + 1, dtype=dtype) * (-8 / self.heads))      # (heads,), on the device of q
        return {"window": (self.context - 1, 0), "alibi_slopes": slopes}


def use(device: str) -> None:
    """From now on new arrays are NumPy's ("cpu") or CuPy's ("cuda")."""
    global xp
    xp = importlib.import_module("cupy") if device == "cuda" else np


# ---------------------------------------------------------------- text
def load_text() -> str:
    """The paragraphs of the `help()` topics, each once, because topics repeat each other and validation text must be unseen."""
    from pydoc_data.topics import topics

    paragraphs = [paragraph.strip("\n") for text in topics.values() for paragraph in text.split("\n\n")]
    return "\n\n".join({" ".join(paragraph.split()): paragraph for paragraph in paragraphs}.values())


def to_numbers(text: str, chars: str) -> Numbers:
    """The index of each character in chars, int64. An unknown character becomes index 0."""
    place = {char: n for n, char in enumerate(chars)}
    return np.array([place.get(char, 0) for char in text])


def baselines(train: Numbers, valid: Numbers, vocab: int) -> tuple[float, float]:
    """Validation loss in nats of the unigram and the bigram model counted on train, with one added to each count."""
    one = np.bincount(train, minlength=vocab) + 1.0
    two = np.bincount(train[:-1] * vocab + train[1:], minlength=vocab * vocab).reshape(vocab, vocab) + 1.0
    unigram = -np.log(one / one.sum())[valid[1:]].mean()
    bigram = -np.log(two / two.sum(axis=1, keepdims=True))[valid[:-1], valid[1:]].mean()
    return float(unigram), float(bigram)


# ---------------------------------------------------------------- layers: x, y, dx, dy are (tokens, width)
def layer_norm(x: Array) -> tuple[Array, Array]:
    """(x - mean) / deviation over the last axis, and 1 / deviation (tokens, 1). The next matrix does the scaling."""
    x = x - xp.mean(x, axis=1, keepdims=True)
    scale = 1 / xp.sqrt(xp.mean(x * x, axis=1, keepdims=True) + 1e-5)
    return x * scale, scale


def layer_norm_backward(dy: Array, y: Array, scale: Array) -> Array:
    return scale * (dy - xp.mean(dy, axis=1, keepdims=True) - y * xp.mean(dy * y, axis=1, keepdims=True))


def gelu(x: Array) -> tuple[Array, Array]:
    """x * sigmoid(1.702 * x), GELU's quick form, and the sigmoid."""
    gate = 1 / (1 + xp.exp(-1.702 * x))
    return x * gate, gate


def gelu_backward(dy: Array, y: Array, gate: Array) -> Array:
    return dy * (gate + 1.702 * y * (1 - gate))


def cross_entropy(logits: Array, targets: Array) -> tuple[float, Array]:
    """Mean loss in nats of (tokens, vocab) logits for (tokens,) targets, and its gradient."""
    rows = xp.arange(len(targets))
    p = xp.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -xp.mean(xp.log(p[rows, targets]))
    p[rows, targets] -= 1
    return float(loss), p / len(targets)


# ---------------------------------------------------------------- the network
def init(config: Config, rng: np.random.Generator, dtype: str = "float32") -> Weights:
    """Random weights, (in, out) each; the two that add to the residual stream start smaller, as in GPT-2."""
    d, small = config.width, (2 * config.layers) ** -0.5
    shapes = {"embed": (config.vocab, d, 1.0), "head": (d, config.vocab, 0.02)}
    for n in range(config.layers):
        shapes |= {f"{n}.qkv": (d, 3 * d, d**-0.5), f"{n}.project": (d, d, small * d**-0.5),
                   f"{n}.up": (d, 4 * d, d**-0.5), f"{n}.down": (4 * d, d, small * (4 * d) ** -0.5)}
    return {name: xp.asarray(rng.normal(0, std, shape), dtype=dtype) for name, (*shape, std) in shapes.items()}


class Cache:
    """Keys and values of all characters so far, for each layer: (layers, 1, capacity, heads, head_dim)."""

    def __init__(self, config: Config, capacity: int):
        shape = (config.layers, 1, capacity, config.heads, config.width // config.heads)
        self.k, self.v, self.length = xp.zeros(shape, "float32"), xp.zeros(shape, "float32"), 0

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k and v (1, new, heads, head_dim). Returns views of all keys and values."""
        end = self.length + k.shape[1]
        self.k[layer, :, self.length:end], self.v[layer, :, self.length:end] = k, v
        return self.k[layer, :, :end], self.v[layer, :, :end]


def forward(w: Weights, config: Config, tokens: Array, cache: Cache | None = None) -> tuple[Array, list[Any]]:
    """tokens (batch, seqlen) -> logits (batch * seqlen, vocab) of the next character, and the stack for backward."""
    batch, seqlen = tokens.shape
    tokens, saved = tokens.reshape(-1), []
    x = w["embed"][tokens]
    looks = config.looks(x.dtype)
    saved.append(tokens)
    for n in range(config.layers):
        y, scale = layer_norm(x)
        qkv = (y @ w[f"{n}.qkv"]).reshape(batch, seqlen, 3, config.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]              # strided views, read in place
        if cache is not None:
            k, v = cache.extend(n, k, v)
        out, lse = attention(q, k, v, return_lse=True, **looks)
        x = x + out.reshape(x.shape) @ w[f"{n}.project"]
        saved.append((y, scale, q, k, v, out, lse))
        y, scale = layer_norm(x)
        hidden, gate = gelu(y @ w[f"{n}.up"])
        x = x + hidden @ w[f"{n}.down"]
        saved.append((y, scale, hidden, gate))
    y, scale = layer_norm(x)
    saved.append((y, scale))
    if cache is not None:
        cache.length += seqlen
    return y @ w["head"], saved


def backward(dlogits: Array, w: Weights, config: Config, saved: list[Any]) -> Weights:
    """Gradients of all weights. dlogits (tokens, vocab) is the gradient of the logits. Empties `saved`."""
    g: Weights = {}
    y, scale = saved.pop()
    g["head"] = y.T @ dlogits
    dx = layer_norm_backward(dlogits @ w["head"].T, y, scale)
    looks = config.looks(dx.dtype)
    for n in reversed(range(config.layers)):
        y, scale, hidden, gate = saved.pop()
        g[f"{n}.down"] = hidden.T @ dx
        dhidden = gelu_backward(dx @ w[f"{n}.down"].T, hidden, gate)
        g[f"{n}.up"] = y.T @ dhidden
        dx = dx + layer_norm_backward(dhidden @ w[f"{n}.up"].T, y, scale)
        y, scale, q, k, v, out, lse = saved.pop()
        g[f"{n}.project"] = out.reshape(dx.shape).T @ dx
        dout = (dx @ w[f"{n}.project"].T).reshape(out.shape)
        grads = attention_backward(dout, q, k, v, out, lse, **looks)
        dqkv = xp.stack((grads.dq, grads.dk, grads.dv), axis=2).reshape(len(dx), -1)
        g[f"{n}.qkv"] = y.T @ dqkv
        dx = dx + layer_norm_backward(dqkv @ w[f"{n}.qkv"].T, y, scale)
    one_hot = xp.eye(config.vocab, dtype=dx.dtype)[saved.pop()]
    g["embed"] = one_hot.T @ dx                                       # sums the rows of each character
    return g


# ---------------------------------------------------------------- training
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    def __init__(self, w: Weights, beta1: float = 0.9, beta2: float = 0.99, decay: float = 0.1):
        self.beta1, self.beta2, self.decay, self.steps = beta1, beta2, decay, 0
        self.mean, self.square = ({name: xp.zeros_like(x) for name, x in w.items()} for _ in range(2))

    def step(self, w: Weights, g: Weights, rate: float) -> None:
        """Change w in place. The running means start at zero; dividing by 1 - beta^steps corrects that."""
        self.steps += 1
        unbias = rate * (1 - self.beta2**self.steps) ** 0.5 / (1 - self.beta1**self.steps)
        for name, x in w.items():
            mean, square = self.mean[name], self.square[name]
            mean += (1 - self.beta1) * (g[name] - mean)
            square += (1 - self.beta2) * (g[name] * g[name] - square)
            x *= 1 - rate * self.decay
            x -= unbias * mean / (xp.sqrt(square) + 1e-8)


def batches(data: Numbers, batch: int, context: int, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """Random pieces of the text, without end: tokens (batch, context), and (batch * context,) the next character of each."""
    while True:
        starts = rng.integers(0, len(data) - context, size=(batch, 1))
        pieces = data[starts + np.arange(context + 1)]
        yield xp.asarray(pieces[:, :-1]), xp.asarray(pieces[:, 1:].reshape(-1))


def evaluate(w: Weights, config: Config, data: Numbers, batch: int = 16) -> float:
    """Mean loss in nats over the text, in pieces of `context` characters. The incomplete last piece is left out."""
    count = (len(data) - 1) // config.context
    tokens, targets = (data[shift:shift + count * config.context].reshape(count, -1) for shift in (0, 1))
    total = 0.0
    for start in range(0, count, batch):
        part = xp.asarray(targets[start:start + batch].reshape(-1))
        logits, _ = forward(w, config, xp.asarray(tokens[start:start + batch]))
        total += cross_entropy(logits, part)[0] * len(part)
    return total / (count * config.context)


def train(config: Config, data: Numbers, valid: Numbers, *, seconds: float = 120, steps: int | None = None, batch: int = 8,
          rate: float = 4e-3, seed: int = 0) -> tuple[Weights, History]:
    """Weights after `steps`, or after about `seconds` if steps is None, and the losses along the way."""
    rng = np.random.default_rng(seed)
    w = init(config, rng)
    optimizer, stream = AdamW(w), batches(data, batch, config.context, rng)
    history: History = []
    start, done, checked = time.perf_counter(), 0.0, 0.0             # done: the finished part of the training, 0 to 1
    with tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while done < 1:
            tokens, targets = next(stream)
            logits, saved = forward(w, config, tokens)
            loss, dlogits = cross_entropy(logits, targets)
            optimizer.step(w, backward(dlogits, w, config, saved), rate * min(1, done / 0.05 + 0.01) * (1 - done))
            done = optimizer.steps / steps if steps else (time.perf_counter() - start) / seconds
            check = done >= min(1, checked + 0.1)
            history.append((optimizer.steps, loss, evaluate(w, config, valid) if check else None))
            checked = done if check else checked
            bar.set_postfix(step=optimizer.steps, loss=f"{loss:.3f}", refresh=False)
            bar.update(min(100, 100 * done) - bar.n)
    return w, history


# ---------------------------------------------------------------- saved weights, the plot, writing
def save(path: Path, w: Weights, config: Config, chars: str) -> None:
    """Weights, with the config and the alphabet in the file's header."""
    arrays = {name: np.ascontiguousarray(x.get() if hasattr(x, "get") else x) for name, x in w.items()}
    save_file(arrays, path, metadata={"config": json.dumps(asdict(config)), "chars": chars})


def load(path: Path) -> tuple[Weights, Config, str]:
    with safe_open(path, framework="numpy") as file:
        header = file.metadata()
    return {name: xp.asarray(x) for name, x in load_file(path).items()}, Config(**json.loads(header["config"])), header["chars"]


def plot(path: Path, history: History, unigram: float, bigram: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([step for step, _, _ in history], [loss for _, loss, _ in history], lw=0.7, label="training")
    checks = [(step, loss) for step, _, loss in history if loss is not None]
    axes.plot(*zip(*checks, strict=True), "o-", label="validation")
    for value, name, style in ((unigram, "unigram", ":"), (bigram, "bigram", "--")):
        axes.axhline(value, color="gray", ls=style, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def generate(w: Weights, config: Config, prompt: Numbers, count: int, rng: np.random.Generator, temperature: float = 0.8) -> Iterator[int]:
    """Continue the prompt (at least one character) by `count` characters, one at a time."""
    cache = Cache(config, len(prompt) + count)
    tokens = xp.asarray(prompt)[None]
    for _ in range(count):
        logits, _ = forward(w, config, tokens, cache)
        # The argmax of logits plus Gumbel noise is a draw from their softmax.
        token = int(xp.argmax(logits[-1] / temperature + xp.asarray(rng.gumbel(size=config.vocab))))
        yield token
        tokens = xp.asarray([[token]])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model over characters, or write with it.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU, with CuPy")
    parser.add_argument("--seconds", type=float, default=120, help="training time")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--out", type=Path, default=Path("char_gpt"), help="folder of the weights and the plot")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate", type=int, metavar="N", help="write N characters with the saved weights, do not train")
    parser.add_argument("--prompt", default="The ", help="what the text starts with")
    args = parser.parse_args()
    use(args.device)
    weights = args.out / "weights.safetensors"
    if args.generate is not None:
        w, config, chars = load(weights)
        print(args.prompt, end="")
        for token in generate(w, config, to_numbers(args.prompt, chars), args.generate, np.random.default_rng(args.seed)):
            print(chars[token], end="", flush=True)
        print()
        return

    text = load_text()
    chars = "".join(sorted(set(text)))
    data = to_numbers(text, chars)
    data, valid = np.split(data, [len(data) * 9 // 10])
    config = Config(len(chars))
    unigram, bigram = baselines(data, valid, config.vocab)
    print(f"{len(data)} characters to train on, {len(valid)} to validate; loss of the unigram model {unigram:.3f}, bigram {bigram:.3f}")
    start = time.perf_counter()
    w, history = train(config, data, valid, seconds=args.seconds, steps=args.steps, seed=args.seed)
    elapsed, steps = time.perf_counter() - start, len(history)
    print(f"validation loss {history[-1][2]:.3f} nats per character after {steps} steps, {elapsed:.0f} s")
    args.out.mkdir(parents=True, exist_ok=True)
    save(weights, w, config, chars)
    plot(args.out / "loss.png", history, unigram, bigram)
    print(f"saved {weights} and {args.out / 'loss.png'}")


if __name__ == "__main__":
    main()
