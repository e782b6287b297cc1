/* Runs launches on the CPU: fibres, schedules, shared memory, checks; and a runtime with one device.
 *
 * dcn_emulation_schedule chooses what runs next: the order of blocks and, within a block, which of the
 * threads that can go on does. All of them are legal orders on a GPU:
 *
 *   0 round     ascending, each thread in turn: the order that hides most
 *   1 up        always the lowest thread that can run: early threads run far ahead
 *   2 down      always the highest; blocks from last to first
 *   3 random    any; blocks shuffled
 *   4 preempt   random, and threads also stop at 16-byte loads and reductions
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void **save, const void *bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void *save, const void **bottom, size_t *size);
extern "C" void __asan_unpoison_memory_region(const volatile void *address, size_t size);
#endif

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t STACK = 64 << 10;
constexpr int64_t MOST_THREADS = 1024, MOST_BLOCKS = (1LL << 31) - 1, MOST_SHARED = 48 << 10;
constexpr int WARP = 32;
constexpr unsigned char CANARY = 0xCA;
constexpr size_t GUARD = 1024; /* canary bytes behind a shared array */

enum Schedule { ROUND, UP, DOWN, RANDOM, PREEMPT };
Schedule schedule = ROUND;
uint64_t random_state = 1;
cudaError_t last_error = cudaSuccess;

constexpr int DEVICES = 2; /* alike, and with the same memory */
int device = 0;

/* What has been launched since dcn_emulation_launches was asked. */
struct Launched {
  std::set<std::string> kernels;
  std::set<std::pair<int, void *>> places; /* device and stream */
} launched;

uint64_t random_number() { /* xorshift */
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

/* A stack and where it stopped. Switching saves the registers that a function call keeps. */
#if defined(__x86_64__)
typedef void *Context;
extern "C" void dcn_emulation_switch(void **save, void *load);
asm(R"(
  .text
  .globl dcn_emulation_switch
  .hidden dcn_emulation_switch
dcn_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void switch_context(Context *from, Context *to) { dcn_emulation_switch(from, *to); }
void start_context(Context *context, char *stack, void (*entry)()) {
  void **top = reinterpret_cast<void **>(stack + STACK) - 1;
  *top = nullptr; /* entry() finds the stack aligned as after a call */
  *--top = reinterpret_cast<void *>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  *context = top;
}
#else
typedef ucontext_t Context;
void switch_context(Context *from, Context *to) { swapcontext(from, to); }
void start_context(Context *context, char *stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = STACK;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

enum State { READY, AT_BARRIER, AT_EXCHANGE, DONE };

struct Fibre {
  Context context;
  State state;
  size_t arrays;       /* shared arrays this thread has come past */
  const void *offered; /* to the shuffle it waits at */
  size_t offered_bytes;
};

struct Array {
  char *memory;
  size_t bytes;
  const char *name;
};

/* The block that is running. */
struct Block {
  const Launch *launch;
  std::vector<Fibre> fibres;
  std::vector<Array> arrays;
  uint64_t ready[MOST_THREADS / 64];    /* a bit for each fibre that is READY */
  int64_t meeting[MOST_THREADS / WARP]; /* fibres of a warp that wait in a shuffle */
  int64_t current, done;
  bool failed;
} block;

Context scheduler;
char *stacks;

[[gnu::format(printf, 1, 2)]] void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "emulation: %s, block %u: ", block.launch ? block.launch->kernel : "launch",
          blockIdx.x);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  last_error = cudaErrorLaunchFailure;
  block.failed = true;
}

#if defined(__SANITIZE_ADDRESS__)
const void *main_bottom;
size_t main_size;
void *main_fake;
#endif

void set_state(int64_t index, State state) {
  const uint64_t bit = 1ull << index % 64;
  block.fibres[index].state = state;
  if (state == READY)
    block.ready[index / 64] |= bit;
  else
    block.ready[index / 64] &= ~bit;
}

void to_scheduler(bool finished) {
#if defined(__SANITIZE_ADDRESS__)
  void *fake;
  __sanitizer_start_switch_fiber(finished ? nullptr : &fake, main_bottom, main_size);
#else
  (void)finished;
#endif
  switch_context(&block.fibres[block.current].context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &main_bottom, &main_size);
#endif
}

void to_fibre(int64_t index) {
  block.current = index;
  threadIdx.x = (unsigned)index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake, stacks + index * STACK, STACK);
#endif
  switch_context(&scheduler, &block.fibres[index].context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
}

void yield(State state) {
  set_state(block.current, state);
  to_scheduler(false);
}

void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  block.launch->run(block.launch->body);
  set_state(block.current, DONE);
  block.done++;
  to_scheduler(true);
  abort(); /* nobody resumes a thread that is done */
}

