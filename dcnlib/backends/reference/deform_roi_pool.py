r"""Deformable RoI pooling, both dialects.

    y(i, j) = mask_ij * sum_{p in bin (i, j)} x(p0 + p + dp_ij) / n_ij     Dai et al. 2017, equation 5;
                                                                         Zhu et al. 2019, equation 2
    dp_ij   = gamma * (w, h) * offset_ij

The samples of a bin are a grid, and the bilinear x(.) is a product of hats. So the sum is

    y = W_y V W_x^T,   W_y(q) = sum of the hats of all sample rows at pixel row q, over their number

with V the pixels that the samples touch; the derivative by p_y has the slopes of the hats in W_y.

                    aligned (mmcv)                       position-sensitive (MXNet)
    corner          x1 * scale - 0.5                     round(x1) * scale - 0.5
    size            (x2 - x1) * scale                    (round(x2) + 1 - round(x1)) * scale, at least 0.1
    samples         at the middle of n cells of a bin    at the left edge of n cells of a bin
    outside         beyond [-1, H]: 0, but counted       beyond [-0.5, H - 0.5]: not counted
    inside          limited to [0, H - 1]                limited to [0, H - 1]

Positions, weights and sums are in the dtype of the arrays that `pool` and `differentiate` get.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..._problem_pool import DeformRoIPoolProblem
from .deform_conv2d import rounded

_MOST = 2**31 - 1  # samples of a bin along one axis


@np.errstate(all="ignore")  # infinities and NaN are values here
def roi_pool_forward(problem, input, rois, offset, mask, output, num_threads=None) -> None:
    """Fill `output`; operands as in `dcnlib.backends`."""
    arrays = (None if a is None else a.astype(np.float64) for a in (input, rois, offset, mask))
    output[...] = rounded(pool(problem, *arrays), output.dtype)


@np.errstate(all="ignore")
def roi_pool_backward(
    problem, grad_output, input, rois, offset, mask, grads, num_threads=None
) -> None:
    """Fill the wanted `grads`; operands as in `dcnlib.backends`."""
    operands = (grad_output, input, rois, offset, mask)
    arrays = (None if a is None else a.astype(np.float64) for a in operands)
    for out, grad in zip(grads, differentiate(problem, *arrays), strict=True):
        if out is not None:
            out[...] = rounded(grad, out.dtype)


class Gradients(NamedTuple):
    """Those of the loss sum(grad_output * y); 0 for a mask or offset that is not there."""

    input: np.ndarray
    offset: np.ndarray
    mask: np.ndarray


class Axis(NamedTuple):
    """The pixels along one axis that the samples of a bin touch."""

    at: np.ndarray
    weight: np.ndarray
    slope: np.ndarray
    """What the weights gain when all samples move by one pixel: the right-hand derivative."""


class Bin(NamedTuple):
    """One bin of one RoI for the channels of one class of offsets."""

    roi: int
    image: int
    place: tuple[int, int]
    part: tuple[int, int]
    outputs: slice
    inputs: np.ndarray
    y: Axis
    x: Axis
    size: tuple[float, float]
    nan: bool
    offsets: tuple[int, int]
    """The channels of the offset: y, x."""


def pool(problem, input, rois, offset, mask) -> np.ndarray:
    """y of every RoI, channel and bin."""
    y = np.zeros(problem.output_shape, input.dtype)
    for b in bins(problem, rois, offset):
        v = _pixels(input, b)
        y[b.roi, b.outputs, *b.place] = np.nan if b.nan else _summed(b.y.weight, b.x.weight, v)
    return y if mask is None else y * mask


def differentiate(problem, grad_output, input, rois, offset, mask) -> Gradients:
    """All gradients of sum(grad_output * y)."""
    grad_input = np.zeros_like(input)
    grad_offset = np.zeros(problem.offset_shape, input.dtype)
    grad_mask = np.zeros(problem.mask_shape, input.dtype)
    for b in bins(problem, rois, offset):
        dy = grad_output[b.roi, b.outputs, *b.place]
        m = 1 if mask is None else mask[b.roi, 0, *b.place]
        v = _pixels(input, b)
        if b.nan:
            grad_offset[b.roi, b.offsets, *b.part] = np.nan
            grad_mask[b.roi, 0, *b.place] = np.nan
        if v.size == 0:  # NaN, or exactly 0
            continue
        # What reaches each pixel's share of the bin: sum over the channels.
        upstream = (dy[:, None, None] * v).sum(axis=0)
        grad_mask[b.roi, 0, *b.place] += _summed(b.y.weight, b.x.weight, upstream)
        scale = problem.offset_scale * m
        grad_offset[b.roi, b.offsets, *b.part] += [
            scale * b.size[0] * _summed(b.y.slope, b.x.weight, upstream),
            scale * b.size[1] * _summed(b.y.weight, b.x.slope, upstream),
        ]
        grad_input[np.ix_([b.image], b.inputs, b.y.at, b.x.at)] += (
            (m * dy)[:, None, None] * np.outer(b.y.weight, b.x.weight)
        )[None]
    return Gradients(grad_input, grad_offset, grad_mask)


def bins(problem: DeformRoIPoolProblem, rois, offset) -> Iterator[Bin]:
    """Every bin of every RoI, and where its samples lie."""
    per_class = problem.out_channels // problem.classes
    for roi, (image, x1, y1, x2, y2) in enumerate(rois):
        start_y, size_y, finite_y = _extent(problem, y1, y2)
        start_x, size_x, finite_x = _extent(problem, x1, x2)
        finite = finite_y and finite_x
        for k in range(problem.classes):
            outputs = np.arange(k * per_class, (k + 1) * per_class)
            for ph, pw in np.ndindex(problem.out_h, problem.out_w):
                part = (ph * problem.part_h // problem.out_h, pw * problem.part_w // problem.out_w)
                gh = ph * problem.group_h // problem.out_h
                gw = pw * problem.group_w // problem.out_w
                move_y = move_x = 0.0
                if offset is not None:  # x before y
                    move_y = problem.offset_scale * size_y * offset[roi, 2 * k + 1, *part]
                    move_x = problem.offset_scale * size_x * offset[roi, 2 * k, *part]
                nan = not finite or np.isnan(move_y) or np.isnan(move_x)
                y = _axis(problem, start_y + move_y, size_y, ph, problem.out_h, problem.in_h, nan)
                x = _axis(problem, start_x + move_x, size_x, pw, problem.out_w, problem.in_w, nan)
                yield Bin(
                    roi,
                    0 if nan else int(image),
                    (ph, pw),
                    part,
                    slice(outputs[0], outputs[-1] + 1),
                    (outputs * problem.group_h + gh) * problem.group_w + gw,
                    y,
                    x,
                    (size_y, size_x),
                    nan,
                    (2 * k + 1, 2 * k),
                )


def _extent(problem: DeformRoIPoolProblem, low, high):
    """A RoI along one axis, in pixels of the input: its begin, its size, whether they are finite."""
    if problem.position_sensitive:
        low, high = _half_away(low), _half_away(high) + 1
    start = low * problem.spatial_scale - 0.5
    size = high * problem.spatial_scale - 0.5 - start
    finite = np.isfinite(start) and np.isfinite(size)
    return start, np.maximum(size, 0.1) if problem.position_sensitive else size, finite


def _half_away(value):
    """To the nearest integer, halves away from 0."""
    whole = np.trunc(value)
    return whole + np.copysign(np.abs(value - whole) >= 0.5, value)


def _axis(problem, start, size, index, bin_count, extent, nan) -> Axis:
    """Bin `index` of an axis that begins at `start`: the pixels its samples touch."""
    real = type(start)
    if nan:
        return Axis(np.zeros(0, int), np.zeros(0, real), np.zeros(0, real))
    bin_size = size / bin_count
    origin = start + index * bin_size
    count = problem.samples or int(np.clip(np.ceil(bin_size), 0, _MOST))
    spacing = bin_size / max(count, 1)
    if problem.position_sensitive:
        low, high, phase = -0.5, extent - 0.5, 0.0
    else:
        low, high, phase = -1.0, float(extent), 0.5

    # Only samples that may be inside are looked at: a RoI may be far larger than the image.
    first, last = 0, count - 1
    if spacing != 0:
        ends = sorted(((low - origin) / spacing - phase, (high - origin) / spacing - phase))
        first = max(first, int(np.clip(ends[0], 0, _MOST)) - 1)
        last = min(last, int(np.clip(ends[1], -2, _MOST)) + 1)
    p = origin + (np.arange(first, last + 1) + phase) * spacing
    p = p[(low <= p) & (p <= high)]

    limited = np.clip(p, 0, extent - 1)
    cell = np.floor(limited).astype(int)
    fraction = limited - cell
    moves = ((0 <= p) & (p < extent - 1)).astype(fraction.dtype)
    hats = np.zeros((extent, 2), fraction.dtype)
    touched = np.zeros(extent, bool)
    for at, weight, slope in (
        (cell, 1 - fraction, -moves),
        (np.minimum(cell + 1, extent - 1), fraction, moves),
    ):
        np.add.at(hats, at, np.stack([weight, slope], 1))
        touched[at] = True
    number = p.size if problem.position_sensitive else count
    hats = hats[touched] / max(number, 1)
    return Axis(np.flatnonzero(touched), hats[:, 0], hats[:, 1])


def _summed(by_row, by_column, pixels) -> np.ndarray:
    """by_row V by_column^T, by products and sums alone: BLAS may leave out zeros, next to a NaN too."""
    return (by_row[:, None] * by_column * pixels).sum(axis=(-2, -1))


def _pixels(input, b: Bin) -> np.ndarray:
    """The pixels that a bin's samples touch: channels, rows, columns."""
    return input[np.ix_([b.image], b.inputs, b.y.at, b.x.at)][0]
