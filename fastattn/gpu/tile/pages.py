"""Keys in the pages of a cache: which page each one is in, and TMA loads of a block of them.

A block of keys is loaded in boxes of rows, each inside one page. The table of pages is on the device, where nobody checks it: numbers of
pages that do not exist name the last page, as in decode/.
"""
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from numba import int32, int64, uint32, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import load_b32_if
from ..ptx.sync import opaque
from ..spec import Spec
from .ring import Ring, make_fill
from .smem import ROW_BYTES


class Pages(NamedTuple):
    """The pages of a request.

    Parameters
    ----------
    table, last
        Address of the first page's number, and which one has the request's last key; -1 if it has no keys.
    by_entry, last_page
        Bytes between numbers, and the number of the last page that there is.
    size, magic, shift
        Rows of a page; row // size is row * magic >> shift (config.page_division of decode/).
    """

    table: Any
    last: Any
    by_entry: Any
    last_page: Any
    size: Any
    magic: Any
    shift: Any


def make_page_of(BOX: int, WHOLE: bool) -> tuple[Any, Any]:
    """(pages_of, page_of) of boxes of BOX rows. WHOLE: a page has as many.

    pages_of(a, batch, seqlen_k)    the Pages of a request with so many keys
    page_of(pages, row)             (page, row in it) of the box that begins with a request's key `row`; behind its last key any other
    """
    @inline
    def pages_of(a, batch, seqlen_k):
        last = divide(int32(seqlen_k - 1), int32(BOX)) if WHOLE else int32(int64(seqlen_k - 1) * int64(a.page_magic) >> int64(a.page_shift))
        last = int32(last if seqlen_k > 0 else -1)
        return Pages(uint64(a.pages + int64(batch) * a.pages_batch), last, a.pages_entry, a.last_page, a.page_size, a.page_magic,
                     a.page_shift)

    @inline
    def page_of(pages, row):
        if WHOLE:
            entry, within = divide(row, int32(BOX)), int32(0)
        else:
            entry = int32(int64(row) * int64(pages.magic) >> int64(pages.shift))
            within = int32(row - entry * pages.size)
        at = uint64(pages.table + uint64(int64(min(entry, pages.last)) * pages.by_entry))
        page = load_b32_if(at, int32(pages.last + 1))
        return int32(min(uint32(page), uint32(pages.last_page))), within
    return pages_of, page_of


def make_fill_pages(BOX: int, WHOLE: bool, ring: Ring, SLOTS: int, PANEL_BYTES: int, PANELS: int, copy: Any) -> Any:
    """In place of ring.make_fill, for keys in pages: fill(base, map_, stage, phase, row, head, pages). `row` counts the request's keys.

    The number of the first page is loaded while the slot is still in use, that of each other one before the box in front of it is issued.
    They are not loaded all at once, and the loop is none that is unrolled: either would spill 20 to 160 bytes of a producer's registers.
    """
    BYTES, ROWS = PANELS * PANEL_BYTES, PANEL_BYTES // ROW_BYTES        # of a block, which begins at a multiple of them
    _, page_of = make_page_of(BOX, WHOLE)

    @inline
    def fill(base, map_, stage, phase, row, head, pages):
        page, within = page_of(pages, row)
        ring.wait_empty(base, stage, phase)
        ring.arrive_expect(base, stage, int32(BYTES))
        going = True
        while going:
            at = int32((row & (ROWS - 1)) * ROW_BYTES)
            row = opaque(int32(row + BOX))
            following = page_of(pages, row) if ROWS > BOX else (page, within)
            copy(base, map_, ring.full(stage), SLOTS + stage * BYTES + at, PANEL_BYTES, PANELS, within, head, page)
            page, within = following
            going = (row & (ROWS - 1)) != 0
    return fill


def make_key_loads(spec: Spec, BOX: int, WHOLE: bool) -> tuple[Any, Any]:
    """(make_fill, keys_at) of a kernel; a cache with a row for each request, and arrays, are filled by that of ring.py.

    keys_at(a, batch, seqlen_k)     where `fill` finds a request's keys: its Pages, or its row of the cache
    """
    if spec.paged:
        return partial(make_fill_pages, BOX, WHOLE), make_page_of(BOX, WHOLE)[0]

    @inline
    def row_of(a, batch, seqlen_k):
        return batch
    return make_fill, row_of
