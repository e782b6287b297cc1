/* The rest of the C ABI (dcn_cuda.h): which implementation runs, and what there is to run on. */
#include <string.h>

#include "launch.h"
#include "passes.h"

int dcn_cuda_sample(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                    const dcn_cuda_launch *where, void *columns) {
  return (chunk->order == DCN_ROWS ? dcn::sample_rows : dcn::sample_planar)(p, t, chunk, where,
                                                                            columns);
}

int dcn_cuda_backward(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                      const dcn_cuda_launch *where, const void *grad_columns, void *columns,
                      void *grad_input) {
  return (chunk->order == DCN_ROWS ? dcn::backward_rows : dcn::backward_planar)(
      p, t, chunk, where, grad_columns, columns, grad_input);
}

void dcn_cuda_get_state(dcn_cuda_state *state) {
  int driver = 0, runtime = 0, devices = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  state->error = cudaGetDeviceCount(&devices);
  cudaGetLastError(); /* what was found is reported here, not by the next launch */
  state->driver = driver;
  state->runtime = runtime;
  state->devices = state->error ? 0 : devices;
}

int dcn_cuda_get_device(int index, dcn_cuda_device *device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error) {
    cudaGetLastError();
    return error;
  }
  strncpy(device->name, properties.name, sizeof(device->name) - 1);
  device->name[sizeof(device->name) - 1] = 0;
  device->major = properties.major;
  device->minor = properties.minor;
  device->multiprocessors = properties.multiProcessorCount;
  device->memory = (int64_t)properties.totalGlobalMem;
  return 0;
}

const char *dcn_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }

const char *dcn_cuda_archs(void) { return DCN_CUDA_ARCHS; }
