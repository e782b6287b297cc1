"""Resampling: against an independent oracle and the convolution, and what is promised beyond values.

`torch_ops/test_family.py` goes through torch.
"""

from functools import cache

import numpy as np
import pytest

import dcnlib
import pools
from dcnlib import testing
from dcnlib.backends import cpu, reference
from dcnlib.testing import UNIT_ROUNDOFF
from pools import Resample

ISAS = testing.cpu_isas()
DTYPES = ("float32", "float64", "float16", "bfloat16")
boundaries = pytest.mark.parametrize("boundary", ["border", "zeros"])


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
    expected = pools.resample_oracle(call)
    testing.assert_equal(call.run("reference"), expected, repeat)
    for dtype in dtypes():
        for isa in ISAS:
            with dcnlib.cpu_isa(isa):
                testing.assert_equal(call.astype(dtype).run("cpu"), expected, f"{isa}, {repeat}")


def real(shape, boundary, seed=0) -> Resample:
    """Normal data, offsets N(0, 2)."""
    rng = np.random.default_rng(seed)
    n, c, h, w = shape
    offset = 2 * rng.standard_normal((n, 2 * c, h, w))
    return Resample(rng.standard_normal(shape), offset, rng.standard_normal(shape), boundary)


# ---- values


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_lattices(first):
    for seed in range(first, first + 20):
        check(pools.lattice_resample(seed), f"pools.lattice_resample({seed})")


@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1), (2, 1, 1, 9), (1, 3, 9, 1), (1, 2, 15, 17), (1, 1, 5, 131)]
)
@boundaries
def test_shapes(shape, boundary):
    """One of anything, and sizes around vectors and tiles."""
    check(pools.lattice_resample(1, shape)._replace(boundary=boundary), shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(4))
def test_zeros_is_a_convolution(seed, isa):
    """A 1 x 1 kernel of ones, every channel with its own offsets: equal bits on the lattice."""
    call = pools.lattice_resample(seed, (2, 5, 9, 11))._replace(boundary="zeros").astype("float32")
    weight = np.ones((5, 1, 1, 1), np.float32)
    options = {"groups": 5, "offset_groups": 5}
    with dcnlib.cpu_isa(isa):
        found = call.run()
        output = dcnlib.deform_conv2d(call.input, call.offset, weight, **options)
        grads = dcnlib.deform_conv2d_backward(
            call.grad_output, call.input, call.offset, weight, **options
        )
    expected = {"output": output, "grad_input": grads.input, "grad_offset": grads.offset}
    testing.assert_equal(found, expected)


def test_boundaries_agree_inside():
    call = real((2, 3, 12, 13), "border")
    position = np.indices((12, 13))[None, None] + call.offset.reshape(2, 3, 2, 12, 13)
    inside = ((position >= 0) & (position < np.array([11, 12])[:, None, None])).all(2)
    assert 0.3 < inside.mean() < 0.9
    border, zeros = call.forward(), call._replace(boundary="zeros").forward()
    np.testing.assert_array_equal(border[inside], zeros[inside])
    assert (border[~inside] != zeros[~inside]).mean() > 0.8


def test_border_repeats_the_edge():
    call = pools.lattice_resample(0, (1, 2, 4, 5))._replace(boundary="border")
    shift = np.zeros((1, 2, 2, 4, 5))
    shift[:, :, 0], shift[:, :, 1] = -3.5, 7.25
    found = call._replace(offset=shift.reshape(1, 4, 4, 5)).forward()
    rows = [0, 0, 0, 0]  # rows -3.5 to -0.5
    np.testing.assert_array_equal(found, call.input[:, :, rows][..., [4] * 5])


@boundaries
def test_gradient_at_integer_positions(boundary):
    """Offsets of 0 have gradients: the difference to the next pixel; at the last one it is limited."""
    image = np.random.default_rng(0).integers(-9, 9, (1, 2, 5, 6)).astype(np.float64)
    call = Resample(image, np.zeros((1, 4, 5, 6)), np.ones_like(image), boundary)
    slopes = call.backward().offset.reshape(1, 2, 2, 5, 6)
    below, right = np.zeros_like(image), np.zeros_like(image)
    below[:, :, :-1], right[..., :-1] = np.diff(image, axis=2), np.diff(image, axis=3)
    if boundary == "zeros":  # where the next pixel is a zero
        below[:, :, -1], right[..., -1] = -image[:, :, -1], -image[..., -1]
    np.testing.assert_array_equal(slopes[:, :, 0], below)
    np.testing.assert_array_equal(slopes[:, :, 1], right)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@boundaries
