"""The layers of real networks: speed in each dtype, and the error beside it, lest it be bought."""

from __future__ import annotations

import numpy as np

from . import memory
from .common import (
    BACKENDS,
    DIRECTIONS,
    DTYPES,
    LAYERS,
    Case,
    Timed,
    arrays,
    backend_call,
    options,
    skip,
)

_U = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class _Layers:
    params = [BACKENDS, list(LAYERS), DTYPES, DIRECTIONS]
    param_names = ["backend", "layer", "dtype", "direction"]

    def setup(self, backend, layer, dtype, direction):
        self.call = backend_call(backend, LAYERS[layer], direction, dtype)


class Time(_Layers, Timed):
    def time_call(self, *parameters):
        self.call()


class Memory(_Layers):
    def setup(self, backend, layer, dtype, direction):
        if backend != "cpu":
            skip("memory of CUDA is in grid.Memory")
        if memory.why_not():
            skip(memory.why_not())
        memory.settle()
        super().setup(backend, layer, dtype, direction)

    def track_extra_bytes(self, *parameters):
        return memory.extra_bytes(self.call)

    track_extra_bytes.unit = "bytes"


class Error:
    """Largest error over largest value against the reference in float64, in units of roundoff."""

    CASES = {
        "64@9x9 K3": Case(64, 32, 9, 9, 3),
        "32@12x12 K5 stride 2 dilation 2": Case(32, 32, 12, 12, 5, 2, 2),
        "64@14x14 depthwise": Case(64, 64, 14, 14, 3, groups=64),
    }
    params = [BACKENDS, list(CASES), DTYPES, DIRECTIONS]
    param_names = ["backend", "layer", "dtype", "direction"]

    def setup(self, backend, layer, dtype, direction):
        self.call = backend_call(backend, self.CASES[layer], direction, dtype)

    def track_error(self, backend, layer, dtype, direction):
        import dcnlib

        case = self.CASES[layer]
        exact = [array.astype(np.float64) for array in arrays(case, dtype)]
        input, offset, weight, bias, mask, grad_output = exact
        keywords = options(case) | {"mask": mask, "backend": "reference"}
        if direction == "forward":
            got, want = [self.call()], [dcnlib.deform_conv2d(*exact[:4], **keywords)]
        else:
            got = self.call()
            want = dcnlib.deform_conv2d_backward(
                grad_output, input, offset, weight, bias, **keywords
            )
        return (
            max(
                float(np.max(np.abs(_double(a) - b)) / np.max(np.abs(b)))
                for a, b in zip(got, want, strict=True)
            )
            / _U[dtype]
        )

    track_error.unit = "u"


def _double(array) -> np.ndarray:
    """A NumPy array or a tensor as float64."""
    return np.asarray(array if isinstance(array, np.ndarray) else array.double().cpu(), np.float64)
