r"""Deformable convolution.

    y(p0) = b + sum_k w_k * m_k * x(p0 + p_k + dp_k)                    Dai et al. 2017, equation 2;
                                                                       Zhu et al. 2019, equation 1
    x(p)  = sum_q G(q, p) x(q),   G(q, p) = g(q_y, p_y) g(q_x, p_x)     equations 3 and 4
    g(a, b) = max(0, 1 - |a - b|)

`columns`, `convolve` and `differentiate` compute in the dtype they get.

Names: image arrays are C, H, W; taps k = (i, j) row by row; output pixels p0 flattened to P.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._problem import DeformConv2dProblem


@np.errstate(all="ignore")  # infinities and NaN are values here
def forward(problem, input, offset, weight, bias, mask, output, num_threads=None) -> None:
    """Fill `output`; operands as in `dcnlib.backends`."""
    weight = _float64(weight)
    bias = np.zeros(problem.out_channels) if bias is None else _float64(bias)
    for n in range(problem.batch):
        x, offset_n, mask_n = _image(n, input, offset, mask)
        y = convolve(problem, x, offset_n, weight, bias, mask_n)
        output[n] = rounded(y, output.dtype)


@np.errstate(all="ignore")
def backward(problem, grad_output, input, offset, weight, mask, grads, num_threads=None) -> None:
    """Fill the wanted `grads`; operands as in `dcnlib.backends`."""
    weight = _float64(weight)
    grad_weight = np.zeros(problem.weight_shape)
    grad_bias = np.zeros(problem.out_channels)
    grad_input, grad_offset, out_weight, out_bias, grad_mask = grads
    for n in range(problem.batch):
        x, offset_n, mask_n = _image(n, input, offset, mask)
        grad = differentiate(problem, _float64(grad_output[n]), x, offset_n, weight, mask_n)
        grad_weight += grad.weight
        grad_bias += grad.bias
        for out, value in (
            (grad_input, grad.input),
            (grad_offset, grad.offset),
            (grad_mask, grad.mask),
        ):
            if out is not None:
                out[n] = rounded(value, out.dtype)
    for out, value in ((out_weight, grad_weight), (out_bias, grad_bias)):
        if out is not None:
            out[...] = rounded(value, out.dtype)


class Gradients(NamedTuple):
    """The five gradients of one image's loss."""

    input: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    mask: np.ndarray


class Columns(NamedTuple):
    """Samples s = x(p) of one image and their slopes, each (C, K, P), and where they came from."""

    value: np.ndarray
    slope_y: np.ndarray
    slope_x: np.ndarray
    corners: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    """For each of the four q around p: its row and column in the padded image, and G(q, p)
    where p lies inside (0 elsewhere); (G, K, P)."""
    inside: np.ndarray
    has_value: np.ndarray
    """Where p is inside or NaN; (G, K, P). Elsewhere the sample is 0, whatever happens to it."""
    has_slope: np.ndarray


def columns(problem: DeformConv2dProblem, x: np.ndarray, offset: np.ndarray) -> Columns:
    """Sample every tap: x(p) and its derivatives by p_y and p_x, for all channels."""
    g, k = problem.offset_groups, problem.taps
    i, j = np.divmod(np.arange(k)[:, None], problem.kernel_w)  # (K, 1)
    oh, ow = np.divmod(np.arange(problem.out_h * problem.out_w), problem.out_w)  # (P,)
    offset = offset.reshape(g, k, 2, -1)

    # p = p0 + p_k + dp_k, as cell (whole pixel, floor) and fraction l. The fraction comes from the
    # offset alone: it is as precise at column 4000 as at column 0.
    cell_y, ly, in_cells_y, inside_y = _position(
        oh * problem.stride_h - problem.pad_top + i * problem.dilation_h,
        offset[:, :, 0],
        problem.in_h,
    )
    cell_x, lx, in_cells_x, inside_x = _position(
        ow * problem.stride_w - problem.pad_left + j * problem.dilation_w,
        offset[:, :, 1],
        problem.in_w,
    )
    in_cells, inside = in_cells_y & in_cells_x, inside_y & inside_x
    nan = np.isnan(offset[:, :, 0]) | np.isnan(offset[:, :, 1])
    has_value, has_slope = inside | nan, in_cells | nan

    # Zeros all round stand for everything outside the image: cell -1 is row 0 of the padded image.
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    row, column = np.where(in_cells, cell_y + 1, 0), np.where(in_cells, cell_x + 1, 0)
    v00, v01, v10, v11 = (
        _read(padded, row + down, column + right, g) for down in (0, 1) for right in (0, 1)
    )

    corners = [
        (row + down, column + right, np.where(inside, gy * gx, 0))
        for down, gy in ((0, 1 - ly), (1, ly))
        for right, gx in ((0, 1 - lx), (1, lx))
    ]

    # The channels of an offset group share its positions: (G, 1, K, P) against (G, C/G, K, P).
    ly, lx, in_cells, in_value, nan = (a[:, None] for a in (ly, lx, in_cells, inside, nan))
    value = (1 - ly) * ((1 - lx) * v00 + lx * v01) + ly * ((1 - lx) * v10 + lx * v11)
    slope_y = (1 - lx) * (v10 - v00) + lx * (v11 - v01)  # right-hand at integer positions:
    slope_x = (1 - ly) * (v01 - v00) + ly * (v11 - v10)  # the cell of floor(p) decides
    samples = (
        np.where(nan, x.dtype.type(np.nan), np.where(where, a, 0)).reshape(len(x), k, -1)
        for a, where in ((value, in_value), (slope_y, in_cells), (slope_x, in_cells))
    )
    return Columns(*samples, corners, inside, has_value, has_slope)


