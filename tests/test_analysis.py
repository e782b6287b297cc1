"""Analysis without torch: where taps read, against analytic positions and the operator itself."""

import math

import numpy as np
import pytest

import dcnlib
import isolated
from dcnlib.analysis import Layer, offset_statistics, sampling_locations

TAPS = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1).reshape(9, 2)


def matrix(kind):
    turn = math.radians(30)
    return {
        "scale": np.diag([2.0, 0.5]),
        "rotation": np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]),
    }[kind]


def layer(field, mask=None, name="", size=9):
    """A 3 x 3 layer of padding 1 on a map of `size`; `field` (9, 2) or (9, 2, size, size)."""
    field = np.asarray(field, float)
    if field.ndim == 2:
        field = np.broadcast_to(field[..., None, None], (9, 2, size, size))
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask, float), (1, 1, 9, size, size))
    pair = (1, 1)
    return Layer(name, (3, 3), pair, pair, pair, (size,) * 2, (size,) * 2, field[None, None], mask)


def points(seen):
    return sorted(map(tuple, seen.locations.reshape(-1, 2).round(9) + 0.0))


def sums(*rows):
    """All sums of one row of each array, rounded and sorted."""
    total = np.zeros((1, 2))
    for row in rows:
        total = (total[:, None] + row).reshape(-1, 2)
    return sorted(map(tuple, total.round(9) + 0.0))


class TestGrid:
    @pytest.mark.parametrize(
        ("kernel", "stride", "padding", "dilation", "groups"),
        [(3, 1, 1, 1, 1), ((2, 3), (2, 1), (0, 1, 2, 0), (1, 2), 2), (1, 3, 0, 1, 3)],
    )
    def test_zero_offsets(self, kernel, stride, padding, dilation, groups):
        kh, kw = (kernel,) * 2 if isinstance(kernel, int) else kernel
        sh, sw = (stride,) * 2 if isinstance(stride, int) else stride
        dh, dw = (dilation,) * 2 if isinstance(dilation, int) else dilation
        top, left = (padding,) * 2 if isinstance(padding, int) else (padding[0], padding[2])
        offset = np.zeros((2, 2 * groups * kh * kw, 4, 5), np.float32)
        seen = sampling_locations(
            offset, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation
        )
        assert seen.locations.shape == (2, 4, 5, groups * kh * kw, 2)
        for oh, ow, g, i, j in np.ndindex(4, 5, groups, kh, kw):
            expected = (oh * sh - top + i * dh, ow * sw - left + j * dw)
            tap = (g * kh + i) * kw + j
            assert tuple(seen.locations[1, oh, ow, tap]) == expected

    @pytest.mark.parametrize("kind", ["scale", "rotation"])
    def test_affine_field(self, kind):
        """Offsets that turn or stretch the window put its taps at the turned or stretched grid."""
        moved = TAPS @ matrix(kind).T
        offset = np.broadcast_to((moved - TAPS).reshape(18, 1, 1), (18, 9, 9))
        seen = sampling_locations(offset, (4, 3), padding=1)
        np.testing.assert_allclose(seen.locations, moved + np.array([4, 3]), atol=1e-14)
        assert (seen.weight == 1).all()

    def test_is_where_the_operator_reads(self):
        """On an image that holds its own rows or columns, a tap reads its position."""
        rng = np.random.default_rng(0)
        image = np.broadcast_to(np.indices((9, 7)), (2, 2, 9, 7)).astype(float)
        offset, mask = rng.uniform(-1, 1, (2, 18, 4, 3)), rng.random((2, 9, 4, 3))
        seen = sampling_locations(offset, stride=2, mask=mask, in_size=(9, 7))
        for tap in range(9):
            weight = np.zeros((2, 2, 9))
            weight[[0, 1], [0, 1], tap] = 1
            read = dcnlib.deform_conv2d(
                image, offset, weight.reshape(2, 2, 3, 3), stride=2, mask=mask
            )
            where = seen.locations[..., tap, :]
            inner = ((where >= 0) & (where <= np.array([8, 6]))).all(-1)
            expected = where * seen.weight[..., tap, None]
            np.testing.assert_allclose(np.moveaxis(read, 1, -1)[inner], expected[inner], atol=1e-12)
            assert inner.sum() > 12

    def test_unbatched_and_several_positions(self):
        offset = np.random.default_rng(0).normal(size=(18, 5, 6))
        every = sampling_locations(offset, padding=1)
        some = sampling_locations(offset, [(0, 0), (4, 5), (2, 3)], padding=1)
        np.testing.assert_array_equal(some.locations, every.locations[[0, 4, 2], [0, 5, 3]])
        one = sampling_locations(offset[None], (2, 3), padding=1)
        np.testing.assert_array_equal(one.locations[0], some.locations[2])


