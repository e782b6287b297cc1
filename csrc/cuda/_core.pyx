# The passes of dcn_cuda.h for Python: structs filled once a call, addresses in, errors raised.
#
# Addresses are integers (Tensor.data_ptr); whoever calls keeps the memory alive. Nothing here allocates
# or waits. The emulation of the tests is this module over the same sources, compiled for the CPU.
from libc.stdint cimport int64_t, uintptr_t
from libc.string cimport memset

from dcn_cuda cimport *
from dcn_params cimport (
    DCN_NCHW, DCN_NHWC, dcn_params, dcn_resample_params, dcn_resample_tensors, dcn_roi_params,
    dcn_roi_tensors, dcn_tensors, fill_params, fill_resample_params, fill_roi_params,
)


def state() -> tuple[int, int, int, int]:
    """Error of counting devices (0: none), driver version (0: no driver), runtime version, devices."""
    cdef dcn_cuda_state found
    with nogil:
        dcn_cuda_get_state(&found)
    return found.error, found.driver, found.runtime, found.devices


def device(int index) -> tuple[str, int, int, int, int]:
    """Name, compute capability (two numbers), multiprocessors and bytes of memory of a device."""
    cdef dcn_cuda_device found
    cdef int error
    with nogil:
        error = dcn_cuda_get_device(index, &found)
    if error:
        raise RuntimeError(error_text(error))
    return found.name.decode(), found.major, found.minor, found.multiprocessors, found.memory


def error_text(int code) -> str:
    """What CUDA calls an error."""
    return dcn_cuda_error(code).decode()


def archs() -> str:
    """The architectures of this build: "75 80 90 90+ptx"."""
    return dcn_cuda_archs().decode()


cdef class Call:
    """One forward or backward call on a device: what every pass of it needs to know.

    `rows` chooses DCN_ROWS instead of DCN_PLANAR, `blocks` limits the blocks of a launch. Operands
    are addresses, 0 for what is absent.
    """

    cdef dcn_params params, inner  # as the tensors are; as `input` and `grad_input` are in the kernels
    cdef dcn_tensors tensors
    cdef dcn_cuda_chunk chunk
    cdef dcn_cuda_launch where

    def __init__(
        self, problem, *, bint rows, int pieces, int device, uintptr_t stream, int blocks,
        uintptr_t offset, uintptr_t mask=0, uintptr_t bias=0, uintptr_t output=0,
        uintptr_t grad_output=0, uintptr_t grad_offset=0, uintptr_t grad_mask=0,
    ) -> None:
        fill_params(problem, &self.params)
        self.inner = self.params
        memset(&self.tensors, 0, sizeof(self.tensors))
        self.tensors.offset = <void *>offset
        self.tensors.mask = <void *>mask
        self.tensors.bias = <void *>bias
        self.tensors.output = <void *>output
        self.tensors.grad_output = <void *>grad_output
        self.tensors.grad_offset = <void *>grad_offset
        self.tensors.grad_mask = <void *>grad_mask
        self.where.stream = <void *>stream
        self.where.device = device
        self.where.blocks = blocks
        memset(&self.chunk, 0, sizeof(self.chunk))
        self.chunk.order = DCN_ROWS if rows else DCN_PLANAR
        self.chunk.pieces = pieces

    def images(self, int64_t first, uintptr_t input, bint channels_last) -> None:
        """The next passes find the images from `first` on at `input`, in that layout."""
        self.chunk.image = first
        self.tensors.input = <void *>input
        self.inner.layout = DCN_NHWC if channels_last else DCN_NCHW

    def pixels(self, int64_t first, int64_t count) -> None:
        """The next passes are about these output pixels."""
        self.chunk.first = first
        self.chunk.count = count

    def sample(self, uintptr_t columns) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_sample(
                &self.inner, &self.tensors, &self.chunk, &self.where, <void *>columns)
        check(error, "sample")

    def finish(self, uintptr_t product) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_finish(
                &self.params, &self.tensors, &self.chunk, &self.where, <void *>product)
        check(error, "finish")

    def pack(self, uintptr_t packed) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_pack(
                &self.params, &self.tensors, &self.chunk, &self.where, <void *>packed)
        check(error, "pack")

    def backward(self, uintptr_t grad_columns, uintptr_t columns, uintptr_t grad_input) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_backward(
                &self.inner, &self.tensors, &self.chunk, &self.where,
                <void *>grad_columns, <void *>columns, <void *>grad_input)
        check(error, "backward")

    def keys(self, bint wide, uintptr_t keys, uintptr_t weights) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_keys(
                &self.inner, &self.tensors, &self.chunk, &self.where,
                wide, <void *>keys, <void *>weights)
        check(error, "keys")

    def gather(
        self, bint wide, uintptr_t keys, uintptr_t entries, uintptr_t weights,
        uintptr_t grad_columns, uintptr_t grad_input,
    ) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_gather(
                &self.inner, &self.chunk, &self.where, wide, <void *>keys,
                <const int64_t *>entries, <void *>weights, <void *>grad_columns,
                <void *>grad_input)
        check(error, "gather")


