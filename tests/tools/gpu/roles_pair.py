"""Neighbouring thread blocks as a cluster, played as roles.py plays one: its barrier, and what a block puts into another's shared
memory."""
from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tests.tools.gpu.roles import Block, Fragment, Play
from tests.tools.gpu.roles_backward import BackwardPlay

Far = tuple[Block, int]         # an address in a block of the cluster


class Clusters(Play):
    """Cluster instructions. `came` counts how often an agent has arrived at its cluster's barrier, `waited` how often it has waited."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.came: Counter[Any] = Counter()
        self.waited: Counter[Any] = Counter()

    def rank(self) -> int:
        return self.local.agent.block.index % 2

    def pair(self, block: Block) -> list[Block]:
        return [other for other in self.blocks if other.index // 2 == block.index // 2]

    def begun(self, block: Block, times: int = 1) -> bool:
        """Whether all agents of a block have arrived so often, or ended."""
        return all(agent.done or self.came[agent] >= times for agent in self.agents if agent.block is block)

    def arrive_together(self) -> None:
        agent = self.pause()
        assert self.came[agent] == self.waited[agent], "arrived twice in one round"
        self.came[agent] += 1

    def wait_together(self) -> None:
        agent = self.local.agent
        self.waited[agent] += 1
        times = self.waited[agent]
        assert times == self.came[agent], "waits before it has arrived"
        self.pause(lambda: all(self.begun(block, times) for block in self.pair(agent.block)))

    def address_in(self, address: int, rank: int) -> Far:
        assert 0 <= rank < 2
        return self.pair(self.local.agent.block)[rank], address

    def names(self) -> dict[str, Any]:
        return super().names() | {"cluster": SimpleNamespace(rank=self.rank, arrive=self.arrive_together, wait=self.wait_together,
                                                             address_in=self.address_in)}


class PairPlay(Clusters, BackwardPlay):
    """The backward where a head's two tiles of keys are a cluster. A stored dQ is of the keys of both."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.given: dict[Far, Fragment] = {}

    def give(self, acc: Fragment, to: Far) -> None:
        self.pause()
        assert self.begun(to[0]) and any(not agent.done for agent in self.agents if agent.block is to[0]), "the other block is not there"
        assert to not in self.given, "a piece over a piece"
        self.given[to] = self.at_rest(acc)

    def take(self, acc: Fragment, place: int) -> Fragment:
        """Zeros are there where the other block gives none: that of the last keys, under a causal mask."""
        block = self.pause().block
        if self.config.down and block.index % 2 == 0:
            zeros: Any = block.words.pop(place)
            assert zeros.kind == "0"
            return replace(self.at_rest(acc), k=(acc.k,))      # type: ignore[arg-type]
        given = self.given.pop((block, place))
        assert (given.q, given.at) == (self.at_rest(acc).q, acc.at) and given.k != acc.k, "dQ of other queries"
        return replace(acc, k=tuple(sorted((given.k, acc.k))))      # type: ignore[arg-type]

    def names(self) -> dict[str, Any]:
        return super().names() | {"send_piece": self.give, "add_piece": self.take}
