/* See threads.h. */
#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>

static volatile int forked = 0;

static void in_child(void) { forked = 1; }

void dcn_threads_alone(void) { forked = 1; }

void dcn_threads_init(void) { pthread_atfork(nullptr, nullptr, in_child); }

int dcn_threads_openmp(void) { return 1; }

namespace {

constexpr int MOST = 256; /* threads of a team: more have never paid */

struct Gate {
  pthread_mutex_t mutex;
  pthread_cond_t opened;
  bool open;
};

void *wait_at_gate(void *argument) {
  Gate *gate = (Gate *)argument;
  pthread_mutex_lock(&gate->mutex);
  while (!gate->open) pthread_cond_wait(&gate->opened, &gate->mutex);
  pthread_mutex_unlock(&gate->mutex);
  return nullptr;
}

/* How many of `count` threads can exist at once beside the calling one. */
int can_create(int count) {
  Gate gate = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
  pthread_t threads[MOST];
  int created = 0;
  while (created < count && pthread_create(&threads[created], nullptr, wait_at_gate, &gate) == 0)
    created++;
  pthread_mutex_lock(&gate.mutex);
  gate.open = true;
  pthread_cond_broadcast(&gate.opened);
  pthread_mutex_unlock(&gate.mutex);
  for (int i = 0; i < created; i++) pthread_join(threads[i], nullptr);
  return created;
}

} /* namespace */

int dcn_threads_allowed(int wanted, int *short_of_threads) {
  static thread_local int proven = 1; /* libgomp keeps a pool for each thread that opens teams */
  if (wanted <= 1 || forked || omp_in_parallel()) return 1;
  if (wanted > MOST) wanted = MOST;
  const int limit = omp_get_thread_limit();
  if (wanted > limit) wanted = limit;
  if (wanted > proven) {
    const int possible = 1 + can_create(wanted - 1);
    if (possible < wanted) {
      *short_of_threads = 1;
      /* Part of what was possible: the probe's threads are gone, others may take their place. */
      return proven > possible / 2 ? proven : possible / 2 > 1 ? possible / 2 : 1;
    }
    proven = wanted;
  }
  return wanted;
}

#else

void dcn_threads_init(void) {}
void dcn_threads_alone(void) {}
int dcn_threads_openmp(void) { return 0; }
int dcn_threads_allowed(int, int *) { return 1; }

#endif
