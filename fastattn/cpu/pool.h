/* A pool of threads. A call makes a job of its tasks. The calling thread takes them itself, in their order; helpers join when the
 * system lets them run. The call ends when all tasks are done: nobody waits for a helper that has not started or holds no task. So a
 * busy machine delays a call by its own share of the processors, not by that of the slowest helper.
 *
 * Several calls at once have a job each. Where no helper can be created, or no job is free, the calling thread does all. */
#pragma once
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include "stop.h"

typedef void (*Task)(const void *call, long number);

/* ---------------------------------------------------------------- the processor's mode
 * Libraries built with -ffast-math (those of torch.compile, say) let the thread that loads them flush denormal numbers to 0, and threads that it
 * starts inherit that. Small float16 numbers would be lost on the way through float32. A task runs in the processor's normal mode. */
static unsigned exact_mode(void) {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  _mm_setcsr(0x1F80);
  return before;
#else
  return 0;
#endif
}
static void restore_mode(unsigned before) {
#if defined(__x86_64__)
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

/* ---------------------------------------------------------------- the processor itself */
static int this_processor(void) {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}
/* Move this thread elsewhere if it is on that processor. A thread that wakes prefers the processor on which it ran last. If that is the
 * caller's, and others have work of their own, the two would take turns there, in this call and the next ones. */
static void leave_processor(int processor) {
#if defined(__linux__)
  cpu_set_t all, others;
  if (this_processor() != processor || sched_getaffinity(0, sizeof all, &all)) return;
  others = all;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof all, &all);
#else
  (void)processor;
#endif
}

/* ---------------------------------------------------------------- jobs */
/* A job's `state`: how many helpers are inside, how many more may join, and these two bits. */
enum { INSIDE = 1, SEAT = 1 << 12, TAKEN = 1 << 24, OPEN = 1 << 25 };
enum { MOST_HELPERS = 1023 }; /* threads.MAX_THREADS, with the calling thread */

typedef struct {
  _Alignas(64) int state;
  pthread_t caller;
  int processor; /* on which the caller was */
  Task task; /* from here to `stop`: read only by who holds a task, so that the caller may be gone */
  const void *call;
  long tasks;
  Stop *stop;
  _Alignas(64) long next; /* number of the task that is taken next */
  _Alignas(64) long left; /* tasks not done */
  int done;               /* 1 when none is left; the caller sleeps for it */
  int caller_sleeps;
} Job;

static int inside(int state) { return state % SEAT; }
static int seats(int state) { return state % TAKEN / SEAT; }

static void fill_job(Job *job, Task task, const void *call, long tasks, Stop *stop) {
  job->task = task, job->call = call, job->tasks = tasks, job->stop = stop, job->caller = stop->caller;
  job->processor = this_processor();
  job->left = tasks, job->done = job->caller_sleeps = 0;
  PUT(job->next, 0);
}

/* Take tasks until none is left. Those of a stopped call are not run. */
static void take_tasks(Job *job) {
  unsigned mode = exact_mode();
  for (long number; GET(job->next) < job->tasks && (number = ADD(job->next, 1)) < job->tasks;) {
    if (!stopped(job->stop)) job->task(job->call, number);
    if (__atomic_sub_fetch(&job->left, 1, __ATOMIC_SEQ_CST)) continue;
    PUT(job->done, 1);
    if (GET(job->caller_sleeps)) wake(&job->done, 1);
  }
  restore_mode(mode);
  trim_workspace(OF_THREAD);
}

enum { END_SPIN_NS = 50 * 1000 }; /* about the time that a sleep and a wake take */

/* The caller waits for the tasks that others hold, and goes on checking for signals. `left` is 0 a moment before `done` is 1. */
static void await_tasks(Job *job) {
  for (int64_t end = clock_ns() + END_SPIN_NS; GET(job->left) && clock_ns() < end;) relax();
  PUT(job->caller_sleeps, 1);
  while (GET(job->left) && !forked(job->stop)) {
    sleep_while(&job->done, 0, LOOK_NS);
    stopped(job->stop);
  }
}

/* ---------------------------------------------------------------- helpers */
enum { JOBS = 64 };
enum { SPIN_NS = 100 * 1000, SHORT_SPIN_NS = 2000 }; /* how long a helper waits awake: if its last wait was short, and if it was long */
enum { AGAIN_NS = 1000 * 1000 * 1000 };             /* when a thread could not be created, the next try comes so much later */

