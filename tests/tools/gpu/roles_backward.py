"""The roles of the Hopper backward, played as roles.py plays the forward's: also dS, which both warpgroups store and read, and the
pieces of dQ, which the copy engine adds to memory."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastattn.gpu.tile import mask
from tests.tools.gpu.roles import Fragment, Place, Play, nothing

PIECE, DS_PANEL = 4096, 128 * 128


class BackwardPlay(Play):
    """`sums`: (address, keys) -> rows of 8 columns of dQ. `results` of a warp: kind, pointer, first key, end and the rows of Q in it.
    `stored`: (pointer, row) of dQ that is stored as it is -> rows of Q and keys."""

    modules: tuple[str, ...] = ("sm90.backward", "sm90.consumer", "sm90.dq_sums", "sm90.key_gradients", "sm90.mmas", "sm90.seen_queries",
                                "tile.bias", "tile.gradients", "tile.ring", "tile.smem", "rows.preprocess")

    def __init__(self, config: Any, block: int, seed: int, dims: tuple[int, int] | None = None, consumers: int | None = None,
                 boxes: dict[str, int] | None = None) -> None:
        self.dim, self.dim_v = dims or (config.dim, config.dim_v)
        boxes = boxes or {"q": config.block_m, "dout": config.block_m, "k": 128, "v": 128, "bias": config.block_m}
        split = getattr(config, "split", False)
        blocks = (block, block + 1) if getattr(config, "pair", False) else (block,)
        super().__init__(config, self.dim_v, blocks, seed, consumers or 2 + split, boxes)
        if split:               # else dQ's warpgroup, which does little, is never behind
            self.late = self.random.choice((128 * 3, 1 << 30))
        self.readers: dict[int, set[int]] = {}      # of a bias: its place -> the warps that have read their part
        self.sums: dict[Any, Place] = {}
        self.results: list[tuple[str, int, int, int, tuple[Place, ...]]] = []

    def load_rows(self, to: int, tensor: str, barrier: int, row: int, line: int) -> None:
        self.copy(to, 4 * self.config.block_m, (tensor, line, row), barrier)

    def load_columns(self, address: int, count: int) -> Any:
        _, line, row = self.lies(self.pause().block, address, 4)
        return line, row

    def any_far(self, place: int) -> int:
        """No row is far; but its lse must have arrived."""
        _, line, _ = self.lies(self.pause().block, place, 4)
        assert line == 0
        return 0

    # ------------------------------------------------------------ a bias, in the place of dS
    def copy(self, to: int, size: int, what: Any, barrier: int) -> None:
        """dS that a bias is copied over is no longer there."""
        super().copy(to, size, what, barrier)
        if what[0] == "bias":
            words = self.local.agent.block.words
            for place in [place for place in words if to <= place < to + size]:
                del words[place]

    def score(self, a: Any, acc: Fragment, early: tuple[int, int], *_: Any) -> Fragment:
        self.at_rest(acc)
        if early[0]:
            agent, place = self.pause(), early[0] // 128 * 128
            panel, size = (agent.thread - 128) // 128, 128 * self.config.block_m
            assert acc.k is not None
            assert self.lies(agent.block, place, size) == ("bias", acc.k.row + 64 * panel, acc.q), "the bias of other scores"
            self.readers.setdefault(place - panel * size, set()).add(agent.thread)
        return acc

    def take_bias(self, agent: Any, place: int) -> None:
        """The bias where dS is stored has been read by all warps; the first dS that lies there ends it."""
        for tile, readers in self.readers.items():
            if tile <= place < tile + 256 * self.config.block_m and readers:
                assert len(readers) >= 8, "dS over a bias that is still to be read"
                if agent.thread in readers:
                    readers.add(-agent.thread)
                if sum(reader < 0 for reader in readers) == 8:
                    readers.clear()

    # ------------------------------------------------------------ products
    def qk(self, acc: Fragment, a: int, b: int, depth: int, a_rows: int, b_rows: int) -> Fragment:
        agent, panels = self.pause(), range(-(-depth // 64))
        own = {self.read(agent, a + p * a_rows * 128, 64 * 128, p * 64) for p in panels}
        other = {self.read(agent, b + p * b_rows * 128, b_rows * 128, p * 64) for p in panels}
        assert len(own) == len(other) == 1 and not acc.flying, "panels of several places"
        [(keys, at_k)], [(rows, at_q)] = own, other
        assert (keys, rows, depth) in (("k", "q", self.dim), ("v", "dout", self.dim_v))
        return self.fly(agent, Fragment("S" if keys == "k" else "dP", at_q, at_k))

    def pv(self, acc: Fragment, p: Fragment, b: tuple[int, int]) -> Fragment:
        agent = self.pause()
        assert p.kind == "P" and self.panels_of(agent, b, self.dim_v) == {("dout", p.q)}, "P of one block, dO of another"
        return self.grow(agent, "dV", acc, p)

    def dsq(self, acc: Fragment, a: int, b: tuple[int, int], depth: int, a_rows: int) -> Fragment:
        agent = self.pause()
        ds = self.stored_ds(agent, [a + p * DS_PANEL + 2048 * i for p in range(depth // 64) for i in range(4)])
        assert self.panels_of(agent, b, self.dim) == {("q", ds.q)}, "dS of one block, Q of another"
        return self.grow(agent, "dK", acc, ds)

    def dsk(self, acc: Fragment, a: tuple[int, int], b: tuple[int, int], depth: int) -> Fragment:
        agent = self.pause()
        ds = self.stored_ds(agent, [a[0] + 2048 * i for i in range(8)])
        start = b[0] & -128
        tensor, column, place = self.lies(agent.block, start, depth * 128)
        self.reads(agent, start, depth * 128)
        assert (tensor, place) == ("k", ds.k) and not acc.flying
        return self.fly(agent, Fragment("dQ", ds.q, ds.k, at=(ds.at, column + (b[0] - start) // 2)))

    def panels_of(self, agent: Any, b: tuple[int, int], dim: int, first: int = 0) -> set[Any]:
        rows = self.config.block_m
        return {self.read(agent, b[0] + p * b[1], rows * 128, first + p * 64) for p in range(-(-dim // 64))}

    def stored_ds(self, agent: Any, pieces: list[int]) -> Fragment:
        found = [agent.block.words.get(piece) for piece in pieces]
        for piece in pieces:
            self.reads(agent, piece, 2048)
        assert None not in found and len({(ds.q, ds.k, ds.at) for ds in found}) == 1, "dS of several blocks"    # type: ignore[union-attr]
        return found[0]     # type: ignore[return-value]

    def grow(self, agent: Any, kind: str, acc: Fragment, by: Fragment) -> Fragment:
        assert not acc.flying and acc.k in (None, by.k), "sums of other keys"
        return self.fly(agent, Fragment(kind, None, by.k, (*acc.keys, by.q)))       # type: ignore[arg-type]

    # ------------------------------------------------------------ what is made of them
    def exponentials(self, acc: Fragment, scale: float, columns: Any) -> Fragment:
        assert columns[0] == 0 and acc.at in (None, columns[1]), "lse of several blocks"
        return replace(self.at_rest(acc), at=columns[1])

    def joined(self, left: Fragment, right: Fragment) -> Fragment:
        assert (left.q, left.k, left.at) == (right.q, right.k, right.at)
        return left

    def gradient(self, a: Any, p: Fragment, dp: Fragment, columns: Any) -> Fragment:
        self.at_rest(dp)
        assert (p.q, p.k, p.at) == (dp.q, dp.k, columns[1]) and columns[0] == 1 and dp.kind == "dP", "P, dP and delta of several blocks"
        return Fragment("dS", p.q, p.k, at=p.at)

    def store_panels(self, packed: Fragment, place: int, _: int, panel_bytes: int, count: int, first: int) -> None:
        agent = self.pause()
        for p in range(count):
            start = place + p * panel_bytes
            self.unread(agent.block, start, start + 2048)
            self.take_bias(agent, start)
            agent.block.words[start] = packed       # type: ignore[assignment]

    def store_piece(self, acc: Fragment, place: int) -> None:
        agent = self.pause()
        self.unread(agent.block, place, place + PIECE)
        agent.block.words[place] = self.at_rest(acc)        # type: ignore[assignment]

    def add_piece(self, flag: int, address: int, place: int, size: int) -> None:
        agent = self.pause()
        if flag:
            piece: Any = agent.block.words[place]
            first, column = piece.at
            band, rest = divmod(address, 64 * self.dim)      # 16 rows of float32
            own = (agent.thread // 32 - 4) % (self.config.block_m // 16)
            owned = (own, own + 4) if self.config.split else (own,)
            assert band - first // 16 in owned and rest == 64 * column, "sums of other rows or columns"
            for group in range(address, address + size, 512):
                assert (group, piece.k) not in self.sums, "added twice"
                self.sums[group, piece.k] = piece.q
            agent.block.reads.append((place, place + size, agent))

    def pieces_read(self) -> None:
        """The copy engine has read all of the agent's pieces but the last."""
        agent = self.pause()
        reads = [reading for reading in agent.block.reads if reading[2] is agent]
        for reading in reads[:-1]:
            agent.block.reads.remove(reading)

    def names(self) -> dict[str, Any]:
        names = super().names()
        vars(names["tma"]).update(load_rows=self.load_rows, reduce_add_f32_if=self.add_piece, prefetch_map=nothing,
                                  wait_read_but_one=self.pieces_read)
        names["wgmma"].make_grad_products = lambda dtype: (self.dsk, self.dsq)

        def bounds(spec: Any, block_m: int) -> tuple[Any, ...]:
            key_bounds, limits_of, _, alibi_from = mask.make_key_bounds(spec, block_m)
            return key_bounds, limits_of, self.at_rest, alibi_from

        def put(acc: Fragment, pointer: int, by_row: int, dim: int, lane: int, key: int, used: int, end: int) -> None:
            if acc.kind == "dQ":
                if key < end:
                    assert (pointer, key) not in self.stored, "stored twice"
                    self.stored[pointer, key] = self.at_rest(acc).q, acc.k     # type: ignore[assignment]
                return
            self.results.append((self.at_rest(acc).kind, pointer, key, end, acc.keys))

        def first(spec: Any, *_: Any) -> Callable[..., Any]:
            return lambda a, acc, *_: self.at_rest(acc)
        return names | {
            "int64": int, "thread_index": lambda: self.local.agent.thread, "warp": nothing, "make_key_bounds": bounds,
            "make_store": lambda *_: put, "make_add_dbias": first, "part": lambda acc, *_: self.at_rest(acc), "join": self.joined,
            "make_cap_of": lambda spec: lambda a, acc: (self.at_rest(acc), None), "make_slopes": lambda spec: lambda x: x,
            "make_hide": lambda *_: (nothing, self.at_rest),
            "multiply": lambda acc, other: self.at_rest(acc), "load_columns": self.load_columns, "exp2_columns": self.exponentials,
            "make_dropout_transposed": lambda *_: (nothing, nothing, lambda a, p, words: p, self.to_half, self.gradient),
            "make_grad_rounded": lambda dtype: lambda p, dp, columns: self.gradient(None, p, dp, columns),
            "store_panels": self.store_panels, "store_piece": self.store_piece,
            "make_any_far": lambda *_: self.any_far, "make_near": lambda *_: (first(None), nothing), "make_log2_scale": lambda *_: nothing,
            "own_zeros": lambda n: Fragment("0"), "load_b32": lambda address: address}      # a.far is the word itself
