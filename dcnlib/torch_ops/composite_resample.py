"""Resampling and its derivative in torch's own differentiable operators: exact and slow.

As `composite.py` for the convolution; reads like `backends/reference/deform_resample2d.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._problem_resample import DeformResample2dProblem
from .composite import _wide


class _Axis(NamedTuple):
    """One axis of all positions, (N, C, H, W): see the reference."""

    low: Tensor
    high: Tensor
    has_low: Tensor
    has_high: Tensor
    fraction: Tensor
    inside: Tensor
    in_cell: Tensor
    moves: Tensor


def forward(problem: DeformResample2dProblem, input: Tensor, offset: Tensor) -> Tensor:
    """y = x at the positions"""
    x, offset = _wide(input, offset)
    x = x.reshape(problem.input_shape)
    y_axis, x_axis, nan = _axes(problem, offset)
    v00, v01, v10, v11 = _corners(problem, x, y_axis, x_axis)
    ly, lx = y_axis.fraction, x_axis.fraction
    value = (1 - ly) * ((1 - lx) * v00 + lx * v01) + ly * ((1 - lx) * v10 + lx * v11)
    # At exactly -1 it is 0, but its derivative is not; and 0 times infinity is no number.
    in_cells = y_axis.in_cell & x_axis.in_cell & value.isfinite()
    value = torch.where((y_axis.inside & x_axis.inside) | in_cells, value, 0) + nan
    return value.reshape(input.shape).to(input.dtype)


def backward(
    problem: DeformResample2dProblem,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients of sum(grad_output * y) by input and offset; None for others."""
    dy, x, wide_offset = _wide(grad_output, input, offset)
    dy, x = dy.reshape(problem.output_shape), x.reshape(problem.input_shape)
    y_axis, x_axis, nan = _axes(problem, wide_offset)
    ly, lx = y_axis.fraction, x_axis.fraction

    def grad_input():
        inside = y_axis.inside & x_axis.inside & (nan == 0)
        in_cells = y_axis.in_cell & x_axis.in_cell & (nan == 0)
        flat = x.new_zeros((*x.shape[:2], problem.in_h * problem.in_w))
        for row, has_row, weight_y in (
            (y_axis.low, y_axis.has_low, 1 - ly),
            (y_axis.high, y_axis.has_high, ly),
        ):
            for column, has_column, weight_x in (
                (x_axis.low, x_axis.has_low, 1 - lx),
                (x_axis.high, x_axis.has_high, lx),
            ):
                share = weight_y * weight_x * dy
                here = inside | (in_cells & share.isfinite())
                share = torch.where(here & has_row & has_column, share, 0)
                place = (row * problem.in_w + column).flatten(2)
                flat = flat.scatter_add(2, place, share.flatten(2))
        return flat.reshape(input.shape).to(input.dtype)

    def grad_offset():
        v00, v01, v10, v11 = _corners(problem, x, y_axis, x_axis)
        slope_y = (1 - lx) * (v10 - v00) + lx * (v11 - v01)
        slope_x = (1 - ly) * (v01 - v00) + ly * (v11 - v10)
        grads = [
            torch.where(y_axis.moves & x_axis.in_cell, dy * slope_y, 0) + nan,
            torch.where(x_axis.moves & y_axis.in_cell, dy * slope_x, 0) + nan,
        ]
        return torch.stack(grads, 2).reshape(offset.shape).to(input.dtype)

    return [
        formula() if is_wanted else None
        for formula, is_wanted in zip((grad_input, grad_offset), output_mask, strict=True)
    ]


def _axes(problem: DeformResample2dProblem, offset: Tensor) -> tuple[_Axis, _Axis, Tensor]:
    """Both axes, and 0 or a NaN whose derivative is one."""
    shape = (problem.batch, problem.channels, 2, problem.in_h, problem.in_w)
    dy, dx = offset.reshape(shape).unbind(2)
    i = torch.arange(problem.in_h, device=offset.device)[:, None]
    j = torch.arange(problem.in_w, device=offset.device)
    nan = torch.where(dy.isnan() | dx.isnan(), (dy + dx).square(), 0)
    return (
        _axis(i, dy, problem.in_h, problem.boundary),
        _axis(j, dx, problem.in_w, problem.boundary),
        nan,
    )


def _axis(base: Tensor, offset: Tensor, size: int, boundary: str) -> _Axis:
    floor = offset.detach().floor()
    in_cells = (floor >= -1 - base) & (floor < size - base)
    cell = base + torch.where(in_cells, floor, 0).long()
    fraction = torch.where(in_cells, offset - floor, 0)
    if boundary == "zeros":
        inside = in_cells & ((cell > -1) | (fraction > 0))
        has_low, has_high, in_cell, moves = cell >= 0, cell < size - 1, in_cells, in_cells
    else:
        before, after = ~(floor >= -base), floor >= size - 1 - base
        cell = torch.where(before, 0, torch.where(after, size - 1, cell))
        fraction = torch.where(before | after, 0, fraction)
        inside = has_low = has_high = in_cell = torch.ones_like(in_cells)
        moves = ~before & ~after
    low, high = cell.clamp(0, size - 1), (cell + 1).clamp(0, size - 1)
    return _Axis(low, high, has_low, has_high, fraction, inside, in_cell, moves)


def _corners(
    problem: DeformResample2dProblem, x: Tensor, y_axis: _Axis, x_axis: _Axis
) -> list[Tensor]:
    """The four pixels around every position."""
    flat = x.flatten(2)
    return [
        torch.where(
            has_row & has_column,
            flat.gather(2, (row * problem.in_w + column).flatten(2)).reshape(x.shape),
            0,
        )
        for row, has_row in ((y_axis.low, y_axis.has_low), (y_axis.high, y_axis.has_high))
        for column, has_column in ((x_axis.low, x_axis.has_low), (x_axis.high, x_axis.has_high))
    ]
