"""mma.sync with operands loaded from global memory to registers, 16 bytes a load: no shared memory, no barrier (PTX ISA 9.7.14.5.8).

An MMA sums over depth in any order, as long as both operands have the same one, and the columns of its result may be permuted. So lane
4 g + c loads whole chunks of 16 bytes where the instruction's figure has pairs:

    Q, K    chunks c, c + 4, ... of a row. Of 16-bit elements, the first four of a chunk stand for columns 2 c, 2 c + 1, 2 c + 8, 2 c + 9 of
            one step of 16, the last four for those of the next step; a chunk of float32 is one step
    V       chunks g, g + 8, ... of keys 2 c, 2 c + 1, 2 c + 8, 2 c + 9. The elements of a chunk are the lane's column in as many MMAs

K and V are then read in runs of 64 and 128 bytes. Chunks past the end of a row are zeros. direct_parts.py multiplies float32.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import F32, I32, I64, VOID, emit, literals, pack, unpack
from .memory import emit_store_shared_vector
from .mma import multiply

STEP = Q_STEP = 512         # bytes of a warp's chunks, or of its registers of Q for an MMA, in shared memory: 16 a lane


def _load(builder: Any, once: bool, address: Any, offset: int, inside: Any = None) -> list[Any]:
    """Four words at a 16-byte aligned address, zeros without an access if `inside` is false. once: they bypass the L1 cache."""
    hint, result = ".L1::no_allocate" * once, ir.LiteralStructType([I32] * 4)
    load = f"ld.global.nc{hint}.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    if inside is None:
        value = emit(builder, result, load, "=r,=r,=r,=r,l", [address])
    else:
        clear = " ".join(f"mov.b32 ${k}, 0;" for k in range(4))
        text = f"{{ .reg .pred p; setp.ne.b32 p, $5, 0; {clear} @p {load} }}"
        value = emit(builder, result, text, "=&r,=&r,=&r,=&r,l,r", [address, builder.zext(inside, I32)])
    return [builder.extract_value(value, k) for k in range(4)]


def _row(builder: Any, base: Any, by_row: Any, row: Any, last: Any) -> Any:
    """Address of a row, or of the last row if it does not exist."""
    row = builder.select(builder.icmp_signed("<", row, last), row, last)
    return builder.add(base, builder.mul(builder.sext(row, I64), by_row))


class Pages(NamedTuple):
    """Rows in pages: which one each is in says a table of 32-bit words. Words past the last page name the last page.

    Parameters
    ----------
    table, by_entry
        Address of the first page's number, and bytes to the next.
    by_page, last_page
        Bytes between pages, and the number of the last one.
    size, magic, shift
        Rows of a page; row // size is row * magic >> shift (config.page_division of decode/).
    """

    table: Any
    by_entry: Any
    by_page: Any
    last_page: Any
    size: Any
    magic: Any
    shift: Any


def _paged_row(builder: Any, base: Any, by_row: Any, row: Any, last: Any, pages: Pages) -> Any:
    """_row of rows in pages."""
    row = builder.select(builder.icmp_signed("<", row, last), row, last)
    wide = builder.mul(builder.zext(row, I64), builder.zext(pages.magic, I64))
    page = builder.lshr(wide, builder.zext(pages.shift, I64))
    within = builder.sub(row, builder.mul(builder.trunc(page, I32), pages.size))
    entry = emit(builder, I32, "ld.global.nc.b32 $0, [$1];", "=r,l", [builder.add(pages.table, builder.mul(page, pages.by_entry))])
    entry = builder.select(builder.icmp_unsigned("<", entry, pages.last_page), entry, pages.last_page)
    base = builder.add(base, builder.mul(builder.zext(entry, I64), pages.by_page))
    return builder.add(base, builder.mul(builder.zext(within, I64), by_row))


@intrinsic
def row_in_page(typingctx: Any, base: Any, by_row: Any, row: Any, pages: Any) -> Any:
    """Address of a row that exists. base: of row 0 of page 0. pages: Pages."""
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        base, by_row, row, given = args
        return _paged_row(builder, base, by_row, row, row, Pages(*unpack(builder, given, len(Pages._fields))))
    return signature(types.uint64, types.uint64, types.int64, types.int32, pages), generate


def _addresses(builder: Any, args: Any, pages: Any, offsets: list[int]) -> list[Any]:
    """Addresses of the lane's first chunks of rows row + n for n in `offsets`. args: base, by_row, row, last and the values of pages."""
    base, by_row, row, last, given = args
    if isinstance(pages, types.NamedTuple):
        found = Pages(*unpack(builder, given, len(Pages._fields)))
        return [_paged_row(builder, base, by_row, builder.add(row, I32(n)), last, found) for n in offsets]
    return [_row(builder, base, by_row, builder.add(row, I32(n)), last) for n in offsets]


