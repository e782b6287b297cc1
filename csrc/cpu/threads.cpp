/* See threads.h. */
#include "threads.h"

static void run_alone(const dcn_cpu_operator *kernel, const dcn_cpu_call *call, void *scratch) {
  const dcn_cpu_plan &plan = *call->plan;
  for (int64_t wave = 0; wave < plan.waves; wave++)
    for (int64_t phase = 0; phase < plan.phases; phase++)
      for (int64_t task = 0; task < plan.tasks[phase]; task++)
        kernel->run(call, wave, phase, task, scratch);
}

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

static volatile int forked = 0;

static void in_child(void) { forked = 1; }

void dcn_threads_alone(void) { forked = 1; }
int dcn_threads_forked(void) { return forked; }

static pthread_attr_t attributes; /* of the runtime's threads */

/* OMP_STACKSIZE as the runtime reads it: a number, and B, K (the default), M or G. */
static size_t stack_size(void) {
  const char *text = getenv("OMP_STACKSIZE");
  if (!text) text = getenv("GOMP_STACKSIZE");
  if (!text) return 0;
  char *end;
  size_t size = strtoul(text, &end, 10);
  while (*end == ' ') end++;
  switch (*end | 0x20) {
    case 'b':
      return size;
    case 'm':
      return size << 20;
    case 'g':
      return size << 30;
    default:
      return size << 10;
  }
}

void dcn_threads_init(void) {
  pthread_atfork(nullptr, nullptr, in_child);
  pthread_attr_init(&attributes);
  if (const size_t size = stack_size()) pthread_attr_setstacksize(&attributes, size);
}

int dcn_threads_openmp(void) { return 1; }
int dcn_threads_cores(void) { return omp_get_num_procs(); }

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

/* How many of `count` threads can exist at once beside the calling one, and the runtime's notes. */
int can_create(int count) {
  constexpr size_t NOTES = 1 << 20;
  void *notes = mmap(nullptr, NOTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (notes == MAP_FAILED) return 0;
  Gate gate = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
  pthread_t threads[MOST];
  int created = 0;
  while (created < count &&
         pthread_create(&threads[created], &attributes, wait_at_gate, &gate) == 0)
    created++;
  pthread_mutex_lock(&gate.mutex);
  gate.open = true;
  pthread_cond_broadcast(&gate.opened);
  pthread_mutex_unlock(&gate.mutex);
  for (int i = 0; i < created; i++) pthread_join(threads[i], nullptr);
  munmap(notes, NOTES);
  return created;
}

} /* namespace */

int dcn_threads_allowed(int wanted) {
  if (wanted <= 1 || forked || omp_in_parallel()) return 1;
  if (wanted > MOST) wanted = MOST;
  const int limit = omp_get_thread_limit();
  return wanted < limit ? wanted : limit;
}

int dcn_threads_team(int workers, int allowed) {
  /* libgomp keeps a pool for each thread that opens teams: the threads of its last one, no more. */
  static thread_local int pool = 1;
  if (workers <= pool) return pool = pool < allowed ? pool : allowed;
  const int possible = 1 + can_create(workers - 1);
  if (possible >= workers) return pool = workers;
  /* Part of what was possible: the probe's threads are gone, others may take their place. */
  return pool = pool > possible / 2 ? pool : possible / 2 > 1 ? possible / 2 : 1;
}

namespace {

/* How many tasks of a thread's share have been taken, by itself or others, in even and odd phases; on
 * a cache line of its own. */
struct alignas(64) Taken {
  int64_t tasks[2];
};

void run_member(const dcn_cpu_operator *kernel, const dcn_cpu_call *call, char *scratch,
                int workers, Taken *taken) {
  const dcn_cpu_plan &plan = *call->plan;
  const int me = omp_get_thread_num(), team = omp_get_num_threads();
  if (workers > team) workers = team;
  scratch += me * plan.scratch_bytes;
  int64_t last = plan.phases - 1;
  while (last > 0 && plan.tasks[last] == 0) last--;
  int parity = 0;
  for (int64_t wave = 0; wave < plan.waves; wave++)
    for (int64_t phase = 0; phase < plan.phases; phase++) {
      const int64_t tasks = plan.tasks[phase];
      if (tasks == 0) continue;
      for (int i = 0; i < workers && me < workers; i++) {
        const int owner = (me + i) % workers;
        const int64_t begin = tasks * owner / workers, end = tasks * (owner + 1) / workers;
        int64_t *next = &taken[owner].tasks[parity];
        for (;;) {
          const int64_t task = begin + __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
          if (task >= end) break;
          kernel->run(call, wave, phase, task, scratch);
        }
      }
      if (wave == plan.waves - 1 && phase == last) return; /* the region's end is a barrier */
      parity = !parity;
      /* Nobody has looked at these since the barrier before. */
      __atomic_store_n(&taken[me].tasks[parity], 0, __ATOMIC_RELAXED);
#pragma omp barrier
    }
}

} /* namespace */

void dcn_threads_run(const dcn_cpu_operator *kernel, const dcn_cpu_call *call, void *scratch,
                     int workers, int team) {
  if (workers <= 1) return run_alone(kernel, call, scratch);
  Taken taken[MOST] = {};
#pragma omp parallel num_threads(team)
  run_member(kernel, call, (char *)scratch, workers, taken);
}

#else

void dcn_threads_run(const dcn_cpu_operator *kernel, const dcn_cpu_call *call, void *scratch, int,
                     int) {
  run_alone(kernel, call, scratch);
}

void dcn_threads_init(void) {}
void dcn_threads_alone(void) {}
int dcn_threads_forked(void) { return 0; }
int dcn_threads_openmp(void) { return 0; }
int dcn_threads_cores(void) { return 1; }
int dcn_threads_allowed(int) { return 1; }
int dcn_threads_team(int, int) { return 1; }

#endif
