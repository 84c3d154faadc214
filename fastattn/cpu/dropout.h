/* Philox4x32-10 (Salmon et al., SC'11) and the keep bits of a tile, addressed as philox.py defines. One counter covers rows
 * {g, g + 8} and columns {2t, 2t + 1, 2t + 8, 2t + 9} of a 16 x 16 block. Eight neighbouring counters cover 32 columns of two rows. */
#pragma once
#include "simd.h"

#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u

/* bits[w]: bit 2c + h says whether half h of output word w of counter (c0, c1 + c, c2, c3), c = 0 to 7, is >= threshold. */
#if defined(__AVX512BW__)
/* Eight counters in 64-bit lanes: the 32 x 32 -> 64 multiplication reads the low halves only. */
ALWAYS_INLINE void philox8(uint32_t bits[4], uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed, uint32_t threshold) {
  __m512i x0 = _mm512_set1_epi64(c0), x1 = _mm512_add_epi64(_mm512_set1_epi64(c1), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  __m512i x2 = _mm512_set1_epi64(c2), x3 = _mm512_set1_epi64(c3), m0 = _mm512_set1_epi64(PHILOX_M0), m1 = _mm512_set1_epi64(PHILOX_M1);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++, k0 += PHILOX_W0, k1 += PHILOX_W1) {
    __m512i p0 = _mm512_mul_epu32(x0, m0), p1 = _mm512_mul_epu32(x2, m1);
    x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1, _mm512_set1_epi64(k0), 0x96);
    x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3, _mm512_set1_epi64(k1), 0x96);
    x1 = p1;
    x3 = p0;
  }
  const __m256i t = _mm256_set1_epi16((short)threshold);
  bits[0] = _mm256_cmpge_epu16_mask(_mm512_cvtepi64_epi32(x0), t);
  bits[1] = _mm256_cmpge_epu16_mask(_mm512_cvtepi64_epi32(x1), t);
  bits[2] = _mm256_cmpge_epu16_mask(_mm512_cvtepi64_epi32(x2), t);
  bits[3] = _mm256_cmpge_epu16_mask(_mm512_cvtepi64_epi32(x3), t);
}
#else
ALWAYS_INLINE void philox8(uint32_t bits[4], uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed, uint32_t threshold) {
  uint32_t x0[8], x1[8], x2[8], x3[8];
  for (uint32_t c = 0; c < 8; c++) x0[c] = c0, x1[c] = c1 + c, x2[c] = c2, x3[c] = c3;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++, k0 += PHILOX_W0, k1 += PHILOX_W1)
    for (int c = 0; c < 8; c++) {
      uint64_t p0 = (uint64_t)x0[c] * PHILOX_M0, p1 = (uint64_t)x2[c] * PHILOX_M1;
      x0[c] = (uint32_t)(p1 >> 32) ^ x1[c] ^ k0;
      x2[c] = (uint32_t)(p0 >> 32) ^ x3[c] ^ k1;
      x1[c] = (uint32_t)p1;
      x3[c] = (uint32_t)p0;
    }
  const uint32_t *words[4] = {x0, x1, x2, x3};
  for (int w = 0; w < 4; w++) {
    bits[w] = 0;
    for (int c = 0; c < 8; c++)
      bits[w] |= (uint32_t)((words[w][c] & 0xffffu) >= threshold) << (2 * c) | (uint32_t)((words[w][c] >> 16) >= threshold) << (2 * c + 1);
  }
}
#endif

/* Set bit j % 64 of keep[(row - row_first) * ld + j / 64] for rows [row_first, row_last) and the `n` keys from `key_first`, a multiple of
 * 16. Whole groups of 32 keys are written. Rows, keys and `head`
 * (batch * num_heads + head) count in the problem whose mask it is. */
static void keep_tile(uint64_t *keep, long ld, long row_first, long row_last, long key_first, long n, uint32_t head, uint32_t offset, uint64_t seed,
                      uint32_t threshold) {
  if (threshold > 0xffff) { /* p = 1 keeps nothing */
    memset(keep, 0, (size_t)((row_last - row_first) * ld * 8));
    return;
  }
  for (long block = row_first / 16; block * 16 < row_last; block++)
    for (long g = 0; g < 8; g++) {
      long upper = block * 16 + g, lower = upper + 8;
      int has_upper = upper >= row_first && upper < row_last, has_lower = lower >= row_first && lower < row_last;
      if (!has_upper && !has_lower) continue;
      for (long j = 0; j < n; j += 32) {
        uint32_t bits[4];
        philox8(bits, (uint32_t)(block * 8 + g), (uint32_t)((key_first + j) / 4), head, offset, seed, threshold);
        for (int half = 0; half < 2; half++) {
          if (!(half ? has_lower : has_upper)) continue;
          /* a word has 8 columns of each of two 16-column blocks: columns 0-7 in the left word, 8-15 in the right one */
          uint32_t left = bits[2 * half], right = bits[2 * half + 1];
          uint32_t row = (left & 0xff) | (right & 0xff) << 8 | (left & 0xff00) << 8 | (right & 0xff00) << 16;
          memcpy((char *)(keep + ((half ? lower : upper) - row_first) * ld) + j / 8, &row, 4);
        }
      }
    }
}
