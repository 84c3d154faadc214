"""
Serve a language model
======================

The character model of ``train_char_gpt.py`` answers many requests at once: its keys and values live in pages, prompts are
read in chunks, and requests join and leave the batch at any step. ::

    python train_char_gpt.py --seconds 120                   # trains the model, writes char_gpt/weights.safetensors
    python generate.py --requests 16 --count 200             # writes 16 texts, and how many characters a second
    python generate.py --requests 64 --device cuda           # the same on a GPU, on CuPy arrays

A step packs the rows of all running requests: a chunk of a prompt, or the one character that a request wrote last. One
call of ``attention_with_kvcache`` a layer writes their keys and values into the pages and attends over all of them. On a GPU the
cache stays there; of a step, its tokens, lengths and block table go to the device, and the logits come back.
"""
from __future__ import annotations

import argparse
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import train_char_gpt as gpt
from tqdm import tqdm
from train_char_gpt import Config, Weights, gelu, init, layer_norm, load, to_numbers

from fastattn import attention_with_kvcache

Array = np.ndarray[Any, Any]
PAGE = 16                                   # keys of a page


@dataclass(eq=False)
class Request:
    """A prompt of at least one character, and the characters written so far behind it. `filled` of them are in the cache."""

    prompt: Array
    count: int
    rng: np.random.Generator
    written: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    filled: int = 0

    @property
    def text(self) -> Array:
        return np.concatenate([self.prompt, np.array(self.written, np.int64)])

    @property
    def done(self) -> bool:
        return len(self.written) >= self.count


class Server:
    """Runs requests over one cache.

    Parameters
    ----------
    pages
        Of the cache. A request begins when there are free ones for all that it may write.
    most_rows
        Of a step, so that a long prompt does not hold up those who are writing.
    """

    def __init__(self, w: Weights, config: Config, pages: int = 256, most_rows: int = 128, temperature: float = 0.8) -> None:
        self.w, self.config, self.most_rows, self.temperature = w, config, most_rows, temperature
        shape = (config.layers, pages, PAGE, config.heads, config.width // config.heads)
        self.k, self.v = gpt.xp.zeros(shape, "float32"), gpt.xp.zeros(shape, "float32")
        self.free = list(range(pages))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def admit(self) -> None:
        """Begin waiting requests, the first one first, while there are pages for them."""
        while self.waiting:
            need = -(-(len(self.waiting[0].prompt) + self.waiting[0].count) // PAGE)
            if need > len(self.free):
                if not self.running:
                    raise ValueError(f"a request needs {need} pages; the cache has {len(self.free)}")
                return
            request = self.waiting.popleft()
            request.pages = [self.free.pop() for _ in range(need)]
            self.running.append(request)

    def step(self) -> list[tuple[Request, Array]]:
        """One pass over the network. Returns the requests that wrote a character, with its logits."""
        self.admit()
        rows, room = [], self.most_rows
        for request in sorted(self.running, key=lambda r: len(r.prompt) + len(r.written) - r.filled):      # those who are writing first
            n = min(len(request.prompt) + len(request.written) - request.filled, room)
            if n:
                rows.append((request, request.text[request.filled:request.filled + n]))
            room -= n
        logits = self.forward(rows)
        wrote = []
        for (request, tokens), last in zip(rows, logits, strict=True):
            request.filled += len(tokens)
            if request.filled == len(request.prompt) + len(request.written):
                noise = request.rng.gumbel(size=self.config.vocab)          # the argmax of logits plus it is a draw from their softmax
                request.written.append(int(np.argmax(last / self.temperature + noise)))
                wrote.append((request, last))
        for request in [r for r in self.running if r.done]:
            self.running.remove(request)
            self.free += request.pages
        return wrote

    def forward(self, rows: list[tuple[Request, Array]]) -> Array:
        """The logits behind the last of each request's new characters, (requests, vocab)."""
        w, config, put = self.w, self.config, gpt.xp.asarray
        lengths = [len(tokens) for _, tokens in rows]
        ends = np.cumsum(lengths)
        table = np.zeros((len(rows), max(len(request.pages) for request, _ in rows)), np.int32)
        for n, (request, _) in enumerate(rows):
            table[n, :len(request.pages)] = request.pages
        x = w["embed"][put(np.concatenate([tokens for _, tokens in rows]))]
        options: dict[str, Any] = {
            "cache_seqlens": put(np.array([request.filled for request, _ in rows], np.int32)), "block_table": put(table),
            "cu_seqlens_q": put(np.concatenate([[0], ends]).astype(np.int32)), "max_seqlen_q": max(lengths), **config.looks(x.dtype)}
        for n in range(config.layers):
            qkv = (layer_norm(x)[0] @ w[f"{n}.qkv"]).reshape(len(x), 3, config.heads, -1)
            out = attention_with_kvcache(qkv[:, 0], self.k[n], self.v[n], qkv[:, 1], qkv[:, 2], **options)
            x = x + out.reshape(x.shape) @ w[f"{n}.project"]
            x = x + gelu(layer_norm(x)[0] @ w[f"{n}.up"])[0] @ w[f"{n}.down"]
        result: Any = layer_norm(x[put(ends - 1)])[0] @ w["head"]
        return result.get() if hasattr(result, "get") else result           # sampling is the host's


def main() -> None:
    parser = argparse.ArgumentParser(description="Write many texts at once with the model of train_char_gpt.py.")
    parser.add_argument("--weights", type=Path, default=Path("char_gpt/weights.safetensors"), help="what train_char_gpt.py wrote")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--count", type=int, default=200, help="characters of the longest text")
    parser.add_argument("--pages", type=int, default=256, help=f"of the cache, {PAGE} characters each")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU, with CuPy")
    args = parser.parse_args()
    gpt.use(args.device)
    if args.weights.exists():
        w, config, chars = load(args.weights)
    else:
        print(f"{args.weights} is not there: random weights write noise; train_char_gpt.py makes it")
        chars = "\n" + "".join(map(chr, range(32, 127)))
        config = Config(len(chars))
        w = init(config, np.random.default_rng(args.seed))
    server, rng = Server(w, config, args.pages), np.random.default_rng(args.seed)
    requests = [Request(to_numbers(args.prompt * int(rng.integers(1, 20)), chars), int(rng.integers(1, args.count + 1)), rng.spawn(1)[0])
                for _ in range(args.requests)]
    start, steps = time.perf_counter(), 0
    with tqdm(total=sum(request.count for request in requests), unit=" characters") as bar:
        for request in requests:
            server.add(request)
        while server.running or server.waiting:
            bar.update(len(server.step()))
            bar.set_postfix(running=len(server.running), free_pages=len(server.free), refresh=False)
            steps += 1
    seconds = time.perf_counter() - start
    total = sum(request.count for request in requests)
    print("".join(chars[n] for n in requests[0].text))
    print(f"{total} characters of {len(requests)} requests in {steps} steps, {total / seconds:.0f} a second")


if __name__ == "__main__":
    main()
