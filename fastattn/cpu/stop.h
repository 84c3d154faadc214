/* What stops a call: memory that cannot be had, or a signal's handler that raises (Ctrl-C). Both are one state. Every thread checks it
 * before each task, inside long tasks, and while it waits. The calling thread also checks for signals there, because only it runs
 * handlers. */
#pragma once
#include "waiting.h"
#include "workspace.h"

enum { GOING, NO_MEMORY, INTERRUPTED, FORKED };
enum { LOOK_NS = 50 * 1000 * 1000 }; /* time between two checks for signals, each of which takes the GIL; and the longest sleep in a call */

typedef struct Stop {
  int state;
  pthread_t caller;
  int forks;                   /* of this process, before the call */
  int sleepers;                /* threads asleep for a turn (tasks.h) */
  int64_t next_look;           /* when to check next, by now(); INT64_MAX: never */
  void (*look)(struct Stop *); /* takes the GIL and runs pending signal handlers; sets `state` and `next_look` */
  void *raised;                /* the exception that a handler raised */
} Stop;

static int forks; /* between the first process and this one */

/* in ns. The coarse clock takes 5 ns to read and is accurate to 4 ms. */
static int64_t now(void) {
#if defined(CLOCK_MONOTONIC_COARSE)
  return nanoseconds(CLOCK_MONOTONIC_COARSE);
#else
  return nanoseconds(CLOCK_MONOTONIC);
#endif
}

static void begin_call(Stop *stop, void (*look)(Stop *)) {
  stop->state = GOING, stop->raised = 0, stop->caller = pthread_self(), stop->forks = forks, stop->sleepers = 0;
  stop->look = look, stop->next_look = now() + LOOK_NS;
}
static void stop_call(Stop *stop, int why) {
  int going = GOING;
  __atomic_compare_exchange_n(&stop->state, &going, why, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static int is_stopped(const Stop *stop) { return __atomic_load_n(&stop->state, __ATOMIC_RELAXED) != GOING; }
static int is_caller(const Stop *stop) { return pthread_equal(pthread_self(), stop->caller); }
static int must_look(const Stop *stop) { return is_caller(stop) && now() >= stop->next_look; }

/* Whether the call is stopped; for use between tasks. A signal handler may call this engine, so this thread's memory is put aside
 * meanwhile. */
static int stopped(Stop *stop) {
  if (is_stopped(stop)) return 1;
  if (!must_look(stop)) return 0;
  char *mine[WORKSPACES];
  for (int which = 0; which < WORKSPACES; which++) mine[which] = take_workspace(which);
  stop->look(stop);
  for (int which = 0; which < WORKSPACES; which++) put_workspace(which, mine[which]);
  return is_stopped(stop);
}
/* The same inside a task, which uses AMX's tile registers. */
static int stopped_in_task(Stop *stop) {
  if (!must_look(stop)) return is_stopped(stop);
  amx_end();
  int leave = stopped(stop);
  amx_begin();
  return leave;
}

/* Whether this process was forked off during the call, by a signal handler. The call's other threads do not exist here, so nobody may wait
 * for them. */
static int forked(Stop *stop) {
  if (stop->forks == forks) return 0;
  stop_call(stop, FORKED);
  return 1;
}

/* The memory of a task, and the memory that the threads of a call share. If there is none, returns NULL and stops the call. */
static char *task_memory(size_t bytes, Stop *stop) {
  char *p = workspace(OF_THREAD, bytes);
  if (!p) stop_call(stop, NO_MEMORY);
  return p;
}
static char *call_memory(size_t bytes, Stop *stop) {
  char *p = workspace(OF_CALL, bytes);
  if (!p) stop_call(stop, NO_MEMORY);
  return p;
}
