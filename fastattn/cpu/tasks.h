/* How the tasks of a call run: on a team of OpenMP's threads, until none is left or the call is stopped.
 *
 * A call stops when memory cannot be had, or when a signal's handler raises (Ctrl-C). That is one state, which every thread looks at before
 * each task, inside long ones, and while it waits. The thread that called also looks for signals there, because handlers run in no other. */
#pragma once
#include <errno.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "workspace.h"

enum { GOING, NO_MEMORY, INTERRUPTED };
enum { LOOK_NS = 50 * 1000 * 1000 }; /* between two looks for signals: each takes the GIL */

typedef struct Stop {
  int state;
  pthread_t caller;
  int64_t next_look;           /* on the clock of now(); INT64_MAX: no more */
  void (*look)(struct Stop *); /* takes the GIL, runs the handlers of signals that came; sets `state` and `next_look` */
  void *raised;                /* the exception that a handler raised */
} Stop;

/* ns; the coarse clock takes 5 ns to read and is right to 4 ms */
static int64_t now(void) {
  struct timespec t;
#if defined(CLOCK_MONOTONIC_COARSE)
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
#else
  clock_gettime(CLOCK_MONOTONIC, &t);
#endif
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void begin_call(Stop *stop, void (*look)(Stop *)) {
  stop->state = GOING, stop->raised = 0, stop->caller = pthread_self(), stop->look = look, stop->next_look = now() + LOOK_NS;
}
static void stop_call(Stop *stop, int why) {
  int going = GOING;
  __atomic_compare_exchange_n(&stop->state, &going, why, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static int is_stopped(const Stop *stop) { return __atomic_load_n(&stop->state, __ATOMIC_RELAXED) != GOING; }
static int must_look(const Stop *stop) { return pthread_equal(pthread_self(), stop->caller) && now() >= stop->next_look; }

/* Whether to leave, between tasks. A handler may call this engine itself, so this thread's memory is set aside for it. */
static int stopped(Stop *stop) {
  if (is_stopped(stop)) return 1;
  if (!must_look(stop)) return 0;
  char *mine[WORKSPACES];
  for (int which = 0; which < WORKSPACES; which++) mine[which] = take_workspace(which);
  stop->look(stop);
  for (int which = 0; which < WORKSPACES; which++) put_workspace(which, mine[which]);
  return is_stopped(stop);
}
/* The same inside a task, which uses the tile registers. */
static int stopped_in_task(Stop *stop) {
  if (!must_look(stop)) return is_stopped(stop);
  amx_end();
  int leave = stopped(stop);
  amx_begin();
  return leave;
}

/* The memory of a task, and what the threads of a call share; 0 stops the call. */
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

static void relax(void) {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/* Waits until *counter == turn, and returns 1; 0 when the call is stopped. Whoever advances it started before us, so this ends. */
static int await_turn(const int *counter, int turn, Stop *stop) {
  for (long spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) != turn; spins++) {
    relax();
    if (spins <= 2000) continue;
    if (stopped_in_task(stop)) return 0;
    sched_yield();
  }
  return 1;
}
static void pass_turn(int *counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }

/* ---------------------------------------------------------------- teams
 * OpenMP ends the process when it cannot make a thread. So threads are made for trial before a thread's team grows; as many as could be are asked
 * for. `team` is what this thread's last team had: OpenMP keeps those. */
static __thread int team;
static long processors; /* asked for once: the C library reads a file for it */

/* once, at import */
static int tasks_setup(void) {
  processors = sysconf(_SC_NPROCESSORS_ONLN);
  return workspace_setup();
}

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
/* Waits until the system has forgotten a thread that ended, too: until then it counts. */
static void await_end(const Trial *trial) {
  pthread_join(trial->thread, 0);
#if defined(__linux__)
  for (int n = 0; n < 10000 && !(syscall(SYS_tgkill, getpid(), trial->id, 0) && errno == ESRCH); n++) sched_yield();
#endif
}
/* How many threads, at most `wanted`, can be made now. */
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
  return made;
}

/* Threads for a call of so many tasks. More than there are processors only where there are as many tasks; else always as many, because a team that
 * shrinks and grows from call to call ends threads and makes new ones. */
static int team_size(int threads, long tasks) {
  if (threads <= 1 || tasks <= 1 || in_forked_child) return 1;
  long useful = processors > tasks ? processors : tasks, have = team > 1 ? team : 1;
  if (threads > useful) threads = (int)useful;
  return threads <= have ? threads : (int)have + startable(threads - (int)have);
}

/* ---------------------------------------------------------------- running
 * Where the helpers meet the thread that called, which goes on looking for signals while it waits for the last of them. */
typedef struct {
  int done;
  pthread_mutex_t lock;
  pthread_cond_t all_done;
} Meeting;

static void leave(Meeting *m, int helpers) {
  if (__atomic_add_fetch(&m->done, 1, __ATOMIC_RELEASE) < helpers) return;
  pthread_mutex_lock(&m->lock);
  pthread_cond_signal(&m->all_done);
  pthread_mutex_unlock(&m->lock);
}
static int all_done(const Meeting *m, int helpers) { return __atomic_load_n(&m->done, __ATOMIC_ACQUIRE) == helpers; }
static void await_helpers(Meeting *m, int helpers, Stop *stop) {
  for (long spins = 0; spins < 10000; spins++, relax())
    if (all_done(m, helpers)) return;
  while (!all_done(m, helpers) && !stopped(stop)) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += LOOK_NS;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    pthread_mutex_lock(&m->lock);
    if (!all_done(m, helpers)) pthread_cond_timedwait(&m->all_done, &m->lock, &until);
    pthread_mutex_unlock(&m->lock);
  }
}

/* task(call, 0), task(call, 1), ... started in this order; `threads` from team_size. */
static void run_tasks(void (*task)(const void *call, long number), const void *call, long tasks, int threads, Stop *stop) {
  if (threads <= 1) {
    for (long t = 0; t < tasks && !stopped(stop); t++) task(call, t);
    trim_workspace(OF_THREAD);
    return;
  }
  long next = 0;
  Meeting meeting = {0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};
#pragma omp parallel num_threads(threads)
  {
    int helpers = omp_get_num_threads() - 1;
    for (long t; !stopped(stop) && (t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) task(call, t);
    trim_workspace(OF_THREAD);
    if (omp_get_thread_num())
      leave(&meeting, helpers);
    else {
      team = helpers + 1;
      await_helpers(&meeting, helpers, stop);
    }
  }
}
