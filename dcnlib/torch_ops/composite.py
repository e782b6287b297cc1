"""The operator and its derivative in torch's own differentiable operators: exact, slow, large.

What torch differentiates when more is asked for than first derivatives in reverse mode: double
backward, forward mode, and whatever is made of them. Reads like
`backends/reference/deform_conv2d.py`, with a batch axis in front; the 16-bit types compute in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._problem import DeformConv2dProblem


class _Samples(NamedTuple):
    """Samples s = x(p) and their slopes, each (N, G, C/G, K, P), and where they came from."""

    value: Tensor
    slope_y: Tensor
    slope_x: Tensor
    corners: list[tuple[Tensor, Tensor]]
    """For each of the four q around p: place in the padded image and G(q, p), (N, G, 1, K, P)."""
    inside: Tensor
    has_value: Tensor
    """Where p is inside or NaN; (N, G, 1, K, P). Elsewhere the sample is 0, whatever it meets."""
    has_slope: Tensor


def forward(
    problem: DeformConv2dProblem,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """y(p0) = b + sum_{c, k} w * m * s"""
    x, offset, weight, bias, mask = _wide(input, offset, weight, bias, mask)
    s = _samples(problem, x, offset).value
    y = _by_group(problem, weight) @ _rows(problem, _modulated(mask, s))
    y = y.reshape(problem.output_shape)
    if bias is not None:
        y = y + bias[:, None, None]
    return y.reshape(problem.unbatch(problem.output_shape)).to(input.dtype)


def backward(
    problem: DeformConv2dProblem,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """The wanted gradients of sum(grad_output * y); None for the others."""
    dy, x, offset, weight, mask = _wide(grad_output, input, offset, weight, mask)
    samples = _samples(problem, x, offset)
    s = samples.value
    dy = dy.reshape(
        problem.batch,
        problem.groups,
        problem.out_channels // problem.groups,
        problem.out_h * problem.out_w,
    )
    upstream = (_by_group(problem, weight).mT @ dy).reshape(s.shape)  # dL/d(m s)
    grad_sample = _modulated(mask, upstream)

    def grad_input():
        return _spread(problem, samples, grad_sample)

    def grad_offset():
        slopes = (samples.slope_y, samples.slope_x)
        where = samples.has_slope
        return torch.stack([_over_channels(grad_sample * slope, where) for slope in slopes], 3)

    def grad_weight():
        return (dy @ _rows(problem, _modulated(mask, s)).mT).sum(0)

    def grad_bias():
        return dy.sum((0, 3))

    def grad_mask():
        # As in _spread: 0 at exactly -1, but not its derivative.
        products = upstream * s
        some = samples.has_slope & products.sum(2, keepdim=True).isfinite()
        return _over_channels(products, samples.has_value | some)

    formulas = (
        (grad_input, problem.unbatch(problem.input_shape)),
        (grad_offset, problem.unbatch(problem.offset_shape)),
        (grad_weight, problem.weight_shape),
        (grad_bias, problem.bias_shape),
        (grad_mask, problem.unbatch(problem.mask_shape)),
    )
    return [
        formula().reshape(shape).to(input.dtype) if is_wanted else None
        for (formula, shape), is_wanted in zip(formulas, output_mask, strict=True)
    ]


def _samples(problem: DeformConv2dProblem, x: Tensor, offset: Tensor) -> _Samples:
    """x(p) at every tap, and its derivatives by p_y and p_x."""
    n, g, k = problem.batch, problem.offset_groups, problem.taps
    tap = torch.arange(k, device=x.device)[:, None]
    i, j = tap // problem.kernel_w, tap % problem.kernel_w
    pixel = torch.arange(problem.out_h * problem.out_w, device=x.device)
    oh, ow = pixel // problem.out_w, pixel % problem.out_w
    offset = offset.reshape(n, g, 1, k, 2, problem.out_h * problem.out_w)
    offset_y, offset_x = offset.unbind(4)

    # The fraction of a position comes from the offset alone; see the reference.
    row, ly, in_cells_y, inside_y = _position(
        oh * problem.stride_h - problem.pad_top + i * problem.dilation_h, offset_y, problem.in_h
    )
    column, lx, in_cells_x, inside_x = _position(
        ow * problem.stride_w - problem.pad_left + j * problem.dilation_w, offset_x, problem.in_w
    )
    in_cells, inside = in_cells_y & in_cells_x, inside_y & inside_x
    nan = offset_y.isnan() | offset_x.isnan()

    # Zeros all round stand for everything outside the image.
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    width = problem.in_w + 2
    padded = padded.reshape(n, g, problem.in_channels // g, (problem.in_h + 2) * width)
    place = torch.where(in_cells, (row + 1) * width + column + 1, 0)
    places = [place + down * width + right for down in (0, 1) for right in (0, 1)]
    v00, v01, v10, v11 = pixels = [_read(padded, q) for q in places]
    # At exactly -1 there are slopes but the value is 0, even next to an infinite pixel.
    u00, u01, u10, u11 = (torch.where(inside | v.isfinite(), v, 0) for v in pixels)

    value = (1 - ly) * ((1 - lx) * u00 + lx * u01) + ly * ((1 - lx) * u10 + lx * u11)
    slope_y = (1 - lx) * (v10 - v00) + lx * (v11 - v01)  # right-hand at integer positions
    slope_x = (1 - ly) * (v01 - v00) + ly * (v11 - v10)
    not_a_number = (offset_y + offset_x).square()  # and so is its derivative
    value, slope_y, slope_x = (
        torch.where(nan, not_a_number, torch.where(in_cells, a, 0))
        for a in (value, slope_y, slope_x)
    )
    weights = [gy * gx for gy in (1 - ly, ly) for gx in (1 - lx, lx)]
    corners = list(zip(places, weights, strict=True))
    return _Samples(value, slope_y, slope_x, corners, inside, inside | nan, in_cells | nan)


def _position(base: Tensor, offset: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One axis of p = base + offset: floor(p), p - floor(p), and -1 <= p < size, -1 < p < size."""
    floor = offset.detach().floor()
    in_cells = (floor >= -1 - base) & (floor < size - base)
    fraction = torch.where(in_cells, offset - floor, 0)
    cell = base + torch.where(in_cells, floor, 0).long()
    return cell, fraction, in_cells, in_cells & ((cell > -1) | (fraction > 0))


