"""How the keys of requests of different lengths are split, decided on the device: a kernel of one block, in front of the split-key kernel.

One long request beside 200 short ones should take the time of all their bytes. So the long one gets many splits, the short ones get one
each, and no thread block is launched for a split that nobody needs. The plan is a table with an entry for each split of each request, those
of requests with several splits first, because they take longest:

    request | its split | how many splits it has | steps of a split            no splits: the entry is not used

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
from .config import CANDIDATES, MOST_SPLITS, PLAN_ENTRY, PLAN_THREADS, PLANNED_REQUESTS, WAVES

LANES = PLAN_THREADS // CANDIDATES      # threads of a candidate
COUNT = 18                  # bits of a number of splits; above it are those of a number of requests


def make_plan(spec: Spec, STEP: int, OVERHEAD: int) -> Any:
    """The kernel. STEP: keys of a step. OVERHEAD: what a split costs besides its steps, in steps."""
    THREADS = PLAN_THREADS
    request_at, row_bounds = make_request_at(False), make_row_bounds(spec)

    @inline
    def steps_of(a, b):
        """Steps of the keys that any row of a request attends."""
        request = request_at(a, b)
        diagonal = diagonal_of(a, a.seqlen_q, request.keys)
        lo, hi = row_bounds(a, int32(0), diagonal, request.keys)[0], row_bounds(a, int32(a.seqlen_q - 1), diagonal, request.keys)[1]
        return divide(int32(max(hi - lo, 0) + STEP - 1), int32(STEP))

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
    def best(a, steps, sums, times, thread, total):
        """Steps of a split of the candidate with the least time."""
        n, lane = int32(thread // LANES), int32(thread % LANES)
        each, count = candidate(a, total, n), int32(0)
        i = lane
        while i < a.batch:
            count = int32(count + splits_of(steps[i], each))
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
            blocks = int64(sums[thread] * a.heads_k)
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
    def before(steps, sums, thread, batch, each):
        """Of this thread's requests: (the splits of those with several, and above them how many those are, of all requests before; the same
        of all requests)."""
        share = divide(int32(batch + THREADS - 1), int32(THREADS))
        mine = int64(0)
        for i in range(min(thread * share, batch), min((thread + 1) * share, batch)):
            splits = splits_of(steps[i], each)
            if splits > 1:
                mine += int64(splits) + (int64(1) << COUNT)
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
        steps, sums = cuda.shared.array(PLANNED_REQUESTS, int32), cuda.shared.array(THREADS, int64)
        times = cuda.shared.array(CANDIDATES, float32)
        mine, i = int64(0), thread
        while i < a.batch:
            steps[i] = steps_of(a, i)
            mine += int64(steps[i])
            i = int32(i + THREADS)
        each = best(a, steps, sums, times, thread, sum_of(sums, thread, mine))
        first, total = before(steps, sums, thread, a.batch, each)
        several, all_several = int32(total & ((1 << COUNT) - 1)), int32(total >> COUNT)
        entry, requests = int32(first & ((1 << COUNT) - 1)), int32(first >> COUNT)
        share = divide(int32(a.batch + THREADS - 1), int32(THREADS))
        for b in range(min(thread * share, a.batch), min((thread + 1) * share, a.batch)):
            splits = splits_of(steps[b], each)
            if splits > 1:
                for n in range(splits):
                    put(a, int32(entry + n), int32(b), int32(n), splits, each_of(steps[b], each))
                entry, requests = int32(entry + splits), int32(requests + 1)
            else:
                put(a, int32(several + b - requests), int32(b), int32(0), int32(1), each)
        for n in range(several + a.batch - all_several + thread, a.entries, THREADS):
            put(a, int32(n), int32(0), int32(0), int32(0), int32(0))
    return kernel
