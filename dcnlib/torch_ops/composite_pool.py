"""RoI pooling and its derivative in torch's own differentiable operators: exact, slow, large.

As `composite.py` for the convolution. The samples of a bin are a grid, so a bin is a product of two
lists of touched rows and columns with weights; see `backends/reference/deform_roi_pool.py`.

Axes: R regions, K classes, C channels of a class, P bins, Y and X touched rows and columns.
Positions are float64 as in the backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._problem_pool import DeformRoIPoolProblem
from .composite import _wide


class _Axis(NamedTuple):
    """One axis of all bins, (R, K, P, touches)."""

    at: Tensor
    weight: Tensor
    slope: Tensor
    touches: Tensor
    """Whether a touch counts; the pixels of others are not to be read."""


class _Bins(NamedTuple):
    y: _Axis
    x: _Axis
    scale: tuple[Tensor, Tensor]
    """What an offset of 1 moves, by y and x, (R, 1, 1)."""
    nan: Tensor
    """0, or a NaN with a derivative that is one, (R, K, P)."""
    place: tuple[Tensor, ...]
    """Indices of the touched pixels in (N, K, C, cells * H * W), broadcast to (R, K, C, P, Y, X)."""


def forward(
    problem: DeformRoIPoolProblem,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """y = m * sum over touched rows and columns of weight_y * weight_x * v"""
    x, offset, mask = _wide(input, offset, mask)
    b = _bins(problem, x, rois, offset)
    y = torch.einsum("rkcpyx,rkpy,rkpx->rkcp", _pixels(problem, x, b), b.y.weight, b.x.weight)
    y = y + b.nan[:, :, None]
    if mask is not None:
        y = y * _by_bin(problem, mask)[:, None]
    return y.reshape(problem.output_shape).to(input.dtype)


def backward(
    problem: DeformRoIPoolProblem,
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients of sum(grad_output * y) by input, offset and mask; None for others."""
    dy, x, offset, mask = _wide(grad_output, input, offset, mask)
    b = _bins(problem, x, rois, offset)
    per_class, bins = problem.out_channels // problem.classes, problem.out_h * problem.out_w
    dy = dy.reshape(problem.rois, problem.classes, per_class, bins)
    # What reaches each pixel of a bin: sum over the channels.
    upstream = torch.einsum("rkcp,rkcpyx->rkpyx", dy, _pixels(problem, x, b))
    modulated = dy if mask is None else dy * _by_bin(problem, mask)[:, None]

    def weighted(by_y, by_x):
        touches = b.y.touches[..., :, None] & b.x.touches[..., None, :]
        share = by_y[..., :, None] * by_x[..., None, :] * upstream
        return torch.where(touches, share, 0).sum((-2, -1))

    def grad_input():
        touches = (b.y.touches[..., :, None] & b.x.touches[..., None, :])[:, :, None]
        weight = (b.y.weight[..., :, None] * b.x.weight[..., None, :])[:, :, None]
        share = torch.where(touches, modulated[..., None, None] * weight, 0)
        flat = x.new_zeros(_flat_shape(problem)).index_put(b.place, share, accumulate=True)
        return flat

    def grad_offset():
        m = 1 if mask is None else _by_bin(problem, mask)
        scale_y, scale_x = (scale.to(x.dtype) for scale in b.scale)
        reads = b.y.touches.any(-1) & b.x.touches.any(-1)
        by_bin = [
            torch.where(reads, scale * m * values, 0) + b.nan
            for scale, values in (
                (scale_x, weighted(b.y.weight, b.x.slope)),  # x before y
                (scale_y, weighted(b.y.slope, b.x.weight)),
            )
        ]
        by_bin = torch.stack(by_bin, 2)
        parts = problem.part_h * problem.part_w
        index = _part_of_bin(problem, x.device).expand(by_bin.shape)
        return by_bin.new_zeros((*by_bin.shape[:3], parts)).scatter_add(3, index, by_bin)

    def grad_mask():
        return (weighted(b.y.weight, b.x.weight) + b.nan).sum(1)

    formulas = (
        (grad_input, problem.input_shape),
        (grad_offset, problem.offset_shape),
        (grad_mask, problem.mask_shape),
    )
    return [
        formula().reshape(shape).to(input.dtype) if is_wanted else None
        for (formula, shape), is_wanted in zip(formulas, output_mask, strict=True)
    ]