def convolve(problem, x, offset, weight, bias, mask) -> np.ndarray:
    """y(p0) = b + sum_{c, k} w * m * s, for one image; (O, OH, OW)."""
    s = columns(problem, x, offset).value
    modulated = _per_channel(problem, mask) * s
    # A weight group reads its own C/groups channels: (groups, O/groups, C*K/groups) per group.
    w = weight.reshape(problem.groups, problem.out_channels // problem.groups, -1)
    y = w @ modulated.reshape(problem.groups, w.shape[2], -1)
    return y.reshape(problem.output_shape[1:]) + bias[:, None, None]


def differentiate(problem, grad_output, x, offset, weight, mask) -> Gradients:
    """All five gradients of sum(grad_output * y), for one image."""
    channels, k, g = problem.in_channels, problem.taps, problem.offset_groups
    s, slope_y, slope_x, corners, inside, has_value, has_slope = columns(problem, x, offset)
    m = _per_channel(problem, mask)
    w = weight.reshape(problem.groups, problem.out_channels // problem.groups, -1)
    dy = grad_output.reshape(problem.groups, w.shape[1], -1)

    # dL/dw = sum_{p0} dy * m * s,   dL/db = sum_{p0} dy
    modulated = (m * s).reshape(problem.groups, w.shape[2], -1)
    grad_weight = dy @ modulated.swapaxes(1, 2)
    grad_bias = dy.sum(axis=2)

    # What reaches a modulated sample: dL/d(m s) = sum_o dy * w
    upstream = (w.swapaxes(1, 2) @ dy).reshape(channels, k, -1)

    # dL/dm = sum_c upstream * s,   dL/d(dp) = sum_c upstream * m * ds/dp;  c within its group
    # A sample outside does not depend on them: exactly 0, not 0 times what may be infinite.
    def over_channels(values, where):
        return np.where(where, values.reshape(g, channels // g, k, -1).sum(axis=1), 0)

    grad_mask = over_channels(upstream * s, has_value)
    grad_sample = upstream * m
    grad_offset = np.stack(
        [over_channels(grad_sample * slope, has_slope) for slope in (slope_y, slope_x)], axis=2
    )

    # dL/dx(q) = sum over the samples p around q of G(q, p) * upstream * m
    padded = np.zeros((channels, problem.in_h + 2, problem.in_w + 2), x.dtype)
    grad_sample = grad_sample.reshape(g, channels // g, k, -1)
    channel = np.arange(channels).reshape(g, -1, 1)
    for row, column, weight_of_q in corners:
        for group in range(g):
            here = inside[group]
            np.add.at(
                padded,
                (channel[group], row[group][here], column[group][here]),
                grad_sample[group][:, here] * weight_of_q[group][here],
            )

    return Gradients(
        padded[:, 1:-1, 1:-1],
        grad_offset.reshape(problem.offset_shape[1:]),
        grad_weight.reshape(problem.weight_shape),
        grad_bias.reshape(-1),
        grad_mask.reshape(problem.mask_shape[1:]),
    )


@np.errstate(over="ignore")  # an infinity is the right answer
def rounded(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` in `dtype`, rounded once, to nearest, ties to even."""
    if dtype.name == "bfloat16":
        value = on_bfloat16_grid(value)  # the cast alone would go through float32 and round twice
    return value.astype(dtype)


def on_bfloat16_grid(value: np.ndarray) -> np.ndarray:
    """`value` rounded to the 8 bits of a bfloat16, or to its smallest subnormal, 2**-133."""
    unit = np.maximum(np.frexp(value)[1] - 8, -133)
    return np.ldexp(np.rint(np.ldexp(value, -unit)), unit)


def _position(base, offset, size):
    """One axis of p = base + offset: floor(p), p - floor(p), and two conditions on p.

    The conditions are -1 <= p < size, where p has a cell and hence slopes, and -1 < p < size, where
    it has a value. Both are decided on floating-point numbers, before the conversion to an
    integer, and are false for NaN.
    """
    floor = np.floor(offset)
    in_cells = (floor >= -1 - base) & (floor < size - base)
    fraction = np.subtract(offset, floor, where=in_cells, out=np.zeros_like(offset))
    cell = base + np.where(in_cells, floor, 0).astype(np.int64)
    return cell, fraction, in_cells, in_cells & ((cell > -1) | (fraction > 0))


def _read(padded, row, column, offset_groups):
    """padded[c, row, column] with the row and column of c's offset group; (G, C/G, K, P)."""
    channels, _, width = padded.shape
    flat = padded.reshape(offset_groups, channels // offset_groups, -1)
    return np.stack([flat[g][:, row[g] * width + column[g]] for g in range(offset_groups)])


def _per_channel(problem, mask):
    """The mask of each channel, (C, K, P); 1 without a mask."""
    if mask is None:
        return 1
    m = mask.reshape(problem.offset_groups, problem.taps, -1)
    return np.repeat(m, problem.in_channels // problem.offset_groups, axis=0)


def _float64(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _image(n, input, offset, mask):
    """Image n of the batch with its offsets and mask, as float64."""
    return (
        _float64(input[n]),
        _float64(offset[n]),
        None if mask is None else _float64(mask[n]),
    )
