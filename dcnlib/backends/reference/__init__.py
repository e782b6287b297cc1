"""The oracle: every operator in NumPy, written as the papers write it.

    deform_conv2d.py      convolution
    deform_roi_pool.py    RoI pooling, both dialects
    deform_resample2d.py  resampling

Everything is float64 whatever the operands are, and rounded once, to nearest, into the outputs.
Other backends are tested against this package; speed and memory are no concern here.
"""

from __future__ import annotations

from .deform_conv2d import (
    backward,
    convolve,
    differentiate,
    forward,
    on_bfloat16_grid,
    rounded,
)
from .deform_resample2d import resample_backward, resample_forward
from .deform_roi_pool import roi_pool_backward, roi_pool_forward

__all__ = [
    "backward",
    "convolve",
    "differentiate",
    "forward",
    "name",
    "on_bfloat16_grid",
    "resample_backward",
    "resample_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "rounded",
    "why_not",
]

name = "reference"


def why_not(device: str) -> str | None:
    """None on CPUs; the reason elsewhere."""
    if device == "cpu":
        return None
    return "it computes with NumPy on the CPU; move the tensors there"
