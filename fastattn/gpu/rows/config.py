"""Sizes of the memory-bound kernels that work on one row at a time."""
from __future__ import annotations

# preprocess: delta and lse of each query row
PADDING = 128               # lse, delta and sums of dq are padded to a multiple: tiles of 128, 64, 32 and 16 rows fit
PREPROCESS_THREADS = 256
PREPROCESS_ROWS = PADDING   # per thread block: enough to amortise its start-up; never spans two sequences
SINK_THREADS = 1024         # dsinks: one block a head

# pack_mask
MASK_WARPS = 4, 32          # of a thread block, for little and for much work: a padding mask of 512 keys keeps one busy

# postprocess: float32 sums to gradients
ROUND_THREADS = 256
ROUND_ROWS = 16             # that a warp rounds at a time: a band of sums, ptx/mma.py

# groups: dk and dv from parts
GROUP_THREADS = 256
GROUP_COLUMNS = 8           # of a thread: 16 bytes of results

# split: float32 operands to their parts
SPLIT_THREADS = 256
SPLIT_COLUMNS = 8           # of a thread: it stores 16 bytes of each part

# quantize_fp8: memory-bound, one element a thread and step
QUANTIZE_THREADS = 256
QUANTIZE_ROWS = 64          # of one head, of a thread block: 16 KB of 16-bit numbers at head_dim 128

# transpose_8bit
TRANSPOSE_THREADS = 256

# append of keys and values, and the rotation of q: memory-bound, 16 bytes a thread
APPEND_THREADS = 256

# widen_keys: memory-bound, 16 numbers a thread and step
WIDEN_THREADS = 256
WIDEN_KEYS = 64             # of a request, of a thread block
WIDEN_BYTES = 1 << 30       # of temporary memory for one launch

# merge_states
MERGE_THREADS = 128
MERGE_WARPS = 8             # of a block that merges in place: a row each

# transform_bias_rescale_qkv
TRANSFORM_WARPS = 8
TRANSFORM_THREADS = 32 * TRANSFORM_WARPS
TRANSFORM_ROWS = 4          # per warp: 80 KB in flight a multiprocessor; an H200 needs 30 (bandwidth times latency)
TRANSFORM_BLOCK_ROWS = TRANSFORM_WARPS * TRANSFORM_ROWS
LOOPS = 4                   # blocks of rows of a backward block: partial sums are 1/64 of dqkv, for 16-bit dtypes 1/32
SUM_WARPS = 32
SUM_THREADS = 32 * SUM_WARPS

# accumulate
ACCUMULATE_THREADS = 256
ACCUMULATE_STEPS = 4        # vectors of a thread: 16 KB of a block, whose loads can be in flight together
