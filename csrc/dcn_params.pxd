# Cython's view of dcn_params.h, and how a DeformConv2dProblem becomes one.
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


cdef inline int fill_params(problem, dcn_params *params) except -1:
    (
        params.batch, params.in_channels, params.in_h, params.in_w,
        params.out_channels, params.kernel_h, params.kernel_w, params.out_h, params.out_w,
        params.stride_h, params.stride_w, params.pad_top, params.pad_left,
        params.dilation_h, params.dilation_w, params.groups, params.offset_groups,
        dtype, _, _, _, channels_last,
    ) = problem
    if dtype == "float32":
        params.dtype = DCN_FLOAT32
    elif dtype == "float64":
        params.dtype = DCN_FLOAT64
    elif dtype == "float16":
        params.dtype = DCN_FLOAT16
    else:
        params.dtype = DCN_BFLOAT16
    params.layout = DCN_NHWC if channels_last else DCN_NCHW
    return 0