/* The first ready thread from `start` on, -1 if there is none. */
int64_t ready_from(int64_t start) {
  for (int64_t word = start / 64; word < MOST_THREADS / 64; word++) {
    const uint64_t bits = block.ready[word] & (word == start / 64 ? ~0ull << start % 64 : ~0ull);
    if (bits) return word * 64 + __builtin_ctzll(bits);
  }
  return -1;
}

/* The thread to run next, -1 if none can. */
int64_t choose() {
  const int64_t n = (int64_t)block.fibres.size();
  int64_t start = 0;
  switch (schedule) {
    case UP:
      break;
    case DOWN:
      for (int64_t word = MOST_THREADS / 64 - 1; word >= 0; word--)
        if (block.ready[word]) return word * 64 + 63 - __builtin_clzll(block.ready[word]);
      return -1;
    case ROUND:
      start = (block.current + 1) % n;
      break;
    default:
      start = (int64_t)(random_number() % (uint64_t)n);
  }
  const int64_t found = ready_from(start);
  return found < 0 ? ready_from(0) : found;
}

int64_t count(int64_t first, int64_t end, State state) {
  int64_t found = 0;
  for (int64_t i = first; i < end; i++) found += block.fibres[i].state == state;
  return found;
}

/* Lets a warp that has met in a shuffle go on, or a block that has met at a barrier. */
bool release() {
  const int64_t n = (int64_t)block.fibres.size();
  const int64_t waiting = count(0, n, AT_BARRIER);
  if (waiting == n) {
    for (int64_t i = 0; i < n; i++) set_state(i, READY);
    return true;
  }
  if (waiting && waiting + block.done == n)
    fail("divergent barrier: %lld of %lld threads have left", (long long)(n - waiting),
         (long long)n);
  else if (waiting)
    fail("divergent: some threads wait at a barrier, others in a shuffle");
  else
    fail("divergent shuffle: a warp's threads have left or wait elsewhere");
  return false;
}

/* Blocks that have ended check what lay behind their arrays. */
void drop_arrays() {
  for (const Array &array : block.arrays) {
    for (size_t i = 0; i < GUARD; i++)
      if ((unsigned char)array.memory[array.bytes + i] != CANARY) {
        fail("overrun of the shared array %s", array.name);
        break;
      }
    free(array.memory);
  }
  block.arrays.clear();
}

void run_fibres() {
  const int64_t n = (int64_t)blockDim.x;
  if (!stacks)
    stacks = static_cast<char *>(mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks, STACK * (size_t)n); /* abandoned frames of the last block */
#endif
  block.fibres.assign((size_t)n, Fibre{});
  memset(block.ready, 0, sizeof(block.ready));
  memset(block.meeting, 0, sizeof(block.meeting));
  for (int64_t i = 0; i < n; i++) {
    start_context(&block.fibres[i].context, stacks + i * STACK, fibre_main);
    set_state(i, READY);
  }
  block.current = n - 1;
  block.done = 0;
  while (!block.failed && block.done < n) {
    const int64_t next = choose();
    if (next >= 0)
      to_fibre(next);
    else if (!release())
      break;
  }
}

void run_block() {
  block.failed = false;
  if (block.launch->fibres) {
    run_fibres();
  } else {
    block.fibres.clear();
    for (unsigned i = 0; i < blockDim.x; i++) {
      threadIdx.x = schedule == DOWN ? blockDim.x - 1 - i : i;
      block.launch->run(block.launch->body);
    }
  }
  drop_arrays();
}

}  // namespace

