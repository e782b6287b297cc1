"""RoI pooling, both dialects: against an independent oracle, and what is promised beyond values.

`torch_ops/test_family.py` goes through torch.
"""

import re
from functools import cache

import numpy as np
import pytest

import dcnlib
import pools
from dcnlib import testing
from dcnlib.backends import cpu, reference
from dcnlib.testing import UNIT_ROUNDOFF
from pools import OUTPUTS

ISAS = testing.cpu_isas()
DTYPES = ("float32", "float64", "float16", "bfloat16")
DIALECTS = {"aligned": False, "sensitive": True}
both = pytest.mark.parametrize("sensitive", DIALECTS.values(), ids=DIALECTS)


@cache
def dtypes():
    """All four, without bfloat16 where ml_dtypes is missing."""
    try:
        testing.numpy_dtype("bfloat16")
    except ImportError:
        return DTYPES[:3]
    return DTYPES


def check(call, repeat):
    """Every dtype on every instruction set, and the reference, against the oracle."""
    expected = pools.pool_oracle(call)
    testing.assert_equal(call.run("reference"), expected, repeat)
    for dtype in dtypes():
        for isa in ISAS:
            with dcnlib.cpu_isa(isa):
                typed = call.astype(dtype, "float32" if len(dtype) > 7 else "float64")
                testing.assert_equal(typed.run("cpu"), expected, f"{isa}, {repeat}")


# ---- values


@both
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_lattices(first, sensitive):
    for seed in range(first, first + 20):
        check(pools.lattice_pool(seed, sensitive), f"pools.lattice_pool({seed}, {sensitive})")


def test_lattices_are_worth_testing():
    """Not all outside, some empty, some without offsets, some with a mask."""
    calls = [pools.lattice_pool(seed) for seed in range(100)]
    filled = [np.count_nonzero(c.forward("reference")) / max(c.grad_output.size, 1) for c in calls]
    assert np.mean(filled) > 0.4
    for count in (
        sum(len(c.rois) == 0 for c in calls),
        sum(c.offset is None for c in calls),
        sum(c.mask is not None for c in calls),
        sum(c.options.get("part_size") != c.options["output_size"] for c in calls),
    ):
        assert count > 2


