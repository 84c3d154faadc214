/* Memory per thread, kept for its next call. */
#pragma once
#include <pthread.h>
#include <stdlib.h>

typedef struct { size_t size; } workspace_header; /* 64 bytes before the memory that is returned */

/* With AddressSanitizer there are poisoned zones between the pieces of a workspace. A kernel that leaves its piece is reported, although the
 * memory belongs to its thread. */
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

enum { OF_THREAD, OF_CALL, WORKSPACES }; /* a thread's own; and the memory that all threads of a call share, which belongs to the calling thread */
/* Bytes that stay with a thread after a call, at most. A task needs 1 to 4 MB. A call needs the dQ sums of a wave, 32 MB (plan.py), and
 * counters; it needs more only if a single head does. */
static const size_t KEPT_BYTES[WORKSPACES] = {8 << 20, 36 << 20};
static pthread_key_t workspace_keys[WORKSPACES];

static size_t *workspace_size(char *p) { return &((workspace_header *)(void *)(p - 64))->size; }
static void workspace_free(void *p) {
  unpoison((char *)p, *workspace_size((char *)p));
  free((char *)p - 64);
}

/* Once, at import. A thread that ends frees its memory. */
static int workspace_setup(void) {
  for (int which = 0; which < WORKSPACES; which++)
    if (pthread_key_create(&workspace_keys[which], workspace_free)) return 1;
  return 0;
}

/* Detach this thread's memory. The caller frees it or puts it back. */
static char *take_workspace(int which) {
  char *p = (char *)pthread_getspecific(workspace_keys[which]);
  if (p) pthread_setspecific(workspace_keys[which], 0);
  return p;
}
static void drop_workspace(int which) {
  char *p = take_workspace(which);
  if (p) workspace_free(p);
}
static void put_workspace(int which, char *p) {
  drop_workspace(which);
  if (p) pthread_setspecific(workspace_keys[which], p);
}

/* At least `bytes` of memory, 64-byte aligned, or NULL. Kept for this thread's next call, because fresh pages cost more than most tiles. */
static char *workspace(int which, size_t bytes) {
  char *p = (char *)pthread_getspecific(workspace_keys[which]);
  if (p) unpoison(p, *workspace_size(p));
  if (p && *workspace_size(p) >= bytes) return p;
  drop_workspace(which);
  size_t total = (bytes + 64 + 4095) / 4096 * 4096;
  char *base = (char *)aligned_alloc(4096, total);
  if (!base) return 0;
  p = base + 64;
  *workspace_size(p) = total - 64;
  if (pthread_setspecific(workspace_keys[which], p)) {
    free(base);
    return 0;
  }
  return p;
}

/* At the end of a thread's tasks, or of the call: free the memory if it is larger than what is kept. */
static void trim_workspace(int which) {
  char *p = (char *)pthread_getspecific(workspace_keys[which]);
  if (p && *workspace_size(p) > KEPT_BYTES[which]) drop_workspace(which);
}