def _read(padded: Tensor, place: Tensor) -> Tensor:
    """The pixels at `place`, the same in all channels of an offset group; (N, G, C/G, K, P)."""
    n, g, channels, _ = padded.shape
    return padded.gather(3, _index(place, channels)).reshape(n, g, channels, *place.shape[3:])


def _spread(problem: DeformConv2dProblem, samples: _Samples, grad_sample: Tensor) -> Tensor:
    """dL/dx(q) = sum over the samples p around q of G(q, p) * dL/ds"""
    n, g, channels = grad_sample.shape[:3]
    height, width = problem.in_h + 2, problem.in_w + 2
    padded = grad_sample.new_zeros(n, g, channels, height * width)
    for place, weight in samples.corners:
        # At exactly -1 a share is 0, but its derivative is not; and 0 times infinity is no number.
        grad = grad_sample * weight
        grad = torch.where(samples.inside | (samples.has_slope & grad.isfinite()), grad, 0)
        padded = padded.scatter_add(3, _index(place, channels), grad.flatten(3))
    return padded.reshape(n, problem.in_channels, height, width)[:, :, 1:-1, 1:-1]


def _index(place: Tensor, channels: int) -> Tensor:
    """`place` for every channel, (N, G, C/G, K * P)."""
    n, g, _, k, p = place.shape
    return place.reshape(n, g, 1, k * p).expand(n, g, channels, k * p)


def _modulated(mask: Tensor | None, values: Tensor) -> Tensor:
    """m * values, each offset group's mask for all of its channels."""
    if mask is None:
        return values
    n, g, _, k, p = values.shape
    return mask.reshape(n, g, 1, k, p) * values


def _over_channels(values: Tensor, where: Tensor) -> Tensor:
    """The sum over an offset group's channels, (N, G, K, P); exactly 0 elsewhere."""
    return torch.where(where[:, :, 0], values.sum(2), 0)


def _by_group(problem: DeformConv2dProblem, weight: Tensor) -> Tensor:
    """(groups, O/groups, C/groups * K)"""
    columns = problem.in_channels // problem.groups * problem.taps
    return weight.reshape(problem.groups, problem.out_channels // problem.groups, columns)


def _rows(problem: DeformConv2dProblem, values: Tensor) -> Tensor:
    """(N, groups, C/groups * K, P)"""
    columns = problem.in_channels // problem.groups * problem.taps
    return values.reshape(problem.batch, problem.groups, columns, values.shape[-1])


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the dtype of the arithmetic."""
    return [
        t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t
        for t in tensors
    ]
