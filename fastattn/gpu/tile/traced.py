"""score_mod and mask_mod on fragments of the tensor cores (fragments.py says which rows and columns a thread has).

What is the same for a query is computed for each of the thread's queries, what is the same for a key for each of its keys, the rest for
every element. `row` and `col` are the thread's first query and key. TRANSPOSED: rows of the fragment are keys, its columns queries.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import float32, int32
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ...flex.lower import lower
from ...flex.program import Program
from ..dsl.asm import F32, I1, I32, pack, unpack
from ..dsl.inline import Compiled, inline
from ..flex.derived import with_rate
from ..flex.distance import by_distance
from ..flex.staged import Staged
from ..ptx.arith import emit_pack_half
from ..spec import Spec
from ..traced import MASK, SCORE
from .fragments import NEG_INF, col_of, row_of


class _Places:
    """The values of a fragment's elements: emitted when they are asked for, in the order of registers."""

    def __init__(self, p: Staged, a: Any, tile: Any, TRANSPOSED: bool) -> None:
        i, x, functions = types.int32, types.float32, p.functions
        self.transposed = TRANSPOSED
        self.rows = Compiled(functions["row"], (a, tile, i, i, i, x))
        self.columns = Compiled(functions["column"], (a, tile, i, i, i, x))
        self.distances = p.distances
        given = (a, tile, self.rows.result, self.columns.result, i, i, i, i, x, x, *((i, x) if p.distances else ()))
        self.element = Compiled(functions["element"], given)

    def each(self, builder: Any, registers: list[Any], given: list[Any], some: Sequence[int] | None = None) -> Any:
        """(register, value, outputs) of each element, or of some of them. given: a, tile, batch, head, row, col, scale."""
        a, tile, batch, head, row, col, scale = given
        known: dict[tuple[str, int], Any] = {}
        behind = builder.sub(row, col)
        apart = builder.sitofp(behind, F32) if self.distances else None
        for k in range(len(registers)) if some is None else some:
            x = registers[k]
            q_at, k_at = (col_of(k), row_of(k)) if self.transposed else (row_of(k), col_of(k))
            q, key = builder.add(row, I32(q_at)), builder.add(col, I32(k_at))
            if ("q", q_at) not in known:
                known["q", q_at] = self.rows.call(builder, [a, tile, batch, head, q, scale])
            if ("k", k_at) not in known:
                known["k", k_at] = self.columns.call(builder, [a, tile, batch, head, key, scale])
            values = [a, tile, known["q", q_at], known["k", k_at], batch, head, q, key, x, scale]
            if self.distances:      # nsw: a comparison with a constant takes in the element's
                values += [builder.add(behind, I32(q_at - k_at), flags=("nsw",)), builder.fadd(apart, F32(float(q_at - k_at)))]
            out = self.element.call(builder, values)
            yield k, x, unpack(builder, out, len(self.element.result))


def make_modify(p: Program, TRANSPOSED: bool) -> tuple[Any, Any]:
    """(prepare, modify) of a lowered score_mod: acc_s = modify(acc_s, a, tile, batch, head, row, col, scale)."""
    staged = Staged(p, SCORE)

    @intrinsic
    def modify(typingctx: Any, acc: Any, a: Any, tile: Any, batch: Any, head: Any, row: Any, col: Any, scale: Any) -> Any:
        i, places = types.int32, _Places(staged, a, tile, TRANSPOSED)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = unpack(builder, args[0], acc.count)
            return pack(builder, [out[0] for _, _, out in places.each(builder, registers, list(args[1:]))])
        return signature(acc, acc, a, tile, i, i, i, i, types.float32), generate
    return inline(staged.functions["tile"]), modify


