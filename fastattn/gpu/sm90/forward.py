"""Forward for Hopper: copies and products run asynchronously, each warpgroup has one role, blocks stay and take tile after tile.

    warpgroup 0     one thread asks the copy engine for Q, K and V; takes tile numbers from a counter
    warpgroups 1..  64 query rows each: S = Q K^T and O += P V on the tensor cores, softmax between them

    shared memory   Q | STAGES x (K, V) | out, where there is room | barriers | tile records
    Q_FULL, K_FULL[s], V_FULL[s]      copy engine -> consumers: the bytes are there
    Q_EMPTY, K_EMPTY[s], V_EMPTY[s]   consumers -> producer: the place is free
    TILE_FULL[r], TILE_EMPTY[r]       tile records: the producer is up to two tiles ahead

A step issues S of its block, then O += P V of the block before, and computes its softmax while that product runs; key blocks go from
last to first. A tile begins with S of its first block and ends with P V of its last and the epilogue, during which Q of the next arrives.
What this rung wins over forward_sm80: no thread copies or waits for copies, and a warpgroup's softmax hides behind products, its own
and another's. (Design: FlashAttention-3, Shah et al. 2024.)
"""
from __future__ import annotations

from typing import Any

from numba import cuda, float32, int32, uint8, uint64

from ..dsl.inline import divide, inline
from ..ptx import mbarrier, tma, wgmma
from ..ptx.memory import atomic_add_b32, atomic_inc_wrap, fence_gpu, shared_address, store_b32
from ..ptx.sync import any_lane, any_thread, barrier, barrier_arrive, decrease_registers, fence_async, increase_registers, opaque, uniform
from ..spec import Spec
from ..tile.dropout import make_dropout
from ..tile.fragments import make_pack, scale_rows, zeros
from ..tile.mask import diagonal_of, make_bounds, make_keep
from ..tile.schedule import make_num_tiles
from ..tile.scores import make_score
from ..tile.smem import Smem, make_clear, make_copy_rows, panels
from ..tile.softmax import NEG_INF, make_softmax
from .config import ForwardSm90Config
from .epilogue import OUT_PANEL, make_epilogue
from .records import RECORDS, make_records


