"""What one call computes: checked once, then frozen.

Every door (NumPy function, torch function, raw torch op, meta kernel, module) describes its
arguments by shape and dtype name and gets a `DeformConv2dProblem` or the same error from here.
Everything below this line, native code included, trusts it.

Error text: ``<op>: <argument>: <rule>; expected <...>, got <...>``, and the way out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

DTYPES = ("float32", "float64", "float16", "bfloat16")

#: The largest size, stride, padding, dilation or group count that is accepted.
LARGEST = 2**31 - 1
_INT64_MAX = 2**63 - 1
#: Bytes of one element of the widest workspace: sizes are checked as if everything were float64.
_WIDEST = 8
_SEQUENCES = (list, tuple)  # isinstance takes longer to build list | tuple than to use it

Shape = tuple[int, ...]
#: Shape and dtype name of one argument.
Spec = tuple[Shape, str]


class DeformConv2dProblem(NamedTuple):
    """One (deformable) convolution, checked; shapes are those of the batched call.

    The offset of kernel tap (i, j) at output pixel (oh, ow) moves the sample from
    ``(oh*stride_h - pad_top + i*dilation_h, ow*stride_w - pad_left + j*dilation_w)``.
    Bottom and right padding act through `out_h` and `out_w` alone.
    """

    batch: int
    in_channels: int
    in_h: int
    in_w: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    out_h: int
    out_w: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    dilation_h: int
    dilation_w: int
    groups: int
    offset_groups: int
    dtype: str
    has_mask: bool
    has_bias: bool
    batched: bool
    channels_last: bool = False

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def input_shape(self) -> Shape:
        return (self.batch, self.in_channels, self.in_h, self.in_w)

    @property
    def offset_shape(self) -> Shape:
        return (self.batch, 2 * self.offset_groups * self.taps, self.out_h, self.out_w)

    @property
    def weight_shape(self) -> Shape:
        return (
            self.out_channels,
            self.in_channels // self.groups,
            self.kernel_h,
            self.kernel_w,
        )

    @property
    def bias_shape(self) -> Shape:
        return (self.out_channels,)

    @property
    def mask_shape(self) -> Shape:
        return (self.batch, self.offset_groups * self.taps, self.out_h, self.out_w)

    @property
    def output_shape(self) -> Shape:
        return (self.batch, self.out_channels, self.out_h, self.out_w)

    def unbatch(self, shape: Shape) -> Shape:
        """`shape` as the caller sees it: without the batch axis if `input` had none."""
        return shape if self.batched else shape[1:]


def value_error(op: str, argument: str, rule: str, expected: object, got: object, cure: str = ""):
    """A `ValueError` in the form that every message of this library has."""
    return ValueError(_text(op, argument, rule, expected, got, cure))


def type_error(op: str, argument: str, rule: str, expected: object, got: object, cure: str = ""):
    """A `TypeError` in the form that every message of this library has."""
    return TypeError(_text(op, argument, rule, expected, got, cure))


def _text(op: str, argument: str, rule: str, expected: object, got: object, cure: str) -> str:
    text = f"{op}: {argument}: {rule}; expected {expected}, got {got}"
    return f"{text}; {cure}" if cure else text


def integer(op: str, argument: str, value: Any, lowest: int, highest: int = LARGEST) -> int:
    """`value` as an int in [lowest, highest]; floats, bools and strings are no integers."""
    if type(value) is int and lowest <= value <= highest:
        return value
    expected = f"an int in [{lowest}, {highest}]"
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise type_error(
            op, argument, "must be an integer", expected, f"{_brief(value)} ({_kind(value)})"
        ) from None
    if not lowest <= number <= highest:
        raise value_error(
            op, argument, f"must be in [{lowest}, {highest}]", expected, _brief(value)
        )
    return number


def real(op: str, argument: str, value: Any, above_zero: bool = False) -> float:
    """`value` as a finite float; bools and strings are no numbers."""
    if type(value) is float and 0 < value < math.inf:
        return value
    expected = "a finite number above 0" if above_zero else "a finite number"
    try:
        if isinstance(value, str | bytes) or _is_bool(value):
            raise TypeError
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise type_error(
            op, argument, "must be a number", expected, f"{_brief(value)} ({_kind(value)})"
        ) from None
    if not math.isfinite(number) or (above_zero and number <= 0):
        raise value_error(op, argument, f"must be {expected}", expected, _brief(value))
    return number


def optional_integer(op: str, argument: str, value: Any) -> int | None:
    """A group count: None, or an int in [1, 2147483647]."""
    return None if value is None else integer(op, argument, value, 1)


def pair(op: str, argument: str, value: Any, lowest: int = 1) -> tuple[int, int]:
    """An int or a pair (h, w) as a pair."""
    if type(value) is int and lowest <= value <= LARGEST:
        return (value, value)
    if isinstance(value, _SEQUENCES):
        if len(value) != 2:
            raise value_error(
                op, argument, "must be an int or a pair (h, w)", "2 values", _brief(value)
            )
        return (
            integer(op, argument, value[0], lowest),
            integer(op, argument, value[1], lowest),
        )
    number = integer(op, argument, value, lowest)
    return (number, number)


def four_sides(
    op: str,
    value: Any,
    kernel: Sequence[int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """`padding` in any accepted form as (top, bottom, left, right).

    "same" keeps height and width at stride 1; an odd total puts the extra row or column at the
    bottom or right, as torch does. `kernel` is (kernel_h, kernel_w) and only read for "same".
    """
    if isinstance(value, str):
        if value == "valid":
            return (0, 0, 0, 0)
        if value != "same":
            raise value_error(op, "padding", "unknown name", '"same" or "valid"', _brief(value))
        if stride != (1, 1):
            raise value_error(
                op,
                "padding",
                '"same" needs stride 1',
                "stride (1, 1)",
                stride,
                "give the padding in pixels instead",
            )
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        top, left = total_h // 2, total_w // 2
        return (top, total_h - top, left, total_w - left)
    if isinstance(value, _SEQUENCES) and len(value) != 2:
        if len(value) != 4:
            raise value_error(
                op,
                "padding",
                'must be an int, a pair (h, w), (top, bottom, left, right), "same" or "valid"',
                "1, 2 or 4 values",
                _brief(value),
            )
        top, bottom, left, right = value
        return (
            integer(op, "padding", top, 0),
            integer(op, "padding", bottom, 0),
            integer(op, "padding", left, 0),
            integer(op, "padding", right, 0),
        )
    pad_h, pad_w = pair(op, "padding", value, 0)
    return (pad_h, pad_h, pad_w, pad_w)


def deform_conv2d_problem(
    op: str,
    input: Spec,
    offset: Spec | None,
    weight: Spec,
    bias: Spec | None,
    mask: Spec | None,
    grad_output: Spec | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int | None,
    offset_groups: int | None,
    channels_last: bool = False,
) -> DeformConv2dProblem:
    """Check one call and describe it; the integers come from `pair`, `four_sides`, `integer`.

    `offset` None stands for a plain convolution.
    """
    dtype = common_dtype(
        op, input, offset=offset, weight=weight, bias=bias, mask=mask, grad_output=grad_output
    )
    batch, in_channels, in_h, in_w, batched = input_sizes(op, input[0])
    rank = 4 if batched else 3
    out_channels, group_channels, kernel_h, kernel_w = ranked(
        op, "weight", weight[0], 4, "(out_channels, in_channels/groups, kernel_h, kernel_w)"
    )
    no_zero(op, "weight", weight[0])
    layout = "(N, 2*offset_groups*kernel_h*kernel_w, out_h, out_w)"
    if offset is not None:
        offset_sizes = ranked(op, "offset", offset[0], rank, layout if batched else _rest(layout))

    groups = _groups(op, groups, in_channels, out_channels, group_channels)
    if offset is None:
        offset_groups = 1
    else:
        offset_groups = _offset_groups(
            op, offset_groups, in_channels, offset_sizes[-3], kernel_h * kernel_w
        )
    out_h = _output_size(
        op, "height", in_h, padding[0] + padding[1], dilation[0], kernel_h, stride[0]
    )
    out_w = _output_size(
        op, "width", in_w, padding[2] + padding[3], dilation[1], kernel_w, stride[1]
    )

    problem = DeformConv2dProblem(
        batch,
        in_channels,
        in_h,
        in_w,
        out_channels,
        kernel_h,
        kernel_w,
        out_h,
        out_w,
        stride[0],
        stride[1],
        padding[0],
        padding[2],
        dilation[0],
        dilation[1],
        groups,
        offset_groups,
        dtype,
        mask is not None,
        bias is not None,
        batched,
        channels_last,
    )
    if offset is not None:
        _shape(op, problem, "offset", offset, problem.offset_shape, layout)
    if mask is not None:
        layout = "(N, offset_groups*kernel_h*kernel_w, out_h, out_w)"
        _shape(op, problem, "mask", mask, problem.mask_shape, layout)
    if bias is not None and tuple(bias[0]) != problem.bias_shape:
        raise value_error(
            op, "bias", "must have shape (out_channels,)", problem.bias_shape, tuple(bias[0])
        )
    if grad_output is not None:
        layout = "(N, out_channels, out_h, out_w)"
        _shape(op, problem, "grad_output", grad_output, problem.output_shape, layout)
    addressable(
        op,
        input=problem.input_shape,
        offset=() if offset is None else problem.offset_shape,
        weight=problem.weight_shape,
        output=problem.output_shape,
    )
    return problem


#: The same for plain ints, remembered: a layer that runs again pays one dictionary look-up.
#: Symbolic sizes (torch.compile, torch.export) do not hash and take the function itself.
cached_problem = lru_cache(maxsize=1024)(deform_conv2d_problem)


def common_dtype(op: str, input: Spec, **others: Spec | None) -> str:
    """The dtype of `input`, which all others that are not None must share."""
    dtype = input[1]
    if dtype not in DTYPES:
        raise type_error(op, "input", "unsupported dtype", "one of " + ", ".join(DTYPES), dtype)
    for name, spec in others.items():
        if spec is not None and spec[1] != dtype:
            raise type_error(
                op,
                name,
                "must have the dtype of input",
                dtype,
                spec[1],
                "convert one of them: nothing is cast silently",
            )
    return dtype


def input_sizes(op: str, shape: Shape) -> tuple[int, int, int, int, bool]:
    if len(shape) not in (3, 4):
        raise value_error(
            op,
            "input",
            "must have shape (N, C, H, W) or, unbatched, (C, H, W)",
            "3 or 4 dimensions",
            f"{len(shape)} in shape {tuple(shape)}",
        )
    batched = len(shape) == 4
    no_zero(op, "input", shape[1:] if batched else shape)
    return (*shape, True) if batched else (1, *shape, False)  # type: ignore[return-value]


def ranked(op: str, name: str, shape: Shape, rank: int, layout: str) -> Shape:
    if len(shape) != rank:
        raise value_error(
            op,
            name,
            f"must have shape {layout}",
            f"{rank} dimensions",
            f"{len(shape)} in shape {tuple(shape)}",
        )
    return shape


def no_zero(op: str, name: str, shape: Shape) -> None:
    for size in shape:
        if size < 1 or (_is_number(size) and size > LARGEST):
            raise value_error(
                op,
                name,
                "only the batch may be empty, and no size may pass 2147483647",
                f"sizes in [1, {LARGEST}]",
                tuple(shape),
            )


def _groups(
    op: str, groups: int | None, in_channels: int, out_channels: int, group_channels: int
) -> int:
    if groups is None:
        if in_channels % group_channels:
            raise value_error(
                op,
                "weight",
                "its second size must divide the channels of input (it is in_channels/groups)",
                f"a divisor of {in_channels}",
                group_channels,
            )
        groups = in_channels // group_channels
    elif in_channels % groups:
        raise value_error(
            op, "groups", "must divide in_channels", f"a divisor of {in_channels}", groups
        )
    elif group_channels * groups != in_channels:
        raise value_error(
            op,
            "weight",
            "its second size must be in_channels/groups",
            f"{in_channels} / {groups} = {in_channels // groups}",
            group_channels,
        )
    if out_channels % groups:
        raise value_error(
            op,
            "weight",
            "groups must divide its first size, out_channels",
            f"a multiple of {groups}",
            out_channels,
        )
    return groups


def _offset_groups(
    op: str, offset_groups: int | None, in_channels: int, offset_channels: int, taps: int
) -> int:
    if offset_groups is None:
        if offset_channels < 2 * taps or offset_channels % (2 * taps):
            raise value_error(
                op,
                "offset",
                "its channels must be 2*offset_groups*kernel_h*kernel_w",
                f"a multiple of {2 * taps}",
                offset_channels,
                _mask_hint(offset_channels, taps),
            )
        offset_groups = offset_channels // (2 * taps)
        if in_channels % offset_groups:
            raise value_error(
                op,
                "offset",
                "the offset groups its channels make must divide in_channels",
                f"a divisor of {in_channels}",
                f"{offset_channels} / {2 * taps} = {offset_groups}",
            )
    elif in_channels % offset_groups:
        raise value_error(
            op,
            "offset_groups",
            "must divide in_channels",
            f"a divisor of {in_channels}",
            offset_groups,
        )
    return offset_groups


def _mask_hint(offset_channels: int, taps: int) -> str:
    if offset_channels == taps:
        return f"{taps} channels look like a mask: pass it as mask="
    if offset_channels == 3 * taps:
        return (
            "3 channels a tap look like offset and mask in one: split them into offset= and mask="
        )
    return ""


def _output_size(
    op: str, axis: str, size: int, padding: int, dilation: int, kernel: int, stride: int
) -> int:
    span = dilation * (kernel - 1) + 1
    if size + padding < span:
        raise value_error(
            op,
            "input",
            f"the kernel must fit into the padded {axis}",
            f"at least dilation*(kernel-1)+1 = {span}",
            f"{size} + padding {padding} = {size + padding}",
            "use more padding, less dilation or a smaller kernel",
        )
    return (size + padding - span) // stride + 1


def _shape(
    op: str, problem: DeformConv2dProblem, name: str, spec: Spec, batched_shape: Shape, layout: str
) -> None:
    expected, got = problem.unbatch(batched_shape), tuple(spec[0])
    if got != expected:
        cure = ""
        if name == "offset" and len(got) == len(expected):
            cure = _mask_hint(got[-3], problem.taps)
        rule = f"must have shape {layout if problem.batched else _rest(layout)}"
        raise value_error(op, name, rule, expected, got, cure)


def _rest(layout: str) -> str:
    return layout.replace("(N, ", "(")


def addressable(op: str, **shapes: Shape) -> None:
    """No size below may overflow: every tensor, counted in the widest element, fits in int64."""
    for name, shape in shapes.items():
        if not all(map(_is_number, shape)):
            continue
        elements = 1
        for size in shape:
            elements *= size
        if elements > _INT64_MAX // _WIDEST or max(shape[1:], default=0) > LARGEST:
            raise value_error(
                op,
                name,
                "is too large to address",
                f"sizes up to {LARGEST} and less than 2**60 elements",
                tuple(shape),
            )


def _is_number(size: Any) -> bool:
    """Not a symbol: limits of symbols would become conditions of a graph, and are checked in it."""
    return type(size) is int


def _is_bool(value: Any) -> bool:
    """Whether it is a bool of Python, NumPy or torch: they have __index__, but count nothing."""
    return "bool" in str(getattr(value, "dtype", type(value).__name__))


def _kind(value: Any) -> str:
    return type(value).__name__


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
