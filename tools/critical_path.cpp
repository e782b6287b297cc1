/* How the CPU core's convolutions would scale to many threads, from the times of their tasks on one core.
 *
 *     critical_path ISA N C O H W K stride groups offset_groups 1 [T ...]     ISA "best": the default
 *
 * A line of JSON for each direction, float32 and channels first; tools/critical_path.py compiles and runs
 * this and makes a table. One thread runs each task of the plan for T threads, the least time of some
 * repetitions counts. In simulated time T threads then take the tasks as run_member of threads.cpp has it;
 * a phase lasts until the last of them is through, and a barrier. The efficiency is what the plan for one
 * thread takes over T times that.
 *
 * This sees tasks that are too few, too long or unequal, what smaller ones cost, and barriers. It cannot
 * see what cores share: memory bandwidth, the last-level cache, power and with it their clock; nor what it
 * costs to read what another core has written, to wake a team or to lose a core to another program. Small
 * calls get all threads here, from _core.pyx fewer. Exit status 1: some bits depend on the threads.
 */
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <queue>
#include <random>
#include <utility>
#include <vector>

#include "../csrc/cpu/dcn_cpu.h"
#include "../csrc/cpu/workspace.h"

namespace {

constexpr double BARRIER = 3;        /* microseconds, of threads that spin */
constexpr double LEAST_TIME = 1e6;   /* microseconds of a direction's repetitions ... */
constexpr int LEAST_REPETITIONS = 7; /* ... and how many there are */

/* The thread's processor time: other programs do not count. */
double microseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

double cost_of_clock() {
  double least = INFINITY;
  for (int i = 0; i < 1000; i++) {
    const double begin = microseconds();
    least = std::min(least, microseconds() - begin);
  }
  return least;
}

struct Phase { /* of a wave */
  int64_t wave, phase;
  std::vector<double> times; /* of its tasks */
};

struct Schedule {
  dcn_cpu_plan plan;
  std::vector<Phase> phases;
  explicit Schedule(const dcn_cpu_plan &of) : plan(of) {
    for (int64_t wave = 0; wave < plan.waves; wave++)
      for (int64_t phase = 0; phase < plan.phases; phase++)
        if (const size_t tasks = (size_t)plan.tasks[phase])
          phases.push_back({wave, phase, std::vector<double>(tasks, INFINITY)});
  }
};

/* When the last thread finds no task any more, if all come at once: run_member's loops. */
double makespan(const std::vector<double> &times, int64_t threads) {
  const int64_t tasks = (int64_t)times.size();
  std::vector<int64_t> taken(threads);        /* of each thread's share, by itself or others */
  std::vector<int64_t> i(threads);            /* of each thread: whose share it is at */
  typedef std::pair<double, int64_t> Arrival; /* of a thread that wants a task */
  std::priority_queue<Arrival, std::vector<Arrival>, std::greater<Arrival>> arrivals;
  for (int64_t me = 0; me < threads; me++) arrivals.push({0, me});
  double now = 0;
  while (!arrivals.empty()) {
    const int64_t me = arrivals.top().second;
    now = arrivals.top().first;
    arrivals.pop();
    for (; i[me] < threads; i[me]++) {
      const int64_t owner = (me + i[me]) % threads;
      const int64_t begin = tasks * owner / threads, end = tasks * (owner + 1) / threads;
      const int64_t task = begin + taken[owner]++;
      if (task >= end) continue;
      arrivals.push({now + times[task], me});
      break;
    }
  }
  return now;
}

double time_of(const Schedule &schedule, int threads) {
  double sum = 0;
  for (const Phase &phase : schedule.phases)
    sum += makespan(phase.times, threads) + (threads > 1 ? BARRIER : 0);
  return sum;
}

size_t whole_lines(size_t bytes) { return (bytes + DCN_LINE - 1) / DCN_LINE * DCN_LINE; }

struct Memory { /* until the process ends */
  size_t bytes;
  char *at;
  explicit Memory(size_t wanted) : bytes(wanted), at((char *)dcn_workspace_take(wanted)) {}
  /* Floats are NaN: what is not written, or read before, shows. */
  void spoil() { memset(at, 0xff, bytes); }
};

/* Prints a direction's line; whether the bits of the results are the same for all threads. */
bool report(const dcn_cpu_kernels &table, const dcn_params &params, const dcn_tensors &tensors,
            int direction, Memory results, const std::vector<int> &threads) {
  constexpr int ALL_GRADIENTS = 31;
  std::vector<Schedule> schedules; /* different ones: the same plan has the same times */
  std::vector<size_t> which;
  size_t shared_bytes = 0, scratch_bytes = 0;
  for (const int count : threads) {
    dcn_cpu_plan plan = {};
    table.deform_conv2d.plan(&params, direction, ALL_GRADIENTS, count, &plan);
    size_t i = 0;
    while (i < schedules.size() && memcmp(&schedules[i].plan, &plan, sizeof plan)) i++;
    if (i == schedules.size()) schedules.emplace_back(plan);
    which.push_back(i);
    shared_bytes = std::max(shared_bytes, plan.shared_bytes);
    scratch_bytes = std::max(scratch_bytes, plan.scratch_bytes);
  }

  Memory shared(shared_bytes), scratch(scratch_bytes);
  dcn_cpu_call call = {&params, &tensors, nullptr, direction, shared.at, nullptr};
  const double clock = cost_of_clock(), enough = microseconds() + LEAST_TIME;
  std::vector<char> expected;
  bool same = true;
  /* Plans in turns: no busy moment of the machine is one plan's alone. */
  for (int i = 0; i < LEAST_REPETITIONS || microseconds() < enough; i++) {
    if (i < LEAST_REPETITIONS) fputc('.', stderr);
    for (Schedule &schedule : schedules) {
      if (i == 0)
        for (Memory *memory : {&results, &shared, &scratch}) memory->spoil();
      call.plan = &schedule.plan;
      for (Phase &phase : schedule.phases)
        for (size_t task = 0; task < phase.times.size(); task++) {
          const double begin = microseconds();
          table.deform_conv2d.run(&call, phase.wave, phase.phase, (int64_t)task, scratch.at);
          const double time = std::max(0.0, microseconds() - begin - clock);
          phase.times[task] = std::min(phase.times[task], time);
        }
      if (expected.empty()) expected.assign(results.at, results.at + results.bytes);
      same &= !memcmp(results.at, expected.data(), results.bytes);
    }
  }

  const double alone = time_of(schedules[which[0]], 1);
  printf("{\"isa\": \"%s\", \"same_bits\": %s, \"ms\": %.3f, \"threads\": {", table.isa,
         same ? "true" : "false", alone / 1e3);
  for (size_t i = 0; i < threads.size(); i++) {
    const Schedule &schedule = schedules[which[i]];
    const size_t bytes =
        whole_lines(schedule.plan.shared_bytes) + threads[i] * schedule.plan.scratch_bytes;
    printf("%s\"%d\": {\"efficiency\": %.3f, \"megabytes\": %.2f}", i ? ", " : "", threads[i],
           alone / time_of(schedule, threads[i]) / threads[i], (double)bytes / 0x1p20);
  }
  printf("}}\n");
  return same;
}

} /* namespace */

