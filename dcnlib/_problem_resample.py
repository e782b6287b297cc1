"""What one call of deformable resampling computes: checked once, then frozen.

Beside `_problem.py`, in its words.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from ._problem import (
    Shape,
    Spec,
    addressable,
    common_dtype,
    input_sizes,
    type_error,
    value_error,
)

BOUNDARIES = ("border", "zeros")


class DeformResample2dProblem(NamedTuple):
    """One deformable resampling, checked; shapes are those of the batched call.

    Output pixel (i, j) of channel c samples that channel of the input at
    ``(i + offset[n, 2*c, i, j], j + offset[n, 2*c + 1, i, j])``.
    """

    batch: int
    channels: int
    in_h: int
    in_w: int
    boundary: str
    dtype: str
    batched: bool

    @property
    def input_shape(self) -> Shape:
        return (self.batch, self.channels, self.in_h, self.in_w)

    @property
    def offset_shape(self) -> Shape:
        return (self.batch, 2 * self.channels, self.in_h, self.in_w)

    @property
    def output_shape(self) -> Shape:
        return self.input_shape

    @property
    def channels_last(self) -> bool:
        """No: channels share no positions, and are computed one by one."""
        return False

    def unbatch(self, shape: Shape) -> Shape:
        """`shape` as the caller sees it: without the batch axis if `input` had none."""
        return shape if self.batched else shape[1:]


def deform_resample2d_problem(
    op: str, input: Spec, offset: Spec, grad_output: Spec | None, boundary: str
) -> DeformResample2dProblem:
    """Check one call of `deform_resample2d`; the boundary comes from `boundary_name`."""
    dtype = common_dtype(op, input, offset=offset, grad_output=grad_output)
    *sizes, batched = input_sizes(op, input[0])
    problem = DeformResample2dProblem(*sizes, boundary, dtype, batched)
    for name, spec, shape, layout in (
        ("offset", offset, problem.offset_shape, "2*C"),
        ("grad_output", grad_output, problem.output_shape, "C"),
    ):
        if spec is not None and tuple(spec[0]) != problem.unbatch(shape):
            rule = f"must have shape ({'N, ' if batched else ''}{layout}, H, W)"
            raise value_error(op, name, rule, problem.unbatch(shape), tuple(spec[0]))
    # One image is allowed for even where there is none: workspaces hold it.
    addressable(op, offset=(max(problem.batch, 1), *problem.offset_shape[1:]))
    return problem


#: The same for plain ints, remembered: a layer that runs again pays one dictionary look-up.
cached_resample_problem = lru_cache(maxsize=256)(deform_resample2d_problem)


def boundary_name(op: str, value: Any) -> str:
    """One of `BOUNDARIES`."""
    expected = " or ".join(f'"{name}"' for name in BOUNDARIES)
    if not isinstance(value, str):
        raise type_error(op, "boundary", "must be a name", expected, type(value).__name__)
    if value not in BOUNDARIES:
        raise value_error(op, "boundary", "unknown name", expected, repr(value))
    return value
