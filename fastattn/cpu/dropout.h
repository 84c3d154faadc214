/* Philox4x32-10 (Salmon et al., SC'11) and the keep bytes of a tile, addressed as philox.py defines: one counter covers rows
 * {g, g + 8} and columns {2t, 2t + 1, 2t + 8, 2t + 9} of a 16 x 16 block, so four neighbouring counters give 16 columns of two rows. */
#pragma once
#include "simd.h"

/* keep[row - row_first][j], 1 or 0, for rows [row_first, row_last) and the `n` keys from `key_first` (a multiple of 16); n is rounded up
 * to 16 and ld has room for it. `head` is batch * num_heads + head. */
static void keep_tile(int8_t *keep, long ld, long row_first, long row_last, long key_first, long n, uint32_t head, uint32_t offset, uint64_t seed,
                      uint32_t threshold) {
  enum { WIDTH = BLOCK_N / 4 };
  uint32_t word[4][WIDTH];
  long counters = (n + 15) / 16 * 4;
  for (long block = row_first / 16; block * 16 < row_last; block++)
    for (long g = 0; g < 8; g++) {
      long upper = block * 16 + g, lower = upper + 8;
      if (upper >= row_last || lower < row_first) continue;
      if (upper < row_first && lower >= row_last) continue;
      for (long c = 0; c < counters; c++) {
        uint32_t x0 = (uint32_t)(block * 8 + g), x1 = (uint32_t)(key_first / 4 + c), x2 = head, x3 = offset;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
          uint64_t p0 = (uint64_t)x0 * 0xD2511F53u, p1 = (uint64_t)x2 * 0xCD9E8D57u;
          x0 = (uint32_t)(p1 >> 32) ^ x1 ^ k0;
          x1 = (uint32_t)p1;
          x2 = (uint32_t)(p0 >> 32) ^ x3 ^ k1;
          x3 = (uint32_t)p0;
          k0 += 0x9E3779B9u;
          k1 += 0xBB67AE85u;
        }
        word[0][c] = x0;
        word[1][c] = x1;
        word[2][c] = x2;
        word[3][c] = x3;
      }
      for (int half = 0; half < 2; half++) {
        long row = half ? lower : upper;
        if (row < row_first || row >= row_last) continue;
        int8_t *out = keep + (row - row_first) * ld;
        const uint32_t *left = word[2 * half], *right = word[2 * half + 1];
        for (long j = 0; j < counters / 4; j++)
          for (long t = 0; t < 4; t++) {
            uint32_t a = left[4 * j + t], b = right[4 * j + t];
            out[16 * j + 2 * t] = (a & 0xffffu) >= threshold;
            out[16 * j + 2 * t + 1] = (a >> 16) >= threshold;
            out[16 * j + 8 + 2 * t] = (b & 0xffffu) >= threshold;
            out[16 * j + 9 + 2 * t] = (b >> 16) >= threshold;
          }
      }
    }
}
