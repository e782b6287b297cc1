"""How a call is cut: integers only, so sizes may be as large as they like."""

from __future__ import annotations

import numpy as np
import pytest

from dcnlib import testing
from dcnlib._problem import deform_conv2d_problem
from dcnlib.backends import cuda
from dcnlib.testing import Geometry

_plan = pytest.importorskip("dcnlib.backends.cuda._plan", reason="a wheel without the CUDA part")
chunks, plan = _plan.chunks, _plan.plan

MIB = 1 << 20
SIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


def problem(geometry, dtype="float32", channels_last=False):
    """The problem alone, without arrays."""
    g = geometry
    offset = (g.batch, 2 * g.offset_groups * g.taps, g.out_h, g.out_w)
    mask = (g.batch, g.offset_groups * g.taps, g.out_h, g.out_w)
    return deform_conv2d_problem(
        "testing",
        ((g.batch, g.in_channels, g.in_h, g.in_w), dtype),
        (offset, dtype),
        ((g.out_channels, g.in_channels // g.groups, *g.kernel), dtype),
        ((g.out_channels,), dtype),
        (mask, dtype),
        None,
        g.stride,
        g.padding,
        g.dilation,
        g.groups,
        g.offset_groups,
        channels_last,
    )


def bytes_of(cut, p, columns, grad_columns, grad_input, sort):
    """What a call with this cut takes at once, counted here from the description of its buffers."""
    size = SIZE[p.dtype]
    wide = max(size, 4)
    samples = p.in_channels * p.taps
    total = cut.chunk * p.out_channels * wide
    total += cut.chunk * samples * size * cut.pieces * columns
    total += cut.chunk * samples * wide * grad_columns
    image = p.in_channels * p.in_h * p.in_w
    total += cut.wave * image * size * cut.staged
    total += cut.wave * image * wide * (grad_input and not cut.direct)
    if sort:
        total += 4 * cut.chunk * p.offset_groups * p.taps * (3 * (8 if cut.wide else 4) + 16 + wide)
    return total


def test_random_problems_fit_and_are_complete():
    """Every pixel once, in order; never more memory than allowed but for one pixel or image."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        geometry = testing.random_geometry(rng)._replace(batch=int(rng.integers(1, 40)))
        scale = int(rng.choice([1, 8, 32]))
        dtype = str(rng.choice(list(SIZE)))
        p = problem(geometry, dtype)._replace(channels_last=bool(rng.integers(2)))
        p = p._replace(in_channels=p.in_channels * scale)
        settings = cuda.Settings(workspace=int(10 ** rng.uniform(2, 8)))
        wanted = {
            "columns": bool(rng.integers(2)),
            "grad_columns": bool(rng.integers(2)),
            "grad_input": bool(rng.integers(2)),
        }
        wanted["sort"] = wanted["grad_input"] and bool(rng.integers(2))
        cut = plan(p, settings, **wanted)
        seen = 0
        for image, images, pixels in chunks(cut, p):
            assert 1 <= images <= cut.wave
            for first, count in pixels:
                assert first == seen and 1 <= count <= cut.chunk
                assert image * p.out_h * p.out_w <= first
                assert first + count <= (image + images) * p.out_h * p.out_w
                seen += count
        assert seen == p.batch * p.out_h * p.out_w
        if bytes_of(cut, p, **wanted) > settings.workspace:
            assert cut.chunk == 1 or (cut.wave == 1 and SIZE[dtype] == 2 and wanted["grad_input"])


@pytest.mark.parametrize("dtype", SIZE)
def test_one_huge_image_fits(dtype):
    """4096 x 4096 pixels of 64 channels in 64 MiB, forward and backward."""
    p = problem(Geometry(1, 64, 4096, 4096, 64, (3, 3), padding=(1, 1, 1, 1)), dtype)
    cut = plan(p, cuda.Settings())
    assert not cut.staged and cut.chunk >= 4096
    assert bytes_of(cut, p, True, False, False, False) <= 64 * MIB
    cut = plan(p, cuda.Settings(), grad_columns=True, grad_input=True)
    sums = 0 if cut.direct else 64 * 4096 * 4096 * 4
    assert cut.direct == (SIZE[dtype] >= 4)
    assert bytes_of(cut, p, True, True, True, False) <= 64 * MIB + sums


def test_sizes_beyond_32_bits():
    """Products of sizes are Python's integers; the keys of the sort then have 64 bits."""
    p = problem(Geometry(1, 8, 3, 3, 4, (3, 3), padding=(1, 1, 1, 1)), channels_last=True)
    p = p._replace(in_h=2**20, in_w=2**20, out_h=2**20, out_w=2**20)
    cut = plan(p, cuda.Settings(), grad_columns=True, grad_input=True, sort=True)
    assert cut.wide and cut.direct and 1 <= cut.chunk < 2**20
    small = plan(p._replace(in_h=2**10), cuda.Settings(), grad_input=True, sort=True)
    assert not small.wide


@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "offset_groups", "rows"),
    [
        ("float32", 4, 1, 1, True), ("float32", 6, 1, 1, False), ("float32", 8, 2, 1, True),
        ("float32", 8, 4, 1, False), ("float32", 8, 1, 2, True), ("float64", 6, 1, 1, True),
        ("float16", 8, 1, 1, True), ("float16", 12, 1, 1, False), ("bfloat16", 16, 2, 1, True),
        ("bfloat16", 16, 1, 4, False), ("float32", 8, 8, 1, False),
    ],
)  # fmt: skip
def test_rows_need_16_bytes_of_channels(dtype, channels, groups, offset_groups, rows):
    geometry = Geometry(
        1, channels, 4, 4, groups, (1, 1), groups=groups, offset_groups=offset_groups
    )
    for channels_last in (False, True):
        p = problem(geometry, dtype, channels_last)
        cut = plan(p, cuda.Settings())
        assert cut.rows == rows and cut.staged == (rows and not channels_last)
        assert not plan(p, cuda.Settings(kernels="planar")).rows
        unaligned = plan(p, cuda.Settings(), aligned=False)
        assert unaligned.staged == rows


def test_chunks_are_whole_rows_and_even():
    """Chunks end with a row where they can, and none is much smaller than the others."""
    p = problem(Geometry(4, 256, 56, 56, 256, (3, 3), padding=(1, 1, 1, 1)), "bfloat16")
    cut = plan(p, cuda.Settings())
    assert cut.chunk % 56 == 0
    sizes = [count for _, _, pixels in chunks(cut, p) for _, count in pixels]
    assert max(sizes) - min(sizes) <= 56 * len(sizes)


def test_settings_are_checked():
    assert cuda.Settings().workspace == 64 * MIB
    for wrong, error in (
        ({"kernels": "fast"}, ValueError),
        ({"samples": "half"}, ValueError),
        ({"workspace": -1}, ValueError),
        ({"blocks": 1.5}, TypeError),
        ({"blocks": -1}, ValueError),
    ):
        name = next(iter(wrong))
        with pytest.raises(error, match=f"^dcnlib.backends.cuda: {name}: "), cuda.settings(**wrong):
            pass
    with cuda.settings(workspace=5):
        assert cuda._settings.current().workspace == 5
    assert cuda._settings.current().workspace == 64 * MIB
