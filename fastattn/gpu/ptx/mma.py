"""mma.sync: a warp multiplies 16 x 16 by 16 x 8, operands float16 or bfloat16, sums float32 (PTX ISA 9.7.14.5.8, ldmatrix 9.7.14.5.15).

Operands are in shared memory as panels of 64 columns: rows of 128 bytes, with 16-byte chunk c in slot c ^ (row % 8). ldmatrix reads
chunk c of eight rows, which is in eight different slots: each of the 32 banks once, no conflict. An x4 load reads a 16 x 16 piece. The
order of its four 8x8 tiles decides which row and chunk a lane addresses (`lane_offset`). The next 16 columns are the next pair of chunks:
the same address with bits 5 and 6 changed.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import int32
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, VOID, emit, emit_many, literals, pack, unpack
from ..dsl.inline import inline
from .memory import emit_add_vector, emit_load_vector

KIND = {"float16": "f16", "bfloat16": "bf16"}
AHEAD = 2       # ldmatrix are issued so many ahead of their MMAs: two take some 30 cycles, as long as eight MMAs


@inline
def lane_offset(thread):
    """This lane's ldmatrix offset in a 16 x 16 piece of a panel, whose address is a multiple of 128.

    8x8 tiles are in the order (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15): an A operand, and with .trans two B
    operands stored depth x N.
    """
    return int32((thread & 15) * 128 + ((((thread >> 4) & 1) ^ (thread & 7)) << 4))


@inline
def lane_offset_b(thread):
    """lane_offset in the order (0-7, 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15): two B operands stored N x depth, as K is.

    The two registers of a B operand are then neighbours. Another order costs moves.
    """
    return int32((((thread >> 4) & 1) * 8 + (thread & 7)) * 128 + ((((thread >> 3) & 1) ^ (thread & 7)) << 4))


def emit_ldmatrix(builder: Any, address: Any, offset: int, trans: bool) -> list[Any]:
    """Four 8x8 tiles of 16 bits at shared address + offset: a lane gives a row's address, and gets two neighbours of a row of each tile,
    or with `trans` of a column."""
    result = ir.LiteralStructType([I32] * 4)
    text = f"ldmatrix.sync.aligned.m8n8.x4{'.trans' if trans else ''}.shared.b16 {{$0, $1, $2, $3}}, [$4+{offset}];"
    value = emit(builder, result, text, "=r,=r,=r,=r,r,~{memory}", [address])
    return [builder.extract_value(value, k) for k in range(4)]


def _loader(builder: Any, address: Any, panel: int, trans: bool = False) -> Callable[[int, int], list[Any]]:
    """load(row16, column16): the 16 x 16 piece of a swizzled operand."""
    last: dict[str, Any] = {"chunk": 0, "at": address}

    def load(row16: int, column16: int) -> list[Any]:
        chunk = 32 * (column16 % 4)
        if chunk != last["chunk"]:      # recomputed, not kept: a register is worth more than an instruction
            last.update(chunk=chunk, at=emit(builder, I32, f"xor.b32 $0, $1, {chunk};", "=r,r", [address]) if chunk else address)
        return emit_ldmatrix(builder, last["at"], column16 // 4 * panel + row16 * 2048, trans)
    return load


def multiply(builder: Any, dtype: str, acc: list[Any], a: list[Any], b: list[Any]) -> list[Any]:
    """acc (16 x 8, four registers) + A (16 x 16, four) B (16 x 8, two), or with half the depth A of two registers and B of one."""
    depth, inputs = (16, "{$8, $9, $10, $11}, {$12, $13}") if len(a) == 4 else (8, "{$8, $9}, {$10}")
    text = (f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{KIND[dtype]}.{KIND[dtype]}.f32 "
            f"{{$0, $1, $2, $3}}, {inputs}, {{$0, $1, $2, $3}};")
    return emit_many(builder, F32, text, "=f,=f,=f,=f,0,1,2,3" + ",r" * len([*a, *b]), acc, [*a, *b])


def _products(builder: Any, dtype: str, acc: list[Any], tiles: int, load_a: Callable[[int], list[list[Any]]],
              load_b: Callable[[int, int], list[Any]], steps: int) -> list[Any]:
    """acc (tiles x 16 rows by N) + A B over `steps` of 16. Loads are issued AHEAD of the MMAs.

    load_a(step) -> four registers for each tile; load_b(step, j) -> the 16 x 16 piece for columns 16 j.
    """
    count = len(acc) // tiles
    order = [(step, j) for step in range(steps) for j in range(count // 8)]

    def loads() -> Iterator[tuple[list[list[Any]], list[Any]]]:
        for step, j in order:
            if j == 0:
                a = load_a(step)
            yield a, load_b(step, j)
    coming = loads()
    ready: list[tuple[list[list[Any]], list[Any]]] = []
    for i, (_, j) in enumerate(order):
        while len(ready) < min(i + 1 + AHEAD, len(order)):
            ready.append(next(coming))
        a, b = ready[i]
        for half, pair in enumerate((b[:2], b[2:])):
            for tile in range(tiles):
                at = tile * count + 8 * j + 4 * half
                acc[at:at + 4] = multiply(builder, dtype, acc[at:at + 4], a[tile], pair)
    return acc


@intrinsic
def load_rows(typingctx: Any, address: Any, tiles: Any, depth: Any, panel_bytes: Any) -> Any:
    """`tiles` x 16 rows of `depth` columns as A operands, to be kept in registers; `address`: this lane's of the first row."""
    t, d, panel = literals(tiles, depth, panel_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        load = _loader(builder, args[0], panel)
        return pack(builder, [x for step in range(d // 16) for tile in range(t) for x in load(tile, step)])
    return signature(types.UniTuple(types.int32, t * d // 4), types.int32, tiles, depth, panel_bytes), generate


def make_products(dtype: str) -> tuple[Any, Any]:
    """(qk, pv) for 16-bit `dtype`. A fragment of `tiles` x 16 rows is a sequence of fragments of 16 rows (see fragments.part)."""
    @intrinsic
    def qk(typingctx: Any, acc: Any, q: Any, k: Any, tiles: Any, depth: Any, q_panel: Any, k_panel: Any) -> Any:
        """acc + Q K^T over `depth` columns. k: this lane's shared address. q: the same, or the registers from load_rows."""
        t, d, panel_q, panel_k = literals(tiles, depth, q_panel, k_panel)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if isinstance(q, types.UniTuple):
                kept = unpack(builder, args[1], q.count)

                def load_a(step: int) -> list[list[Any]]:
                    return [kept[4 * (step * t + tile):][:4] for tile in range(t)]
            else:
                load_q = _loader(builder, args[1], panel_q)

                def load_a(step: int) -> list[list[Any]]:
                    return [load_q(tile, step) for tile in range(t)]
            load_k = _loader(builder, args[2], panel_k)
            return pack(builder, _products(builder, dtype, unpack(builder, args[0], acc.count), t, load_a,
                                           lambda step, j: load_k(j, step), d // 16))
        return signature(acc, acc, q, types.int32, tiles, depth, q_panel, k_panel), generate

    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, v: Any, tiles: Any, v_panel: Any) -> Any:
        """acc + P V. p: packed probabilities. v: this lane's shared address."""
        t, panel = literals(tiles, v_panel)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, count = unpack(builder, args[1], p.count), p.count // t
            load_v = _loader(builder, args[2], panel, trans=True)
            return pack(builder, _products(builder, dtype, unpack(builder, args[0], acc.count), t,
                                           lambda step: [registers[tile * count + 4 * step:][:4] for tile in range(t)],
                                           load_v, count // 4))
        return signature(acc, acc, p, types.int32, tiles, v_panel), generate
    return qk, pv


@intrinsic
def store_rows(typingctx: Any, packed: Any, address: Any, lane: Any, panel_bytes: Any) -> Any:
    """Store a packed fragment of 16 rows to swizzled panels. address: of the first row. Four lanes store a chunk, eight rows all banks."""
    [panel] = literals(panel_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lane = args[2]
        row = builder.lshr(lane, I32(2))
        at = builder.add(args[1], builder.add(builder.shl(row, I32(7)), builder.shl(builder.and_(lane, I32(3)), I32(2))))
        for k, word in enumerate(unpack(builder, args[0], packed.count)):
            chunk = builder.shl(builder.xor(row, I32(k // 2 % 8)), I32(4))
            text = f"st.shared.b32 [$0+{k // 16 * panel + k % 2 * 1024}], $1;"
            emit(builder, VOID, text, "r,r,~{memory}", [builder.add(at, chunk), word])
        return context.get_dummy_value()
    return signature(types.none, packed, types.int32, types.int32, panel_bytes), generate


# ---------------------------------------------------------------- operands that a warp stores for the others
# A fragment rounded to 16 bits is stored to shared memory as 8x8 tiles of 128 bytes, eight rows of 16 bytes. Tiles form lines, `line` bytes
# apart. A lane stores word `lane` of a tile, and ldmatrix reads whole tiles, as they are or transposed: no bank conflict, no swizzle.
@inline
def tiles_lane(thread, line):
    """This lane's ldmatrix offset in a 16 x 16 piece of tiles: an A operand whose rows are lines."""
    return int32(((thread >> 3) & 1) * line + ((thread >> 4) & 1) * 128 + (thread & 7) * 16)


@inline
def tiles_lane_trans(thread, line):
    """This lane's ldmatrix offset for an A operand whose rows are columns of the tiles."""
    return int32(((thread >> 3) & 1) * 128 + ((thread >> 4) & 1) * line + (thread & 7) * 16)


@intrinsic
def store_tiles(typingctx: Any, packed: Any, address: Any, line_bytes: Any) -> Any:
    """Store a packed fragment of 16 rows to two lines of tiles. address: of the first tile, plus 4 * lane."""
    [line] = literals(line_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for k, word in enumerate(unpack(builder, args[0], packed.count)):
            emit(builder, VOID, f"st.shared.b32 [$0+{k % 2 * line + k // 2 * 128}], $1;", "r,r,~{memory}", [args[1], word])
        return context.get_dummy_value()
    return signature(types.none, packed, types.int32, line_bytes), generate


def make_tiles_product(dtype: str, TRANS: bool) -> Any:
    """product(acc, a, b, tiles, depth, line_bytes, step16, b_panel): acc + A B for 16-bit `dtype`.

    A has `tiles` x 16 rows by `depth`, in 8x8 tiles, transposed if TRANS. B is stored depth x N in panels, as V is. The result has 16 of
    every 16 * step16 columns of B. a, b: this lane's shared addresses.
    """
    @intrinsic
    def product(typingctx: Any, acc: Any, a: Any, b: Any, tiles: Any, depth: Any, line_bytes: Any, step16: Any, b_panel: Any) -> Any:
        t, d, line, step_b, panel = literals(tiles, depth, line_bytes, step16, b_panel)
        by_row, by_depth = (256, 2 * line) if TRANS else (2 * line, 256)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            load = _loader(builder, args[2], panel, trans=True)
            return pack(builder, _products(
                builder, dtype, unpack(builder, args[0], acc.count), t,
                lambda step: [emit_ldmatrix(builder, args[1], tile * by_row + step * by_depth, TRANS) for tile in range(t)],
                lambda step, j: load(step, j * step_b), d // 16))
        return signature(acc, acc, types.int32, types.int32, tiles, depth, line_bytes, step16, b_panel), generate
    return product


@intrinsic
def store_columns(typingctx: Any, packed: Any, address: Any, lane: Any, first16: Any, step16: Any, panel_bytes: Any) -> Any:
    """store_rows to 16 of every 16 * step16 columns, from column 16 * first16 on (first16 < step16). step16 is 1, 2 or 4."""
    step, panel = literals(step16, panel_bytes)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lane = args[2]
        row = builder.lshr(lane, I32(2))
        turned = builder.xor(row, builder.shl(args[3], I32(1)))
        at = builder.add(args[1], builder.add(builder.shl(row, I32(7)), builder.shl(builder.and_(lane, I32(3)), I32(2))))
        for k, word in enumerate(unpack(builder, args[0], packed.count)):
            column16 = k // 4 * step
            chunk = builder.shl(builder.xor(turned, I32(2 * (column16 % 4) + k // 2 % 2)), I32(4))
            text = f"st.shared.b32 [$0+{column16 // 4 * panel + k % 2 * 1024}], $1;"
            emit(builder, VOID, text, "r,r,~{memory}", [builder.add(at, chunk), word])
        return context.get_dummy_value()
    return signature(types.none, packed, types.int32, types.int32, types.int32, step16, panel_bytes), generate


# ---------------------------------------------------------------- sums in global memory
# Bands of 16 rows of float32: 512 bytes for each 8 columns, of which each of 32 lanes has four values.
# With vectors (red.v4, since sm_90) a lane's four are contiguous. Without them the k-th values of all lanes are. Either way an instruction
# adds to contiguous memory (PTX ISA 9.7.13.7).
def _sum_offset(register: int, step: int, vector: bool) -> int:
    """Byte offset of a register from the lane's first, in a fragment of 16 rows by 16 of every 16 * step columns."""
    group, k = register // 4, register % 4
    return group // 2 * step * 1024 + group % 2 * 512 + (4 if vector else 128) * k


@intrinsic
def add_sums(typingctx: Any, acc: Any, address: Any, tiles: Any, step16: Any, columns: Any, vector: Any) -> Any:
    """Add a fragment of `tiles` x 16 rows atomically to sums in memory, in any order with others.

    address: of its first band, of `columns` columns, plus 1024 * first column / 16, plus 16 * lane with `vector`, else 4 * lane.
    """
    t, step, width, vectors = literals(tiles, step16, columns, vector)
    count = acc.count // t

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        registers = unpack(builder, args[0], acc.count)
        for n in range(0, acc.count, 4 if vectors else 1):
            at = n // count * (64 * width) + _sum_offset(n % count, step, bool(vectors))
            if vectors:
                emit_add_vector(builder, args[1], at, registers[n:n + 4])
            else:
                emit(builder, VOID, f"red.relaxed.gpu.global.add.f32 [$0+{at}], $1;", "l,f,~{memory}", [args[1], registers[n]])
        return context.get_dummy_value()
    return signature(types.none, acc, types.uint64, tiles, step16, columns, vector), generate


@intrinsic
def load_sums(typingctx: Any, address: Any, columns: Any, vector: Any) -> Any:
    """Load a band of sums as a fragment of 16 rows by `columns`. address: the lane's first, as in add_sums."""
    width, vectors = literals(columns, vector)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if vectors:
            return pack(builder, [x for j in range(width // 8) for x in emit_load_vector(builder, args[0], 512 * j)])
        return pack(builder, [emit(builder, F32, f"ld.global.f32 $0, [$1+{_sum_offset(k, 1, False)}];", "=f,l,~{memory}", [args[0]])
                              for k in range(width // 2)])
    return signature(types.UniTuple(types.float32, width // 2), types.uint64, columns, vector), generate
