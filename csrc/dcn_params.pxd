# Cython's view of dcn_params.h, and how problems become params.
from libc.stdint cimport int32_t, int64_t


cdef extern from "dcn_params.h" nogil:
    enum:
        DCN_FLOAT32, DCN_FLOAT64, DCN_FLOAT16, DCN_BFLOAT16
        DCN_NCHW, DCN_NHWC

    ctypedef struct dcn_params:
        int64_t batch, in_channels, in_h, in_w
        int64_t out_channels, kernel_h, kernel_w, out_h, out_w
        int64_t stride_h, stride_w
        int64_t pad_top, pad_left
        int64_t dilation_h, dilation_w
        int64_t groups, offset_groups
        int32_t dtype, layout

    ctypedef struct dcn_tensors:
        const void *input
        const void *offset
        const void *weight
        const void *bias
        const void *mask
        void *output
        const void *grad_output
        void *grad_input
        void *grad_offset
        void *grad_weight
        void *grad_bias
        void *grad_mask

    ctypedef struct dcn_roi_params:
        int64_t batch, in_channels, in_h, in_w
        int64_t rois, out_channels, out_h, out_w
        int64_t classes, part_h, part_w
        int64_t group_h, group_w
        int64_t samples
        double spatial_scale, offset_scale
        int32_t position_sensitive
        int32_t dtype, layout

    ctypedef struct dcn_roi_tensors:
        const void *input
        const double *rois
        const void *offset
        const void *mask
        void *output
        const void *grad_output
        void *grad_input
        void *grad_offset
        void *grad_mask

    ctypedef struct dcn_resample_params:
        int64_t batch, channels, in_h, in_w
        int32_t border
        int32_t dtype

    ctypedef struct dcn_resample_tensors:
        const void *input
        const void *offset
        void *output
        const void *grad_output
        void *grad_input
        void *grad_offset


cdef inline int fill_params(problem, dcn_params *params) except -1:
    (
        params.batch, params.in_channels, params.in_h, params.in_w,
        params.out_channels, params.kernel_h, params.kernel_w, params.out_h, params.out_w,
        params.stride_h, params.stride_w, params.pad_top, params.pad_left,
        params.dilation_h, params.dilation_w, params.groups, params.offset_groups,
        dtype, _, _, _, channels_last,
    ) = problem
    if params.batch == 0:  # no image has that size: it shall not ask for memory or work, nor overflow
        params.in_h = params.in_w = params.out_h = params.out_w = 1
    params.dtype = dtype_of(dtype)
    params.layout = DCN_NHWC if channels_last else DCN_NCHW
    return 0


cdef inline int fill_roi_params(problem, dcn_roi_params *params) except -1:
    (
        params.batch, params.in_channels, params.in_h, params.in_w,
        params.rois, params.out_channels, params.out_h, params.out_w,
        params.classes, params.part_h, params.part_w, params.group_h, params.group_w,
        params.samples, params.spatial_scale, params.offset_scale, params.position_sensitive,
        dtype, _, _, channels_last,
    ) = problem
    if params.batch == 0:  # as above
        params.in_h = params.in_w = 1
    params.dtype = dtype_of(dtype)
    params.layout = DCN_NHWC if channels_last else DCN_NCHW
    return 0


cdef inline int fill_resample_params(problem, dcn_resample_params *params) except -1:
    params.batch, params.channels, params.in_h, params.in_w, boundary, dtype, _ = problem
    params.border = boundary == "border"
    params.dtype = dtype_of(dtype)
    return 0


cdef inline int dtype_of(name) except -1:
    if name == "float32":
        return DCN_FLOAT32
    if name == "float64":
        return DCN_FLOAT64
    return DCN_FLOAT16 if name == "float16" else DCN_BFLOAT16
