"""Rounding errors on real-valued data: bounds, targets, and independence of the image's size.

Three measures, all in units of the result's unit roundoff u:

elementwise   |y - y*| <= u (8 S + 4 S4) for every element, S the same sum over absolute values and
              S4 that sum with all four bilinear weights 1
max-norm      largest error over largest value, output and five gradients, `testing.TOLERANCES`
rms           root mean square error over root mean square value, half of that

The exact values are the reference's float64 for float32 and 16-bit data (converted exactly), and
its formulas in long double for float64 data. `pytest -s` prints the largest errors measured.
"""

from collections import defaultdict
from functools import cache

import numpy as np
import pytest

import dcnlib
from dcnlib import testing
from dcnlib.backends import reference
from dcnlib.testing import OUTPUTS, UNIT_ROUNDOFF, Geometry

ISAS = testing.cpu_isas()
SAME = (1, 1, 1, 1)
THREE = (3, 3)

SHAPES = {
    "typical": Geometry(2, 64, 28, 28, 32, THREE, padding=SAME),
    "deep": Geometry(1, 256, 24, 24, 32, THREE, padding=SAME),
    "deepest": Geometry(1, 512, 9, 9, 16, THREE, padding=SAME),
    "deepest_and_wide": Geometry(1, 512, 9, 9, 64, THREE, padding=SAME),
    "strided": Geometry(2, 20, 33, 31, 12, (5, 3), (2, 1), (2, 1, 0, 3), (1, 2), 2, 5),
    "depthwise": Geometry(1, 32, 40, 40, 32, THREE, padding=SAME, groups=32, offset_groups=2),
    "pointwise": Geometry(1, 128, 30, 30, 64, (1, 1), mask=False),
    "kernel_7": Geometry(1, 16, 24, 24, 8, (7, 7), padding=(3, 3, 3, 3), bias=False),
    "large_image": Geometry(1, 2, 192, 192, 16, THREE, padding=SAME),
    "wide": Geometry(1, 3, 16, 4096, 4, THREE, padding=SAME),
    "tall": Geometry(1, 3, 4096, 16, 4, THREE, padding=SAME),
}
#: For long double, which has no fast matrix product.
SMALL_SHAPES = {
    "typical": Geometry(1, 24, 12, 13, 8, THREE, padding=SAME),
    "strided": Geometry(2, 20, 17, 15, 12, (5, 3), (2, 1), (2, 1, 0, 3), (1, 2), 2, 5),
    "deep": Geometry(1, 256, 5, 5, 4, THREE, padding=SAME),
    "depthwise": Geometry(1, 16, 14, 14, 16, THREE, padding=SAME, groups=16, offset_groups=2),
    "wide": Geometry(1, 2, 3, 4096, 2, THREE, padding=SAME),
}


@pytest.fixture(scope="module")
def measured():
    """Largest errors by dtype and output, printed at the end."""
    table = defaultdict(lambda: [0.0, 0.0])
    yield table
    print("\nlargest errors in u (max-norm / rms)")
    print(f"{'':10}" + "".join(f"{name:>20}" for name in OUTPUTS))
    for dtype in dict.fromkeys(dtype for dtype, _ in table):
        row = (table[dtype, name] for name in OUTPUTS)
        print(
            f"{dtype:10}" + "".join(f"{f'{largest:.3g} / {rms:.3g}':>20}" for largest, rms in row)
        )


@cache
def case(shape, dtype, seed=0):
    """A call and its exact results."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    if dtype == "float64":
        if np.finfo(np.longdouble).nmant <= 52:
            pytest.skip("long double is no longer than double here")
        call = testing.real(SMALL_SHAPES[shape], seed)
        return call, in_long_double(call)
    call = testing.real(SHAPES[shape], seed).astype(dtype)
    return call, call.astype("float64").run("reference")


def in_long_double(call):
    """`Call.run` of the reference's formulas in long double."""
    problem = call.problem()
    long = call.map(lambda array: array.astype(np.longdouble))
    bias = np.zeros(problem.out_channels, np.longdouble) if long.bias is None else long.bias
    outputs, grads = [], []
    for n in range(problem.batch):
        mask = None if long.mask is None else long.mask[n]
        image = (problem, long.input[n], long.offset[n], long.weight)
        outputs.append(reference.convolve(*image, bias, mask))
        grads.append(
            reference.differentiate(
                problem, long.grad_output[n], long.input[n], long.offset[n], long.weight, mask
            )
        )
    input, offset, weight, bias, mask = zip(*grads, strict=True)
    results = (
        np.stack(outputs),
        np.stack(input),
        np.stack(offset),
        sum(weight),
        None if call.bias is None else sum(bias),
        None if call.mask is None else np.stack(mask),
    )
    return dict(zip(OUTPUTS, results, strict=True))


