"""How the keys of requests of different lengths are split, decided on the device: a kernel of one block, in front of the split-key kernel.

One long request beside 200 short ones should take the time of all their bytes. So the long one gets many splits, the short ones get one
each, and no thread block is launched for a split that nobody needs. Packed queries may fill several blocks of rows; those of such a request
are not split further, unless the kernel's splits have a merge of their own. The plan is a table with an entry for each split of each block
of rows, those of requests with several splits first, because they take longest:

    request | its split, and from bit TILE on its block of rows | how many splits it has | steps of a split       no splits: not used

CANDIDATES lengths of a split are compared, from a sixteenth of what fills the device once to what fills it twice. The time of one is
estimated in steps: whole waves of splits of the mean length, each with its overhead, and what the longest split takes longer than the mean.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint64

from ..dsl.inline import divide, inline
from ..ptx.memory import store_b32
from ..spec import Spec
from ..tile.mask import diagonal_of, make_row_bounds
from ..tile.requests import make_request_at
from .config import CANDIDATES, MOST_SPLITS, PLAN_ENTRY, PLAN_THREADS, PLANNED_REQUESTS, TILE, WAVES
from .prefix import make_shared_keys, of_shared

LANES = PLAN_THREADS // CANDIDATES      # threads of a candidate
COUNT = 32                  # bits of a number of splits; above them are those of a number of blocks of rows


def make_plan(spec: Spec, STEP: int, OVERHEAD: int, ROWS: int, SPLIT_ALL: bool = False) -> Any:
    """The kernel. STEP: keys of a step. OVERHEAD: what a split costs besides its steps, in steps. ROWS: of a block. SPLIT_ALL: requests of
    several blocks of rows are split, too."""
    THREADS, PACKED = PLAN_THREADS, spec.packed
    request_at, row_bounds, shared_keys = make_request_at(PACKED), make_row_bounds(spec), make_shared_keys(spec)
    _, BEHIND = of_shared(spec)

    @inline
    def steps_of(a, b):
        """(steps of the keys that any row of a request attends, its blocks of rows)."""
        _, rows, _, keys = request_at(a, b)
        diagonal = diagonal_of(a, rows, keys)
        lo, hi = row_bounds(a, int32(0), diagonal, keys)[0], row_bounds(a, int32(max(rows, 1) - 1), diagonal, keys)[1]
        if BEHIND:
            lo = int32(max(lo, shared_keys(a)))
        return divide(int32(max(hi - lo, 0) + STEP - 1), int32(STEP)), divide(int32(rows * a.group + ROWS - 1), int32(ROWS))

    @inline
    def entries_of(steps, tiles, each):
        """Entries of a request."""
        entries = splits_of(steps, each)
        if SPLIT_ALL:
            entries = int32(entries * tiles)
        elif tiles != 1:
            entries = tiles
        return entries

    @inline
    def each_of(steps, each):
        """Steps of a split of a request, which has MOST_SPLITS at most."""
        return int32(max(each, divide(int32(steps + MOST_SPLITS - 1), int32(MOST_SPLITS))))

    @inline
    def splits_of(steps, each):
        each = each_of(steps, each)
        return int32(max(divide(int32(steps + each - 1), each), 1))

    @inline
    def candidate(a, total, n):
        """Steps of a split that fill (n + 1) / CANDIDATES of WAVES waves, but at least the overhead."""
        slots = int64(a.slots) * WAVES * (n + 1)
        fill = (total * a.heads_k * CANDIDATES + slots - 1) // slots
        return int32(min(max(fill, OVERHEAD), 2**30))

    @inline
    def requests_of(a):
        """Requests, packed with the rows of none."""
        if PACKED:
            return int32(a.batch + 1)
        else:
            return int32(a.batch)

    @inline
    def put(a, at, request, split, splits, each):
        entry = uint64(a.plan + uint64(int64(at) * PLAN_ENTRY))
        store_b32(entry, request)
        store_b32(uint64(entry + uint64(4)), split)
        store_b32(uint64(entry + uint64(8)), splits)
        store_b32(uint64(entry + uint64(12)), each)

    @inline
    def sum_of(sums, thread, value):
        """The sum of all threads' values, for every thread."""
        sums[thread] = value
        cuda.syncthreads()
        step = THREADS // 2
        while step > 0:
            if thread < step:
                sums[thread] = sums[thread] + sums[thread + step]
            cuda.syncthreads()
            step = step // 2
        total = sums[0]
        cuda.syncthreads()
        return total

    @inline
    def best(a, steps, tiles, sums, times, thread, total):
        """Steps of a split of the candidate with the least time."""
        n, lane = int32(thread // LANES), int32(thread % LANES)
        each, count = candidate(a, total, n), int32(0)
        i = lane
        while i < requests_of(a):
            count = int32(count + entries_of(steps[i], tiles[i], each))
            i = int32(i + LANES)
        sums[thread] = int64(count)
        cuda.syncthreads()
        step = LANES // 2
        while step > 0:
            if lane < step:
                sums[thread] = sums[thread] + sums[thread + step]
            cuda.syncthreads()
            step = step // 2
        if lane == 0:
            blocks = int64(max(sums[thread], 1) * a.heads_k)
            mean = float32(total * a.heads_k) / float32(blocks)
            waves = float32((blocks + a.slots - 1) // int64(a.slots))
            times[n] = waves * (mean + float32(OVERHEAD)) + max(float32(each) - mean, float32(0))
        cuda.syncthreads()
        chosen, least = int32(0), times[0]
        for m in range(1, CANDIDATES):
            if times[m] < least:
                chosen, least = int32(m), times[m]
        cuda.syncthreads()
        return candidate(a, total, chosen)

    @inline
    def several_splits(steps, tiles, each):
        if SPLIT_ALL:
            return splits_of(steps, each) > 1
        else:
            return (tiles == 1) & (splits_of(steps, each) > 1)

    @inline
    def before(steps, tiles, sums, thread, batch, each):
        """(The entries of requests with several splits, and above them those of the others, of all requests before this thread's; those of
        all requests)."""
        share = divide(int32(batch + THREADS - 1), int32(THREADS))
        mine = int64(0)
        for i in range(min(thread * share, batch), min((thread + 1) * share, batch)):
            if several_splits(steps[i], tiles[i], each):
                if SPLIT_ALL:
                    mine += int64(splits_of(steps[i], each) * tiles[i])
                else:
                    mine += int64(splits_of(steps[i], each))
            else:
                mine += int64(tiles[i]) << COUNT
        sums[thread] = mine
        cuda.syncthreads()
        step = 1
        while step < THREADS:
            left = sums[thread - step] if thread >= step else int64(0)
            cuda.syncthreads()
            sums[thread] = sums[thread] + left
            cuda.syncthreads()
            step = step * 2
        total = sums[THREADS - 1]
        return int64(sums[thread] - mine), total

    def kernel(a):
        thread = int32(cuda.threadIdx.x)
        steps, tiles = cuda.shared.array(PLANNED_REQUESTS, int32), cuda.shared.array(PLANNED_REQUESTS, int32)
        sums, times, batch = cuda.shared.array(THREADS, int64), cuda.shared.array(CANDIDATES, float32), requests_of(a)
        mine, i = int64(0), thread
        while i < batch:
            steps[i], tiles[i] = steps_of(a, i)
            mine += int64(steps[i]) * tiles[i]
            i = int32(i + THREADS)
        each = best(a, steps, tiles, sums, times, thread, sum_of(sums, thread, mine))
        first, total = before(steps, tiles, sums, thread, batch, each)
        several, used = int32(total & 0xFFFFFFFF), int32((total & 0xFFFFFFFF) + (total >> COUNT))
        entry, other = int32(first & 0xFFFFFFFF), int32(several + (first >> COUNT))
        share = divide(int32(batch + THREADS - 1), int32(THREADS))
        for b in range(min(thread * share, batch), min((thread + 1) * share, batch)):
            if several_splits(steps[b], tiles[b], each):
                splits = splits_of(steps[b], each)
                if SPLIT_ALL:
                    for tile in range(tiles[b]):
                        for n in range(splits):
                            put(a, int32(entry + n), int32(b), int32((tile << TILE) + n), splits, each_of(steps[b], each))
                        entry = int32(entry + splits)
                else:
                    for n in range(splits):
                        put(a, int32(entry + n), int32(b), int32(n), splits, each_of(steps[b], each))
                    entry = int32(entry + splits)
            else:
                for n in range(tiles[b]):
                    put(a, int32(other + n), int32(b), int32(n << TILE), int32(1), int32(max(each, steps[b])))
                other = int32(other + tiles[b])
        for n in range(used + thread, a.entries, THREADS):
            put(a, int32(n), int32(0), int32(0), int32(0), int32(0))
    return kernel
