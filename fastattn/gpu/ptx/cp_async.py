"""Copies of tiles of rows: cp.async from global memory to swizzled panels in shared memory, and stores back (PTX ISA 9.7.9.25.3).

A panel has 64 columns of 16 bits: rows of 128 bytes, with chunk c of a row in slot c ^ (row % 8) (ptx/mma.py). Eight neighbouring threads
copy the eight chunks of a row: 128 contiguous bytes of global memory, and eight different slots of shared memory. What lies outside the
tensor is not read and becomes 0 in shared memory; it is not stored back.
"""
from __future__ import annotations

from typing import Any

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ..dsl.asm import I32, I64, VOID, emit, instruction, literals

wait_all = instruction("cp.async.wait_all;")         # until this thread's copies have landed; those of others need a barrier, too
copy16 = instruction("cp.async.cg.shared.global [$0], [$1], 16;", "rl")        # (to, from), both multiples of 16
commit = instruction("cp.async.commit_group;")       # this thread's copies since the last one are a group
load_shared_b64 = instruction("ld.shared.b64 $0, [$1];", "r", "l")
store_shared_b64 = instruction("st.shared.b64 [$0], $1;", "rl")

_COPY = "cp.async.cg.shared.global.L2::128B [$0+{to}], [$1+{source}], 16, $2;"
# up to $3 elements, $2 bytes apart; the others are not read and are 0
_GATHER = ("{{ .reg .pred p; .reg .b16 t<8>; .reg .b32 w<4>; .reg .b64 s; mov.b64 s, $1; "
           + "".join(f"setp.gt.s32 p, $3, {k}; mov.b16 t{k}, 0; @p ld.global.b16 t{k}, [s]; add.s64 s, s, $2; " for k in range(8))
           + "".join(f"mov.b32 w{k}, {{{{t{2 * k}, t{2 * k + 1}}}}}; " for k in range(4))
           + "st.shared.v4.b32 [$0+{to}], {{w0, w1, w2, w3}}; }}")
_STORE = ("{{ .reg .pred p; .reg .b32 w<4>; setp.gt.s32 p, $2, 0; "
          "ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$0+{source}]; @p st.global.v4.b32 [$1+{to}], {{w0, w1, w2, w3}}; }}")
_SCATTER = ("{{ .reg .pred p; .reg .b16 t<8>; .reg .b32 w<4>; .reg .b64 s; mov.b64 s, $1; "
            "ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$0+{source}]; "
            + "".join(f"mov.b32 {{{{t{2 * k}, t{2 * k + 1}}}}}, w{k}; " for k in range(4))
            + "".join(f"setp.gt.s32 p, $3, {k}; @p st.global.b16 [s], t{k}; add.s64 s, s, $2; " for k in range(8)) + "}}")


def wait_group(most: int) -> Any:
    """Until at most the newest `most` groups of this thread's copies are on their way."""
    return instruction(f"cp.async.wait_group {most};")


def make_load(whole: bool) -> Any:
    """load_tile(to, source, by_row, by_dim, rows_left, columns_left, rows, pass_rows, panels, panel_bytes): one thread's part of a tile.

    to, source: addresses of the thread's chunk in its first row; its next rows are `pass_rows` (a multiple of 8) further. by_row, by_dim:
    strides in bytes. rows_left, columns_left: how many exist, counted from the thread's first.
    whole: chunks are contiguous, 16-byte aligned, and no row ends inside one. Copies are then asynchronous, to be waited for. Otherwise
    they are done element by element.
    """
    @intrinsic
    def load_tile(typingctx: Any, to: Any, source: Any, by_row: Any, by_dim: Any, rows_left: Any, columns_left: Any,
                  rows: Any, pass_rows: Any, panels: Any, panel_bytes: Any) -> Any:
        n, step, count, panel = literals(rows, pass_rows, panels, panel_bytes)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            to, source, by_row, by_dim, rows_left, columns_left = args[:6]
            columns = [builder.sub(columns_left, I32(64 * p)) for p in range(count)]
            for i in range(n // step):
                inside = builder.icmp_signed("<", I32(i * step), rows_left)
                for p in range(count):
                    at = p * panel + i * step * 128
                    if whole:
                        both = builder.and_(inside, builder.icmp_signed(">", columns[p], I32(0)))
                        emit(builder, VOID, _COPY.format(to=at, source=128 * p), "r,l,r,~{memory}",
                             [to, source, builder.select(both, I32(16), I32(0))])
                    else:
                        first = builder.add(source, builder.mul(by_dim, I64(64 * p)))
                        emit(builder, VOID, _GATHER.format(to=at), "r,l,l,r,~{memory}",
                             [to, first, by_dim, builder.select(inside, columns[p], I32(0))])
                source = builder.add(source, builder.mul(by_row, I64(step)))
            return context.get_dummy_value()
        return signature(types.none, types.int32, types.uint64, types.int64, types.int64, types.int32, types.int32,
                         rows, pass_rows, panels, panel_bytes), generate
    return load_tile


def make_store(whole: bool) -> Any:
    """store_tile(source, to, by_row, by_dim, rows_left, columns_left, rows, panels, panel_bytes): store a tile from panels, by one warp.

    Four rows at a time: the thread's first row is lane / 8, its chunk lane % 8. source: shared address of that chunk.
    """
    @intrinsic
    def store_tile(typingctx: Any, source: Any, to: Any, by_row: Any, by_dim: Any, rows_left: Any, columns_left: Any,
                   rows: Any, panels: Any, panel_bytes: Any) -> Any:
        n, count, panel = literals(rows, panels, panel_bytes)

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, to, by_row, by_dim, rows_left, columns_left = args[:6]
            sources = [source, builder.xor(source, I32(64))]    # four rows on, the highest bit of row % 8 changes
            for i in range(n // 4):
                inside = builder.icmp_signed("<", I32(4 * i), rows_left)
                for p in range(count):
                    left = builder.select(inside, builder.sub(columns_left, I32(64 * p)), I32(0))
                    at = p * panel + i * 512
                    if whole:
                        emit(builder, VOID, _STORE.format(source=at, to=128 * p), "r,l,r,~{memory}", [sources[i % 2], to, left])
                    else:
                        first = builder.add(to, builder.mul(by_dim, I64(64 * p)))
                        emit(builder, VOID, _SCATTER.format(source=at), "r,l,l,r,~{memory}", [sources[i % 2], first, by_dim, left])
                to = builder.add(to, builder.mul(by_row, I64(4)))
            return context.get_dummy_value()
        return signature(types.none, types.int32, types.uint64, types.int64, types.int64, types.int32, types.int32,
                         rows, panels, panel_bytes), generate
    return store_tile
