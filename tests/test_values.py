"""Values that are no ordinary numbers, and positions at the very border: `docs/numerics.md`.

Every rule is stated for itself, on the reference and on every instruction set, and the two must
then agree element by element: the same elements not finite, all others equal.
"""

import importlib.util
from fractions import Fraction
from functools import cache
from itertools import product
from math import floor

import numpy as np
import pytest

import dcnlib
import oracle
from dcnlib import testing
from dcnlib.testing import OUTPUTS, PROBLEMS, UNIT_ROUNDOFF, Call, Geometry

ISAS = testing.cpu_isas()
DTYPES = ("float32", "float64", "float16", "bfloat16")
SMALL = (2, 2, 1)  # amplitudes that keep the longest sums of PROBLEMS exact
#: Sums over groups and blocks of every kind, none too large to run often.
NAMES = [
    "plain", "v1", "strided", "dilated", "grouped", "offset_groups", "groups_across", "depthwise",
    "depthwise_2", "pointwise", "kernel_7", "channels_16", "channels_33", "channels_130_split",
    "width_113",
]  # fmt: skip


@pytest.fixture(params=["reference", *ISAS])
def backend(request):
    """A backend by name; the CPU's once per instruction set."""
    if request.param == "reference":
        yield "reference"
    else:
        with dcnlib.cpu_isa(request.param):
            yield "cpu"


@pytest.fixture(params=DTYPES)
def dtype(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return request.param


@cache
def dtypes():
    """All four, without bfloat16 where ml_dtypes is missing."""
    if importlib.util.find_spec("ml_dtypes") is None:
        return DTYPES[:3]
    return DTYPES


@cache
def lattice(name, seed=0):
    return testing.lattice(PROBLEMS[name], seed, SMALL)


@cache
def clean(name):
    """What a named problem gives in float64, nothing special in it."""
    return lattice(name).run("reference")


def finfo(dtype):
    """The limits of a dtype."""
    if dtype == "bfloat16":
        return pytest.importorskip("ml_dtypes").finfo("bfloat16")
    return np.finfo(dtype)


def changed(call, tensor, index, value):
    """The call with one element of one tensor replaced."""
    array = getattr(call, tensor).copy()
    array[index] = value
    return call._replace(**{tensor: array})


def assert_same_finite(actual, expected, note=""):
    """The same elements finite, and those equal: how NaN and inf spread is arithmetic, not rule."""
    for name, exact in expected.items():
        if exact is None:
            continue
        got = np.asarray(actual[name]).astype(np.float64)
        want = testing.rounded(exact, actual[name].dtype).astype(np.float64)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), f"{name}, {note}")
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[finite], want[finite], f"{name}, {note}")


# ---- positions at the border -------------------------------------------------------------------


def around(value, dtype):
    """A number, and its neighbours on both sides in that dtype; around 0 some steps as short."""
    dtype = testing.numpy_dtype(dtype)
    if value == 0:
        return [0.0, 2.0**-12, -(2.0**-12)]
    if dtype.name == "bfloat16":
        # numpy.nextafter does not know it: a step of its own in the bits of the float32.
        bits = np.array([value], np.float32).view(np.int32)
        step = 1 << 16
        return [float(value), *(float((bits + s).view(np.float32)[0]) for s in (step, -step))]
    value = dtype.type(value)
    neighbours = (np.nextafter(value, dtype.type(limit)) for limit in (-np.inf, np.inf))
    return [float(v) for v in (value, *neighbours)]


def border_positions(size, dtype):
    """Everything that can go wrong on one axis of that size."""
    smallest = float(finfo(dtype).smallest_subnormal)
    values = [0.0, -0.0, smallest, -smallest, 0.5, size / 2 + 0.25]
    for value in (-1, 1, size - 1, size, -2, size + 1):
        values += around(value, dtype)
    return values