def _bins(problem: DeformRoIPoolProblem, x: Tensor, rois: Tensor, offset: Tensor | None) -> _Bins:
    """Where the samples of all bins lie."""
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        image, *box = rois.double().unbind(1)
        start_x, start_y, size_x, size_y, finite = _extents(problem, *box)
    bins = torch.arange(problem.out_h * problem.out_w, device=x.device)
    row, column = bins // problem.out_w, bins % problem.out_w
    move_y = move_x = x.new_zeros((1, 1, 1), dtype=torch.float64)
    scale_y, scale_x = (problem.offset_scale * s[:, None, None] for s in (size_y, size_x))
    if offset is not None:
        parts = problem.part_h * problem.part_w
        by_part = offset.double().reshape(problem.rois, problem.classes, 2, parts)
        move_x, move_y = by_part[..., _part_of_bin(problem, x.device)].unbind(2)  # x before y
        move_y, move_x = scale_y * move_y, scale_x * move_x
    shape = (problem.rois, problem.classes, problem.out_h * problem.out_w)
    origin_y = start_y[:, None, None] + move_y + row * (size_y / problem.out_h)[:, None, None]
    origin_x = start_x[:, None, None] + move_x + column * (size_x / problem.out_w)[:, None, None]
    origin_y, origin_x = origin_y.expand(shape), origin_x.expand(shape)
    bad = ~finite[:, None, None] | origin_y.isnan() | origin_x.isnan()
    # Both choices are finite where a bin is one, or its derivative would be NaN as well.
    nan = torch.where(bad, origin_y + origin_x, 0) * torch.where(bad, torch.nan, 0.0)
    y = _axis(problem, origin_y, size_y / problem.out_h, problem.in_h, bad, x.dtype)
    x_axis = _axis(problem, origin_x, size_x / problem.out_w, problem.in_w, bad, x.dtype)
    return _Bins(
        y, x_axis, (scale_y, scale_x), nan.to(x.dtype), _place(problem, image, y, x_axis, finite)
    )


def _extents(problem: DeformRoIPoolProblem, x1, y1, x2, y2) -> tuple[Tensor, ...]:
    """start_x, start_y, size_x, size_y of all regions, and whether these are finite."""
    scale = problem.spatial_scale
    if problem.position_sensitive:
        x1, y1, x2, y2 = (
            v.trunc() + ((v - v.trunc()).abs() >= 0.5) * v.sign() for v in (x1, y1, x2, y2)
        )
        x2, y2 = x2 + 1, y2 + 1
    starts = [v * scale - 0.5 for v in (x1, y1)]
    sizes = [v * scale - 0.5 - start for v, start in zip((x2, y2), starts, strict=True)]
    finite = torch.stack([*starts, *sizes]).isfinite().all(0)
    if problem.position_sensitive:
        sizes = [size.clamp(min=0.1) for size in sizes]
    return (*starts, *sizes, finite)


