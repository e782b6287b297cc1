"""Deformable convolution, pooling and resampling as torch modules; importing this imports torch.

`DeformConv2d` holds weights and takes offsets. The Packs predict their own offsets, and the
modulated one its mask, with a convolution over the same windows of the same input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import torch_ops  # noqa: F401  (registers the operators, before anything is traced)
from ._nn_input import check_input
from ._nn_pool import (
    DeformPSRoIPool,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
)
from ._nn_resample import ConvOffset2D
from ._problem import four_sides, integer, pair, type_error, value_error
from .functional import deform_conv2d
from .torch_ops import packing

__all__ = [
    "ConvOffset2D",
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "freeze",
]

_OP = "deform_conv2d"

Module = TypeVar("Module", bound=nn.Module)

MaskActivation = str | Callable[[Tensor], Tensor] | None
_MASK_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "2*sigmoid": lambda mask: 2 * torch.sigmoid(mask),
}


class DeformConv2d(nn.Module):
    """Deformable convolution with offsets, and for DCNv2 a mask, as arguments of the call.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, dilation : int or (h, w)
    padding : int, (h, w), (top, bottom, left, right), "same" or "valid"
    groups : int
        Convolution groups; divides both numbers of channels.
    bias : bool
        Whether to add a learned bias.

    Attributes
    ----------
    weight : Parameter of shape (out_channels, in_channels/groups, KH, KW)
    bias : Parameter of shape (out_channels,), or None

    Notes
    -----
    Arguments, initial values and ``state_dict`` are those of ``torchvision.ops.DeformConv2d``:
    weight and bias are uniform within 1/sqrt(in_channels/groups * KH * KW).

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import DeformConv2d
    >>> layer = DeformConv2d(4, 8, kernel_size=3, padding=1)
    >>> layer(torch.randn(2, 4, 10, 10), torch.zeros(2, 2 * 9, 10, 10)).shape
    torch.Size([2, 8, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = integer(_OP, "in_channels", in_channels, 1)
        self.out_channels = integer(_OP, "out_channels", out_channels, 1)
        self.kernel_size = pair(_OP, "kernel_size", kernel_size)
        self.stride = pair(_OP, "stride", stride)
        self.dilation = pair(_OP, "dilation", dilation)
        sides = four_sides(_OP, padding, self.kernel_size, self.stride, self.dilation)
        top, bottom, left, right = sides
        self.padding = (top, left) if (top, left) == (bottom, right) else sides
        self.groups = integer(_OP, "groups", groups, 1)
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise value_error(
                    _OP,
                    "groups",
                    f"must divide {name}",
                    f"a divisor of {getattr(self, name)}",
                    self.groups,
                )
        self.weight = nn.Parameter(
            torch.empty(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """`dcnlib.deform_conv2d` with the module's weights.

        Parameters
        ----------
        input : Tensor of shape (N, in_channels, H, W), or without N
        offset : Tensor of shape (N, 2*offset_groups*KH*KW, OH, OW)
        mask : Tensor of shape (N, offset_groups*KH*KW, OH, OW), optional

        Returns
        -------
        Tensor of shape (N, out_channels, OH, OW), or without N
        """
        return self._convolve(input, offset, mask, None)

    def _convolve(
        self, input: Tensor, offset: Tensor, mask: Tensor | None, offset_groups: int | None
    ) -> Tensor:
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
            groups=self.groups,
            offset_groups=offset_groups,
        )

    def extra_repr(self) -> str:
        """The arguments, the default ones left out."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        if any(self.padding):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text if self.bias is not None else text + ", bias=False"


class _Predictor(nn.Conv2d):
    """A convolution that begins at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class DeformConv2dPack(DeformConv2d):
    """Deformable convolution (DCNv1) that predicts its offsets from its input.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        As for `DeformConv2d`.
    deform_groups : int
        Parts of the input channels, each with offsets of its own.
    bias : bool
        Whether to add a learned bias. mmcv's layer of this name has none.

    Attributes
    ----------
    weight, bias
        As those of `DeformConv2d`.
    conv_offset : torch.nn.Conv2d
        The predictor: the same kernel, stride, padding and dilation. Weight and bias begin at zero,
        so that an untrained layer is an ordinary convolution.

    Notes
    -----
    The ``state_dict`` has the keys of mmcv: ``weight``, ``bias``, ``conv_offset.weight``,
    ``conv_offset.bias``. Dai et al. train the predictor at the learning rate of the other layers.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import DeformConv2dPack
    >>> layer = DeformConv2dPack(4, 8, kernel_size=3, padding=1)
    >>> layer(torch.randn(2, 4, 10, 10)).shape
    torch.Size([2, 8, 10, 10])
    """

    _PREDICTED = 2  # channels a tap: y and x

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.deform_groups = integer(_OP, "deform_groups", deform_groups, 1)
        if self.in_channels % self.deform_groups:
            raise value_error(
                _OP,
                "deform_groups",
                "must divide in_channels",
                f"a divisor of {self.in_channels}",
                self.deform_groups,
            )
        self.conv_offset = _Predictor(
            self.in_channels,
            self._PREDICTED * self.deform_groups * math.prod(self.kernel_size),
            self.kernel_size,
            self.stride,
            self.padding if len(self.padding) == 2 else 0,
            self.dilation,
        )

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of `input` at the positions predicted from it.

        Parameters
        ----------
        input : Tensor of shape (N, in_channels, H, W), or without N

        Returns
        -------
        Tensor of shape (N, out_channels, OH, OW), or without N
        """
        return self._convolve(input, self._predict(input), None, self.deform_groups)

    def _predict(self, input: Tensor) -> Tensor:
        check_input(_OP, input, self.in_channels)
        if len(self.padding) == 4:
            top, bottom, left, right = self.padding
            input = nn.functional.pad(input, (left, right, top, bottom))
        return self.conv_offset(input)

    def extra_repr(self) -> str:
        """The arguments, the default ones left out."""
        text = super().extra_repr()
        return text if self.deform_groups == 1 else f"{text}, deform_groups={self.deform_groups}"


class ModulatedDeformConv2dPack(DeformConv2dPack):
    """Modulated deformable convolution (DCNv2) that predicts offsets and mask from its input.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias
        As for `DeformConv2dPack`.
    mask_activation : {"sigmoid", "2*sigmoid"}, callable or None
        What turns predictions into the mask. "sigmoid" is the paper's: an untrained layer has a
        mask of 1/2, half of an ordinary convolution. "2*sigmoid" begins at 1: a pretrained
        convolution keeps its values. None takes predictions as they are: untrained, the mask is 0
        and the result the bias. A callable gets and returns (N, deform_groups*KH*KW, OH, OW).

    Attributes
    ----------
    weight, bias
        As those of `DeformConv2d`.
    conv_offset : torch.nn.Conv2d
        The predictor, zero at the beginning: first the channels of the offsets, then of the mask.

    Notes
    -----
    The ``state_dict`` has the keys and the channel order of mmcv. Zhu et al. train the predictor at
    a tenth of the learning rate of the other layers: give ``conv_offset`` a parameter group.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import ModulatedDeformConv2dPack
    >>> layer = ModulatedDeformConv2dPack(4, 8, kernel_size=3, padding=1, deform_groups=2)
    >>> layer(torch.randn(2, 4, 10, 10)).shape
    torch.Size([2, 8, 10, 10])
    """

    _PREDICTED = 3  # channels a tap: y, x and mask

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        mask_activation: MaskActivation = "sigmoid",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bias,
        )
        self.mask_activation = _checked_activation(mask_activation)

    def forward(self, input: Tensor) -> Tensor:
        """The modulated convolution of `input` at the positions predicted from it.

        Parameters
        ----------
        input : Tensor of shape (N, in_channels, H, W), or without N

        Returns
        -------
        Tensor of shape (N, out_channels, OH, OW), or without N
        """
        taps = self.deform_groups * math.prod(self.kernel_size)
        offset, mask = self._predict(input).split([2 * taps, taps], dim=-3)
        if isinstance(self.mask_activation, str):
            mask = _MASK_ACTIVATIONS[self.mask_activation](mask)
        elif self.mask_activation is not None:
            mask = self.mask_activation(mask)
        return self._convolve(input, offset, mask, self.deform_groups)

    def extra_repr(self) -> str:
        """The arguments, the default ones left out."""
        text = super().extra_repr()
        if self.mask_activation == "sigmoid" or isinstance(self.mask_activation, nn.Module):
            return text
        return f"{text}, mask_activation={self.mask_activation!r}"


def freeze(module: Module) -> Module:
    """Freeze the weights of deformable convolutions for inference: the CPU keeps them packed.

    Parameters
    ----------
    module : torch.nn.Module
        Every `DeformConv2d` and Pack in it, or itself, gets a weight without
        ``requires_grad``. ``module.requires_grad_()`` takes that back, and with it the freezing.

    Returns
    -------
    torch.nn.Module
        `module`.

    Notes
    -----
    Results are the same bits. Packing, which every other call does, is up to a tenth of its time at
    256 or 512 channels and 14 x 14 pixels, and next to nothing elsewhere. It takes the memory of each
    weight once more, from the second call on. Weights in channels-last format, on a GPU, computed by
    a parametrization or created in inference mode gain nothing.

    ``load_state_dict``, ``.to`` and operations in place are noticed, by torch's version counter and
    the identity of the memory. Freeze again after what torch does not notice: writes through
    ``weight.data`` or an array that shares the memory, and a new parameter in the place of the old.
    torch refuses to swap frozen weights (``torch.utils.swap_tensors``): swap first, freeze then.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import DeformConv2d, freeze
    >>> model = freeze(torch.nn.ModuleList([DeformConv2d(4, 8, kernel_size=3)])).eval()
    >>> model[0].weight.requires_grad, model[0].bias.requires_grad
    (False, True)
    """
    if not isinstance(module, nn.Module):
        raise type_error(
            "freeze", "module", "must be a module", "torch.nn.Module", type(module).__name__
        )
    for layer in module.modules():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if isinstance(layer, DeformConv2d) and weight is not None:
            packing.freeze(weight.requires_grad_(False))
    return module


def _checked_activation(value: MaskActivation) -> MaskActivation:
    names = ", ".join(map(repr, _MASK_ACTIVATIONS))
    if isinstance(value, str):
        if value not in _MASK_ACTIVATIONS:
            raise value_error(_OP, "mask_activation", "unknown name", names, repr(value))
    elif value is not None and not callable(value):
        expected = f"{names}, a callable or None"
        raise type_error(
            _OP, "mask_activation", "unknown kind", expected, f"{value!r} ({type(value).__name__})"
        )
    return value