@both
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 128, 129, 150, 260])
def test_channels(channels, sensitive):
    """Around every vector and slab."""
    call = pools.lattice_pool(3, False, channels)
    if sensitive:
        call = pools.lattice_pool(11, True, channels)
        call = call._replace(offset=None) if channels % (call.offset.shape[1] // 2) else call
    check(call, f"{channels} channels")


@pytest.mark.parametrize(
    ("classes", "per_class", "group"),
    [(21, 1, (2, 1)), (5, 13, (1, 1)), (3, 50, (1, 2)), (2, 130, (1, 1))],
)
def test_classes(classes, per_class, group):
    """Offsets for each class: blocks of channels that cut vectors and slabs."""
    rng = np.random.default_rng(0)
    channels = classes * per_class
    call = pools.Pool(
        rng.integers(-4, 5, (2, channels * group[0] * group[1], 6, 7)).astype(np.float64),
        np.array([[0, 0, 0, 3, 3], [1, 1, 2, 4, 5], [1, -2, 0, 9, 1]], np.float64),
        rng.integers(-4, 5, (3, 2 * classes, 2, 1)).astype(np.float64),
        rng.integers(0, 9, (3, 1, 2, 2)) / 8,
        rng.integers(-2, 3, (3, channels, 2, 2)).astype(np.float64),
        {
            "spatial_scale": 1.0,
            "output_size": (2, 2),
            "output_dim": channels,
            "group_size": group,
            "part_size": (2, 1),
            "sample_per_part": 2,
            "offset_std": 0.125,
        },
        True,
    )
    check(call, f"{classes} classes of {per_class}")


def test_many_bins():
    """More bins than a chunk of touches holds, and images of more rows than a band."""
    rng = np.random.default_rng(1)
    call = pools.Pool(
        rng.integers(-4, 5, (1, 130, 120, 60)).astype(np.float64),
        np.array([[0, 2, 4, 50, 116], [0, 0, 30, 64, 94]], np.float64),
        rng.integers(-2, 3, (2, 2, 16, 16)).astype(np.float64),
        None,
        rng.integers(-1, 2, (2, 130, 16, 16)).astype(np.float64),
        {"spatial_scale": 1.0, "output_size": (16, 16), "sampling_ratio": 4, "gamma": 0.0625},
        False,
    )
    expected = call.run("reference")
    for isa in ISAS:
        with dcnlib.cpu_isa(isa):
            testing.assert_equal(call.astype("float32").run("cpu"), expected, isa)


REAL = {
    "adaptive": (False, {}),
    "three_samples": (False, {"sampling_ratio": 3}),
    "gamma": (False, {"sampling_ratio": 2, "gamma": 0.7}),
    "many_samples": (False, {"sampling_ratio": 9}),
    "defaults": (True, {}),
    "five_samples": (True, {"sample_per_part": 5, "offset_std": 0.3}),
    "classes": (True, {"classes": 3, "part_size": (2, 4)}),
    "grouped": (True, {"group_size": (2, 3), "classes": 2}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_equals_oracle(name):
    """Regions and offsets as they come: counts of samples that are no powers of two."""
    sensitive, options = REAL[name]
    for seed in range(4):
        call = pools.real_pool(seed, sensitive, **options)
        expected = pools.pool_oracle(call)
        for backend in ("reference", "cpu"):
            actual = call.run(backend)
            for output in OUTPUTS:
                if expected[output] is not None:
                    scale = np.abs(expected[output]).max()
                    difference = np.abs(actual[output] - expected[output]).max()
                    assert difference <= 1e-12 * scale, (backend, output, seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", REAL)
def test_accuracy(name, dtype, isa):
    """The table of `docs/numerics.md`, at any size of the image."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    sensitive, options = REAL[name]
    for shape in ((1, 48, 30, 40), (1, 12, 9, 700)):
        call = pools.real_pool(0, sensitive, shape, **options).astype(dtype)
        expected = call.astype("float64").run("reference")
        with dcnlib.cpu_isa(isa):
            testing.assert_close(call.run("cpu"), expected, dtype, f"{name} {shape} {isa}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", REAL)
def test_float64_accuracy(name, isa):
    """Against long double: positions are rounded to float64, and errors grow with them."""
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("long double is no longer than double here")
    sensitive, options = REAL[name]
    call = pools.real_pool(1, sensitive, **options)
    long = call.map(lambda a: a.astype(np.longdouble), lambda a: a.astype(np.longdouble))
    problem = pools.problem_of(call)
    exact = [reference.deform_roi_pool.pool(problem, *long[:4])]
    grads = reference.deform_roi_pool.differentiate(problem, long.grad_output, *long[:4])
    exact += [g if a is not None else None for g, a in zip(grads, (0, 0, call.mask), strict=True)]
    with dcnlib.cpu_isa(isa):
        actual = call.run("cpu")
    for output, value in zip(OUTPUTS, exact, strict=True):
        if value is not None:
            largest, _ = testing.errors(actual[output], value, "float64")
            assert largest <= 32 + 4 * max(call.input.shape[2:]), (output, largest)


def test_published_values_of_mmcv():
    """Without offsets it is RoIAlign: the values of mmcv's own tests."""
    for image, region, expected in (
        ([[1, 2], [3, 4]], [0, 0, 0, 1, 1], [[1, 1.25], [1.5, 1.75]]),
        (
            [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]],
            [0, 0, 0, 3, 3],
            [[1.9375, 4.75], [7.5625, 10.375]],
        ),
    ):
        image, region = (np.array(a, np.float32)[None] for a in (image, region))
        found = dcnlib.deform_roi_pool(image[None], region, None, 2, 1.0, 2)
        np.testing.assert_array_equal(found[0, 0], expected)


@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
@both
def test_offsets_are_x_then_y(sensitive, axis):
    """An image that rises along one axis shows which plane of the offset moves along it."""
    image = np.indices((12, 12))[1 - axis].astype(np.float64)[None, None]
    rois = np.array([[0, 3, 3, 7, 7]], np.float64)
    offset = np.zeros((1, 2, 1, 1))
    options = {"output_size": 1, "spatial_scale": 1.0}
    if sensitive:
        options |= {"output_dim": 1, "offset_std": 0.5}
    else:
        options |= {"gamma": 0.5}
    function = dcnlib.deform_psroi_pool if sensitive else dcnlib.deform_roi_pool
    backward = getattr(dcnlib, f"{function.__name__}_backward")
    size = 5 if sensitive else 4  # one pixel more: the last one is part of the region
    before = function(image, rois, offset, **options).item()
    offset[0, axis] = 0.25
    after = function(image, rois, offset, **options).item()
    assert after - before == pytest.approx(0.25 * 0.5 * size)
    slopes = backward(np.ones((1, 1, 1, 1)), image, rois, offset, **options).offset.ravel()
    np.testing.assert_allclose(slopes, 0.5 * size * (np.arange(2) == axis), atol=1e-14)


def test_no_offset_is_a_zero_offset():
    call = pools.real_pool(0, True)
    zero = call._replace(offset=np.zeros_like(call.offset)).run()
    for ignored in (call.offset, None):
        options = call.options | {"no_offset": True}
        found = call._replace(offset=ignored, options=options).run()
        assert found.pop("grad_offset") is None
        testing.assert_equal(found, {name: zero[name] for name in found})


def test_reversed_regions():
    """Mirrored where the number of samples is given, nothing where it follows from the size."""
    call = pools.real_pool(0, False, sampling_ratio=2)
    mirrored = call._replace(rois=call.rois[:, [0, 3, 4, 1, 2]])
    plain = call._replace(offset=None).forward()
    np.testing.assert_allclose(
        mirrored._replace(offset=None).forward(), plain[:, :, ::-1, ::-1], atol=1e-12
    )
    adaptive = mirrored._replace(options=mirrored.options | {"sampling_ratio": 0})
    assert not adaptive.forward().any()
    grads = adaptive.backward()
    assert not grads.input.any() and not grads.offset.any()


@both
def test_gradients_are_differences(sensitive):
    """A step of 2**-10 on lattice points, where the loss is linear, in every argument."""
    rng = np.random.default_rng(5)
    step = 2.0**-10
    for seed in range(6):
        call = pools.lattice_pool(100 + seed, sensitive)
        grads = call.backward("reference")

        def loss(changed):
            return np.vdot(changed.forward("reference"), changed.grad_output)

        for name in grads._fields:
            array = getattr(call, name)
            if array is None or not array.size:
                continue
            for at in rng.choice(array.size, min(array.size, 12), replace=False):
                moved = array.copy()
                moved.ravel()[at] += step
                slope = (loss(call._replace(**{name: moved})) - loss(call)) / step
                found = getattr(grads, name).ravel()[at]
                jump = sensitive and name == "offset"  # a sample may cross the border
                assert slope == pytest.approx(found, abs=1e-9) or jump, (name, at, seed)


# ---- values that are no numbers


def backends():
    yield "reference", None
    for isa in ISAS:
        yield "cpu", isa


def each_backend(call):
    for backend, isa in backends():
        with dcnlib.cpu_isa(isa or dcnlib.cpu_isa()), np.errstate(all="ignore"):
            yield f"{backend} {isa}", call.run(backend)


def changed(call, name, index, value):
    array = getattr(call, name).copy()
    array[index] = value
    return call._replace(**{name: array})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [1, 2, 3, 4])
@both
def test_region_that_is_no_number(sensitive, column, value):
    """It gives NaN, its gradients are NaN, nothing of it reaches the input."""
    call = pools.real_pool(0, sensitive)
    clean = call._replace(grad_output=call.grad_output.copy())
    clean.grad_output[4] = 0
    clean = clean.run("reference")
    for note, found in each_backend(changed(call, "rois", (4, column), value)):
        for name in ("output", "grad_offset", "grad_mask"):
            if found[name] is not None:
                assert np.isnan(found[name][4]).all(), (note, name)
                rest = np.delete(found[name], 4, 0)
                np.testing.assert_allclose(
                    rest, np.delete(clean[name], 4, 0), rtol=1e-10, atol=1e-10
                )
        np.testing.assert_allclose(found["grad_input"], clean["grad_input"], atol=1e-12)


@both
def test_offset_that_is_no_number(sensitive):
    """NaN: the bin is NaN. Infinite: the bin is 0 with gradient 0."""
    call = pools.real_pool(0, sensitive)
    at = (4, 1, 1, 2)
    for note, found in each_backend(changed(call, "offset", at, np.nan)):
        assert np.isnan(found["output"][4, :, 1, 2]).all(), note
        assert np.isnan(found["output"]).sum() == call.grad_output.shape[1]
        assert np.isnan(found["grad_offset"][4, :, 1, 2]).all()
        assert np.isnan(found["grad_offset"]).sum() == 2
        assert np.isfinite(found["grad_input"]).all()
        if sensitive:
            assert np.isnan(found["grad_mask"]).sum() == 1
    for value in (np.inf, -np.inf, 1e300):
        for note, found in each_backend(changed(call, "offset", at, value)):
            assert not found["output"][4, :, 1, 2].any(), note
            assert not found["grad_offset"][4, :, 1, 2].any()
            assert all(np.isfinite(a).all() for a in found.values() if a is not None)


@both
def test_nothing_inside_has_gradient_zero(sensitive):
    """Whatever comes from above, infinities too."""
    call = pools.real_pool(0, sensitive)
    call = changed(call, "offset", (4, slice(None), 1, 2), 1e3)
    call = changed(call, "grad_output", (4, slice(None), 1, 2), np.inf)
    if sensitive:
        call = changed(call, "mask", (4, 0, 1, 2), np.inf)
    for note, found in each_backend(call):
        assert not found["grad_offset"][4, :, 1, 2].any(), note
        assert np.isfinite(found["grad_input"]).all()
        if sensitive:
            assert not found["grad_mask"][4, 0, 1, 2].any()


@pytest.mark.parametrize("first", range(0, 60, 15))
def test_special_values_as_in_the_reference(first):
    """The same elements not finite, all others equal, for anything anywhere but in rois[:, 0]."""
    numbers = [np.nan, np.inf, -np.inf]
    for seed in range(first, first + 15):
        rng = np.random.default_rng(seed)
        call = pools.lattice_pool(seed)
        call = call.map(np.copy, np.copy)
        if not call.sensitive and rng.random() < 0.3:
            call.options["sampling_ratio"] = 0
        name = rng.choice(["input", "rois", "offset", "mask", "grad_output"])
        array = getattr(call, name)
        if array is None or not array.size:
            continue
        values = numbers + [1e30, -1e30, 2.0**31, -(2.0**63), 1e-40] * (name in ("rois", "offset"))
        for _ in range(1 + array.size // 20):
            at = rng.integers(array.size)
            if name != "rois" or at % 5:
                array.flat[at] = rng.choice(values)
        with np.errstate(all="ignore"):
            expected = call.run("reference")
            for note, found in each_backend(call):
                for output, exact in expected.items():
                    if exact is not None:
                        np.testing.assert_allclose(
                            found[output], exact, rtol=1e-9, atol=1e-9, err_msg=f"{seed} {note}"
                        )


def test_regions_of_any_size():
    """Far larger than the image, with as many samples as pixels: a bounded time, a right value."""
    image = np.ones((1, 2, 5, 6))
    for size in (1e3, 1e6, 1e9, 1e12, 1e30, 1e300):
        rois = np.array([[0, -size, -size, size, size]])
        for backend in ("reference", "cpu"):
            found = dcnlib.deform_roi_pool(image, rois, None, 1, backend=backend)
            assert np.isfinite(found).all() and (0 <= found).all()
            if size <= 1e9:  # samples at whole rows, of which -1 to 5 are inside
                assert found[0, 0, 0, 0] == pytest.approx(7 * 8 / (2 * size) ** 2)
            grads = dcnlib.deform_roi_pool_backward(found, image, rois, None, 1, backend=backend)
            assert np.isfinite(grads.input).all()


def test_most_samples():
    call = pools.real_pool(0, False, count=1, out=(1, 1), sampling_ratio=32767)
    testing.assert_close(call.astype("float32").run(), call.run("reference"), "float32")


# ---- promises


@cache
def large(sensitive):
    """Enough work for a team, with classes, parts and groups where there are any."""
    options = {"sampling_ratio": 2}
    if sensitive:
        options = {"group_size": (2, 1), "classes": 5, "part_size": (2, 4)}
    channels = 140 if sensitive else 70
    call = pools.real_pool(0, sensitive, (3, channels, 40, 44), 60, (4, 5), **options)
    return call.astype("float32", "float32")


def run_with(call, num_threads):
    """All results through the backend's own door, in memory that was NaN before."""
    problem = pools.problem_of(call)
    rois = call.rois.astype(np.float64)
    output = np.full(problem.output_shape, np.nan, call.input.dtype)
    cpu.roi_pool_forward(
        problem, call.input, rois, call.offset, call.mask, output, num_threads=num_threads
    )
    arrays = (call.input, call.offset, call.mask)
    grads = [None if a is None else np.full(a.shape, np.nan, a.dtype) for a in arrays]
    cpu.roi_pool_backward(
        problem, call.grad_output, call.input, rois, call.offset, call.mask, grads,
        num_threads=num_threads,
    )  # fmt: skip
    return [a for a in (output, *grads) if a is not None]


@pytest.mark.parametrize("isa", ISAS)
@both
def test_threads_change_no_bit(sensitive, isa):
    call = large(sensitive)
    with dcnlib.cpu_isa(isa):
        expected = run_with(call, 1)
        assert not any(np.isnan(a).any() for a in expected)
        for threads in (2, 3, 7, 16):
            for found, wanted in zip(run_with(call, threads), expected, strict=True):
                assert found.tobytes() == wanted.tobytes(), threads


@both
def test_batch_changes_no_bit(sensitive):
    """An image alone with its regions, a region alone."""
    call = large(sensitive)
    whole = call.run()
    for image in range(3):
        mine = call.rois[:, 0] == image
        rois = call.rois[mine].copy()
        rois[:, 0] = 0
        alone = call._replace(
            input=call.input[image : image + 1],
            rois=rois,
            offset=call.offset[mine],
            mask=None if call.mask is None else call.mask[mine],
            grad_output=call.grad_output[mine],
        ).run()
        assert alone["grad_input"].tobytes() == whole["grad_input"][image : image + 1].tobytes()
        for name in ("output", "grad_offset", "grad_mask"):
            if whole[name] is not None:
                assert alone[name].tobytes() == whole[name][mine].tobytes(), name


@both
def test_layout_changes_no_bit(sensitive):
    """Strides, order, byte order, alignment, read-only memory; and no argument is written."""

    def sliced(a):
        return np.stack([a, a], -1)[..., 0]

    def unaligned(a):
        memory = bytearray(a.nbytes + 1)
        view = np.frombuffer(memory, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        view[...] = a
        return view

    def read_only(a):
        a = a.copy()
        a.setflags(write=False)
        return a

    call = large(sensitive)
    expected = call.run()
    before = call.map(np.copy, np.copy)
    for change in (
        np.asfortranarray, sliced, unaligned, read_only, lambda a: a.astype(a.dtype.newbyteorder()),
    ):  # fmt: skip
        testing.assert_equal(call.map(change, change).run(), expected)
    for array, copy in zip(call[:5], before[:5], strict=True):
        if array is not None:
            np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_wanted_gradients(wanted, backend):
    call = pools.lattice_pool(1, True)
    assert call.offset is not None and call.mask is not None and len(call.rois)
    problem = pools.problem_of(call)
    full = call.backward("reference")
    grads = [np.full(g.shape, np.nan) if wanted & 1 << i else None for i, g in enumerate(full)]
    arrays = (call.grad_output, call.input, call.rois, call.offset, call.mask)
    backend.roi_pool_backward(problem, *arrays, grads)
    for grad, exact in zip(grads, full, strict=True):
        if grad is not None:
            np.testing.assert_array_equal(grad, exact)


@both
def test_empty(sensitive):
    """No regions, and no images."""
    call = pools.real_pool(0, sensitive)
    for images in (2, 0):
        empty = call._replace(
            input=call.input[:images],
            rois=call.rois[:0],
            offset=call.offset[:0],
            mask=None if call.mask is None else call.mask[:0],
            grad_output=call.grad_output[:0],
        )
        for backend in ("cpu", "reference"):
            found = empty.run(backend)
            assert found["output"].shape == empty.grad_output.shape
            assert found["grad_input"].shape == empty.input.shape
            assert not found["grad_input"].any()
            assert found["grad_offset"].shape == empty.offset.shape


# ---- errors

FORM = r"{}: {}: .+; expected .+, got .+"


@pytest.mark.parametrize(
    "number", [-1, 2, 0.5, 1e30, -1e30, np.nan, np.inf, -np.inf, 2.0**31, -0.001]
)
@both
def test_image_number(sensitive, number):
    call = changed(pools.real_pool(0, sensitive), "rois", (3, 0), number)
    text = re.escape(f"{number:g} in row 3")
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=FORM.format(call.op, "rois")[:-2] + text):
            call.forward(backend)
        with pytest.raises(ValueError, match=FORM.format(f"{call.op}_backward", "rois")):
            call.backward(backend)


def other(shape):
    return np.zeros(shape, np.float32)


ALIGNED_ERRORS = {
    "input rank": ("input", other((2, 6, 8)), ValueError),
    "input empty": ("input", other((2, 6, 0, 8)), ValueError),
    "input dtype": ("input", np.zeros((2, 6, 8, 8), np.int32), TypeError),
    "input list": ("input", [[1.0]], TypeError),
    "input masked": ("input", np.ma.zeros((2, 6, 8, 8), np.float32), TypeError),
    "rois rank": ("rois", other(5), ValueError),
    "rois columns": ("rois", other((3, 4)), ValueError),
    "rois dtype": ("rois", np.zeros((3, 5), np.float16), TypeError),
    "rois integers": ("rois", np.zeros((3, 5), np.int64), TypeError),
    "rois none": ("rois", None, TypeError),
    "offset count": ("offset", other((4, 2, 2, 3)), ValueError),
    "offset channels": ("offset", other((3, 4, 2, 3)), ValueError),
    "offset size": ("offset", other((3, 2, 3, 2)), ValueError),
    "offset dtype": ("offset", np.zeros((3, 2, 2, 3)), TypeError),
    "output_size 0": ("output_size", 0, ValueError),
    "output_size three": ("output_size", (1, 2, 3), ValueError),
    "output_size float": ("output_size", 2.0, TypeError),
    "output_size bool": ("output_size", True, TypeError),
    "output_size large": ("output_size", 2**31, ValueError),
    "spatial_scale 0": ("spatial_scale", 0.0, ValueError),
    "spatial_scale negative": ("spatial_scale", -1, ValueError),
    "spatial_scale nan": ("spatial_scale", np.nan, ValueError),
    "spatial_scale inf": ("spatial_scale", np.inf, ValueError),
    "spatial_scale huge": ("spatial_scale", 10**400, ValueError),
    "spatial_scale text": ("spatial_scale", "1", TypeError),
    "spatial_scale none": ("spatial_scale", None, TypeError),
    "spatial_scale bool": ("spatial_scale", True, TypeError),
    "spatial_scale complex": ("spatial_scale", 1j, TypeError),
    "sampling_ratio negative": ("sampling_ratio", -1, ValueError),
    "sampling_ratio many": ("sampling_ratio", 32768, ValueError),
    "sampling_ratio huge": ("sampling_ratio", 2**63, ValueError),
    "sampling_ratio float": ("sampling_ratio", 2.0, TypeError),
    "gamma nan": ("gamma", np.nan, ValueError),
    "gamma text": ("gamma", "0.1", TypeError),
    "backend unknown": ("backend", "fast", ValueError),
    "backend number": ("backend", 1, TypeError),
}
SENSITIVE_ERRORS = {
    name: case
    for name, case in ALIGNED_ERRORS.items()
    if case[0] not in ("sampling_ratio", "gamma", "offset")
} | {
    "input channels": ("input", other((2, 7, 8, 8)), ValueError),
    "output_dim": ("input", ("output_dim", 5), ValueError),
    "output_dim 0": ("output_dim", 0, ValueError),
    "output_dim float": ("output_dim", 3.0, TypeError),
    "group_size": ("input", ("group_size", 3), ValueError),
    "group_size 0": ("group_size", 0, ValueError),
    "offset odd": ("offset", other((3, 3, 2, 3)), ValueError),
    "offset none of": ("offset", other((3, 0, 2, 3)), ValueError),
    "offset classes": ("offset", other((3, 4, 2, 3)), ValueError),
    "offset part": ("offset", other((3, 2, 3, 3)), ValueError),
    "part_size": ("offset", ("part_size", 4), ValueError),
    "part_size 0": ("part_size", (0, 1), ValueError),
    "sample_per_part 0": ("sample_per_part", 0, ValueError),
    "sample_per_part many": ("sample_per_part", 2**31, ValueError),
    "offset_std": ("offset_std", np.inf, ValueError),
    "mask shape": ("mask", other((3, 3, 2, 3)), ValueError),
    "mask dtype": ("mask", np.zeros((3, 1, 2, 3)), TypeError),
}
ERRORS = [(False, name) for name in ALIGNED_ERRORS] + [(True, name) for name in SENSITIVE_ERRORS]


def arguments(sensitive):
    given = {
        "input": other((2, 6, 8, 8)),
        "rois": other((3, 5)),
        "offset": other((3, 2, 2, 3)),
        "output_size": (2, 3),
        "spatial_scale": 0.5,
    }
    return given | ({"output_dim": 3, "group_size": (2, 1)} if sensitive else {})


@pytest.mark.parametrize(
    ("sensitive", "name"), ERRORS, ids=[f"{('aligned', 'sensitive')[s]}-{n}" for s, n in ERRORS]
)
def test_errors(sensitive, name):
    """The same type and text forwards and backwards, whatever else is wrong."""
    argument, value, error = (SENSITIVE_ERRORS if sensitive else ALIGNED_ERRORS)[name]
    given = arguments(sensitive)
    given |= (
        dict([value]) if type(value) is tuple and isinstance(value[0], str) else {argument: value}
    )
    op = "deform_psroi_pool" if sensitive else "deform_roi_pool"
    with pytest.raises(error, match=f"^{FORM.format(op, argument)}"):
        getattr(dcnlib, op)(**given)
    grad_output = other((3, 3 if sensitive else 6, 2, 3))
    with pytest.raises(error, match=f"^{FORM.format(f'{op}_backward', argument)}"):
        getattr(dcnlib, f"{op}_backward")(grad_output, **given)


@both
def test_grad_output_is_checked(sensitive):
    op = "deform_psroi_pool_backward" if sensitive else "deform_roi_pool_backward"
    channels = 3 if sensitive else 6
    for wrong, error in (
        (other((3, channels, 2, 2)), ValueError),
        (other((3, channels, 2)), ValueError),
        (np.zeros((3, channels, 2, 3)), TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error, match=FORM.format(op, "grad_output")):
            getattr(dcnlib, op)(wrong, **arguments(sensitive))


@both
def test_sizes_at_the_limit(sensitive):
    """As large as a number may be, where there are no regions; too large to address elsewhere."""
    op = "deform_psroi_pool" if sensitive else "deform_roi_pool"
    given = arguments(sensitive) | {"rois": other((0, 5)), "offset": None}
    found = getattr(dcnlib, op)(**given | {"output_size": (2**31 - 1, 1)})
    assert found.shape == (0, 3 if sensitive else 6, 2**31 - 1, 1)
    with pytest.raises(ValueError, match=FORM.format(op, "o(ut|ff)(put|set)")):
        getattr(dcnlib, op)(**given | {"output_size": 2**31 - 1})
    with pytest.raises((MemoryError, ValueError)):
        getattr(dcnlib, op)(**arguments(sensitive) | {"offset": None, "output_size": 2**24})


def test_unit_roundoff_of_16_bit_regions():
    """Half-precision regions are taken as they are; float32 ones keep a pixel at 3000."""
    ramp = np.tile((np.arange(4096) % 16).astype(np.float16), (1, 1, 2, 1))
    rois = np.array([[0, 3001, 0, 3003, 2]], np.float32)
    found = dcnlib.deform_roi_pool(ramp, rois, None, (1, 2), 1.0, 1)
    # Bins of one pixel begin at 3000.5: their middles are pixels 3001 and 3002.
    np.testing.assert_array_equal(found[0, 0, 0], np.float16([3001 % 16, 3002 % 16]))
    assert UNIT_ROUNDOFF["float16"] * 3001 > 1
    rounded = dcnlib.deform_roi_pool(ramp, rois.astype(np.float16), None, (1, 2), 1.0, 1)
    assert not np.array_equal(found, rounded)
