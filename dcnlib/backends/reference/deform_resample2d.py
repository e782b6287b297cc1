r"""Deformable resampling: one displacement for each channel and pixel.

    y[n, c, i, j] = x[n, c] at (i + offset[n, 2c, i, j], j + offset[n, 2c + 1, i, j])

bilinear between floor and floor + 1. Boundary "border" limits the position to the image; "zeros" is
the convolution's rule: bilinear against zeros in (-1, H) x (-1, W), exactly 0 further out. Slopes
are right-hand derivatives: with "border" 0 where the position is limited, from H - 1 on included.

`resample` and `differentiate` compute in the dtype they get.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._problem_resample import DeformResample2dProblem
from .deform_conv2d import rounded


@np.errstate(all="ignore")  # infinities and NaN are values here
def resample_forward(problem, input, offset, output, num_threads=None) -> None:
    """Fill `output`; operands as in `dcnlib.backends`."""
    y = resample(problem, input.astype(np.float64), offset.astype(np.float64))
    output[...] = rounded(y, output.dtype)


@np.errstate(all="ignore")
def resample_backward(problem, grad_output, input, offset, grads, num_threads=None) -> None:
    """Fill the wanted `grads`; operands as in `dcnlib.backends`."""
    arrays = (a.astype(np.float64) for a in (grad_output, input, offset))
    for out, grad in zip(grads, differentiate(problem, *arrays), strict=True):
        if out is not None:
            out[...] = rounded(grad, out.dtype)


class Axis(NamedTuple):
    """One axis of all positions p."""

    low: np.ndarray
    """The pixels before and after p; where there is none its value counts as 0."""
    high: np.ndarray
    has_low: np.ndarray
    has_high: np.ndarray
    fraction: np.ndarray
    inside: np.ndarray
    """Where p has a value, a cell, and a slope of its own; elsewhere each is 0."""
    in_cell: np.ndarray
    moves: np.ndarray


def resample(problem, input, offset) -> np.ndarray:
    """y, (N, C, H, W)."""
    y, x, nan = _axes(problem, offset)
    v00, v01, v10, v11 = _corners(input, y, x)
    ly, lx = y.fraction, x.fraction
    value = (1 - ly) * ((1 - lx) * v00 + lx * v01) + ly * ((1 - lx) * v10 + lx * v11)
    return np.where(nan, input.dtype.type(np.nan), np.where(y.inside & x.inside, value, 0))


def differentiate(problem, grad_output, input, offset) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of sum(grad_output * y) by input and offset."""
    y, x, nan = _axes(problem, offset)
    v00, v01, v10, v11 = _corners(input, y, x)
    ly, lx = y.fraction, x.fraction
    slope_y = (1 - lx) * (v10 - v00) + lx * (v11 - v01)  # right-hand at integer positions:
    slope_x = (1 - ly) * (v01 - v00) + ly * (v11 - v10)  # the cell of floor(p) decides
    grad_offset = np.stack(
        [
            np.where(y.moves & x.in_cell, grad_output * slope_y, 0),
            np.where(x.moves & y.in_cell, grad_output * slope_x, 0),
        ],
        axis=2,
    )
    grad_offset[np.broadcast_to(nan[:, :, None], grad_offset.shape)] = np.nan

    grad_input = np.zeros_like(input)
    n, c = _image_and_channel(input)
    here = y.inside & x.inside & ~nan
    for row, has_row, weight_y in ((y.low, y.has_low, 1 - ly), (y.high, y.has_high, ly)):
        for column, has_column, weight_x in ((x.low, x.has_low, 1 - lx), (x.high, x.has_high, lx)):
            q = np.broadcast_arrays(n, c, row, column)
            exists = here & has_row & has_column
            share = weight_y * weight_x * grad_output
            np.add.at(grad_input, tuple(index[exists] for index in q), share[exists])
    return grad_input, grad_offset.reshape(problem.offset_shape)


def _axes(problem: DeformResample2dProblem, offset) -> tuple[Axis, Axis, np.ndarray]:
    """Both axes of every position, and where one of them is NaN."""
    shape = (problem.batch, problem.channels, 2, problem.in_h, problem.in_w)
    dy, dx = np.moveaxis(offset.reshape(shape), 2, 0)
    i, j = np.ogrid[: problem.in_h, : problem.in_w]
    y = _axis(i, dy, problem.in_h, problem.boundary)
    return y, _axis(j, dx, problem.in_w, problem.boundary), np.isnan(dy) | np.isnan(dx)


def _axis(base, offset, size, boundary) -> Axis:
    # The fraction comes from the offset alone: it is as precise at pixel 4000 as at pixel 0. All
    # comparisons are of floating-point numbers, before any conversion to an integer.
    floor = np.floor(offset)
    in_cells = (floor >= -1 - base) & (floor < size - base)
    cell = base + np.where(in_cells, floor, 0).astype(np.int64)
    fraction = np.subtract(offset, floor, where=in_cells, out=np.zeros_like(offset))
    if boundary == "zeros":
        inside = in_cells & ((cell > -1) | (fraction > 0))
        has_low, has_high, in_cell, moves = cell >= 0, cell < size - 1, in_cells, in_cells
    else:
        before, after = ~(floor >= -base), floor >= size - 1 - base
        cell = np.where(before, 0, np.where(after, size - 1, cell))
        fraction = np.where(before | after, 0, fraction)
        inside = has_low = has_high = in_cell = np.ones_like(in_cells)
        moves = ~before & ~after
    low, high = (np.clip(a, 0, size - 1) for a in (cell, cell + 1))
    return Axis(low, high, has_low, has_high, fraction, inside, in_cell, moves)


def _corners(input, y: Axis, x: Axis) -> list[np.ndarray]:
    """The four pixels around every position."""
    n, c = _image_and_channel(input)
    return [
        np.where(has_row & has_column, input[n, c, row, column], 0)
        for row, has_row in ((y.low, y.has_low), (y.high, y.has_high))
        for column, has_column in ((x.low, x.has_low), (x.high, x.has_high))
    ]


def _image_and_channel(input) -> tuple[np.ndarray, np.ndarray]:
    n, c = np.ogrid[: input.shape[0], : input.shape[1]]
    return n[..., None, None], c[..., None, None]
