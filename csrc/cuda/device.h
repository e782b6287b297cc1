/* What a kernel may use: storage types, 16-byte vectors, sums in memory, shared memory, launches.
 *
 * The .cu files are compiled twice: by nvcc, and by a C++ compiler against the emulation's headers
 * (tests/cuda/emulation), which run every thread on the CPU. So kernels keep to these rules:
 *   - no inline assembly and no <<< >>>, except in this file; shared memory by DCN_SHARED;
 *   - barriers and shuffles are reached by all threads of the block or warp;
 *   - DCN_LAUNCH_FLAT launches kernels with neither, DCN_LAUNCH those with.
 */
#ifndef DCN_CUDA_DEVICE_H
#define DCN_CUDA_DEVICE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#include "../bilinear.h"
#include "dcn_cuda.h"

#if defined(__CUDACC__)
#define DCN_DEVICE static __device__ __forceinline__
#define DCN_MEMBER __device__ __forceinline__
#define DCN_SHARED(type, name, count) __shared__ type name[count]
#define DCN_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<blocks, threads, 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define DCN_LAUNCH_FLAT DCN_LAUNCH
#endif

namespace dcn {

constexpr int THREADS = 256; /* of every block */

/* A: the arithmetic type. limit: the largest finite value. narrow: rounds to nearest, ties to even. */
template <class T>
struct Storage {
  typedef T A;
  static DCN_MEMBER T narrow(T v) { return v; }
};
template <>
struct Storage<__half> {
  typedef float A;
  static constexpr float limit = 65504.0f;
  static DCN_MEMBER __half narrow(float v) { return __float2half_rn(v); }
};
template <>
struct Storage<__nv_bfloat16> {
  typedef float A;
  static constexpr float limit = 3.38953139e38f;
  static DCN_MEMBER __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};

template <class T>
DCN_DEVICE T narrow(typename Storage<T>::A v) {
  return Storage<T>::narrow(v);
}
DCN_DEVICE float widen(float v) { return v; }
DCN_DEVICE double widen(double v) { return v; }
DCN_DEVICE float widen(__half v) { return __half2float(v); }
DCN_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

/* v as high + low: 22 bits for float16, 16 for bfloat16, instead of 11 and 8. */
template <class T>
DCN_DEVICE void split(float v, T *high, T *low) {
  const float limit = Storage<T>::limit;
  const bool finite = v - v == 0;
  const float near = finite ? (v > limit ? limit : v < -limit ? -limit : v) : v;
  *high = narrow<T>(near);
  *low = narrow<T>(finite ? v - widen(*high) : 0.0f);
}
DCN_DEVICE void split(float v, float *high, float *low) { *high = v, *low = 0; }
DCN_DEVICE void split(double v, double *high, double *low) { *high = v, *low = 0; }

/* 16 bytes: one load or store. */
template <class T>
struct alignas(16) Pack {
  enum { size = 16 / sizeof(T) };
  T at[size];
};

/* From memory that no thread of the launch writes. */
template <class T>
DCN_DEVICE Pack<T> load16(const T *from) {
  const uint4 words = __ldg(reinterpret_cast<const uint4 *>(from));
  Pack<T> pack;
  memcpy(&pack, &words, sizeof(pack));
  return pack;
}
/* In assembly because the optimiser takes a plain store of a Pack apart again. */
template <class T>
DCN_DEVICE void store16(T *to, const Pack<T> &pack) {
  uint4 words;
  memcpy(&words, &pack, sizeof(words));
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  emulation::access(to, alignof(uint4));
  memcpy(static_cast<void *>(to), &words, sizeof(words));
#endif
}

/* to[i] += v[i] over 16 bytes; any number of threads may add to the same place. */
DCN_DEVICE void reduce16(float *to, const float *v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  for (int i = 0; i < 4; i++) atomicAdd(to + i, v[i]);
#else
  atomicAdd(reinterpret_cast<float4 *>(to), make_float4(v[0], v[1], v[2], v[3]));
#endif
}
DCN_DEVICE void reduce16(double *to, const double *v) {
  atomicAdd(to, v[0]);
  atomicAdd(to + 1, v[1]);
}

template <class N>
DCN_DEVICE N least(N a, N b) {
  return a < b ? a : b;
}

/* Loops over the grid start and step here; 64 bits, as blocks * threads may pass 2^31. */
DCN_DEVICE int64_t first_unit() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
DCN_DEVICE int64_t unit_step() { return (int64_t)gridDim.x * blockDim.x; }

}  // namespace dcn
#endif
