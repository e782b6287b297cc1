"""The reference backend against dense hat matrices, its own differences, and its contract."""

import itertools

import numpy as np
import pytest

import oracle
from dcnlib import testing
from dcnlib.backends import reference
from dcnlib.testing import OUTPUTS, PROBLEMS

SMALL = (2, 2, 1)  # amplitudes that keep the longest sums of PROBLEMS exact


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_lattice_equals_oracle(first):
    for seed in range(first, first + 20):
        call = testing.random_lattice(seed)
        testing.assert_equal(call.run("reference"), oracle.run(call), f"random_lattice({seed})")


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_equals_oracle(name):
    call = testing.lattice(PROBLEMS[name], 0, SMALL)
    assert testing.is_exact(call)
    testing.assert_equal(call.run("reference"), oracle.run(call))


@pytest.mark.parametrize("name", PROBLEMS)
def test_real_data_close_to_oracle(name):
    """Here the two differ by rounding: the oracle adds offsets to positions."""
    call = testing.real(PROBLEMS[name], 0)
    actual, expected = call.run("reference"), oracle.run(call)
    for output in OUTPUTS:
        if expected[output] is not None and expected[output].size:
            scale = np.abs(expected[output]).max()
            assert np.abs(actual[output] - expected[output]).max() <= 1e-13 * scale, output


@pytest.mark.parametrize("seed", range(12))
def test_gradients_are_exact_differences(seed):
    """The loss is linear in a step of 1/8 to the right of any lattice point, in every argument."""
    call = testing.random_lattice(1000 + seed)
    grads = call.run("reference")
    rng = np.random.default_rng(seed)

    def loss(changed):
        return np.vdot(changed.forward("reference"), call.grad_output)

    for name in ("input", "offset", "weight", "bias", "mask"):
        array = getattr(call, name)
        if array is None or array.size == 0:
            continue
        for at in rng.choice(array.size, min(array.size, 40), replace=False):
            moved = array.copy()
            moved.ravel()[at] += 0.125
            slope = (loss(call._replace(**{name: moved})) - loss(call)) / 0.125
            assert slope == grads[f"grad_{name}"].ravel()[at], (name, at, seed)


@pytest.mark.parametrize(("axis", "expected"), [(0, (1.0, 0.0)), (1, (0.0, 1.0))])
def test_offset_gradient_is_y_then_x(axis, expected):
    """An image that rises by one per row, and one that rises by one per column."""
    call = testing.Call(
        input=np.indices((1, 1, 6, 6))[2 + axis].astype(np.float64),
        offset=np.full((1, 2, 6, 6), 0.25),
        weight=np.ones((1, 1, 1, 1)),
        bias=None,
        mask=None,
        grad_output=np.ones((1, 1, 6, 6)),
    )
    for component, slope in enumerate(expected):
        assert (call.backward("reference").offset[0, component, :-1, :-1] == slope).all()


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=5)))
def test_only_wanted_gradients_are_written(wanted):
    call = testing.lattice(PROBLEMS["groups_across"], 1)
    full = call.backward("reference")
    outs = [
        np.full(g.shape, np.nan) if want else None for g, want in zip(full, wanted, strict=True)
    ]
    reference.backward(
        call.problem(), call.grad_output, call.input, call.offset, call.weight, call.mask, outs
    )
    for out, grad in zip(outs, full, strict=True):
        if out is not None:
            np.testing.assert_array_equal(out, grad)


def test_arguments_are_not_written():
    call = testing.random_lattice(5)
    before = call.map(np.copy)
    call.map(lambda array: array.setflags(write=False))
    call.run("reference")
    for array, copy in zip(call[:6], before[:6], strict=True):
        if copy is not None:
            np.testing.assert_array_equal(array, copy)


def test_declines_other_devices():
    assert reference.why_not("cpu") is None
    assert "CPU" in reference.why_not("cuda")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 1.0),
        (1 + 2.0**-8, 1.0),  # a tie goes to even
        (1 + 3 * 2.0**-8, 1 + 2.0**-6),
        (1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-7),  # through float32 this would look like a tie
        (1 + 3 * 2.0**-8 - 2.0**-40, 1 + 2.0**-7),
        (2.0**-133, 2.0**-133),  # the smallest subnormal
        (2.0**-134, 0.0),
        (2.0**-134 + 2.0**-170, 2.0**-133),
        (2.0**128 - 2.0**119, np.inf),
        (2.0**128 - 2.0**119 - 2.0**80, 2.0**128 - 2.0**120),
        (-np.inf, -np.inf),
        (np.nan, np.nan),
        (-0.0, 0.0),
    ],
)
def test_rounds_once_to_bfloat16(value, expected):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    result = reference.rounded(np.array([value]), np.dtype(bfloat16))
    assert result.dtype == bfloat16
    np.testing.assert_array_equal(result.astype(np.float64), [expected])


def test_rounds_once_to_float16():
    values = np.array([1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-40, 65519.99999999, 65520.0])
    result = reference.rounded(values, np.dtype(np.float16))
    np.testing.assert_array_equal(result.astype(np.float64), [1, 1 + 2.0**-10, 65504, np.inf])
