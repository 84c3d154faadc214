"""The roles of the Hopper kernel over latent caches: protocol and places as in roles.py, and numbers. A fragment has 16 rows, its warp's.

What a product reads is known by its place, and its numbers are those of the request's arrays there. A maximum, a sum or a factor stands for
eight rows, of which the played lane has the first.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastattn.masks import row_bounds
from tests.tools.gpu.roles import Fragment, Panel, Place
from tests.tools.gpu.roles_pages import PagesPlay, Requests

Array = np.ndarray[Any, Any]
ROWS, LN2 = 64, math.log(2)


class Rows(float):
    """A number of each of eight rows; as a float 1 if all are 1."""

    values: Array

    def __new__(cls, values: Any) -> Rows:
        made = super().__new__(cls, 1.0 if np.all(values == 1) else 0.5)
        made.values = np.broadcast_to(np.asarray(values, float), 8)
        return made

    def __mul__(self, other: float) -> Rows:
        return Rows(self.values * rows_of(other))


def rows_of(x: float) -> Array:
    return x.values if isinstance(x, Rows) else np.full(8, float(x))


@dataclass(eq=False)
class Numbers(Fragment):
    """A fragment with its numbers. columns: the first column of each of its products, of S."""

    x: Any = None
    columns: set[int] = field(default_factory=set)


class LatentPlay(PagesPlay):
    """A PagesPlay with the numbers of the requests."""

    modules = (*PagesPlay.modules, "sm90.latent", "sm90.latent_8bit", "decode.combine")

    def __init__(self, config: Any, asked: Requests, blocks: tuple[int, ...], seed: int) -> None:
        super().__init__(SimpleNamespace(slices=1, block_n=config.block_n), 512, blocks, seed, 2, {"k": config.box},
                         producers=(0, 32, 64, 96) if asked.call.problem.eight_bit else (0,))
        self.asked, self.tiling = asked, config
        p, draw = asked.call.problem, np.random.default_rng(7)
        self.q = draw.standard_normal(((p.total_q or sum(asked.rows)), p.num_heads, p.head_dim)) * 3
        self.keys = [draw.standard_normal((max(asked.lengths) + 64, p.num_heads_k, p.head_dim)) for _ in asked.lengths]
        for keys, n in zip(self.keys, asked.lengths, strict=True):
            keys[n:] = np.nan           # what a page has behind the request's keys
        self.copied: dict[int, dict[int, int]] = {block.index: {} for block in self.blocks}
        self.outputs: dict[int, Array] = {}         # address of 16 bits or float32 -> columns
        self.floats: dict[int, float] = {}
        self.cleared: set[tuple[int, int]] = set()      # (block, address of a row of a panel)

    # ------------------------------------------------------------ what a block has
    def place(self, place: Any) -> Any:
        """Noted once a warp: the block's Place."""
        self.local.place = place
        return place

    def line(self, r: int) -> tuple[int, int, int]:
        """(row of the packed q, query, head) of row r of the block; past the last one that again."""
        place, group = self.local.place, self.asked.call.problem.group
        r = place.row + min(r, place.rows - 1)
        start = sum(self.asked.rows[:place.batch])
        return start + r // group, r // group, place.head_k * group + r % group

    def mine(self) -> range:
        """The rows of the played warp."""
        first = self.local.agent.thread // 32 % 4 * 16
        return range(first, first + 16)

    def copy16(self, to: int, source: int) -> None:
        self.copied[self.local.agent.block.index][to] = source

    # ------------------------------------------------------------ products
    def panel_values(self, agent: Any, at: int, size: int, column: int) -> Array:
        """A panel of keys (keys, 64); zeros where rows were cleared."""
        tensor, place = self.read(agent, at, size, column)
        assert tensor == "k" and place.head == self.local.place.head_k and place.batch == self.local.place.batch
        found = self.keys[place.batch][place.row:place.row + size // 128, place.head, column:column + 64].copy()
        for k in range(len(found)):
            if (agent.block.index, at + 128 * k) in self.cleared:
                found[k] = 0
        return found

    def product(self, first: bool) -> Any:
        def qk(acc: Any, q: int, k: int, depth: int, q_rows: int, k_rows: int) -> Any:
            agent, start = self.pause(), q // (128 * q_rows)
            assert q % (128 * q_rows) == 0 and q_rows == ROWS and start == (4 if first else 0)
            copied = self.copied[agent.block.index]
            lanes = [self.q[row, head] for row, _, head in map(self.line, self.mine())]
            for p in range(start, start + depth // 64):         # Q is there, of the rows that are played
                for r in range(0, ROWS, 4):
                    a, (row, _, head) = self.asked.call.operands.q, self.line(r)
                    place = (row,) if self.asked.call.problem.packed else divmod(row, a.shape[1])
                    address = a.ptr + sum(n * s for n, s in zip((*place, head), a.strides, strict=False)) + 128 * p
                    assert copied[p * 8192 + r * 128 + ((r & 7) << 4)] == address, "another row of q"
            panels, size, s = range(start, start + depth // 64), k_rows * 128, 0 if first else acc.x
            for p in panels:
                s = s + np.array(lanes)[:, 64 * p:64 * p + 64] @ self.panel_values(agent, k + (p - start) * size, size, 64 * p).T
            return self.fly(agent, Numbers("S", x=s, columns=set(panels) | (set() if first else acc.columns)))
        return qk

    def pv(self, acc: Any, p: Any, v: tuple[int, int]) -> Any:
        agent, (at, panel) = self.pause(), v
        first = 256 * (agent.thread // 128 - 1)
        values = [self.panel_values(agent, at + j * panel, panel, first + 64 * j) for j in range(4)]
        assert not acc.flying and p.kind == "P"
        return self.fly(agent, Numbers("O", x=(0 if acc.kind == "0" else acc.x) + p.x @ np.concatenate(values, axis=1)))

    def shared_pv(self, acc: Any, p: int, v: tuple[int, int], depth: int, rows: int) -> Any:
        agent = self.local.agent
        assert depth == self.tiling.block_n and rows == ROWS
        own = p + 2048 * (agent.thread // 32 % 4)
        self.reads(agent, own, 2048)
        return self.pv(acc, agent.block.words[own], v)

    def store_panels(self, packed: Any, place: int, swizzle: int, panel_bytes: int, count: int, first: int) -> None:
        agent = self.pause()
        self.unread(agent.block, place, place + 2048)
        assert (count, first, panel_bytes) == (1, 0, 8192)
        agent.block.words[place] = packed

    def clear(self, address: int) -> None:
        super().clear(address)

    def clear_rows(self, rows: int, count: int, threads: int) -> Any:
        def clear(address: int, first: int, thread: int) -> None:
            agent = self.pause()
            assert threads == 128 and 0 <= thread < 128
            for p in range(count):
                for row in range(max(first, 0), rows):
                    at = address + p * rows * 128 + row * 128
                    if thread == 0:
                        self.unread(agent.block, at, at + 128)
                        assert any(x.start <= at < x.end and x.what for x in agent.block.panels), "cleared before it is there"
                        self.cleared.add((agent.block.index, at))
        return clear

    def arrive(self, copy: Any) -> None:
        self.cleared -= {(self.block_of(copy.panel), at) for at in range(copy.panel.start, copy.panel.end, 128)}
        super().arrive(copy)

    def block_of(self, panel: Panel) -> int:
        return next(block.index for block in self.blocks if panel in block.panels)

    def store_chunk(self, first: int, second: int, address: int) -> None:
        """The played lanes store the first columns of rows of a piece; the first row stands for all panels of it."""
        agent, start = self.pause(), first // 8192 * 8192
        panel = start // 8192 - 9               # behind Q: two stages of four panels, then two of five
        column, count = (0, 4) if panel < 8 else ((4, 4), (8, 1))[(panel - 8) % 5 // 4]
        self.unread(agent.block, start, start + 8192 * count)
        if (first - start) // 128 == 0:
            k = self.asked.call.operands.k
            page, rest = divmod(address - k.ptr, k.strides[0])
            request, key = self.asked.key_of(page, rest // k.strides[1])
            assert rest % k.strides[1] == 64 * column
            for p in range(count):
                at = start + 8192 * p
                agent.block.panels[:] = [x for x in agent.block.panels if x.start != at]
                agent.block.panels.append(Panel(at, at + 8192, ("k", 64 * (column + p), Place(key, 0, request))))
                rows = {(agent.block.index, at + 128 * r) for r in range(64)}
                self.cleared -= rows
                self.cleared |= {(agent.block.index, at + 128 * r) for r in range(64) if key + r >= self.asked.lengths[request]}

    # ------------------------------------------------------------ softmax
    def keep(self, acc: Any, intervals: Any, column: int) -> Any:       # type: ignore[override]
        place, p, rows = self.local.place, self.asked.call.problem, self.mine()
        ends = [min(row_bounds(self.line(r)[1], place.seqlen_q, place.seqlen_k, None, p.mask.right, False)[1], place.end) for r in rows]
        assert (intervals.hi0, intervals.hi1) == (ends[0], ends[8]), "bounds of other rows"
        assert acc.columns == set(range(9)), "a score of some columns"
        keys = column + np.arange(acc.x.shape[1])
        self.at_rest(acc)
        return Numbers("S", x=np.where(keys < np.array(ends)[:, None], acc.x, -np.inf))

    def update(self, a: Any, acc: Any, max0: Any, max1: Any, sum0: Any, sum1: Any) -> tuple[Any, ...]:
        old, total = np.concatenate([rows_of(max0), rows_of(max1)]), np.concatenate([rows_of(sum0), rows_of(sum1)])
        new = np.maximum(old, acc.x.max(axis=1))
        with np.errstate(invalid="ignore"):         # -inf - -inf
            new = np.where((new - old) * a.log2_scale < 8, old, new)
        finite = np.where(np.isfinite(new), new, 0)
        alpha, x = np.exp2((old - finite) * a.log2_scale), np.exp2((acc.x - finite[:, None]) * a.log2_scale)
        total = total * alpha + x.sum(axis=1)
        made = [Rows(y[half]) for y in (new, total, alpha) for half in (slice(8), slice(8, 16))]
        return (Numbers("S", x=x), *made)

    def finish_row(self, a: Any, head: int, maximum: Any, total: Any) -> tuple[Rows, Rows]:
        top, total = rows_of(maximum), rows_of(total)
        with np.errstate(divide="ignore"):
            return Rows(np.where(total > 0, 1 / total, 0)), Rows(np.where(total > 0, top * a.softmax_scale + np.log(total), -np.inf))

    def scaled(self, acc: Any, factor0: Any, factor1: Any) -> Any:
        self.at_rest(acc)
        if acc.kind == "0":
            return acc
        factor = np.concatenate([rows_of(factor0), rows_of(factor1)])[:, None]
        return Numbers(acc.kind, x=np.where(factor == 0, 0, acc.x * factor), columns=acc.columns)

    def to_half(self, acc: Any) -> Any:
        self.at_rest(acc)
        return acc if acc.kind == "0" else Numbers({"S": "P"}.get(acc.kind, acc.kind), x=acc.x)

    # ------------------------------------------------------------ results
    def put_rows(self, acc: Any, address0: int, address1: int, inside0: int, inside1: int, *_: Any) -> None:
        self.pause()
        x = np.zeros((16, 256)) if acc.kind == "0" else acc.x
        for address, inside, r in ((address0, inside0, 0), (address1, inside1, 8)):
            if inside:
                assert address not in self.outputs, "stored twice"
                self.outputs[address] = x[r:r + 8]

    def put_float(self, address: int, value: float) -> None:
        self.pause()
        assert address not in self.floats, "stored twice"
        self.floats[address] = value

    def names(self) -> dict[str, Any]:
        names = super().names()
        names["wgmma"].make_products = lambda dtype: (self.product(True), self.pv)
        names["wgmma"].make_more_qk = lambda dtype: self.product(False)
        names["wgmma"].make_grad_products = lambda dtype: (None, self.shared_pv)
        cp_async = SimpleNamespace(copy16=self.copy16, wait_all=lambda: None)

        def place_of(*given: Any) -> Any:
            made = places_make(*given)
            return lambda a, block: self.place(made(a, block))
        from fastattn.gpu.decode import places
        places_make = places.make_place_of
        return names | {
            "make_place_of": place_of, "cp_async": cp_async,
            "load_chunk_if": lambda address, inside: address if inside else 0,
            "make_store_chunk": lambda *_: self.store_chunk, "prefetch": lambda address: None,
            "make_softmax": lambda spec: (self.update, None, None),
            "make_finish_row": lambda spec: self.finish_row, "make_keep": lambda spec: self.keep,
            "make_score": lambda *_: (None, None, lambda a, acc, *_: acc), "make_clear": self.clear_rows, "quad_sum": lambda x: x,
            "scale_rows": self.scaled, "scale_seen_rows": self.scaled, "make_pack": lambda dtype: self.to_half,
            "store_numbers": self.put_rows, "store_whole_rows": self.put_rows, "store_f32": self.put_float,
            "zeros": lambda n: Numbers("0"), "load_shared": lambda *_: lambda at: (self.pause().block.words[at],),
            "store_shared": lambda *_: lambda at, x: self.pause().block.words.__setitem__(at, x), "int64": int}
