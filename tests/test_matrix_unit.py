"""The matrix unit ("amx"): products of bfloat16 parts that have to be float32's in all that shows.

Its sizes are those at which it takes over: 32 outputs of a group, 64 pixels, channels that fill
vectors. Exact lattices to the last bit, the same bits whatever the threads, batch and layout, the
bound of every single element on data of any range, and values that are no ordinary numbers.
"""

from functools import cache

import numpy as np
import pytest

import dcnlib
import isolated
from dcnlib import testing
from dcnlib.backends import cpu
from dcnlib.testing import OUTPUTS, UNIT_ROUNDOFF, Geometry

pytestmark = pytest.mark.skipif(
    "amx" not in testing.cpu_isas(), reason="no matrix unit that this process may use"
)

SAME, THREE, ONE = (1, 1, 1, 1), (3, 3), (1, 1)
GEOMETRIES = {
    # One tap; channels around blocks, pieces and slabs.
    "pointwise_64": Geometry(1, 64, 8, 8, 32, ONE),
    "pointwise_96": Geometry(2, 96, 9, 8, 33, ONE, mask=False),
    "pointwise_160": Geometry(1, 160, 7, 13, 81, ONE, bias=False),
    "pointwise_320": Geometry(1, 320, 8, 9, 64, ONE),
    # Channels that are no whole blocks, nor whole slabs.
    "channels_11": Geometry(1, 11, 9, 11, 32, THREE, padding=SAME),
    "channels_33": Geometry(1, 33, 10, 11, 40, THREE, padding=SAME),
    "channels_48": Geometry(2, 48, 8, 9, 33, THREE, padding=SAME),
    "channels_72": Geometry(1, 72, 8, 8, 64, THREE, padding=SAME),
    "channels_96": Geometry(1, 96, 9, 9, 81, THREE, padding=SAME),
    "channels_144": Geometry(1, 144, 8, 11, 32, THREE, padding=SAME, mask=False, bias=False),
    # Taps in chunks.
    "kernel_5": Geometry(1, 64, 9, 10, 48, (5, 5), padding=(2, 2, 2, 2)),
    "kernel_5_chunks": Geometry(1, 40, 10, 9, 32, (5, 5), padding=(2, 2, 2, 2)),
    "kernel_7": Geometry(1, 24, 9, 9, 33, (7, 7), padding=(3, 3, 3, 3)),
    "kernel_9": Geometry(1, 12, 12, 13, 32, (9, 9), padding=(4, 4, 4, 4)),
    # Groups: of weights, of offsets, one within the other, and across each other.
    "groups_2": Geometry(2, 96, 9, 9, 66, THREE, padding=SAME, groups=2),
    "groups_4": Geometry(1, 64, 8, 9, 132, THREE, padding=SAME, groups=4),
    "offset_groups_24": Geometry(1, 72, 9, 8, 40, THREE, padding=SAME, offset_groups=3),
    "offset_groups_16": Geometry(2, 64, 8, 8, 32, THREE, padding=SAME, offset_groups=4),
    "offset_groups_96": Geometry(1, 192, 8, 9, 32, THREE, padding=SAME, offset_groups=2),
    "nested": Geometry(1, 96, 9, 9, 64, THREE, padding=SAME, groups=2, offset_groups=6),
    "nested_the_other_way": Geometry(1, 96, 8, 9, 128, THREE, padding=SAME, groups=4),
    "across": Geometry(1, 96, 9, 8, 66, THREE, padding=SAME, groups=2, offset_groups=3),
    # Pixels: rows of a strip and tiles of an image.
    "pixels_65": Geometry(3, 32, 7, 15, 32, THREE),
    "pixels_113": Geometry(1, 32, 3, 115, 34, THREE),
    "pixels_225": Geometry(1, 32, 17, 17, 49, THREE),
    "pixels_900": Geometry(1, 16, 32, 32, 32, THREE),
    "strided": Geometry(3, 48, 19, 23, 40, (3, 2), (2, 3), (2, 1, 0, 3), (1, 2)),
    "dilated": Geometry(1, 64, 17, 16, 32, THREE, padding=(3, 2, 3, 1), dilation=(3, 2)),
    # A megabyte of weights and more: packed late for one tile, before for several, not split before.
    "late": Geometry(1, 136, 8, 9, 264, THREE, padding=SAME),
    "late_batch": Geometry(2, 136, 8, 9, 264, THREE, padding=SAME),
    "late_groups": Geometry(1, 160, 9, 9, 480, THREE, padding=SAME, groups=2, offset_groups=4),
    "many_weights": Geometry(1, 288, 8, 8, 832, THREE, padding=SAME, groups=2, offset_groups=2),
    "many_weights_batch": Geometry(2, 288, 8, 8, 832, THREE, padding=SAME, groups=2, offset_groups=2),
}  # fmt: skip
NARROW = ("channels_33", "groups_2", "offset_groups_24", "late", "many_weights_batch")