int main(int argc, char **argv) {
  const dcn_cpu_kernels *const *table = dcn_cpu_usable();
  while (*table && strcmp(argv[1], "best") && strcmp(argv[1], (*table)->isa)) table++;
  if (!*table) {
    fprintf(stderr, "instruction set %s cannot run here\n", argv[1]);
    return 2;
  }
  int64_t v[9];
  for (int i = 0; i < 9; i++) v[i] = atol(argv[2 + i]);
  std::vector<int> threads;
  for (int i = 11; i < argc; i++) threads.push_back(atoi(argv[i]));

  dcn_params p = {};
  p.batch = v[0], p.in_channels = v[1], p.out_channels = v[2], p.in_h = v[3], p.in_w = v[4];
  p.kernel_h = p.kernel_w = v[5], p.stride_h = p.stride_w = v[6];
  p.groups = v[7], p.offset_groups = v[8], p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_left = v[5] / 2;
  p.out_h = (p.in_h + 2 * p.pad_top - p.kernel_h) / p.stride_h + 1;
  p.out_w = (p.in_w + 2 * p.pad_left - p.kernel_w) / p.stride_w + 1;

  const int64_t taps = p.kernel_h * p.kernel_w, fan_in = p.in_channels / p.groups * taps;
  const int64_t masks = p.batch * p.offset_groups * taps * p.out_h * p.out_w;
  dcn_tensors t = {};
  struct Tensor { /* normal values, and the result of its shape */
    int64_t count;
    float deviation;
    const void **values;
    void **result;
  };
  const Tensor all[] = {
      {p.batch * p.in_channels * p.in_h * p.in_w, 1, &t.input, &t.grad_input},
      {2 * masks, 2, &t.offset, &t.grad_offset}, /* as in asv_bench/ratios.py */
      {masks, 1, &t.mask, &t.grad_mask},
      {p.out_channels * fan_in, 1 / std::sqrt((float)fan_in), &t.weight, &t.grad_weight},
      {p.out_channels, 1, &t.bias, &t.grad_bias},
      {p.batch * p.out_channels * p.out_h * p.out_w, 1, &t.grad_output, &t.output}};
  size_t bytes = 0;
  for (const Tensor &tensor : all) bytes += whole_lines(tensor.count * sizeof(float));
  const Memory results(bytes), values(bytes);
  std::mt19937 random;
  bytes = 0;
  for (const Tensor &tensor : all) {
    *tensor.result = results.at + bytes;
    *tensor.values = values.at + bytes;
    std::normal_distribution<float> normal(0, tensor.deviation);
    for (int64_t i = 0; i < tensor.count; i++) ((float *)(values.at + bytes))[i] = normal(random);
    bytes += whole_lines(tensor.count * sizeof(float));
  }
  const bool same = report(**table, p, t, DCN_FORWARD, results, threads);
  return report(**table, p, t, DCN_BACKWARD, results, threads) && same ? 0 : 1;
}
