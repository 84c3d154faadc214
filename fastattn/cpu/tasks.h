/* Runs the tasks of a call on a team of OpenMP threads, until none is left or the call is stopped.
 *
 * A call is stopped if memory cannot be had, or if a signal's handler raises (Ctrl-C). Both are one state. Every thread checks it before
 * each task, inside long tasks, and while it waits. The calling thread also checks for signals there, because only it runs handlers. */
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
enum { LOOK_NS = 50 * 1000 * 1000 }; /* time between two checks for signals, each of which takes the GIL */

typedef struct Stop {
  int state;
  pthread_t caller;
  int64_t next_look;           /* when to check next, by now(); INT64_MAX: never */
  void (*look)(struct Stop *); /* takes the GIL and runs pending signal handlers; sets `state` and `next_look` */
  void *raised;                /* the exception that a handler raised */
} Stop;

/* in ns. The coarse clock takes 5 ns to read and is accurate to 4 ms. */
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

static void relax(void) {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/* Libraries built with -ffast-math (those of torch.compile, say) let the thread that loads them flush denormal numbers to 0, and threads that it
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

/* Wait until *counter == turn; returns 1, or 0 if the call is stopped. The tasks that advance the counter started before this one, so the
 * wait ends. */
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
 * OpenMP ends the process if it cannot create a thread. So before a team grows, trial threads are created; OpenMP is then asked for as
 * many as could be created. `team` is the size of this thread's last team, whose threads OpenMP keeps. */
static __thread int team;
static long processors; /* read once, because the C library reads a file for it */

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
/* Wait until the thread has ended and the system has removed it: until then it counts against the limit. */
static void await_end(const Trial *trial) {
  pthread_join(trial->thread, 0);
#if defined(__linux__)
  for (int n = 0; n < 10000 && !(syscall(SYS_tgkill, getpid(), trial->id, 0) && errno == ESRCH); n++) sched_yield();
#endif
}
/* How many threads, at most `wanted`, can be created now. */
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

/* The threads of a call with so many tasks. More threads than processors only for as many tasks. Otherwise always the same number, because
 * a team that shrinks and grows from call to call ends threads and creates new ones. */
static int team_size(int threads, long tasks) {
  if (threads <= 1 || tasks <= 1 || in_forked_child) return 1;
  long useful = processors > tasks ? processors : tasks, have = team > 1 ? team : 1;
  if (threads > useful) threads = (int)useful;
  return threads <= have ? threads : (int)have + startable(threads - (int)have);
}

/* ---------------------------------------------------------------- running
 * The end of a team's work: the calling thread waits here for the last helper and goes on checking for signals meanwhile. */
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

/* Run task(call, 0), task(call, 1), ..., started in this order. `threads` comes from team_size. */
static void run_tasks(void (*task)(const void *call, long number), const void *call, long tasks, int threads, Stop *stop) {
  if (threads <= 1) {
    unsigned mode = exact_mode();
    for (long t = 0; t < tasks && !stopped(stop); t++) task(call, t);
    restore_mode(mode);
    trim_workspace(OF_THREAD);
    return;
  }
  long next = 0;
  Meeting meeting = {0, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};
#pragma omp parallel num_threads(threads)
  {
    int helpers = omp_get_num_threads() - 1;
    unsigned mode = exact_mode();
    for (long t; !stopped(stop) && (t = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) task(call, t);
    restore_mode(mode);
    trim_workspace(OF_THREAD);
    if (omp_get_thread_num())
      leave(&meeting, helpers);
    else {
      team = helpers + 1;
      await_helpers(&meeting, helpers, stop);
    }
  }
}
