"""The validator alone: sizes against unbounded integers, forms of integers, exact sentences.

`test_hostile.py` sends the same faults through every door.
"""

import random
import re

import numpy as np
import pytest

from dcnlib import _problem
from dcnlib._problem import (
    DTYPES,
    LARGEST,
    DeformConv2dProblem,
    cached_problem,
    deform_conv2d_problem,
    four_sides,
    integer,
    optional_integer,
    pair,
)

SHAPES = {
    "input": (2, 6, 9, 8),
    "offset": (2, 36, 5, 10),
    "weight": (4, 3, 3, 2),
    "bias": (4,),
    "mask": (2, 18, 5, 10),
    "grad_output": (2, 4, 5, 10),
}
#: Stride, padding, dilation, groups, offset groups.
PLAIN = ((1, 1), (0, 0, 0, 0), (1, 1), None, None)
NUMBERS = ((2, 1), (1, 1, 2, 2), (1, 2), 2, 3)


def problem(numbers=NUMBERS, dtypes=None, **shapes):
    """A call of these shapes; None leaves out an argument."""
    dtypes = dtypes or {}
    specs = [
        None if shape is None else (shape, dtypes.get(name, "float32"))
        for name, shape in (SHAPES | shapes).items()
    ]
    return deform_conv2d_problem("op", *specs, *numbers)


def test_a_good_call_is_described():
    assert problem() == DeformConv2dProblem(
        batch=2, in_channels=6, in_h=9, in_w=8, out_channels=4, kernel_h=3, kernel_w=2,
        out_h=5, out_w=10, stride_h=2, stride_w=1, pad_top=1, pad_left=2, dilation_h=1,
        dilation_w=2, groups=2, offset_groups=3, dtype="float32", has_mask=True, has_bias=True,
        batched=True, channels_last=False,
    )  # fmt: skip


def test_shapes_of_a_description():
    call = problem()
    assert {
        "input": call.input_shape,
        "offset": call.offset_shape,
        "weight": call.weight_shape,
        "bias": call.bias_shape,
        "mask": call.mask_shape,
        "grad_output": call.output_shape,
    } == SHAPES
    assert call.taps == 6 and call.unbatch(call.mask_shape) == call.mask_shape


def test_without_batch_mask_and_bias():
    call = problem(
        input=(6, 9, 8), offset=(36, 5, 10), mask=None, bias=None, grad_output=(4, 5, 10)
    )
    assert call[:4] == (1, 6, 9, 8)
    assert not (call.batched or call.has_mask or call.has_bias)
    assert call.unbatch(call.output_shape) == (4, 5, 10)


def test_batch_may_be_empty():
    empty = {name: (0, *SHAPES[name][1:]) for name in ("input", "offset", "mask", "grad_output")}
    assert problem(**empty).batch == 0


def test_remembered_calls_are_the_same():
    specs = [(shape, "float32") for shape in SHAPES.values()]
    assert cached_problem("op", *specs, *NUMBERS) == problem()
    assert cached_problem("op", *specs, *NUMBERS) is cached_problem("op", *specs, *NUMBERS)
    for _ in range(2):  # and errors are raised every time
        with pytest.raises(ValueError, match="bias"):
            cached_problem("op", *specs[:3], ((5,), "float32"), *specs[4:], *NUMBERS)


# ---- sizes -------------------------------------------------------------------------------------


def hostile_integer(rng, lowest):
    """Small, or within a few of a power of two, as the validator lets integers through."""
    if rng.random() < 0.6:
        return lowest + rng.randrange(12)
    return min(max(lowest, 2 ** rng.randrange(32) + rng.randrange(-3, 4)), LARGEST)


