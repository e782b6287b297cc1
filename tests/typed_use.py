"""The public names as a type checker sees them: `make lint` runs mypy on this file."""

from typing import assert_type

import numpy as np

import dcnlib
from dcnlib import convert

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def with_numpy(x: FloatArray, offset: FloatArray, weight: FloatArray) -> None:
    y = dcnlib.deform_conv2d(x, offset, weight, padding=1, groups=1, backend="reference")
    assert_type(y, FloatArray)
    grads = dcnlib.deform_conv2d_backward(y, x, offset, weight, padding=(1, 1, 0, 2))
    assert grads.offset is not None


def misspelt() -> None:
    dcnlib.deform_convv2d  # type: ignore[attr-defined]  # noqa: B018


def pooling(x: FloatArray, rois: FloatArray, offset: FloatArray) -> None:
    y = dcnlib.deform_roi_pool(x, rois, offset, 7, spatial_scale=1 / 16)
    assert_type(y, FloatArray)
    grads = dcnlib.deform_roi_pool_backward(y, x, rois, offset, (7, 7))
    assert grads.offset is not None
    y = dcnlib.deform_psroi_pool(x, rois, None, 0.5, 7, 10, group_size=(7, 7))
    assert dcnlib.deform_psroi_pool_backward(y, x, rois, None, 0.5, 7, 10).mask is None


def resampling(x: FloatArray, offset: FloatArray) -> None:
    y = dcnlib.deform_resample2d(x, offset, boundary="zeros")
    assert_type(y, FloatArray)
    assert dcnlib.deform_resample2d_backward(y, x, offset).offset is not None


def converting(offset: FloatArray) -> None:
    assert_type(convert.offset(offset, "xy", kernel_size=(3, 3)), FloatArray)
    order: np.ndarray = convert.offset_channels("blocked", "dcnlib", 3)
    assert order is not None


def settings() -> None:
    dcnlib.set_num_threads(2)
    assert_type(dcnlib.get_num_threads(), int)
    with dcnlib.cpu_isa("avx2") as isa:
        name: str = isa
    available, reason = dcnlib.backends()[name]
    assert_type(available, bool)
    assert_type(reason, str)
    assert_type(dcnlib.__version__, str)


def analysis(offset: FloatArray) -> None:
    seen = dcnlib.analysis.sampling_locations(offset, (1, 1), padding=1)
    assert_type(seen, dcnlib.analysis.SamplingLocations)
    (row,) = dcnlib.analysis.offset_statistics(offset, padding=1)
    assert_type(row.effective_dilation, float)
