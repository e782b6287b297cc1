"""The resampling form of deformable convolution as a torch module; `dcnlib.nn` has it."""

from __future__ import annotations

from torch import Tensor, nn

from ._nn_input import check_input
from ._problem import integer, pair
from ._problem_resample import boundary_name
from .resample import deform_resample2d

_OP = "deform_resample2d"


class ConvOffset2D(nn.Module):
    """Moves every pixel of every channel to where a convolution says.

    An ordinary convolution behind it makes the resampling form of deformable convolution.

    Parameters
    ----------
    in_channels : int
        Channels of the input, and of the output.
    kernel_size : int or (h, w)
        Window of the convolution that predicts the offsets.
    boundary : {"border", "zeros"}
        What a position outside the image means, as for `dcnlib.deform_resample2d`.

    Attributes
    ----------
    conv_offset : torch.nn.Conv2d
        The predictor, with 2 * in_channels outputs: y, then x, for each channel. Weight and bias
        begin at zero, so that an untrained layer changes nothing; it trains from there, since the
        offsets have gradients at integer positions.

    Notes
    -----
    Layers of this name elsewhere take floor and ceil as neighbours, which makes the gradient 0 at
    integer positions (they begin with random weights), and reshape offsets without moving axes, so
    that pixels get offsets of others. This one does neither.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import ConvOffset2D
    >>> net = torch.nn.Sequential(ConvOffset2D(4), torch.nn.Conv2d(4, 8, 3, padding=1))
    >>> net(torch.randn(2, 4, 10, 10)).shape
    torch.Size([2, 8, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        boundary: str = "border",
    ) -> None:
        super().__init__()
        self.in_channels = integer(_OP, "in_channels", in_channels, 1)
        self.kernel_size = pair(_OP, "kernel_size", kernel_size)
        self.boundary = boundary_name(_OP, boundary)
        self.conv_offset = nn.Conv2d(
            self.in_channels, 2 * self.in_channels, self.kernel_size, padding="same"
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the beginning: nothing moves."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, input: Tensor) -> Tensor:
        """`input` at the positions predicted from it.

        Parameters
        ----------
        input : Tensor of shape (N, in_channels, H, W), or without N

        Returns
        -------
        Tensor in the shape of `input`
        """
        check_input(_OP, input, self.in_channels)
        return deform_resample2d(input, self.conv_offset(input), boundary=self.boundary)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.in_channels}, kernel_size={self.kernel_size}, boundary={self.boundary!r}"