def exact_sample(image, y, x):
    """Value, slope in y, slope in x and the four weights of one sample, in rational numbers."""
    h, w = len(image), len(image[0])
    y, x = Fraction(y), Fraction(x)
    row, column = floor(y), floor(x)
    if not (-1 <= row < h and -1 <= column < w):
        return 0, 0, 0, {}
    ly, lx = y - row, x - column
    value = slope_y = slope_x = Fraction(0)
    weights = {}
    for down, right in product((0, 1), (0, 1)):
        gy, gx = ly if down else 1 - ly, lx if right else 1 - lx
        q = (row + down, column + right)
        if not (0 <= q[0] < h and 0 <= q[1] < w):
            continue
        pixel = Fraction(float(image[q]))
        value += gy * gx * pixel
        slope_y += (1 if down else -1) * gx * pixel
        slope_x += (1 if right else -1) * gy * pixel
        weights[q] = gy * gx
    if y == -1 or x == -1:  # on the very border nothing is sampled, but the slopes are right-hand
        return 0, slope_y, slope_x, {}
    return value, slope_y, slope_x, weights


def test_border_positions(dtype, backend):
    """All pairs of special positions, one sample each: values and right-hand derivatives."""
    h, w = 3, 4
    positions = list(product(border_positions(h, dtype), border_positions(w, dtype)))
    count = len(positions)
    image = np.arange(1.0, h * w + 1).reshape(h, w) * [[1], [-1], [2]]
    call = Call(
        input=np.repeat(image[None, None], count, axis=0),
        offset=np.array(positions).reshape(count, 2, 1, 1),
        weight=np.full((1, 1, 1, 1), 2.0),
        bias=None,
        mask=np.full((count, 1, 1, 1), 0.5),
        grad_output=np.full((count, 1, 1, 1), 4.0),
        stride=(h, w),
    )
    names = ("output", "grad_input", "grad_offset", "grad_mask")
    shapes = (call.grad_output.shape, call.input.shape, call.offset.shape, call.mask.shape)
    expected = dict(zip(names, map(np.zeros, shapes), strict=True))
    for n, (y, x) in enumerate(positions):
        value, slope_y, slope_x, weights = exact_sample(image, y, x)
        expected["output"][n] = float(value)  # weight 2, mask 1/2
        expected["grad_mask"][n] = float(8 * value)
        expected["grad_offset"][n, :, 0, 0] = float(4 * slope_y), float(4 * slope_x)
        for q, weight in weights.items():
            expected["grad_input"][n, 0][q] = float(4 * weight)
    actual = call.astype(dtype).run(backend)
    for name in names:
        got = actual[name].astype(np.float64)
        # Interpolation rounds a few times, on numbers up to twice the largest pixel.
        error = np.abs(got - expected[name]).max(axis=(1, 2, 3))
        limit = 8 * UNIT_ROUNDOFF[dtype] * np.abs(expected[name]).max()
        wrong = [(positions[n], got[n], expected[name][n]) for n in np.flatnonzero(error > limit)]
        assert not wrong, (name, wrong[:3])
    outside = [not (-1 < y < h and -1 < x < w) for y, x in positions]
    no_cell = [not (-1 <= y < h and -1 <= x < w) for y, x in positions]
    assert sum(outside) > 100 and sum(outside) - sum(no_cell) > 20
    for name in ("output", "grad_input", "grad_mask"):
        assert not actual[name][outside].any(), name
    assert not actual["grad_offset"][no_cell].any()


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_one_step_around_the_border(side, dtype, backend):
    """Offsets one step around those that lead to -1 and to H, from every pixel and tap."""
    geometry = Geometry(2, 6, 7, 9, 4, (3, 3), (2, 1), (2, 2, 3, 3), (1, 2), 2, 3)
    call = testing.lattice(geometry, 0, SMALL)
    axis = 0 if side in ("top", "bottom") else 1
    target = -1 if side in ("top", "left") else (7, 9)[axis]
    taps = np.arange(3) * call.dilation[axis]
    pixels = np.arange((geometry.out_h, geometry.out_w)[axis]) * call.stride[axis]
    base = np.add.outer(taps, pixels - call.padding[2 * axis])  # of (tap, pixel) on this axis
    shape = (2, 3, 3, 3, 2, geometry.out_h, geometry.out_w)  # n, g, i, j, {y, x}, oh, ow
    # Steps of a float32 in float64, so that the oracle's sums are exact.
    step = "float32" if dtype == "float64" else dtype
    steps = np.array([around(v, step) for v in (target - base).ravel()])
    steps = steps.reshape(*base.shape, 3)
    choice = np.random.default_rng(1).integers(0, 3, (2, 3, 3, 3, *shape[-2:]))
    index = np.indices(choice.shape)
    tap, pixel = index[2 + axis], index[4 + axis]
    offset = call.offset.reshape(shape).copy()
    offset[:, :, :, :, axis] = steps[tap, pixel, choice]
    call = call._replace(offset=offset.reshape(call.offset.shape)).astype(dtype)
    expected = oracle.run(call)
    actual = call.run(backend)
    testing.assert_close(actual, expected, dtype, side)
    # Exactly at the border and beyond, all is zero to the bit.
    position = base[tap, pixel] + call.offset.reshape(shape)[:, :, :, :, axis].astype(np.float64)
    outside = (position <= -1) | (position >= (7, 9)[axis])
    assert 0.3 < outside.mean() < 0.9
    assert not actual["grad_mask"].reshape(choice.shape)[outside].any()


