"""Deformable RoI pooling as torch modules; `dcnlib.nn` has them."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ._nn_input import check_input
from ._problem import integer, pair, real
from ._problem_pool import samples
from .pooling import deform_psroi_pool, deform_roi_pool

_OP, _PS_OP = "deform_roi_pool", "deform_psroi_pool"


class DeformRoIPool(nn.Module):
    """`dcnlib.deform_roi_pool` with fixed options.

    Parameters
    ----------
    output_size : int or (PH, PW)
    spatial_scale : float
        From the coordinates of regions to pixels of the input.
    sampling_ratio : int
        Samples along each axis of a bin; 0 takes one for each pixel.
    gamma : float
        Scale of the offsets.

    Notes
    -----
    Arguments and their names are those of mmcv's class. It has no parameters.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import DeformRoIPool
    >>> pool = DeformRoIPool(7, spatial_scale=1 / 16)
    >>> rois = torch.tensor([[0, 20.0, 30.0, 180.0, 110.0]])
    >>> pool(torch.randn(1, 4, 20, 20), rois, torch.zeros(1, 2, 7, 7)).shape
    torch.Size([1, 4, 7, 7])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__()
        self.output_size = pair(_OP, "output_size", output_size)
        self.spatial_scale = real(_OP, "spatial_scale", spatial_scale, above_zero=True)
        self.sampling_ratio = samples(_OP, "sampling_ratio", sampling_ratio, 0)
        self.gamma = real(_OP, "gamma", gamma)

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        """The pooled regions.

        Parameters
        ----------
        input : Tensor of shape (N, C, H, W)
        rois : Tensor of shape (R, 5)
            Image number, x1, y1, x2, y2.
        offset : Tensor of shape (R, 2, PH, PW), optional
            The x plane, then the y plane.

        Returns
        -------
        Tensor of shape (R, C, PH, PW)
        """
        return deform_roi_pool(
            input,
            rois,
            offset,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.gamma,
        )

    def extra_repr(self) -> str:
        """The arguments, the default ones left out."""
        text = f"output_size={self.output_size}, spatial_scale={self.spatial_scale:.6g}"
        if self.sampling_ratio:
            text += f", sampling_ratio={self.sampling_ratio}"
        return text if self.gamma == 0.1 else f"{text}, gamma={self.gamma:.6g}"


class DeformRoIPoolPack(DeformRoIPool):
    """Deformable RoI pooling that predicts its offsets from the regions themselves.

    The regions are pooled without offsets first; two hidden layers turn that into offsets.

    Parameters
    ----------
    output_size : int or (PH, PW)
    output_channels : int
        Channels of the input, and of the output.
    deform_fc_channels : int
        Width of the hidden layers.
    spatial_scale, sampling_ratio, gamma
        As for `DeformRoIPool`.

    Attributes
    ----------
    offset_fc : torch.nn.Sequential
        The predictor. Its last layer begins at zero: an untrained layer is plain RoI pooling.

    Notes
    -----
    The ``state_dict`` has the keys of mmcv: ``offset_fc.0.weight`` and so on. Dai et al. train the
    predictor at a hundredth of the learning rate of the other layers.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import DeformRoIPoolPack
    >>> pool = DeformRoIPoolPack(3, 4, deform_fc_channels=16, spatial_scale=1 / 16)
    >>> rois = torch.tensor([[0, 20.0, 30.0, 180.0, 110.0]])
    >>> pool(torch.randn(1, 4, 20, 20), rois).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels = integer(_OP, "output_channels", output_channels, 1)
        self.deform_fc_channels = integer(_OP, "deform_fc_channels", deform_fc_channels, 1)
        bins, hidden = math.prod(self.output_size), self.deform_fc_channels
        self.offset_fc = nn.Sequential(
            nn.Linear(bins * self.output_channels, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            _zero(nn.Linear(hidden, 2 * bins)),
        )

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """The pooled regions, each bin at the place predicted for it.

        Parameters
        ----------
        input : Tensor of shape (N, output_channels, H, W)
        rois : Tensor of shape (R, 5)
            Image number, x1, y1, x2, y2.

        Returns
        -------
        Tensor of shape (R, output_channels, PH, PW)
        """
        return super().forward(input, rois, self._offset(self._plain(input, rois)))

    def _plain(self, input: Tensor, rois: Tensor) -> Tensor:
        """The features that predictions are made from, (R, output_channels * PH * PW)."""
        check_input(_OP, input, self.output_channels, "output_channels", unbatched=False)
        return super().forward(input, rois).flatten(1)

    def _offset(self, features: Tensor) -> Tensor:
        return self.offset_fc(features).unflatten(1, (2, *self.output_size))

    def extra_repr(self) -> str:
        """The arguments, the default ones left out."""
        text = f"{super().extra_repr()}, output_channels={self.output_channels}"
        if self.deform_fc_channels == 1024:
            return text
        return f"{text}, deform_fc_channels={self.deform_fc_channels}"


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """Modulated deformable RoI pooling: predicts offsets, and a factor for each bin.

    Parameters
    ----------
    output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma
        As for `DeformRoIPoolPack`.

    Attributes
    ----------
    offset_fc : torch.nn.Sequential
        As that of `DeformRoIPoolPack`.
    mask_fc : torch.nn.Sequential
        The predictor of the mask, with a sigmoid behind. Its last layer begins at zero: an
        untrained layer is half of plain RoI pooling.

    Notes
    -----
    The ``state_dict`` has the keys of mmcv.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import ModulatedDeformRoIPoolPack
    >>> pool = ModulatedDeformRoIPoolPack(3, 4, deform_fc_channels=16)
    >>> pool(torch.randn(1, 4, 20, 20), torch.tensor([[0, 2.0, 3.0, 18.0, 11.0]])).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(
            output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma
        )
        bins, hidden = math.prod(self.output_size), self.deform_fc_channels
        self.mask_fc = nn.Sequential(
            nn.Linear(bins * self.output_channels, hidden),
            nn.ReLU(inplace=True),
            _zero(nn.Linear(hidden, bins)),
            nn.Sigmoid(),
        )

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """The pooled regions, each bin at the place and with the factor predicted for it.

        Parameters
        ----------
        input : Tensor of shape (N, output_channels, H, W)
        rois : Tensor of shape (R, 5)
            Image number, x1, y1, x2, y2.

        Returns
        -------
        Tensor of shape (R, output_channels, PH, PW)
        """
        features = self._plain(input, rois)
        mask = self.mask_fc(features).unflatten(1, (1, *self.output_size))
        return DeformRoIPool.forward(self, input, rois, self._offset(features)) * mask


