# Cython's view of dcn_cpu.h, threads.h and workspace.h.
from libc.stdint cimport int64_t

from dcn_params cimport dcn_params, dcn_tensors


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
        int64_t weight_form
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
    int dcn_threads_team(int workers, int allowed)
    int dcn_threads_forked()
    void dcn_threads_run(
        const dcn_cpu_operator *, const dcn_cpu_call *, void *scratch, int workers, int team)
    int dcn_threads_openmp()
    int dcn_threads_cores()

cdef extern from "workspace.h" nogil:
    enum:
        DCN_LINE
    void *dcn_workspace_take(size_t bytes)
    void dcn_workspace_give(void *memory)
    void dcn_workspace_keep(size_t bytes)
