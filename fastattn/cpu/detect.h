/* What the CPU can run and the system has enabled, under the names of /proc/cpuinfo.
 *
 * Read with CPUID, because __builtin_cpu_supports has no name for F16C or AMX in clang 14. A vector extension needs its registers as well:
 * the system saves those whose bits are set in XCR0. */
#pragma once
#include <stdint.h>

enum { LEAF_1_C, LEAF_7_B, LEAF_7_D, LEAF_7_1_A, LEAF_EXTENDED_C, REGISTERS }; /* a leaf of CPUID and one of its registers */
enum { NONE = 0, YMM = 0x6, ZMM = 0xe6, TILES = 0x60000 };                      /* bits of XCR0 */

typedef struct {
  const char *name;
  int where, bit, state;
} Feature;
static const Feature FEATURES[] = {
    {"fma", LEAF_1_C, 12, YMM},          {"movbe", LEAF_1_C, 22, NONE},       {"popcnt", LEAF_1_C, 23, NONE},
    {"avx", LEAF_1_C, 28, YMM},          {"f16c", LEAF_1_C, 29, YMM},         {"bmi1", LEAF_7_B, 3, NONE},
    {"avx2", LEAF_7_B, 5, YMM},          {"bmi2", LEAF_7_B, 8, NONE},         {"avx512f", LEAF_7_B, 16, ZMM},
    {"avx512dq", LEAF_7_B, 17, ZMM},     {"avx512cd", LEAF_7_B, 28, ZMM},     {"avx512bw", LEAF_7_B, 30, ZMM},
    {"avx512vl", LEAF_7_B, 31, ZMM},     {"amx_bf16", LEAF_7_D, 22, TILES},   {"amx_tile", LEAF_7_D, 24, TILES},
    {"avx512_bf16", LEAF_7_1_A, 5, ZMM}, {"abm", LEAF_EXTENDED_C, 5, NONE},
};
enum { NUM_FEATURES = sizeof FEATURES / sizeof *FEATURES };

#if defined(__x86_64__)
#include <cpuid.h>

enum { OSXSAVE = 27 }; /* bit of LEAF_1_C: XGETBV may be used */

static uint64_t saved_state(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

/* 1 for each of FEATURES that may be used, else 0. */
static void read_features(int *usable) {
  uint32_t registers[REGISTERS] = {0}, a, b, c, d;
  uint64_t state = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) registers[LEAF_1_C] = c;
  if (registers[LEAF_1_C] >> OSXSAVE & 1) state = saved_state();
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    registers[LEAF_7_B] = b, registers[LEAF_7_D] = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) registers[LEAF_7_1_A] = a;
  }
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) registers[LEAF_EXTENDED_C] = c;
  for (int n = 0; n < NUM_FEATURES; n++) {
    uint64_t needs = (uint64_t)FEATURES[n].state;
    usable[n] = registers[FEATURES[n].where] >> FEATURES[n].bit & 1 && (state & needs) == needs;
  }
}
#else
static void read_features(int *usable) {
  for (int n = 0; n < NUM_FEATURES; n++) usable[n] = 0;
}
#endif