def make_forward(spec: Spec, config: ForwardSm90Config) -> tuple[Any, int]:
    """(kernel, bytes of shared memory)."""
    BLOCK_M, BLOCK_N, STAGES, CONSUMERS = config.block_m, config.block_n, config.stages, config.block_m // 64
    HEAD_DIM, PANELS, PANELS_V = spec.head_dim, panels(spec.head_dim), panels(spec.head_dim_v)
    Q_PANEL, KV_PANEL = BLOCK_M * 128, BLOCK_N * 128
    Q_BYTES, K_BYTES, V_BYTES = PANELS * Q_PANEL, PANELS * KV_PANEL, PANELS_V * KV_PANEL
    COUNT_S, COUNT_O = BLOCK_N // 2, spec.head_dim_v // 2
    STAGE_BITS = STAGES.bit_length() - 1
    smem = Smem()
    Q, K, V = smem.take(Q_BYTES), smem.take(STAGES * K_BYTES), smem.take(STAGES * V_BYTES)
    OUT = smem.take(CONSUMERS * min(config.out_panels, PANELS_V) * OUT_PANEL)
    put_tile, word, get, TILE_FULL, TILE_EMPTY = make_records(spec, BLOCK_M, smem)
    Q_FULL, Q_EMPTY = smem.barriers(1), smem.barriers(1)
    K_FULL, K_EMPTY, V_FULL, V_EMPTY = (smem.barriers(STAGES) for _ in range(4))
    WARPS, THREADS = 4 * CONSUMERS, 128 * CONSUMERS
    PACKED, MASKED_ALWAYS = spec.packed, spec.left or spec.right
    TURN_BARRIER, V_BARRIER, VOTE_BARRIER = 4, 8, 9     # named barriers: one for each consumer, but V's for all; epilogue.py has 1 to 3
    OPTIMISTIC = config.optimistic
    TURNS, FEW_UNIFORM = config.turns and CONSUMERS > 1, MASKED_ALWAYS and HEAD_DIM > 192
    qk, pv = wgmma.make_products(spec.dtype)
    to_half = make_pack(spec.dtype)
    give_registers, take_registers = decrease_registers(config.producer_registers), increase_registers(config.consumer_registers)
    (row_bounds, block_bounds), keep = make_bounds(spec, BLOCK_N), make_keep(spec)
    prepare, fetch, score = make_score(spec, COUNT_S)
    draw, dropout = make_dropout(spec, COUNT_S, EARLY=not spec.mask and spec.bias is None)      # beside the product of S
    num_tiles = make_num_tiles(spec)
    HINTS = config.hints
    copy_q, copy_kv = (make_copy_rows(tma.evict_first), make_copy_rows(tma.evict_last)) if HINTS else (make_copy_rows(), make_copy_rows())
    update, optimistic, finish = make_softmax(spec)
    clear_v = make_clear(BLOCK_N, PANELS_V, THREADS)
    epilogue = make_epilogue(spec, config, OUT, finish, get, TILE_EMPTY)

    # ------------------------------------------------------------ helpers of this kernel
    @inline
    def tile_blocks(a, m_block, seqlen_q, seqlen_k):
        """The key blocks [n_min, n_max) that all warpgroups of a tile go through."""
        last = min((m_block + 1) * BLOCK_M, seqlen_q)
        n_min, _, _, n_max = block_bounds(a, int32(m_block * BLOCK_M), last, diagonal_of(a, seqlen_q, seqlen_k), seqlen_k)
        return n_min, n_max

    @inline
    def load_k(a, base, it, row, head, batch):
        stage, free = int32(it & (STAGES - 1)), int32(((it >> STAGE_BITS) & 1) ^ 1)
        mbarrier.wait(base + K_EMPTY + 8 * stage, free)
        mbarrier.arrive_expect(base + K_FULL + 8 * stage, int32(K_BYTES))
        copy_kv(base, a.map_k, K_FULL + 8 * stage, K + stage * K_BYTES, KV_PANEL, PANELS, row, head, batch)

    @inline
    def load_v(a, base, it, row, head, batch):
        stage, free = int32(it & (STAGES - 1)), int32(((it >> STAGE_BITS) & 1) ^ 1)
        mbarrier.wait(base + V_EMPTY + 8 * stage, free)
        mbarrier.arrive_expect(base + V_FULL + 8 * stage, int32(V_BYTES))
        copy_kv(base, a.map_v, V_FULL + 8 * stage, V + stage * V_BYTES, KV_PANEL, PANELS_V, row, head, batch)

    @inline
    def prefetch_q(a, base, i):
        """Asks for Q of the i-th tile in the L2 cache: behind all copies of the tile before, because the copy engine works in order."""
        row, head, plane = int32(word(base, i, 3) + word(base, i, 0) * BLOCK_M), word(base, i, 1), int32(0) if PACKED else word(base, i, 2)
        for p in range(PANELS):
            if HINTS:
                tma.prefetch_hinted(a.map_q, int32(p * 64), row, head, plane, tma.evict_first())
            else:
                tma.prefetch(a.map_q, int32(p * 64), row, head, plane)

    @inline
    def load(a, base):
        """The producer: one thread."""
        it, i, t, tiles = int32(0), int32(0), int32(cuda.blockIdx.x), num_tiles(a)
        row, end, head_k, plane, going = int32(0), int32(0), int32(0), int32(0), True
        while going:
            put_tile(a, base, i, t, tiles)
            while row > end:            # the other blocks of the tile before
                row = opaque(int32(row - BLOCK_N))
                load_k(a, base, it, row, head_k, plane)
                load_v(a, base, it, row, head_k, plane)
                it = int32(it + 1)
            going = t < tiles
            if going:
                prefetch_q(a, base, i)
                t = int32(atomic_add_b32(a.counter, int32(1)) + int32(cuda.gridDim.x))     # the tile after this one
                m_block, head, q_start, k_start = word(base, i, 0), word(base, i, 1), word(base, i, 3), word(base, i, 7)
                n_min, n_max = tile_blocks(a, m_block, word(base, i, 4), word(base, i, 5))
                head_k, plane = divide(head, a.group), int32(0) if PACKED else word(base, i, 2)
                row, end = int32(k_start + (n_max - 1) * BLOCK_N), int32(k_start + n_min * BLOCK_N)
                load_k(a, base, it, row, head_k, plane)
                mbarrier.wait(base + Q_EMPTY, int32((i & 1) ^ 1))
                mbarrier.arrive_expect(base + Q_FULL, int32(Q_BYTES))
                copy_q(base, a.map_q, Q_FULL, Q, Q_PANEL, PANELS, int32(q_start + m_block * BLOCK_M), head, plane)
                load_v(a, base, it, row, head_k, plane)
                it, i = int32(it + 1), int32(i + 1)
        fence_gpu()     # the last block to come here leaves the counter as it was found
        if atomic_inc_wrap(uint64(a.counter + uint64(4)), int32(cuda.gridDim.x) - 1) == int32(cuda.gridDim.x) - 1:
            store_b32(a.counter, int32(0))

    @inline
    def intervals(a, row, diagonal, seqlen_k):
        """(lo0, hi0, lo1, hi1): keys that the thread's two rows see."""
        lo0, hi0 = row_bounds(a, row, diagonal, seqlen_k)
        lo1, hi1 = row_bounds(a, int32(row + 8), diagonal, seqlen_k)
        return lo0, hi0, lo1, hi1

    @inline
    def q_rows(base, w):
        """Opaque under a mask at head_dim 256: the uniform registers do not suffice there, and the assembler would use none of them."""
        if FEW_UNIFORM:
            w = opaque(w)
        return wgmma.k_major(base + Q + w * 64 * 128)

    @inline
    def k_stage(base, stage):
        return wgmma.k_major(base + K + stage * K_BYTES)

    @inline
    def v_stage(base, stage):
        return wgmma.mn_major(base + V + stage * V_BYTES, KV_PANEL)

    @inline
    def wait_turn(w):
        if TURNS:
            barrier(int32(TURN_BARRIER + opaque(w)), int32(256))       # opaque: added here each time, no register kept for it

    @inline
    def pass_turn(w):
        if TURNS:
            after = int32(opaque(w) + 1)
            barrier_arrive(int32(TURN_BARRIER if after == CONSUMERS else TURN_BARRIER + after), int32(256))

    @inline
    def changed(alpha0, alpha1, sum0, sum1):
        """1 where the output must be rescaled; asks for the sums, which are never negative, so that it comes after the softmax."""
        return int32(1) if alpha0 != float32(1) or alpha1 != float32(1) or sum0 < float32(0) or sum1 < float32(0) else int32(0)

    @inline
    def release_k(base, stage, n_block, n_min, lane):
        """The stage of K, and Q with the last block of a tile, may be overwritten."""
        if lane == 0:
            mbarrier.arrive(base + K_EMPTY + 8 * stage)
            if n_block == n_min:
                mbarrier.arrive(base + Q_EMPTY)

    @inline
    def scores(a, acc_s, early, column, tile):
        """Products to scores; `early` is what fetch gave for them."""
        _, _, seqlen_q, seqlen_k, row, _, slope, _ = tile
        return score(a, acc_s, early, slope, row, column, int32(seqlen_k - seqlen_q))

    @inline
    def redo(a, base, w, stage, acc_s, acc_o, max0, max1, sum0, sum1, column, tile):
        """The block's scores once more, and the maxima they call for. All of a warpgroup comes here or none."""
        head, batch, seqlen_q, seqlen_k, row, _, _, _ = tile
        acc_o = wgmma.wait_all(acc_o)
        wgmma.fence()
        acc_s = qk(acc_s, q_rows(base, w), k_stage(base, stage), HEAD_DIM, BLOCK_M, BLOCK_N)
        wgmma.commit()
        early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
        acc_s = scores(a, wgmma.wait_all(acc_s), early, column, tile)
        acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
        return acc_s, scale_rows(acc_o, alpha0, alpha1), max0, max1, sum0, sum1

    @inline
    def issue_first(base, w, stage):
        """S of a tile's first block, alone."""
        wait_turn(w)
        wgmma.fence()
        acc_s = qk(zeros(COUNT_S), q_rows(base, w), k_stage(base, stage), HEAD_DIM, BLOCK_M, BLOCK_N)
        wgmma.commit()
        pass_turn(w)
        return acc_s

    @inline
    def issue(base, w, acc_o, p, stage, before, parity):
        """S of the block in `stage`, then O += P V of the one `before`."""
        wait_turn(w)
        wgmma.fence()
        acc_s = qk(zeros(COUNT_S), q_rows(base, w), k_stage(base, stage), HEAD_DIM, BLOCK_M, BLOCK_N)
        wgmma.commit()
        mbarrier.wait(base + V_FULL + 8 * before, parity)
        wgmma.fence()
        acc_o = pv(acc_o, p, v_stage(base, before))
        wgmma.commit()
        pass_turn(w)
        return acc_s, acc_o

    @inline
    def issue_last(base, w, acc_o, p, stage, parity):
        """O += P V of a tile's last block, alone."""
        mbarrier.wait(base + V_FULL + 8 * stage, parity)
        wait_turn(w)
        wgmma.fence()
        acc_o = pv(acc_o, p, v_stage(base, stage))
        wgmma.commit()
        pass_turn(w)
        return acc_o

    def make_step(MASKED, OPTIMISTIC_STEP):
        @inline
        def step(a, base, w, lane, col, acc_o, p, max0, max1, sum0, sum1, it, n_block, tile):
            """Scores and probabilities of n_block, while O takes in the block before."""
            head, batch, seqlen_q, seqlen_k, row, rows, _, n_min = tile
            before, parity = int32(it & (STAGES - 1)), int32((it >> STAGE_BITS) & 1)
            it = int32(it + 1)
            stage = int32(it & (STAGES - 1))
            column = int32(n_block * BLOCK_N + col)
            mbarrier.wait(base + K_FULL + 8 * stage, int32((it >> STAGE_BITS) & 1))
            acc_s, acc_o = issue(base, w, acc_o, p, stage, before, parity)
            early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
            words = draw(a, row, column, int32(batch * a.num_heads + head))
            acc_s = wgmma.wait_all_but_one(acc_s)
            # each wait for O stands in both branches: in straight code the assembler moves it up, before the softmax that should run
            # beside the product
            if OPTIMISTIC_STEP:
                acc_s, part0, part1, lags = optimistic(a, scores(a, acc_s, early, column, tile), max0, max1)
                if uniform(any_thread(int32(VOTE_BARRIER + opaque(w)), int32(128), lags)) != 0:
                    acc_s, acc_o, max0, max1, sum0, sum1 = redo(a, base, w, stage, acc_s, acc_o, max0, max1, sum0, sum1, column,
                                                                        tile)
                else:
                    acc_o = wgmma.wait_all(acc_o)
                    sum0, sum1 = sum0 + part0, sum1 + part1
                release_k(base, stage, n_block, n_min, lane)
                acc_s = dropout(a, acc_s, words)
            else:
                release_k(base, stage, n_block, n_min, lane)
                acc_s = scores(a, acc_s, early, column, tile)
                if MASKED:
                    acc_s = keep(acc_s, rows, column)
                acc_s, max0, max1, sum0, sum1, alpha0, alpha1 = update(a, acc_s, max0, max1, sum0, sum1)
                acc_s = dropout(a, acc_s, words)
                if any_lane(changed(alpha0, alpha1, sum0, sum1)) != 0:
                    acc_o = scale_rows(wgmma.wait_all(acc_o), alpha0, alpha1)
                else:
                    acc_o = wgmma.wait_all(acc_o)
            if lane == 0:
                mbarrier.arrive(base + V_EMPTY + 8 * before)
            p = to_half(acc_s)
            return acc_o, p, max0, max1, sum0, sum1, it
        return step

    step_slow, step_fast = make_step(MASKED_ALWAYS, False), make_step(False, OPTIMISTIC)

    @inline
    def coordinates(a, base, i, w, thread, lane):
        """Of the i-th tile; its key blocks [fast_min, fast_max) need no mask for this warpgroup's rows."""
        m_block, head, batch, seqlen_q, seqlen_k = get(base, i, 0), get(base, i, 1), get(base, i, 2), get(base, i, 4), get(base, i, 5)
        row0 = int32(m_block * BLOCK_M + w * 64)
        row = int32(row0 + ((thread >> 5) & 3) * 16 + (lane >> 2))
        diagonal = diagonal_of(a, seqlen_q, seqlen_k)
        n_min, n_max = tile_blocks(a, m_block, seqlen_q, seqlen_k)
        _, full_min, full_max, _ = block_bounds(a, row0, int32(row0 + 64), diagonal, seqlen_k)
        n_min, n_max = uniform(n_min), uniform(n_max)
        fast_max = uniform(int32(max(min(full_max, n_max - 1), n_min)))
        fast_min = int32(n_min + 1) if OPTIMISTIC else n_min       # the last block would give Q's place back a softmax later
        fast_min = uniform(int32(max(min(full_min, fast_max), fast_min)))
        tile = head, batch, seqlen_q, seqlen_k, row, intervals(a, row, diagonal, seqlen_k), prepare(a, batch, head), n_min
        return tile, n_max, fast_min, fast_max

    def kernel(a):
        base = opaque(int32((shared_address(cuda.shared.array(0, uint8)) + 1023) & -1024))     # opaque: not made again
        warpgroup = uniform(int32(cuda.threadIdx.x >> 7))
        thread = int32(cuda.threadIdx.x & 127)
        if cuda.threadIdx.x == 0:
            mbarrier.init(base + Q_FULL, int32(1))
            mbarrier.init(base + Q_EMPTY, int32(WARPS))
            for s in range(RECORDS):
                mbarrier.init(base + TILE_FULL + 8 * s, int32(1))
                mbarrier.init(base + TILE_EMPTY + 8 * s, int32(WARPS))
            for s in range(STAGES):
                mbarrier.init(base + K_FULL + 8 * s, int32(1))
                mbarrier.init(base + K_EMPTY + 8 * s, int32(WARPS))
                mbarrier.init(base + V_FULL + 8 * s, int32(1))
                mbarrier.init(base + V_EMPTY + 8 * s, int32(WARPS))
            mbarrier.fence_init()
        cuda.syncthreads()
        if warpgroup == 0:
            give_registers()
            if thread == 0:
                load(a, base)
        else:
            take_registers()
            w, lane = int32(warpgroup - 1), int32(thread & 31)
            col = int32((lane & 3) * 2)
            it, i = int32(-1), int32(0)      # it: the last block whose scores were issued
            if w == CONSUMERS - 1:
                pass_turn(w)
            mbarrier.wait(base + TILE_FULL, int32(0))
            while get(base, i, 6) != 0:
                tile, n_max, fast_min, fast_max = coordinates(a, base, i, w, thread, lane)
                head, batch, seqlen_q, seqlen_k, row, rows, _, n_min = tile
                n_block = int32(n_max - 1)
                column = int32(n_block * BLOCK_N + col)
                it = int32(it + 1)
                stage, parity = int32(it & (STAGES - 1)), int32((it >> STAGE_BITS) & 1)
                mbarrier.wait(base + Q_FULL, int32(i & 1))
                mbarrier.wait(base + K_FULL + 8 * stage, parity)
                acc_s = issue_first(base, w, stage)
                early = fetch(a, batch, head, row, column, seqlen_q, seqlen_k)
                words = draw(a, row, column, int32(batch * a.num_heads + head))
                acc_s = wgmma.wait_all(acc_s)
                release_k(base, stage, n_block, n_min, lane)
                acc_s = scores(a, acc_s, early, column, tile)
                if MASKED_ALWAYS or n_max * BLOCK_N > seqlen_k:
                    acc_s = keep(acc_s, rows, column)
                acc_s, max0, max1, sum0, sum1, _, _ = update(a, acc_s, NEG_INF, NEG_INF, float32(0), float32(0))
                acc_o, p = zeros(COUNT_O), to_half(dropout(a, acc_s, words))
                if PACKED:
                    if seqlen_k - n_block * BLOCK_N < BLOCK_N:
                        mbarrier.wait(base + V_FULL + 8 * stage, parity)
                        clear_v(int32(base + V + stage * V_BYTES), int32(seqlen_k - n_block * BLOCK_N), int32(w * 128 + thread))
                        fence_async()
                        barrier(int32(V_BARRIER), int32(THREADS))
                while n_block > n_min:
                    n_block = int32(n_block - 1)
                    if (n_block >= fast_min) & (n_block < fast_max):
                        acc_o, p, max0, max1, sum0, sum1, it = step_fast(
                            a, base, w, lane, col, acc_o, p, max0, max1, sum0, sum1, it, n_block, tile)
                    else:
                        acc_o, p, max0, max1, sum0, sum1, it = step_slow(
                            a, base, w, lane, col, acc_o, p, max0, max1, sum0, sum1, it, n_block, tile)
                stage = int32(it & (STAGES - 1))
                acc_o = wgmma.wait_all(issue_last(base, w, acc_o, p, stage, int32((it >> STAGE_BITS) & 1)))
                if lane == 0:
                    mbarrier.arrive(base + V_EMPTY + 8 * stage)
                epilogue(a, base, acc_o, max0, max1, sum0, sum1, i, w, thread, lane, col)
                i = int32(i + 1)
                mbarrier.wait(base + TILE_FULL + 8 * (i & (RECORDS - 1)), int32((i >> 2) & 1))
            if thread == 0:
                tma.wait_all()

    return kernel, smem.size