def make_modify_rated(p: Program, TRANSPOSED: bool, dtype: str) -> tuple[Any, Any]:
    """(prepare, modify) of a lowered score_mod with its derivative: acc_s, rate = modify(acc_s, a, ...), rates in `dtype`, two a word."""
    staged = Staged(p, SCORE)

    @intrinsic
    def modify(typingctx: Any, acc: Any, a: Any, tile: Any, batch: Any, head: Any, row: Any, col: Any, scale: Any) -> Any:
        i, places = types.int32, _Places(staged, a, tile, TRANSPOSED)
        result = types.Tuple((acc, types.UniTuple(types.int32, acc.count // 2)))

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = unpack(builder, args[0], acc.count)
            scores, rates = list[Any](), list[Any]()
            for _, _, (s, rate) in places.each(builder, registers, list(args[1:])):
                scores.append(s)
                rates.append(rate)
            words = [emit_pack_half(builder, rates[k], rates[k + 1], dtype) for k in range(0, len(rates), 2)]
            return context.make_tuple(builder, result, (pack(builder, scores), pack(builder, words)))
        return signature(result, acc, a, tile, i, i, i, i, types.float32), generate
    return inline(staged.functions["tile"]), modify


def _hidden(builder: Any, score: Any, seen: Any) -> Any:
    """The score, or -inf."""
    return builder.select(seen if seen.type == I1 else builder.trunc(seen, ir.IntType(1)), score, NEG_INF)


def make_hide(p: Program | None, TRANSPOSED: bool = False) -> tuple[Any, Any]:
    """(prepare, hide) of a mask_mod: acc_s = hide(acc_s, a, tile, batch, head, row, col), -inf where it is false; tile = prepare(a, batch,
    head). Without one, scores stay."""
    if p is None:
        @inline
        def prepare_nothing(a, batch, head):
            return int32(0)

        @inline
        def all_seen(acc_s, a, tile, batch, head, row, col):
            return acc_s
        return prepare_nothing, all_seen
    staged = Staged(by_distance(lower(p)), MASK)
    tile_values = inline(staged.functions["tile"])

    @inline
    def prepare(a, batch, head):
        return tile_values(a, batch, head, float32(1))

    @intrinsic
    def hide_each(typingctx: Any, acc: Any, a: Any, tile: Any, batch: Any, head: Any, row: Any, col: Any, scale: Any) -> Any:
        i, places = types.int32, _Places(staged, a, tile, TRANSPOSED)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = unpack(builder, args[0], acc.count)
            return pack(builder, [_hidden(builder, x, seen) for _, x, (seen,) in places.each(builder, registers, list(args[1:]))])
        return signature(acc, acc, a, tile, i, i, i, i, types.float32), generate

    @inline
    def hide(acc_s, a, tile, batch, head, row, col):
        return hide_each(acc_s, a, tile, batch, head, row, col, float32(1))
    return prepare, hide


def _make_of_rows(p: Staged, result: Any) -> Any:
    """An intrinsic for fragments whose two rows are of different heads: apply(acc_s, a, batch, head0, head1, query0, query1, col), where
    result(builder, score, outputs) is what becomes of a score."""
    @intrinsic
    def apply(typingctx: Any, acc: Any, a: Any, batch: Any, head0: Any, head1: Any, query0: Any, query1: Any, col: Any) -> Any:
        i, x = types.int32, types.float32
        tile = Compiled(p.functions["tile"], (a, i, i, x))
        places = _Places(p, a, tile.result, False)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            acc_s, a, batch, head0, head1, query0, query1, col = args
            registers, one = unpack(builder, acc_s, acc.count), F32(1.0)
            for of_row, head, query in ((row_of(0), head0, query0), (row_of(2), head1, query1)):
                mine = [k for k in range(acc.count) if row_of(k) == of_row]
                given = [a, tile.call(builder, [a, batch, head, one]), batch, head, builder.sub(query, I32(of_row)), col, one]
                for k, score, outputs in places.each(builder, registers, given, mine):
                    registers[k] = result(builder, score, outputs)
            return pack(builder, registers)
        return signature(acc, acc, a, i, i, i, i, i, i), generate
    return apply


def make_rows_modify(p: Program) -> Any:
    """acc_s = modify(acc_s, a, batch, head0, head1, query0, query1, col) of a score_mod, of scores of two rows with a head each."""
    return _make_of_rows(Staged(by_distance(lower(p, False)), SCORE), lambda builder, score, outputs: outputs[0])


def make_rows_hide(p: Program) -> Any:
    """`make_rows_modify` of a mask_mod: -inf where it is false."""
    return _make_of_rows(Staged(by_distance(lower(p)), MASK), lambda builder, score, outputs: _hidden(builder, score, outputs[0]))


def _with_scale(tile_values: Any, apply: Any, RAW: bool) -> tuple[Any, Any]:
    """(prepare, modify) that know the scale of the scores that they are given: 1, or that of dot products."""
    @inline
    def scale_of(a):
        if RAW:
            return a.softmax_scale
        else:
            return float32(1)

    @inline
    def prepare(a, batch, head):
        return tile_values(a, batch, head, scale_of(a))

    @inline
    def modify(acc_s, a, tile, batch, head, row, col):
        return apply(acc_s, a, tile, batch, head, row, col, scale_of(a))
    return prepare, modify


def make_fragment_mod(spec: Spec, RAW: bool, TRANSPOSED: bool = False) -> tuple[Any, Any]:
    """(prepare, modify) of the Spec's score_mod: acc_s = modify(acc_s, a, tile, batch, head, row, col). RAW: acc_s are dot products."""
    assert spec.score_mod is not None
    return _with_scale(*make_modify(by_distance(lower(spec.score_mod, RAW)), TRANSPOSED), RAW)


def make_rated_mod(spec: Spec, RAW: bool) -> tuple[Any, Any]:
    """make_fragment_mod TRANSPOSED, with the derivative: acc_s, rate = modify(...), the rate in the Spec's dtype, two a word."""
    assert spec.score_mod is not None
    return _with_scale(*make_modify_rated(by_distance(lower(with_rate(spec.score_mod), RAW)), True, spec.dtype), RAW)


@intrinsic
def times_rate(typingctx: Any, acc_ds: Any, rate: Any) -> Any:
    """dS times the derivative; 0 where dS is 0, whatever the derivative is there."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        out = []
        for ds, x in zip(unpack(builder, args[0], acc_ds.count), unpack(builder, args[1], rate.count), strict=True):
            none = builder.fcmp_ordered("==", ds, F32(0.0))
            out.append(builder.select(none, ds, builder.fmul(ds, x)))
        return pack(builder, out)
    return signature(acc_ds, acc_ds, rate), generate