def test_accuracy(boundary, dtype, isa):
    """The table of `docs/numerics.md`, at any size of the image."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for shape in ((2, 6, 40, 50), (1, 3, 4, 4096)):
        call = real(shape, boundary).astype(dtype)
        if dtype == "float64":
            if np.finfo(np.longdouble).nmant <= 52:
                pytest.skip("long double is no longer than double here")
            long = call.map(lambda a: a.astype(np.longdouble))
            problem = pools.problem_of(call)
            module = reference.deform_resample2d
            grads = module.differentiate(problem, long.grad_output, *long[:2])
            exact = (module.resample(problem, *long[:2]), *grads)
            expected = dict(zip(("output", "grad_input", "grad_offset"), exact, strict=True))
        else:
            expected = call.astype("float64").run("reference")
        with dcnlib.cpu_isa(isa):
            testing.assert_close(call.run("cpu"), expected, dtype, (shape, isa))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sub_pixel_offset_far_from_the_origin(dtype):
    """An eighth of a pixel is one at column 8000, too."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    ramp = np.arange(8192) % 16
    offset = np.zeros((1, 2, 1, 8192)) + np.array([0, 0.125])[:, None, None]
    image = ramp[None, None, None].astype(np.float64)
    found = Resample(image, offset, image, "zeros").astype(dtype).forward()
    expected = ramp + 0.125 * (np.append(ramp[1:], 0) - ramp)
    np.testing.assert_array_equal(found[0, 0, 0].astype(np.float64), expected)
    assert UNIT_ROUNDOFF[dtype] * 8192 > 0.125 or dtype == "float32"


def test_without_a_batch():
    call = real((1, 3, 6, 7), "border")
    alone = call.map(lambda a: a[0])
    for backend in ("cpu", "reference"):
        expected = {name: a[0] for name, a in call.run(backend).items()}
        testing.assert_equal(alone.run(backend), expected)


# ---- values that are no numbers


def each_backend(call):
    with np.errstate(all="ignore"):
        yield "reference", call.run("reference")
        for isa in ISAS:
            with dcnlib.cpu_isa(isa):
                yield isa, call.run("cpu")


