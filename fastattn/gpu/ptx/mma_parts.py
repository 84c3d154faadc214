"""mma.py's products of float32 operands, which are three bfloat16 parts each (parts.py).

In shared memory the panels of one part come after those of another. Each 16 x 16 piece of an operand is loaded once in each part and
used in all its products. High times high has an accumulator of its own and all smaller products share another: tensor
cores cut a sum off to float32, which costs less in a small one.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, literals, pack, unpack
from .mma import _loader, emit_ldmatrix, multiply
from .parts import PAIRS, PART_DTYPE, PARTS, SWAPPED

MOST_KEPT = 4               # pieces of A, of 12 registers each, that are loaded once for all columns of B
_Piece = list[list[Any]]     # the registers of each part


def _multiply_parts(builder: Any, large: list[Any], small: list[Any], a: _Piece, b: _Piece,
                    pairs: tuple[tuple[int, int], ...] = PAIRS) -> tuple[list[Any], list[Any]]:
    """(large, small) with the products of a 16 x 16 by a 16 x 8 piece added."""
    for part_a, part_b in pairs[:-1]:
        small = multiply(builder, PART_DTYPE, small, a[part_a], b[part_b])
    return multiply(builder, PART_DTYPE, large, a[0], b[0]), small


def _halves(piece: _Piece) -> tuple[_Piece, _Piece]:
    """Columns 0 to 7 and 8 to 15 of a B operand."""
    return [part[:2] for part in piece], [part[2:] for part in piece]


def _sum(builder: Any, first: list[Any], second: list[Any]) -> list[Any]:
    return [builder.fadd(x, y) for x, y in zip(first, second, strict=True)]


def _part_loader(builder: Any, address: Any, panel: int, panels: int, trans: bool = False) -> Callable[[int, int], _Piece]:
    """load(row16, column16): all parts of a piece of an operand in `panels` panels for each."""
    load = _loader(builder, address, panel, trans)
    return lambda row16, column16: [load(row16, column16 + 4 * panels * part) for part in range(PARTS)]


def _make_qk(pairs: tuple[tuple[int, int], ...]) -> Any:
    @intrinsic
    def qk(typingctx: Any, acc: Any, q: Any, k: Any, tiles: Any, depth: Any, q_panel: Any, k_panel: Any) -> Any:
        """acc + Q K^T over `depth` columns. q, k: this lane's shared addresses."""
        t, d, panel_q, panel_k = literals(tiles, depth, q_panel, k_panel)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            large, panels = unpack(builder, args[0], acc.count), -(-d // 64)
            small, count = [F32(0.0)] * acc.count, acc.count // t
            load_q, load_k = (_part_loader(builder, x, panel, panels) for x, panel in ((args[1], panel_q), (args[2], panel_k)))
            order = [(step, j) for step in range(d // 16) for j in range(count // 8)]
            coming = load_k(0, 0)
            for n, (step, j) in enumerate(order):
                if j == 0:
                    a = [load_q(tile, step) for tile in range(t)]
                b = coming
                if n + 1 < len(order):
                    after, k16 = order[n + 1]
                    coming = load_k(k16, after)
                for half, piece in enumerate(_halves(b)):
                    for tile in range(t):
                        at = tile * count + 8 * j + 4 * half
                        large[at:at + 4], small[at:at + 4] = _multiply_parts(
                            builder, large[at:at + 4], small[at:at + 4], a[tile], piece, pairs)
            return pack(builder, _sum(builder, large, small))
        return signature(acc, acc, types.int32, types.int32, tiles, depth, q_panel, k_panel), generate
    return qk


qk = _make_qk(SWAPPED)
kq = _make_qk(PAIRS)                        # K Q^T, with the bits of Q K^T. The other way round, a backward spills


def _add_products(builder: Any, acc: list[Any], tiles: int, steps: int, load_a: Callable[[int], list[_Piece]],
                  load_b: Callable[[int, int], _Piece]) -> list[Any]:
    """acc (tiles x 16 rows by N) + A B. Sums over `steps` begin at zero and are then added to acc, rounded to nearest."""
    count = len(acc) // tiles
    pieces = count // 8
    order = [(j, step) for j in range(pieces) for step in range(steps)]
    coming = load_b(0, 0)
    for n, (j, step) in enumerate(order):
        if step == 0:
            large, small = ([[F32(0.0)] * 4 for _ in range(2 * tiles)] for _ in range(2))
        b, a = coming, load_a(step)
        if n + 1 < len(order):
            after, behind = order[n + 1]
            coming = load_b(behind, after)
        for half, piece in enumerate(_halves(b)):
            for tile in range(tiles):
                own = half * tiles + tile
                large[own], small[own] = _multiply_parts(builder, large[own], small[own], a[tile], piece)
        if step == steps - 1:
            for half in range(2):
                for tile in range(tiles):
                    at, own = tile * count + 8 * j + 4 * half, half * tiles + tile
                    acc[at:at + 4] = _sum(builder, acc[at:at + 4], _sum(builder, large[own], small[own]))
    return acc


@intrinsic
def pv(typingctx: Any, acc: Any, p: Any, v: Any, tiles: Any, v_panel: Any) -> Any:
    """acc + P V. p: for each tile the registers of P's parts. v: this lane's shared address."""
    t, panel = literals(tiles, v_panel)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers, of_tile = unpack(builder, args[1], p.count), p.count // t
        each, panels = of_tile // PARTS, -(-acc.count // t // 32)
        load_v = _part_loader(builder, args[2], panel, panels, trans=True)

        def load_p(step: int) -> list[_Piece]:
            return [[registers[tile * of_tile + part * each + 4 * step:][:4] for part in range(PARTS)] for tile in range(t)]
        return pack(builder, _add_products(builder, unpack(builder, args[0], acc.count), t, each // 4, load_p, load_v))
    return signature(acc, acc, p, types.int32, tiles, v_panel), generate


def make_tiles_product(TRANS: bool, A_PART: int, B_PANELS: int) -> Any:
    """mma.make_tiles_product for float32. The parts of A are A_PART bytes apart, those of B have B_PANELS panels each."""
    @intrinsic
    def product(typingctx: Any, acc: Any, a: Any, b: Any, tiles: Any, depth: Any, line_bytes: Any, step16: Any, b_panel: Any) -> Any:
        t, d, line, step_b, panel = literals(tiles, depth, line_bytes, step16, b_panel)
        by_row, by_depth = (256, 2 * line) if TRANS else (2 * line, 256)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            load, steps = _part_loader(builder, args[2], panel, B_PANELS, trans=True), d // 16

            def load_a(step: int) -> list[_Piece]:
                return [[emit_ldmatrix(builder, args[1], tile * by_row + step * by_depth + part * A_PART, TRANS) for part in range(PARTS)]
                        for tile in range(t)]
            kept = [load_a(step) for step in range(steps)] if t * steps <= MOST_KEPT else []
            return pack(builder, _add_products(builder, unpack(builder, args[0], acc.count), t, steps,
                                               lambda step: kept[step] if kept else load_a(step), lambda step, j: load(step, j * step_b)))
        return signature(acc, acc, types.int32, types.int32, tiles, depth, line_bytes, step16, b_panel), generate
    return product
