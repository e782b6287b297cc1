/* The two implementations behind dcn_cuda_sample and dcn_cuda_backward, one for each dcn_cuda_order. */
#ifndef DCN_CUDA_PASSES_H
#define DCN_CUDA_PASSES_H

#include "dcn_cuda.h"

namespace dcn {

int sample_planar(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                  const dcn_cuda_launch *, void *columns);
int sample_rows(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                const dcn_cuda_launch *, void *columns);
int backward_planar(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                    const dcn_cuda_launch *, const void *grad_columns, void *columns,
                    void *grad_input);
int backward_rows(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                  const dcn_cuda_launch *, const void *grad_columns, void *columns,
                  void *grad_input);

}  // namespace dcn
#endif