@cache
def lattice(name):
    call = testing.lattice(GEOMETRIES[name], 1, (1, 1, 1))
    assert testing.is_exact(call)
    return call, call.run("reference")


@pytest.fixture(autouse=True)
def unit():
    with dcnlib.cpu_isa("amx"):
        yield


def run(call, num_threads=1, channels_last=False, packed=False):
    """`Call.run` on the CPU backend, all memory NaN before."""
    problem = call.problem()._replace(channels_last=channels_last)
    images = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    input, grad_output = (
        np.ascontiguousarray(a.transpose(images)) for a in (call.input, call.grad_output)
    )

    def empty(array):
        return None if array is None else np.full(array.shape, np.nan, call.input.dtype)

    weight = cpu.pack_weight(problem, call.weight) if packed else call.weight
    output, grads = empty(grad_output), [empty(a) for a in (input, *call[1:5])]
    cpu.forward(problem, input, call.offset, weight, call.bias, call.mask, output, num_threads)
    arguments = (grad_output, input, call.offset, call.weight, call.mask)
    cpu.backward(problem, *arguments, grads, num_threads)
    back = np.argsort(images)
    results = (output.transpose(back), grads[0].transpose(back), *grads[1:])
    return dict(zip(OUTPUTS, results, strict=True))


def assert_same_bits(actual, expected, note):
    for name, array in expected.items():
        if array is not None:
            same = actual[name].tobytes() == array.tobytes()
            assert same, f"{name}: {np.count_nonzero(actual[name] != array)} differ; {note}"


# ---- the exact lattice -------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_lattice(name, channels_last):
    call, expected = lattice(name)
    for num_threads in (1, 3):
        actual = run(call.astype("float32"), num_threads, channels_last)
        testing.assert_equal(actual, expected, f"{num_threads} threads")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", NARROW)
