"""Copies by cp.async: rows of Q, K, V or dO to panels in shared memory, by all threads of the block."""
from __future__ import annotations

from typing import Any

from numba import cuda, int32, int64, uint64

from ..dsl.inline import inline
from ..ptx import cp_async
from ..ptx.sync import thread_index


@inline
def arrived():
    """Wait until all threads' copies have landed. All threads have also finished the step before, so its operands may be overwritten."""
    cp_async.wait_all()
    cuda.syncthreads()


def make_copy_rows(WHOLE: bool, PASS_ROWS: int) -> Any:
    """copy_rows(to, source, by_row, by_dim, first, length, dim, rows, count, panel): start copying a tile of `rows` rows.

    Rows are `first` to first + rows of `length`, `dim` columns each; what lies outside becomes 0. They go to `count` panels of `panel`
    bytes at shared address `to`. All threads together copy PASS_ROWS rows at a time. WHOLE: see cp_async.make_load.
    """
    load_tile = cp_async.make_load(WHOLE)

    @inline
    def copy_rows(to, source, by_row, by_dim, first, length, dim, rows, count, panel):
        thread = thread_index()
        row, chunk = int32(thread >> 3), int32(thread & 7)
        source = uint64(source + uint64(int64(first + row) * by_row + 8 * chunk * by_dim))
        load_tile(int32(to + row * 128 + ((chunk ^ (row & 7)) << 4)), source, by_row, by_dim, int32(length - first - row),
                  int32(dim - 8 * chunk), rows, PASS_ROWS, count, panel)
    return copy_rows
