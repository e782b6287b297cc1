"""Modules with random weights and inputs for them, for `tests/edge`; needs torch."""

import numpy as np
import torch
from torch import nn

import dcnlib.nn as dnn

RNG = np.random.default_rng(5)


def randomised(module, spread=0.3):
    """Weights that matter everywhere: predictors begin at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel() if parameter.dim() > 1 else 1)
            parameter.normal_(0, spread / fan**0.5, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


X = RNG.standard_normal((2, 6, 9, 11))
ROIS = np.array([[0, 0.5, 1.0, 8.0, 7.0], [1, 2.0, 0.0, 10.0, 5.5], [1, -3.0, 2.0, 4.0, 20.0]])


def offsets(groups, taps, size):
    return 2 * RNG.standard_normal((2, 2 * groups * taps, *size))


MODULES = {
    "deform": (lambda: dnn.DeformConv2d(6, 4, 3, padding=1), (X, offsets(1, 9, (9, 11)))),
    "deform_mask_groups": (
        lambda: dnn.DeformConv2d(6, 4, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), groups=2, bias=False),
        (X, offsets(3, 6, (4, 12)), RNG.random((2, 18, 4, 12))),
    ),
    "pack": (lambda: dnn.DeformConv2dPack(6, 8, 3, padding=1, deform_groups=2), (X,)),
    "pack_four_sides": (
        lambda: dnn.DeformConv2dPack(6, 4, 3, 2, (1, 0, 2, 1), groups=2, bias=False),
        (X,),
    ),
    "modulated": (lambda: dnn.ModulatedDeformConv2dPack(6, 8, 3, padding=1), (X,)),
    "modulated_2": (
        lambda: dnn.ModulatedDeformConv2dPack(
            6, 4, 3, padding="same", dilation=2, deform_groups=3, mask_activation="2*sigmoid"
        ),
        (X,),
    ),
    "modulated_none": (
        lambda: dnn.ModulatedDeformConv2dPack(6, 6, (1, 3), groups=6, mask_activation=None),
        (X,),
    ),
    "unbatched": (lambda: dnn.ModulatedDeformConv2dPack(6, 4, 3), (X[0],)),
    "roi_pool": (
        lambda: dnn.DeformRoIPool((3, 2), 0.8, 2),
        (X, ROIS, 0.5 * RNG.standard_normal((3, 2, 3, 2))),
    ),
    "roi_pool_pack": (lambda: dnn.DeformRoIPoolPack((3, 2), 6, 16, 0.8, 2), (X, ROIS)),
    "roi_pool_modulated": (lambda: dnn.ModulatedDeformRoIPoolPack(3, 6, 16, 0.8, 2), (X, ROIS)),
    "psroi_pool": (
        lambda: dnn.DeformPSRoIPool(0.8, 3, output_dim=6, part_size=(2, 3)),
        (X, ROIS, RNG.standard_normal((3, 2, 2, 3)), RNG.random((3, 1, 3, 3))),
    ),
    "conv_offset": (lambda: dnn.ConvOffset2D(6, (3, 5)), (X,)),
    "network": (
        lambda: nn.Sequential(
            nn.Conv2d(6, 8, (3, 2), 2, (1, 2), bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.Sequential(dnn.ModulatedDeformConv2dPack(8, 8, 3, padding=1), nn.Dropout2d(0.5)),
            nn.BatchNorm2d(8, affine=False),
            nn.Sigmoid(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
            nn.Identity(),
        ),
        (X,),
    ),
}


def to_torch(array, dtype):
    return torch.from_numpy(array).to(getattr(torch, dtype))