# ---- offsets that are not finite ---------------------------------------------------------------

HUGE = {
    "inf": np.inf,
    "-inf": -np.inf,
    "largest": None,
    "-largest": None,
    "2**31": 2.0**31,
    "-2**31": -(2.0**31),
    "2**32": 2.0**32,
    "2**40": 2.0**40,
    "-2**40": -(2.0**40),
    "2**63": 2.0**63,
    "-2**63": -(2.0**63),
    "2**64": 2.0**64,
    "1e30": 1e30,
    "-1e30": -1e30,
}


def huge(label, dtype):
    """The number itself where the dtype has it, else its largest."""
    if "inf" in label:
        return HUGE[label]
    largest = float(finfo(dtype).max)
    value = largest if HUGE[label] is None else abs(HUGE[label])
    return min(value, largest) * (-1 if label[0] == "-" else 1)


def places(call, seed):
    """A few random (image, offset group, tap, output row, output column)."""
    rng = np.random.default_rng(seed)
    batch, _, out_h, out_w = call.grad_output.shape
    taps = call.weight.shape[2] * call.weight.shape[3]
    for n in rng.choice(batch, min(2, batch), replace=False):
        for oh, ow in {(0, 0), (out_h - 1, out_w - 1), tuple(rng.integers(0, (out_h, out_w)))}:
            group, tap = rng.integers(0, (call.offset_groups, taps))
            yield int(n), int(group), int(tap), int(oh), int(ow)


@cache
def with_huge_offsets(name, axis):
    """(call, where its offsets are to be huge, what must then come out)."""
    call = without = lattice(name)
    taps = call.weight.shape[2] * call.weight.shape[3]
    where = np.zeros(call.offset.shape, bool)
    nothing = {"grad_offset": where.copy(), "grad_mask": np.zeros(call.mask.shape, bool)}
    for n, group, tap, oh, ow in places(call, axis):
        k = group * taps + tap
        where[n, 2 * k + axis, oh, ow] = True
        without = changed(without, "mask", (n, k, oh, ow), 0)
        nothing["grad_offset"][n, 2 * k : 2 * k + 2, oh, ow] = True
        nothing["grad_mask"][n, k, oh, ow] = True
    expected = without.run("reference")
    for output, zero in nothing.items():
        expected[output][zero] = 0
    return call, where, expected


