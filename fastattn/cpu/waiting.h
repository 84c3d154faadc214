/* How a thread waits until a word of memory changes: awake for a moment, then asleep.
 *
 * A wait awake ends within 0.1 us of the change, one asleep after 5 to 50 us. But who waits awake keeps a processor from others. */
#pragma once
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Sequentially consistent. Who sleeps says so and then reads the word; who changes the word then looks for sleepers. One of the two
 * sees the other. */
#define GET(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define PUT(x, value) __atomic_store_n(&(x), (value), __ATOMIC_SEQ_CST)
#define ADD(x, n) __atomic_fetch_add(&(x), (n), __ATOMIC_SEQ_CST)

static int64_t nanoseconds(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
static struct timespec timespec_of(int64_t ns) {
  struct timespec t = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
  return t;
}
static int64_t clock_ns(void) { return nanoseconds(CLOCK_MONOTONIC); }
/* Times by clock_ns that threads share as hints. */
static int64_t read_time(const int64_t *at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
static void write_time(int64_t *at, int64_t time) { __atomic_store_n(at, time, __ATOMIC_RELAXED); }

static void relax(void) {
  for (int n = 0; n < 8; n++) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
}
/* Wait awake, for `ns`, until *word is not `value`. Returns whether it changed. */
static int changes_within(const int *word, int value, int64_t ns) {
  for (int64_t end = clock_ns() + ns; clock_ns() < end;)
    for (int n = 0; n < 8; n++, relax())
      if (GET(*word) != value) return 1;
  return GET(*word) != value;
}

/* sleep_while: sleep until woken, unless *word is not `value`, and for at most `ns`; 0 is no limit. It may also return without a
 * reason, so callers look again. wake: wake `n` of the threads that sleep for this word, or more. */
#if defined(__linux__) && !defined(PORTABLE_SLEEP)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
static void sleep_while(const int *word, int value, int64_t ns) {
  struct timespec limit = timespec_of(ns);
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, ns ? &limit : (struct timespec *)0, (void *)0, 0);
}
static void wake(const int *word, int n) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n, (void *)0, (void *)0, 0); }
static void beds_after_fork(void) {}
#else /* any POSIX system: words share a few condition variables */
enum { BEDS = 61 };
typedef struct {
  pthread_mutex_t lock;
  pthread_cond_t changed;
} Bed;
static Bed beds[BEDS] = {[0 ... BEDS - 1] = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER}};
static Bed *bed_of(const int *word) { return &beds[(uintptr_t)word / sizeof(int) % BEDS]; }
static void sleep_while(const int *word, int value, int64_t ns) {
  Bed *bed = bed_of(word);
  struct timespec limit = timespec_of(nanoseconds(CLOCK_REALTIME) + ns);
  pthread_mutex_lock(&bed->lock);
  if (GET(*word) == value) {
    if (ns) pthread_cond_timedwait(&bed->changed, &bed->lock, &limit);
    else pthread_cond_wait(&bed->changed, &bed->lock);
  }
  pthread_mutex_unlock(&bed->lock);
}
static void wake(const int *word, int n) {
  (void)n;
  Bed *bed = bed_of(word);
  pthread_mutex_lock(&bed->lock);
  pthread_cond_broadcast(&bed->changed);
  pthread_mutex_unlock(&bed->lock);
}
/* A thread that does not exist in a forked child may have held a lock. */
static void beds_after_fork(void) {
  for (int n = 0; n < BEDS; n++) pthread_mutex_init(&beds[n].lock, 0), pthread_cond_init(&beds[n].changed, 0);
}
#endif
