"""The roles of the Hopper forward played without a GPU: the kernel's own text, with a Python thread for lane 0 of each warp, in a random
order, while the copy engine takes as long as it likes.

Numbers are not computed. A fragment knows which rows of Q, K and V went into it, a place in shared memory what lies there and who still
reads it. So the protocol is checked: whoever reads a place that is not filled, fills one that is being read, multiplies P of one
block by V of another, uses an accumulator that a product still writes, or waits for ever, fails. Which rows see which keys comes from
problem.py; tables of packed sequences from the kernel that writes them (emulator.py).
"""
from __future__ import annotations

import inspect
import random
import threading
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from tests.tools.gpu.emulator import Index, Machine, Memory, emulated, int32, replaced

Place = namedtuple("Place", "row head batch")       # what a box of the copy engine begins with


@dataclass(eq=False)
class Fragment:
    """Registers of a warp: scores or probabilities of the rows `q` and the keys `k`, or an output over the blocks `keys`."""

    kind: str
    q: Place | None = None
    k: Place | None = None
    keys: tuple[Place, ...] = ()
    flying: bool = False
    at: Any = None      # of the backward: the place in lines of lse, delta and sums


@dataclass(eq=False)
class Panel:
    """Some bytes of shared memory; `what` is (tensor, first column, Place) once they are there."""

    start: int
    end: int
    what: Any = None


@dataclass(eq=False)
class Copy:
    """A box on its way into shared memory."""

    panel: Panel
    what: Any
    barrier: Barrier


@dataclass(eq=False)
class Barrier:
    """An mbarrier."""

    arrivals: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def change(self, arrived: int, came: int) -> None:
        self.pending, self.bytes = self.pending - arrived, self.bytes - came
        assert self.pending >= 0 and self.bytes >= 0, "more arrived at an mbarrier than it waits for"
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals


@dataclass(eq=False)
class Named:
    """A named barrier."""

    members: set[int] = field(default_factory=set)
    flag: int = 0
    result: int = 0
    round: int = 0


@dataclass(eq=False)
class Block:
    index: int
    barriers: dict[int, Barrier] = field(default_factory=dict)
    named: dict[Any, Named] = field(default_factory=dict)
    panels: list[Panel] = field(default_factory=list)
    words: dict[int, int] = field(default_factory=dict)
    reads: list[tuple[int, int, Any]] = field(default_factory=list)     # [start, end) of shared memory, and whose


@dataclass(eq=False)
class Agent:
    """Lane 0 of a warp."""

    thread: int
    block: Block
    ready: Callable[[], bool] = lambda: True
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: bool = False
    open: list[Any] = field(default_factory=list)               # reads and accumulators of the products since the last commit
    groups: list[list[Any]] = field(default_factory=list)


