"""The doors to `deform_conv2d`: everywhere a caller can hand in arguments, all taking NumPy arrays.

A request is a dict of the arguments of `deform_conv2d_backward`; forward doors drop `grad_output`.
A door returns what came out under the names of `testing.OUTPUTS`, as NumPy arrays. The torch doors
turn arrays into tensors and leave everything else as it is; torch is imported when one is used.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import dcnlib
from dcnlib.testing import OUTPUTS, numpy_dtype

Request = dict[str, Any]
GEOMETRIES = ("usual", "pointwise", "single", "far")
TENSORS = ("input", "offset", "weight", "bias", "mask", "grad_output")


class Door(NamedTuple):
    """`call` makes a request; `op` is the name that its errors begin with."""

    name: str
    op: str
    kind: str
    call: Callable[[Request], dict[str, Any]]
    raw: bool = False
    """torch parses the arguments first, and has its own errors for what is no int64."""
    shapes_only: bool = False
    only: tuple[str, ...] = ("",)
    """How the names of the cases begin that this door can be given."""

    @property
    def takes_grad_output(self) -> bool:
        return self.op == "deform_conv2d_backward"


def _numpy_doors() -> Iterator[Door]:
    for backend in ("reference", "cpu"):

        def forward(request: Request, backend=backend) -> dict[str, Any]:
            return {"output": dcnlib.deform_conv2d(**_forward(request), backend=backend)}

        def backward(request: Request, backend=backend) -> dict[str, Any]:
            return _named(dcnlib.deform_conv2d_backward(**request, backend=backend))

        yield Door(f"numpy_{backend}", "deform_conv2d", "numpy", forward)
        yield Door(f"numpy_{backend}_backward", "deform_conv2d_backward", "numpy", backward)


def _torch_doors() -> Iterator[Door]:
    def ops():
        import torch

        return torch.ops.dcnlib

    def forward(request: Request) -> dict[str, Any]:
        return {"output": _array(dcnlib.deform_conv2d(**_tensors(_forward(request))))}

    def backward(request: Request) -> dict[str, Any]:
        return _named(map(_array, dcnlib.deform_conv2d_backward(**_tensors(request))))

    def raw_forward(request: Request) -> dict[str, Any]:
        return {"output": _array(ops().deform_conv2d(**_tensors(_forward(request))))}

    def raw_backward(request: Request) -> dict[str, Any]:
        return _named(map(_array, ops().deform_conv2d_backward(**_tensors(request))))

    def meta_forward(request: Request) -> dict[str, Any]:
        return {"output": _shape(dcnlib.deform_conv2d(**_tensors(_forward(request), _to_meta)))}

    def meta_backward(request: Request) -> dict[str, Any]:
        return _named(map(_shape, ops().deform_conv2d_backward(**_tensors(request, _to_meta))))

    def fake_forward(request: Request) -> dict[str, Any]:
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors = _tensors(_forward(request), lambda t: mode.from_tensor(t))
            return {"output": _shape(dcnlib.deform_conv2d(**tensors))}

    def module(request: Request) -> dict[str, Any]:
        import torch

        from dcnlib.nn import DeformConv2d

        tensors = _tensors(_forward(request))
        weight = tensors["weight"]
        channels, numbers = weight.shape[1] * request["groups"], ("stride", "padding", "dilation")
        layer = DeformConv2d(
            channels,
            len(weight),
            tuple(weight.shape[2:]),
            *(request[name] for name in numbers),
            groups=request["groups"],
        )
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(tensors["bias"])
        return {"output": _array(layer(tensors["input"], tensors["offset"], tensors["mask"]))}

    one, two = "deform_conv2d", "deform_conv2d_backward"
    yield Door("torch", one, "torch", forward)
    yield Door("torch_backward", two, "torch", backward)
    yield Door("op", one, "torch", raw_forward, raw=True)
    yield Door("op_backward", two, "torch", raw_backward, raw=True)
    yield Door("meta", one, "torch", meta_forward, shapes_only=True)
    yield Door("meta_backward", two, "torch", meta_backward, raw=True, shapes_only=True)
    yield Door("fake", one, "torch", fake_forward, shapes_only=True)
    numbers, tensors = ("stride", "padding", "dilation"), ("input", "offset", "mask")
    only = [f"integers-{geometry}-{name}-" for geometry in GEOMETRIES for name in numbers]
    only += [f"{family}-{name}-" for family in ("shapes", "objects") for name in tensors]
    yield Door("module", one, "torch", module, only=tuple(only))


def _forward(request: Request) -> Request:
    return {name: value for name, value in request.items() if name != "grad_output"}


def _named(grads) -> dict[str, Any]:
    return dict(zip(OUTPUTS[1:], grads, strict=True))


def _tensors(request: Request, place: Callable = lambda tensor: tensor) -> Request:
    """The request with its arrays as tensors, or as what `place` makes of them."""
    import torch

    def convert(value):
        if type(value) is np.ndarray:
            value = _tensor(torch, value)
        return place(value) if isinstance(value, torch.Tensor) else value

    return {k: convert(v) if k in TENSORS else v for k, v in request.items()}


def _tensor(torch, array: np.ndarray):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_meta(tensor):
    return tensor.to("meta")


def _array(tensor) -> np.ndarray | None:
    if tensor is None:
        return None
    if str(tensor.dtype) == "torch.bfloat16":
        bits = tensor.detach().view(sys.modules["torch"].int16)
        return bits.numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy(force=True)


def _shape(tensor) -> np.ndarray | None:
    """An array of that shape: all that such a tensor has."""
    return None if tensor is None else np.empty(tuple(tensor.shape))


DOORS = {door.name: door for door in _numpy_doors()}
if importlib.util.find_spec("torch") is not None:
    DOORS |= {door.name: door for door in _torch_doors()}
