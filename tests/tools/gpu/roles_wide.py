"""The roles of the Hopper kernels for dK alone and dV alone, played as roles_backward.py plays the one for both.

Of packed sequences also the rows past the end, which the producer clears before a product reads them.
"""
from __future__ import annotations

from collections import namedtuple
from typing import Any

from fastattn.gpu.rows.launch import padded_rows
from fastattn.gpu.runtime import packed
from fastattn.gpu.sm90 import backward_wide
from fastattn.gpu.sm90.config import slice_dim
from fastattn.gpu.sm90.launch import wide_program
from fastattn.gpu.spec import BackwardCall, Spec
from tests.tools.gpu.calls import Sequence
from tests.tools.gpu.emulator import Memory
from tests.tools.gpu.roles import Block, Fragment, Panel, edited, playing
from tests.tools.gpu.roles_backward import BackwardPlay


class WidePlay(BackwardPlay):
    """`sequences`: of a packed call, else none."""

    modules = ("sm90.backward_wide", "sm90.consumer", "tile.gradients", "tile.ring", "tile.smem", "rows.preprocess")

    def __init__(self, spec: Spec, config: Any, sequences: list[Sequence], block: int, seed: int) -> None:
        boxes = {"q": config.block_m, "dout": config.block_m, "k": config.block_n, "v": config.block_n}
        super().__init__(config, block, seed, dims=(spec.head_dim, spec.head_dim_v), consumers=config.consumers, boxes=boxes)
        self.ends = [(q_start, q_start + seqlen_q) for _, q_start, seqlen_q, _, _ in sequences]
        self.cleared = set[Panel]()

    # ------------------------------------------------------------ rows past a sequence's end
    def copy(self, to: int, size: int, what: Any, barrier: int) -> None:
        super().copy(to, size, what, barrier)
        self.cleared -= {self.copies[-1].panel}

    def clear(self, address: int) -> None:
        super().clear(address)
        self.cleared |= {p for p in self.local.agent.block.panels if p.start <= address < p.end}

    def lies(self, block: Block, start: int, size: int) -> Any:
        what = super().lies(block, start, size)
        if what[0] in ("q", "dout"):
            first, panel = what[2].row, next(p for p in block.panels if p.start <= start < p.end)
            tail = any(begin <= first < end < first + self.config.block_m for begin, end in self.ends)
            assert panel in self.cleared or not tail, "rows of another sequence"
        return what

    # ------------------------------------------------------------ products
    def pv(self, acc: Fragment, p: Fragment, b: tuple[int, int]) -> Fragment:
        """The columns of the warpgroup's slice."""
        agent = self.pause()
        kind, tensor, dim = ("dV", "dout", self.dim_v) if p.kind == "P" else ("dK", "q", self.dim)
        columns = slice_dim(dim, self.config.slices)
        first = 0 if self.config.slices == 1 else (agent.thread // 128 - 1) * columns
        assert self.panels_of(agent, b, columns, first) == {(tensor, p.q)}, "P or dS of one block, dO or Q of another"
        return self.grow(agent, kind, acc, p)

    def names(self) -> dict[str, Any]:
        names = super().names()
        vars(names["wgmma"]).update(wait=self.landed)
        return names | {"zeros_packed": lambda n: Fragment("0"), "make_unpack": lambda *_: lambda x: x}


def play(call: BackwardCall, spec: Spec, config: Any, seed: int, sequences: list[Sequence], change: Any = None) -> list[WidePlay]:
    """A launch, block by block; `change` edits the kernel's text first."""
    memory, made, p = Memory(), list[WidePlay](), call.problem
    arguments, ends = wide_program(spec, config, True).arguments, sequences if p.packed else []
    for x in (call.operands.cu_seqlens_q, call.operands.cu_seqlens_k):
        memory.allow(x)
    with (playing(WidePlay(spec, config, ends, 0, seed), memory) as machine,
          packed.table(call, config.block_n, machine.launcher(), 0, True) as table):
        tiles = packed.most_tiles(call, config.block_n, True)
        own = ("q", "k", "v", "dout", "rows", 0, padded_rows(call), table, tiles, packed.head_group(call, True), p.num_heads_k, 1.0,
               0, 0, 0, 0)
        values = namedtuple("Arguments", [name for name, _ in arguments.fields])(*arguments.values(call, own))  # type: ignore[misc]
        for block in range(tiles):
            made.append(WidePlay(spec, config, ends, block, seed * 100 + block))
            with playing(made[-1], memory):
                kernel, _ = edited(backward_wide.make_wide, change)(spec, config)
                made[-1].run(kernel, values)
    return made
