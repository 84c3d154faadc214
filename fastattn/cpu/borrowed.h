/* PyTorch's team of threads. After an operator its threads stay awake for milliseconds and keep helpers from their processors. So where
 * PyTorch is loaded, its own team takes a call's tasks: it is started as PyTorch starts it, through the entry point of its OpenMP
 * runtime. This module is linked with no such runtime.
 *
 * OpenMP waits until every thread of the team has come, at the start and at the end. On a busy machine that can take far longer than
 * the tasks. The time lost so is measured. If it was most of a call, the pool is used for a while. */
#pragma once
#include <errno.h>
#include <sched.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "pool.h"

typedef struct {
  void (*parallel)(void (*run)(void *), void *with, unsigned threads, unsigned flags); /* GOMP_parallel; 0 threads: as many as usual. NULL: no team to borrow */
  int (*max_threads)(void);                                                           /* omp_get_max_threads: this "as many as usual" */
  int64_t pool_until;                                                                 /* by clock_ns: when to borrow again */
} Lender;
static Lender lender;

enum { LOST_NS = 100 * 1000 }; /* less is nothing to avoid: a sleeping team takes 10 to 50 us to wake */
enum { AVOID = 50 };           /* what lost time is avoided for so many times as long, so that 2 % is lost at most */

static void lend(void *parallel, void *max_threads) {
  *(void **)&lender.max_threads = max_threads;
  __atomic_store_n((void **)&lender.parallel, parallel, __ATOMIC_RELEASE);
}

/* ---------------------------------------------------------------- threads that the runtime would have to create
 * It ends the process if it cannot create one. So before this thread's first team, as many trial threads are created. */
typedef struct {
  pthread_mutex_t *gate;
  pthread_t thread;
  long id;
} Trial;
static void *trial_thread(void *x) {
  Trial *trial = (Trial *)x;
#if defined(__linux__)
  trial->id = syscall(SYS_gettid);
#endif
  pthread_mutex_lock(trial->gate);
  pthread_mutex_unlock(trial->gate);
  return 0;
}
/* Wait until the thread has ended and the system has removed it: until then it counts against the limit. */
static void await_end(const Trial *trial) {
  pthread_join(trial->thread, 0);
#if defined(__linux__)
  for (int n = 0; n < 10000 && !(syscall(SYS_tgkill, getpid(), trial->id, 0) && errno == ESRCH); n++) sched_yield();
#endif
}
/* Whether so many threads can be created now. */
static int startable(int wanted) {
  pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
  Trial *trials = (Trial *)calloc((size_t)wanted, sizeof(Trial));
  int made = 0;
  if (!trials) return 0;
  pthread_mutex_lock(&gate);
  for (; made < wanted; made++) {
    trials[made].gate = &gate;
    if (pthread_create(&trials[made].thread, 0, trial_thread, &trials[made])) break;
  }
  pthread_mutex_unlock(&gate);
  for (int n = 0; n < made; n++) await_end(&trials[n]);
  free(trials);
  return made == wanted;
}

/* ---------------------------------------------------------------- running */
typedef struct {
  Job job;
  int helpers;               /* how many more threads of the team may help */
  int64_t started, finished; /* the caller: its first task, and the end of the last one */
} Borrowed;

static void borrowed_main(void *x) {
  Borrowed *b = (Borrowed *)x;
  if (!is_caller(b->job.stop)) {
    if (ADD(b->helpers, -1) > 0) take_tasks(&b->job);
    return;
  }
  b->started = clock_ns();
  take_tasks(&b->job);
  await_tasks(&b->job);
  b->finished = clock_ns();
}

static void use_pool_until(int64_t time) { write_time(&lender.pool_until, time); }

/* Run the tasks on this thread and at most `helpers` threads of the team. False if there is no team to
 * borrow, or it is too small, or most of it would wake for nothing: then no task has run. */
static int run_borrowed(Task task, const void *call, long tasks, int helpers, Stop *stop) {
  static __thread int known; /* the size of this thread's team; its runtime keeps its threads */
  if (!__atomic_load_n(&lender.parallel, __ATOMIC_ACQUIRE) || forks) return 0; /* a team does not survive a fork, and its runtime does not notice */
  const int size = lender.max_threads();
  const int64_t begin = clock_ns();
  if (size <= helpers || size > 2 * (helpers + 1) || begin < read_time(&lender.pool_until)) return 0;
  if (known != size && !startable(size - 1)) {
    use_pool_until(begin + AGAIN_NS);
    return 0;
  }
  known = size;
  Borrowed b;
  fill_job(&b.job, task, call, tasks, stop);
  b.helpers = helpers;
  lender.parallel(borrowed_main, &b, 0, 0);
  const int64_t end = clock_ns(), lost = (b.started - begin) + (end - b.finished);
  if (lost > LOST_NS && 2 * lost > end - begin) use_pool_until(end + AVOID * lost);
  return 1;
}
