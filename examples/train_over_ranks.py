"""
Train with the sequence over ranks
==================================

The network of :doc:`/examples/train_char_gpt`, trained on sequences that are cut over several ranks: each has the rows of its part, and
only attention speaks with the others. ::

    mpiexec -n 2 python train_over_ranks.py --steps 100         # needs mpi4py: pip install "fastattn[distributed]"
    torchrun --nproc-per-node 2 train_over_ranks.py             # or anything else that sets RANK and WORLD_SIZE
    python train_over_ranks.py --threads 2                      # ranks are threads of one process
    mpiexec -n 2 python train_over_ranks.py --device cuda       # a GPU each, on CuPy arrays; needs nccl4py

What changes beside one rank: each rank embeds and predicts its own characters; ``attention`` is that of ``fastattn.distributed``; and the
gradients of weights, which every rank has a share of, are added up before the step. The losses are those of one rank.
"""
from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import numpy as np
import train_char_gpt as gpt
from tqdm import tqdm

import fastattn.distributed as fd

Array = Any                     # NumPy's, or CuPy's
SHARD = "contiguous"            # attention looks back through a window: neighbours then need only each other's last keys
_here = threading.local()       # the group and the length of whole sequences, of this rank


def attention(*arrays: Array, **options: Any) -> Any:
    return fd.attention(*arrays, group=_here.group, seqlen=_here.seqlen, shard=SHARD, **options)


def attention_backward(*arrays: Array, **options: Any) -> Any:
    return fd.attention_backward(*arrays, group=_here.group, seqlen=_here.seqlen, shard=SHARD, **options)


gpt.attention, gpt.attention_backward = attention, attention_backward       # what forward and backward of the network call


def summed(arrays: dict[str, Array], group: fd.Group) -> dict[str, Array]:
    """The sums over all ranks, in every rank. All arrays travel as one, padded because chunks begin at multiples of 128."""
    flat = gpt.xp.concatenate([x.reshape(-1) for x in arrays.values()])
    padded = gpt.xp.pad(flat, (0, -len(flat) % 128))
    total = fd.unshard(padded, group, len(padded) * group.size, 0, shard=SHARD).reshape(group.size, -1).sum(axis=0)
    found, first = {}, 0
    for name, x in arrays.items():
        found[name] = total[first:first + x.size].reshape(x.shape)
        first += x.size
    return found


def train(group: fd.Group, config: gpt.Config, data: Array, steps: int, batch: int = 2, rate: float = 4e-3, seed: int = 0) -> list[float]:
    """The loss of each step. All ranks draw the same sequences and take the same steps."""
    rng = np.random.default_rng(seed)
    w = gpt.init(config, rng)
    optimizer, stream = gpt.AdamW(w), gpt.batches(data, batch, config.context, rng)
    _here.group, _here.seqlen = group, config.context
    losses = []
    for step in tqdm(range(steps), disable=group.rank > 0):
        tokens, targets = next(stream)
        mine = fd.shard(tokens, group, shard=SHARD)
        wanted = fd.shard(targets.reshape(batch, -1), group, shard=SHARD).reshape(-1)
        logits, saved = gpt.forward(w, config, mine)
        loss, dlogits = gpt.cross_entropy(logits, wanted)
        share = len(wanted) / len(targets)              # of the mean over all characters
        gradients = gpt.backward(dlogits * np.float32(share), w, config, saved)
        whole = summed(gradients | {"loss": gpt.xp.array([loss * share], "float32")}, group)
        losses.append(float(whole.pop("loss")[0]))
        done = (step + 1) / steps
        optimizer.step(w, whole, rate * min(1, done / 0.05 + 0.01) * (1 - done))
    return losses


def work(group: fd.Group, device: str, steps: int, context: int) -> None:
    gpt.use(device)
    text = gpt.load_text()
    chars = "".join(sorted(set(text)))
    config = gpt.Config(len(chars), context=context)
    start = time.perf_counter()
    losses = train(group, config, gpt.to_numbers(text, chars), steps)
    rows = sum(stop - first for first, stop in fd.chunks(context, group.size, group.rank, SHARD))
    print(f"rank {group.rank} of {group.size}: {rows} of {context} characters, loss {losses[0]:.4f} at first, {losses[-1]:.4f} after "
          f"{steps} steps, {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model with its sequences over ranks.")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--context", type=int, default=1024, help="length of a sequence")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU for each rank, with CuPy")
    parser.add_argument("--threads", type=int, metavar="N", help="ranks are N threads of this process")
    args = parser.parse_args()
    if args.threads:
        fd.threads(args.threads, work, args.device, args.steps, args.context)
    else:
        work(fd.connect("cpu" if args.device == "cpu" else None), args.device, args.steps, args.context)


if __name__ == "__main__":
    main()
