"""What one call of deformable RoI pooling computes: checked once, then frozen.

Beside `_problem.py`, in its words. Both dialects become one `DeformRoIPoolProblem`; what differs
between them is `position_sensitive` and values that one of them leaves at 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ._problem import (
    Shape,
    Spec,
    addressable,
    common_dtype,
    integer,
    no_zero,
    ranked,
    type_error,
    value_error,
)

#: The most samples of a bin along one axis that can be asked for.
MOST_SAMPLES = 32767


class DeformRoIPoolProblem(NamedTuple):
    """One deformable RoI pooling, checked.

    Output channel o at bin (ph, pw) averages input channel ``(o*group_h + gh)*group_w + gw`` with
    ``gh = ph*group_h // out_h``, ``gw = pw*group_w // out_w`` over samples that are moved by
    ``offset[roi, 2*k + {x, y}, ph*part_h // out_h, pw*part_w // out_w]``,
    ``k = o // (out_channels/classes)``, times `offset_scale` and the size of the RoI.

    `samples` is their number along each axis of a bin; 0 takes one for each pixel of its extent.
    """

    batch: int
    in_channels: int
    in_h: int
    in_w: int
    rois: int
    out_channels: int
    out_h: int
    out_w: int
    classes: int
    part_h: int
    part_w: int
    group_h: int
    group_w: int
    samples: int
    spatial_scale: float
    offset_scale: float
    position_sensitive: bool
    dtype: str
    has_offset: bool
    has_mask: bool
    channels_last: bool = False

    @property
    def input_shape(self) -> Shape:
        return (self.batch, self.in_channels, self.in_h, self.in_w)

    @property
    def rois_shape(self) -> Shape:
        return (self.rois, 5)

    @property
    def offset_shape(self) -> Shape:
        return (self.rois, 2 * self.classes, self.part_h, self.part_w)

    @property
    def mask_shape(self) -> Shape:
        return (self.rois, 1, self.out_h, self.out_w)

    @property
    def output_shape(self) -> Shape:
        return (self.rois, self.out_channels, self.out_h, self.out_w)

    def unbatch(self, shape: Shape) -> Shape:
        """`shape` as the caller sees it: RoIs name their image, so there is always a batch."""
        return shape


def deform_roi_pool_problem(
    op: str,
    input: Spec,
    rois: Spec,
    offset: Spec | None,
    grad_output: Spec | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    channels_last: bool = False,
) -> DeformRoIPoolProblem:
    """Check one call of `deform_roi_pool`; the numbers come from `pair`, `real`, `samples`."""
    sizes = _images_and_rois(op, input, rois, offset=offset, grad_output=grad_output)
    batch, in_channels, in_h, in_w, roi_count = sizes
    out_h, out_w = output_size
    problem = DeformRoIPoolProblem(
        batch, in_channels, in_h, in_w, roi_count, in_channels, out_h, out_w, 1, out_h, out_w, 1, 1,
        sampling_ratio, spatial_scale, gamma, False, input[1], offset is not None, False,
        channels_last,
    )  # fmt: skip
    if offset is not None:
        layout = "(R, 2, pooled_h, pooled_w)"
        _shape(op, "offset", offset, problem.offset_shape, layout)
    _finish(op, problem, grad_output)
    return problem


def deform_psroi_pool_problem(
    op: str,
    input: Spec,
    rois: Spec,
    offset: Spec | None,
    mask: Spec | None,
    grad_output: Spec | None,
    spatial_scale: float,
    output_size: tuple[int, int],
    output_dim: int,
    group_size: tuple[int, int],
    part_size: tuple[int, int],
    sample_per_part: int,
    offset_std: float,
    channels_last: bool = False,
) -> DeformRoIPoolProblem:
    """Check one call of `deform_psroi_pool`; without offsets `offset` is None."""
    sizes = _images_and_rois(op, input, rois, offset=offset, mask=mask, grad_output=grad_output)
    batch, in_channels, in_h, in_w, roi_count = sizes
    if output_dim * group_size[0] * group_size[1] != in_channels:
        raise value_error(
            op,
            "input",
            "its channels must be output_dim * group_h * group_w",
            f"{output_dim} * {group_size[0]} * {group_size[1]}"
            f" = {output_dim * group_size[0] * group_size[1]}",
            in_channels,
        )
    classes = 1
    if offset is not None:
        layout = "(R, 2*classes, part_h, part_w)"
        classes = _classes(op, ranked(op, "offset", offset[0], 4, layout)[1], output_dim)
    problem = DeformRoIPoolProblem(
        batch, in_channels, in_h, in_w, roi_count, output_dim, *output_size, classes, *part_size,
        *group_size, sample_per_part, spatial_scale, offset_std, True, input[1],
        offset is not None, mask is not None, channels_last,
    )  # fmt: skip
    if offset is not None:
        _shape(op, "offset", offset, problem.offset_shape, layout)
    if mask is not None:
        _shape(op, "mask", mask, problem.mask_shape, "(R, 1, pooled_h, pooled_w)")
    _finish(op, problem, grad_output)
    return problem


#: The same for plain ints, remembered: a layer that runs again pays one dictionary look-up.
cached_roi_pool_problem = lru_cache(maxsize=256)(deform_roi_pool_problem)
cached_psroi_pool_problem = lru_cache(maxsize=256)(deform_psroi_pool_problem)


def samples(op: str, argument: str, value: Any, lowest: int) -> int:
    """A number of samples along one axis of a bin."""
    return integer(op, argument, value, lowest, MOST_SAMPLES)


def check_image_numbers(op: str, rois: np.ndarray, batch: int) -> None:
    """Every RoI must name an image of the batch; `rois` is float64 (R, 5)."""
    number = rois[:, 0]
    wrong = ~((number >= 0) & (number < batch) & (number == np.floor(number)))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise value_error(
            op,
            "rois",
            "column 0 must be the number of an image of the batch",
            f"a whole number in [0, {batch - 1}]" if batch else "no RoIs for an empty batch",
            f"{number[first]:g} in row {first}",
        )


def _images_and_rois(
    op: str, input: Spec, rois: Spec, **others: Spec | None
) -> tuple[int, int, int, int, int]:
    """batch, channels, height, width, number of RoIs; and all dtypes."""
    dtype = common_dtype(op, input, **others)
    if rois[1] not in (dtype, "float32", "float64"):
        raise type_error(
            op,
            "rois",
            "must have the dtype of input, or float32 or float64",
            ", ".join(dict.fromkeys((dtype, "float32", "float64"))),
            rois[1],
        )
    batch, channels, in_h, in_w = ranked(op, "input", input[0], 4, "(N, C, H, W)")
    no_zero(op, "input", input[0][1:])
    layout = "(R, 5): image number, x1, y1, x2, y2"
    roi_count, columns = ranked(op, "rois", rois[0], 2, layout)
    if columns != 5:
        raise value_error(op, "rois", f"must have shape {layout}", "5 columns", columns)
    return batch, channels, in_h, in_w, roi_count


def _classes(op: str, channels: int, output_dim: int) -> int:
    if channels < 2 or channels % 2:
        raise value_error(
            op, "offset", "its channels must be 2*classes", "an even number from 2 on", channels
        )
    if output_dim % (channels // 2):
        raise value_error(
            op,
            "offset",
            "the classes its channels make must divide output_dim",
            f"a divisor of {output_dim}",
            f"{channels} / 2 = {channels // 2}",
        )
    return channels // 2


def _shape(op: str, name: str, spec: Spec, expected: Shape, layout: str) -> None:
    if tuple(spec[0]) != expected:
        raise value_error(op, name, f"must have shape {layout}", expected, tuple(spec[0]))


def _finish(op: str, problem: DeformRoIPoolProblem, grad_output: Spec | None) -> None:
    if grad_output is not None:
        layout = "(R, channels, pooled_h, pooled_w)"
        _shape(op, "grad_output", grad_output, problem.output_shape, layout)
    # One RoI and one image are allowed for even where there are none: workspaces hold them.
    addressable(
        op,
        input=(max(problem.batch, 1), *problem.input_shape[1:]),
        output=(max(problem.rois, 1), *problem.output_shape[1:]),
        offset=(max(problem.rois, 1), *problem.offset_shape[1:]),
    )