class TestStack:
    @pytest.mark.parametrize("kind", ["scale", "rotation"])
    def test_composed_affine_fields(self, kind):
        """729 points: a sum of one turned tap of each layer, whatever lies between the units."""
        moved = TAPS @ matrix(kind).T
        seen = sampling_locations([layer(moved - TAPS, size=31)] * 3, (15, 15))
        assert seen.locations.shape == (1, 729, 2)
        assert points(seen) == sums(np.array([[15, 15]]), moved, moved, moved)

    def test_between_units_offsets_are_interpolated(self):
        """A field that is linear in the position stays so between the units."""
        grid = np.stack(np.indices((9, 9))).astype(float)
        linear = np.einsum("ij,jhw->ihw", np.array([[0.1, -0.2], [0.05, 0.15]]), grid)
        field = np.broadcast_to(linear, (9, 2, 9, 9))
        start, shift = np.array([4.0, 4.0]), np.full((9, 2), 0.3)
        seen = sampling_locations([layer(field), layer(shift)], start)
        upper = start + TAPS + 0.3
        a = np.array([[0.1, -0.2], [0.05, 0.15]])
        expected = (upper[:, None] + TAPS + (upper @ a.T)[:, None]).reshape(-1, 2)
        np.testing.assert_allclose(seen.locations[0], expected, atol=1e-13)

    def test_masks_multiply_and_outside_weighs_nothing(self):
        lower, upper = layer(np.zeros((9, 2)), 0.5), layer(np.zeros((9, 2)), 0.25)
        seen = sampling_locations([lower, upper], (0, 0))
        reads = seen.locations[0]
        way_out = np.repeat((TAPS < 0).any(1), 9)  # the unit of the layer in between is outside
        outside = way_out | (reads < 0).any(1)
        np.testing.assert_array_equal(seen.weight[0], np.where(outside, 0, 0.125))
        assert (seen.weight[0] > 0).sum() == 25  # 2 + 3 on each axis

    def test_half_a_pixel_outside_is_read(self):
        """The border rule: -1 < y < H."""
        shift = np.full((9, 2), -0.5)
        weight = sampling_locations(layer(shift), (1, 1)).weight
        assert (weight == 1).all()
        weight = sampling_locations(layer(2 * shift), (1, 1)).weight[0]
        np.testing.assert_array_equal(weight, (TAPS >= 0).all(1))

    @pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
    def test_no_numbers(self, value):
        field = np.zeros((9, 2))
        field[4, 0] = value
        seen = sampling_locations([layer(np.zeros((9, 2))), layer(field)], (4, 4))
        assert (seen.weight[0].reshape(9, 9)[4] == 0).all()
        assert (seen.weight[0] > 0).sum() == 72

    def test_plain_layers(self):
        """Pooling moves to the middle of its window, or to each of its pixels."""
        pool = Layer("pool", (2, 2), (2, 2), (0, 0), (1, 1), (18, 18), (9, 9))
        stack = [pool, layer(np.zeros((9, 2)))]
        middle = sampling_locations(stack, (4, 4))
        assert points(middle) == sums(np.array([[8.5, 8.5]]), 2 * TAPS)
        every = sampling_locations(stack, (4, 4), plain_taps=True)
        corners = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
        assert points(every) == sums(np.array([[8, 8]]), 2 * TAPS, corners)