def make_load(rows_of: Callable[[int], list[int]], lanes: int, once: bool) -> Any:
    """load(base, by_row, row, last, count, chunks, left, whole, pages): of rows row + n for n in rows_of(count) `chunks` chunks each, every
    `lanes`-th one.

    base: address of the lane's first chunk in row 0. last: the last row that exists. left: how many chunks a row has from the lane's first
    on. The first `whole` of the lane's chunks are there in any case. pages: the Pages of the rows, 0 if they are not in pages.
    """
    @intrinsic
    def load(typingctx: Any, base: Any, by_row: Any, row: Any, last: Any, count: Any, chunks: Any, left: Any, whole: Any,
             pages: Any) -> Any:
        n, wide, sure = literals(count, chunks, whole)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            left, words = args[6], []
            for at in _addresses(builder, (*args[:4], args[8]), pages, rows_of(n)):
                for j in range(wide):
                    inside = None if j < sure else builder.icmp_signed("<", I32(lanes * j), left)
                    words += _load(builder, once, at, 16 * lanes * j, inside)
            return pack(builder, words)
        result = types.UniTuple(types.int32, 4 * len(rows_of(n)) * wide)
        kinds = types.uint64, types.int64, types.int32, types.int32, count, chunks, types.int32, whole, pages
        return signature(result, *kinds), generate
    return load


def _make_copy(rows_of: Callable[[int], list[int]], lanes: int) -> tuple[Any, Any]:
    """(copy, take): make_load through shared memory, so that more is on its way than registers hold.

    copy(to, base, by_row, row, last, count, chunks, left, whole, pages, part, parts): start, by cp.async. to: the lane's shared address, 16
        bytes after its neighbour's; every chunk of a row takes STEP bytes of all lanes. Of `parts` warps that copy together each starts
        those of its part, every `parts`-th chunk
    take(to, count, chunks): the words of `load`
    """
    @intrinsic
    def copy(typingctx: Any, to: Any, base: Any, by_row: Any, row: Any, last: Any, count: Any, chunks: Any, left: Any, whole: Any,
             pages: Any, part: Any, parts: Any) -> Any:
        n, wide, sure, together = literals(count, chunks, whole, parts)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            to, left, part = args[0], args[7], args[10]
            for r, at in enumerate(_addresses(builder, (*args[1:5], args[9]), pages, rows_of(n))):
                for j in range(wide):
                    number = r * wide + j
                    text = f"cp.async.cg.shared.global [$0+{STEP * number}], [$1+{16 * lanes * j}], 16"
                    operands = [to, at]
                    if j >= sure:
                        operands.append(builder.select(builder.icmp_signed("<", I32(lanes * j), left), I32(16), I32(0)))
                        text += ", $2"
                    kinds = "r,l,r"[:2 * len(operands) - 1]
                    if together > 1:
                        text = (f"{{ .reg .pred p; setp.eq.b32 p, ${len(operands)}, {number % together}; @p {text}; }}")
                        operands, kinds = [*operands, part], kinds + ",r"
                    emit(builder, VOID, text + ";" * (together == 1), kinds + ",~{memory}", operands)
            return context.get_dummy_value()
        row = types.int32, types.uint64, types.int64, types.int32, types.int32
        kinds = *row, count, chunks, types.int32, whole, pages, types.int32, parts
        return signature(types.none, *kinds), generate

    @intrinsic
    def take(typingctx: Any, to: Any, count: Any, chunks: Any) -> Any:
        n, wide = literals(count, chunks)
        chunks_of = len(rows_of(n)) * wide

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return pack(builder, [word for k in range(chunks_of) for word in load_operand(builder, args[0], STEP * k)])
        return signature(types.UniTuple(types.int32, 4 * chunks_of), types.int32, count, chunks), generate
    return copy, take


