"""`dcnlib.testing` itself: assertions that fail when they should, data that is what it says."""

import subprocess
import sys

import numpy as np
import pytest

import isolated
from dcnlib import testing
from dcnlib.testing import OUTPUTS, PROBLEMS, TOLERANCES, UNIT_ROUNDOFF, Geometry

DTYPES = ("float32", "float64", "float16", "bfloat16")
SEEDS = range(300)


@pytest.fixture(scope="module")
def geometries():
    return [testing.random_geometry(np.random.default_rng(seed)) for seed in range(2000)]


def results(dtype="float32", name="plain"):
    return testing.real(PROBLEMS[name], 0).astype(dtype).run("reference")


# ---- assertions --------------------------------------------------------------------------------


def test_equal_accepts_what_is_equal():
    exact = results("float64")
    testing.assert_equal(exact, exact)
    rounded = {k: testing.rounded(v, np.dtype("float16")) for k, v in exact.items()}
    testing.assert_equal(rounded, exact)
    special = {"output": np.array([np.nan, np.inf, -0.0])}
    testing.assert_equal(special, {"output": np.array([np.nan, np.inf, 0.0])})


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_sees_one_bit(dtype, output):
    """The last bit of one element of one output."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    exact = results("float64")
    actual = {k: testing.rounded(v, testing.numpy_dtype(dtype)) for k, v in exact.items()}
    flat = actual[output].reshape(-1)
    bits = flat.view(f"u{flat.itemsize}")
    bits[7 % len(bits)] ^= bits.dtype.type(1)
    with pytest.raises(AssertionError, match=rf"^{output} {dtype}: 1 of \d+ differ, .*; a note$"):
        testing.assert_equal(actual, exact, "a note")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.array([np.nan]), np.array([1.0])),
        (np.array([np.inf]), np.array([1.0])),
        (np.array([1.0, 2.0]), np.array([1.0])),
        (np.array([[1.0]]), np.array([1.0])),
        (np.array([1.0]), None),
        (None, np.array([1.0])),
    ],
    ids=["nan", "inf", "size", "rank", "no_none", "none"],
)
@pytest.mark.parametrize("check", [testing.assert_equal, testing.assert_close])
def test_differences_are_seen(check, actual, expected):
    arguments = () if check is testing.assert_equal else ("float64",)
    with pytest.raises(AssertionError):
        check({"output": actual}, {"output": expected}, *arguments)


@pytest.mark.parametrize("check", ["assert_equal(a, b)", "assert_close(a, b, 'float32')"])
def test_differences_are_seen_without_asserts(check):
    code = f"""
