"""``paddle.vision.ops`` on torch tensors: `deform_conv2d` and `DeformConv2D`.

Programs written for Paddle run with the import changed and torch tensors in place of Paddle's.
Values are Paddle's, and so are initial ones; the exception is the offset's gradient at exactly -1,
where this library has the right-hand derivative and Paddle 0.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from .._problem import integer, pair, type_error
from ..functional import deform_conv2d as _deform_conv2d
from ..nn import DeformConv2d

__all__ = ["DeformConv2D", "deform_conv2d"]

_OP = "deform_conv2d"
_Pair = int | list[int] | tuple[int, int]


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    deformable_groups: int = 1,
    groups: int = 1,
    mask: Tensor | None = None,
    name: str | None = None,
) -> Tensor:
    """`dcnlib.deform_conv2d` with the arguments of ``paddle.vision.ops.deform_conv2d``.

    Parameters
    ----------
    x : Tensor of shape (N, in_channels, H, W)
    offset : Tensor of shape (N, 2*deformable_groups*KH*KW, OH, OW)
    weight : Tensor of shape (out_channels, in_channels/groups, KH, KW)
    bias : Tensor of shape (out_channels,), optional
    stride, padding, dilation : int or pair
    deformable_groups, groups : int
    mask : Tensor of shape (N, deformable_groups*KH*KW, OH, OW), optional
        With it DCNv2, without it DCNv1.
    name : str, optional
        Has no effect.

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
    >>> from dcnlib.compat import paddle
    >>> x, weight = torch.rand(8, 1, 28, 28), torch.rand(16, 1, 3, 3)
    >>> offset, mask = torch.rand(8, 2 * 3 * 3, 26, 26), torch.rand(8, 3 * 3, 26, 26)
    >>> paddle.deform_conv2d(x, offset, weight, mask=mask).shape
    torch.Size([8, 16, 26, 26])
    """
    return _deform_conv2d(
        x,
        offset,
        weight,
        bias,
        stride,
        pair(_OP, "padding", padding, 0),
        dilation,
        mask,
        groups=groups,
        offset_groups=deformable_groups,
    )


class DeformConv2D(DeformConv2d):
    """The layer ``paddle.vision.ops.DeformConv2D``.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, padding, dilation : int or pair
    deformable_groups, groups : int
    weight_attr : None
    bias_attr : bool, optional
        False leaves out the bias. Paddle's objects that say more have no counterpart here: set
        ``layer.weight`` and ``layer.bias`` instead.

    Attributes
    ----------
    weight : Parameter of shape (out_channels, in_channels/groups, KH, KW)
        Drawn from a normal distribution with variance 2/(in_channels*KH*KW).
    bias : Parameter of shape (out_channels,), or None
        Zero at the beginning.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.compat.paddle import DeformConv2D
    >>> layer = DeformConv2D(in_channels=1, out_channels=16, kernel_size=[3, 3])
    >>> layer(torch.rand(8, 1, 28, 28), torch.rand(8, 2 * 3 * 3, 26, 26)).shape
    torch.Size([8, 16, 26, 26])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair = 0,
        dilation: _Pair = 1,
        deformable_groups: int = 1,
        groups: int = 1,
        weight_attr: None = None,
        bias_attr: bool | None = None,
    ) -> None:
        if weight_attr is not None:
            raise _unknown_attribute("weight_attr", "None", weight_attr)
        if bias_attr is not None and not isinstance(bias_attr, bool):
            raise _unknown_attribute("bias_attr", "None or a bool", bias_attr)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            pair(_OP, "padding", padding, 0),
            dilation,
            groups,
            bias_attr is not False,
        )
        self.deformable_groups = integer(_OP, "deformable_groups", deformable_groups, 1)

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        nn.init.normal_(
            self.weight, std=math.sqrt(2 / (self.in_channels * math.prod(self.kernel_size)))
        )
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """`deform_conv2d` with the layer's weights; DCNv2 with a mask, DCNv1 without."""
        return self._convolve(x, offset, mask, self.deformable_groups)

    def extra_repr(self) -> str:
        """The arguments, the default ones left out."""
        text = super().extra_repr()
        if self.deformable_groups == 1:
            return text
        return f"{text}, deformable_groups={self.deformable_groups}"


def _unknown_attribute(name: str, expected: str, value: object) -> TypeError:
    return type_error(
        _OP,
        name,
        "Paddle's attributes have no counterpart in torch",
        expected,
        type(value).__name__,
        "set weight and bias of the layer instead",
    )