def test_other_dtypes(name, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    call, expected = lattice(name)
    testing.assert_equal(run(call.astype(dtype), 2), expected)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_without_offsets(name):
    """A convolution: copied taps, the sums those of offsets of 0."""
    call, _ = lattice(name)
    zero = call._replace(offset=np.zeros_like(call.offset), mask=None)
    settings = (call.stride, call.padding, call.dilation, call.groups)
    single = call.astype("float32")
    actual = dcnlib.conv2d(single.input, single.weight, single.bias, *settings)
    testing.assert_equal({"output": actual}, {"output": zero.forward("reference")})


def wide_geometry(rng):
    """Anything that the unit takes, small otherwise."""
    unit = int(rng.choice([11, 12, 14, 16, 22, 24, 28, 32, 40, 48, 60, 64, 65, 80]))
    groups, offset_groups = ([1, 1], [1, 1], [1, 2], [2, 1], [2, 2], [1, 3], [2, 4])[
        rng.integers(7)
    ]
    channels = unit * max(groups, offset_groups)
    kernel = [(1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (5, 5), (1, 7)][rng.integers(7)]
    stride, dilation = (tuple(int(v) for v in rng.integers(1, 3, 2)) for _ in range(2))
    padding = tuple(int(v) for v in rng.integers(0, 4, 4))
    out_h = int(rng.integers(1, 12))
    out = out_h, int(rng.integers(-(-64 // out_h), -(-64 // out_h) + 12))
    if out_h * out[1] > 240:
        out = 8, 9
    sizes = []
    for axis, (before, after) in enumerate((padding[:2], padding[2:])):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        sizes.append(max(1, (out[axis] - 1) * stride[axis] + span - before - after))
    return Geometry(
        int(rng.integers(1, 3)), channels, *sizes, groups * int(rng.integers(32, 81)), kernel,
        stride, padding, dilation, groups, offset_groups, rng.random() < 0.6, rng.random() < 0.6,
    )  # fmt: skip


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_random_wide_geometries(first):
    for seed in range(first, first + 40):
        rng = np.random.default_rng(seed)
        call = testing.lattice(wide_geometry(rng), rng, (1, 1, 1)).astype("float32")
        expected = call.astype("float64").run("reference")
        testing.assert_equal(run(call, 1 + seed % 3, bool(seed % 2)), expected, f"seed {seed}")


# ---- the same bits -----------------------------------------------------------------------------


@cache
def real(name):
    call = testing.real(GEOMETRIES[name], 2).astype("float32")
    return call, run(call)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_threads_layouts_and_packed_weights_change_no_bit(name):
    call, expected = real(name)
    assert_same_bits(run(call, 2), expected, "2 threads")
    assert_same_bits(run(call, 3, channels_last=True), expected, "3 threads, channels last")
    assert_same_bits(run(call, 2, packed=True), expected, "packed")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_image_does_not_mind_its_batch(name):
    """Nor, with it, when its weights are packed."""
    call, expected = real(name)
    arrays = ("input", "offset", "mask", "grad_output")
    parts = {n: getattr(call, n) for n in arrays if getattr(call, n) is not None}
    batch = call._replace(**{n: np.concatenate([a[:1] / 2, a, a]) for n, a in parts.items()})
    together, count = run(batch, 2), len(call.input)
    ours = {n: expected[n] for n in ("output", "grad_input", "grad_offset", "grad_mask")}
    for first in (1, 1 + count):
        rows = {n: a if a is None else a[first : first + count] for n, a in together.items()}
        assert_same_bits(rows, ours, f"images {first} ..")


def test_one_row_with_hard_values_changes_no_other_bit():
    """What leaves the matrix unit takes nothing along: a row of samples, a block of weights."""
    call, clean = real("pixels_113")
    special = changed(call, "input", np.s_[0, :, 1, 40], np.float32(2.0**70))
    differ = run(special)["output"] != clean["output"]
    assert 0 < np.count_nonzero(differ.any(axis=(0, 1))) < 40
    special = changed(call, "weight", np.s_[33], np.float32(2.0**70))
    differ = run(special)["output"] != clean["output"]
    assert differ[:, 33].all() and not differ[:, :32].any()


# ---- accuracy on any range ---------------------------------------------------------------------


def changed(call, tensor, index, value):
    array = getattr(call, tensor).copy()
    array[index] = value
    return call._replace(**{tensor: array})


def scales(rng, shape, low, high):
    return 2.0 ** rng.integers(low, high, shape, endpoint=True)


def outputs_apart(call, rng, low, high):
    scale = scales(rng, (len(call.weight), 1, 1, 1), low, high)
    bias = call.bias * scale.ravel()
    return call._replace(
        weight=call.weight * scale, bias=bias, grad_output=call.grad_output / scale[..., 0]
    )


def channels_apart(call, rng, low, high):
    """The same scales in every group, taken back by the weights."""
    scale = scales(rng, (call.weight.shape[1], 1, 1), low, high)
    return call._replace(
        input=call.input * np.tile(scale, (call.groups, 1, 1)), weight=call.weight / scale
    )


def scaled(call, rng, **ranges):
    """Every number of some tensors with a scale of its own: per element, or per axis shape."""
    arrays = {}
    for name, (low, high) in ranges.items():
        array = getattr(call, name)
        arrays[name] = array * scales(rng, array.shape, low, high)
    return call._replace(**arrays)


def pixels_apart(call, rng, low, high):
    image, output = call.input.shape[2:], call.grad_output.shape[2:]
    return call._replace(
        input=call.input * scales(rng, image, low, high),
        grad_output=call.grad_output * scales(rng, output, low, high),
    )


def one_input_channel(call, value, others, weight):
    """Channel 3 alone counts for every other output: the weights of all others are 0."""
    input = np.full_like(call.input, others)
    input[:, 3] = value * np.sign(call.input[:, 3])
    weights = call.weight.copy()
    weights[::2] = 0
    weights[::2, 3] = weight * np.sign(call.weight[::2, 3])
    return call._replace(input=input, weight=weights, bias=np.zeros_like(call.bias))


def cancelling(call):
    """Pairs of channels whose terms cancel to the last bits."""
    input, weight = call.input.copy(), call.weight.copy()
    input[:, 1::2], weight[:, 1::2] = input[:, ::2], -weight[:, ::2] * (1 + 2.0**-20)
    return call._replace(input=input, weight=weight, bias=call.bias * 2.0**-20)


def every(call, value):
    return call.map(lambda array: np.full_like(array, value))._replace(
        offset=np.zeros_like(call.offset), mask=np.ones_like(call.mask)
    )


#: Calls of any range; what they have in common is that no exact result overflows.
WILD = {
    "outputs": lambda call, rng: outputs_apart(call, rng, -118, 40),
    "outputs_large": lambda call, rng: outputs_apart(call, rng, -30, 100),
    "channels": lambda call, rng: channels_apart(call, rng, -112, 50),
    "channels_large": lambda call, rng: channels_apart(call, rng, -50, 100),
    "input": lambda call, rng: scaled(call, rng, input=(-120, 100)),
    "weight": lambda call, rng: scaled(call, rng, weight=(-120, 100)),
    "input_and_weight": lambda call, rng: scaled(call, rng, input=(-90, 58), weight=(-90, 58)),
    "grad_output": lambda call, rng: scaled(call, rng, grad_output=(-120, 100)),
    "mask": lambda call, rng: scaled(call, rng, mask=(-120, 60)),
    "all": lambda call, rng: scaled(
        call, rng, input=(-60, 30), weight=(-60, 30), grad_output=(-60, 30), mask=(-30, 20)
    ),
    "pixels": lambda call, rng: pixels_apart(call, rng, -112, 55),
    "everything_small": lambda call, _: call._replace(
        input=call.input * 2.0**-60, weight=call.weight * 2.0**-45, bias=call.bias * 2.0**-105
    ),
    "subnormal_input": lambda call, _: call._replace(
        input=np.sign(call.input) * 2.0**-140, offset=np.rint(call.offset), bias=call.bias * 2.0**-132
    ),
    "subnormal_weight": lambda call, _: call._replace(
        weight=np.sign(call.weight) * 2.0**-140, grad_output=call.grad_output * 2.0**40,
        bias=call.bias * 2.0**-132, input=call.input * 2.0**50,
    ),
    "near_the_largest": lambda call, _: call._replace(
        input=call.input * 2.0**124, weight=call.weight * 2.0**-60, grad_output=call.grad_output * 2.0**-60
    ),
    "tiny_weight_beside_zeros": lambda call, _: one_input_channel(
        call, 1.7 * 2.0**50, 0.9, 1.7 * 2.0**-112
    ),
    "tiny_input_beside_zeros": lambda call, _: one_input_channel(
        call, 1.7 * 2.0**-112, 0.9, 1.7 * 2.0**50
    ),
    "subnormal_beside_large": lambda call, _: one_input_channel(
        call, 2.0**-140, 2.0**50, 2.0**50
    )._replace(offset=np.rint(call.offset), mask=np.ones_like(call.mask)),
    "cancelling": lambda call, _: cancelling(call),
    "most_left_away": lambda call, _: every(call, 1 + 2.0**-7 - 2.0**-23),
}  # fmt: skip
WILD_SHAPES = {
    "kernel_3": Geometry(1, 64, 9, 9, 64, THREE, padding=SAME),
    "offset_groups": Geometry(1, 96, 8, 9, 40, THREE, padding=SAME, groups=2, offset_groups=4),
    "pointwise": Geometry(2, 44, 9, 8, 33, ONE),
}


def magnitudes(call):
    """S and S4 of all results: float64 of absolute values, as it is and with weights of 1."""
    absolute = call.astype("float64").map(np.abs)
    bilinear = absolute._replace(offset=call.offset.astype(np.float64)).run("cpu")
    # At whole positions a sample is one pixel: four calls read the four corners of each cell.
    whole, step = np.floor(call.offset), np.zeros((1, call.offset.shape[1], 1, 1))
    ones = {}
    for y in (0, 1):
        for x in (0, 1):
            step[:, 0::2], step[:, 1::2] = y, x
            corner = absolute._replace(offset=whole + step)
            if ones:
                corner = corner._replace(bias=np.zeros_like(absolute.bias))
            for name, values in corner.run("cpu").items():
                ones[name] = ones.get(name, 0) + values
    # The slopes are differences of corners.
    slopes = np.repeat(ones["grad_mask"] * absolute.mask, 2, axis=1)
    bilinear["grad_offset"] = ones["grad_offset"] = slopes
    return bilinear, ones


def terms(call):
    """Summands of every result."""
    batch, outputs, *plane = call.grad_output.shape
    taps = call.weight[0, 0].size
    samples = outputs // call.groups * call.input.shape[1] // call.offset_groups
    pixels = batch * int(np.prod(plane))
    counts = (call.weight[0].size + 1, outputs * taps, samples, pixels, pixels, samples)
    return dict(zip(OUTPUTS, counts, strict=True))


@pytest.mark.parametrize("shape", WILD_SHAPES)
@pytest.mark.parametrize("name", WILD)
def test_bound_of_every_element(name, shape):
    """|y - y*| <= u ((n + 6) S + 4 S4), and n of the smallest normal numbers for what is below."""
    call = testing.real(WILD_SHAPES[shape], 3)
    call = WILD[name](call, np.random.default_rng(4)).astype("float32")
    assert all(np.isfinite(a).all() for a in call[:6])
    exact = call.astype("float64").run("reference")
    bilinear, ones = magnitudes(call)
    actual = run(call)
    for output, n in terms(call).items():
        bound = UNIT_ROUNDOFF["float32"] * ((n + 6) * bilinear[output] + 4 * ones[output])
        error = np.abs(actual[output] - exact[output])
        fits = error <= bound + n * 2.0**-126
        worst = np.max(error / (bound + n * 2.0**-126))
        assert fits.all(), f"{output}: {worst:.3g} of the bound"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_targets(name):
    call, actual = real(name)
    testing.assert_close(actual, call.astype("float64").run("reference"), "float32", name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NARROW)
def test_targets_in_half_precision(name, dtype):
    """Numbers of 11 and of 8 bits against samples, weights and gradients with all 24."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    call = testing.real(GEOMETRIES[name], 7).astype(dtype)
    testing.assert_close(run(call, 2), call.astype("float64").run("reference"), dtype, name)


# ---- values that are no ordinary numbers -------------------------------------------------------

HARD = {
    "nan": np.float32(np.nan),
    "signalling": np.uint32(0x7F800001).view(np.float32),
    "-signalling": np.uint32(0xFF80FFFF).view(np.float32),
    "inf": np.float32(np.inf),
    "-inf": np.float32(-np.inf),
    "largest": np.finfo(np.float32).max,
    "-largest": np.finfo(np.float32).min,
    "subnormal": np.float32(2.0**-149),
    "largest_subnormal": np.uint32(0x007FFFFF).view(np.float32),
    "smallest_normal": np.float32(-(2.0**-126)),
}
LARGEST = float(np.finfo(np.float32).max)
TENSORS = ("input", "offset", "mask", "weight", "bias", "grad_output")
HARD_SHAPES = {
    "kernel_3": Geometry(2, 48, 9, 8, 40, THREE, padding=SAME),
    "groups": Geometry(1, 64, 8, 9, 68, (3, 2), padding=SAME, groups=2, offset_groups=4),
    "pointwise": Geometry(1, 96, 8, 9, 33, ONE),
    "late": GEOMETRIES["late"],
}


def kind(array):
    """0: a number, 1 and 2: infinite, 3: NaN."""
    return np.select([np.isnan(array), array == np.inf, array == -np.inf], [3, 2, 1], 0)


@cache
def hard_case(shape):
    call = testing.lattice(HARD_SHAPES[shape], 5, (1, 1, 1)).astype("float32")
    return call, run(call)


def check_hard(call, clean, note, exact=False):
    """Each element is what the vector unit makes of it: of its kind, and as exact or as before."""
    with np.errstate(all="ignore"):
        with dcnlib.cpu_isa("avx512"):
            vector = run(call)
        actual = run(call, 2)
        if exact:
            for name, expected in vector.items():
                np.testing.assert_array_equal(actual[name], expected, f"{name}; {note}")
            return
        true, (bilinear, ones) = call.astype("float64").run("cpu"), magnitudes(call)
        for name, n in terms(call).items():
            S, S4 = bilinear[name], ones[name]
            bound = UNIT_ROUNDOFF["float32"] * ((n + 6) * S + 4 * S4) + n * 2.0**-126
            near = ~(np.abs(actual[name] - true[name]) > bound)
            # Where sums may leave the range on their way, they do it in any order.
            overflows = (S4 * 2 >= LARGEST) & np.isfinite(S4)
            kinds = kind(actual[name])
            right = (kinds != 0) | near | ~np.isfinite(true[name])
            right &= (kinds == kind(vector[name])) | overflows
            wrong = np.argwhere(~right)
            assert not wrong.size, f"{name}: {len(wrong)} wrong, first at {wrong[0]}; {note}"
            same = (vector[name] == clean[name]) & ~(S4 < 2.0**-100)
            np.testing.assert_array_equal(actual[name][same], clean[name][same], f"{name}; {note}")


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("shape", HARD_SHAPES)
def test_one_hard_value(shape, tensor):
    call, clean = hard_case(shape)
    array = getattr(call, tensor)
    for seed, (label, value) in enumerate(HARD.items()):
        index = tuple(np.random.default_rng(seed).integers(0, array.shape))
        special = changed(call, tensor, index, value)
        check_hard(special, clean, f"{label} at {index}", exact=not np.isfinite(value))


@pytest.mark.parametrize("tensor", TENSORS)
def test_hard_values_everywhere(tensor):
    call, clean = hard_case("kernel_3")
    for label, value in HARD.items():
        special = changed(call, tensor, np.s_[:], value)
        check_hard(special, clean, label, exact=not np.isfinite(value))


@pytest.mark.parametrize("tensor", TENSORS)
def test_scattered_hard_values(tensor):
    call, clean = hard_case("groups")
    array = getattr(call, tensor).copy()
    rng = np.random.default_rng(6)
    where = rng.random(array.shape) < 0.02
    array[where] = rng.choice(list(HARD.values()), np.count_nonzero(where))
    check_hard(call._replace(**{tensor: array}), clean, tensor)


# ---- processes ---------------------------------------------------------------------------------

#: Prints the instruction set in use, after a call that a reference checks.
CHILD = """
import dcnlib
from dcnlib import testing
from dcnlib.testing import Geometry
call = testing.lattice(Geometry(1, 32, 8, 9, 40, (3, 3), padding=(1, 1, 1, 1)), 0, (1, 1, 1))
testing.assert_equal(call.astype("float32").run("cpu"), call.run("reference"))
print(dcnlib.cpu_isa())
"""
#: A signal stack with no room for the unit's registers, for which Linux refuses them.
REFUSED = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
"""


@pytest.mark.parametrize(
    ("first", "settings", "isa"),
    [("", {}, "amx"), ("", {"DCNLIB_CPU_ISA": "avx512"}, "avx512"), (REFUSED, {}, "avx512")],
    ids=["granted", "limited", "refused"],
)
def test_processes(first, settings, isa):
    settings = {"DCNLIB_CPU_ISA": "", **settings}
    child = isolated.python(first + CHILD, **settings)
    assert child.stdout.strip() == isa, child.stderr


def test_forked_child_computes_the_same():
    """What the process may use, its children may."""
    child = isolated.python(
        """
import os
import dcnlib
from dcnlib import testing
from dcnlib.testing import Geometry
call = testing.real(Geometry(1, 64, 16, 16, 64, (3, 3), padding=(1, 1, 1, 1)), 0).astype("float32")
expected = call.forward("cpu")
if os.fork() == 0:
    os._exit(call.forward("cpu").tobytes() != expected.tobytes())
print(os.wait()[1], dcnlib.cpu_isa())
""",
        DCNLIB_CPU_ISA="",
    )
    assert child.stdout.split() == ["0", "amx"], child.stderr