@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
@pytest.mark.parametrize("name", ["plain", "groups_across", "depthwise", "channels_33"])
def test_infinite_and_huge_offsets(name, axis, dtype, backend):
    """The sample is exactly 0, all its gradients are, and nothing reaches the input."""
    call, where, expected = with_huge_offsets(name, axis)
    for label in HUGE:
        offset = np.where(where, huge(label, dtype), call.offset)
        actual = call._replace(offset=offset).astype(dtype).run(backend)
        testing.assert_equal(actual, expected, label)


@cache
def with_nan_offsets(name, which, mask_is_zero):
    """(call, what must be NaN by name, the same call with these offsets infinite instead)."""
    call = beyond = lattice(name)
    taps = call.weight.shape[2] * call.weight.shape[3]
    channels, outputs = call.input.shape[1], len(call.weight)
    nan = {o: np.zeros(a.shape, bool) for o, a in clean(name).items() if a is not None}
    for n, group, tap, oh, ow in places(call, 3):
        k = group * taps + tap
        for component in {"y": [0], "x": [1], "both": [0, 1]}[which]:
            call = changed(call, "offset", (n, 2 * k + component, oh, ow), np.nan)
            beyond = changed(beyond, "offset", (n, 2 * k + component, oh, ow), np.inf)
        if mask_is_zero:
            call = changed(call, "mask", (n, k, oh, ow), 0)
        nan["grad_offset"][n, 2 * k : 2 * k + 2, oh, ow] = True
        if call.mask is not None:
            nan["grad_mask"][n, k, oh, ow] = True
        for c in range(channels):
            if c // (channels // call.offset_groups) != group:
                continue
            weight_group, inside = divmod(c, channels // call.groups)
            per_group = outputs // call.groups
            users = slice(weight_group * per_group, (weight_group + 1) * per_group)
            nan["output"][n, users, oh, ow] = True
            nan["grad_weight"].reshape(outputs, -1, taps)[users, inside, tap] = True
    return call, nan, beyond.run("reference")


@pytest.mark.parametrize("which", ["y", "x", "both"])
@pytest.mark.parametrize("mask_is_zero", [False, True], ids=["mask", "mask_0"])
def test_nan_offset(which, mask_is_zero, dtype, backend):
    """NaN in every result that uses the sample, in no other, and never in the input's gradient."""
    for name in NAMES:
        if mask_is_zero and not PROBLEMS[name].mask:
            continue
        call, nan, elsewhere = with_nan_offsets(name, which, mask_is_zero)
        actual = call.astype(dtype).run(backend)
        for output, where in nan.items():
            np.testing.assert_array_equal(np.isnan(actual[output]), where, f"{name}: {output}")
            expected = testing.rounded(elsewhere[output], actual[output].dtype)
            np.testing.assert_array_equal(
                actual[output][~where], expected[~where], f"{name}: {output}"
            )


@pytest.mark.parametrize("name", ["plain", "depthwise", "channels_16", "channels_33", "width_113"])
@pytest.mark.parametrize(("tensor", "value"), [("offset", np.nan), ("mask", np.inf)])
def test_special_number_changes_no_other_bit(name, tensor, value, dtype, backend):
    """Corners around one that is not finite are found in another way, and are the same."""
    call = testing.real(PROBLEMS[name], 0).astype(dtype)
    clean = call.run(backend)
    actual = changed(call, tensor, (0, 1, 2, 2), value).run(backend)
    for output in ("output", "grad_offset", "grad_mask"):
        there = np.isfinite(actual[output].astype(np.float64))
        assert np.count_nonzero(~there) < there.size / 4
        np.testing.assert_array_equal(actual[output][there], clean[output][there], output)
    assert not np.isfinite(actual["output"].astype(np.float64)).all()


@pytest.mark.parametrize("name", ["plain", "channels_16", "channels_33"])
def test_sample_at_minus_1_changes_no_other_bit(name, dtype, backend):
    """It has a derivative, which one further out has not, and for which loops may differ."""
    call = testing.real(PROBLEMS[name], 0).astype(dtype)
    call = changed(call, "offset", (0, 1, 0, 3), 0.5)
    at_edge, outside = (
        changed(call, "offset", (0, 0, 0, 3), offset).run(backend) for offset in (0.0, -3.0)
    )
    for output in OUTPUTS:
        differ = np.argwhere(at_edge[output] != outside[output]).tolist()
        assert differ == ([[0, 0, 0, 3]] if output == "grad_offset" else []), output


@pytest.mark.parametrize("name", NAMES)
def test_all_offsets_nan(name, dtype, backend):
    """The worst case of an untrained network: no crash, and the input's gradient is exactly 0."""
    call = lattice(name)
    call = call._replace(offset=np.full_like(call.offset, np.nan)).astype(dtype)
    actual = call.run(backend)
    for output in ("output", "grad_offset", "grad_weight", "grad_mask"):
        assert actual[output] is None or np.isnan(actual[output]).all(), output
    assert not actual["grad_input"].any()
    if actual["grad_bias"] is not None:
        expected = testing.rounded(clean(name)["grad_bias"], actual["grad_bias"].dtype)
        np.testing.assert_array_equal(actual["grad_bias"], expected)


# ---- other arguments that are not finite -------------------------------------------------------


def on_every_isa(call, note):
    """All dtypes and instruction sets against one run of the reference."""
    expected = call.run("reference")
    for dtype in dtypes():
        typed = call.astype(dtype)
        for isa in ISAS:
            with dcnlib.cpu_isa(isa):
                assert_same_finite(typed.run("cpu"), expected, f"{dtype} {isa}: {note}")


@pytest.mark.parametrize("tensor", ["input", "weight", "bias", "mask", "grad_output"])
@pytest.mark.parametrize("name", NAMES)
def test_one_element_not_finite(name, tensor):
    """On every instruction set the same elements are finite as in the reference, and equal."""
    call = lattice(name, 1)
    array = getattr(call, tensor)
    if array is None:
        assert not getattr(PROBLEMS[name], tensor)
        return
    for seed, value in enumerate((np.nan, np.inf, -np.inf, np.nan, np.inf)):
        index = tuple(np.random.default_rng(seed).integers(0, array.shape).tolist())
        on_every_isa(changed(call, tensor, index, value), f"{tensor}[{index}] = {value}")


@pytest.mark.parametrize("tensor", ["input", "offset", "weight", "mask", "grad_output"])
@pytest.mark.parametrize("name", NAMES)
def test_scattered_not_finite(name, tensor):
    """Two in a hundred elements not finite."""
    call = lattice(name, 2)
    if getattr(call, tensor) is None:
        assert not getattr(PROBLEMS[name], tensor)
        return
    rng = np.random.default_rng(0)
    array = getattr(call, tensor).copy()
    where = rng.random(array.shape) < 0.02
    array[where] = rng.choice([np.nan, np.inf, -np.inf], np.count_nonzero(where))
    on_every_isa(call._replace(**{tensor: array}), tensor)


def test_infinite_pixel_next_to_whole_positions(dtype, backend):
    """Zero times infinity is NaN in the three samples with the pixel as a corner of weight 0."""
    x = np.ones((1, 1, 3, 3))
    x[0, 0, 1, 1] = np.inf
    call = Call(x, np.zeros((1, 2, 3, 3)), np.ones((1, 1, 1, 1)), None, None, np.ones((1, 1, 3, 3)))
    output = call.astype(dtype).forward(backend)[0, 0].astype(np.float64)
    nan = np.nan
    np.testing.assert_array_equal(output, [[nan, nan, 1], [nan, np.inf, 1], [1, 1, 1]])


@pytest.mark.parametrize("zero", [0.0, -0.0], ids=["plus", "minus"])
def test_infinite_image_beside_zero_offsets(zero, dtype, backend):
    """Row and column -1 read nothing, whatever the sign of the zero that leads there."""
    x = np.full((1, 1, 3, 17), np.inf)
    offset = np.full((1, 2, 5, 19), zero)
    call = Call(
        x, offset, np.ones((1, 1, 1, 1)), None, None, np.ones((1, 1, 5, 19)), padding=(1,) * 4
    )
    output = call.astype(dtype).forward(backend)[0, 0]
    assert not output[[0, -1]].any() and not output[:, [0, -1]].any()


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_outside_samples_have_no_gradient(value, dtype, backend):
    """Gradients of the offset and mask of a sample outside are 0, whatever they would multiply."""
    call = lattice("plain")
    taps = 9
    call = changed(call, "offset", np.s_[:, 4], 1000.0)
    for tensor in ("mask", "grad_output", "weight"):
        special = changed(call, tensor, np.s_[0, 2 if tensor == "mask" else 0], value)
        grads = special.astype(dtype).run(backend)
        assert taps == call.mask.shape[1]
        assert not grads["grad_offset"][0, 4:6].any(), tensor
        assert not grads["grad_mask"][0, 2].any(), tensor


def test_empty_batch(dtype, backend):
    """An empty result, and gradients that are exactly 0 where they are not empty."""
    call = testing.lattice(PROBLEMS["empty_batch"], 0).astype(dtype)
    results = call.run(backend)
    assert results["output"].shape == (0, 2, 6, 5)
    assert results["grad_input"].shape == call.input.shape
    assert results["grad_offset"].shape == call.offset.shape
    assert results["grad_mask"].shape == call.mask.shape
    for name in ("grad_weight", "grad_bias"):
        assert results[name].size and not results[name].any(), name


# ---- small and large numbers -------------------------------------------------------------------


def identity(image, dtype):
    """A call that copies an image."""
    size = image.shape[-2:]
    return Call(
        image.reshape(1, 1, *size),
        np.zeros((1, 2, *size)),
        np.ones((1, 1, 1, 1)),
        None,
        None,
        image.reshape(1, 1, *size),
    ).astype(dtype)


def test_subnormals_are_kept(dtype, backend):
    """No flushing to zero, on the way in, inside or on the way out, here or in what runs later."""
    smallest = float(finfo(dtype).smallest_subnormal)
    image = np.array([[1, 2, 3, 5], [-1, 7, 100, 0], [6, -9, 4, 2.0]]) * smallest
    call = identity(image, dtype)
    results = call.run(backend)
    for name in ("output", "grad_input"):
        np.testing.assert_array_equal(results[name].astype(np.float64)[0, 0], image, name)
    assert np.float32(1e-40) * np.float32(1) != 0 and np.float64(1e-310) / 2 != 0


@pytest.mark.parametrize(
    ("dtype", "terms", "expected"),
    [
        ("float16", [2048, 1, -2048], 1),
        ("float16", [40960, 40960, -40960], 40960),
        ("bfloat16", [256, 1, -256], 1),
    ],
    ids=["float16_precision", "float16_range", "bfloat16_precision"],
)
def test_half_precision_sums_are_wide(dtype, terms, expected, backend):
    """Sums beyond the precision or the range of the storage type come back into it unharmed."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = np.array(terms, np.float64).reshape(1, 3, 1, 1)
    offset, weight = np.zeros((1, 2, 1, 1)), np.ones((1, 3, 1, 1))
    call = Call(x, offset, weight, None, None, np.ones((1, 1, 1, 1))).astype(dtype)
    assert call.forward(backend).item() == expected


def test_results_too_large_are_infinite(dtype, backend):
    """Twice the largest number is infinite, half of it is not."""
    largest = float(finfo(dtype).max)
    call = identity(np.full((2, 2), largest), dtype)
    for factor, expected in ((2.0, np.inf), (-2.0, -np.inf), (0.5, largest / 2)):
        weighted = call._replace(weight=np.full_like(call.weight, factor))
        np.testing.assert_array_equal(weighted.forward(backend).astype(np.float64), expected)


def test_outputs_are_complete():
    """`OUTPUTS` is what these tests go by."""
    assert tuple(clean("plain")) == OUTPUTS
