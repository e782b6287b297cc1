# The CPU orchestrator: fills the C structs, allocates, and has the kernels' tasks run by a team.
#
# All calls go through `execute`; the kernels see one task at a time. Operands are integer addresses
# (torch) or objects with a contiguous buffer (NumPy), checked by the callers.
#
# cython: cdivision=True
import warnings

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free
from libc.string cimport memset

from dcn_cpu cimport *
from dcn_params cimport (
    dcn_params, dcn_resample_params, dcn_resample_tensors, dcn_roi_params, dcn_roi_tensors,
    dcn_tensors, fill_params, fill_resample_params, fill_roi_params,
)

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **memory, size_t alignment, size_t bytes)

cdef enum:
    # Multiply-adds that are worth another thread: some 20 microseconds of one core. Waking a team
    # of two costs 5 to 15.
    WORK_OF_A_THREAD = 1 << 20

cdef const dcn_cpu_kernels *kernels = dcn_cpu_usable()[0]

dcn_threads_init()


def openmp() -> bool:
    """Whether OpenMP was compiled in."""
    return dcn_threads_openmp() != 0


def cores() -> int:
    """Those that OpenMP sees; 1 without it."""
    return dcn_threads_cores()


def allowed(num_threads: int) -> int:
    """How many of so many threads a team may have here and now."""
    return dcn_threads_allowed(num_threads)


def stay_alone() -> None:
    """One thread from now on, as in a forked child."""
    dcn_threads_alone()


def forked() -> bool:
    """Whether this process is a forked child, and has one thread."""
    return dcn_threads_forked() != 0


def built() -> list[str]:
    """The instruction sets in this build, best first."""
    return names(dcn_cpu_built())


def usable() -> list[str]:
    """Those that this processor can run, best first."""
    return names(dcn_cpu_usable())


def isa() -> str:
    """The one in use."""
    return kernels.isa.decode()


def keep_workspace(bytes: int) -> None:
    """Keep at most so many bytes of memory between calls; 0: none."""
    dcn_workspace_keep(bytes)


def use(name: str) -> None:
    """Take a usable instruction set for all later calls."""
    global kernels
    kernels = dcn_cpu_usable()[usable().index(name)]


cdef class PackedWeight:
    """A weight as the instruction set in use reads it, for calls with one `packing_key` and form.

    A call that it does not fit takes `source`, the weight itself.
    """
    cdef readonly object source
    cdef object key
    cdef int64_t form
    cdef void *memory
    cdef const dcn_cpu_operator *kernel

    def __cinit__(self, problem, weight):
        cdef dcn_params params
        cdef dcn_tensors tensors
        cdef dcn_cpu_plan plan
        cdef dcn_cpu_call call
        cdef int64_t task
        self.source, self.key = weight, packing_key(problem)
        self.kernel = &kernels.deform_conv2d
        fill_params(problem, &params)
        memset(&tensors, 0, sizeof(tensors))
        tensors.weight = address(weight, False)
        self.kernel.plan(&params, DCN_FORWARD, 0, 1, &plan)
        self.form = plan.weight_form
        if posix_memalign(&self.memory, DCN_LINE, plan.weight_bytes + DCN_LINE) != 0:
            self.memory = NULL
            raise MemoryError(
                "dcnlib: packed weight: does not fit into memory; "
                f"expected room for {plan.weight_bytes} bytes"
            )
        call.params, call.tensors, call.plan = &params, &tensors, &plan
        call.direction, call.shared, call.packed = DCN_FORWARD, self.memory, NULL
        with nogil:
            memset(self.memory, 0, plan.weight_bytes + DCN_LINE)
            for task in range(plan.weight_tasks):
                self.kernel.run(&call, 0, 0, task, NULL)

    def __dealloc__(self):
        free(self.memory)


cdef packing_key(problem):
    """All of a problem that the packed form depends on."""
    return (
        problem.in_channels, problem.out_channels, problem.kernel_h, problem.kernel_w,
        problem.groups, problem.offset_groups, problem.dtype,
    )