from dcnlib.testing import *
import numpy as np
a, b = {{"output": np.ones(2)}}, {{"output": np.zeros(2)}}
try: {check}
except AssertionError: print("seen")
"""
    command = [sys.executable, "-O", "-c", code]
    done = subprocess.run(command, env=isolated.environment(), capture_output=True, text=True)
    assert done.stdout == "seen\n", done.stderr


def test_missing_outputs_are_seen():
    exact = results()
    for check in (testing.assert_equal, lambda *a: testing.assert_close(*a, "float32")):
        with pytest.raises(AssertionError):
            check({k: v for k, v in exact.items() if k != "grad_mask"}, exact)
        with pytest.raises(AssertionError):
            check(exact | {"grad_mask": None}, exact)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_close_is_as_close_as_the_table(dtype, output):
    """An error a little below the limit passes, one a little above does not."""
    exact = {k: np.linspace(0.1, 1, 1000) for k in OUTPUTS}
    limit = TOLERANCES[dtype][output] * UNIT_ROUNDOFF[dtype]
    for factor, passes in ((0.95, True), (1.05, False)):
        wrong = exact[output].astype(np.longdouble)
        wrong[500] += factor * limit
        actual = exact | {output: wrong.astype(np.float64)}
        if dtype == "float64":  # its limits need more digits than it has
            actual[output], exact[output] = wrong, exact[output].astype(np.longdouble)
        if passes:
            testing.assert_close(actual, exact, dtype)
        else:
            with pytest.raises(AssertionError, match=f"^{output} {dtype}: .* u > .* u; $"):
                testing.assert_close(actual, exact, dtype)


def test_close_limits_the_mean_too():
    """Everything off by three quarters of what one element may be."""
    exact = {k: np.ones(1000) for k in OUTPUTS}
    limit = TOLERANCES["float32"]["output"] * UNIT_ROUNDOFF["float32"]
    actual = exact | {"output": exact["output"] * (1 + 0.75 * limit)}
    with pytest.raises(AssertionError, match="rms"):
        testing.assert_close(actual, exact, "float32")


def test_errors_in_units():
    exact = np.array([0.5, 2.0, -1.0])
    largest, rms = testing.errors([0.5, 2.0, -1.0 + 2.0**-23], exact, "float32")
    assert largest == pytest.approx(1.0)  # 2u over a largest value of 2
    assert rms == pytest.approx(2 / np.sqrt(0.25 + 4 + 1))
    assert testing.errors(np.zeros(3), np.zeros(3), "float32") == (0, 0)
    assert testing.errors(np.ones(3), np.zeros(3), "float32") == (np.inf, np.inf)
    assert testing.errors(np.zeros((0, 2)), np.zeros((0, 2)), "float32") == (0, 0)


def test_units():
    for dtype in ("float64", "float32", "float16"):
        assert UNIT_ROUNDOFF[dtype] == np.finfo(dtype).eps / 2
    assert set(TOLERANCES) == set(UNIT_ROUNDOFF) == set(DTYPES)
    assert all(set(limits) == set(OUTPUTS) for limits in TOLERANCES.values())


# ---- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_lattice_is_exact_in_every_dtype(name):
    """The same numbers after a round trip through any of the four."""
    call = testing.lattice(PROBLEMS[name], 0)
    for dtype in DTYPES:
        if dtype == "bfloat16":
            pytest.importorskip("ml_dtypes")
        there_and_back = call.astype(dtype).astype("float64")
        for one, other in zip(there_and_back[:6], call[:6], strict=True):
            assert one is other is None or (one == other).all()


def test_lattice_meets_every_kind_of_position():
    """Whole and fractional, exactly at -1 and at the far border, inside a border cell, far away."""
    geometry = Geometry(2, 4, 9, 9, 2, (3, 3), (1, 1), (1, 1, 1, 1))
    offset = testing.lattice(geometry, 0).offset.reshape(2, 9, 2, 9, 9)
    i, j = np.divmod(np.arange(9), 3)
    base_y = (i - 1)[:, None, None] + np.arange(9)[:, None]
    y = offset[:, :, 0] + base_y
    x = offset[:, :, 1] + (j - 1)[:, None, None] + np.arange(9)
    for positions in (y, x):
        for kind in (
            positions == -1,
            positions == 9,
            (-1 < positions) & (positions < 0),
            (8 < positions) & (positions < 9),
            np.abs(positions) > 90,
            (positions % 1 == 0) & (0 < positions) & (positions < 8),
            (positions % 1 != 0) & (0 < positions) & (positions < 8),
        ):
            assert kind.mean() > 0.01


@pytest.mark.parametrize("seed", range(40))
def test_is_exact_bounds_the_sums(seed):
    """Whatever order: sums of absolute values, in units of the last digit, fit into 24 bits."""
    call = testing.random_lattice(seed)
    assert testing.is_exact(call)
    absolute = call.map(np.abs)._replace(offset=call.offset).run("reference")
    for name in ("output", "grad_input", "grad_weight", "grad_mask", "grad_bias"):
        if absolute[name] is not None and absolute[name].size:
            assert absolute[name].max() * 2**9 < 2**24
    grads = call.run("reference")
    for array in grads.values():
        if array is not None:
            assert (array * 2**9 == np.rint(array * 2**9)).all()


def test_is_exact_refuses_large_sums():
    """Where float32 would round."""
    geometry = Geometry(1, 2, 130, 130, 2, (1, 1))
    assert not testing.is_exact(testing.lattice(geometry, 0))
    call = testing.lattice(PROBLEMS["plain"], 0)
    assert testing.is_exact(call)
    assert not testing.is_exact(call._replace(input=2.0**12 * call.input))
    assert not testing.is_exact(call._replace(grad_output=2.0**12 * call.grad_output))
    assert not testing.is_exact(call._replace(weight=2.0**12 * call.weight))


def test_random_lattice_is_worth_testing():
    for seed in SEEDS:
        call = testing.random_lattice(seed)
        output = call.forward("reference")
        assert output.size == 0 or np.count_nonzero(output) >= 0.4 * output.size


def test_random_lattice_repeats():
    for one, other in zip(testing.random_lattice(3), testing.random_lattice(3), strict=True):
        np.testing.assert_array_equal(one, other)


def test_random_geometries_cover_everything(geometries):
    """Every feature alone and the combinations that have gone wrong elsewhere."""
    features = {
        "empty batch": lambda g: g.batch == 0,
        "several images": lambda g: g.batch > 1,
        "height is not width": lambda g: g.in_h != g.in_w,
        "anisotropic kernel": lambda g: g.kernel[0] != g.kernel[1],
        "anisotropic stride": lambda g: g.stride[0] != g.stride[1],
        "anisotropic dilation": lambda g: g.dilation[0] != g.dilation[1],
        "uneven padding": lambda g: len(set(g.padding)) > 2,
        "groups": lambda g: g.groups > 1,
        "offset groups": lambda g: g.offset_groups > 1,
        "groups across offset groups": lambda g: (
            g.groups > 1 and g.offset_groups > 1 and g.groups % g.offset_groups
            and g.offset_groups % g.groups
        ),
        "depthwise": lambda g: g.groups == g.in_channels > 1,
        "no mask": lambda g: not g.mask,
        "no bias": lambda g: not g.bias,
        "1x1": lambda g: g.kernel == (1, 1),
        "one output": lambda g: g.out_h * g.out_w == 1,
        "unused rows": lambda g: (g.in_h + sum(g.padding[:2]) - 1) % g.stride[0],
    }  # fmt: skip
    for name, has in features.items():
        assert sum(bool(has(g)) for g in geometries) >= 20, name


def test_geometry_sizes(geometries):
    """Output sizes as the library computes them."""
    for geometry in geometries[:200]:
        problem = testing.lattice(geometry, 0).problem()
        assert (problem.out_h, problem.out_w) == (geometry.out_h, geometry.out_w)
        assert problem.taps == geometry.taps


@pytest.mark.parametrize("name", PROBLEMS)
def test_named_problems(name):
    geometry = PROBLEMS[name]
    for call in (testing.lattice(geometry, 0), testing.real(geometry, 0)):
        problem = call.problem()
        assert problem.has_mask == geometry.mask and problem.has_bias == geometry.bias
        assert call.grad_output.shape == problem.output_shape
        assert all(a is None or a.dtype == np.float64 for a in call[:6])


# ---- calls -------------------------------------------------------------------------------------


def test_map_and_astype():
    call = testing.lattice(PROBLEMS["v1"], 0)
    assert call.bias is None and call.map(np.negative).bias is None
    assert (call.map(np.negative).input == -call.input).all()
    assert call.astype("float16").offset.dtype == np.float16
    assert call.astype("float16")[6:] == call[6:]


def test_run_names_everything():
    call = testing.lattice(PROBLEMS["plain"], 0)
    run = call.run("reference")
    assert tuple(run) == OUTPUTS
    np.testing.assert_array_equal(run["output"], call.forward("reference"))
    for name, grad in call.backward("reference")._asdict().items():
        np.testing.assert_array_equal(run[f"grad_{name}"], grad)


def test_isas():
    isas = testing.cpu_isas()
    assert "baseline" in isas
    assert isas == [isa for isa in ("scalar", "baseline", "avx2", "avx512", "amx") if isa in isas]


def test_dtypes_by_name():
    assert testing.numpy_dtype("float16") == np.float16
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert testing.numpy_dtype("bfloat16") == ml_dtypes.bfloat16
