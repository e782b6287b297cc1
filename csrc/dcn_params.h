/* One call as plain data, shared by the CPU and the CUDA core.
 *
 * Both cores are reached through a C ABI: a params struct and a struct of pointers.
 * The Python edge (dcnlib/_problem*.py) has checked every value; below this line code trusts them:
 * sizes are in [1, 2^31), only batch and rois may be 0, and every element count fits in int64. For a
 * convolution and for RoI pooling images of an empty batch are 1 x 1 here.
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

/* Addresses; null means absent: no mask, no bias, a gradient that nobody wants. On the CPU the offset
 * of a forward call may be absent too: taps stay on the lattice, as in a plain convolution. */
typedef struct {
  const void *input, *offset, *weight, *bias, *mask;
  void *output;
  const void *grad_output;
  void *grad_input, *grad_offset, *grad_weight, *grad_bias, *grad_mask;
} dcn_tensors;

/* Deformable RoI pooling. Output channel o at bin (ph, pw) reads input channel
 * (o * group_h + ph * group_h / out_h) * group_w + pw * group_w / out_w. With the class
 * k = o / (out_channels / classes) it moves by offset channels 2 k (x) and 2 k + 1 (y) at part
 * (ph * part_h / out_h, pw * part_w / out_w). Both layouts apply to input, output and their
 * gradients; offset (R, 2*classes, part_h, part_w) and mask (R, 1, out_h, out_w) are contiguous. */
typedef struct {
  int64_t batch, in_channels, in_h, in_w;
  int64_t rois, out_channels, out_h, out_w;
  int64_t classes, part_h, part_w;
  int64_t group_h, group_w;
  int64_t samples; /* of a bin along one axis; 0: one for each pixel of its extent */
  double spatial_scale, offset_scale;
  int32_t position_sensitive; /* the dialect: see roi_axis.h */
  int32_t dtype, layout;
} dcn_roi_params;

/* rois (R, 5) is float64 whatever the dtype: image number, x1, y1, x2, y2; numbers are checked. */
typedef struct {
  const void *input;
  const double *rois;
  const void *offset, *mask;
  void *output;
  const void *grad_output;
  void *grad_input, *grad_offset, *grad_mask;
} dcn_roi_tensors;

/* Deformable resampling: everything (N, C, H, W) and contiguous, offset (N, 2*C, H, W). */
typedef struct {
  int64_t batch, channels, in_h, in_w;
  int32_t border; /* positions are limited to the image; else zeros lie around it */
  int32_t dtype;
} dcn_resample_params;

typedef struct {
  const void *input, *offset;
  void *output;
  const void *grad_output;
  void *grad_input, *grad_offset;
} dcn_resample_tensors;

#ifdef __cplusplus
}
#endif
#endif