def _rows_of(count: int) -> list[int]:
    """The rows of Q or K that a lane loads of `count`, counted from g."""
    return list(range(0, count, 8))


def keys_of(count: int) -> list[int]:
    """The keys of V that a lane loads of `count` keys, counted from 2 c."""
    return [0, 1] if count == 8 else [16 * u + k for u in range(count // 16) for k in (0, 1, 8, 9)]


def make_loads(once: bool) -> tuple[Any, Any]:
    """(load_rows, load_columns): see make_load. once: no other warp of the block loads the same.

    load_rows: a lane's part of `count` rows of Q or K, a multiple of 8: `row` is the first row plus g, `base` that of chunk c
    load_columns: of `count` rows of V, 8 or a multiple of 16: `row` is the first row plus 2 c, `base` that of chunk g
    """
    return make_load(_rows_of, 4, once), make_load(keys_of, 8, once)


def make_copies() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """((copy_rows, take_rows), (copy_columns, take_columns)): make_loads through shared memory, see _make_copy."""
    return _make_copy(_rows_of, 4), _make_copy(keys_of, 8)


def make_load_pairs(once: bool) -> Any:
    """load_rows of every second chunk: chunks c, c + 8, ... of a row, where K's have 8 bits."""
    return make_load(_rows_of, 8, once)


def make_products(dtype: str, tiles: int = 1) -> tuple[Any, Any]:
    """(qk, pv) for 16 rows of a 16-bit dtype.

    acc_s = qk(acc_s, q0, q1, k): q0, q1, k from load_rows; q0 and q1 are the lane's rows g and g + 8
    acc_o = pv(acc_o, p, v): p packed, v from load_columns. Columns of acc_o are permuted; store_output restores their order. Of so many
        tiles of 16 rows, one after the other, in acc_o and p
    """
    @intrinsic
    def qk(typingctx: Any, acc: Any, q0: Any, q1: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first, second = unpack(builder, args[1], q0.count), unpack(builder, args[2], q1.count)
            return _scores(builder, dtype, args[0], acc.count, args[3], k.count,
                           [[[first[at], second[at], first[at + 1], second[at + 1]]] for at in range(0, q0.count, 2)])
        return signature(acc, acc, q0, q1, k), generate

    @intrinsic
    def pv(typingctx: Any, acc: Any, p: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers, a, words = (unpack(builder, x, n.count) for x, n in zip(args, (acc, p, v), strict=True))
            of_acc, of_p = acc.count // tiles, p.count // tiles
            wide, pairs = of_acc // 32, min(of_p // 2, 2)           # chunks of a row, pairs of a lane's keys in an MMA
            for u in range(of_p // (2 * pairs)):
                rows = [words[(2 * pairs * u + r) * 4 * wide:(2 * pairs * u + r + 1) * 4 * wide] for r in range(2 * pairs)]
                for column in range(8 * wide):
                    word, selector = column // 2, (0x7632 if column % 2 else 0x5410)
                    b = [emit(builder, I32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [rows[r][word], rows[r + 1][word]], False)
                         for r in range(0, 2 * pairs, 2)]
                    for tile in range(tiles):
                        at, p_at = of_acc * tile + 4 * column, of_p * tile + 2 * pairs * u
                        registers[at:at + 4] = multiply(builder, dtype, registers[at:at + 4], a[p_at:p_at + 2 * pairs], b)
            return pack(builder, registers)
        return signature(acc, acc, p, v), generate
    return qk, pv


def make_kept(dtype: str, tiles: int = 1) -> tuple[Any, Any]:
    """(keep_q, qk) where registers do not hold Q: a warp's A operands lie in shared memory, each lane's beside each other.

    keep_q(address, q0, q1): store them. address: the lane's, 16 bytes after its neighbour's; Q_STEP bytes for every MMA over depth
    acc_s = qk(acc_s, address, k): of so many tiles of 16 rows, one after the other, in acc_s and in shared memory
    """
    @intrinsic
    def keep_q(typingctx: Any, address: Any, q0: Any, q1: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first, second = unpack(builder, args[1], q0.count), unpack(builder, args[2], q1.count)
            for at in range(0, q0.count, 2):
                store_operand(builder, args[0], Q_STEP * (at // 2), [first[at], second[at], first[at + 1], second[at + 1]])
            return context.get_dummy_value()
        return signature(types.none, types.int32, q0, q1), generate

    @intrinsic
    def qk(typingctx: Any, acc: Any, address: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            steps = k.count // (acc.count // (4 * tiles)) // 2
            return _scores(builder, dtype, args[0], acc.count, args[2], k.count, kept_operands(builder, args[1], steps, tiles), tiles)
        return signature(acc, acc, types.int32, k), generate
    return keep_q, qk


def kept_operands(builder: Any, address: Any, steps: int, tiles: int) -> Iterator[list[list[Any]]]:
    """For each MMA over depth, the A operands of keep_q of all tiles."""
    for step in range(steps):
        yield [load_operand(builder, address, Q_STEP * (tile * steps + step)) for tile in range(tiles)]


def _scores(builder: Any, dtype: str, acc: Any, count: int, k: Any, words_k: int, operands: Iterable[list[list[Any]]],
            tiles: int = 1) -> Any:
    """acc + Q K^T. `operands`: of Q, for each step of 16 columns those of all tiles of rows."""
    registers, words, of_tile = unpack(builder, acc, count), unpack(builder, k, words_k), count // tiles
    of_row = words_k // (of_tile // 4)
    for step, of_step in enumerate(operands):
        for t in range(of_tile // 4):
            b = words[t * of_row + 2 * step:t * of_row + 2 * step + 2]
            for tile, a in enumerate(of_step):
                at = of_tile * tile + 4 * t
                registers[at:at + 4] = multiply(builder, dtype, registers[at:at + 4], a, b)
    return pack(builder, registers)


def store_operand(builder: Any, address: Any, offset: int, words: list[Any]) -> None:
    """Store four words at shared address + offset, a multiple of 16."""
    emit(builder, VOID, f"st.shared.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", "r,r,r,r,r,~{memory}", [address, *words])


def load_operand(builder: Any, address: Any, offset: int) -> list[Any]:
    """Load four words at shared address + offset, a multiple of 16."""
    text = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    value = emit(builder, ir.LiteralStructType([I32] * 4), text, "=r,=r,=r,=r,r,~{memory}", [address])
    return [builder.extract_value(value, k) for k in range(4)]


def make_store_output(itemsize: int) -> Any:
    """store_output(acc_o, address, pitch): acc_o of pv as float32 rows to shared memory.

    address: of column 2 c CHUNK in the lane's row g, where a chunk has CHUNK elements of V of this size. pitch: bytes between rows.
    """
    CHUNK = 16 // itemsize

    @intrinsic
    def store_output(typingctx: Any, acc: Any, address: Any, pitch: Any) -> Any:
        [row_bytes] = literals(pitch)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            registers = [builder.bitcast(x, F32) for x in unpack(builder, args[0], acc.count)]
            for h in range(acc.count // (4 * CHUNK)):
                for row in range(2):
                    # column 2 c of the MMAs of a chunk is a chunk of O, column 2 c + 1 the next one
                    values = [registers[4 * (CHUNK * h + i) + 2 * row + column] for column in range(2) for i in range(CHUNK)]
                    for at in range(0, 2 * CHUNK, 4):
                        emit_store_shared_vector(builder, args[1], 8 * row * row_bytes + 32 * CHUNK * h + 4 * at, values[at:at + 4])
            return context.get_dummy_value()
        return signature(types.none, acc, types.int32, pitch), generate
    return store_output
