"""`tests/test_values.py` once more, through the emulated CUDA kernels: the same rules, the same bits.

Its problems have channel counts of every kind, which the planar kernels take; those for the rows
kernels come after them.
"""

import numpy as np
import pytest

import test_values
from dcnlib.backends import cuda
from test_values import (  # noqa: F401  (collected here, with this file's fixtures)
    dtype,
    test_all_offsets_nan,
    test_border_positions,
    test_empty_batch,
    test_half_precision_sums_are_wide,
    test_infinite_and_huge_offsets,
    test_infinite_pixel_next_to_whole_positions,
    test_nan_offset,
    test_one_element_not_finite,
    test_one_step_around_the_border,
    test_outside_samples_have_no_gradient,
    test_results_too_large_are_infinite,
    test_scattered_not_finite,
    test_subnormals_are_kept,
)

_plan = pytest.importorskip("dcnlib.backends.cuda._plan", reason="a wheel without the CUDA part")

DTYPES = ("float32", "float64", "float16", "bfloat16")
ROWS = "channels_64"


@pytest.fixture
def backend(emulation):
    """The backend by name."""
    return "cuda"


@pytest.fixture(autouse=True)
def in_every_dtype(emulation, monkeypatch):
    """What `test_values` does on every instruction set, done by the emulation."""

    def check(call, note):
        expected = call.run("reference")
        for dtype in DTYPES:  # noqa: F402
            actual = call.astype(dtype).run("cuda")
            test_values.assert_same_finite(actual, expected, f"{dtype}: {note}")

    monkeypatch.setattr(test_values, "on_every_isa", check)


def test_rows_take_them(dtype):  # noqa: F811
    problem = test_values.lattice(ROWS).astype(dtype).problem()
    assert _plan.plan(problem, cuda.Settings()).rows


@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_rows_infinite_and_huge_offsets(axis, dtype, backend):  # noqa: F811
    test_infinite_and_huge_offsets(ROWS, axis, dtype, backend)


@pytest.mark.parametrize("mask_is_zero", [False, True], ids=["mask", "mask_0"])
def test_rows_nan_offset(mask_is_zero, dtype, backend, monkeypatch):  # noqa: F811
    monkeypatch.setattr(test_values, "NAMES", [ROWS])
    test_nan_offset("both", mask_is_zero, dtype, backend)


def test_rows_all_offsets_nan(dtype, backend):  # noqa: F811
    test_all_offsets_nan(ROWS, dtype, backend)


@pytest.mark.parametrize("tensor", ["input", "weight", "bias", "mask", "grad_output"])
def test_rows_one_element_not_finite(tensor):
    test_one_element_not_finite(ROWS, tensor)


@pytest.mark.parametrize("tensor", ["input", "offset", "weight", "mask", "grad_output"])
def test_rows_scattered_not_finite(tensor):
    test_scattered_not_finite(ROWS, tensor)


def test_samples_beyond_float16(backend):
    """A float16 sample of up to twice the largest number is held by two pieces."""
    call = test_values.identity(np.full((2, 3), 60000.0), "float16")
    call = call._replace(
        mask=np.full((1, 1, 2, 3), 2, np.float16), weight=np.full((1, 1, 1, 1), 0.25, np.float16)
    )
    np.testing.assert_array_equal(call.forward(backend), np.full((1, 1, 2, 3), 30000.0))
