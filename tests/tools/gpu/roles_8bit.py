"""The Hopper forward on 8-bit operands, played as roles.py plays the other one.

V comes transposed: a place in it is a row (block * panels + panel) * head_dim, which must belong to the keys of P. A sum has config.gather
blocks at most.
"""
from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fastattn.gpu.runtime import packed
from fastattn.gpu.sm90 import caches, forward_8bit, launch_8bit
from fastattn.gpu.sm90.config_8bit import choose_forward_8bit, row_bytes
from fastattn.gpu.spec import Call
from fastattn.masks import row_bounds
from tests.tools.gpu.calls import Sequence
from tests.tools.gpu.emulator import Memory
from tests.tools.gpu.roles import Fragment, Play, edited, playing

Key = namedtuple("Key", "row head batch")


class Play8(Play):
    """One launch. `starts`: of packed sequences, each one's first row in K and its first block in the transposed V."""

    modules = ("sm90.forward_8bit", "sm90.bounds", "sm90.epilogue", "sm90.records", "tile.ring", "tile.smem")

    def __init__(self, config: Any, dim: int, seed: int, starts: list[tuple[int, int]] | None = None) -> None:
        self.dim, self.row = dim, row_bytes(dim)
        self.panels = config.block_n // config.panel
        self.starts = starts
        bytes_of = {"q": config.block_m * self.row, "k": config.block_n * self.row, "v": dim * config.panel}
        super().__init__(config, dim, (0, 1), seed, config.consumers, {name: size // 128 for name, size in bytes_of.items()})

    def qk8(self, acc: Fragment, q: int, k: int, depth: int, q_rows: int, k_rows: int, add: int) -> Fragment:
        assert not add, "scores are not added"
        agent, panels = self.pause(), range(depth // self.row)
        rows = {self.read(agent, q + p * q_rows * self.row, 64 * self.row, p * self.row) for p in panels}
        keys = {self.read(agent, k + p * k_rows * self.row, k_rows * self.row, p * self.row) for p in panels}
        assert len(rows) == len(keys) == 1, "panels of several places"
        [(tensor_q, at_q)], [(tensor_k, at_k)] = rows, keys
        assert (tensor_q, tensor_k) == ("q", "k") and not acc.flying
        return self.fly(agent, Fragment("S", at_q, at_k))

    def blocks_of(self, key: Any) -> set[int]:
        """The block of the transposed V that holds the keys of a block of K; where a sequence has none, those of the sequences that begin
        there."""
        if self.starts is None:
            return {key.row // self.config.block_n}
        return {block + (key.row - row) // self.config.block_n for row, block in self.starts
                if row <= key.row and (key.row - row) % self.config.block_n == 0}

    def pv8(self, acc: Fragment, p: Fragment, v: int, rows: int, add: int) -> Fragment:
        before = self.at_rest(acc).keys if add else ()
        assert not add or acc.q == p.q, "a sum of other rows"
        assert len(before) < self.config.gather and not acc.flying, "a sum of more blocks"
        agent, size = self.pause(), rows * self.config.panel
        assert p.kind == "P" and rows == self.dim and p.k is not None
        for j in range(self.panels):
            tensor, place = self.read(agent, v + j * size, size, 0)
            assert tensor == "v" and (place.head, place.batch) == (p.k.head, p.k.batch)
            assert place.row in {(n * self.panels + j) * self.dim for n in self.blocks_of(p.k)}, "P of one block, V of another"
        return self.fly(agent, Fragment("sum", p.q, p.k, (*before, p.k)))

    def of_two(self, first: Fragment, second: Fragment) -> Fragment:
        """Two halves of the scores of one block."""
        assert self.at_rest(first) is self.at_rest(second)
        return first

    def add_columns(self, acc: Fragment, sums: Fragment, first: int) -> Fragment:
        assert self.at_rest(sums).kind == "sum" and self.at_rest(acc).q in (None, sums.q) and first == 0
        return Fragment("O", sums.q, None, (*acc.keys, *sums.keys))

    def store_bytes(self, acc: Fragment, address: int, other: int, inside: int, *_: Any) -> None:
        self.store_rows(self.to_half(acc), address, other, inside)

    def names(self) -> dict[str, Any]:
        def softmax(offset: int) -> tuple[Any, ...]:
            def probabilities(scale: float, acc: Fragment, *_: Any) -> tuple[Any, ...]:
                return self.at_rest(acc), self.random.choice((1.0, 1.0, 1.0, 1000.0)), 1.0

            def raised(scale: float, acc: Fragment, *_: Any) -> tuple[float, ...]:
                self.at_rest(acc)
                alpha = self.random.choice((1.0, 0.5))
                return 0.0, 0.0, alpha, alpha
            return raised, probabilities, lambda *_: (1.0, 0.0)
        products = SimpleNamespace(make_qk=lambda *_: self.qk8, make_pv=lambda *_: self.pv8, make_descriptor=lambda width: lambda at: at,
                                   to_e4m3=self.to_half)
        return super().names() | {"wgmma_8bit": products, "make_softmax_8bit": softmax, "add_columns": self.add_columns,
                                  "own_zeros": lambda n: Fragment("0"), "part": self.at_rest, "join": self.of_two,
                                  "load_f32": lambda address: 1.0, "store_bytes": self.store_bytes}


def play(call: Call, seed: int, change: Any = None, starts: list[tuple[int, int]] | None = None, **tuning: Any) -> Play8:
    """A launch of two blocks; `change` edits the kernel's text first."""
    cached = call.problem.cache is not None
    spec = replace(launch_8bit.spec_of(call), lengths=cached)
    config = replace(choose_forward_8bit(spec), **tuning)
    made, memory = Play8(config, spec.head_dim, seed, starts), Memory()
    arguments = launch_8bit.forward_program(spec, config, "float8_e4m3fn", "float8_e4m3fn").arguments
    for x in (call.operands.cu_seqlens_q, call.operands.cu_seqlens_k, call.operands.seqused_k):
        memory.allow(x)
    with playing(made, memory) as machine, packed.table(call, config.block_m, machine.launcher(), 0) as table:
        kernel, _ = edited(forward_8bit.make_forward_8bit, change)(spec, config, "float8_e4m3fn", "float8_e4m3fn")
        more = caches.lengths(call) if cached else ()
        tiles, heads_k = packed.most_tiles(call, config.block_m), call.problem.num_heads_k
        own = "q", "k", "v", "out", 4, table, tiles, packed.head_group(call), 0, heads_k, *more
        made.run(kernel, namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.bound(call)(call, own)))  # type: ignore[misc]
    assert not any(made.counters.values()), "the counter is not as it was found"
    return made


def check(made: Play8, call: Call, sequences: list[Sequence]) -> None:
    """Every 64 rows of a dense tensor, or whole tile of a packed one, are stored once and have attended to all their keys."""
    p, block_n, stored = call.problem, made.config.block_n, dict(made.stored)
    for plane, q_start, seqlen_q, k_start, seqlen_k in sequences:
        for head in range(p.num_heads):
            for first in range(0, seqlen_q, 64):
                last = min(first + 64, seqlen_q)
                found = [stored.pop((q_start + first, head, plane, column), None) for column in range(0, made.dim, 64)]
                if p.packed and last - first < 64:
                    assert found == [None] * len(found), "TMA would write the rows of the next sequence"
                    continue
                assert len(set(found)) == 1 and found[0] is not None, f"rows {first} to {last} of head {head}"
                assert len(set(found[0])) == len(found[0]) and all(k.head == head // p.group and k.batch == plane for k in found[0])
                bounds = [row_bounds(row, seqlen_q, seqlen_k, p.mask.left, p.mask.right, p.mask.top_left) for row in range(first, last)]
                attended = {n for lo, hi in bounds for n in range(lo // block_n, -(-hi // block_n)) if lo < hi}
                assert attended <= {(k.row - k_start) / block_n for k in found[0]}
    if p.packed:
        assert len(made.rows) >= sum(p.num_heads for _, _, n, _, _ in sequences if n % 64), "rows from registers"
    assert all(row >= p.seqlen_q and not p.packed for row, _, _, _ in stored)     # outside the tensor, where TMA drops them
