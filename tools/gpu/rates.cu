/* How fast a device reads and adds to rows of 512 bytes at random places: the kernels' own accesses.
 *
 *     rates [log2 of the additions, default 22]     a line of JSON for each, as asv_bench/gpu has them
 *
 * load16 and reduce16 (csrc/cuda/device.h) over tables of 16 MiB, which a second-level cache holds, and
 * of 1 GiB, which none does; the reductions once more as four scalar ones. A warp takes a row. Whether
 * each addition arrived is checked: exit status 1 if not.
 */
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace dcn {
namespace {

constexpr int ROW = 128; /* floats */
constexpr int LANES = 32;
enum Access { GATHER, VECTOR, SCALAR };
const char *const NAMES[] = {"gather 512 B", "reductions of 16 bytes", "reductions of 4 bytes"};

/* The row of a turn: all turns in another order, spread over the rows. */
DCN_DEVICE int64_t row_of(int64_t turn, int64_t turns, int64_t rows) {
  return (int64_t)(((uint64_t)turn * 0x9E3779B1u) & (uint64_t)(turns - 1)) % rows;
}

template <int ACCESS>
__global__ void __launch_bounds__(THREADS)
    visit(int64_t turns, int64_t rows, float *table, float *sums) {
  const int64_t lane = first_unit() % LANES, step = unit_step() / LANES;
  const float ones[4] = {1, 1, 1, 1};
  float sum = 0;
  for (int64_t turn = first_unit() / LANES; turn < turns; turn += step) {
    float *at = table + row_of(turn, turns, rows) * ROW + 4 * lane;
    if (ACCESS == GATHER) {
      const Pack<float> pack = load16(at);
      sum += pack.at[0] + pack.at[1] + pack.at[2] + pack.at[3];
    } else if (ACCESS == VECTOR) {
      reduce16(at, ones);
    } else {
      for (int i = 0; i < 4; i++) atomicAdd(at + i, 1.0f);
    }
  }
  if (ACCESS == GATHER) sums[first_unit()] = sum;
}

void check(cudaError_t error) {
  if (!error) return;
  printf("FAILED: %s\n", cudaGetErrorString(error));
  exit(2);
}

double milliseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

template <int ACCESS>
int measure(int64_t turns, int64_t rows, int blocks, float *table, float *sums) {
  const int64_t bytes = rows * ROW * 4;
  constexpr int REPEATS = 5;
  check(cudaMemset(table, 0, bytes));
  double ms[2];
  for (int i = -1; i < 2; i++) { /* the first time warms up */
    check(cudaDeviceSynchronize());
    const double begin = milliseconds();
    for (int repeat = 0; repeat < REPEATS; repeat++)
      DCN_LAUNCH_FLAT(visit<ACCESS>, blocks, THREADS, nullptr, turns, rows, table, sums);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
    if (i >= 0) ms[i] = (milliseconds() - begin) / REPEATS;
  }
  printf(
      "{\"kind\": \"ceiling\", \"what\": \"%s, %lld MiB\", \"ms\": [%.4f, %.4f], \"rate\": %.4f, "
      "\"unit\": \"TB/s\"}\n",
      NAMES[ACCESS], (long long)(bytes >> 20), ms[0], ms[1],
      1e-9 * (double)turns * ROW * 4 / (ms[0] < ms[1] ? ms[0] : ms[1]));
  if (ACCESS == GATHER) return 0;
  std::vector<float> host((size_t)(rows * ROW));
  check(cudaMemcpy(host.data(), table, bytes, cudaMemcpyDeviceToHost));
  double arrived = 0;
  for (const float v : host) arrived += v;
  if (arrived == 3.0 * REPEATS * (double)turns * ROW) return 0;
  printf("FAILED %s: %.0f of %.0f additions arrived\n", NAMES[ACCESS], arrived,
         3.0 * REPEATS * (double)turns * ROW);
  return 1;
}

}  // namespace
}  // namespace dcn

int main(int argc, char **argv) {
  const int64_t turns = 1ll << (argc > 1 ? atoi(argv[1]) : 22);
  cudaDeviceProp properties;
  dcn::check(cudaGetDeviceProperties(&properties, 0));
  const int blocks = 16 * properties.multiProcessorCount;
  float *table = nullptr, *sums = nullptr;
  int bad = 0;
  dcn::check(cudaMalloc((void **)&sums, (size_t)blocks * dcn::THREADS * 4));
  for (const int64_t most : {1ll << 15, 1ll << 21}) {
    const int64_t rows = turns < most ? turns : most; /* few turns: a rehearsal */
    dcn::check(cudaMalloc((void **)&table, (size_t)rows * dcn::ROW * 4));
    bad += dcn::measure<dcn::GATHER>(turns, rows, blocks, table, sums);
    bad += dcn::measure<dcn::VECTOR>(turns, rows, blocks, table, sums);
    bad += dcn::measure<dcn::SCALAR>(turns, rows, blocks, table, sums);
    cudaFree(table);
  }
  cudaFree(sums);
  return bad ? 1 : 0;
}
