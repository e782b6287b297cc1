/* One deformable convolution call as plain data, shared by the CPU and the CUDA core.
 *
 * Both cores are reached through a C ABI: this params struct, a struct of pointers and a status.
 * The Python edge (dcnlib/_problem.py) has checked every value; below this line code trusts them:
 * sizes are in [1, 2^31), only batch may be 0, and every element count fits in int64.
 */
#ifndef DCN_PARAMS_H
#define DCN_PARAMS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Storage type. Arithmetic is float32 for the 16-bit types and for float32, float64 for float64. */
typedef enum { DCN_FLOAT32 = 0, DCN_FLOAT64 = 1, DCN_FLOAT16 = 2, DCN_BFLOAT16 = 3 } dcn_dtype;

/* Layout of input, output, grad_output and grad_input. All other tensors are always contiguous
 * in the order of their shape: offset (N, 2*G*KH*KW, OH, OW), mask (N, G*KH*KW, OH, OW),
 * weight (O, C/groups, KH, KW), bias (O). */
typedef enum { DCN_NCHW = 0, DCN_NHWC = 1 } dcn_layout;

typedef struct {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left; /* bottom and right padding only decide out_h and out_w */
  int64_t dilation_h, dilation_w;
  int64_t groups, offset_groups;
  int32_t dtype;  /* dcn_dtype */
  int32_t layout; /* dcn_layout */
} dcn_params;

/* Addresses; null means absent: no mask, no bias, a gradient that nobody wants. */
typedef struct {
  const void *input, *offset, *weight, *bias, *mask;
  void *output;
  const void *grad_output;
  void *grad_input, *grad_offset, *grad_weight, *grad_bias, *grad_mask;
} dcn_tensors;

#ifdef __cplusplus
}
#endif
#endif
