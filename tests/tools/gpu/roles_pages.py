"""The roles of the Hopper forward over caches: a copy of a page is known by the key that it begins with, and several make a block."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastattn.gpu.spec import Call
from fastattn.options import read_options
from fastattn.serving.problem import Given, How, problem_with_cache
from tests.tools.gpu.calls import view
from tests.tools.gpu.roles import Place, Play

OUT = 1 << 40
Array = np.ndarray[Any, Any]


@dataclass
class Requests:
    """A call over caches, with small arrays in host memory. `table` is right: the call's own may name pages that do not exist."""

    call: Call
    lengths: list[int]                  # of the keys of each request
    rows: list[int]                     # of its queries
    table: Array                        # (batch, pages of a request)
    page_size: int
    kept: list[Any]
    known: bool = True                  # the call's own lengths and pages are these, where they exist

    def key_of(self, page: int, within: int) -> tuple[int, int]:
        """(request, key) of a row of a page."""
        [(request, entry)] = np.argwhere(self.table == page).tolist()
        return request, entry * self.page_size + within


def requests(lengths: list[int], rows: int | list[int], page_size: int | None, dim: int, heads: int = 2, heads_k: int = 1,
             dtype: str = "float16", stray: bool = False, batch_idx: bool = False, spare: int = 0, head_dim_v: int | None = None,
             cache_dtype: str | None = None, **options: Any) -> Requests:
    """rows: a list packs the queries, with `spare` rows of no request. page_size: None for a row of the cache for each request. stray:
    pages that do not exist are named where no key is, and for one that is read as the last page."""
    draw, batch, packed = np.random.default_rng(3), len(lengths), isinstance(rows, list)
    each = rows if isinstance(rows, list) else [rows] * batch
    size = page_size or max(lengths) + 5
    per = -(-max(lengths) // size) + 1 if page_size else 1
    table = draw.permutation(batch * per).reshape(batch, per) if page_size or batch_idx else np.arange(batch)[:, None]
    if page_size:       # the last page is one that is read
        table[table == table.max()], table[0, 0] = table[0, 0], table.max()
    given = table.copy()
    if stray:
        given[np.arange(per) * size >= np.array(lengths)[:, None]] = 10**6
        given[0, 0] = -5
    kept: list[Any] = [np.array(lengths, np.int32), given.astype(np.int32), np.cumsum([0, *each]).astype(np.int32)]

    def small(x: Array) -> Any:
        return view(*x.shape, ptr=x.ctypes.data, dtype="int32")
    lead = (sum(each) + spare,) if packed else (batch, each[0])
    k = view(table.size if page_size or batch_idx else batch, size, heads_k, dim, dtype=cache_dtype or dtype)
    v = replace(k, shape=(*k.shape[:-1], head_dim_v)) if head_dim_v else k         # its first columns
    made = Given(view(*lead, heads, dim, dtype=dtype), k, v, None, None, small(kept[0]), small(kept[1]) if page_size else None,
                 small(kept[1].ravel()) if batch_idx else None, small(kept[2]) if packed else None, None, None, None, None)
    read = read_options("test", options.get("causal", True), options.get("window"), None, options.get("softcap"), 0.0, None, 0,
                        max(each) if packed else None)
    problem, o = problem_with_cache("test", made, read, How())
    return Requests(Call(problem, o, view(*problem.out_shape, ptr=OUT, dtype=dtype), None), lengths, each, table, size, kept)


class PagesPlay(Play):
    """A Play of Requests. What lies in shared memory is known by (request, key), not by pages."""

    modules = (*Play.modules, "tile.pages", "sm90.values")
    asked: Requests

    def load(self, to: int, tensor: str, barrier: int, column: int, row: int, head: int, batch: int, policy: Any = None) -> None:
        place = Place(row, head, batch)
        if tensor != "q":
            assert 0 <= batch < self.asked.table.size and 0 <= row < self.asked.page_size, "rows that are in no page"
            request, key = self.asked.key_of(batch, row)
            place = Place(key, head, request)
        self.copy(to, 128 * self.boxes[tensor], (tensor, column, place), barrier)

    def lies(self, block: Any, start: int, size: int) -> Any:
        """A block of keys in several boxes begins where its first does; what is behind the last key may be anything."""
        parts = sorted((p for p in block.panels if p.start < start + size and start < p.end), key=lambda p: p.start)
        if len(parts) < 2:
            return super().lies(block, start, size)
        assert all(p.what is not None for p in parts), f"[{start}, {start + size}) is read before it is there"
        ends = [start, *(p.end for p in parts)]
        assert [p.start for p in parts] == ends[:-1] and ends[-1] == start + size
        tensor, column, first = parts[0].what
        if not self.asked.known or (0 in self.asked.lengths and all(p.what == parts[0].what for p in parts)):
            return parts[0].what        # of a request without keys any page will do
        for part in parts[1:]:
            own, own_column, place = part.what
            key = first.row + (part.start - start) // 128
            assert (own, own_column) == (tensor, column)
            assert place == Place(key, first.head, first.batch) or key >= self.asked.lengths[first.batch], "pages of other keys"
        return parts[0].what
