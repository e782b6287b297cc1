"""What the tests of the torch door share: differentiable calls and ways to make them.

A call is a `testing.Call` of tensors; `SMALL` are the geometries for everything that differentiates
numerically, `smooth` draws their data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import dcnlib
from dcnlib import testing
from dcnlib.testing import Call, Geometry

#: Anisotropic, with groups across offset groups, and the special cases. None has many elements.
SMALL = {
    "v2": Geometry(2, 4, 4, 5, 4, (2, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, 2),
    "v1": Geometry(1, 2, 4, 3, 3, (2, 2), (1, 1), (1, 0, 0, 1), mask=False, bias=False),
    "strided": Geometry(1, 6, 5, 6, 2, (2, 1), (2, 1), (1, 2, 0, 1), (2, 1), 2, 3),
    "one_of_all": Geometry(1, 1, 1, 1, 1, (1, 1)),
    "depthwise": Geometry(2, 3, 3, 4, 3, (2, 2), groups=3, mask=False),
}

TENSORS = ("input", "offset", "weight", "bias", "mask")


def smooth(geometry: Geometry, seed: int = 0, dtype: str = "float64") -> Call:
    """Normal data, no sample within 0.1 of a kink: finite differences are derivatives."""
    call = testing.real(geometry, seed)
    fraction = np.random.default_rng(seed).uniform(0.1, 0.9, call.offset.shape)
    call = call._replace(offset=np.floor(call.offset) + fraction)
    return call.astype(dtype).to_torch()


def unbatched(call: Call) -> Call:
    """The first image of a call, without a batch axis."""
    return call._replace(
        **{
            name: None if getattr(call, name) is None else getattr(call, name)[0]
            for name in ("input", "offset", "mask", "grad_output")
        }
    )


def leaves(call: Call) -> list[torch.Tensor]:
    """Fresh leaves that require gradients: input, offset, weight, bias, mask as far as given."""
    return [t.detach().clone().requires_grad_() for t in call[:5] if t is not None]


def function(call: Call, **options: Any):
    """`deform_conv2d` as a function of `leaves`, the rest as in `call`."""
    given = [name for name, t in zip(TENSORS, call[:5], strict=True) if t is not None]

    def apply(*tensors):
        arguments = dict(zip(given, tensors, strict=True))
        return dcnlib.deform_conv2d(
            **arguments,
            stride=call.stride,
            padding=call.padding,
            dilation=call.dilation,
            groups=call.groups,
            offset_groups=call.offset_groups,
            **options,
        )

    return apply


def loss(call: Call, **options: Any):
    """A scalar function of `leaves` whose derivatives of all orders are interesting."""
    apply = function(call, **options)
    return lambda *tensors: apply(*tensors).square().sum()


def operator_arguments(call: Call, backend: str | None = None) -> tuple:
    """The arguments of ``torch.ops.dcnlib.deform_conv2d``."""
    return (*call[:4], *map(list, call[6:9]), call.mask, *call[9:], backend)


def run_out_of_memory(op: str) -> None:
    """A legal call that asks for petabytes: images of stride 0, which no copy fits."""
    image = torch.ones(()).expand(1, 1, 2**24, 2**24)
    offset = torch.ones(()).expand(1, 2, 2**24, 2**24)
    arguments = [image, offset, torch.ones(1, 1, 1, 1)]
    if op.endswith("backward"):
        arguments.insert(0, image)
    getattr(dcnlib, op)(*arguments)