class TestStatistics:
    def test_scaled_grid(self):
        (row,) = offset_statistics(layer(2 * TAPS, mask=0.25, name="a"))
        assert row.name == "a"
        assert row.effective_dilation == 3
        np.testing.assert_array_equal(row.tap_mean, 2 * TAPS)
        np.testing.assert_array_equal(row.mean, 0)
        np.testing.assert_allclose(row.std, 2 * math.sqrt(2 / 3))
        np.testing.assert_allclose(row.length, [0, 2, 2, math.sqrt(8), math.sqrt(8)])
        assert (row.mask_mean, row.mask_std) == (0.25, 0)

    def test_outside(self):
        """Taps 10 rows up leave a map of 9."""
        (row,) = offset_statistics(layer(np.broadcast_to([-11.0, 0.0], (9, 2))))
        assert row.outside == 1
        (row,) = offset_statistics(layer(np.zeros((9, 2))))
        assert row.outside == pytest.approx(1 - (25 / 27) ** 2)
        assert row.mask_mean is None

    def test_infinite_offsets(self):
        """As they come, and without warnings."""
        (row,) = offset_statistics(np.full((18, 3, 3), np.inf))
        assert row.outside == 1
        assert math.isnan(row.effective_dilation)

    def test_one_tap_has_no_neighbour(self):
        (row,) = offset_statistics(np.ones((2, 3, 3)), kernel_size=1)
        assert math.isnan(row.effective_dilation)
        assert row.length[0] == math.sqrt(2)


ZERO = np.zeros((18, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "text"),
    [
        ((np.zeros((17, 5, 5)),), {}, ValueError, r"offset: must have shape .*multiple of 18"),
        ((np.zeros((5, 5)),), {}, ValueError, r"offset: must have shape .*got \(5, 5\)"),
        (([[0.0]],), {}, TypeError, r"layer_or_offset: unknown kind; expected an offset"),
        (([],), {}, ValueError, r"layer_or_offset: needs a deformable layer"),
        ((ZERO, (5, 0)), {}, ValueError, r"position: must lie on the output map; .*\[0, 4\]"),
        ((ZERO, (np.nan, 0)), {}, ValueError, r"position: must lie on the output map"),
        ((ZERO, (1, 2, 3)), {}, ValueError, r"position: unknown shape"),
        ((ZERO, "centre"), {}, TypeError, r"position: must be numbers"),
        ((ZERO,), {"stride": 0}, ValueError, r"stride: must be in \[1, "),
        ((ZERO,), {"mask": np.zeros((8, 5, 5))}, ValueError, r"mask: must fit the offset"),
        ((ZERO,), {"mask": 1.0}, TypeError, r"mask: unknown kind"),
        ((ZERO,), {"in_size": 5}, ValueError, r"in_size: must be a pair"),
        ((ZERO,), {"in_size": (5, 5)}, ValueError, r"in_size: must give an output .*7 x 7, got \(5, 5\)"),
        (
            (ZERO,), {"in_size": (10, 12), "stride": 2}, ValueError,
            r"in_size: must give an output .*\[11, 12\] x \[11, 12\], got",
        ),
        ((ZERO + 1j,), {}, TypeError, r"offset: must be real numbers"),
        ((ZERO,), {"input": ZERO}, ValueError, r"input: goes with a module"),
        (([layer(np.zeros((9, 2)))],), {"mask": ZERO}, ValueError, r"mask: goes with an offset"),
        (
            ([layer(np.zeros((9, 2)), name="a"), layer(np.zeros((9, 2)), name="b", size=5)],),
            {},
            ValueError,
            r"layers: 'b' does not read what 'a' makes; expected a map of \(9, 9\), got \(5, 5\); "
            "name the layers",
        ),
        (([layer(np.zeros((9, 2)))],), {"layers": ["x"]}, ValueError, r"layers: no such layer"),
        (([layer(np.zeros((9, 2)))],), {"layers": "ab"}, TypeError, r"layers: must be names"),
        (([layer(np.zeros((9, 2)))] * 6,), {}, ValueError, r"position: too many locations"),
    ],
)  # fmt: skip
def test_errors(arguments, keywords, error, text):
    with pytest.raises(error, match="^sampling_locations: " + text):
        sampling_locations(*arguments, **keywords)


def test_neither_torch_nor_matplotlib_is_imported():
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "matplotlib", "tqdm"):
            sys.exit(name + " was asked for")
sys.meta_path.insert(0, Finder())
import numpy as np
from dcnlib import analysis
dir(analysis), analysis.__all__
analysis.sampling_locations(np.zeros((18, 5, 5)), (2, 2))
analysis.offset_statistics(np.zeros((18, 5, 5)))
"""
    child = isolated.python(code)
    assert child.returncode == 0, child.stderr
