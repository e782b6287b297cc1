"""``mmcv.ops`` on any device: its deformable convolutions and RoI pooling by their names.

Programs written for mmcv run with the import changed, on a CPU too, and load its checkpoints. Values
are mmcv's, initial ones as well, and so is the offset's gradient: 0 where a sample lies exactly at
row or column -1, as all those beside the image do in an untrained layer with padding 1. (The rest of
`dcnlib` has the right-hand derivative there, as torchvision, and so have modules that
``torch.jit.trace`` made.) Unlike mmcv nothing is cast silently.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import nn as torch_nn

from .. import nn
from .._problem import integer, pair, value_error
from ..functional import deform_conv2d as _deform_conv2d
from ..nn import DeformRoIPool, DeformRoIPoolPack, ModulatedDeformRoIPoolPack
from ..pooling import deform_roi_pool as _deform_roi_pool
from ..torch_ops import autograd

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "deform_conv2d",
    "deform_roi_pool",
    "modulated_deform_conv2d",
]

_OP = "deform_conv2d"
_Pair = int | tuple[int, int]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """DCNv1 with the arguments of ``mmcv.ops.deform_conv2d``.

    Parameters
    ----------
    input : Tensor of shape (N, in_channels, H, W)
    offset : Tensor of shape (N, 2*deform_groups*KH*KW, OH, OW)
    weight : Tensor of shape (out_channels, in_channels/groups, KH, KW)
    stride, padding, dilation : int or pair
    groups, deform_groups : int
    bias : False
        There is none, as in mmcv.
    im2col_step : int
        Has no effect: any batch is fine.

    Returns
    -------
    Tensor of shape (N, out_channels, OH, OW)

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `dcnlib.deform_conv2d`; messages use its names of the arguments.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat import mmcv
    >>> x, weight = torch.rand(2, 4, 9, 9), torch.rand(6, 4, 3, 3)
    >>> mmcv.deform_conv2d(x, torch.rand(2, 18, 7, 7), weight).shape
    torch.Size([2, 6, 7, 7])
    """
    _no_bias(bias)
    return _convolve(
        input, offset, weight, None, stride, padding, dilation, None, groups, deform_groups
    )


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """DCNv2 with the arguments of ``mmcv.ops.modulated_deform_conv2d``.

    Parameters
    ----------
    input : Tensor of shape (N, in_channels, H, W)
    offset : Tensor of shape (N, 2*deform_groups*KH*KW, OH, OW)
    mask : Tensor of shape (N, deform_groups*KH*KW, OH, OW)
    weight : Tensor of shape (out_channels, in_channels/groups, KH, KW)
    bias : Tensor of shape (out_channels,), optional
    stride, padding, dilation : int or pair
    groups, deform_groups : int

    Returns
    -------
    Tensor of shape (N, out_channels, OH, OW)

    Raises
    ------
    TypeError, ValueError, RuntimeError, MemoryError
        As `dcnlib.deform_conv2d`; messages use its names of the arguments.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat import mmcv
    >>> x, weight = torch.rand(2, 4, 9, 9), torch.rand(6, 4, 3, 3)
    >>> offset, mask = torch.rand(2, 18, 7, 7), torch.rand(2, 9, 7, 7)
    >>> mmcv.modulated_deform_conv2d(x, offset, mask, weight).shape
    torch.Size([2, 6, 7, 7])
    """
    return _convolve(
        input, offset, weight, bias, stride, padding, dilation, mask, groups, deform_groups
    )


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: _Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """`dcnlib.deform_roi_pool` with the arguments of ``mmcv.ops.deform_roi_pool``, which are the same.

    Parameters
    ----------
    input : Tensor of shape (N, C, H, W)
    rois : Tensor of shape (R, 5)
        Image number, x1, y1, x2, y2.
    offset : Tensor of shape (R, 2, PH, PW), or None
    output_size : int or (PH, PW)
    spatial_scale, gamma : float
    sampling_ratio : int

    Returns
    -------
    Tensor of shape (R, C, PH, PW)

    Notes
    -----
    Where a sample is limited to the image, the offset's gradient is the exact one, not mmcv's.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat import mmcv
    >>> rois = torch.tensor([[0, 2.0, 2.0, 8.0, 9.0]])
    >>> mmcv.deform_roi_pool(torch.rand(1, 4, 12, 12), rois, None, 3).shape
    torch.Size([1, 4, 3, 3])
    """
    return _deform_roi_pool(input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma)


class _Layer(nn.DeformConv2d):
    """What mmcv's layers share: `deform_groups`, and its gradient."""

    deform_groups: int

    def _convolve(
        self, input: Tensor, offset: Tensor, mask: Tensor | None, offset_groups: int | None
    ) -> Tensor:
        return _convolve(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask,
            self.groups, self.deform_groups,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments, the default ones left out."""
        text = super().extra_repr()
        if self.deform_groups == 1 or "deform_groups" in text:
            return text
        return f"{text}, deform_groups={self.deform_groups}"


class DeformConv2d(_Layer):
    """The layer ``mmcv.ops.DeformConv2d``: DCNv1 without a bias.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, padding, dilation : int or pair
    groups, deform_groups : int
    bias : False
    im2col_step : int
        Has no effect.

    Attributes
    ----------
    weight : Parameter of shape (out_channels, in_channels/groups, KH, KW)
        Drawn by ``kaiming_uniform_`` for ReLU.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat.mmcv import DeformConv2d
    >>> layer = DeformConv2d(4, 6, 3, padding=1, deform_groups=2)
    >>> layer(torch.rand(2, 4, 9, 9), torch.rand(2, 36, 9, 9)).shape
    torch.Size([2, 6, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        _no_bias(bias)
        padding = pair(_OP, "padding", padding, 0)
        nn.DeformConv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False
        )
        self.deform_groups = integer(_OP, "deform_groups", deform_groups, 1)

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        torch_nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        """`deform_conv2d` with the layer's weight."""
        return self._convolve(x, offset, None, None)


class DeformConv2dPack(DeformConv2d, nn.DeformConv2dPack):
    """The layer ``mmcv.ops.DeformConv2dPack``: DCNv1 that predicts its offsets.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups
        As for `DeformConv2d`.
    bias, im2col_step
        As for `DeformConv2d`.

    Attributes
    ----------
    weight
        As that of `DeformConv2d`.
    conv_offset : torch.nn.Conv2d
        The predictor, zero at the beginning.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat.mmcv import DeformConv2dPack
    >>> DeformConv2dPack(4, 6, 3, padding=1)(torch.rand(2, 4, 9, 9)).shape
    torch.Size([2, 6, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        _no_bias(bias)
        nn.DeformConv2dPack.__init__(
            self, in_channels, out_channels, kernel_size, stride, pair(_OP, "padding", padding, 0),
            dilation, groups, deform_groups, False,
        )  # fmt: skip

    def init_offset(self) -> None:
        """The predictor back to zero."""
        _to_zero(self.conv_offset)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The convolution of `x` at the positions predicted from it."""
        return nn.DeformConv2dPack.forward(self, x)


class ModulatedDeformConv2d(_Layer):
    """The layer ``mmcv.ops.ModulatedDeformConv2d``: DCNv2.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, padding, dilation : int or pair
    groups, deform_groups : int
    bias : bool

    Attributes
    ----------
    weight : Parameter of shape (out_channels, in_channels/groups, KH, KW)
        Uniform within 1/sqrt(in_channels * KH * KW), whatever the groups.
    bias : Parameter of shape (out_channels,), or None
        Zero at the beginning.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat.mmcv import ModulatedDeformConv2d
    >>> layer = ModulatedDeformConv2d(4, 6, 3, padding=1)
    >>> layer(torch.rand(2, 4, 9, 9), torch.rand(2, 18, 9, 9), torch.rand(2, 9, 9, 9)).shape
    torch.Size([2, 6, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        padding = pair(_OP, "padding", padding, 0)
        nn.DeformConv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bool(bias),
        )  # fmt: skip
        self.deform_groups = integer(_OP, "deform_groups", deform_groups, 1)

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        torch_nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch_nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """mmcv's name of `reset_parameters`."""
        self.reset_parameters()

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """`modulated_deform_conv2d` with the layer's weight and bias."""
        return self._convolve(x, offset, mask, None)


class ModulatedDeformConv2dPack(ModulatedDeformConv2d, nn.ModulatedDeformConv2dPack):
    """The layer ``mmcv.ops.ModulatedDeformConv2dPack``: DCNv2 that predicts offsets and mask.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias
        As for `ModulatedDeformConv2d`.

    Attributes
    ----------
    weight, bias
        As those of `ModulatedDeformConv2d`.
    conv_offset : torch.nn.Conv2d
        The predictor, zero at the beginning; a sigmoid makes the mask.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat.mmcv import ModulatedDeformConv2dPack
    >>> ModulatedDeformConv2dPack(4, 6, 3, padding=1)(torch.rand(2, 4, 9, 9)).shape
    torch.Size([2, 6, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool | str = True,
    ) -> None:
        nn.ModulatedDeformConv2dPack.__init__(
            self, in_channels, out_channels, kernel_size, stride, pair(_OP, "padding", padding, 0),
            dilation, groups, deform_groups, bool(bias),
        )  # fmt: skip

    def init_weights(self) -> None:
        """New initial values, and the predictor back to zero."""
        self.reset_parameters()
        _to_zero(self.conv_offset)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The modulated convolution of `x` at the positions predicted from it."""
        return nn.ModulatedDeformConv2dPack.forward(self, x)


def _convolve(
    input, offset, weight, bias, stride, padding, dilation, mask, groups, deform_groups
) -> Tensor:
    stride, padding, dilation = (
        pair(_OP, name, value, lowest)
        for name, value, lowest in (
            ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
        )
    )  # fmt: skip
    tensors = isinstance(offset, Tensor) and isinstance(weight, Tensor) and weight.dim() == 4
    # A trace is checked without gradients, and would then be another one.
    if tensors and autograd._may_record((offset,)) and not torch.jit.is_tracing():
        offset = _held_at_the_border(offset, weight.shape[2:], stride, padding, dilation)
    return _deform_conv2d(
        input, offset, weight, bias, stride, padding, dilation, mask,
        groups=groups, offset_groups=deform_groups,
    )  # fmt: skip


def _held_at_the_border(
    offset: Tensor, kernel_size: tuple[int, ...], stride: _Pair, padding: _Pair, dilation: _Pair
) -> Tensor:
    """`offset` without a gradient where a sample lies exactly at row or column -1."""
    taps = max(math.prod(kernel_size), 1)
    if offset.dim() < 3 or offset.shape[-3] % (2 * taps) or not offset.is_floating_point():
        return offset  # the operator says what is wrong with it
    groups = offset.shape[-3] // (2 * taps)
    # -1 less the positions that offsets are added to: whole numbers, exact in float32.
    dtype = torch.promote_types(offset.dtype, torch.float32)
    row, column = (
        -1
        + padding[i]
        - dilation[i] * torch.arange(kernel_size[i], dtype=dtype, device=offset.device)[:, None]
        - stride[i] * torch.arange(offset.shape[i - 2], dtype=dtype, device=offset.device)
        for i in (0, 1)
    )
    # (..., G, KH, KW, {y, x}, OH, OW)
    pairs = offset.unflatten(-3, (groups, *kernel_size, 2))
    at_border = (pairs[..., 0, :, :] == row[:, None, :, None]) | (
        pairs[..., 1, :, :] == column[None, :, None, :]
    )
    return torch.where(at_border[..., None, :, :], pairs.detach(), pairs).flatten(-6, -3)


def _to_zero(predictor: torch_nn.Conv2d) -> None:
    """Whatever class it has: `dcnlib.convert` hands over those of other libraries."""
    torch_nn.init.zeros_(predictor.weight)
    torch_nn.init.zeros_(predictor.bias)


def _no_bias(bias: bool) -> None:
    if bias:
        raise value_error(
            _OP, "bias", "mmcv's DCNv1 has none", "False", bias,
            "dcnlib.nn.DeformConv2d can have one",
        )  # fmt: skip
