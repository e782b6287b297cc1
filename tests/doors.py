"""The doors to `deform_conv2d`: everywhere a caller can hand in arguments, all taking NumPy arrays.

A request is a dict of the arguments of `deform_conv2d_backward`; forward doors drop `grad_output`.
A door returns what came out under the names of `testing.OUTPUTS`, as NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import dcnlib
from dcnlib.testing import OUTPUTS

Request = dict[str, Any]
TENSORS = ("input", "offset", "weight", "bias", "mask", "grad_output")


class Door(NamedTuple):
    """`call` makes a request; `op` is the name that its errors begin with."""

    name: str
    op: str
    call: Callable[[Request], dict[str, Any]]

    @property
    def takes_grad_output(self) -> bool:
        return self.op.endswith("_backward")


def _forward(backend):
    def call(request: Request) -> dict[str, Any]:
        arguments = {k: v for k, v in request.items() if k != "grad_output"}
        return {"output": dcnlib.deform_conv2d(**arguments, backend=backend)}

    return call


def _backward(backend):
    def call(request: Request) -> dict[str, Any]:
        grads = dcnlib.deform_conv2d_backward(**request, backend=backend)
        return dict(zip(OUTPUTS[1:], grads, strict=True))

    return call


def _numpy_doors():
    for backend in ("reference", "cpu"):
        yield Door(f"numpy_{backend}", "deform_conv2d", _forward(backend))
        yield Door(f"numpy_{backend}_backward", "deform_conv2d_backward", _backward(backend))


DOORS = {door.name: door for door in _numpy_doors()}
