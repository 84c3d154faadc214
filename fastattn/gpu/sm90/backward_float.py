"""Backward of float32 for Hopper: a block owns BLOCK keys of one key head and loops over blocks of as many queries.

    two warpgroups  all keys and half of a block's queries each, scores transposed:
                    S^T = K Q^T     P^T = exp2(S^T - lse)           dV += P^T dO
                    dP^T = V dO^T   dS^T = P^T (dP^T - delta)       dK += dS^T Q
                    dQ = dS K of all queries and half of the columns each, from both halves of dS. It is added to sums in memory
    all threads     copy Q and dO, 16 bytes at a time, into swizzled panels of 64 columns, and lse and delta

    shared memory   K | V | Q | dO | dS | lse | delta | parked words. Each operand is three parts (ptx/parts.py), one after the other:
                    216 KB, 120 to head_dim 64

P and dS go from the accumulators' registers into the MMAs of dV and dK. A step's products have accumulators of their own and are added to
dV and dK, some columns after the other, for which there are registers: tensor cores cut their sums off, which would cost 1.8e-5 over 4096
queries. A warpgroup's dK and dV are sums over its half of the queries; both halves are added at the end.
Operands fill shared memory, so there is one stage: dO of the next block is in flight from the end of dV on, Q from the end of dK on, during
the MMA of dQ.
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, int64, uint8, uint64

from ..config import num_features
from ..dsl.inline import inline
from ..ptx import cp_async, wgmma, wgmma_float
from ..ptx.cp_async import copy16, load_shared_b64, store_shared_b64
from ..ptx.memory import shared_address
from ..ptx.mma import add_sums, store_columns
from ..ptx.sync import fence_async, opaque, thread_index, uniform, wait_for_previous
from ..rows.preprocess import make_first_row
from ..spec import Spec
from ..tile.copies import make_copy_rows
from ..tile.fragments import add_columns, join, lane_row, make_pack, own_zeros, part, scale_seen_rows, sum_parts, thread_col, zeros
from ..tile.gradients import (
    PIECE,
    add_piece,
    exp2_columns,
    load_columns,
    make_any_far,
    make_dropout_transposed,
    make_near,
    multiply,
    store_piece,
)
from ..tile.mask import make_key_bounds
from ..tile.parked import park, parked, word
from ..tile.ring import make_barrier
from ..tile.schedule import make_num_tiles, make_tile_at
from ..tile.scores import make_cap_of, make_score, make_slopes
from ..tile.smem import ALIGN, PANEL, ROW_BYTES, Smem, panels
from ..tile.softmax import make_log2_scale
from ..tile.stores import store_floats
from ..tile.words import make_kept_queries
from .config import FLOAT_BLOCK as BLOCK
from .config import FLOAT_WARPS as WARPS


def make_backward_float(spec: Spec) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    HEAD_DIM, HEAD_DIM_V, PARTS = spec.head_dim, spec.head_dim_v, spec.parts
    PANELS, PANELS_V, PANEL_BYTES, HALF = PARTS * panels(HEAD_DIM), PARTS * panels(HEAD_DIM_V), BLOCK * ROW_BYTES, BLOCK // 2
    PART, PART_V, HALF_BYTES, STAT_BYTES = panels(HEAD_DIM) * PANEL_BYTES, panels(HEAD_DIM_V) * PANEL_BYTES, HALF * ROW_BYTES, BLOCK * 4
    WIDTH, WIDTH_V, ACCUM_COLUMNS, ONE = PANEL * PANELS, PANEL * PANELS_V, panels(HEAD_DIM) * PANEL, 1
    ACCUM_ROW = ACCUM_COLUMNS * 4
    # dQ: each warpgroup computes one of two panels of columns, or half of the only one
    TWO = panels(HEAD_DIM) == 2
    PANEL_COUNT = PANEL // 2                                        # registers of a panel
    # registers of dV or dK computed at a time: with 32, features spill 40 bytes at head_dim 128
    CHUNK = PANEL_COUNT // 2 if max(panels(HEAD_DIM), panels(HEAD_DIM_V)) == 2 and num_features(spec) else PANEL_COUNT
    DQ_BYTES, DQ_SUMS = (PANEL_BYTES, PIECE) if TWO else (ROW_BYTES // 2, PIECE // 2)       # from half to half: of K, of the sums
    # S is the sum of products of 32 columns each, which gives the bits of the forward's S. Columns that are multiplied before one waits
    # for those products, and how many summands remain. With features at head_dim 128 more would spill up to 52 bytes
    S_COLUMNS = 32 if num_features(spec) and HEAD_DIM > 64 else HEAD_DIM
    PARTS_S = 2 if S_COLUMNS < HEAD_DIM else -(-HEAD_DIM // 32)
    COUNT_S, COUNT_K, COUNT_V, COUNT_DQ = HALF // 2, HEAD_DIM // 2, HEAD_DIM_V // 2, PANEL // 2 if TWO else PANEL // 4
    smem = Smem()
    K, V, Q, DO = smem.take(PARTS * PART), smem.take(PARTS * PART_V), smem.take(PARTS * PART), smem.take(PARTS * PART_V)
    DS, LSE, DELTA = smem.take(PARTS * PANEL_BYTES), smem.take(STAT_BYTES, 128), smem.take(STAT_BYTES, 128)
    Q_POINTER, DO_POINTER = smem.take(8, 16), smem.take(8, 8)       # to the sequence's first row
    # HEAD_END: one past the last query head
    (BATCH, Q_START, SEQLEN_Q, SEQLEN_K, FIRST, M_MIN, FULL_MIN, FULL_MAX, HEAD_K, K_START, KEYS, M_MAX,
     HEAD_END) = parked(smem, 13)
    passed, SOFTCAP, DROPOUT = make_barrier(smem), spec.softcap, spec.dropout
    qk = wgmma.kq_parts
    to_parts = make_pack(spec.dtype)
    copy_rows = make_copy_rows(True, 4 * WARPS)
    key_bounds, limits_of, keep, alibi_from = make_key_bounds(spec, BLOCK)
    kept_queries = make_kept_queries(spec, BLOCK, BLOCK // HALF, ONE_HEAD=True)       # with a loop over heads 196 bytes would spill
    prepare, fetch, score = make_score(spec, COUNT_S, True)
    plane_of, draw, mark, pack_kept, grad = make_dropout_transposed(spec, COUNT_S)
    any_far, (near_columns, _), log2_scale = make_any_far(BLOCK), make_near(spec), make_log2_scale(spec)
    cap_of, slopes = make_cap_of(spec), make_slopes(spec)
    tile_at, num_tiles, first_row = make_tile_at(spec, BLOCK, True), make_num_tiles(spec), make_first_row(spec)

    # ------------------------------------------------------------ helpers of this kernel
    @inline
    def own_half():
        """The warpgroup's half: of a block's queries, and of the columns of dQ."""
        return uniform(int32(thread_index() >> 7))

    @inline
    def own_warp():
        """The warp of the warpgroup: it has 16 keys, and of dQ 16 queries."""
        return int32((thread_index() >> 5) & 3)

    @inline
    def key_of_thread():
        return int32(own_warp() * 16 + lane_row(int32(thread_index() & 31)))

    @inline
    def query_of_thread():
        return int32((thread_index() >> 7) * HALF + thread_col(thread_index()))

    @inline
    def following(base, head, m):
        """The next block of queries: (head, m, 1 if there is one)."""
        m = int32(m + 1)
        if m == word(base, M_MAX):
            head, m = int32(head + 1), word(base, M_MIN)
        more = uniform(int32(1) if head < word(base, HEAD_END) else int32(0))       # not in the return: see dsl/inline.py
        return head, m, more

    @inline
    def hold(base):
        """Scheduling fence: waits on a barrier that has completed. ptxas would add products later and run out of registers."""
        passed.wait(base, int32(0))

    # ------------------------------------------------------------ load
    @inline
    def arrived():
        """Until all threads' copies have landed, where MMAs see them. All threads have also finished the step before."""
        cp_async.wait_all()
        fence_async()
        cuda.syncthreads()

    @inline
    def load_keys(a, base, batch, head_k, k_start, seqlen_k, first):
        copy_rows(int32(base + K), uint64(a.k + uint64(batch * a.k_batch + k_start * a.k_row + head_k * a.k_head)), a.k_row, a.k_dim,
                  first, seqlen_k, int32(WIDTH), BLOCK, PANELS, PANEL_BYTES)
        copy_rows(int32(base + V), uint64(a.v + uint64(batch * a.v_batch + k_start * a.v_row + head_k * a.v_head)), a.v_row, a.v_dim,
                  first, seqlen_k, int32(WIDTH_V), BLOCK, PANELS_V, PANEL_BYTES)

    @inline
    def load_stat(a, base, source, to, head, m):
        """lse or delta of a block of rows of one head."""
        byte = int32(thread_index() * 16)
        if byte < STAT_BYTES:
            row = first_row(a, word(base, BATCH), head, word(base, Q_START)) + int64(m * BLOCK)
            copy16(int32(base + to + byte), uint64(source + uint64(4 * row) + uint64(byte)))

    @inline
    def load_q(a, base, head, m):
        """Q and lse of a block of rows of one head."""
        copy_rows(int32(base + Q), uint64(load_shared_b64(base + Q_POINTER) + uint64(head * a.q_head)), a.q_row, a.q_dim, int32(m * BLOCK),
                  word(base, SEQLEN_Q), int32(WIDTH), BLOCK, PANELS, PANEL_BYTES)
        load_stat(a, base, a.row_log2, LSE, head, m)

    @inline
    def load_dout(a, base, head, m):
        """dO and delta of a block of rows of one head."""
        copy_rows(int32(base + DO), uint64(load_shared_b64(base + DO_POINTER) + uint64(head * a.dout_head)), a.dout_row, a.dout_dim,
                  int32(m * BLOCK), word(base, SEQLEN_Q), int32(WIDTH_V), BLOCK, PANELS_V, PANEL_BYTES)
        load_stat(a, base, a.row_delta, DELTA, head, m)

    # ------------------------------------------------------------ the MMAs. Opaque: the loop does not keep the descriptors of all products
    def make_issue_s(FIRST):
        """acc_s = issue(base, half, before): S^T = K Q^T of the warpgroup's queries in parts for sum_parts: the sum of the columns before
        FIRST, and a product for each 32 columns from there on."""
        END = min(FIRST + S_COLUMNS, HEAD_DIM)
        HERE, MORE, ALL, LATER = -(-(END - FIRST) // 32) * COUNT_S, END < HEAD_DIM, -(-(END - FIRST) // 32) + (FIRST > 0), FIRST > 0
        issue_more: Any = make_issue_s(END) if MORE else None

        @inline
        def issue(base, half, before):
            own = opaque(base)
            wgmma.fence()
            k, q = wgmma.k_major(own + K), wgmma.k_major(own + Q + half * HALF_BYTES)
            products = wgmma_float.kq_chunks(zeros(HERE), k, q, HEAD_DIM, FIRST, END, BLOCK)
            wgmma.commit()
            if LATER:
                products = join(before, products)
            if MORE:
                before = sum_parts(wgmma.wait_all(products), ALL)
                hold(base)
                products = issue_more(base, half, before)
            return products
        return issue
    issue_s = make_issue_s(0)

    @inline
    def issue_dp(base, half):
        """dP^T = V dO^T."""
        base = opaque(base)
        acc_dp = qk(zeros(COUNT_S), wgmma.k_major(base + V), wgmma.k_major(base + DO + half * HALF_BYTES), HEAD_DIM_V, BLOCK, BLOCK)
        wgmma.commit()
        return acc_dp

    def make_add(OPERAND, APART, COUNT, FIRST=0):
        """acc = add(base, acc, p, half): acc + P^T B of P^T or dS^T and the warpgroup's rows of dO or Q, CHUNK registers at a time."""
        HERE, MORE = min(CHUNK, COUNT - FIRST), FIRST + CHUNK < COUNT
        AT = OPERAND + FIRST // PANEL_COUNT * PANEL_BYTES + FIRST % PANEL_COUNT * 4     # two columns a register
        add_more: Any = make_add(OPERAND, APART, COUNT, FIRST + CHUNK) if MORE else None

        @inline
        def add(base, acc, p, half):
            own = opaque(base)
            wgmma.fence()
            product = wgmma.pv_parts(zeros(HERE), p, wgmma.mn_major(own + AT + half * HALF_BYTES, PANEL_BYTES), APART)
            wgmma.commit()
            acc = add_columns(acc, wgmma.wait_all(product), FIRST)
            hold(base)
            if MORE:
                acc = add_more(base, acc, p, half)
            return acc
        return add
    add_dv, add_dk = make_add(DO, PART_V, COUNT_V), make_add(Q, PART, COUNT_K)

    @inline
    def issue_dq(base, half):
        """dQ = dS K of the warpgroup's columns."""
        base = opaque(base)
        wgmma.fence()
        acc_dq = wgmma.dsk_parts(zeros(COUNT_DQ), wgmma.mn_major(base + DS, PANEL_BYTES),
                                 wgmma.mn_major(base + K + half * DQ_BYTES, PANEL_BYTES), BLOCK, PANEL_BYTES, PART)
        wgmma.commit()
        return acc_dq

    # ------------------------------------------------------------ the parts of a step
    @inline
    def probabilities(a, base, acc_s, early, shared, head, m, key, query, lse_at, far):
        """P^T, negative where dropped, and the derivative of the softcap."""
        batch, seqlen_q, seqlen_k = word(base, BATCH), word(base, SEQLEN_Q), word(base, SEQLEN_K)
        if SOFTCAP:
            acc_s, cap_slope = cap_of(a, acc_s)
        else:
            cap_slope = int32(0)
        acc_s = score(a, acc_s, early, shared, query, key, alibi_from(a, batch, seqlen_q, seqlen_k))
        if (m < word(base, FULL_MIN)) | (m >= word(base, FULL_MAX)):
            acc_s = keep(acc_s, limits_of(a, batch, key, seqlen_q, seqlen_k), query)
        if far != 0:
            at = uint64(4 * (first_row(a, batch, head, word(base, Q_START)) + int64(query)))
            acc_s = near_columns(a, acc_s, lse_at, uint64(a.row_lse + at))
        p = exp2_columns(acc_s, log2_scale(a), load_columns(lse_at, COUNT_S))
        return mark(a, p, draw(a, key, query, plane_of(a, batch, head))), cap_slope

    @inline
    def store_ds(base, ds):
        """The warp's 16 keys of dS^T by the warpgroup's queries, for the MMAs of dQ of both."""
        at, lane, first16 = int32(base + DS + own_warp() * (16 * ROW_BYTES)), int32(thread_index() & 31), int32((thread_index() >> 7) * 2)
        store_columns(part(ds, 0, 3), at, lane, first16, ONE, PANEL_BYTES)
        store_columns(part(ds, 1, 3), int32(at + PANEL_BYTES), lane, first16, ONE, PANEL_BYTES)
        store_columns(part(ds, 2, 3), int32(at + 2 * PANEL_BYTES), lane, first16, ONE, PANEL_BYTES)
        fence_async()

    @inline
    def add_dq(a, base, acc_dq, head, m, half):
        """Add 16 queries of the warpgroup's columns of dQ to their sums in memory."""
        row = int64(first_row(a, word(base, BATCH), head, word(base, Q_START)) + int64(m * BLOCK))
        at = ((row >> 4) + int64(own_warp())) * (16 * ACCUM_ROW) + int64(half * DQ_SUMS + (thread_index() & 31) * 16)
        add_sums(acc_dq, uint64(a.accum + uint64(at)), ONE, ONE, ACCUM_COLUMNS, ONE)

    @inline
    def step(a, base, acc_dk, acc_dv, shared, head, m, next_head, next_m, more):
        """Query block m of `head`: dV += P^T dO, dK += dS^T Q, dQ += dS K, and the next operands on their way."""
        arrived()
        half = own_half()
        key, query = int32(word(base, FIRST) + key_of_thread()), int32(m * BLOCK + query_of_thread())
        lse_at, delta_at = int32(base + LSE + 4 * query_of_thread()), int32(base + DELTA + 4 * query_of_thread())

        # S^T = K Q^T, dP^T = V dO^T; P^T = exp2(S^T - lse)
        acc_s = issue_s(base, half, int32(0))
        acc_dp = issue_dp(base, half)
        early = fetch(a, word(base, BATCH), head, query, key, word(base, SEQLEN_Q), word(base, SEQLEN_K))
        far = any_far(int32(base + LSE))
        acc_s = sum_parts(wgmma.wait_all_but_one(acc_s), PARTS_S)
        p, cap_slope = probabilities(a, base, acc_s, early, shared, head, m, key, query, lse_at, far)

        # dV += P^T dO, dS^T = P^T (dP^T - delta)
        acc_dp = wgmma.wait_all(acc_dp)
        acc_dv = add_dv(base, acc_dv, pack_kept(p), half)
        acc_ds = grad(a, p, acc_dp, load_columns(delta_at, COUNT_S))
        if SOFTCAP:
            acc_ds = multiply(acc_ds, slopes(cap_slope))
        ds = to_parts(acc_ds)
        store_ds(base, ds)
        cuda.syncthreads()          # dS is there, and nobody reads dO
        if more != 0:
            load_dout(a, base, next_head, next_m)

        # dK += dS^T Q, dQ = dS K
        acc_dk = add_dk(base, acc_dk, ds, half)
        acc_dq = issue_dq(base, half)
        cuda.syncthreads()          # nobody reads Q
        if more != 0:
            load_q(a, base, next_head, next_m)
        add_dq(a, base, wgmma.wait_all(acc_dq), head, m, half)
        return acc_dk, acc_dv

    # ------------------------------------------------------------ epilogue
    @inline
    def store(base, acc, scale, pointer, by_batch, by_row, by_head, by_dim, dim):
        """The warp's 16 keys of dK or dV that exist, 0 for keys past those used."""
        key, column = int32(word(base, FIRST) + key_of_thread()), thread_col(thread_index())
        used, keys = word(base, SEQLEN_K), word(base, KEYS)
        scale0, scale1 = scale if key < used else float32(0), scale if key + 8 < used else float32(0)
        at = uint64(pointer + uint64(word(base, BATCH) * by_batch + int64(word(base, K_START) + key) * by_row
                                     + word(base, HEAD_K) * by_head + column * by_dim))
        store_floats(scale_seen_rows(acc, scale0, scale1), at, uint64(at + uint64(8 * by_row)), by_dim,
                     int32(1) if key < keys else int32(0), int32(1) if key + 8 < keys else int32(0), int32(dim - column), ONE)

    @inline
    def epilogue(a, base, acc_dk, acc_dv):
        """The first warpgroup adds both halves of dK and stores it, the second those of dV."""
        half, own = own_half(), int32((thread_index() & 31) * 16)
        to_k, to_v = int32(base + K + own_warp() * (128 * COUNT_K) + own), int32(base + V + own_warp() * (128 * COUNT_V) + own)
        cuda.syncthreads()          # until all warps have read K and V
        if half == 0:
            store_piece(acc_dv, to_v)
        else:
            store_piece(acc_dk, to_k)
        cuda.syncthreads()
        if half == 0:
            store(base, add_piece(acc_dk, to_k), a.grad_scale, a.dk, a.dk_batch, a.dk_row, a.dk_head, a.dk_dim, a.head_dim)
        else:
            store(base, add_piece(acc_dv, to_v), a.keep_scale if DROPOUT else float32(1), a.dv, a.dv_batch, a.dv_row, a.dv_head, a.dv_dim,
                  a.head_dim_v)

    def kernel(a):
        wait_for_previous()
        t = int32(cuda.blockIdx.x)
        if t >= num_tiles(a):
            return
        base = int32((shared_address(cuda.shared.array(0, uint8)) + ALIGN - 1) & -ALIGN)
        n_block, head_k, batch, q_start, seqlen_q, k_start, seqlen_k, keys = tile_at(a, t)
        first = int32(n_block * BLOCK)
        m_min, full_min, full_max, m_max = key_bounds(a, batch, first, BLOCK, seqlen_q, seqlen_k)
        m_min, m_max = kept_queries(a, batch, head_k, first, seqlen_k, m_min, m_max)
        if cuda.threadIdx.x == 0:
            passed.init(base)
            passed.arrive(base)
            store_shared_b64(base + Q_POINTER, uint64(a.q + uint64(batch * a.q_batch + q_start * a.q_row)))
            store_shared_b64(base + DO_POINTER, uint64(a.dout + uint64(batch * a.dout_batch + q_start * a.dout_row)))
            park(base, BATCH, batch)
            park(base, Q_START, q_start)
            park(base, SEQLEN_Q, seqlen_q)
            park(base, SEQLEN_K, seqlen_k)
            park(base, FIRST, first)
            park(base, M_MIN, m_min)
            park(base, FULL_MIN, full_min)
            park(base, FULL_MAX, full_max)
            park(base, HEAD_K, head_k)
            park(base, K_START, k_start)
            park(base, KEYS, keys)
            park(base, M_MAX, m_max)
            park(base, HEAD_END, int32((head_k + 1) * a.group))
        cuda.syncthreads()
        acc_dk, acc_dv = own_zeros(COUNT_K), own_zeros(COUNT_V)
        more = uniform(int32(1) if m_min < m_max else int32(0))
        head, m = int32(head_k * a.group), m_min
        if more != 0:
            load_keys(a, base, batch, head_k, k_start, seqlen_k, first)
            load_q(a, base, head, m)
            load_dout(a, base, head, m)
        while more != 0:
            next_head, next_m, more = following(base, head, m)
            shared = prepare(a, word(base, BATCH), head)
            acc_dk, acc_dv = step(a, base, acc_dk, acc_dv, shared, head, m, next_head, next_m, more)
            head, m = next_head, next_m
        epilogue(a, base, acc_dk, acc_dv)

    return kernel, smem.size
