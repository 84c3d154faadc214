/* The pool alone, without Python: calls from several threads at once, on random numbers of threads, with chains whose turns must come
 * in order; on a borrowed team; calls that a signal's handler stops; and forks among the threads. test_pool.py builds it with sanitizers.
 *
 *   stress ROUNDS CALLERS FORKS */
#define _GNU_SOURCE
#include <stdlib.h>
static void amx_begin(void) {}
static void amx_end(void) {}
#include "tasks.h"
#include <sys/wait.h>
#include <unistd.h>

static void fail(const char *what) {
  printf("%s\n", what);
  exit(1);
}
static unsigned draw(unsigned *seed, unsigned n) { return (unsigned)rand_r(seed) % n; }
static void *zeros(long n, size_t size) {
  void *p = calloc((size_t)n, size);
  if (!p) fail("no memory");
  return p;
}
static void work_for(int steps) {
  for (volatile int n = 0; n < steps; n++) {}
}
static void no_look(Stop *stop) { stop->next_look = INT64_MAX; }

/* ---------------------------------------------------------------- tasks that are independent */
typedef struct {
  int *runs, steps;
  Stop *stop;
} Plain;
static void plain_task(const void *call, long number) {
  const Plain *p = (const Plain *)call;
  char *memory = task_memory(1000 + (size_t)number, p->stop);
  memory[number] = 1;
  work_for(p->steps);
  ADD(p->runs[number], 1);
}
static void plain_call(unsigned *seed, int threads) {
  const long tasks = draw(seed, 50);
  Stop stop;
  begin_call(&stop, no_look);
  Plain p = {zeros(tasks + 1, sizeof(int)), (int)draw(seed, 3000), &stop};
  run_tasks(plain_task, &p, tasks, threads, (int)draw(seed, 2), &stop);
  for (long n = 0; n < tasks; n++)
    if (p.runs[n] != 1) fail("a task did not run once");
  free(p.runs);
}

/* ---------------------------------------------------------------- chains */
typedef struct {
  Chains *chains;
  int *counters, blocks, steps;
  double *sums; /* [chains][blocks]; the order of additions shows */
  Stop *stop;
} Chained;
static void chained_task(const void *call, long number) {
  const Chained *p = (const Chained *)call;
  (void)number;
  int item;
  Chain *chain = take_item(p->chains, &item);
  const long first = (chain - p->chains->chain) * p->blocks;
  if (item == 0) {
    for (long n = first; n < first + p->blocks; n++) p->sums[n] = 1;
    pass_turn(&chain->started, p->stop);
  } else if (!await_turn(&chain->started, 1, p->stop))
    return;
  for (long n = first; n < first + p->blocks; n++) {
    work_for(p->steps);
    if (!await_turn(&p->counters[n], item, p->stop)) return;
    p->sums[n] = p->sums[n] * 1.25 + item;
    pass_turn(&p->counters[n], p->stop);
  }
  if (leave_chain(chain))
    for (long n = first; n < first + p->blocks; n++) p->sums[n] += 0.5;
}
static void chained_call(unsigned *seed, int threads) {
  const long count = 1 + draw(seed, 4);
  const int blocks = (int)(1 + draw(seed, 5));
  Stop stop;
  Chains chains = {zeros(count, sizeof(Chain)), count, 0};
  begin_call(&stop, no_look);
  long tasks = 0;
  for (long n = 0; n < count; n++) tasks += chains.chain[n].length = (int)(1 + draw(seed, 9));
  Chained p = {&chains, zeros(count * blocks, sizeof(int)), blocks, (int)draw(seed, 3000), zeros(count * blocks, sizeof(double)), &stop};
  run_tasks(chained_task, &p, tasks, threads, 0, &stop);
  for (long n = 0; n < count * blocks; n++) {
    double expected = 1;
    const int length = chains.chain[n / blocks].length;
    for (int item = 0; item < length; item++) expected = expected * 1.25 + item;
    if (p.sums[n] != expected + 0.5 || p.counters[n] != length) fail("items of a chain came out of order");
  }
  free(chains.chain), free(p.counters), free(p.sums);
}

/* ---------------------------------------------------------------- many at once */
static int rounds;
static void *caller(void *number) {
  unsigned seed = (unsigned)(intptr_t)number * 7919 + 1;
  for (int n = 0; n < rounds; n++) {
    plain_call(&seed, (int)(1 + draw(&seed, 12)));
    chained_call(&seed, (int)(1 + draw(&seed, 12)));
  }
  return 0;
}
static void child(int number) {
  unsigned seed = (unsigned)number + 99;
  alarm(60);
  for (int n = 0; n < 20; n++) plain_call(&seed, 4), chained_call(&seed, 4);
  if (pool.helpers < 1 || pool.helpers > 3) fail("a child has other threads than its own");
  _exit(0);
}

/* ---------------------------------------------------------------- calls that are stopped, or forked in the middle */
static void raise_now(Stop *stop) { stop_call(stop, INTERRUPTED); }
static void stopped_call(void) {
  Stop stop;
  const long tasks = 3000;
  begin_call(&stop, raise_now);
  stop.next_look = now() + 3 * 1000 * 1000;
  Plain p = {zeros(tasks, sizeof(int)), 100000, &stop};
  run_tasks(plain_task, &p, tasks, 3, 0, &stop);
  long runs = 0;
  for (long n = 0; n < tasks; n++) runs += p.runs[n];
  if (stop.state != INTERRUPTED || runs == tasks) fail("a call was not stopped");
  free(p.runs);
}
static int looked;
static void fork_now(Stop *stop) {
  stop->next_look = INT64_MAX;
  stop->raised = fork() ? 0 : stop; /* says that this is the child */
  PUT(looked, 1);
}
static void slow_task(const void *call, long number) {
  Stop *stop = *(Stop *const *)call;
  (void)number;
  while (!GET(looked) && !stopped_in_task(stop)) work_for(1000);
}
/* The child has the caller alone. If a helper holds a task, that is never done there. */
static void forked_call(void) {
  Stop stop, *call = &stop;
  begin_call(&stop, fork_now);
  stop.next_look = now() + 3 * 1000 * 1000;
  run_tasks(slow_task, &call, 2, 2, 0, &stop);
  if (stop.raised) _exit(0);
  int status;
  if (wait(&status) < 0 || status || stop.state != GOING) fail("a fork in the middle of a call");
}

/* ---------------------------------------------------------------- a team to borrow: three threads, made for each call */
enum { TEAM = 3 };
static int team_calls, team_delay; /* ms */
typedef struct {
  void (*run)(void *);
  void *with;
} Region;
static void *member(void *x) {
  Region *region = (Region *)x;
  region->run(region->with);
  return 0;
}
static void team_parallel(void (*run)(void *), void *with, unsigned threads, unsigned flags) {
  Region region = {run, with};
  pthread_t members[TEAM - 1];
  if (threads || flags) fail("other arguments than the usual ones");
  ADD(team_calls, 1);
  for (int n = 0; n < TEAM - 1; n++) pthread_create(&members[n], 0, member, &region);
  run(with);
  usleep((useconds_t)team_delay * 1000);
  for (int n = 0; n < TEAM - 1; n++) pthread_join(members[n], 0);
}
static int team_size(void) { return TEAM; }

static int runs_on_team(unsigned *seed) {
  const int before = GET(team_calls);
  chained_call(seed, TEAM);
  return GET(team_calls) > before;
}
static void borrowed_calls(void) {
  unsigned seed = 1;
  lend((void *)team_parallel, (void *)team_size);
  int borrowed = 0;
  for (int n = 0; n < 50; n++) {
    use_pool_until(0); /* making the threads took long */
    borrowed += runs_on_team(&seed);
  }
  if (borrowed < 25) fail("the team is not used"); /* calls of one task run on the caller */
  team_delay = 5;
  use_pool_until(0);
  while (!runs_on_team(&seed)) {}
  const int64_t until = lender.pool_until;
  for (int n = 0; n < 5; n++)
    if (runs_on_team(&seed) && clock_ns() < until) fail("a slow team is used again at once");
  lend(0, 0);
}

/* ---------------------------------------------------------------- leaving a processor */
static void moved(void) {
  cpu_set_t before, after;
  int elsewhere = 0;
  if (sched_getaffinity(0, sizeof before, &before)) fail("sched_getaffinity");
  for (int n = 0; n < 20; n++) {
    const int here = this_processor();
    leave_processor(here);
    elsewhere += this_processor() != here;
  }
  if (sched_getaffinity(0, sizeof after, &after) || !CPU_EQUAL(&before, &after)) fail("a thread that moved may run elsewhere than before");
  if (!elsewhere && CPU_COUNT(&before) > 1) fail("a thread did not move");
}

int main(int argc, char **argv) {
  if (argc != 4 || tasks_setup()) fail("usage: stress ROUNDS CALLERS FORKS");
  rounds = atoi(argv[1]);
  enum { MOST = 100 };
  const int callers = atoi(argv[2]), children = atoi(argv[3]);
  pthread_t threads[MOST];
  for (int n = 0; n < callers && n < MOST; n++) pthread_create(&threads[n], 0, caller, (void *)(intptr_t)(n + 1));
  for (int n = 0; n < children; n++) {
    const pid_t id = fork();
    if (id == 0) child(n);
    int status;
    if (waitpid(id, &status, 0) < 0 || status) fail("a child failed");
  }
  for (int n = 0; n < callers && n < MOST; n++) pthread_join(threads[n], 0);
  for (Job *job = pool.jobs; job < pool.jobs + JOBS; job++)
    if (GET(job->state) & (TAKEN | OPEN)) fail("a job stayed open");
  moved();
  stopped_call();
  borrowed_calls();
  if (children) forked_call();
  printf("ok, %d helpers\n", pool.helpers);
  return 0;
}
