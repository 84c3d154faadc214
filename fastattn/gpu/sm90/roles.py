"""The roles of a thread block of the Hopper forward: which warpgroup loads, which ones compute, and how registers move between them."""
from __future__ import annotations

from typing import Any

from ..dsl.inline import inline
from ..ptx.sync import decrease_registers, increase_registers
from .config import ForwardSm90Config


def make_roles(config: ForwardSm90Config) -> tuple[int, int, Any, Any]:
    """(number of the producer's warpgroup, number of the first consumer's, give_registers(), take_registers()).

    A lone producer is one warp behind the consumers: setmaxnreg is for whole warpgroups, and there all warps have registers enough.
    """
    if not config.lone_producer:
        return 0, 1, decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)

    @inline
    def keep_registers():
        pass
    return config.consumers, 0, keep_registers, keep_registers
