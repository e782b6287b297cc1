# Cython's view of dcn_params.h, dcn_cpu.h and threads.h.
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


cdef extern from "dcn_cpu.h" nogil:
    enum:
        DCN_FORWARD, DCN_BACKWARD
        DCN_GRAD_INPUT, DCN_GRAD_OFFSET, DCN_GRAD_WEIGHT, DCN_GRAD_BIAS, DCN_GRAD_MASK

    ctypedef struct dcn_cpu_plan:
        int64_t waves, phases
        int64_t tasks[4]
        size_t shared_bytes, scratch_bytes
        int64_t weight_tasks
        size_t weight_bytes
        int64_t work

    ctypedef struct dcn_cpu_call:
        const dcn_params *params
        const dcn_tensors *tensors
        const dcn_cpu_plan *plan
        int direction
        void *shared
        const void *packed

    ctypedef void (*dcn_cpu_plan_function)(
        const dcn_params *, int direction, int wanted, int num_threads, dcn_cpu_plan *) noexcept
    ctypedef void (*dcn_cpu_run_function)(
        const dcn_cpu_call *, int64_t wave, int64_t phase, int64_t task, void *scratch) noexcept

    ctypedef struct dcn_cpu_operator:
        const char *name
        dcn_cpu_plan_function plan
        dcn_cpu_run_function run

    ctypedef struct dcn_cpu_kernels:
        const char *isa
        dcn_cpu_operator deform_conv2d, deform_roi_pool, deform_resample2d

    const dcn_cpu_kernels *const *dcn_cpu_built()
    const dcn_cpu_kernels *const *dcn_cpu_usable()


cdef extern from "threads.h" nogil:
    void dcn_threads_init()
    void dcn_threads_alone()
    int dcn_threads_allowed(int wanted)
    int dcn_threads_possible(int wanted)
    int dcn_threads_openmp()
