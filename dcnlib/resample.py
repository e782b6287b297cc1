"""Deformable resampling: the public functions.

As `functional.py` is for the convolution: NumPy arrays are checked here and handed to a backend,
torch tensors go to ``torch.ops.dcnlib``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import _dispatch
from ._arrays import is_torch, memory, plain, spec, torch_ops
from ._problem_resample import boundary_name, cached_resample_problem

Array = TypeVar("Array")


class DeformResample2dGradients(NamedTuple):
    """Gradients of `deform_resample2d`."""

    input: Any
    offset: Any


def deform_resample2d(
    input: Array, offset: Array, *, boundary: str = "border", backend: str | None = None
) -> Array:
    r"""Sample every channel of an image at positions of its own: one offset a channel and pixel.

    .. math::

        y[n, c, i, j] = x\big[n, c;\; i + \mathrm{offset}[n, 2c, i, j],\;
                                      j + \mathrm{offset}[n, 2c+1, i, j]\big]

    bilinear between floor and floor + 1. An ordinary convolution of the result is the resampling
    form of deformable convolution (`dcnlib.nn.ConvOffset2D`). It is not the operator of the papers:
    all taps of the convolution move together, and every channel on its own.

    Parameters
    ----------
    input : array or tensor of shape (N, C, H, W), or (C, H, W) without a batch
        float32, float64, float16 or bfloat16 (in NumPy: ``ml_dtypes.bfloat16``).
    offset : shape (N, 2*C, H, W)
        In pixels, for each channel y, then x: channels 0 and 1 move channel 0.
    boundary : {"border", "zeros"}
        What a position outside the image means. "border" limits it to the image: the nearest edge
        pixel is repeated. "zeros" is the convolution's rule: bilinear against zeros up to one pixel
        outside, exactly 0 further out.
    backend : {"cpu", "cuda", "reference"}, optional
        None takes the one of the tensors' device. A named backend that cannot run is an error.

    Returns
    -------
    array or tensor in the shape and dtype of `input`
        torch tensors carry gradients of any order.

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
    The derivative by an offset is the right-hand one, so it is there at integer positions, where an
    offset of 0 begins. With "border" it is 0 where the position is limited: below 0, and from H - 1
    (W - 1) on. A NaN offset gives NaN, its gradient is NaN and nothing reaches the input. An
    infinite offset has gradient 0; its value is the edge pixel with "border", 0 with "zeros".

    With "zeros" it equals `deform_conv2d` with a 1 x 1 kernel, ``groups=offset_groups=C`` and
    weights of 1.

    16-bit types are storage only: positions and interpolation are float32; the fraction of a position
    comes from the offset alone, so its precision does not depend on the place. Determinism: on the CPU
    the same bits for any number of threads, any batch around an image and any memory layout.

    References
    ----------
    Dai et al., Deformable Convolutional Networks, 2017, https://arxiv.org/abs/1703.06211,
    equations 3 and 4, for the interpolation.

    Examples
    --------
    >>> import numpy as np, dcnlib
    >>> x = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
    >>> offset = np.zeros((1, 2, 1, 4), np.float32)
    >>> offset[:, 1] = 0.5
    >>> dcnlib.deform_resample2d(x, offset)[0, 0, 0]
    array([0.5, 1.5, 2.5, 3. ], dtype=float32)
    >>> dcnlib.deform_resample2d(x, offset, boundary="zeros")[0, 0, 0]
    array([0.5, 1.5, 2.5, 1.5], dtype=float32)
    """
    op = "deform_resample2d"
    arrays = {"input": input, "offset": offset}
    tensors = is_torch(op, arrays)
    boundary = boundary_name(op, boundary)
    if tensors:
        _dispatch.check_name(op, backend)
        return torch_ops().deform_resample2d(input, offset, boundary, backend)
    input, offset = map(memory, arrays.values())
    problem = cached_resample_problem(op, spec(input), spec(offset), None, boundary)
    chosen = _dispatch.choose(op, backend, "cpu")
    input, offset = plain(input), plain(offset)
    output = np.empty(input.shape, input.dtype)
    chosen.resample_forward(
        problem,
        input.reshape(problem.input_shape),
        offset.reshape(problem.offset_shape),
        output.reshape(problem.output_shape),
    )
    return output


def deform_resample2d_backward(
    grad_output: Array,
    input: Array,
    offset: Array,
    *,
    boundary: str = "border",
    backend: str | None = None,
) -> DeformResample2dGradients:
    r"""Differentiate `deform_resample2d`: the gradients of ``(grad_output * output).sum()``.

    The gradient of the input spreads :math:`g = \partial L/\partial y` over the four pixels around
    each position with their bilinear weights; that of the offset is :math:`g \, \partial y/\partial p`.

    Parameters
    ----------
    grad_output : array or tensor in the shape and dtype of `input`
    input, offset, boundary, backend
        As for `deform_resample2d`.

    Returns
    -------
    DeformResample2dGradients
        Named tuple ``(input, offset)``, each in the shape and dtype of its argument.

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `deform_resample2d`.

    Notes
    -----
    Boundary, values that are no numbers, dtypes, determinism: as `deform_resample2d`.

    References
    ----------
    Dai et al., 2017, equations 3 and 4 and appendix A.

    Examples
    --------
    >>> import numpy as np, dcnlib
    >>> x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    >>> offset = np.zeros((1, 2, 4, 4), np.float32)
    >>> grads = dcnlib.deform_resample2d_backward(np.ones_like(x), x, offset)
    >>> grads.offset[0, :, 0, 0]  # the image rises by 4 a row and 1 a column
    array([4., 1.], dtype=float32)
    """
    op = "deform_resample2d_backward"
    arrays = {"grad_output": grad_output, "input": input, "offset": offset}
    tensors = is_torch(op, arrays)
    boundary = boundary_name(op, boundary)
    if tensors:
        _dispatch.check_name(op, backend)
        grads = torch_ops().deform_resample2d.backward(
            grad_output, input, offset, boundary, backend, [True, True]
        )
        return DeformResample2dGradients(*grads)
    grad_output, input, offset = map(memory, arrays.values())
    problem = cached_resample_problem(op, spec(input), spec(offset), spec(grad_output), boundary)
    chosen = _dispatch.choose(op, backend, "cpu")
    input, offset = plain(input), plain(offset)
    grads = DeformResample2dGradients(
        np.empty(input.shape, input.dtype), np.empty(offset.shape, input.dtype)
    )
    chosen.resample_backward(
        problem,
        plain(grad_output).reshape(problem.output_shape),
        input.reshape(problem.input_shape),
        offset.reshape(problem.offset_shape),
        (grads.input.reshape(problem.input_shape), grads.offset.reshape(problem.offset_shape)),
    )
    return grads
