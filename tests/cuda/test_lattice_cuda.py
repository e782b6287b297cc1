"""The exact lattice through the emulated CUDA kernels: every bit equals the reference's.

Half of the configurations are the CPU's own random ones, half have channels that the rows kernels
take. Layout, kernels, workspace, deterministic sums, schedule and the cap of the grid change from one
configuration to the next, so that each meets every other.
"""

import numpy as np
import pytest

from dcnlib import testing
from dcnlib.testing import PROBLEMS, Geometry

DTYPES = ("float32", "float64", "float16", "bfloat16")
CONFIGURATIONS = 512
PER_TEST = 32
SCHEDULES = ("round", "up", "down", "random", "preempt")


def rows_lattice(seed):
    """A random call whose channels come in 16 bytes, whatever the dtype."""
    rng = np.random.default_rng([seed, 1])
    geometry = testing.random_geometry(rng)
    groups, offset_groups = int(rng.choice([1, 1, 2])), int(rng.choice([1, 1, 2, 3]))
    channels = 8 * int(np.lcm(groups, offset_groups)) * int(rng.integers(1, 3))
    kernel = tuple(min(k, 3) for k in geometry.kernel)
    padding = tuple(min(p, 2) for p in geometry.padding)
    geometry = geometry._replace(
        in_channels=channels,
        out_channels=groups * int(rng.integers(1, 4)),
        groups=groups,
        offset_groups=offset_groups,
        kernel=kernel,
        padding=padding,
        in_h=max(geometry.in_h, geometry.dilation[0] * (kernel[0] - 1) + 1),
        in_w=max(geometry.in_w, geometry.dilation[1] * (kernel[1] - 1) + 1),
    )
    return testing.lattice(geometry, rng, (4, 2, 2))


def variant(seed):
    """How configuration `seed` runs."""
    return {
        "channels_last": bool(seed // 2 % 2),
        "deterministic": bool(seed // 4 % 2),
        "kernels": "planar" if seed % 32 in (9, 25) else "auto",
        "workspace": (64 << 20, 0, 20_000, 3000)[seed // 8 % 4],
        "blocks": (0, 1, 3)[seed % 3],
    }


@pytest.mark.parametrize("first", range(0, CONFIGURATIONS, PER_TEST))
def test_random_configurations(emulation, first):
    for seed in range(first, first + PER_TEST):
        call = rows_lattice(seed) if seed % 2 else testing.random_lattice(seed)
        assert not seed % 2 or testing.is_exact(call), seed
        expected = call.run("reference")
        emulation.schedule(SCHEDULES[seed % 5], seed)
        how = variant(seed)
        for dtype in DTYPES:
            actual = emulation.run(call, dtype, **how)
            assert_bitwise(actual, expected, dtype, f"seed {seed}, {how}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_named_problem(emulation, name, channels_last):
    call = testing.lattice(PROBLEMS[name], 1, (2, 2, 1))
    expected = call.run("reference")
    for dtype in DTYPES[channels_last::2]:
        actual = emulation.run(call, dtype, channels_last=channels_last, workspace=100_000)
        assert_bitwise(actual, expected, dtype, name)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("deterministic", [False, True], ids=["reductions", "sorted"])
def test_every_schedule(emulation, schedule, deterministic):
    """More taps than a table holds, patches over two images, ragged patches, lanes without channels."""
    geometry = Geometry(2, 24, 7, 21, 4, (4, 3), padding=(2, 1, 1, 1), offset_groups=1)
    call = testing.lattice(geometry, 3, (2, 2, 1))
    expected = call.run("reference")
    for seed in range(3):
        emulation.schedule(schedule, seed)
        for dtype in DTYPES:
            actual = emulation.run(
                call, dtype, channels_last=True, deterministic=deterministic, blocks=2
            )
            assert_bitwise(actual, expected, dtype, f"seed {seed}")


def test_rounded_samples_are_exact_where_they_fit(emulation):
    """One 16-bit number a sample: the same bits wherever samples have no more than 8."""
    geometry = Geometry(2, 16, 9, 10, 4, (3, 3), padding=(1, 1, 1, 1))
    call = testing.lattice(geometry, 4, (1, 2, 1))
    call = call._replace(offset=np.rint(2 * call.offset) / 2, mask=np.rint(2 * call.mask) / 2)
    expected = call.run("reference")
    for dtype in ("float16", "bfloat16"):
        actual = emulation.run(call, dtype, samples="rounded")
        assert_bitwise(actual, expected, dtype, "rounded")


def test_enough_configurations():
    """At least 500, in all four dtypes; the rows kernels see half of them."""
    assert CONFIGURATIONS >= 500 and len(DTYPES) == 4


def assert_bitwise(actual, expected, dtype, note):
    """`testing.assert_equal` of values that were rounded to `dtype` and widened again."""
    typed = {
        name: None if array is None else array.astype(testing.numpy_dtype(dtype))
        for name, array in actual.items()
    }
    testing.assert_equal(typed, expected, note)