def forward(problem, num_threads, input, offset, weight, bias, mask, output, /) -> None:
    """Fill `output`; `weight` may be a `PackedWeight`, and `offset` None."""
    cdef dcn_params params
    cdef dcn_tensors tensors
    cdef PackedWeight packed = None
    if isinstance(weight, PackedWeight):
        packed = weight
        weight = packed.source
        if packed.kernel != &kernels.deform_conv2d or packed.key != packing_key(problem):
            packed = None
    fill_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.input = address(input, False)
    tensors.offset = address(offset, False)
    tensors.weight = address(weight, False)
    tensors.bias = address(bias, False)
    tensors.mask = address(mask, False)
    tensors.output = address(output, True)
    execute(
        &kernels.deform_conv2d, &params, &tensors, DCN_FORWARD, 0, num_threads,
        NULL if packed is None else packed.memory, 0 if packed is None else packed.form,
    )


def backward(
    problem, num_threads, grad_output, input, offset, weight, mask,
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask, /,
) -> None:
    """Fill the gradients that are not None."""
    cdef dcn_params params
    cdef dcn_tensors tensors
    cdef int wanted = 0
    fill_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.grad_output = address(grad_output, False)
    tensors.input = address(input, False)
    tensors.offset = address(offset, False)
    tensors.weight = address(weight, False)
    tensors.mask = address(mask, False)
    tensors.grad_input = address(grad_input, True)
    tensors.grad_offset = address(grad_offset, True)
    tensors.grad_weight = address(grad_weight, True)
    tensors.grad_bias = address(grad_bias, True)
    tensors.grad_mask = address(grad_mask, True)
    wanted |= DCN_GRAD_INPUT if grad_input is not None else 0
    wanted |= DCN_GRAD_OFFSET if grad_offset is not None else 0
    wanted |= DCN_GRAD_WEIGHT if grad_weight is not None else 0
    wanted |= DCN_GRAD_BIAS if grad_bias is not None else 0
    wanted |= DCN_GRAD_MASK if grad_mask is not None else 0
    if not wanted:
        return
    execute(&kernels.deform_conv2d, &params, &tensors, DCN_BACKWARD, wanted, num_threads)


def roi_pool_forward(problem, num_threads, input, rois, offset, mask, output, /) -> None:
    """Fill `output`."""
    cdef dcn_roi_params params
    cdef dcn_roi_tensors tensors
    fill_roi_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.input = address(input, False)
    tensors.rois = <const double *>address(rois, False)
    tensors.offset = address(offset, False)
    tensors.mask = address(mask, False)
    tensors.output = address(output, True)
    execute(
        &kernels.deform_roi_pool, <dcn_params *>&params, <dcn_tensors *>&tensors, DCN_FORWARD, 0,
        num_threads,
    )


def roi_pool_backward(
    problem, num_threads, grad_output, input, rois, offset, mask,
    grad_input, grad_offset, grad_mask, /,
) -> None:
    """Fill the gradients that are not None."""
    cdef dcn_roi_params params
    cdef dcn_roi_tensors tensors
    cdef int wanted = 0
    fill_roi_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.grad_output = address(grad_output, False)
    tensors.input = address(input, False)
    tensors.rois = <const double *>address(rois, False)
    tensors.offset = address(offset, False)
    tensors.mask = address(mask, False)
    tensors.grad_input = address(grad_input, True)
    tensors.grad_offset = address(grad_offset, True)
    tensors.grad_mask = address(grad_mask, True)
    wanted |= DCN_GRAD_INPUT if grad_input is not None else 0
    wanted |= DCN_GRAD_OFFSET if grad_offset is not None else 0
    wanted |= DCN_GRAD_MASK if grad_mask is not None else 0
    execute(
        &kernels.deform_roi_pool, <dcn_params *>&params, <dcn_tensors *>&tensors, DCN_BACKWARD,
        wanted, num_threads,
    )


