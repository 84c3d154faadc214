"""Constants of traced functions that host and kernels share."""
from __future__ import annotations

BITMAP_THREADS = 32         # a warp for each tile: blocks of one, so that tiles of unlike cost do not wait for each other
ROWS_BETWEEN = 4            # rows of a partial tile that are asked for between looks at whether it is known
ROWS_APART = 85             # of neighbours in their order: prime to all tile sizes, which have no factors but 2 and 3
ROUND_THREADS = 256
FEWEST_BITS = 8             # of the largest of such sums' units, however many they are; the rest has 31 more
RECORD = 24                 # bytes of an element's sum that has the same bits in any order (fixed.py)
ANY_ORDER, EXPONENTS, UNITS = range(3)      # how gradients of captured arrays are summed: at once, or in fixed.py's two passes
MOST_KEPT = 64              # bitmaps of a BlockMask: of tilings, lengths and streams
