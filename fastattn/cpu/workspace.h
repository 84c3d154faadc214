/* Memory per thread, kept for the next call, and whether this process is a forked child. */
#pragma once
#include <pthread.h>
#include <stdlib.h>

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
/* Bytes that stay with a thread after a call, at most. A task's memory is 1 to 4 MB. Of a call it is the sums of dQ, 32 MB of each wave (plan.py),
 * and its counters; more only where a single head has more. */
static const size_t KEPT_BYTES[WORKSPACES] = {8 << 20, 36 << 20};
static pthread_key_t workspace_keys[WORKSPACES];
static int in_forked_child;

static size_t *workspace_size(char *p) { return &((workspace_header *)(void *)(p - 64))->size; }
static void workspace_free(void *p) {
  unpoison((char *)p, *workspace_size((char *)p));
  free((char *)p - 64);
}
static void workspace_forked(void) { in_forked_child = 1; }

/* once, at import; a thread that ends frees its memory */
static int workspace_setup(void) {
  for (int which = 0; which < WORKSPACES; which++)
    if (pthread_key_create(&workspace_keys[which], workspace_free)) return 1;
  return pthread_atfork(0, 0, workspace_forked);
}

/* Takes this thread's memory away from it; the caller frees it or puts it back. */
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

/* At least `bytes` of memory, 64-byte aligned, or 0; kept for this thread's next call, as fresh pages cost more than most tiles. */
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

/* At the end of a thread's tasks, or of the call: only so much is kept. */
static void trim_workspace(int which) {
  char *p = (char *)pthread_getspecific(workspace_keys[which]);
  if (p && *workspace_size(p) > KEPT_BYTES[which]) drop_workspace(which);
}