void launch(const Launch &launch) {
  if (launch.blocks < 1 || launch.blocks > MOST_BLOCKS || launch.threads < 1 ||
      launch.threads > MOST_THREADS) {
    fprintf(stderr, "emulation: %s: %lld blocks of %lld threads\n", launch.kernel,
            (long long)launch.blocks, (long long)launch.threads);
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  launched.places.emplace(device, launch.stream);
  const std::string kernel = launch.kernel; /* "(corner_keys<T, int64_t>)" */
  const size_t begin = kernel.find_first_not_of('(');
  launched.kernels.insert(kernel.substr(begin, kernel.find('<') - begin));
  block.launch = &launch;
  blockDim = {(unsigned)launch.threads, 1, 1};
  gridDim = {(unsigned)launch.blocks, 1, 1};
  threadIdx = blockIdx = {0, 0, 0};
  std::vector<unsigned> order;
  if (schedule >= RANDOM) {
    for (unsigned i = 0; i < launch.blocks; i++) order.push_back(i);
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  }
  for (int64_t i = 0; i < launch.blocks && last_error == cudaSuccess; i++) {
    blockIdx.x = (unsigned)(schedule >= RANDOM ? order[i]
                            : schedule == DOWN ? launch.blocks - 1 - i
                                               : i);
    run_block();
  }
  block.launch = nullptr;
}

void *shared(size_t bytes, const char *name) {
  if (block.fibres.empty()) {
    fail("shared memory %s in a flat launch", name);
    abort();
  }
  const size_t mine = block.fibres[block.current].arrays++;
  if (mine == block.arrays.size()) {
    size_t total = bytes;
    for (const Array &array : block.arrays) total += array.bytes;
    if (total > (size_t)MOST_SHARED)
      fail("%zu bytes of shared memory with %s, more than %lld", total, name,
           (long long)MOST_SHARED);
    char *memory = static_cast<char *>(aligned_alloc(64, (bytes + GUARD + 63) / 64 * 64));
    memset(memory, 0xFF, bytes); /* NaN in every type */
    memset(memory + bytes, CANARY, GUARD);
    block.arrays.push_back({memory, bytes, name});
  }
  return block.arrays[mine].memory;
}

void barrier() {
  if (block.fibres.empty()) {
    fail("a barrier in a flat launch");
    return;
  }
  yield(AT_BARRIER);
}

void exchange(const void *mine, void *other, size_t bytes, int xor_lane) {
  if (block.fibres.empty()) {
    fail("a shuffle in a flat launch");
    return;
  }
  const int64_t me = block.current, first = me / WARP * WARP;
  Fibre &fibre = block.fibres[me];
  fibre.offered = mine;
  fibre.offered_bytes = bytes;
  const int64_t end = first + WARP < (int64_t)blockDim.x ? first + WARP : (int64_t)blockDim.x;
  /* The last to come copies for all: offers lie on the others' stacks, which stand still. */
  if (++block.meeting[first / WARP] == end - first) {
    block.meeting[first / WARP] = 0;
    for (int64_t i = first; i < end; i++)
      if (block.fibres[i].offered_bytes != bytes) fail("threads meet in different shuffles");
    static char values[WARP][16];
    for (int64_t i = first; i < end; i++) memcpy(values[i - first], block.fibres[i].offered, bytes);
    for (int64_t i = first; i < end; i++) {
      const int64_t from = (i - first) ^ xor_lane;
      if (from >= end - first) continue; /* undefined on a GPU too */
      /* Each thread reads its answer where it offered: an in-place exchange. */
      memcpy(const_cast<void *>(block.fibres[i].offered), values[from], bytes);
    }
    for (int64_t i = first; i < end; i++) set_state(i, READY);
    to_scheduler(false);
  } else {
    yield(AT_EXCHANGE);
  }
  memcpy(other, mine, bytes);
}

void access(const void *address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment)
    fail("a %zu-byte access at %p", alignment, address);
  if (schedule == PREEMPT && !block.fibres.empty() && random_number() % 4 == 0) yield(READY);
}

}  // namespace emulation

extern "C" {
__attribute__((visibility("default"))) void dcn_emulation_schedule(int order, uint64_t seed) {
  emulation::schedule = static_cast<emulation::Schedule>(order);
  emulation::random_state = seed * 2 + 1;
}

/* The kernels launched since this was last asked, the devices and streams they were launched on, and
 * the device that is current now. */
__attribute__((visibility("default"))) const char *dcn_emulation_launches() {
  static std::string text;
  text.clear();
  for (const std::string &kernel : emulation::launched.kernels) text += kernel + " ";
  for (const auto &[device, stream] : emulation::launched.places)
    text += "device " + std::to_string(device) + " stream " +
            std::to_string(reinterpret_cast<uintptr_t>(stream)) + " ";
  text += "now " + std::to_string(emulation::device);
  emulation::launched = {};
  return text.c_str();
}
}

/* To the byte, where a sanitizer sees what lies behind; what is huge is only reserved. */
static std::vector<std::pair<void *, size_t>> reserved;
cudaError_t cudaMalloc(void **memory, size_t bytes) {
  if (bytes < 1u << 28) {
    *memory = malloc(bytes);
  } else {
    *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*memory == MAP_FAILED) *memory = nullptr;
    reserved.emplace_back(*memory, bytes);
  }
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *memory) {
  for (auto &block : reserved)
    if (block.first == memory) {
      munmap(memory, block.second);
      std::swap(block, reserved.back());
      reserved.pop_back();
      return cudaSuccess;
    }
  free(memory);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
cudaError_t cudaGetDevice(int *device) {
  *device = emulation::device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulation::DEVICES) return cudaErrorInvalidDevice;
  emulation::device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) {
  *count = emulation::DEVICES;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
  if (device < 0 || device >= emulation::DEVICES) return cudaErrorInvalidDevice;
  *properties = {"emulation on the CPU", 9, 0, 1, 0};
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return cudaSuccess;
}
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "unspecified launch failure";
  }
}
