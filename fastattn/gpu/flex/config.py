"""Constants of traced functions that host and kernels share."""
from __future__ import annotations

BITMAP_THREADS = 32         # a warp for each tile: blocks of one, so that tiles of unlike cost do not wait for each other
ROWS_BETWEEN = 4            # rows of a partial tile that are asked for between looks at whether it is known
ROWS_APART = 85             # of neighbours in their order: prime to all tile sizes, which have no factors but 2 and 3
ROUND_THREADS = 256
MOST_KEPT = 64              # bitmaps of a BlockMask: of tilings, lengths and streams
