"""Launches of what a call with a score_mod or a mask_mod needs besides its family's kernels. Without Numba."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from ...arrays.view import ITEMSIZE, contiguous
from ...flex.program import Program
from ..runtime.compile import Source, fields_of, late
from ..runtime.launcher import PROGRAMS, Launcher
from ..spec import AnyCall, BackwardCall, Spec
from ..traced import MASK, fields, mask_values
from .config import BITMAP_THREADS, FEWEST_BITS, MOST_KEPT, RECORD, ROUND_THREADS

make_bitmap, make_round = late("flex.bitmap", "make_bitmap"), late("flex.rounding", "make_round")
make_round_fixed = late("flex.fixed", "make_round_fixed")
BITMAP = " bitmap:l bitmap_words:i bitmap_lines:i bitmap_batch:i bitmap_head:i bitmap_last_batch:i"     # of kernels that read one
_OWN = "bitmap:l words:i lines:i columns:i heads:i seqlen_q:i seqlen_k:i "


def bitmap_fields(spec: Spec) -> str:
    """Fields of a kernel that skips the empty tiles of a mask_mod."""
    return BITMAP if spec.mask_mod else ""


class Layout(NamedTuple):
    """Of a bitmap: planes of batch entries and of heads, 1 where all share one; lines of a plane, tiles and words of a line."""

    batches: int
    heads: int
    lines: int
    columns: int

    @property
    def words(self) -> int:
        return -(-self.columns // 32)

    @property
    def size(self) -> int:
        """Bytes."""
        return 8 * self.batches * self.heads * self.lines * self.words

    def values(self, address: int) -> tuple[int, ...]:
        """Values of the fields BITMAP."""
        by_head = self.lines if self.heads > 1 else 0
        return address, self.words, self.lines, self.lines * self.heads if self.batches > 1 else 0, by_head, self.batches - 1


def layout_of(p: Program, batch: int, heads: int, seqlen_q: int, seqlen_k: int, block_m: int, block_n: int, by_keys: bool) -> Layout:
    """The Layout of a mask_mod's bitmap. Lengths and counts may be 0: there is a word to read."""
    used, rows, keys = p.used, max(-(-seqlen_q // block_m), 1), max(-(-seqlen_k // block_n), 1)
    lines, columns = (keys, rows) if by_keys else (rows, keys)
    return Layout(max(batch, 1) if "batch" in used else 1, max(heads, 1) if "head" in used else 1, lines, columns)


@lru_cache(maxsize=PROGRAMS)
def bitmap_source(p: Program, block_m: int, block_n: int, by_keys: bool) -> Source:
    """The kernel that makes a bitmap."""
    key = f"bitmap {block_m}x{block_n}{' by_keys' * by_keys} [{p.text}]"
    return Source(key, lambda: (make_bitmap(p, block_m, block_n, by_keys), 0), fields_of(_OWN + fields(p, MASK)), BITMAP_THREADS)


def bitmap_sources(spec: Spec, block_m: int, block_n: int, by_keys: bool = False) -> tuple[Source, ...]:
    """What `bitmap` launches."""
    return () if spec.mask_mod is None else (bitmap_source(spec.mask_mod, block_m, block_n, by_keys),)


@contextmanager
def bitmap(call: AnyCall, spec: Spec, block_m: int, block_n: int, launcher: Launcher, stream: int,
           by_keys: bool = False) -> Iterator[tuple[Any, ...]]:
    """Values of the fields BITMAP for kernels enqueued inside the `with`: the tiles of the call's mask_mod. Without one there are none."""
    if spec.mask_mod is None:
        yield ()
        return
    p, flex = call.problem, call.operands.flex
    assert flex is not None
    layout = layout_of(spec.mask_mod, p.batch, p.num_heads, p.seqlen_q, p.seqlen_k, block_m, block_n, by_keys)
    size = layout.size + _behind(layout, (p.total_q if by_keys else p.total_k) or 0, block_m if by_keys else block_n)

    def fill(memory: int) -> None:
        launcher.clear(memory, size, stream)
        tiles = layout.batches * layout.heads * layout.lines * layout.columns if p.seqlen_q and p.seqlen_k else 0
        if tiles:
            own = memory, layout.words, layout.lines, layout.columns, layout.heads, p.seqlen_q, p.seqlen_k
            source = bitmap_source(spec.mask_mod, block_m, block_n, by_keys)
            launcher.load(source).launch(tiles, [*own, *mask_values(call)], stream)
    what = layout, block_m, block_n, by_keys, p.seqlen_q, p.seqlen_k
    kept = None if flex.kept is None else _kept(flex.kept, what, size, fill, launcher, stream)
    if kept is not None:
        yield layout.values(kept)
        return
    with launcher.temporary(size, stream) as memory:
        fill(memory)
        yield layout.values(memory)


def _behind(layout: Layout, total: int, block: int) -> int:
    """Bytes behind a packed problem's last line: lengths on the device may exceed max_seqlen, and kernels then read past the end of a
    line. All rows (keys), `total`, are the most that a sequence has."""
    return 8 * max(-(-total // (32 * block)) - layout.words, 0)


def _kept(kept: dict[Any, Any], what: tuple[Any, ...], size: int, fill: Callable[[int], None], launcher: Launcher,
          stream: int) -> int | None:
    """Address of a bitmap that outlives the call, from `kept` or filled now. None: there is none, as in a graph, which may outlive the
    mask.

    Each stream has its own, so that nobody waits, and memory is freed behind all work that reads it.
    """
    key = "bitmap", launcher.device.ordinal, stream, *what, size
    if launcher.capturing(stream):
        return None
    found = kept.get(key)
    if found is None:
        found = launcher.lasting(size, stream)
        if found is None:
            return None
        address: int = found.view().ptr
        fill(address)
        if len(kept) >= MOST_KEPT:
            kept.clear()
        kept[key] = found
    return int(found.view().ptr)


# ---------------------------------------------------------------- gradients of captured arrays
@lru_cache(maxsize=PROGRAMS)
def round_source(dtype: str, compute: str) -> Source:
    return Source(f"round_captured {compute} to {dtype}", lambda: (make_round(dtype, compute), 0), fields_of("sums:l to:l count:q"),
                  ROUND_THREADS)


@lru_cache(maxsize=PROGRAMS)
def round_fixed_source(dtype: str) -> Source:
    return Source(f"round_captured units to {dtype}", lambda: (make_round_fixed(dtype), 0), fields_of("sums:l to:l top:l count:q bits:i"),
                  ROUND_THREADS)


@contextmanager
def _fixed_sums(call: BackwardCall, launcher: Launcher, stream: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """`captured_sums` of a deterministic call: records of fixed.py."""
    p, wanted = call.problem, {n: x for n, x in enumerate(call.grads.dcaptured or ()) if x is not None}
    sizes = {n: -(-(RECORD * math.prod(x.shape) + 4) // 256) * 256 for n, x in wanted.items()}
    rows = p.total_q if p.packed else p.batch * p.seqlen_q
    pairs = (rows or 0) * p.num_heads * (p.seqlen_k + 512)          # and what each thread hands on at its end
    loads = 0 if p.flex is None or p.flex.score_mod is None else len(p.flex.score_mod.lines)
    bits = max(62 - (pairs * max(loads, 1)).bit_length(), FEWEST_BITS)
    with launcher.temporary(sum(sizes.values()), stream) as memory:
        launcher.clear(memory, sum(sizes.values()), stream)
        values, places, at = list[int](), dict[int, tuple[int, int, int]](), memory
        for n, x in wanted.items():
            count = math.prod(x.shape)
            places[n] = at, at + RECORD * count, count
            values += [at, *(stride // x.itemsize * RECORD for stride in contiguous(x.shape, x.itemsize)), places[n][1]]
            at += sizes[n]
        yield tuple(wanted), (*values, bits)
        for n, (sums, top, count) in places.items():
            own = [sums, wanted[n].ptr, top, count, bits]
            launcher.load(round_fixed_source(wanted[n].dtype)).launch(-(-count // ROUND_THREADS), own, stream)


@contextmanager
def captured_sums(call: BackwardCall, launcher: Launcher, stream: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(arrays, values): which captured arrays have a gradient, and the values of fields.sum_fields of their zeroed sums, for work enqueued
    inside the `with`. Its end enqueues rounding them to the gradients, where those have another dtype than the sums."""
    if call.deterministic:
        with _fixed_sums(call, launcher, stream) as found:
            yield found
        return
    wanted = {n: x for n, x in enumerate(call.grads.dcaptured or ()) if x is not None}
    compute = call.problem.compute_dtype
    sizes = {n: -(-math.prod(x.shape) * ITEMSIZE[compute] // 256) * 256 for n, x in wanted.items() if x.dtype != compute}
    with launcher.temporary(sum(sizes.values()), stream) as memory:
        values, at = list[int](), memory
        for n, x in wanted.items():
            own = contiguous(x.shape, x.itemsize)
            assert all(n == 1 or a == b for n, a, b in zip(x.shape, x.strides, own, strict=True)), "made by the library, contiguous"
            address = at if n in sizes else x.ptr
            launcher.clear(address, math.prod(x.shape) * ITEMSIZE[compute], stream)
            values += [address, *contiguous(x.shape, ITEMSIZE[compute])]
            at += sizes.get(n, 0)
        yield tuple(wanted), tuple(values)
        at = memory
        for n in sizes:
            x, count = wanted[n], math.prod(wanted[n].shape)
            launcher.load(round_source(x.dtype, compute)).launch(-(-count // ROUND_THREADS), [at, x.ptr, count], stream)
            at += sizes[n]
