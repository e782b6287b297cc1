"""RoI pooling of both dialects and resampling: time, and the memory that a call adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import memory
from .common import DIRECTIONS, DTYPES, Call, Timed, numpy_dtype, skip


class Pool(NamedTuple):
    """A pooling of regions of 16 to 316 pixels of the image, at 1/16."""

    channels: int
    height: int
    width: int
    regions: int
    bins: int
    samples: int
    group: int = 1
    classes: int = 1


#: The features of a ResNet at 800 x 1344, in the head of a detector; score maps of R-FCN.
POOLS = {
    "256@50x84 128 regions 7x7": Pool(256, 50, 84, 128, 7, 2),
    "256@50x84 32 regions 14x14": Pool(256, 50, 84, 32, 14, 2),
    "64@200x336 32 regions 7x7": Pool(64, 200, 336, 32, 7, 2),
}
SENSITIVE_POOLS = {
    "10@50x84 group 7": Pool(10, 50, 84, 128, 7, 4, group=7),
    "21@50x84 21 classes": Pool(21, 50, 84, 64, 7, 4, classes=21),
}
RESAMPLINGS = {"64@56x56": (1, 64, 56, 56), "256@14x14": (1, 256, 14, 14)}


def pool_call(case: Pool, sensitive: bool, direction: str, dtype: str) -> Call:
    """One pass of a pooling on one thread."""
    rng = np.random.default_rng(0)
    extent = 16 * np.array([case.width, case.height])
    corners = rng.random((case.regions, 2)) * 0.9 * extent
    ends = corners + 16 + 300 * rng.random((case.regions, 2))
    rois = np.concatenate([np.zeros((case.regions, 1)), corners, ends], 1).astype(np.float32)
    grid = (case.bins, case.bins)
    inputs = case.channels * case.group**2
    input, offset, mask, grad_output = (
        rng.standard_normal(shape, np.float32).astype(numpy_dtype(dtype), copy=False)
        for shape in (
            (1, inputs, case.height, case.width),
            (case.regions, 2 * case.classes, *grid),
            (case.regions, 1, *grid),
            (case.regions, case.channels, *grid),
        )
    )
    keywords: dict[str, Any] = {"output_size": case.bins, "spatial_scale": 1 / 16}
    if sensitive:
        keywords |= {
            "output_dim": case.channels,
            "group_size": case.group,
            "sample_per_part": case.samples,
            "mask": mask,
        }
    else:
        keywords["sampling_ratio"] = case.samples
    name = "deform_psroi_pool" if sensitive else "deform_roi_pool"
    return _call(name, direction, grad_output, (input, rois, offset), keywords)


def resample_call(
    shape: tuple[int, int, int, int], boundary: str, direction: str, dtype: str
) -> Call:
    """One pass of a resampling on one thread."""
    rng = np.random.default_rng(0)
    batch, channels, height, width = shape
    input, offset, grad_output = (
        rng.standard_normal(s, np.float32).astype(numpy_dtype(dtype), copy=False)
        for s in (shape, (batch, 2 * channels, height, width), shape)
    )
    keywords = {"boundary": boundary}
    return _call("deform_resample2d", direction, grad_output, (input, offset), keywords)


def _call(
    name: str, direction: str, grad_output: np.ndarray, tensors: tuple, keywords: dict[str, Any]
) -> Call:
    """The call, run once to start threads and touch pages; skips where it is not known yet."""
    import dcnlib

    if not hasattr(dcnlib, name):
        skip(f"this commit has no {name}")
    dcnlib.set_num_threads(1)
    if direction == "forward":
        function, arguments = getattr(dcnlib, name), tensors
    else:
        function, arguments = getattr(dcnlib, f"{name}_backward"), (grad_output, *tensors)

    def call():
        return function(*arguments, **keywords)

    call()
    return call


class _Pooling:
    params = [list(POOLS), DTYPES, DIRECTIONS]
    param_names = ["case", "dtype", "direction"]

    def setup(self, case, dtype, direction):
        self.call = pool_call(POOLS[case], False, direction, dtype)


class _SensitivePooling:
    params = [list(SENSITIVE_POOLS), ["float32"], DIRECTIONS]
    param_names = ["case", "dtype", "direction"]

    def setup(self, case, dtype, direction):
        self.call = pool_call(SENSITIVE_POOLS[case], True, direction, dtype)


class _Resampling:
    params = [list(RESAMPLINGS), ["border", "zeros"], DTYPES, DIRECTIONS]
    param_names = ["case", "boundary", "dtype", "direction"]

    def setup(self, case, boundary, dtype, direction):
        self.call = resample_call(RESAMPLINGS[case], boundary, direction, dtype)


class TimePooling(_Pooling, Timed):
    def time_call(self, *parameters):
        self.call()


class TimeSensitivePooling(_SensitivePooling, Timed):
    def time_call(self, *parameters):
        self.call()


class TimeResampling(_Resampling, Timed):
    def time_call(self, *parameters):
        self.call()


class MemoryOfPooling(_Pooling):
    def setup(self, *parameters):
        if memory.why_not():
            skip(memory.why_not())
        memory.settle()
        super().setup(*parameters)

    def track_extra_bytes(self, *parameters):
        return memory.extra_bytes(self.call)

    track_extra_bytes.unit = "bytes"
