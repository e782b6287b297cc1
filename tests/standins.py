"""Layers of torchvision and mmcv, which are seldom installed: their attributes, names and values.

Composed of torch's `grid_sample`, sample by sample, and so independent of this library. Their modules'
names are those of the originals.
"""

import itertools
import math

import torch
from torch import nn
from torch.nn.functional import grid_sample


def sample(x, rows, columns, padding_mode="zeros"):
    """x (N, C, H, W) at positions in pixels, (N, ...) -> (N, C, ...)."""
    height, width = x.shape[2:]
    # With align_corners=False -1 and 1 are half a pixel beyond the first and the last pixel.
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    found = grid_sample(
        x, grid.flatten(1, -2)[:, None], padding_mode=padding_mode, align_corners=False
    )
    return found.reshape(*found.shape[:2], *rows.shape[1:])


def convolve(x, offset, weight, bias, stride, padding, dilation, groups, offset_groups, mask=None):
    """Deformable convolution, one tap of one offset group after the other."""
    out_channels, _, kernel_h, kernel_w = weight.shape
    batch, channels, out_h, out_w = x.shape[0], x.shape[1], *offset.shape[2:]
    per_group = channels // offset_groups
    columns = []
    for g in range(offset_groups):
        part = x[:, g * per_group : (g + 1) * per_group]
        for u in range(kernel_h):
            for v in range(kernel_w):
                k = (g * kernel_h + u) * kernel_w + v
                i = torch.arange(out_h, dtype=x.dtype)[:, None] * stride[0] - padding[0]
                j = torch.arange(out_w, dtype=x.dtype) * stride[1] - padding[1]
                rows = i + u * dilation[0] + offset[:, 2 * k]
                found = sample(part, rows, j + v * dilation[1] + offset[:, 2 * k + 1])
                columns.append(found if mask is None else found * mask[:, k, None])
    # (N, G, K, C/G, OH, OW) -> (N, C, K, OH, OW)
    taps = kernel_h * kernel_w
    gathered = torch.stack(columns, 1).unflatten(1, (offset_groups, taps)).transpose(2, 3)
    gathered = gathered.reshape(batch, groups, channels // groups, taps, out_h, out_w)
    kernel = weight.reshape(groups, out_channels // groups, channels // groups, taps)
    y = torch.einsum("ngckhw,gock->ngohw", gathered, kernel).flatten(1, 2)
    return y if bias is None else y + bias[:, None, None]


class _Convolution(nn.Module):
    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
        bias=True, deform_groups=None,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            v if isinstance(v, tuple) else (v, v) for v in (kernel_size, stride, padding, dilation)
        )
        if deform_groups is not None:
            self.deform_groups = deform_groups
        weight = torch.randn(out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(weight)
        if bias:
            self.bias = nn.Parameter(torch.randn(out_channels))
        else:
            self.register_parameter("bias", None)

    def predictor(self, channels):
        layer = nn.Conv2d(
            self.in_channels, channels * self.deform_groups * math.prod(self.kernel_size),
            self.kernel_size, self.stride, self.padding, self.dilation,
        )  # fmt: skip
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def convolve(self, x, offset, mask=None, groups=None):
        groups = groups or self.deform_groups
        return convolve(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation,
            self.groups, groups, mask,
        )  # fmt: skip


class TorchvisionDeformConv2d(_Convolution):
    def forward(self, input, offset, mask=None):
        groups = offset.shape[1] // (2 * math.prod(self.kernel_size))
        return self.convolve(input, offset, mask, groups)


class DeformConv2d(_Convolution):
    def __init__(self, *arguments, deform_groups=1, **keywords):
        super().__init__(*arguments, bias=False, deform_groups=deform_groups, **keywords)

    def forward(self, x, offset):
        return self.convolve(x, offset)


class DeformConv2dPack(DeformConv2d):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.conv_offset = self.predictor(2)

    def forward(self, x):
        return self.convolve(x, self.conv_offset(x))


class ModulatedDeformConv2d(_Convolution):
    def __init__(self, *arguments, deform_groups=1, **keywords):
        super().__init__(*arguments, deform_groups=deform_groups, **keywords)

    def forward(self, x, offset, mask):
        return self.convolve(x, offset, mask)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.conv_offset = self.predictor(3)

    def forward(self, x):
        first, second, mask = self.conv_offset(x).chunk(3, 1)
        return self.convolve(x, torch.cat([first, second], 1), mask.sigmoid())


class DeformRoIPool(nn.Module):
    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.gamma = sampling_ratio, gamma

    def forward(self, input, rois, offset=None):
        return torch.stack([self.pool(input, *roi) for roi in self.with_offset(rois, offset)])

    def with_offset(self, rois, offset):
        none = torch.zeros(2, *self.output_size, dtype=rois.dtype)
        return [(roi, none if offset is None else offset[r]) for r, roi in enumerate(rois)]

    def pool(self, input, roi, offset):
        """Means of a grid of samples a bin; none is outside."""
        x1, y1, x2, y2 = (roi[1:] * self.spatial_scale - 0.5).tolist()
        bins_h, bins_w = self.output_size
        n_y = self.sampling_ratio or math.ceil((y2 - y1) / bins_h)
        n_x = self.sampling_ratio or math.ceil((x2 - x1) / bins_w)
        part = torch.arange(bins_h * n_y, dtype=input.dtype)
        rows = y1 + (part // n_y + (part % n_y + 0.5) / n_y) * (y2 - y1) / bins_h
        part = torch.arange(bins_w * n_x, dtype=input.dtype)
        columns = x1 + (part // n_x + (part % n_x + 0.5) / n_x) * (x2 - x1) / bins_w
        move_x, move_y = offset.repeat_interleave(n_y, 1).repeat_interleave(n_x, 2) * self.gamma
        image = input[int(roi[0])][None]
        rows = rows[:, None] + (y2 - y1) * move_y
        columns = columns + (x2 - x1) * move_x
        assert 0 <= rows.min() and rows.max() < image.shape[2] - 1
        found = sample(image, rows[None], columns[None])
        return nn.functional.avg_pool2d(found, (n_y, n_x))[0]


class DeformRoIPoolPack(DeformRoIPool):
    def __init__(self, output_size, output_channels, deform_fc_channels=1024, *rest):
        super().__init__(output_size, *rest)
        self.output_channels, self.deform_fc_channels = output_channels, deform_fc_channels
        self.offset_fc = self.predictor(2, 2)

    def predictor(self, planes, hidden):
        bins, width = math.prod(self.output_size), self.deform_fc_channels
        sizes = [bins * self.output_channels, *[width] * hidden, planes * bins]
        steps = []
        for before, after in itertools.pairwise(sizes):
            steps += [nn.Linear(before, after), nn.ReLU()]
        nn.init.zeros_(steps[-2].weight)
        nn.init.zeros_(steps[-2].bias)
        return nn.Sequential(*steps[:-1])

    def forward(self, input, rois):
        plain = super().forward(input, rois).flatten(1)
        return super().forward(input, rois, self.offset_fc(plain).view(-1, 2, *self.output_size))


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.mask_fc = nn.Sequential(*self.predictor(1, 1), nn.Sigmoid())

    def forward(self, input, rois):
        plain = DeformRoIPool.forward(self, input, rois).flatten(1)
        mask = self.mask_fc(plain).view(-1, 1, *self.output_size)
        return super().forward(input, rois) * mask


TorchvisionDeformConv2d.__name__ = "DeformConv2d"
TorchvisionDeformConv2d.__module__ = "torchvision.ops.deform_conv"
for layer in (
    DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d, ModulatedDeformConv2dPack,
    DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack,
):  # fmt: skip
    layer.__module__ = "mmcv.ops.some_file"