def check(call, expected, dtype, isa, measured, note, record_property):
    with dcnlib.cpu_isa(isa):
        actual = call.run("cpu")
    for name, exact in expected.items():
        if exact is not None:
            errors = testing.errors(actual[name], exact, dtype)
            record_property(name, errors)
            worst = measured[dtype, name]
            worst[:] = map(max, worst, errors)
    testing.assert_close(actual, expected, dtype, note)
    return actual["output"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_targets_and_bound(shape, dtype, isa, measured, record_property):
    call, expected = case(shape, dtype)
    output = check(call, expected, dtype, isa, measured, f"{shape} {isa}", record_property)
    assert_elementwise(output, expected["output"], *magnitudes(shape, dtype), dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", ["deep", "deepest_and_wide"])
def test_sums_of_one_sign(shape, isa, measured, record_property):
    """What is added to a sum gets ever smaller beside it: errors of one sign would add up."""
    signed, _ = case(shape, "float32")
    call = signed.map(np.abs)._replace(offset=signed.offset)
    expected = call.astype("float64").run("reference")
    output = check(call, expected, "float32", isa, measured, f"{shape} {isa}", record_property)
    assert_elementwise(output, expected["output"], *magnitudes(shape, "float32"), "float32")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SMALL_SHAPES)
def test_float64_targets_and_bound(shape, isa, measured, record_property):
    call, expected = case(shape, "float64")
    output = check(call, expected, "float64", isa, measured, f"{shape} {isa}", record_property)
    assert_elementwise(output, expected["output"], *magnitudes(shape, "float64"), "float64")


@cache
def magnitudes(shape, dtype):
    """S and S4 of a call: its output for absolute values, with bilinear weights and with ones."""
    call = case(shape, dtype)[0].astype("float64")
    absolute = call.map(np.abs)
    bilinear = absolute._replace(offset=call.offset).forward("reference")
    # At whole positions a sample is one pixel: four calls read the four corners of each cell.
    step = np.zeros((1, call.offset.shape[1], 1, 1))
    corners = []
    for y in (0, 1):
        for x in (0, 1):
            step[:, 0::2], step[:, 1::2] = y, x
            corner = absolute._replace(offset=np.floor(call.offset) + step)
            corners.append(corner._replace(bias=None).forward("reference"))
    ones = sum(corners)
    if call.bias is not None:
        ones += absolute.bias[:, None, None]
    return bilinear, ones


def assert_elementwise(actual, exact, bilinear, ones, dtype):
    """|y - y*| <= u (8 S + 4 S4), u that of the arithmetic, and one rounding to a 16-bit type."""
    u = UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
    bound = u * (8 * bilinear + 4 * ones)
    if dtype in ("float16", "bfloat16"):
        smallest_step = {"float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]
        bound += UNIT_ROUNDOFF[dtype] * (np.abs(exact) + bound) + smallest_step / 2
    error = np.abs(actual.astype(exact.dtype) - exact)
    assert (error <= bound).all(), f"{np.max(error / bound):.3g} of the bound"


AS_MANY_SAMPLES = {
    "narrow": Geometry(256, 3, 16, 16, 4, THREE, padding=SAME),
    "wide": Geometry(1, 3, 16, 4096, 4, THREE, padding=SAME),
    "tall": Geometry(1, 3, 4096, 16, 4, THREE, padding=SAME),
}


@cache
def in_another_shape(name, seed):
    """A call and its exact results."""
    call = testing.real(AS_MANY_SAMPLES[name], seed).astype("float32")
    return call, call.astype("float64").run("reference")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(3))
def test_errors_do_not_grow_with_the_image(seed, isa):
    """One image 4096 wide and 256 images 16 wide, as many samples: at most twice the error."""
    largest = {}
    for name in AS_MANY_SAMPLES:
        call, expected = in_another_shape(name, seed)
        with dcnlib.cpu_isa(isa):
            actual = call.run("cpu")
        for output in ("output", "grad_input", "grad_offset", "grad_mask"):
            largest[name, output] = testing.errors(actual[output], expected[output], "float32")[0]
    for (name, output), error in largest.items():
        assert error <= 2 * largest["narrow", output], (name, output)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("width", [1024, 2049, 8192])
def test_identity_at_any_width(width, dtype, isa):
    """A 1x1 kernel of 1 with zero offsets copies the image, whatever the dtype can count to."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    call = testing.real(Geometry(1, 1, 2, width, 1, (1, 1), mask=False, bias=False), 0)
    call = call._replace(offset=np.zeros_like(call.offset), weight=np.ones((1, 1, 1, 1)))
    call = call.astype(dtype)
    with dcnlib.cpu_isa(isa):
        np.testing.assert_array_equal(call.forward("cpu"), call.input)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sub_pixel_offset_far_from_the_origin(dtype, isa):
    """A shift by an eighth is as exact at column 8000 as at column 0."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    width = 8192
    ramp = np.arange(width) % 16
    call = testing.Call(
        input=ramp[None, None, None].astype(np.float64),
        offset=np.zeros((1, 2, 1, width)) + np.array([0, 0.125])[:, None, None],
        weight=np.ones((1, 1, 1, 1)),
        bias=None,
        mask=None,
        grad_output=np.ones((1, 1, 1, width)),
    ).astype(dtype)
    expected = ramp + 0.125 * (np.append(ramp[1:], 0) - ramp)
    with dcnlib.cpu_isa(isa):
        np.testing.assert_array_equal(call.forward("cpu")[0, 0, 0].astype(np.float64), expected)