static struct {
  Job jobs[JOBS];
  pthread_mutex_t lock; /* for the creation of helpers */
  int helpers;
  int64_t refused;            /* when the system created no more; 0: never */
  _Alignas(64) int published; /* number of jobs so far; helpers wait for it to change */
  int sleepers;               /* helpers asleep */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* A forked child has the forking thread alone. That is in no call, or in a signal handler: then its job stays, without helpers. */
static void pool_after_fork(void) {
  for (Job *job = pool.jobs; job < pool.jobs + JOBS; job++) job->state = job->state & TAKEN && pthread_equal(job->caller, pthread_self()) ? TAKEN : 0;
  pool.helpers = pool.sleepers = 0, pool.refused = 0;
  pthread_mutex_init(&pool.lock, 0);
  beds_after_fork();
}

/* Take a seat of a job. False if it is not open or has none. */
static int join(Job *job) {
  int state = GET(job->state);
  while (state & OPEN && seats(state))
    if (__atomic_compare_exchange_n(&job->state, &state, state - SEAT + INSIDE, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return 1;
  return 0;
}
/* Help with every job that has tasks to take. Returns whether there was any. Whoever finds one wakes two more helpers, so that the
 * caller need not wake all of them. */
static int help(void) {
  int found = 0;
  for (Job *job = pool.jobs; job < pool.jobs + JOBS; job++) {
    if (!join(job)) continue;
    if (GET(job->next) < job->tasks) {
      found = 1;
      if (seats(GET(job->state)) && GET(job->next) + 1 < job->tasks && GET(pool.sleepers)) wake(&pool.published, 2);
      leave_processor(job->processor);
      take_tasks(job);
    }
    ADD(job->state, SEAT - INSIDE);
  }
  return found;
}

static void *helper_main(void *number) {
#if defined(__linux__)
  char name[16];
  snprintf(name, sizeof name, "fastattn-%d", (int)(intptr_t)number);
  pthread_setname_np(pthread_self(), name);
#endif
  for (int64_t patience = SPIN_NS;;) {
    const int seen = GET(pool.published);
    while (help()) {}
    const int64_t start = clock_ns();
    if (!changes_within(&pool.published, seen, patience)) {
      ADD(pool.sleepers, 1);
      while (GET(pool.published) == seen) sleep_while(&pool.published, seen, 0);
      ADD(pool.sleepers, -1);
    }
    patience = clock_ns() - start < SPIN_NS ? SPIN_NS : SHORT_SPIN_NS;
  }
  return 0;
}

/* Create helpers until there are `wanted`, or as many as the system allows. They take no signals. Returns their number. */
static int make_helpers(int wanted) {
  if (GET(pool.helpers) >= wanted) return wanted;
  sigset_t all, before;
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes)) return GET(pool.helpers);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 1 << 20);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_mutex_lock(&pool.lock);
  if (pool.refused && clock_ns() - pool.refused > AGAIN_NS) pool.refused = 0;
  while (pool.helpers < wanted && !pool.refused) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, helper_main, (void *)(intptr_t)(pool.helpers + 1))) pool.refused = clock_ns();
    else ADD(pool.helpers, 1);
  }
  const int have = pool.helpers;
  pthread_mutex_unlock(&pool.lock);
  pthread_sigmask(SIG_SETMASK, &before, 0);
  pthread_attr_destroy(&attributes);
  return have < wanted ? have : wanted;
}

/* A job that nobody uses, or NULL. */
static Job *free_job(void) {
  for (Job *job = pool.jobs; job < pool.jobs + JOBS; job++) {
    int state = GET(job->state);
    if (!(state & TAKEN) && !inside(state) && __atomic_compare_exchange_n(&job->state, &state, TAKEN, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return job;
  }
  return 0;
}

/* Run the tasks on this thread and at most `helpers` others. False if there are none or no job is free: then no task has run. */
static int run_on_pool(Task task, const void *call, long tasks, int helpers, Stop *stop) {
  helpers = make_helpers(helpers);
  Job *job = helpers > 0 ? free_job() : 0;
  if (!job) return 0;
  fill_job(job, task, call, tasks, stop);
  PUT(job->state, TAKEN | OPEN | helpers * SEAT);
  ADD(pool.published, 1);
  if (GET(pool.sleepers)) wake(&pool.published, helpers < 2 ? helpers : 2);
  take_tasks(job);
  await_tasks(job);
  __atomic_fetch_and(&job->state, ~(TAKEN | OPEN), __ATOMIC_SEQ_CST);
  return 1;
}
