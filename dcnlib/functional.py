"""The public functions: one docstring, one set of checks, two doors.

NumPy arrays are checked here, made contiguous and handed to a backend; torch tensors go to
`dcnlib.torch_ops`, which adds autograd, by torch's dispatcher or, in the plain case, past it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import _dispatch
from ._arrays import is_torch, memory, plain, spec, torch_ops
from ._problem import (
    DeformConv2dProblem,
    cached_problem,
    four_sides,
    optional_integer,
    pair,
    type_error,
)

Array = TypeVar("Array")


class DeformConv2dGradients(NamedTuple):
    """Gradients of `deform_conv2d`; None where that argument was None."""

    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any


def deform_conv2d(
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Array | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    backend: str | None = None,
) -> Array:
    r"""Convolve with taps that sample the input at learned, fractional positions.

    Deformable convolution v1 when `mask` is None, v2 (modulated) otherwise:

    .. math::

        y[n,o,p_0] = b[o] + \sum_{c,k} w[o,c,k] \; m[n,k,p_0] \;
                     x\big[n, c, \; p_0 s - p + p_k d + \Delta p[n,k,p_0]\big]

    where :math:`x[\cdot]` at a fractional position is the bilinear interpolation of the four
    pixels around it.

    Parameters
    ----------
    input : array or tensor of shape (N, C, H, W), or (C, H, W) without a batch
        float32, float64, float16 or bfloat16 (in NumPy: ``ml_dtypes.bfloat16``). All arguments
        share one dtype and one kind: NumPy arrays or torch tensors on one device.
    offset : shape (N, 2*offset_groups*KH*KW, OH, OW)
        Displacement of each tap in input pixels, not scaled by stride or dilation. Channels
        run over (offset group, kernel row, kernel column, {y, x}): channel 0 moves the first
        tap down, channel 1 moves it right.
    weight : shape (O, C/groups, KH, KW)
    bias : shape (O,), optional
    stride, dilation : int or (h, w)
    padding : int, (h, w), (top, bottom, left, right), "same" or "valid"
        Zeros around the input. "same" needs stride 1.
    mask : shape (N, offset_groups*KH*KW, OH, OW), optional
        Factor on each sample; no activation is applied.
    groups, offset_groups : int, optional
        Taken from the shapes when None (``C / weight.shape[1]`` and
        ``offset.shape[1] / (2*KH*KW)``), checked when given.
    backend : {"cpu", "cuda", "reference"}, optional
        None takes the one of the tensors' device. A named backend that cannot run is an error.

    Returns
    -------
    array or tensor of shape (N, O, OH, OW), or (O, OH, OW) for an unbatched input
        In the dtype of `input`; torch tensors carry gradients of any order.
        ``OH = (H + top + bottom - dilation_h*(KH - 1) - 1) // stride_h + 1``.

    Raises
    ------
    TypeError
        For arguments of the wrong kind, mixed NumPy and torch, mixed or unsupported dtypes.
    ValueError
        For shapes and values that do not fit; the text names argument, expectation and value.
    RuntimeError
        If a named backend cannot run, with its reason.
    MemoryError
        If there is no memory for the result or the workspace.

    Notes
    -----
    Border: samples at (-1, H) x (-1, W) are bilinear against zeros outside, samples further out
    are exactly 0. The derivative with respect to an offset at an integer position is the
    right-hand one. A NaN offset gives NaN, an infinite one samples 0 with gradient 0.

    16-bit types are storage only: positions, interpolation and sums are float32.

    Memory: on the CPU at most one channels-last copy of an image and about a megabyte a thread;
    there is no column buffer. Determinism: on the CPU the same bits for any number of threads,
    any batch around an image and any memory layout of the arguments.

    References
    ----------
    Dai et al., Deformable Convolutional Networks, 2017, https://arxiv.org/abs/1703.06211,
    equations 2 to 4. Zhu et al., Deformable ConvNets v2, 2019,
    https://arxiv.org/abs/1811.11168, equation 1.

    Examples
    --------
    Zero offsets give a plain convolution; a constant offset of one pixel to the right shifts
    what the taps see:

    >>> import numpy as np, dcnlib
    >>> x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> weight = np.ones((1, 1, 1, 1), np.float32)
    >>> offset = np.zeros((1, 2, 4, 4), np.float32)
    >>> offset[:, 1] = 0.5
    >>> dcnlib.deform_conv2d(x, offset, weight)[0, 0, 0]
    array([0.5, 1.5, 2.5, 1.5], dtype=float32)
    """
    op = "deform_conv2d"
    arrays = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if is_torch(op, arrays, ("bias", "mask")):
        _dispatch.check_name(op, backend)
        arguments = _arguments(op, weight, stride, padding, dilation, groups, offset_groups)
        stride, padding, dilation, groups, offset_groups = arguments
        return torch_ops().deform_conv2d(
            input, offset, weight, bias, stride, padding, dilation, mask,
            groups, offset_groups, backend,
        )  # fmt: skip
    input, offset, weight, bias, mask = map(memory, arrays.values())
    arguments = _arguments(op, weight, stride, padding, dilation, groups, offset_groups)
    problem = cached_problem(
        op, spec(input), spec(offset), spec(weight), spec(bias), spec(mask), None, *arguments
    )
    return _run(op, problem, input, offset, plain(weight), bias, mask, backend)


def conv2d(
    input: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int | None = None,
) -> np.ndarray:
    r"""Convolve NumPy arrays: `deform_conv2d` with taps that stay on the lattice.

    .. math::

        y[n,o,p_0] = b[o] + \sum_{c,k} w[o,c,k] \; x\big[n, c, \; p_0 s - p + p_k d\big]

    Parameters
    ----------
    input : array of shape (N, C, H, W), or (C, H, W) without a batch
        float32, float64, float16 or ``ml_dtypes.bfloat16``; all arguments share one dtype.
    weight : shape (O, C/groups, KH, KW)
    bias : shape (O,), optional
    stride, dilation : int or (h, w)
    padding : int, (h, w), (top, bottom, left, right), "same" or "valid"
        Zeros around the input. "same" needs stride 1.
    groups : int, optional
        ``C / weight.shape[1]`` when None, checked when given.

    Returns
    -------
    array of shape (N, O, OH, OW), or (O, OH, OW) for an unbatched input

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `deform_conv2d`. A torch tensor is a TypeError: torch has ``conv2d`` of its own.

    Notes
    -----
    It is there so that a network with deformable layers runs where torch is not installed
    (`dcnlib.edge`). CPU only, same kernels, dtypes, threads and reproducibility as `deform_conv2d`,
    and the same bits as that function on finite inputs and offsets of zero. Forward only.

    References
    ----------
    Dai et al., Deformable Convolutional Networks, 2017, https://arxiv.org/abs/1703.06211,
    equation 1.

    Examples
    --------
    >>> import numpy as np, dcnlib
    >>> x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> dcnlib.conv2d(x, np.ones((1, 1, 1, 2), np.float32))[0, 0, 0]
    array([1., 3., 5.], dtype=float32)
    """
    op = "conv2d"
    arrays = {"input": input, "weight": weight, "bias": bias}
    if is_torch(op, arrays, ("bias",)):
        raise type_error(
            op, "input", "computes with NumPy arrays", "numpy.ndarray", "torch.Tensor",
            "use torch.nn.functional.conv2d, or call .numpy() on the tensors",
        )  # fmt: skip
    input, weight, bias = map(memory, arrays.values())
    arguments = _arguments(op, weight, stride, padding, dilation, groups, None)
    problem = cached_problem(
        op, spec(input), None, spec(weight), spec(bias), None, None, *arguments
    )
    return _run(op, problem, input, None, plain(weight), bias, None)


def deform_conv2d_backward(
    grad_output: Array,
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Array | None = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    backend: str | None = None,
) -> DeformConv2dGradients:
    r"""Differentiate `deform_conv2d`: the gradients of ``(grad_output * output).sum()``.

    With :math:`g = \partial L/\partial y` and :math:`s = x[\cdot]` the sampled values,

    .. math::

        \partial L/\partial w = \sum_{n,p_0} g \, m \, s, \quad
        \partial L/\partial m = \sum_{o,c} g \, w \, s, \quad
        \partial L/\partial \Delta p = \sum_{o,c} g \, w \, m \; \partial s/\partial p, \quad
        \partial L/\partial b = \sum_{n,p_0} g,

    and :math:`\partial L/\partial x` spreads :math:`g \, w \, m` over the four pixels around
    each sample with their bilinear weights.

    Parameters
    ----------
    grad_output : array or tensor in the shape and dtype of the output
    input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, backend
        As for `deform_conv2d`.

    Returns
    -------
    DeformConv2dGradients
        Named tuple ``(input, offset, weight, bias, mask)``, each in the shape and dtype of its
        argument; None for a bias or mask that is None.

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `deform_conv2d`.

    Notes
    -----
    Border, dtypes, determinism: as `deform_conv2d`; the samples are computed again, nothing is
    kept from the forward call. With an empty batch the gradients of weight and bias are 0.

    References
    ----------
    Dai et al., 2017, equations 2 to 4 and appendix A; Zhu et al., 2019, equation 1.

    Examples
    --------
    >>> import numpy as np, dcnlib
    >>> x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> weight = np.ones((1, 1, 1, 1), np.float32)
    >>> offset = np.zeros((1, 2, 4, 4), np.float32)
    >>> y = dcnlib.deform_conv2d(x, offset, weight)
    >>> grads = dcnlib.deform_conv2d_backward(np.ones_like(y), x, offset, weight)
    >>> grads.offset[0, :, 0, 0]  # the image rises by 4 a row and 1 a column
    array([4., 1.], dtype=float32)
    """
    op = "deform_conv2d_backward"
    arrays = {
        "grad_output": grad_output,
        "input": input,
        "offset": offset,
        "weight": weight,
        "bias": bias,
        "mask": mask,
    }
    if is_torch(op, arrays, ("bias", "mask")):
        _dispatch.check_name(op, backend)
        arguments = _arguments(op, weight, stride, padding, dilation, groups, offset_groups)
        stride, padding, dilation, groups, offset_groups = arguments
        grads = torch_ops().deform_conv2d_backward(
            grad_output, input, offset, weight, bias, stride, padding, dilation, mask,
            groups, offset_groups, backend, [True, True, True, bias is not None, mask is not None],
        )  # fmt: skip
        return DeformConv2dGradients(
            *grads[:3],
            None if bias is None else grads[3],
            None if mask is None else grads[4],
        )
    grad_output, input, offset, weight, bias, mask = map(memory, arrays.values())
    arguments = _arguments(op, weight, stride, padding, dilation, groups, offset_groups)
    problem = cached_problem(
        op, spec(input), spec(offset), spec(weight), spec(bias), spec(mask),
        spec(grad_output), *arguments,
    )  # fmt: skip
    chosen = _dispatch.choose(op, backend, "cpu")
    dtype = plain(input).dtype
    grads = DeformConv2dGradients(
        np.empty(problem.input_shape, dtype),
        np.empty(problem.offset_shape, dtype),
        np.empty(problem.weight_shape, dtype),
        None if bias is None else np.empty(problem.bias_shape, dtype),
        None if mask is None else np.empty(problem.mask_shape, dtype),
    )
    chosen.backward(
        problem,
        plain(grad_output).reshape(problem.output_shape),
        plain(input).reshape(problem.input_shape),
        plain(offset).reshape(problem.offset_shape),
        plain(weight),
        None if mask is None else plain(mask).reshape(problem.mask_shape),
        grads,
    )
    if problem.batched:
        return grads
    return grads._replace(
        input=grads.input[0],
        offset=grads.offset[0],
        mask=None if mask is None else grads.mask[0],
    )


def _run(
    op: str,
    problem: DeformConv2dProblem,
    input: np.ndarray,
    offset: np.ndarray | None,
    weight: Any,
    bias: np.ndarray | None,
    mask: np.ndarray | None,
    backend: str | None = None,
) -> Any:
    """A checked forward call of NumPy arrays; `weight` is plain, or packed by the CPU backend."""
    chosen = _dispatch.choose(op, backend, "cpu")
    input = plain(input)
    offset = None if offset is None else plain(offset)
    mask = None if mask is None else plain(mask)
    if not problem.batched:
        input = input[None]
        offset = None if offset is None else offset[None]
        mask = None if mask is None else mask[None]
    output = np.empty(problem.output_shape, input.dtype)
    chosen.forward(
        problem, input, offset, weight, None if bias is None else plain(bias), mask, output
    )
    return output if problem.batched else output[0]


def _arguments(
    op: str,
    weight: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    offset_groups: Any,
) -> tuple:
    """stride, padding (four sides), dilation, groups, offset_groups as plain ints."""
    stride = pair(op, "stride", stride)
    dilation = pair(op, "dilation", dilation)
    if isinstance(padding, str) and padding == "same" and len(weight.shape) != 4:
        padding = 0  # the weight's rank is what is wrong, and is what the check will name
    return (
        stride,
        four_sides(op, padding, weight.shape[-2:], stride, dilation),
        dilation,
        optional_integer(op, "groups", groups),
        optional_integer(op, "offset_groups", offset_groups),
    )
