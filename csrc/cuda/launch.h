/* The host side of a launch: the device, the number of blocks, the storage type, the error. */
#ifndef DCN_CUDA_LAUNCH_H
#define DCN_CUDA_LAUNCH_H

#include "device.h"

namespace dcn {

/* The device of this thread for as long as the object lives. */
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&previous);
    if (!error && previous != device) {
      error = cudaSetDevice(device);
      moved = !error;
    }
  }
  ~OnDevice() {
    if (moved) cudaSetDevice(previous);
  }
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;
  cudaError_t error;

 private:
  int previous = 0;
  bool moved = false;
};

/* Blocks of THREADS for `units` threads. */
inline unsigned blocks_for(int64_t units, const dcn_cuda_launch &launch) {
  const int64_t blocks = (units + THREADS - 1) / THREADS;
  return (unsigned)(blocks < launch.blocks ? blocks : launch.blocks);
}

/* The least power of two that is not below n, at most `most`. */
inline int power_of_two(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

/* Pass<T>::launch(arguments...) for the storage type, on the launch's device; the error of it all. */
template <template <class> class Pass, class... Arguments>
int launch(int dtype, const dcn_cuda_launch &where, Arguments... arguments) {
  OnDevice guard(where.device);
  if (guard.error) return guard.error;
  switch (dtype) {
    case DCN_FLOAT32:
      Pass<float>::launch(where, arguments...);
      break;
#if !defined(DCN_FLOAT32_ONLY) /* defined by tests that compile many variants */
    case DCN_FLOAT64:
      Pass<double>::launch(where, arguments...);
      break;
    case DCN_FLOAT16:
      Pass<__half>::launch(where, arguments...);
      break;
    case DCN_BFLOAT16:
      Pass<__nv_bfloat16>::launch(where, arguments...);
      break;
#endif
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace dcn
#endif
