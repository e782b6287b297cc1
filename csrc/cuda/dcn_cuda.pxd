# Cython's view of dcn_cuda.h.
from libc.stdint cimport int32_t, int64_t

from dcn_params cimport (
    dcn_params, dcn_resample_params, dcn_resample_tensors, dcn_roi_params, dcn_roi_tensors,
    dcn_tensors,
)


cdef extern from "dcn_cuda.h" nogil:
    enum:
        DCN_PLANAR, DCN_ROWS

    ctypedef struct dcn_cuda_chunk:
        int64_t first, count, image
        int32_t order, pieces

    ctypedef struct dcn_cuda_launch:
        void *stream
        int32_t device, blocks

    int dcn_cuda_sample(
        const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *, const dcn_cuda_launch *,
        void *columns)
    int dcn_cuda_finish(
        const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *, const dcn_cuda_launch *,
        const void *product)
    int dcn_cuda_pack(
        const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *, const dcn_cuda_launch *,
        void *packed)
    int dcn_cuda_backward(
        const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *, const dcn_cuda_launch *,
        const void *grad_columns, void *columns, void *grad_input)
    int dcn_cuda_keys(
        const dcn_params *, const dcn_tensors *, const dcn_cuda_chunk *, const dcn_cuda_launch *,
        int wide, void *keys, void *weights)
    int dcn_cuda_gather(
        const dcn_params *, const dcn_cuda_chunk *, const dcn_cuda_launch *, int wide,
        const void *keys, const int64_t *entries, const void *weights, const void *grad_columns,
        void *grad_input)

    ctypedef struct dcn_cuda_rois:
        int64_t first, count

    int64_t dcn_cuda_roi_bytes(const dcn_roi_params *)
    int dcn_cuda_roi_touches(
        const dcn_roi_params *, const dcn_roi_tensors *, const dcn_cuda_rois *,
        const dcn_cuda_launch *, void *touches)
    int dcn_cuda_roi_pool(
        const dcn_roi_params *, const dcn_roi_tensors *, const dcn_cuda_rois *,
        const dcn_cuda_launch *, void *touches)
    int dcn_cuda_roi_sums(
        const dcn_roi_params *, const dcn_roi_tensors *, const dcn_cuda_rois *,
        const dcn_cuda_launch *, void *touches, void *sums)
    int dcn_cuda_roi_spread(
        const dcn_roi_params *, const dcn_roi_tensors *, const dcn_cuda_rois *,
        const dcn_cuda_launch *, void *touches, int ordered, void *grad_input)
    int dcn_cuda_resample(
        const dcn_resample_params *, const dcn_resample_tensors *, const dcn_cuda_launch *)
    int dcn_cuda_resample_backward(
        const dcn_resample_params *, const dcn_resample_tensors *, const dcn_cuda_launch *,
        int ordered, void *grad_input)

    ctypedef struct dcn_cuda_state:
        int32_t error, driver, runtime, devices

    ctypedef struct dcn_cuda_device:
        char name[256]
        int32_t major, minor, multiprocessors
        int64_t memory

    void dcn_cuda_get_state(dcn_cuda_state *)
    int dcn_cuda_get_device(int index, dcn_cuda_device *)
    const char *dcn_cuda_error(int code)
    const char *dcn_cuda_archs()