def refusal(function, *arguments):
    """The text of the ValueError."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"should be refused: {arguments}")


def test_output_sizes_against_unbounded_integers():
    """100 000 random sizes: as many steps as there are, or an error of the one form."""
    rng = random.Random(0)
    accepted = 0
    for _ in range(100_000):
        size, kernel = hostile_integer(rng, 1), hostile_integer(rng, 1)
        dilation, stride = hostile_integer(rng, 1), hostile_integer(rng, 1)
        before, after = hostile_integer(rng, 0), hostile_integer(rng, 0)
        padded, span = size + before + after, dilation * (kernel - 1) + 1
        arguments = ("op", "height", size, before + after, dilation, kernel, stride)
        if span > padded:
            text = refusal(_problem._output_size, *arguments)
            assert text.startswith("op: input: the kernel must fit into the padded height; ")
            assert f" = {span}, got {size} + padding {before + after} = {padded}; use more" in text
            continue
        # The last position fits, one more does not.
        out = _problem._output_size(*arguments)
        assert out >= 1 and (out - 1) * stride + span <= padded < out * stride + span
        accepted += 1
    assert 30_000 < accepted < 90_000


def test_calls_against_unbounded_integers():
    """20 000 random calls with sizes up to 2**31 - 1: accepted if all can be addressed."""
    rng = random.Random(1)
    accepted = 0
    for _ in range(20_000):
        size = [hostile_integer(rng, 1) for _ in range(2)]
        kernel, dilation, stride = ([hostile_integer(rng, 1) for _ in range(2)] for _ in range(3))
        sides = tuple(hostile_integer(rng, 0) for _ in range(4))
        batch, channels, outputs = (hostile_integer(rng, 1) for _ in range(3))
        out = []
        for axis in range(2):
            span = dilation[axis] * (kernel[axis] - 1) + 1
            room = size[axis] + sides[2 * axis] + sides[2 * axis + 1] - span
            out.append(room // stride[axis] + 1 if room >= 0 else 0)
        shapes = {
            "input": (batch, channels, *size),
            "offset": (batch, 2 * kernel[0] * kernel[1], *out),
            "weight": (outputs, channels, *kernel),
            "output": (batch, outputs, *out),
        }
        elements = [int(np.prod([*map(int, s)], dtype=object)) for s in shapes.values()]
        sizes = [n for s in shapes.values() for n in s]
        addressable = min(out) > 0 and max(sizes) <= LARGEST and 8 * max(elements) < 2**63
        arguments = [(shapes[name], "float32") for name in ("input", "offset", "weight")]
        numbers = (tuple(stride), sides, tuple(dilation), None, None)
        if not addressable:
            arguments += [None, None, None, *numbers]
            text = refusal(deform_conv2d_problem, "op", *arguments)
            assert re.match(r"op: \w+: [^;]+; expected [^;]+, got ", text)
            continue
        call = deform_conv2d_problem("op", *arguments, None, None, None, *numbers)
        assert call.output_shape == shapes["output"] and (call.out_h, call.out_w) == tuple(out)
        accepted += 1
    assert accepted > 2_000


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"input": (1, 1, 2**31 - 1, 2**31 - 1), "weight": (1, 1, 1, 1)}, "input"),
        ({"input": (2**31 - 1, 1, 2**30, 1), "weight": (1, 1, 1, 1)}, "input"),
        ({"input": (2**31 - 1, 1, 2**29, 1), "weight": (1, 1, 1, 1)}, "offset"),
        ({"input": (1, 1, 1, 1), "weight": (2**31, 1, 1, 1)}, "weight"),
        ({"input": (1, 2**31, 1, 1), "weight": (1, 2**31, 1, 1)}, "input"),
    ],
    ids=["input", "input_bytes", "offset_bytes", "weight_size", "channels"],
)
def test_too_large_to_address(shapes, named):
    batch, _, *size = shapes["input"]
    shapes = (shapes["input"], (batch, 2, *size), shapes["weight"])
    specs = [(shape, "float32") for shape in shapes]
    rule = "(is too large to address|only the batch may be empty, and no size may pass 2147483647)"
    with pytest.raises(ValueError, match=f"^op: {named}: {rule}; "):
        deform_conv2d_problem("op", *specs, None, None, None, *PLAIN)


def test_just_addressable():
    shapes = ((2**31 - 1, 1, 2**28, 1), (2**31 - 1, 2, 2**28, 1), (1, 1, 1, 1))
    specs = [(shape, "float32") for shape in shapes]
    call = deform_conv2d_problem("op", *specs, None, None, None, *PLAIN)
    assert call.output_shape == shapes[0]


# ---- integers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 7, LARGEST, np.int8(5), np.uint64(9), np.array(3)], ids=repr)
def test_integers(value):
    number = integer("op", "stride", value, 1)
    assert number == int(value) and type(number) is int
    assert pair("op", "stride", value) == (number, number)
    assert pair("op", "stride", [value, 2]) == (number, 2)
    assert optional_integer("op", "groups", value) == number


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pair("op", "stride", (0, 1)),
            ValueError,
            "op: stride: must be in [1, 2147483647]; expected an int in [1, 2147483647], got 0",
        ),
        (
            lambda: pair("op", "stride", 2**31),
            ValueError,
            "op: stride: must be in [1, 2147483647]; expected an int in [1, 2147483647], "
            "got 2147483648",
        ),
        (
            lambda: pair("op", "dilation", 1.0),
            TypeError,
            "op: dilation: must be an integer; expected an int in [1, 2147483647], got 1.0 (float)",
        ),
        (
            lambda: pair("op", "dilation", True),
            TypeError,
            "op: dilation: must be an integer; expected an int in [1, 2147483647], got True (bool)",
        ),
        (
            lambda: pair("op", "stride", (1, 2, 3)),
            ValueError,
            "op: stride: must be an int or a pair (h, w); expected 2 values, got (1, 2, 3)",
        ),
        (
            lambda: four_sides("op", -1, (3, 3), (1, 1), (1, 1)),
            ValueError,
            "op: padding: must be in [0, 2147483647]; expected an int in [0, 2147483647], got -1",
        ),
        (
            lambda: four_sides("op", (1, 2, 3), (3, 3), (1, 1), (1, 1)),
            ValueError,
            'op: padding: must be an int, a pair (h, w), (top, bottom, left, right), "same" or '
            '"valid"; expected 1, 2 or 4 values, got (1, 2, 3)',
        ),
        (
            lambda: four_sides("op", "SAME", (3, 3), (1, 1), (1, 1)),
            ValueError,
            "op: padding: unknown name; expected \"same\" or \"valid\", got 'SAME'",
        ),
        (
            lambda: four_sides("op", "same", (3, 3), (1, 2), (1, 1)),
            ValueError,
            'op: padding: "same" needs stride 1; expected stride (1, 1), got (1, 2); give the '
            "padding in pixels instead",
        ),
        (
            lambda: optional_integer("op", "groups", 0),
            ValueError,
            "op: groups: must be in [1, 2147483647]; expected an int in [1, 2147483647], got 0",
        ),
    ],
    ids=[
        "zero", "too_large", "float", "bool", "three_values", "negative_padding", "three_sides",
        "unknown_name", "same_with_stride", "zero_groups",
    ],
)  # fmt: skip
def test_sentences_about_integers(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}$") as raised:
        call()
    assert type(raised.value) is error
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_long_values_are_cut():
    with pytest.raises(TypeError) as raised:
        pair("op", "stride", "x" * 10_000)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("total", range(8))
def test_same_puts_the_odd_pixel_last(total):
    top, bottom, left, right = four_sides("op", "same", (total + 1, 1), (1, 1), (1, 1))
    assert (top + bottom, left, right) == (total, 0, 0) and bottom - top in (0, 1)


# ---- sentences about shapes and dtypes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"input": (6, 9)},
            "op: input: must have shape (N, C, H, W) or, unbatched, (C, H, W); expected 3 or 4 "
            "dimensions, got 2 in shape (6, 9)",
        ),
        (
            {"input": (2, 6, 0, 8)},
            "op: input: only the batch may be empty, and no size may pass 2147483647; expected "
            "sizes in [1, 2147483647], got (6, 0, 8)",
        ),
        (
            {"weight": (4, 3, 6)},
            "op: weight: must have shape (out_channels, in_channels/groups, kernel_h, kernel_w); "
            "expected 4 dimensions, got 3 in shape (4, 3, 6)",
        ),
        (
            {"weight": (4, 2, 3, 2)},
            "op: weight: its second size must be in_channels/groups; expected 6 / 2 = 3, got 2",
        ),
        (
            {"weight": (5, 3, 3, 2)},
            "op: weight: groups must divide its first size, out_channels; expected a multiple of "
            "2, got 5",
        ),
        (
            {"offset": (2, 36, 5, 9)},
            "op: offset: must have shape (N, 2*offset_groups*kernel_h*kernel_w, out_h, out_w); "
            "expected (2, 36, 5, 10), got (2, 36, 5, 9)",
        ),
        (
            {"mask": (2, 18, 4, 10)},
            "op: mask: must have shape (N, offset_groups*kernel_h*kernel_w, out_h, out_w); "
            "expected (2, 18, 5, 10), got (2, 18, 4, 10)",
        ),
        (
            {"bias": (1,)},
            "op: bias: must have shape (out_channels,); expected (4,), got (1,)",
        ),
        (
            {"grad_output": (2, 4, 5, 1)},
            "op: grad_output: must have shape (N, out_channels, out_h, out_w); expected "
            "(2, 4, 5, 10), got (2, 4, 5, 1)",
        ),
        (
            {"weight": (4, 3, 12, 2)},
            "op: input: the kernel must fit into the padded height; expected at least "
            "dilation*(kernel-1)+1 = 12, got 9 + padding 2 = 11; use more padding, less dilation "
            "or a smaller kernel",
        ),
    ],
    ids=[
        "rank", "empty", "weight_rank", "group_channels", "out_channels", "offset", "mask", "bias",
        "grad_output", "kernel",
    ],
)  # fmt: skip
def test_sentences_about_shapes(change, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        problem(**change)


@pytest.mark.parametrize(
    ("channels", "hint"),
    [
        (6, "6 channels look like a mask: pass it as mask="),
        (18, "split them into offset= and mask="),
    ],
    ids=["a_mask", "both_in_one"],
)
@pytest.mark.parametrize("offset_groups", [None, 1], ids=["inferred", "given"])
def test_hints_for_the_usual_mistakes(channels, hint, offset_groups):
    with pytest.raises(ValueError, match=f"^op: offset: .*; .*{hint}"):
        problem((*NUMBERS[:3], 2, offset_groups), offset=(2, channels, 5, 10), mask=None)


@pytest.mark.parametrize(
    ("groups", "offset_groups", "text"),
    [
        (4, 3, "op: groups: must divide in_channels; expected a divisor of 6, got 4"),
        (2, 4, "op: offset_groups: must divide in_channels; expected a divisor of 6, got 4"),
    ],
    ids=["groups", "offset_groups"],
)
def test_sentences_about_groups(groups, offset_groups, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        problem((*NUMBERS[:3], groups, offset_groups))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    same = dict.fromkeys(SHAPES, dtype)
    assert problem(dtypes=same).dtype == dtype
    for name in list(SHAPES)[1:]:
        for other in (*DTYPES, "int32"):
            if other == dtype:
                continue
            with pytest.raises(TypeError) as raised:
                problem(dtypes=same | {name: other})
            assert str(raised.value) == (
                f"op: {name}: must have the dtype of input; expected {dtype}, got {other}; "
                "convert one of them: nothing is cast silently"
            )


def test_unknown_dtype():
    expected = "one of float32, float64, float16, bfloat16"
    text = f"op: input: unsupported dtype; expected {expected}, got int64"
    with pytest.raises(TypeError, match=f"^{text}$"):
        problem(dtypes=dict.fromkeys(SHAPES, "int64"))