def _axis(
    problem: DeformRoIPoolProblem,
    origin: Tensor,
    bin_size: Tensor,
    extent: int,
    bad: Tensor,
    dtype: torch.dtype,
) -> _Axis:
    """The rows that the samples of each bin touch, room for two for each sample."""
    bin_size = torch.where(bin_size.isfinite(), bin_size, 0)[:, None, None]
    if problem.position_sensitive:
        low, high, phase = -0.5, extent - 0.5, 0.0
    else:
        low, high, phase = -1.0, float(extent), 0.5
    if problem.samples:
        count = torch.full_like(bin_size, problem.samples)
        looked_at, first = problem.samples, torch.zeros_like(bin_size)
    else:
        # Of as many samples as pixels only those that may be inside are looked at.
        count = bin_size.ceil().clamp(0, 2**31 - 1)
        looked_at = _most(count, 2 * extent + 4)
        spacing = bin_size / count.clamp(min=1)
        ahead = (low - torch.where(bad, 0, origin).detach()) / spacing - phase
        first = torch.where(spacing > 0, ahead.floor(), 0).clamp(min=0).minimum(count)
    spacing = bin_size / count.clamp(min=1)
    number = first[..., None] + torch.arange(looked_at, device=origin.device)
    p = origin[..., None] + (number + phase) * spacing[..., None]
    inside = (number < count[..., None]) & (low <= p) & (p <= high) & ~bad[..., None]

    moves = (inside & (p >= 0) & (p < extent - 1)).to(p.dtype)
    cell = torch.where(inside, p.detach(), 0).clamp(0, extent - 1).floor()
    fraction = torch.where(moves > 0, p - cell, 0)
    mean_over = inside.sum(-1, keepdim=True) if problem.position_sensitive else count[..., None]
    share = inside.to(p.dtype) / mean_over.clamp(min=1)
    cell = cell.long()
    at = torch.cat([cell, (cell + 1).clamp(max=extent - 1)], -1)
    touches = torch.cat([inside, inside], -1)
    # All that touch a row add up in the first of them.
    same = (at[..., :, None] == at[..., None, :]) & touches[..., None, :]
    weight, slope = (
        (same * torch.cat(pair, -1)[..., None, :]).sum(-1).to(dtype)
        for pair in (((1 - fraction) * share, fraction * share), (-moves * share, moves * share))
    )
    return _Axis(at, weight, slope, touches & ~same.tril(-1).any(-1))


def _most(count: Tensor, limit: int) -> int:
    """The largest sample count, at most `limit`; `limit` where no value can be had."""
    try:
        return min(int(count.max()), limit) if count.numel() else 0
    except RuntimeError:
        return limit


def _place(
    problem: DeformRoIPoolProblem, image: Tensor, y: _Axis, x: _Axis, finite: Tensor
) -> tuple[Tensor, ...]:
    device = image.device
    bins = torch.arange(problem.out_h * problem.out_w, device=device)
    row, column = bins // problem.out_w, bins % problem.out_w
    cell = row * problem.group_h // problem.out_h * problem.group_w
    cell = cell + column * problem.group_w // problem.out_w
    pixel = (cell[:, None] * problem.in_h + y.at)[..., None] * problem.in_w + x.at[..., None, :]
    per_class = problem.out_channels // problem.classes
    return (
        torch.where(finite, image, 0).long()[:, None, None, None, None, None],
        torch.arange(problem.classes, device=device)[:, None, None, None, None],
        torch.arange(per_class, device=device)[:, None, None, None],
        pixel[:, :, None],
    )


def _flat_shape(problem: DeformRoIPoolProblem) -> tuple[int, ...]:
    """(N, K, C, cells * H * W)"""
    per_class = problem.out_channels // problem.classes
    pixels = problem.group_h * problem.group_w * problem.in_h * problem.in_w
    return (problem.batch, problem.classes, per_class, pixels)


def _pixels(problem: DeformRoIPoolProblem, x: Tensor, b: _Bins) -> Tensor:
    """The touched pixels, (R, K, C, P, Y, X); 0 where there is no touch."""
    touches = (b.y.touches[..., :, None] & b.x.touches[..., None, :])[:, :, None]
    return torch.where(touches, x.reshape(_flat_shape(problem))[b.place], 0)


def _by_bin(problem: DeformRoIPoolProblem, mask: Tensor) -> Tensor:
    """The mask, (R, 1, P)."""
    return mask.reshape(problem.rois, 1, problem.out_h * problem.out_w)


def _part_of_bin(problem: DeformRoIPoolProblem, device: torch.device) -> Tensor:
    bins = torch.arange(problem.out_h * problem.out_w, device=device)
    row, column = bins // problem.out_w, bins % problem.out_w
    part = row * problem.part_h // problem.out_h * problem.part_w
    return part + column * problem.part_w // problem.out_w
