"""Deformable RoI pooling: the public functions of both dialects.

As `functional.py` is for the convolution: NumPy arrays are checked here and handed to a backend,
torch tensors go to ``torch.ops.dcnlib``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import _dispatch
from ._arrays import is_torch, memory, plain, spec, torch_ops
from ._problem import integer, pair, real
from ._problem_pool import (
    DeformRoIPoolProblem,
    cached_psroi_pool_problem,
    cached_roi_pool_problem,
    check_image_numbers,
    samples,
)

Array = TypeVar("Array")


class DeformRoIPoolGradients(NamedTuple):
    """Gradients of `deform_roi_pool`; None for an offset that is None."""

    input: Any
    offset: Any


class DeformPSRoIPoolGradients(NamedTuple):
    """Gradients of `deform_psroi_pool`; None where that argument was None or not used."""

    input: Any
    offset: Any
    mask: Any


def deform_roi_pool(
    input: Array,
    rois: Array,
    offset: Array | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    backend: str | None = None,
) -> Array:
    r"""Average an image over the bins of regions of interest, each bin moved by an offset.

    Deformable RoI pooling in the dialect of mmcv: RoIAlign (aligned) whose bins move.

    .. math::

        y[r, c, i, j] = \frac{1}{n_y n_x} \sum_{k=0}^{n_y-1} \sum_{l=0}^{n_x-1}
            x\big[c;\; y_0 + \gamma h \Delta_y + (i + \tfrac{k + 1/2}{n_y}) \tfrac{h}{PH},\;
                       x_0 + \gamma w \Delta_x + (j + \tfrac{l + 1/2}{n_x}) \tfrac{w}{PW}\big]

    with the corner :math:`(y_0, x_0) = (y_1, x_1) s - 1/2` and the size
    :math:`(h, w) = (y_2 - y_1, x_2 - x_1) s` of region r in pixels, s = `spatial_scale`.

    Parameters
    ----------
    input : array or tensor of shape (N, C, H, W)
        float32, float64, float16 or bfloat16 (in NumPy: ``ml_dtypes.bfloat16``).
    rois : shape (R, 5)
        Rows of image number, x1, y1, x2, y2, before scaling. In the dtype of `input`, or float32 or
        float64: half-precision images go well with float32 regions. It has no gradient.
    offset : shape (R, 2, PH, PW), or None for no movement
        Displacement of each bin as a fraction of the region's size over `gamma`: **the x plane
        first, then the y plane**, the other way round than for a convolution.
    output_size : int or (PH, PW)
        Bins of a region.
    spatial_scale : float
        From the coordinates of `rois` to pixels of `input`, for example 1/16. Above 0.
    sampling_ratio : int
        Samples along each axis of a bin, at most 32767; 0 takes ``ceil(size / bins)``, one for each
        pixel.
    gamma : float
        Scale of the offsets.
    backend : {"cpu", "cuda", "reference"}, optional
        None takes the one of the tensors' device. A named backend that cannot run is an error.

    Returns
    -------
    array or tensor of shape (R, C, PH, PW)
        In the dtype of `input`; torch tensors carry gradients of any order by input and offset.

    Raises
    ------
    TypeError
        For arguments of the wrong kind, mixed NumPy and torch, mixed or unsupported dtypes.
    ValueError
        For shapes and values that do not fit, and on the CPU for an image number that is not one of
        the batch; the text names argument, expectation and value.
    RuntimeError
        If a named backend cannot run, with its reason.
    MemoryError
        If there is no memory for the result or the workspace.

    Notes
    -----
    Border: a sample in [-1, H] x [-1, W] is limited to the image and bilinear there, one further out
    is 0; all of them count in the mean. The derivative by an offset is the exact right-hand one: 0
    along an axis where a sample is limited. (mmcv's own gradient is not the derivative there.)

    A region may lie outside, be larger than the image, or be reversed (x2 < x1: mirrored where
    `sampling_ratio` is given, otherwise it has no samples and gives 0, like an empty one). A region
    with a NaN or infinite coordinate gives NaN, and so does a bin with a NaN offset; nothing of
    them reaches the input's gradient. A bin with an infinite offset is 0 with gradient 0. On CUDA,
    where the values cannot be looked at in time, a wrong image number gives NaN.

    Positions are float64 for every dtype, interpolation and sums float32 (float64 for float64).
    Determinism: on the CPU the same bits for any number of threads, any batch around an image and
    any memory layout of the arguments.

    References
    ----------
    Dai et al., Deformable Convolutional Networks, 2017, https://arxiv.org/abs/1703.06211,
    section 2.2. Zhu et al., Deformable ConvNets v2, 2019, https://arxiv.org/abs/1811.11168.

    Examples
    --------
    An image that rises by one per column, a region of 4 x 4 pixels and one bin: its middle, then
    the same moved by a tenth of the region's width:

    >>> import numpy as np, dcnlib
    >>> x = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))
    >>> rois = np.array([[0, 2, 2, 6, 6]], np.float32)
    >>> offset = np.zeros((1, 2, 1, 1), np.float32)
    >>> dcnlib.deform_roi_pool(x, rois, offset, 1).item()
    3.5
    >>> offset[:, 0] = 1
    >>> round(dcnlib.deform_roi_pool(x, rois, offset, 1, gamma=0.1).item(), 6)
    3.9
    """
    op = "deform_roi_pool"
    arrays = {"input": input, "rois": rois, "offset": offset}
    tensors = is_torch(op, arrays, ("offset",))
    arguments = _arguments(op, output_size, spatial_scale, sampling_ratio, gamma)
    if tensors:
        _dispatch.check_name(op, backend)
        return torch_ops().deform_roi_pool(input, rois, offset, *arguments, backend)
    input, rois, offset = map(memory, arrays.values())
    problem = cached_roi_pool_problem(op, spec(input), spec(rois), spec(offset), None, *arguments)
    return _forward(op, backend, problem, input, rois, offset, None)


def deform_roi_pool_backward(
    grad_output: Array,
    input: Array,
    rois: Array,
    offset: Array | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    *,
    backend: str | None = None,
) -> DeformRoIPoolGradients:
    r"""Differentiate `deform_roi_pool`: the gradients of ``(grad_output * output).sum()``.

    With :math:`g = \partial L/\partial y`, the gradient of the input spreads :math:`g / (n_y n_x)`
    over the four pixels around each sample with their bilinear weights, and

    .. math::

        \frac{\partial L}{\partial \Delta_x} = \gamma \, w \sum_c g \, \frac{1}{n_y n_x}
            \sum_{k,l} \frac{\partial x[c; \cdot]}{\partial p_x}.

    Parameters
    ----------
    grad_output : array or tensor in the shape and dtype of the output
    input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, backend
        As for `deform_roi_pool`.

    Returns
    -------
    DeformRoIPoolGradients
        Named tuple ``(input, offset)``, each in the shape and dtype of its argument; None for an
        offset that is None.

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `deform_roi_pool`.

    Notes
    -----
    Border, values that are no numbers, determinism: as `deform_roi_pool`.

    References
    ----------
    Dai et al., 2017, section 2.2 and appendix A.

    Examples
    --------
    >>> import numpy as np, dcnlib
    >>> x = np.tile(np.arange(8, dtype=np.float32), (1, 1, 8, 1))
    >>> rois = np.array([[0, 2, 2, 6, 6]], np.float32)
    >>> offset = np.zeros((1, 2, 1, 1), np.float32)
    >>> y = dcnlib.deform_roi_pool(x, rois, offset, 1, gamma=0.5)
    >>> grads = dcnlib.deform_roi_pool_backward(np.ones_like(y), x, rois, offset, 1, gamma=0.5)
    >>> grads.offset.ravel()  # the image rises by 1 a column: gamma times the width of 4
    array([2., 0.], dtype=float32)
    """
    op = "deform_roi_pool_backward"
    arrays = {"grad_output": grad_output, "input": input, "rois": rois, "offset": offset}
    tensors = is_torch(op, arrays, ("offset",))
    arguments = _arguments(op, output_size, spatial_scale, sampling_ratio, gamma)
    if tensors:
        _dispatch.check_name(op, backend)
        grads = torch_ops().deform_roi_pool.backward(
            grad_output, input, rois, offset, *arguments, backend, [True, offset is not None]
        )
        return DeformRoIPoolGradients(grads[0], None if offset is None else grads[1])
    grad_output, input, rois, offset = map(memory, arrays.values())
    problem = cached_roi_pool_problem(
        op, spec(input), spec(rois), spec(offset), spec(grad_output), *arguments
    )
    grads = _backward(op, backend, problem, grad_output, input, rois, offset, None)
    return DeformRoIPoolGradients(*grads[:2])


def deform_psroi_pool(
    input: Array,
    rois: Array,
    offset: Array | None,
    spatial_scale: float,
    output_size: int | tuple[int, int],
    output_dim: int,
    no_offset: bool = False,
    group_size: int | tuple[int, int] = 1,
    part_size: int | tuple[int, int] | None = None,
    sample_per_part: int = 4,
    offset_std: float = 0.1,
    mask: Array | None = None,
    *,
    backend: str | None = None,
) -> Array:
    r"""Average score maps over the bins of regions of interest: each bin its own maps and offset.

    Position-sensitive deformable RoI pooling, v2 (modulated) with a `mask`, in the dialect of the
    original implementations (MXNet's ``DeformablePSROIPooling``):

    .. math::

        y[r, o, i, j] = m[r, i, j] \, \frac{1}{|S|} \sum_{(k, l) \in S}
            x\big[(o\,G_h + g_h) G_w + g_w;\;
                  y_0 + \sigma h \Delta_y + (i + \tfrac{k}{n}) \tfrac{h}{PH},\;
                  x_0 + \sigma w \Delta_x + (j + \tfrac{l}{n}) \tfrac{w}{PW}\big]

    with the corner :math:`(y_0, x_0) = \mathrm{round}(y_1, x_1)\,s - 1/2`, the size
    :math:`(h, w) = \max(0.1,\, (\mathrm{round}(y_2, x_2) + 1)\,s - 1/2 - (y_0, x_0))`, the group
    :math:`(g_h, g_w) = (\lfloor i\,G_h/PH \rfloor, \lfloor j\,G_w/PW \rfloor)`, n =
    `sample_per_part`, :math:`\sigma` = `offset_std`, and S the samples that lie inside.

    Parameters
    ----------
    input : array or tensor of shape (N, output_dim*group_h*group_w, H, W)
        float32, float64, float16 or bfloat16 (in NumPy: ``ml_dtypes.bfloat16``).
    rois : shape (R, 5)
        Rows of image number, x1, y1, x2, y2, before scaling; coordinates are rounded to integers,
        halves away from 0. In the dtype of `input`, or float32 or float64. It has no gradient.
    offset : shape (R, 2*classes, part_h, part_w), or None
        Displacements as fractions of the region's size over `offset_std`: for each class **the x
        plane first, then the y plane**. Class k moves output channels
        ``k*output_dim/classes`` and following; bin (i, j) takes part
        ``(i*part_h // PH, j*part_w // PW)``.
    spatial_scale : float
        From the coordinates of `rois` to pixels of `input`. Above 0.
    output_size : int or (PH, PW)
        Bins of a region.
    output_dim : int
        Channels of the output.
    no_offset : bool
        True ignores `offset`: plain position-sensitive pooling.
    group_size : int or (group_h, group_w)
        Bins share ``group_h*group_w`` sets of maps; 1 is no position sensitivity.
    part_size : int or (part_h, part_w), optional
        Parts that have an offset of their own; as many as bins when None.
    sample_per_part : int
        Samples along each axis of a bin, 1 to 32767.
    offset_std : float
        Scale of the offsets.
    mask : shape (R, 1, PH, PW), optional
        Factor on each bin, the same for all channels; no activation is applied.
    backend : {"cpu", "cuda", "reference"}, optional
        None takes the one of the tensors' device. A named backend that cannot run is an error.

    Returns
    -------
    array or tensor of shape (R, output_dim, PH, PW)
        In the dtype of `input`; torch tensors carry gradients of any order by input, offset, mask.

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `deform_roi_pool`.

    Notes
    -----
    Border: a sample beyond [-0.5, H - 0.5] x [-0.5, W - 0.5] is skipped and does not count, any
    other is limited to the image and bilinear there; a bin without samples is 0. The derivative
    by an offset is the right-hand one: 0 along an axis where a sample is limited.

    Regions that lie outside, are reversed (their size is 0.1 then), or have values that are no
    numbers; arithmetic; determinism: as `deform_roi_pool`.

    References
    ----------
    Dai et al., 2017, section 2.2, https://arxiv.org/abs/1703.06211. Zhu et al., 2019, section 3.2,
    https://arxiv.org/abs/1811.11168.

    Examples
    --------
    Four maps for two times two bins; each bin of the result comes from its own map:

    >>> import numpy as np, dcnlib
    >>> x = np.ones((1, 4, 8, 8), np.float32) * np.array([1, 2, 3, 4], np.float32)[:, None, None]
    >>> rois = np.array([[0, 1, 1, 6, 6]], np.float32)
    >>> dcnlib.deform_psroi_pool(x, rois, None, 1.0, 2, output_dim=1, group_size=2)[0, 0]
    array([[1., 2.],
           [3., 4.]], dtype=float32)
    """
    op = "deform_psroi_pool"
    arrays = {"input": input, "rois": rois, "offset": None if no_offset else offset, "mask": mask}
    tensors = is_torch(op, arrays, ("offset", "mask"))
    arguments = _psroi_arguments(
        op, spatial_scale, output_size, output_dim, group_size, part_size, sample_per_part,
        offset_std,
    )  # fmt: skip
    input, rois, offset, mask = arrays.values()
    if tensors:
        _dispatch.check_name(op, backend)
        return torch_ops().deform_psroi_pool(input, rois, offset, *arguments, mask, backend)
    input, rois, offset, mask = map(memory, arrays.values())
    problem = cached_psroi_pool_problem(
        op, spec(input), spec(rois), spec(offset), spec(mask), None, *arguments
    )
    return _forward(op, backend, problem, input, rois, offset, mask)


def deform_psroi_pool_backward(
    grad_output: Array,
    input: Array,
    rois: Array,
    offset: Array | None,
    spatial_scale: float,
    output_size: int | tuple[int, int],
    output_dim: int,
    no_offset: bool = False,
    group_size: int | tuple[int, int] = 1,
    part_size: int | tuple[int, int] | None = None,
    sample_per_part: int = 4,
    offset_std: float = 0.1,
    mask: Array | None = None,
    *,
    backend: str | None = None,
) -> DeformPSRoIPoolGradients:
    r"""Differentiate `deform_psroi_pool`: the gradients of ``(grad_output * output).sum()``.

    As `deform_roi_pool_backward`, with :math:`m \, g` for :math:`g` and the sums also over the bins
    of a part; :math:`\partial L/\partial m = \sum_o g \, y/m`.

    Parameters
    ----------
    grad_output : array or tensor in the shape and dtype of the output
    input, rois, offset, spatial_scale, output_size, output_dim, no_offset, group_size
        As for `deform_psroi_pool`.
    part_size, sample_per_part, offset_std, mask, backend
        As for `deform_psroi_pool`.

    Returns
    -------
    DeformPSRoIPoolGradients
        Named tuple ``(input, offset, mask)``, each in the shape and dtype of its argument; None for
        an offset that is None or not used, and for a mask that is None.

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `deform_psroi_pool`.

    Notes
    -----
    Border, values that are no numbers, determinism: as `deform_psroi_pool`. What changes when a
    sample crosses the border, and with it the number of samples, is a jump and has no derivative.

    References
    ----------
    Dai et al., 2017, section 2.2 and appendix A.

    Examples
    --------
    >>> import numpy as np, dcnlib
    >>> x = np.ones((1, 4, 8, 8), np.float32) * np.array([1, 2, 3, 4], np.float32)[:, None, None]
    >>> rois = np.array([[0, 1, 1, 6, 6]], np.float32)
    >>> mask = np.full((1, 1, 2, 2), 0.5, np.float32)
    >>> ones = np.ones((1, 1, 2, 2), np.float32)
    >>> grads = dcnlib.deform_psroi_pool_backward(
    ...     ones, x, rois, None, 1.0, 2, output_dim=1, group_size=2, mask=mask
    ... )
    >>> grads.mask[0, 0]
    array([[1., 2.],
           [3., 4.]], dtype=float32)
    """
    op = "deform_psroi_pool_backward"
    arrays = {
        "grad_output": grad_output,
        "input": input,
        "rois": rois,
        "offset": None if no_offset else offset,
        "mask": mask,
    }
    tensors = is_torch(op, arrays, ("offset", "mask"))
    arguments = _psroi_arguments(
        op, spatial_scale, output_size, output_dim, group_size, part_size, sample_per_part,
        offset_std,
    )  # fmt: skip
    grad_output, input, rois, offset, mask = arrays.values()
    if tensors:
        _dispatch.check_name(op, backend)
        grads = torch_ops().deform_psroi_pool.backward(
            grad_output, input, rois, offset, *arguments, mask, backend,
            [True, offset is not None, mask is not None],
        )  # fmt: skip
        return DeformPSRoIPoolGradients(
            grads[0], None if offset is None else grads[1], None if mask is None else grads[2]
        )
    grad_output, input, rois, offset, mask = map(memory, arrays.values())
    problem = cached_psroi_pool_problem(
        op, spec(input), spec(rois), spec(offset), spec(mask), spec(grad_output), *arguments
    )
    grads = _backward(op, backend, problem, grad_output, input, rois, offset, mask)
    return DeformPSRoIPoolGradients(*grads)


def _arguments(
    op: str, output_size: Any, spatial_scale: Any, sampling_ratio: Any, gamma: Any
) -> tuple[Any, ...]:
    """The options of `deform_roi_pool` as plain numbers."""
    return (
        pair(op, "output_size", output_size),
        real(op, "spatial_scale", spatial_scale, above_zero=True),
        samples(op, "sampling_ratio", sampling_ratio, 0),
        real(op, "gamma", gamma),
    )


def _psroi_arguments(
    op: str,
    spatial_scale: Any,
    output_size: Any,
    output_dim: Any,
    group_size: Any,
    part_size: Any,
    sample_per_part: Any,
    offset_std: Any,
) -> tuple[Any, ...]:
    """The options of `deform_psroi_pool` as plain numbers."""
    output_size = pair(op, "output_size", output_size)
    return (
        real(op, "spatial_scale", spatial_scale, above_zero=True),
        output_size,
        integer(op, "output_dim", output_dim, 1),
        pair(op, "group_size", group_size),
        output_size if part_size is None else pair(op, "part_size", part_size),
        samples(op, "sample_per_part", sample_per_part, 1),
        real(op, "offset_std", offset_std),
    )


def _forward(
    op: str,
    backend: str | None,
    problem: DeformRoIPoolProblem,
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    mask: np.ndarray | None,
) -> np.ndarray:
    chosen = _dispatch.choose(op, backend, "cpu")
    rois = _regions(op, problem, rois)
    output = np.empty(problem.output_shape, plain(input).dtype)
    chosen.roi_pool_forward(problem, plain(input), rois, _plain(offset), _plain(mask), output)
    return output


def _backward(
    op: str,
    backend: str | None,
    problem: DeformRoIPoolProblem,
    grad_output: np.ndarray,
    input: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray | None,
    mask: np.ndarray | None,
) -> tuple[np.ndarray | None, ...]:
    chosen = _dispatch.choose(op, backend, "cpu")
    rois = _regions(op, problem, rois)
    input = plain(input)
    grads = (
        np.empty(problem.input_shape, input.dtype),
        None if offset is None else np.empty(problem.offset_shape, input.dtype),
        None if mask is None else np.empty(problem.mask_shape, input.dtype),
    )
    chosen.roi_pool_backward(
        problem, plain(grad_output), input, rois, _plain(offset), _plain(mask), grads
    )
    return grads


def _regions(op: str, problem: DeformRoIPoolProblem, rois: np.ndarray) -> np.ndarray:
    """The regions as backends read them, each on an image of the batch."""
    rois = np.require(rois, np.float64, ("C_CONTIGUOUS", "ALIGNED"))
    check_image_numbers(op, rois, problem.batch)
    return rois


def _plain(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else plain(array)
