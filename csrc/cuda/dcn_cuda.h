/* The CUDA core's C ABI: the passes over memory around the matrix products, one launch each.
 *
 * A call is cut into chunks of output pixels; for each chunk the caller (dcnlib/backends/cuda) runs
 *
 *   forward    dcn_cuda_sample       columns = mask * S(input)
 *              product               product = weight x columns
 *              dcn_cuda_finish       output  = product + bias
 *   backward   dcn_cuda_pack         grad_output of the chunk as a matrix (NCHW only)
 *              product               grad_columns = weight^T x grad_output
 *              dcn_cuda_backward     grad_offset, grad_mask, columns again, grad_input by reductions
 *              product               grad_weight += grad_output x columns^T
 *   or, for a grad_input with the same bits on every run, dcn_cuda_backward without grad_input and
 *              dcn_cuda_keys         which pixel of grad_input each corner goes to, with what weight
 *              stable sort           of the keys
 *              dcn_cuda_gather       grad_input: every pixel's list summed in order by one owner
 *
 * The products and the sort are torch's, on the same stream. Rules: device addresses only; launches on
 * the given stream and nothing else; no allocation, no synchronisation, no global state; the device is
 * set and restored inside. Returns 0 or a cudaError_t, which dcn_cuda_error puts into words.
 */
#ifndef DCN_CUDA_H
#define DCN_CUDA_H

#include "../dcn_params.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define DCN_CUDA_API __attribute__((visibility("default")))
#else
#define DCN_CUDA_API
#endif

/* How the columns of a chunk lie in memory. A weight group has C/groups channels, `pieces` is below.
 * DCN_PLANAR  [groups][pieces][C/groups][taps][count]   any channels and layout, one value a time
 * DCN_ROWS    [groups][count][pieces][taps][C/groups]   input NHWC, C/groups and C/offset_groups
 *                                                      multiples of the values in 16 bytes, addresses
 *                                                      of input and grad_input 16-byte aligned
 * grad_columns are the same with one piece, in the arithmetic type (float; double for float64). */
typedef enum { DCN_PLANAR = 0, DCN_ROWS = 1 } dcn_cuda_order;

typedef struct {
  int64_t first, count; /* output pixels of the batch, flattened over (n, oh, ow) */
  int64_t image;        /* the image that input and grad_input start with */
  int32_t order;        /* dcn_cuda_order */
  int32_t pieces; /* 1; 2 for 16-bit types: each sample as two values whose sum is exact enough */
} dcn_cuda_chunk;

typedef struct {
  void *stream;
  int32_t device;
  int32_t blocks; /* the most blocks of a launch; loops over the grid do the rest. No result of
                     sample, finish, pack, keys and gather depends on it */
} dcn_cuda_launch;

/* columns, in the storage type. Reads input, offset, mask. */
DCN_CUDA_API int dcn_cuda_sample(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                                 const dcn_cuda_launch *, void *columns);

/* output of the chunk = product + bias, rounded once. `product` is in the arithmetic type,
 * [groups][O/groups][count] for an NCHW output, [groups][count][O/groups] for NHWC. */
DCN_CUDA_API int dcn_cuda_finish(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                                 const dcn_cuda_launch *, const void *product);

/* packed [O][count] = grad_output (NCHW) of the chunk. */
DCN_CUDA_API int dcn_cuda_pack(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                               const dcn_cuda_launch *, void *packed);

/* From grad_columns: grad_offset and grad_mask (where not null), the columns again (if `columns`), and
 * sums into `grad_input` (if not null; arithmetic type, in the layout of the params, zeroed by the
 * caller before the first chunk) in no particular order. Reads input, offset, mask. */
DCN_CUDA_API int dcn_cuda_backward(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                                   const dcn_cuda_launch *, const void *grad_columns, void *columns,
                                   void *grad_input);

/* One entry for each (offset group, tap, pixel of the chunk, corner), in this order: keys = (pixel of
 * the images from chunk->image on) * offset_groups + offset group, or -1 where nothing is scattered;
 * weights = mask * bilinear weight, arithmetic type. `wide` keys are int64, others int32. */
