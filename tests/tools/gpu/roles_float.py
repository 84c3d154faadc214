"""The Hopper forward of wide float32 heads, played as roles.py plays the other one.

A score knows which chunks of 32 columns of Q and K went into it, each of which must be there once when it becomes a probability. An output
counts its panels: all of a block must be added, in order, before the first of the next. Q is copied by the consumers, and not looked at.
Where the producer splits K and V, a panel is there when all of its warps have stored their rows.
"""
from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fastattn.gpu.runtime import packed
from fastattn.gpu.sm90 import forward_float, launch_float
from fastattn.gpu.sm90.config_float import choose_forward, columns_of
from fastattn.gpu.spec import Call, make_spec
from fastattn.masks import row_bounds
from tests.tools.gpu.calls import Sequence, with_bounds
from tests.tools.gpu.emulator import Memory
from tests.tools.gpu.roles import Fragment, Panel, Place, Play, edited, nothing, playing

OUT = 1 << 40               # address of the output
Rows = namedtuple("Rows", "chunk row")      # an A operand: 32 columns of the warp's rows of Q


class PlayFloat(Play):
    """One launch."""

    modules = ("sm90.forward_float", "sm90.bounds", "tile.parked", "tile.ring", "tile.smem")

    def __init__(self, config: Any, call: Call, blocks: int, seed: int) -> None:
        p = call.problem
        self.chunks, self.call = 2 * -(-p.head_dim // 64), call
        self.needed = self.chunks if config.slices > 1 else -(-p.head_dim // 32)        # others are 0
        self.stored_by: dict[tuple[int, int], set[tuple[int, int]]] = {}        # (warp, half) that are stored of a panel of a block
        self.lse: dict[tuple[int, int, int], tuple[float, float]] = {}          # of the first rows of warps: (batch, head, row)
        super().__init__(config, p.head_dim_v, tuple(range(blocks)), seed, config.consumers, dict.fromkeys("kv", config.block_n), 3,
                         tuple(range(0, 128, 32)) if config.split else (0,))

    def load_lines(self, at: int, by_row: int, rows: int, columns: int, first: int, count: int) -> Any:
        """What lies there: (tensor, its first column, Place) of the warp's first row."""
        o = self.call.operands
        tensor, x = ("v", o.v) if at >= o.v.ptr else ("k", o.k)
        strides, place = (0, *x.strides) if len(x.strides) == 3 else x.strides, []
        left = at - x.ptr - (self.local.agent.thread >> 3) * by_row         # the panel's first row; the warp's may not exist
        for stride in (strides[0], strides[1], strides[2]):
            place.append(left // stride if stride else 0)
            left -= place[-1] * stride
        batch, row, head = place
        half = self.config.block_n // 32
        assert by_row == strides[1] and columns == x.shape[-1] - left // 4
        assert (first, count) in ((0, half), (half, self.config.block_n // 16 - half))
        return tensor, left // 4, Place(row, head, batch)

    def store_lines(self, numbers: Any, to: int, apart: int, first: int) -> None:
        agent, (tensor, column, place) = self.pause(), numbers
        line, block = agent.thread >> 3, agent.block
        for part in range(3):
            start = to - line * 128 - ((line & 7) << 4) + part * apart
            self.unread(block, start, start + apart)
            panel = next((p for p in block.panels if p.start == start), None)
            if panel is None:
                panel = Panel(start, start + apart)
                block.panels.append(panel)
            warps = self.stored_by.setdefault((block.index, start), set())
            assert (agent.thread, first) not in warps, "a slot is filled twice"
            warps.add((agent.thread, first))
            panel.what = None
            if len(warps) == 8:         # both halves of four warps
                warps.clear()
                panel.what = tensor, column + part * (32 * self.chunks if tensor == "k" else 64 * self.panels_v), place

    def load_parts(self, address: int, turn: int, row_bytes: int) -> Rows:
        row, column = divmod(address, row_bytes)
        warp = self.pause().thread // 32 - 4
        assert turn == 0 and row == (warp if self.config.slices == 1 else warp % 4) * 16 and column % 128 == 0, "rows of another warp"
        return Rows(column // 128, row)

    def parts_at(self, at: int, apart: int, tensor: str, columns: int) -> tuple[int, Place]:
        """(panel, place) of the parts of a panel, from now on read. `columns`: of a part of a row."""
        agent, found = self.pause(), []
        for part in range(3):
            name, column, place = self.lies(agent.block, at + part * apart, apart)
            assert name == tensor and column // columns == part and column % 64 == 0
            self.reads(agent, at + part * apart, apart)
            found.append((column % columns // 64, place))
        assert len(set(found)) == 1, "parts of several panels"
        return found[0]

    def qk_float(self, acc: Fragment, q: Rows, k: int, apart: int) -> Fragment:
        panel, place = self.parts_at(k - k % 128, apart, "k", 32 * self.chunks)
        assert q.chunk == 2 * panel + k % 128 // 64, "columns of Q by others of K"
        return self.fly(self.local.agent, Fragment("S", None, place, at=(q.chunk,)))

    def pv_float(self, acc: Fragment, p: Fragment, v: tuple[int, int], apart: int) -> Fragment:
        panel, place = self.parts_at(v[0], apart, "v", 64 * self.panels_v)
        assert p.kind == "P" and place == p.k and v[1] == apart, "P of one block, V of another"
        return self.fly(self.local.agent, Fragment("piece", None, place, at=panel))

    def add(self, acc: Fragment, product: Fragment) -> Fragment:
        done = self.at_rest(acc).at or ()
        assert self.at_rest(product).kind == "S" and acc.k in (None, product.k) and not set(done) & set(product.at), "a chunk twice"
        return Fragment("S", None, product.k, at=(*done, *product.at))

    def store_piece(self, acc: Fragment, address: int) -> None:
        words: Any = self.pause().block.words
        assert address not in words, "a half of S is overwritten before it is read"
        words[address] = self.at_rest(acc)

    def add_piece(self, acc: Fragment, address: int) -> Fragment:
        words: Any = self.pause().block.words
        return self.add(acc, words.pop(address))

    def score(self, a: Any, acc: Fragment, early: Any, *_: Any) -> Fragment:
        assert sorted(self.at_rest(acc).at) == list(range(self.needed)), "a score in part"
        return acc

    def add_columns(self, acc: Fragment, product: Fragment, first: int) -> Fragment:
        thread, slices = self.local.agent.thread, self.config.slices
        count = -(-self.panels_v // slices)
        panel = min((thread // 128 - 1) * count * (slices - 1) + first // 32, self.panels_v - 1)
        assert self.at_rest(product).kind == "piece" and product.at == panel, "columns of V in others of O"
        done = self.at_rest(acc).at or 0        # panels of the last block in acc.keys that are there; 0: all
        assert first == 32 * done, "a panel twice, or not at all"
        keys = acc.keys if done else (*acc.keys, product.k)
        assert keys[-1] == product.k
        return Fragment("O", Place(0, 0, 0), None, keys, at=(done + 1) % count)      # type: ignore[arg-type]

    def store_floats(self, acc: Fragment, address: int, other: int, by_column: int, inside: int, *more: Any) -> None:
        assert not acc.at, "a block in part"
        if more[1] > 0:         # there are columns
            self.store_rows(self.at_rest(acc), address, other, inside)

    def store_lse(self, a: Any, head: int, batch: int, q_start: int, seqlen_q: int, lane: int, row: int, lse0: float, lse1: float) -> None:
        place = batch, head, q_start + row
        assert place not in self.lse, "a row's lse is stored twice"
        self.lse[place] = lse0, lse1

    def names(self) -> dict[str, Any]:
        wgmma = SimpleNamespace(fence=nothing, commit=self.commit, k_major=lambda at: at, mn_major=lambda at, panel: (at, panel),
                                wait_all=self.landed(0), pv_parts=self.pv_float)
        products = SimpleNamespace(load_parts=self.load_parts, qk=self.qk_float, load_lines=self.load_lines, store_lines=self.store_lines)
        return super().names() | {
            "wgmma": wgmma, "wgmma_float": products, "copy16_if": nothing, "copy4_if": nothing,
            "cp_async": SimpleNamespace(wait_all=nothing),
            "add_columns": self.add_columns, "store_piece": self.store_piece, "add_piece": self.add_piece, "int64": int,
            "make_store_lse": lambda spec: self.store_lse, "quad_sum": lambda x: x}


def play(call: Call, seed: int, change: Any = None, mask: Any = None, **tuning: Any) -> PlayFloat:
    """A launch of all blocks; `change` edits the kernel's text first. mask: the elements of the call's mask."""
    spec, memory = make_spec(call.problem, call.operands, False), Memory()
    config = replace(choose_forward(spec), **tuning)
    tiles = packed.most_tiles(call, config.block_m)
    made = PlayFloat(config, call, tiles, seed)
    arguments = launch_float.float_forward_program(spec, config, True).arguments
    for x in (call.operands.cu_seqlens_q, call.operands.cu_seqlens_k):
        memory.allow(x)
    if mask is not None:
        call = with_bounds(call, mask, config.block_n, memory)
    with playing(made, memory) as machine, packed.table(call, config.block_m, machine.launcher(), 0) as table:
        kernel, _ = edited(forward_float.make_forward_float, change)(spec, config, True)
        own = *(() if config.split else ("k", "v")), table, tiles, packed.head_group(call)
        made.run(kernel, namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.bound(call)(call, own)))  # type: ignore[misc]
    return made


def check(made: PlayFloat, sequences: list[Sequence]) -> None:
    """Every 16 rows of a warp are stored once, by each warpgroup that has columns of them, and have attended to all their keys."""
    p, config = made.call.problem, made.config
    width = columns_of(make_spec(p, made.call.operands, False), config)
    stored = {(*divmod((address - OUT) // 4 // p.head_dim_v, p.num_heads), (address - OUT) // 4 % p.head_dim_v): keys
              for address, keys in made.rows.items()}
    for plane, q_start, seqlen_q, k_start, seqlen_k in sequences:
        for head, first in itertools.product(range(p.num_heads), range(0, seqlen_q, 16)):
            last = min(first + 16, seqlen_q)
            found = [stored.pop((plane * p.seqlen_q + q_start + first, head, column)) for column in range(0, p.head_dim_v, width)]
            assert len(set(found)) == 1, "columns of different keys"
            assert len(set(found[0])) == len(found[0]) and all(at.head == head // p.group and at.batch == plane for at in found[0])
            bounds = [row_bounds(row, seqlen_q, seqlen_k, p.mask.left, p.mask.right, p.mask.top_left) for row in range(first, last)]
            attended = {n for lo, hi in bounds for n in range(lo // config.block_n, -(-hi // config.block_n)) if lo < hi}
            assert attended <= {(at.row - k_start) / config.block_n for at in found[0]}
    assert not stored, "rows that nobody has"
