"""The exact lattice: no rounding anywhere, so no tolerance either.

Integer data with offsets and masks in eighths keep every product and every partial sum exact in
float32. Output and five gradients must then equal the float64 reference to the last bit, in any
order of sums: float32 and float64 as they are, the 16-bit types after one rounding. A failure
prints the call that repeats it.

`torch_ops/test_lattice_torch.py` does the same through torch.
"""

from functools import cache

import pytest

import dcnlib
from dcnlib import testing
from dcnlib.testing import PROBLEMS

CONFIGURATIONS = 2000
PER_TEST = 50
SMALL = (2, 2, 1)  # amplitudes that keep the longest sums of PROBLEMS exact


@cache
def dtypes():
    """All four, without bfloat16 where ml_dtypes is missing (`test_bfloat16_takes_part`)."""
    try:
        testing.numpy_dtype("bfloat16")
    except ImportError:
        return ["float32", "float64", "float16"]
    return ["float32", "float64", "float16", "bfloat16"]


def check(call, repeat):
    """Every dtype on every instruction set against one run of the reference."""
    assert testing.is_exact(call), repeat
    expected = call.run("reference")
    for dtype in dtypes():
        typed = call.astype(dtype)
        for isa in testing.cpu_isas():
            with dcnlib.cpu_isa(isa):
                testing.assert_equal(typed.run("cpu"), expected, f"{isa}, {repeat}")


@pytest.mark.parametrize("first", range(0, CONFIGURATIONS, PER_TEST))
def test_random_configurations(first):
    for seed in range(first, first + PER_TEST):
        check(testing.random_lattice(seed), f"testing.random_lattice({seed})")


@pytest.mark.parametrize("name", PROBLEMS)
def test_named_problem(name):
    """Sizes at the edges of vectors, tiles and channel blocks."""
    call = testing.lattice(PROBLEMS[name], 1, SMALL)
    check(call, f"testing.lattice(testing.PROBLEMS[{name!r}], 1, {SMALL})")


@pytest.mark.parametrize(
    ("channels", "groups", "offset_groups"),
    [(c, 1, 1) for c in (2, 7, 8, 9, 15, 16, 31, 63, 65, 127, 129)]
    + [(24, 2, 3), (34, 2, 1), (34, 1, 2), (68, 2, 4), (68, 4, 2), (130, 130, 1), (130, 130, 10)]
    + [(132, 2, 3), (132, 3, 2), (136, 1, 2), (260, 2, 1)],
)
def test_channel_blocks(channels, groups, offset_groups):
    """Channel counts around every vector and block, with groups that cut them."""
    out_channels = groups * (1 if groups > 4 else 5)
    geometry = testing.Geometry(
        2, channels, 4, 6, out_channels, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups, offset_groups
    )
    call = testing.lattice(geometry, 2, (2, 1, 1))
    check(call, f"testing.lattice({geometry}, 2, (2, 1, 1))")


@pytest.mark.parametrize(
    "out_channels", [1, 2, 5, 6, 7, 11, 13, 15, 16, 17, 31, 33, 47, 48, 49, 97]
)
def test_output_channel_blocks(out_channels):
    geometry = testing.Geometry(1, 5, 4, 7, out_channels, (3, 2), (1, 1), (1, 1, 1, 1))
    check(testing.lattice(geometry, 3, (4, 2, 2)), f"testing.lattice({geometry}, 3, (4, 2, 2))")


@pytest.mark.parametrize(
    "out_w", [*range(1, 18), 31, 32, 33, 55, 56, 57, 111, 112, 113, 223, 224, 225]
)
def test_widths(out_w):
    """Output widths around every tile, in one row and in five."""
    for out_h in (1, 5):
        geometry = testing.Geometry(2, 3, out_h, out_w, 2, (3, 3), (1, 1), (1, 1, 1, 1))
        call = testing.lattice(geometry, 4, (2, 2, 1))
        check(call, f"testing.lattice({geometry}, 4, (2, 2, 1))")


@pytest.mark.parametrize(
    ("kernel", "channels", "groups"),
    [
        ((1, 1), 70, 1),
        ((1, 1), 64, 64),
        ((7, 7), 20, 1),
        ((7, 7), 16, 16),
        ((1, 11), 9, 3),
        ((9, 8), 4, 1),
    ],
)
def test_kernel_chunks(kernel, channels, groups):
    """Kernels that do not fit into one chunk of taps, and the smallest one."""
    geometry = testing.Geometry(
        1, channels, 12, 13, channels, kernel, (2, 1), (3, 2, 3, 3), (1, 1), groups, 1
    )
    call = testing.lattice(geometry, 5, (2, 1, 1))
    check(call, f"testing.lattice({geometry}, 5, (2, 1, 1))")


@pytest.mark.parametrize(("channels", "out_channels", "groups"), [(130, 260, 1), (132, 520, 2)])
def test_many_weights(channels, out_channels, groups):
    """More than a megabyte of weights for one tile: packed where they are multiplied."""
    geometry = testing.Geometry(
        1, channels, 5, 7, out_channels, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups, 1
    )
    call = testing.lattice(geometry, 7, (1, 1, 1))
    check(call, f"testing.lattice({geometry}, 7, (1, 1, 1))")


@pytest.mark.parametrize("side", [90, 127])
def test_many_pixels(side):
    """Gradients of the weight that are summed over many tiles."""
    geometry = testing.Geometry(2, 4, side, side + 5, 3, (3, 3), (1, 1), (1, 1, 1, 1))
    call = testing.lattice(geometry, 6, (1, 1, 1))
    check(call, f"testing.lattice({geometry}, 6, (1, 1, 1))")


def test_enough_configurations():
    """No configuration is lost, and nearly all have a batch to compute on."""
    assert CONFIGURATIONS >= 2000 and CONFIGURATIONS % PER_TEST == 0
    batches = [len(testing.random_lattice(seed).input) for seed in range(200)]
    assert 0 < batches.count(0) < 20


def test_bfloat16_takes_part():
    pytest.importorskip("ml_dtypes")
    assert "bfloat16" in dtypes()
