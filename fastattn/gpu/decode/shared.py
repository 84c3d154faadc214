"""Launches of the split-key kernel for requests that share their first keys (prefix.py). Without Numba: see runtime/compile.py."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...problem import Problem
from ..runtime.launcher import Launcher
from ..spec import Call, Launch, Spec
from .config import MOST_DIM, with_long_steps
from .launch import (
    KeyCache,
    cache_values,
    chosen,
    device_splits,
    forward_program,
    of_pages,
    plans,
    prepare_planned,
    spec_of,
    split_keys,
    units_of,
)


def keys_of(call: Call) -> int:
    """The keys that are read once for all requests, in whole pages; 0: each request reads its own.

    Of caches with wider heads only latent ones are common, whose one key head all query heads share: products bound these already.
    """
    p, extra = call.problem, call.operands.cache
    assert p.cache is not None and extra is not None
    paged = extra.block_table.device == call.operands.k.device and len(extra.block_table.shape) == 2
    if not paged or p.batch < 2 or max(p.head_dim, p.head_dim_v) > MOST_DIM:
        return 0
    return (p.cache.shared_prefix or 0) // p.cache.page_size * p.cache.page_size


def prepare(call: Call, spec: Spec, launcher: Launcher, cache: KeyCache, keys: int) -> Launch:
    """What enqueues both kernels for this call, or one that differs in addresses only. keys: those that requests share."""
    p, spec = call.problem, spec_of(call, spec, cache)
    rows = p.total_q if p.total_q is not None else p.batch * p.seqlen_q
    together = replace(p, batch=1, seqlen_q=rows, total_q=None, seqlen_k=keys)         # the rows of all requests as those of one
    prefix = _Part(call, replace(spec, shared="prefix", sinks=None, lse=False), together, launcher, cache)
    behind = _behind(call, replace(spec, shared="behind"), replace(p, seqlen_k=max(p.seqlen_k - keys, 1)), launcher, cache)
    lines = prefix.splits * rows * p.num_heads
    part_bytes = 4 * lines * spec.head_dim_v        # of the prefix's outputs; then their maxima and sums

    def launch(call: Call, stream: int) -> None:
        with launcher.temporary(part_bytes + 8 * lines, stream) as part:
            shared = keys, part, part + part_bytes, prefix.splits
            prefix.launch(call, (0, 0, 0), shared, stream)
            behind(call, shared, stream)
    return launch


class _Part:
    """One of the kernels. sized: with its rows and keys, which decide its tiling."""

    def __init__(self, call: Call, spec: Spec, sized: Problem, launcher: Launcher, cache: KeyCache) -> None:
        config = of_pages(with_long_steps(chosen(spec, sized, cache, launcher.device), spec, call.operands.k.shape[1]), spec, call, cache)
        source, arguments = forward_program(spec, config)
        self.kernel, self.values, self.cache, self.config = launcher.load(source), arguments.bound(call), cache, config
        self.planes = sized.num_heads_k * units_of(sized, config.rows)
        splits, _ = split_keys(self.planes, sized.seqlen_k, config, launcher.device.num_sms)
        one_block = not sized.packed and sized.seqlen_q * sized.group <= config.rows
        splits = device_splits(self.planes, sized.seqlen_k if one_block else 0, splits, cache.num_splits)
        self.splits = config.cluster if config.cluster > 1 else splits
        self.rows = self.planes * config.rows
        self.own = self.rows, self.splits, 0, 0, 0, sized.num_heads_k

    def launch(self, call: Call, memory: tuple[int, int, int], shared: tuple[int, ...], stream: int) -> None:
        """memory: the first values of FORWARD."""
        more = cache_values(call, self.cache, self.config.rows)
        self.kernel.launch(self.planes * self.splits, self.values(call, (*memory, *self.own, *more, *shared)), stream)


def _behind(call: Call, spec: Spec, sized: Problem, launcher: Launcher,
            cache: KeyCache) -> Callable[[Call, tuple[int, ...], int], None]:
    """What enqueues the second kernel: (call, values of SHARED, stream)."""
    config = of_pages(chosen(spec, sized, cache, launcher.device), spec, call, cache)
    if plans(sized, config, cache.num_splits):
        return prepare_planned(call, replace(spec, planned=True), launcher, cache, config)
    part = _Part(call, spec, sized, launcher, cache)
    out_bytes = 4 * part.splits * part.rows * spec.head_dim_v
    alone = part.splits == 1 or config.cluster > 1

    def launch(call: Call, shared: tuple[int, ...], stream: int) -> None:
        if alone:
            part.launch(call, (0, 0, 0), shared, stream)
            return
        arrived = launcher.arrivals(launcher.capturing(stream))
        with launcher.temporary(out_bytes + 8 * part.splits * part.rows, stream) as memory:
            part.launch(call, (memory, memory + out_bytes, arrived), shared, stream)
    return launch