cdef class RoiCall:
    """One RoI pooling or its derivative on a device; operands as for `Call`, `rois` float64."""

    cdef dcn_roi_params params
    cdef dcn_roi_tensors tensors
    cdef dcn_cuda_rois some
    cdef dcn_cuda_launch where
    cdef str op

    def __init__(
        self, problem, *, int device, uintptr_t stream, int blocks, uintptr_t input,
        uintptr_t rois, uintptr_t offset=0, uintptr_t mask=0, uintptr_t output=0,
        uintptr_t grad_output=0, uintptr_t grad_offset=0, uintptr_t grad_mask=0,
    ) -> None:
        fill_roi_params(problem, &self.params)
        memset(&self.tensors, 0, sizeof(self.tensors))
        self.tensors.input = <void *>input
        self.tensors.rois = <const double *>rois
        self.tensors.offset = <void *>offset
        self.tensors.mask = <void *>mask
        self.tensors.output = <void *>output
        self.tensors.grad_output = <void *>grad_output
        self.tensors.grad_offset = <void *>grad_offset
        self.tensors.grad_mask = <void *>grad_mask
        self.where.stream = <void *>stream
        self.where.device = device
        self.where.blocks = blocks
        self.op = "deform_psroi_pool" if self.params.position_sensitive else "deform_roi_pool"

    def bytes(self) -> int:
        """Of the touches of one RoI."""
        return dcn_cuda_roi_bytes(&self.params)

    def touches(self, int64_t first, int64_t count, uintptr_t touches) -> None:
        """The next passes are about these RoIs."""
        cdef int error
        self.some.first = first
        self.some.count = count
        with nogil:
            error = dcn_cuda_roi_touches(
                &self.params, &self.tensors, &self.some, &self.where, <void *>touches)
        check(error, "touches", self.op)

    def pool(self, uintptr_t touches) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_roi_pool(
                &self.params, &self.tensors, &self.some, &self.where, <void *>touches)
        check(error, "pool", self.op)

    def sums(self, uintptr_t touches, uintptr_t sums) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_roi_sums(
                &self.params, &self.tensors, &self.some, &self.where, <void *>touches,
                <void *>sums)
        check(error, "sums", self.op)

    def spread(self, uintptr_t touches, bint ordered, uintptr_t grad_input) -> None:
        cdef int error
        with nogil:
            error = dcn_cuda_roi_spread(
                &self.params, &self.tensors, &self.some, &self.where, <void *>touches, ordered,
                <void *>grad_input)
        check(error, "spread", self.op)


def resample(
    problem, int device, uintptr_t stream, int blocks, uintptr_t input, uintptr_t offset,
    uintptr_t output,
) -> None:
    """Fill `output`; addresses."""
    cdef dcn_resample_params params
    cdef dcn_resample_tensors tensors
    cdef dcn_cuda_launch where
    cdef int error
    fill_resample_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.input = <void *>input
    tensors.offset = <void *>offset
    tensors.output = <void *>output
    where.stream, where.device, where.blocks = <void *>stream, device, blocks
    with nogil:
        error = dcn_cuda_resample(&params, &tensors, &where)
    check(error, "resample", "deform_resample2d")


def resample_backward(
    problem, int device, uintptr_t stream, int blocks, uintptr_t grad_output, uintptr_t input,
    uintptr_t offset, uintptr_t grad_offset, bint ordered, uintptr_t grad_input,
) -> None:
    """Fill `grad_offset`, add to `grad_input`, each if it is not 0."""
    cdef dcn_resample_params params
    cdef dcn_resample_tensors tensors
    cdef dcn_cuda_launch where
    cdef int error
    fill_resample_params(problem, &params)
    memset(&tensors, 0, sizeof(tensors))
    tensors.grad_output = <void *>grad_output
    tensors.input = <void *>input
    tensors.offset = <void *>offset
    tensors.grad_offset = <void *>grad_offset
    where.stream, where.device, where.blocks = <void *>stream, device, blocks
    with nogil:
        error = dcn_cuda_resample_backward(
            &params, &tensors, &where, ordered, <void *>grad_input)
    check(error, "resample_backward", "deform_resample2d")


cdef int check(int error, name, op="deform_conv2d") except -1:
    if error:
        raise RuntimeError(
            f"{op}: backend: the CUDA pass {name!r} failed; expected no error, got "
            f"{error_text(error)!r} (error {error}); CUDA_LAUNCH_BLOCKING=1 finds out which launch "
            "it was"
        )
    return 0
