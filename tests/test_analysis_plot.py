"""The pictures of `analysis.plot`: what is drawn, read back from matplotlib."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from dcnlib.analysis import SamplingLocations, offset_statistics, plot


@pytest.fixture
def ax():
    return Figure().subplots()


class TestImage:
    @pytest.mark.parametrize(
        "shape", [(4, 5), (1, 4, 5), (1, 1, 4, 5), (3, 4, 5), (4, 5, 3), (8, 4, 5)]
    )
    def test_shapes(self, ax, shape):
        image = np.random.default_rng(0).normal(size=shape)
        shown = plot.draw_image(ax, image).get_array()
        assert shown.shape == (4, 5, 3)
        if 3 not in shape and 8 not in shape:
            values = image.reshape(4, 5)
            expected = (values - values.min()) / np.ptp(values)
            np.testing.assert_allclose(shown[..., 0], expected, atol=1e-12)
        assert (shown.min(), shown.max()) == (0, 1) or 8 in shape

    def test_fade(self, ax):
        shown = plot.draw_image(ax, np.array([[0.0, 10.0]]), fade=0.75).get_array()
        np.testing.assert_array_equal(shown[0, :, 0], [0.75, 1])

    def test_tensor(self, ax):
        torch = pytest.importorskip("torch")
        image = torch.arange(12.0, requires_grad=True).reshape(1, 3, 4)
        assert plot.draw_image(ax, image).get_array()[2, 3, 0] == 1

    def test_picture_with_opacity(self, ax):
        """As files in PNG often are; the fourth channel is not shown."""
        picture = np.random.default_rng(0).integers(0, 255, (7, 5, 4), np.uint8)
        picture[..., :2] = 0, 255  # the range
        shown = plot.draw_image(ax, picture).get_array()
        np.testing.assert_allclose(shown, picture[..., :3] / 255)

    def test_lists(self, ax):
        assert plot.draw_image(ax, [[0, 1, 2]]).get_array().shape == (1, 3, 3)

    @pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), (0, 4)])
    def test_errors(self, ax, shape):
        with pytest.raises(ValueError, match=r"^draw_image: image: unknown shape"):
            plot.draw_image(ax, np.zeros(shape))


class TestLocations:
    def test_dots(self, ax):
        """(x, y), the heaviest last, none where the weight is 0, opacity by weight."""
        at = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        dots = plot.draw_locations(ax, SamplingLocations(at, np.array([2.0, 0.0, 1.0])))
        np.testing.assert_array_equal(dots.get_offsets(), [[6, 5], [2, 1]])
        np.testing.assert_allclose(dots.get_alpha(), [0.55, 1])

    def test_without_weight(self, ax):
        dots = plot.draw_locations(ax, np.zeros((2, 3, 2)))
        assert len(dots.get_offsets()) == 6
        assert (dots.get_alpha() == 1).all()

    def test_nothing_to_draw(self, ax):
        assert len(plot.draw_locations(ax, np.zeros((3, 2)), np.zeros(3)).get_offsets()) == 0

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ((np.zeros((3, 2)), np.ones(2)), ValueError, "weight: one for each location"),
            ((np.zeros((4, 3)),), ValueError, r"locations: unknown shape; .* got \(4, 3\)"),
            ((object(),), TypeError, "locations: unknown kind; .* got object"),
        ],
    )
    def test_errors(self, ax, arguments, error, text):
        with pytest.raises(error, match=f"^draw_locations: {text}"):
            plot.draw_locations(ax, *arguments)


def test_receptive_field(ax):
    veil = plot.draw_receptive_field(ax, np.array([[0.0, 1.0, 4.0]]), colour="red")
    np.testing.assert_allclose(veil.get_array()[0, :, 3], [0, 0.5, 1])
    np.testing.assert_array_equal(veil.get_array()[0, 0, :3], [1, 0, 0])
    assert (plot.draw_receptive_field(ax, np.zeros((2, 2))).get_array()[..., 3] == 0).all()
    assert plot.draw_receptive_field(ax, np.ones((1, 2, 3))).get_array().shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"^draw_receptive_field: magnitude: must be of one image"):
        plot.draw_receptive_field(ax, np.ones((2, 2, 3)))


def test_saliency(ax):
    """The pixels outside are faded; the outline runs around those inside."""
    image = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    mask = np.array([[True, True, False], [False, False, False]])
    shown, outline = plot.draw_saliency(ax, image, mask, fade=0.5)
    np.testing.assert_array_equal(shown.get_array()[..., 0], [[0, 1, 0.5], [0.5, 1, 0.5]])
    sides = {tuple(map(tuple, segment)) for segment in np.array(outline.get_segments()).tolist()}
    assert sides == {
        ((-0.5, -0.5), (0.5, -0.5)), ((0.5, -0.5), (1.5, -0.5)),
        ((-0.5, 0.5), (0.5, 0.5)), ((0.5, 0.5), (1.5, 0.5)),
        ((-0.5, -0.5), (-0.5, 0.5)), ((1.5, -0.5), (1.5, 0.5)),
    }  # fmt: skip


def test_saliency_of_another_image(ax):
    with pytest.raises(ValueError, match=r"^draw_saliency: mask: must fit the image; .*\(2, 3\)"):
        plot.draw_saliency(ax, np.zeros((2, 3)), np.ones((3, 2), bool))


def test_statistics(ax):
    offset = np.zeros((2, 9, 2, 5, 5))
    offset[:, :, 0] = np.arange(9)[:, None, None]
    rows = offset_statistics(offset.reshape(2, 18, 5, 5)) * 2
    lines = plot.draw_statistics(ax, rows)
    spans = [[(0, 0), (8, 0)], [(0, 1), (8, 1)], [(2, 0), (6, 0)], [(2, 1), (6, 1)]]
    np.testing.assert_array_equal(lines.get_segments(), spans)
    (dots,) = [c for c in ax.collections if c is not lines]
    np.testing.assert_array_equal(dots.get_offsets(), [[4, 0], [4, 1]])
    assert ax.get_xlim()[1] > 8
    assert ax.get_ylim() == (1.5, -0.5)  # the first layer on top