class Play:
    """One launch of a kernel made for `config`: `stored` has (tensor's row, head, plane, column) -> keys that went into it."""

    modules: tuple[str, ...] = ("sm90.forward", "sm90.bounds", "sm90.epilogue", "sm90.records", "sm90.roles", "sm90.seen", "tile.bias",
                                "tile.ring", "tile.smem")

    def __init__(self, config: Any, head_dim_v: int, blocks: tuple[int, ...], seed: int, consumers: int, boxes: dict[str, int],
                 parts: int = 1, producers: tuple[int, ...] = (0,)) -> None:
        self.config, self.panels_v, self.random, self.boxes = config, -(-head_dim_v // 64), random.Random(seed), boxes
        self.parts = parts          # of each operand, side by side
        self.haste = self.random.choice((0.0, 0.02, 0.3))       # of the copy engine; 0: a copy comes when nobody can go on without
        self.late = 1 << 30         # agents from this thread on go on only when no other can
        self.blocks = [Block(index) for index in blocks]
        self.first = 128            # thread of the consumers
        if getattr(config, "lone_producer", False):
            self.first, producers = 0, (128 * consumers,)
        threads = (*producers, *range(self.first, self.first + 128 * consumers, 32))
        self.agents = [Agent(thread, block) for block in self.blocks for thread in threads]
        self.copies: list[Copy] = []
        self.counters: Counter[int] = Counter()
        self.turn, self.error = threading.Semaphore(0), None
        self.local = threading.local()
        self.stored: dict[Any, tuple[Place, ...]] = {}
        self.rows: dict[tuple[int, int], tuple[Place, ...]] = {}        # stored from registers: address, warp's first

    # ------------------------------------------------------------ the order of things
    def run(self, kernel: Callable[[Any], None], arguments: Any) -> None:
        def play(agent: Agent) -> None:
            self.local.agent = agent
            agent.go.acquire()
            try:
                if self.error is None:
                    kernel(arguments)
                    assert not agent.groups and not agent.open, "products left"
            except BaseException as error:
                self.error = self.error or error
            agent.done = True
            self.turn.release()
        threads = [threading.Thread(target=play, args=(agent,), daemon=True) for agent in self.agents]
        for thread in threads:
            thread.start()
        while self.error is None and not all(agent.done for agent in self.agents):
            ready = [agent for agent in self.agents if not agent.done and agent.ready()]
            if not ready and not self.copies:
                self.error = AssertionError(f"all wait: {[agent.thread for agent in self.agents if not agent.done]}")
            elif self.copies and (not ready or self.random.random() < self.haste):
                self.arrive(self.copies.pop(self.random.randrange(len(self.copies))))
            else:
                self.wake(self.random.choice([agent for agent in ready if agent.thread < self.late] or ready))
        for agent in self.agents:
            if not agent.done:
                self.wake(agent)
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def wake(self, agent: Agent) -> None:
        agent.go.release()
        self.turn.acquire()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> Agent:
        """Others may go on; the agent does when it is `ready`."""
        agent: Agent = self.local.agent
        agent.ready = ready
        self.turn.release()
        agent.go.acquire()
        if self.error is not None:
            raise RuntimeError("another agent failed")
        return agent

    def arrive(self, copy: Copy) -> None:
        copy.panel.what = copy.what
        copy.barrier.change(0, copy.panel.end - copy.panel.start)

    # ------------------------------------------------------------ barriers
    def init(self, address: int, arrivals: int) -> None:
        self.local.agent.block.barriers[address] = Barrier(arrivals, arrivals)

    def arrive_at(self, address: int, expected: int = 0) -> None:
        barrier = self.pause().block.barriers[address]
        barrier.bytes += expected
        barrier.change(1, 0)

    def wait(self, address: int, parity: int) -> None:
        barrier = self.local.agent.block.barriers[address]
        self.pause(lambda: barrier.phase % 2 != parity)

    def meet(self, number: Any, threads: int, flag: int = 0, stay: bool = True) -> int:
        agent = self.pause()
        barrier = agent.block.named.setdefault(number, Named())
        assert agent.thread not in barrier.members, f"twice at barrier {number} in one round"
        barrier.members.add(agent.thread)
        barrier.flag |= flag
        before = barrier.round
        assert 32 * len(barrier.members) <= threads
        if 32 * len(barrier.members) == threads:
            barrier.result, barrier.flag, barrier.round = barrier.flag, 0, barrier.round + 1
            barrier.members.clear()
        if stay:
            self.pause(lambda: barrier.round > before)
        return barrier.result

    # ------------------------------------------------------------ the copy engine
    def load(self, to: int, tensor: str, barrier: int, column: int, row: int, head: int, batch: int, policy: Any = None) -> None:
        self.copy(to, 128 * self.boxes[tensor], (tensor, column, Place(row, head, batch)), barrier)

    def copy(self, to: int, size: int, what: Any, barrier: int) -> None:
        agent, end = self.pause(), to + size
        self.unread(agent.block, to, end)
        panel = next((p for p in agent.block.panels if p.start < end and to < p.end), None)
        if panel is None:
            panel = Panel(to, end)
            agent.block.panels.append(panel)
        assert (panel.start, panel.end) == (to, end) and all(copy.panel is not panel for copy in self.copies), "a copy over a copy"
        panel.what = None
        self.copies.append(Copy(panel, what, agent.block.barriers[barrier]))

    def store(self, tensor: str, place: int, column: int, row: int, head: int, batch: int, policy: Any = None) -> None:
        agent = self.pause()
        pieces = [agent.block.words[place + 2048 * warp] for warp in range(4)]
        assert all(piece == pieces[0] for piece in pieces), "parts of several tiles"
        panel, q, keys = pieces[0]
        assert panel * 64 == column and q == Place(row - (agent.thread - self.first) // 128 * 64, head, batch), "rows that belong elsewhere"
        self.keep(self.stored, (row, head, batch, column), keys)
        agent.block.reads.append((place, place + 8192, agent))

    def stores_read(self) -> None:
        agent = self.pause()
        agent.block.reads = [read for read in agent.block.reads if read[2] is not agent]

    def keep(self, where: dict[Any, Any], key: Any, keys: tuple[Place, ...]) -> None:
        assert key not in where, f"{key} is stored twice"
        where[key] = keys

    def unread(self, block: Block, start: int, end: int) -> None:
        assert not any(low < end and start < high for low, high, _ in block.reads), f"[{start}, {end}) is overwritten while it is read"

    def lies(self, block: Block, start: int, size: int) -> Any:
        panel = next((p for p in block.panels if p.start <= start and start + size <= p.end), None)
        assert panel is not None and panel.what is not None, f"[{start}, {start + size}) is read before it is there"
        return panel.what

    def read(self, agent: Agent, start: int, size: int, column: int) -> tuple[str, Place]:
        """What lies there, from now on read by the agent's open products."""
        tensor, first, place = self.lies(agent.block, start, size)
        assert first == column
        self.reads(agent, start, size)
        return tensor, place

    def reads(self, agent: Agent, start: int, size: int) -> None:
        reading = (start, start + size, object())
        agent.block.reads.append(reading)
        agent.open.append(reading)

    # ------------------------------------------------------------ products and fragments
    def qk(self, acc: Fragment, q: int, k: int, depth: int, q_rows: int, k_rows: int) -> Fragment:
        agent, panels = self.pause(), range(self.parts * -(-depth // 64))
        rows = {self.read(agent, q + p * q_rows * 128, 64 * 128, p * 64) for p in panels}
        keys = {self.read(agent, k + p * k_rows * 128, k_rows * 128, p * 64) for p in panels}
        assert len(rows) == len(keys) == 1, "panels of several places"
        [(tensor_q, at_q)], [(tensor_k, at_k)] = rows, keys
        assert (tensor_q, tensor_k) == ("q", "k") and not acc.flying
        return self.fly(agent, Fragment("S", at_q, at_k))

    def pv(self, acc: Fragment, p: Fragment, v: tuple[int, int]) -> Fragment:
        agent, (at, panel) = self.pause(), v
        # warpgroups have all columns, or a slice each
        count = self.panels_v if self.config.slices == 1 else -(-self.panels_v // self.config.slices)
        first = 0 if self.config.slices == 1 else (agent.thread - self.first) // 128 * count
        values = {self.read(agent, at + j * panel, self.config.block_n * 128, (first + j) * 64) for j in range(self.parts * count)}
        assert values == {("v", p.k)} and p.kind == "P", "P of one block, V of another"
        assert not acc.flying and acc.q in (None, p.q), "an output of other rows"
        return self.fly(agent, Fragment("O", p.q, None, (*acc.keys, p.k)))      # type: ignore[arg-type]

    def fly(self, agent: Agent, acc: Fragment) -> Fragment:
        acc.flying = True
        agent.open.append(acc)
        return acc

    def commit(self) -> None:
        agent = self.pause()
        agent.groups.append(agent.open)
        agent.open = []

    def landed(self, pending: int) -> Callable[[Fragment], Fragment]:
        def wait(acc: Fragment) -> Fragment:
            agent = self.pause()
            while len(agent.groups) > pending:
                for one in agent.groups.pop(0):
                    if isinstance(one, Fragment):
                        one.flying = False
                    else:
                        agent.block.reads.remove(one)
            return self.at_rest(acc)
        return wait

    def at_rest(self, acc: Fragment, *_: Any) -> Fragment:
        assert not acc.flying, "a product still writes these registers"
        return acc

    def score(self, a: Any, acc: Fragment, early: tuple[int, int], *_: Any) -> Fragment:
        """Reads a bias that lies in shared memory: its panels of these rows and keys."""
        self.at_rest(acc)
        if early[0]:
            agent, rows = self.pause(), early[0] // 128 * 128
            found = [self.lies(agent.block, rows + p * 128 * self.boxes["bias"], 2048) for p in range(-(-self.config.block_n // 64))]
            assert acc.q is not None and acc.k is not None
            assert found == [("bias", acc.k.row + 64 * p, acc.q) for p in range(len(found))], "the bias of other scores"
        return acc

    def hide(self, acc: Fragment, a: Any, shared: Any, batch: int, head: int, row: int, column: int) -> Fragment:
        """The mask_mod of a dense call is asked about the keys whose scores these are."""
        if "bitmap" in a._fields:
            assert acc.q is not None and acc.k is not None and (acc.k.row, acc.q.head, acc.q.batch) == (column, head, batch)
        return self.at_rest(acc)

    def to_half(self, acc: Fragment) -> Fragment:
        return replace(self.at_rest(acc), kind={"S": "P"}.get(acc.kind, acc.kind))

    def store_panels(self, packed: Fragment, place: int, _: int, panel_bytes: int, count: int, first: int) -> None:
        agent = self.pause()
        for p in range(count):
            start = place + p * panel_bytes
            self.unread(agent.block, start, start + 2048)
            agent.block.words[start] = (first + p, packed.q, packed.keys)       # type: ignore[assignment]

    def store_rows(self, packed: Fragment, address: int, other: int, inside: int, *_: Any) -> None:
        if inside:
            self.keep(self.rows, address, packed.keys)

    def store_floats(self, acc: Fragment, address: int, other: int, by_column: int, inside: int, *_: Any) -> None:
        self.store_rows(self.at_rest(acc), address, other, inside)

    def add(self, acc: Fragment, product: Fragment) -> Fragment:
        assert acc.q in (None, product.q), "an output of other rows"
        return replace(self.at_rest(product), keys=(*self.at_rest(acc).keys, *product.keys))

    def clear(self, address: int) -> None:
        agent = self.pause()
        self.unread(agent.block, address, address + 16)
        assert any(p.start <= address < p.end and p.what for p in agent.block.panels), "cleared before it is there"

    # ------------------------------------------------------------ what stands for the names that the kernel imports
    def names(self) -> dict[str, Any]:
        def count(address: int, more: int) -> int:
            self.pause()
            self.counters[address] += more
            return self.counters[address] - more

        def wrap(address: int, limit: int) -> int:
            old = count(address, 1)
            self.counters[address] = 0 if old >= limit else old + 1
            return old

        def put(address: int, value: int) -> None:
            self.pause().block.words[address] = value

        def softmax(spec: Any) -> tuple[Any, ...]:
            def update(a: Any, acc: Fragment, *_: Any) -> tuple[Any, ...]:
                alpha = self.random.choice((1.0, 0.5))
                return self.at_rest(acc), 0.0, 0.0, 1.0, 1.0, alpha, alpha

            def optimistic(a: Any, acc: Fragment, *_: Any) -> tuple[Any, ...]:
                return self.at_rest(acc), 1.0, 1.0, int(self.random.random() < 0.1)
            return update, optimistic, lambda *_: (1.0, 1.0, 0.0, 0.0)
        cuda = SimpleNamespace(
            threadIdx=Index(lambda: self.local.agent.thread), blockIdx=Index(lambda: self.local.agent.block.index),
            gridDim=SimpleNamespace(x=len(self.blocks)), shared=SimpleNamespace(array=nothing), syncwarp=nothing,
            syncthreads=lambda: self.meet("all", 32 * (len(self.agents) // len(self.blocks))))
        mbarrier = SimpleNamespace(init=self.init, fence_init=nothing, arrive=self.arrive_at, arrive_expect=self.arrive_at, wait=self.wait)
        tma = SimpleNamespace(load=self.load, load_hinted=self.load, store=self.store, store_hinted=self.store, prefetch=nothing,
                              prefetch_hinted=nothing, evict_first=nothing, evict_last=nothing, commit=nothing,
                              wait_read=self.stores_read, wait_all=self.stores_read)
        wgmma = SimpleNamespace(make_products=lambda dtype: (self.qk, self.pv), fence=nothing, commit=self.commit,
                                k_major=lambda at: at, mn_major=lambda at, panel: (at, panel), wait_all=self.landed(0),
                                wait_all_but_one=self.landed(1))
        same = self.at_rest
        return {
            "cuda": cuda, "mbarrier": mbarrier, "tma": tma, "wgmma": wgmma, "inline": lambda f: f, "divide": lambda x, y: x // y,
            "int32": int32, "float32": float, "uint64": int, "uint8": None, "opaque": lambda x: x, "uniform": lambda x: x, "any_lane": int,
            "any_thread": self.meet, "barrier": self.meet, "barrier_arrive": lambda number, threads: self.meet(number, threads, stay=False),
            "take_turn": nothing, "wait_for_previous": nothing,
            "fence_async": nothing, "fence_gpu": nothing, "store_f32": nothing, "increase_registers": lambda n: nothing,
            "decrease_registers": lambda n: nothing, "atomic_add_b32": count, "atomic_inc_wrap": wrap, "shared_address": lambda array: 0,
            "store_b32": self.counters.__setitem__, "store_shared_b32": put, "store_shared_zero16": self.clear,
            "load_shared_b32": lambda address: self.pause().block.words[address], "zeros": lambda n: Fragment("0"),
            "make_pack": lambda dtype: self.to_half, "scale_rows": same, "scale_seen_rows": same,
            "make_keep": lambda spec: same, "store_panels": self.store_panels, "store_rows": self.store_rows,
            "store_whole_rows": self.store_rows, "store_floats": self.store_floats, "add": self.add, "make_softmax": softmax,
            "make_score": lambda *_, **__: (lambda *_: 0.0, lambda *_: (0, 0), self.score), "thread_index": lambda: self.local.agent.thread,
            "lane_row": lambda lane: lane >> 2, "thread_row": lambda thread, lane: (thread >> 5) * 16 + (lane >> 2),
            "thread_col": lambda thread: 2 * (thread & 3), "make_unpack": nothing, "make_hide": lambda *_: (lambda *_: 0, self.hide),
            "make_dropout": lambda spec, n, **_: (nothing, lambda *_: None, lambda a, acc, words: self.at_rest(acc))}


def edited(make: Any, change: tuple[str, str] | None) -> Any:
    """The function that makes a kernel, with one place of its text changed; inside `playing`, because it sees the names as they are now."""
    if change is None:
        return make
    text = inspect.getsource(make)
    if text.count(change[0]) != 1:      # not an AssertionError, which is what a fault raises
        raise ValueError(f"the kernel's text has {text.count(change[0])} times {change[0]!r}")
    scope = dict(make.__globals__)
    exec(compile("from __future__ import annotations\n" + text.replace(*change), "changed", "exec"), scope)
    return scope[make.__name__]


def nothing(*_: Any) -> None:
    pass


@contextmanager
def playing(play: Play, memory: Memory) -> Iterator[Machine]:
    """Inside, the modules of the Hopper forward use the play's instructions, those of the schedule the emulator's."""
    with emulated(memory) as machine, replaced((*play.modules, "tile.rescale"), play.names()):
        yield machine
