"""A second oracle, built differently from `dcnlib.backends.reference`, to check that one.

No floor, no corners, no padding: the papers' sum over every pixel q of the image, taken literally.
For one image, tap and offset group the samples are value = Hy @ x @ Hx^T with dense matrices of
hats Hy[p, q] = max(0, 1 - |q_y - p_y|); slopes use the hat's right-hand derivative, the gradient of
the input the transposed matrices. Weight groups are written out as one dense weight with zeros.
Finite data and tiny problems only.
"""

from __future__ import annotations

import numpy as np

from dcnlib.testing import OUTPUTS, Call


def run(call: Call) -> dict[str, np.ndarray | None]:
    """What `Call.run` gives, in float64."""
    x, offset, weight, bias, mask, dy = (
        None if array is None else array.astype(np.float64) for array in call[:6]
    )
    batch, channels, height, width = x.shape
    out_channels, _, kernel_h, kernel_w = weight.shape
    out_h, out_w = dy.shape[2:]
    dense = _dense(weight, call.groups, channels)
    y = np.zeros(dy.shape) + (0.0 if bias is None else bias[:, None, None])
    dx, doffset, dmask = np.zeros(x.shape), np.zeros(offset.shape), np.zeros(_mask_shape(offset))
    ddense = np.zeros(dense.shape)

    for n in range(batch):
        for c in range(channels):
            group = c * call.offset_groups // channels
            for i in range(kernel_h):
                for j in range(kernel_w):
                    k = (group * kernel_h + i) * kernel_w + j
                    m = np.ones((out_h, out_w)) if mask is None else mask[n, k]
                    top = np.arange(out_h)[:, None] * call.stride[0] - call.padding[0]
                    left = np.arange(out_w) * call.stride[1] - call.padding[2]
                    p_y = (top + i * call.dilation[0] + offset[n, 2 * k]).ravel()
                    p_x = (left + j * call.dilation[1] + offset[n, 2 * k + 1]).ravel()
                    hats_y, rises_y = _hats(p_y, height)
                    hats_x, rises_x = _hats(p_x, width)

                    def sample(by_y, by_x, image=x[n, c]):
                        return ((by_y @ image) * by_x).sum(axis=1).reshape(out_h, out_w)

                    s = sample(hats_y, hats_x)
                    y[n] += dense[:, c, i, j, None, None] * m * s
                    ddense[:, c, i, j] += (dy[n] * m * s).sum(axis=(1, 2))
                    upstream = np.tensordot(dense[:, c, i, j], dy[n], 1)
                    dmask[n, k] += upstream * s
                    doffset[n, 2 * k] += upstream * m * sample(rises_y, hats_x)
                    doffset[n, 2 * k + 1] += upstream * m * sample(hats_y, rises_x)
                    dx[n, c] += hats_y.T @ ((upstream * m).ravel()[:, None] * hats_x)

    dweight = np.stack(
        [
            ddense[o, _channels_of(o, out_channels, channels, call.groups)]
            for o in range(out_channels)
        ]
    )
    dbias = None if bias is None else dy.sum(axis=(0, 2, 3))
    results = (y, dx, doffset, dweight, dbias, None if mask is None else dmask)
    return dict(zip(OUTPUTS, results, strict=True))


def _hats(positions, size):
    """max(0, 1 - |q - p|) and its right-hand derivative by p; (positions, size)."""
    distance = positions[:, None] - np.arange(size)
    rising = ((-1 <= distance) & (distance < 0)).astype(np.float64)
    falling = ((0 <= distance) & (distance < 1)).astype(np.float64)
    return np.maximum(0.0, 1.0 - np.abs(distance)), rising - falling


def _dense(weight, groups, channels):
    """The weight of the same convolution without groups."""
    out_channels = len(weight)
    dense = np.zeros((out_channels, channels, *weight.shape[2:]))
    for o in range(out_channels):
        dense[o, _channels_of(o, out_channels, channels, groups)] = weight[o]
    return dense


def _channels_of(o, out_channels, channels, groups):
    per_group = channels // groups
    group = o * groups // out_channels
    return slice(group * per_group, (group + 1) * per_group)


def _mask_shape(offset):
    batch, twice, out_h, out_w = offset.shape
    return (batch, twice // 2, out_h, out_w)
