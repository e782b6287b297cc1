/* The CUDA runtime as far as csrc/cuda uses it, for a C++ compiler: kernels run on the CPU.
 *
 * This folder stands in for the toolkit's include folder, so the .cu files compile unchanged:
 *
 *     g++ -x c++ -I tests/cuda/emulation csrc/cuda/rows.cu
 *
 * "Device memory" is the process's own. A launch runs to its end, block after block on one thread of the
 * CPU. With DCN_LAUNCH every CUDA thread is a fibre that runs until it reaches a barrier or a shuffle (or,
 * under some schedules, a load); what runs next is up to the schedule (emulation.cpp). With
 * DCN_LAUNCH_FLAT, for kernels without either, threads are turns of a loop.
 *
 * Checked: limits of a launch, alignment of 16-byte accesses, divergence at barriers and shuffles,
 * deadlock, overruns of shared memory, which starts as NaN. A broken rule ends the launch with
 * cudaErrorLaunchFailure, and the rule on stderr. Not modelled: memory order between threads,
 * bank conflicts, anything about time.
 */
#ifndef DCN_EMULATED_CUDA_RUNTIME_H
#define DCN_EMULATED_CUDA_RUNTIME_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DCN_EMULATED 1
#define __global__
#define __launch_bounds__(...)
#define DCN_DEVICE static inline
#define DCN_MEMBER inline

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

/* What a launch is made of. `run` runs the kernel for the current threadIdx and blockIdx. */
struct Launch {
  const char *kernel;
  int64_t blocks, threads;
  void *stream;
  bool fibres;
  void (*run)(const void *body);
  const void *body;
};
void launch(const Launch &launch);

template <class Body>
void launch(const char *kernel, int64_t blocks, int64_t threads, void *stream, bool fibres,
            const Body &body) {
  launch(Launch{kernel, blocks, threads, stream, fibres,
                [](const void *b) { (*static_cast<const Body *>(b))(); }, &body});
}

void *shared(size_t bytes, const char *name); /* the block's array of this statement */
void barrier();
void exchange(const void *mine, void *others, size_t bytes, int xor_lane);
void access(const void *address, size_t alignment); /* before a 16-byte load or store */

}  // namespace emulation

#define DCN_SHARED(type, name, count) \
  type *const name = static_cast<type *>(emulation::shared(sizeof(type) * (count), #name))
#define DCN_EMULATED_LAUNCH(kernel, blocks, threads, stream, fibres, ...) \
  emulation::launch(#kernel, blocks, threads, stream, fibres, [=] { kernel(__VA_ARGS__); })
#define DCN_LAUNCH(kernel, blocks, threads, stream, ...) \
  DCN_EMULATED_LAUNCH(kernel, blocks, threads, stream, true, __VA_ARGS__)
#define DCN_LAUNCH_FLAT(kernel, blocks, threads, stream, ...) \
  DCN_EMULATED_LAUNCH(kernel, blocks, threads, stream, false, __VA_ARGS__)

static inline void __syncthreads() { emulation::barrier(); }

template <class N>
static inline N __shfl_xor_sync(unsigned, N mine, int lane) {
  N other;
  emulation::exchange(&mine, &other, sizeof(N), lane);
  return other;
}

template <class N>
static inline N __ldg(const N *from) {
  emulation::access(from, alignof(N));
  N value;
  memcpy(&value, from, sizeof(N));
  return value;
}

template <class N>
static inline N atomicAdd(N *to, N value) {
  const N old = *to;
  *to = old + value;
  return old;
}
static inline float4 atomicAdd(float4 *to, float4 value) {
  emulation::access(to, alignof(float4));
  float *at = reinterpret_cast<float *>(to);
  at[0] += value.x, at[1] += value.y, at[2] += value.z, at[3] += value.w;
  return value;
}

typedef int cudaError_t;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaFree(void *memory);
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
static inline cudaError_t cudaMemset(void *to, int value, size_t bytes) {
  memset(to, value, bytes);
  return cudaSuccess;
}

static inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; } /* for tools alone */
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
const char *cudaGetErrorString(cudaError_t error);

#endif
