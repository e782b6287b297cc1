"""The public names as a type checker sees them: `make lint` runs mypy on this file."""

from typing import assert_type

import numpy as np

import dcnlib

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def with_numpy(x: FloatArray, offset: FloatArray, weight: FloatArray) -> None:
    y = dcnlib.deform_conv2d(x, offset, weight, padding=1, groups=1, backend="reference")
    assert_type(y, FloatArray)
    grads = dcnlib.deform_conv2d_backward(y, x, offset, weight, padding=(1, 1, 0, 2))
    assert grads.offset is not None


def settings() -> None:
    dcnlib.set_num_threads(2)
    assert_type(dcnlib.get_num_threads(), int)
    with dcnlib.cpu_isa("avx2") as isa:
        name: str = isa
    available, reason = dcnlib.backends()[name]
    assert_type(available, bool)
    assert_type(reason, str)
    assert_type(dcnlib.__version__, str)
