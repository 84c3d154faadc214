/* What the tile loops need of the system: memory per thread, whether this process is a forked child, and a polite wait. */
#pragma once
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef struct { size_t size; } workspace_header; /* sits 64 bytes before the memory handed out */

/* Built with AddressSanitizer, the pieces of a workspace have poisoned zones between them: a kernel that leaves its piece is reported, although
 * the memory is this thread's own. */
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
enum { REDZONE = 64 };
static void poison(const char *begin, const char *end) { __asan_poison_memory_region(begin, (size_t)(end - begin)); }
static void unpoison(const char *begin, size_t bytes) { __asan_unpoison_memory_region(begin, bytes); }
#else
enum { REDZONE = 0 };
static void poison(const char *begin, const char *end) { (void)begin, (void)end; }
static void unpoison(const char *begin, size_t bytes) { (void)begin, (void)bytes; }
#endif

enum { OF_THREAD, OF_CALL, WORKSPACES }; /* a thread's own, and what all threads of a call share, which belongs to the one that calls */
static pthread_key_t workspace_keys[WORKSPACES];
static int in_forked_child;

static void workspace_free(void *p) { free((char *)p - 64); }
static void workspace_forked(void) { in_forked_child = 1; }

/* once, at import */
static int workspace_setup(void) {
  for (int which = 0; which < WORKSPACES; which++)
    if (pthread_key_create(&workspace_keys[which], workspace_free)) return 1;
  return pthread_atfork(0, 0, workspace_forked);
}

/* At least `bytes` of memory, 64-byte aligned; kept for this thread's next call, as fresh pages cost more than most tiles, and freed when it ends. */
static char *kept_memory(int which, size_t bytes) {
  const pthread_key_t workspace_key = workspace_keys[which];
  char *p = (char *)pthread_getspecific(workspace_key);
  if (p) unpoison(p, ((workspace_header *)(void *)(p - 64))->size);
  if (p && ((workspace_header *)(void *)(p - 64))->size >= bytes) return p;
  if (p) workspace_free(p);
  pthread_setspecific(workspace_key, 0);
  size_t total = (bytes + 64 + 4095) / 4096 * 4096;
  char *base = (char *)aligned_alloc(4096, total);
  if (!base) return 0;
  ((workspace_header *)(void *)base)->size = total - 64;
  pthread_setspecific(workspace_key, base + 64);
  return base + 64;
}
static char *workspace(size_t bytes) { return kept_memory(OF_THREAD, bytes); }
static char *call_workspace(size_t bytes) { return kept_memory(OF_CALL, bytes); }

/* Waits until *counter == turn. Whoever advances it started before us, so this ends. */
static void await_turn(const int *counter, int turn) {
  for (long spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != turn; spins++) {
#if defined(__x86_64__)
    _mm_pause();
#endif
    if (spins > 2000) sched_yield();
  }
}
static void pass_turn(int *counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }
