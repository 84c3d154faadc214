/* Runs the tasks of a call, and gives the threads of a backward their order. */
#pragma once
#include "borrowed.h"

static void after_fork(void) {
  forks++;
  pool_after_fork();
}
/* Once, at import. */
static int tasks_setup(void) { return workspace_setup() || pthread_atfork(0, 0, after_fork); }

/* ---------------------------------------------------------------- running */
static void run_alone(Task task, const void *call, long tasks, Stop *stop) {
  unsigned mode = exact_mode();
  for (long number = 0; number < tasks && !stopped(stop); number++) task(call, number);
  restore_mode(mode);
  trim_workspace(OF_THREAD);
}

/* Whether a brief call gets no help: one that takes less than 50 us on one thread (plan.py). Threads that sleep come too late for it, so it
 * gets help only if another call ended just before. And a thread that loses its processor in the middle of a task costs a hundred times
 * the call. */
enum { LONG_NS = 1000 * 1000 };
static struct {
  int64_t last;        /* when the last call ended that could have had help */
  int64_t alone_until; /* brief calls get none */
} brief_calls;
static int better_alone(int64_t begin) { return begin > read_time(&brief_calls.last) + SPIN_NS || begin < read_time(&brief_calls.alone_until); }
static void end_of_call(int brief, int64_t begin) {
  const int64_t end = clock_ns();
  write_time(&brief_calls.last, end);
  if (brief && end - begin > LONG_NS) write_time(&brief_calls.alone_until, end + AVOID * (end - begin));
}

/* Run task(call, 0), task(call, 1), ..., started in this order, on at most `threads` threads. */
static void run_tasks(Task task, const void *call, long tasks, int threads, int brief, Stop *stop) {
  const int helpers = (int)(tasks < threads ? tasks : threads) - 1;
  if (helpers <= 0) {
    run_alone(task, call, tasks, stop);
    return;
  }
  const int64_t begin = clock_ns();
  if ((brief && better_alone(begin)) || !(run_borrowed(task, call, tasks, helpers, stop) || run_on_pool(task, call, tasks, helpers, stop)))
    run_alone(task, call, tasks, stop);
  end_of_call(brief, begin);
}

/* ---------------------------------------------------------------- turns */
enum { TURN_SPIN_NS = 50 * 1000 };

/* Wait until *counter == turn; returns 1, or 0 if the call is stopped. The tasks that advance the counter started before this one, so the
 * wait ends. */
static int await_turn(const int *counter, int turn, Stop *stop) {
  for (int seen; (seen = GET(*counter)) != turn;) {
    if (changes_within(counter, seen, TURN_SPIN_NS)) continue;
    if (forked(stop) || stopped_in_task(stop)) return 0;
    ADD(stop->sleepers, 1);
    sleep_while(counter, seen, LOOK_NS);
    ADD(stop->sleepers, -1);
  }
  return 1;
}
static void pass_turn(int *counter, Stop *stop) {
  ADD(*counter, 1);
  if (GET(stop->sleepers)) wake(counter, INT_MAX);
}

/* ---------------------------------------------------------------- chains
 * A chain is a row of items, of which each needs turns after the one before. Threads in different chains never meet. So a thread
 * prefers a chain that nobody is in, and threads share one only when chains run out. */
typedef struct {
  int length;
  int next;    /* item that is taken next */
  int busy;    /* threads inside */
  int done;    /* items done */
  int started; /* a turn: 1 when the first item has prepared what all need */
} Chain;
typedef struct {
  Chain *chain;
  long count, first; /* first: no chain before it has an item to take */
} Chains;

static int has_items(const Chain *chain) { return GET(chain->next) < chain->length; }

/* The chain to enter. There is one with items, because a call has as many tasks as items. */
static Chain *choose_chain(Chains *c) {
  Chain *best = 0;
  long first = GET(c->first);
  for (long n = first; n < c->count; n++) {
    Chain *chain = &c->chain[n];
    int nobody = 0;
    if (!has_items(chain)) {
      if (n == first && __atomic_compare_exchange_n(&c->first, &first, n + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) first = n + 1;
      continue;
    }
    if (__atomic_compare_exchange_n(&chain->busy, &nobody, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return chain;
    if (!best || nobody < GET(best->busy)) best = chain;
  }
  ADD(best->busy, 1);
  return best;
}
/* The number of the item, and its chain. */
static Chain *take_item(Chains *c, int *item) {
  for (;;) {
    Chain *chain = choose_chain(c);
    *item = ADD(chain->next, 1);
    if (*item < chain->length) return chain;
    ADD(chain->busy, -1);
  }
}
/* Whether it was the chain's last. */
static int leave_chain(Chain *chain) {
  ADD(chain->busy, -1);
  return __atomic_add_fetch(&chain->done, 1, __ATOMIC_SEQ_CST) == chain->length;
}