def resample_forward(problem, num_threads, input, offset, output, /) -> None:
    """Fill `output`."""
    cdef dcn_resample_params params
    cdef dcn_resample_tensors tensors
    fill_resample_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.input = address(input, False)
    tensors.offset = address(offset, False)
    tensors.output = address(output, True)
    execute(
        &kernels.deform_resample2d, <dcn_params *>&params, <dcn_tensors *>&tensors, DCN_FORWARD, 0,
        num_threads,
    )


def resample_backward(
    problem, num_threads, grad_output, input, offset, grad_input, grad_offset, /
) -> None:
    """Fill the gradients that are not None."""
    cdef dcn_resample_params params
    cdef dcn_resample_tensors tensors
    fill_resample_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.grad_output = address(grad_output, False)
    tensors.input = address(input, False)
    tensors.offset = address(offset, False)
    tensors.grad_input = address(grad_input, True)
    tensors.grad_offset = address(grad_offset, True)
    execute(
        &kernels.deform_resample2d, <dcn_params *>&params, <dcn_tensors *>&tensors, DCN_BACKWARD, 0,
        num_threads,
    )


cdef list names(const dcn_cpu_kernels *const *tables):
    cdef int i = 0
    found = []
    while tables[i] != NULL:
        found.append(tables[i].isa.decode())
        i += 1
    return found


cdef void *address(operand, bint write) except? NULL:
    cdef Py_buffer view
    cdef void *memory
    if operand is None:
        return NULL
    if isinstance(operand, int):
        return <void *><uintptr_t>operand
    PyObject_GetBuffer(operand, &view, PyBUF_WRITABLE if write else PyBUF_SIMPLE)
    memory = view.buf
    PyBuffer_Release(&view)  # the caller holds the array until the call ends
    return memory


cdef int execute(
    const dcn_cpu_operator *kernel, dcn_params *params, dcn_tensors *tensors, int direction,
    int wanted, int64_t num_threads, const void *packed=NULL, int64_t form=0,
) except -1:
    cdef dcn_cpu_plan plan
    cdef dcn_cpu_call call
    cdef int allowed, workers, team = 1
    cdef size_t bytes = 0
    cdef void *memory

    with nogil:
        kernel.plan(params, direction, wanted, 1, &plan)
        allowed = dcn_threads_allowed(<int>min(num_threads, INT_MAX))
        workers = <int>max(1, min(allowed, plan.work // WORK_OF_A_THREAD))
        if workers > 1:
            kernel.plan(params, direction, wanted, workers, &plan)
        memory = workspace(&plan, workers, &bytes)
        if memory == NULL and workers > 1:  # there may be room for one
            workers = 1
            kernel.plan(params, direction, wanted, 1, &plan)
            memory = workspace(&plan, 1, &bytes)
        if memory != NULL:
            call.params, call.tensors, call.plan, call.direction = params, tensors, &plan, direction
            call.shared, call.packed = memory, packed if plan.weight_form == form else NULL
            if workers > 1:
                team = dcn_threads_team(workers, allowed)
            dcn_threads_run(
                kernel, &call, <char *>memory + scratch_at(&plan, 0), min(workers, team), team
            )
            dcn_workspace_give(memory)
    if memory == NULL:
        op = kernel.name.decode()
        if kernel == &kernels.deform_conv2d and tensors.offset == NULL:
            op = "conv2d"
        raise MemoryError(
            f"{op}: workspace: does not fit into memory; expected room for "
            f"{bytes} bytes; use a smaller batch or image"
        )
    if team < workers:
        warnings.warn(
            f"dcnlib: {workers} threads cannot be created, {team} are used; "
            "raise the limit or call dcnlib.set_num_threads",
            RuntimeWarning,
            stacklevel=2,
        )
    return 0


cdef void *workspace(const dcn_cpu_plan *plan, int threads, size_t *bytes) noexcept nogil:
    # What the call shares, then the scratch of each thread; NULL if there is no memory.
    bytes[0] = scratch_at(plan, threads) + DCN_LINE
    return dcn_workspace_take(bytes[0])


cdef inline size_t scratch_at(const dcn_cpu_plan *plan, int thread) noexcept nogil:
    return (plan.shared_bytes + DCN_LINE - 1) // DCN_LINE * DCN_LINE + thread * plan.scratch_bytes