class DeformPSRoIPool(nn.Module):
    """`dcnlib.deform_psroi_pool` with fixed options.

    Parameters
    ----------
    spatial_scale : float
        From the coordinates of regions to pixels of the input.
    output_size : int or (PH, PW)
    output_dim : int
        Channels of the output; the input has ``output_dim * group_h * group_w``.
    no_offset : bool
        True ignores offsets.
    group_size : int or (group_h, group_w)
    part_size : int or (part_h, part_w), optional
        Parts with an offset of their own; as many as bins when None.
    sample_per_part : int
        Samples along each axis of a bin.
    offset_std : float
        Scale of the offsets.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.nn import DeformPSRoIPool
    >>> pool = DeformPSRoIPool(1 / 16, 7, output_dim=2, group_size=7)
    >>> rois = torch.tensor([[0, 20.0, 30.0, 180.0, 110.0]])
    >>> pool(torch.randn(1, 98, 20, 20), rois, torch.zeros(1, 2, 7, 7)).shape
    torch.Size([1, 2, 7, 7])
    """

    def __init__(
        self,
        spatial_scale: float,
        output_size: int | tuple[int, int],
        output_dim: int,
        no_offset: bool = False,
        group_size: int | tuple[int, int] = 1,
        part_size: int | tuple[int, int] | None = None,
        sample_per_part: int = 4,
        offset_std: float = 0.1,
    ) -> None:
        super().__init__()
        self.spatial_scale = real(_PS_OP, "spatial_scale", spatial_scale, above_zero=True)
        self.output_size = pair(_PS_OP, "output_size", output_size)
        self.output_dim = integer(_PS_OP, "output_dim", output_dim, 1)
        self.no_offset = bool(no_offset)
        self.group_size = pair(_PS_OP, "group_size", group_size)
        self.part_size = (
            self.output_size if part_size is None else pair(_PS_OP, "part_size", part_size)
        )
        self.sample_per_part = samples(_PS_OP, "sample_per_part", sample_per_part, 1)
        self.offset_std = real(_PS_OP, "offset_std", offset_std)

    def forward(
        self,
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The pooled regions.

        Parameters
        ----------
        input : Tensor of shape (N, output_dim * group_h * group_w, H, W)
        rois : Tensor of shape (R, 5)
            Image number, x1, y1, x2, y2.
        offset : Tensor of shape (R, 2 * classes, part_h, part_w), optional
            For each class the x plane, then the y plane.
        mask : Tensor of shape (R, 1, PH, PW), optional

        Returns
        -------
        Tensor of shape (R, output_dim, PH, PW)
        """
        return deform_psroi_pool(
            input,
            rois,
            offset,
            self.spatial_scale,
            self.output_size,
            self.output_dim,
            self.no_offset,
            self.group_size,
            self.part_size,
            self.sample_per_part,
            self.offset_std,
            mask,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"spatial_scale={self.spatial_scale:.6g}, output_size={self.output_size}, "
            f"output_dim={self.output_dim}, no_offset={self.no_offset}, "
            f"group_size={self.group_size}, part_size={self.part_size}, "
            f"sample_per_part={self.sample_per_part}, offset_std={self.offset_std:.6g}"
        )


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