DCN_CUDA_API int dcn_cuda_keys(const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *,
                               const dcn_cuda_launch *, int wide, void *keys, void *weights);

/* grad_input += the entries' shares of grad_columns. `keys` are sorted, `entries` (int64) says where
 * each stood before: equal keys in ascending order. */
DCN_CUDA_API int dcn_cuda_gather(const dcn_params *, const dcn_cuda_chunk *,
                                 const dcn_cuda_launch *, int wide, const void *keys,
                                 const int64_t *entries, const void *weights,
                                 const void *grad_columns, void *grad_input);

/* ---- RoI pooling: for some RoIs of a call
 *
 *   forward    dcn_cuda_roi_touches, dcn_cuda_roi_pool
 *   backward   dcn_cuda_roi_touches, dcn_cuda_roi_sums, dcn_cuda_roi_spread
 *
 * A RoI whose image number is not one of the batch gives NaN, as one with NaN coordinates does. */
typedef struct {
  int64_t first, count; /* RoIs */
} dcn_cuda_rois;

/* Bytes of `touches` for each RoI. */
DCN_CUDA_API int64_t dcn_cuda_roi_bytes(const dcn_roi_params *);

/* touches (8-byte aligned): the rows and columns that each bin's samples touch. Reads rois, offset. */
DCN_CUDA_API int dcn_cuda_roi_touches(const dcn_roi_params *, const dcn_roi_tensors *,
                                      const dcn_cuda_rois *, const dcn_cuda_launch *,
                                      void *touches);

/* The output of these RoIs. Reads input, rois, mask. */
DCN_CUDA_API int dcn_cuda_roi_pool(const dcn_roi_params *, const dcn_roi_tensors *,
                                   const dcn_cuda_rois *, const dcn_cuda_launch *, void *touches);

/* grad_offset and grad_mask (where not null) of these RoIs. `sums` has room for three values of the
 * arithmetic type for each bin and class. Reads input, rois, mask, grad_output. */
DCN_CUDA_API int dcn_cuda_roi_sums(const dcn_roi_params *, const dcn_roi_tensors *,
                                   const dcn_cuda_rois *, const dcn_cuda_launch *, void *touches,
                                   void *sums);

/* grad_input (arithmetic type, in the layout of the params, zeroed by the caller) += the share of these
 * RoIs; with `ordered` one after the other, the same bits on every run. Reads rois, mask, grad_output. */
DCN_CUDA_API int dcn_cuda_roi_spread(const dcn_roi_params *, const dcn_roi_tensors *,
                                     const dcn_cuda_rois *, const dcn_cuda_launch *, void *touches,
                                     int ordered, void *grad_input);

/* ---- Resampling: one launch a direction; `ordered` and `grad_input` (may be null) as above. */
DCN_CUDA_API int dcn_cuda_resample(const dcn_resample_params *, const dcn_resample_tensors *,
                                   const dcn_cuda_launch *);
DCN_CUDA_API int dcn_cuda_resample_backward(const dcn_resample_params *,
                                            const dcn_resample_tensors *, const dcn_cuda_launch *,
                                            int ordered, void *grad_input);

/* What there is to run on. No call above needs these; they may initialise the driver. */
typedef struct {
  int32_t error;           /* 0 or a cudaError_t of counting the devices */
  int32_t driver, runtime; /* versions as 1000 * major + 10 * minor; driver 0: none is installed */
  int32_t devices;
} dcn_cuda_state;

typedef struct {
  char name[256];
  int32_t major, minor; /* compute capability */
  int32_t multiprocessors;
  int64_t memory; /* bytes */
} dcn_cuda_device;

DCN_CUDA_API void dcn_cuda_get_state(dcn_cuda_state *);
DCN_CUDA_API int dcn_cuda_get_device(int index, dcn_cuda_device *);
DCN_CUDA_API const char *dcn_cuda_error(int code);

/* The architectures of this build: "75 80 90 90+ptx", machine code but for "+ptx". */
DCN_CUDA_API const char *dcn_cuda_archs(void);

#ifdef __cplusplus
}
#endif
#endif