@boundaries
@pytest.mark.parametrize("component", [0, 1])
def test_offset_that_is_no_number(component, boundary):
    """NaN gives NaN and spreads nothing. An infinite one has no gradient."""
    call = real((1, 2, 6, 7), boundary)
    call.offset[0, 2 + component, 3, 4] = np.nan
    for note, found in each_backend(call):
        assert np.isnan(found["output"][0, 1, 3, 4]), note
        assert np.isnan(found["output"]).sum() == 1
        assert np.isnan(found["grad_offset"][0, 2:, 3, 4]).all()
        assert np.isnan(found["grad_offset"]).sum() == 2
        assert np.isfinite(found["grad_input"]).all()
    for value in (np.inf, -np.inf, 1e30, -(2.0**63)):
        call.offset[0, 2:, 3, 4] = 0
        call.offset[0, 2 + component, 3, 4] = value
        edge = (0 if value < 0 else [5, 6][component], [4, 3][component])
        edge = edge if component == 0 else edge[::-1]
        expected = call.input[0, 1, edge[0], edge[1]] if boundary == "border" else 0
        for note, found in each_backend(call):
            assert found["output"][0, 1, 3, 4] == expected, note
            assert found["grad_offset"][0, 2 + component, 3, 4] == 0
            assert all(np.isfinite(a).all() for a in found.values())


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_special_values_as_in_the_reference(first):
    """The same elements not finite, all others equal."""
    for seed in range(first, first + 20):
        rng = np.random.default_rng(seed)
        call = pools.lattice_resample(seed).map(np.copy)
        name = rng.choice(["input", "offset", "grad_output"])
        array = getattr(call, name)
        values = [np.nan, np.inf, -np.inf] + [1e30, -1e30, 2.0**31, -(2.0**63)] * (name == "offset")
        for _ in range(min(array.size, 1 + array.size // 10)):
            array.flat[rng.integers(array.size)] = rng.choice(values)
        found = dict(each_backend(call))
        for note, results in found.items():
            for output, exact in found["reference"].items():
                np.testing.assert_array_equal(results[output], exact, f"{seed} {note} {output}")


# ---- promises


@cache
def large(boundary, dtype):
    return real((3, 20, 60, 77), boundary).astype(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@boundaries
def test_threads_change_no_bit(boundary, dtype, isa):
    call = large(boundary, dtype)
    problem = pools.problem_of(call)

    def run_with(num_threads):
        arrays = [np.full(a.shape, np.nan, a.dtype) for a in (call.input, call.input, call.offset)]
        cpu.resample_forward(problem, *call[:2], arrays[0], num_threads=num_threads)
        cpu.resample_backward(
            problem, call.grad_output, *call[:2], arrays[1:], num_threads=num_threads
        )
        assert not any(np.isnan(a).any() for a in arrays)
        return [a.tobytes() for a in arrays]

    with dcnlib.cpu_isa(isa):
        expected = run_with(1)
        assert all(run_with(threads) == expected for threads in (2, 3, 7, 16))


@boundaries
def test_batch_and_layout_change_no_bit(boundary):
    call = large(boundary, "float32")
    whole = call.run()
    alone = call.map(lambda a: a[1:2]).run()
    for name, array in whole.items():
        assert alone[name].tobytes() == array[1:2].tobytes()
    before = call.map(np.copy)
    for change in (
        np.asfortranarray,
        lambda a: np.stack([a, a], -1)[..., 0],
        lambda a: a.astype(a.dtype.newbyteorder()),
    ):
        testing.assert_equal(call.map(change).run(), whole)
    for array, copy in zip(call[:3], before[:3], strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_only_wanted_gradients(wanted, backend):
    call = pools.lattice_resample(0, (2, 3, 5, 6))
    full = call.backward("reference")
    grads = [np.full(g.shape, np.nan) if wanted & 1 << i else None for i, g in enumerate(full)]
    backend.resample_backward(pools.problem_of(call), call.grad_output, *call[:2], grads)
    for grad, exact in zip(grads, full, strict=True):
        if grad is not None:
            np.testing.assert_array_equal(grad, exact)


# ---- errors


def other(shape, dtype=np.float32):
    return np.zeros(shape, dtype)


ERRORS = {
    "input rank": ("input", other((2, 3)), ValueError),
    "input empty": ("input", other((2, 3, 0, 4)), ValueError),
    "input dtype": ("input", other((2, 3, 4, 5), np.int8), TypeError),
    "input list": ("input", [[1.0]], TypeError),
    "offset none": ("offset", None, TypeError),
    "offset channels": ("offset", other((2, 3, 4, 5)), ValueError),
    "offset size": ("offset", other((2, 6, 5, 4)), ValueError),
    "offset batch": ("offset", other((1, 6, 4, 5)), ValueError),
    "offset rank": ("offset", other((6, 4, 5)), ValueError),
    "offset dtype": ("offset", other((2, 6, 4, 5), np.float64), TypeError),
    "boundary name": ("boundary", "reflect", ValueError),
    "boundary kind": ("boundary", None, TypeError),
    "backend name": ("backend", "fast", ValueError),
    "backend kind": ("backend", 0, TypeError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    argument, value, error = ERRORS[name]
    given = {"input": other((2, 3, 4, 5)), "offset": other((2, 6, 4, 5))} | {argument: value}
    form = "^{}: {}: .+; expected .+, got .+"
    with pytest.raises(error, match=form.format("deform_resample2d", argument)):
        dcnlib.deform_resample2d(**given)
    with pytest.raises(error, match=form.format("deform_resample2d_backward", argument)):
        dcnlib.deform_resample2d_backward(other((2, 3, 4, 5)), **given)


def test_grad_output_is_checked():
    call = real((2, 3, 4, 5), "border")
    for wrong, error in ((call.input[:, :2], ValueError), (call.input.astype("f4"), TypeError)):
        with pytest.raises(error, match="deform_resample2d_backward: grad_output: "):
            call._replace(grad_output=wrong).backward()
