"""Analysis of torch models: recording, gradients and saliency, against autograd and known answers."""

import itertools
import math

import numpy as np
import pytest

import dcnlib

torch = pytest.importorskip("torch")

from dcnlib import analysis  # noqa: E402
from dcnlib import nn as dnn  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moving(layer, spread=0.5):
    """A Pack whose predictor is not zero."""
    torch.nn.init.normal_(layer.conv_offset.bias, 0, spread)
    torch.nn.init.normal_(layer.conv_offset.weight, 0, 0.05)
    return layer


def stack():
    """Two deformable layers, v1 and v2, with batch norm, pooling and a plain layer in between."""
    return torch.nn.Sequential(
        moving(dnn.DeformConv2dPack(2, 4, 3, padding=1, deform_groups=2)),
        torch.nn.BatchNorm2d(4),
        torch.nn.Tanh(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 4, 3, padding="same"),
        moving(dnn.ModulatedDeformConv2dPack(4, 3, 3, stride=2, padding=(1, 0, 0, 1))),
    ).double()


def image(n=2):
    return torch.randn(n, 2, 12, 12, dtype=torch.float64)


class Torchvision(torch.nn.Module):
    """torchvision's DeformConv2d as far as analysis can see: the operator and its arguments."""

    def __init__(self):
        super().__init__()
        self.conv_offset = torch.nn.Conv2d(2, 27, 3, stride=2, padding=1)
        self.weight = torch.nn.Parameter(torch.randn(4, 2, 3, 3))

    def forward(self, x):
        offset, mask = self.conv_offset(x).split([18, 9], 1)
        return torch.ops.torchvision.deform_conv2d(
            x, self.weight, offset, mask.sigmoid(), torch.zeros(4),
            2, 2, 1, 1, 1, 1, 1, 1, True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def torchvision_operator():
    """The real one where torchvision is installed, else one with its schema."""
    try:
        import torchvision  # noqa: F401

        yield
        return
    except ModuleNotFoundError:
        library = torch.library.Library("torchvision", "DEF")
    library.define(
        "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
        "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
        "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
    )

    def forward(x, weight, offset, mask, bias, sh, sw, ph, pw, dh, dw, groups, offset_groups, use):
        return dcnlib.deform_conv2d(
            x, offset, weight, bias, (sh, sw), (ph, pw), (dh, dw), mask if use else None
        )

    library.impl("deform_conv2d", forward, "CompositeImplicitAutograd")
    yield
    library._destroy()


class TestRecording:
    def test_chain(self):
        layers = analysis.record_layers(stack(), image())
        assert [layer.name for layer in layers] == ["0", "3", "4", "5"]
        first, pool, plain, last = layers
        assert first.offset.shape == (2, 2, 9, 2, 12, 12)
        assert first.mask is None
        assert (pool.kernel_size, pool.stride, pool.in_size) == ((2, 2), (2, 2), (12, 12))
        assert (plain.padding, plain.offset) == ((1, 1), None)
        assert (last.stride, last.padding, last.out_size) == ((2, 2), (1, 0), (3, 3))
        assert last.mask.shape == (2, 1, 9, 3, 3)

    def test_offsets_are_those_of_the_layer(self):
        model, x = stack(), image()
        first = analysis.record_layers(model, x)[0]
        expected = model.eval()[0].conv_offset(x).reshape(2, 2, 9, 2, 12, 12)
        np.testing.assert_array_equal(first.offset, expected.detach().numpy())

    def test_functions_and_second_calls(self):
        class Model(torch.nn.Module):
            def forward(self, x, offset):
                for _ in range(2):
                    x = dcnlib.deform_conv2d(x, offset, torch.ones(2, 2, 1, 1).double())
                return x

        model = torch.nn.ModuleDict({"twice": Model()})
        model.forward = model["twice"].forward
        x, offset = image(1), torch.zeros(1, 2, 12, 12, dtype=torch.float64)
        assert [la.name for la in analysis.record_layers(model["twice"], (x, offset))] == ["", ":2"]
        (seen, _) = analysis.effective_sampling_locations(model["twice"], (x, offset), (3, 4))
        assert seen.magnitude[0, 0, 0, 3, 4] > 0  # of an offset that is a constant

    def test_operators_with_one_number_for_all_axes(self):
        """As torch takes it for a list."""
        operators = torch.ops.dcnlib

        class Model(torch.nn.Module):
            def forward(self, x, rois):
                y = operators.deform_conv2d(
                    x, x.new_zeros(1, 2, 4, 4), x.new_ones(3, 2, 1, 1), stride=2, padding=1
                )
                return operators.deform_roi_pool(y, rois, None, 2)

        inputs = torch.randn(1, 2, 6, 6), torch.tensor([[0.0, 0, 0, 4, 4]])
        (layer,) = analysis.record_layers(Model(), inputs)
        assert (layer.stride, layer.padding, layer.dilation) == ((2, 2), (1, 1), (1, 1))
        (bins,) = analysis.effective_bin_locations(Model(), inputs, (0, 0))
        assert bins.magnitude.shape == (1, 1, 2, 2)

    def test_torchvision(self, torchvision_operator):
        model, x = Torchvision(), torch.randn(1, 2, 9, 9)
        (layer,) = analysis.record_layers(model, x)  # and not its predictor
        assert (layer.stride, layer.padding, layer.in_size) == ((2, 2), (1, 1), (9, 9))
        predicted = model.conv_offset(x).detach().double().numpy()
        seen = analysis.sampling_locations(model, (2, 3), input=x)
        expected = analysis.sampling_locations(
            predicted[:, :18],
            (2, 3),
            stride=2,
            padding=1,
            mask=1 / (1 + np.exp(-predicted[:, 18:])),
        )
        np.testing.assert_array_equal(seen.locations, expected.locations)
        np.testing.assert_allclose(seen.weight, expected.weight, rtol=1e-6)
        (effective,) = analysis.effective_sampling_locations(model, x, (2, 3))
        assert (effective.magnitude[0, 0, :, 2, 3] > 0).all()

    @pytest.mark.parametrize("boundary", ["border", "zeros"])
    def test_resampling(self, boundary):
        """One tap for each channel; it reads its position, which "border" limits to the image."""

        class Model(torch.nn.Module):
            def forward(self, x, offset):
                return dcnlib.deform_resample2d(x, offset, boundary=boundary)

        rows = torch.arange(6.0, dtype=torch.float64)[:, None].expand(1, 2, 6, 5)
        offset = 4 * torch.randn(1, 4, 6, 5, dtype=torch.float64)
        seen = analysis.sampling_locations(Model(), input=(rows, offset))
        assert seen.locations.shape == (1, 6, 5, 2, 2)
        y, inside = (
            seen.locations[0, ..., 0],
            (seen.weight[0] == 1) & (seen.locations[0] >= 0).all(-1),
        )
        inside &= (seen.locations[0] <= [5, 4]).all(-1)
        assert 0 < inside.sum() <= 60
        assert inside.all() == (boundary == "border")
        read = Model()(rows, offset)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(read[inside], y[inside], atol=1e-12)
        (row,) = analysis.effective_sampling_locations(Model(), (rows, offset), (2, 3))
        assert row.magnitude.shape == (1, 2, 1, 6, 5)

    def test_modules_of_the_resampling_form(self):
        """Its predictor is none of the chain."""
        layers = analysis.record_layers(dnn.ConvOffset2D(2), torch.zeros(1, 2, 6, 5))
        assert [(layer.kernel_size, layer.offset.shape) for layer in layers] == [
            ((1, 1), (1, 2, 1, 2, 6, 5))
        ]

    def test_named_layers(self):
        """Parallel branches are no chain; by their names they can be followed."""

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a = dnn.DeformConv2dPack(2, 2, 3, padding=1)
                self.b = torch.nn.Conv2d(2, 2, 3, stride=2)

            def forward(self, x):
                return self.a(self.a(x)).sum() + self.b(x).sum()

        model, x = Model(), torch.zeros(1, 2, 9, 9)
        seen = analysis.sampling_locations(model, (4, 4), input=x, layers=["a", "a:2"])
        assert seen.locations.shape == (1, 81, 2)
        with pytest.raises(ValueError, match=r"layers: no such layer; expected .*'a:2', 'b'"):
            analysis.sampling_locations(model, input=x, layers=["c"])

    def test_leaves_the_model_alone(self):
        model, x = stack().train(), image()
        model[1].eval()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        analysis.effective_receptive_field(model, x, (1, 1))
        analysis.effective_sampling_locations(model, x, (1, 1))
        analysis.error_bounded_saliency(model, x[:1], (1, 1), steps=1)
        with pytest.raises(ValueError, match="layer: no such module"):
            analysis.effective_receptive_field(model, x, layer="none")
        assert model.training and not model[1].training
        for key, value in model.state_dict().items():
            assert (value == before[key]).all(), key
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not x.requires_grad


class Predicting(torch.nn.Module):
    """A deformable layer as users build it: predictors beside it, their outputs taken apart."""

    def __init__(self, style, stride=1):
        super().__init__()
        self.style, self.stride = style, stride
        self.first = torch.nn.Conv2d(2, 27, 3, stride, 1)
        self.second = torch.nn.Conv2d(27, 27, 1)
        self.weight = torch.nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, x):
        predicted = self.first(x)
        if self.style == "two layers":
            predicted = self.second(predicted.relu())
        y, x_, mask = predicted.chunk(3, 1)
        if self.style == "written in place":
            offset = torch.zeros_like(predicted[:, :18])
            offset[:] = predicted[:, :18]
        else:
            offset = torch.cat([y, x_], 1).clamp(-4, 4)
        mask = mask.sigmoid() if self.style != "no mask" else None
        return dcnlib.deform_conv2d(
            x, offset, self.weight, stride=self.stride, padding=1, mask=mask
        )


class Branches(torch.nn.Module):
    """Two layers of one map, then one of their sum."""

    def __init__(self):
        super().__init__()
        self.narrow = dnn.DeformConv2dPack(2, 2, 3, padding=1)
        self.wide = dnn.DeformConv2dPack(2, 2, 3, padding=2, dilation=2)
        self.last = dnn.DeformConv2dPack(2, 2, 3, padding=1)

    def forward(self, x):
        return self.last(self.narrow(x) + self.wide(input=x)) + x


class TestGraph:
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("style", ["cat", "two layers", "written in place", "no mask"])
    def test_predictors_of_other_code_are_not_followed(self, style, stride):
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1), Predicting(style, stride))
        layers = analysis.record_layers(model, torch.randn(1, 2, 12, 12))
        assert [layer.name for layer in layers] == ["0", "1"]
        seen = analysis.sampling_locations(layers, (2, 3), plain_taps=True)
        assert seen.locations.shape == (1, 81, 2)

    def test_what_layers_read(self):
        narrow, wide, last = analysis.record_layers(Branches(), torch.randn(1, 2, 9, 9))
        assert narrow.reads == wide.reads == frozenset()
        assert {"narrow", "wide"} <= last.reads

    def test_branches_are_no_chain(self):
        model, x = Branches(), torch.randn(1, 2, 9, 9)
        with pytest.raises(ValueError, match="'wide' does not read what 'narrow' makes"):
            analysis.sampling_locations(model, (4, 4), input=x)
        with pytest.raises(ValueError, match="another branch; name the layers"):
            analysis.sampling_locations(analysis.record_layers(model, x), (4, 4))
        seen = analysis.sampling_locations(model, (4, 4), input=x, layers=["wide", "last"])
        np.testing.assert_array_equal(seen.locations[0, 0], [1, 1])
        assert len(analysis.offset_statistics(model, input=x)) == 3

    def test_arguments_by_keyword(self):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.plain = torch.nn.Conv2d(2, 2, 3)
                self.moving = dnn.DeformConv2dPack(2, 2, 3)

            def forward(self, image):
                return self.moving(input=self.plain(input=image))

        layers = analysis.record_layers(Model(), torch.randn(1, 2, 9, 9))
        assert [layer.reads for layer in layers] == [frozenset(), frozenset({"plain"})]

    def test_no_images(self):
        seen = analysis.sampling_locations(stack(), (1, 1), input=image(0))
        assert seen.locations.shape == (0, 162, 2)
        assert seen.weight.shape == (0, 162)

    def test_unknown_ways_are_trusted(self):
        class Detour(torch.nn.Module):
            def forward(self, x):
                return torch.from_numpy(x.numpy().copy())

        model = torch.nn.Sequential(
            dnn.DeformConv2dPack(2, 2, 3), Detour(), dnn.DeformConv2dPack(2, 2, 3)
        )
        x = torch.randn(1, 2, 9, 9)
        assert analysis.record_layers(model, x)[1].reads is None
        assert analysis.sampling_locations(model, (2, 2), input=x).locations.shape == (1, 81, 2)


class TestReceptiveField:
    def ones(self, layers, stride=1):
        model = torch.nn.Sequential(
            *[torch.nn.Conv2d(1, 1, 3, stride, 1, bias=False) for _ in range(layers)]
        )
        for layer in model:
            torch.nn.init.ones_(layer.weight)
        return model.double()

    def test_plain_stack_fills_its_window_symmetrically(self):
        """Three layers of ones: the threefold sum of a window, 7 x 7, and nothing beyond it."""
        x = torch.randn(1, 1, 15, 13, dtype=torch.float64)
        field = analysis.effective_receptive_field(self.ones(3), x, (7, 5)).magnitude[0]
        line = np.convolve(np.convolve([1, 1, 1], [1, 1, 1]), [1, 1, 1])
        expected = np.zeros((15, 13))
        expected[4:11, 2:9] = np.outer(line, line)
        np.testing.assert_array_equal(field, expected)
        window = field[4:11, 2:9]
        for other in (window[::-1], window[:, ::-1], window.T):
            np.testing.assert_array_equal(window, other)

    def test_window_is_that_of_all_sampling_locations(self):
        x = torch.randn(1, 1, 15, 13, dtype=torch.float64)
        model = self.ones(2, stride=2)
        field = analysis.effective_receptive_field(model, x, (1, 2)).magnitude[0]
        seen = analysis.sampling_locations(
            model, (1, 2), input=x, layers=["0", "1"], plain_taps=True
        )
        rows, columns = np.nonzero(field)
        reads = seen.locations[seen.weight > 0]
        assert {*zip(rows, columns, strict=True)} == {(int(y), int(x)) for y, x in reads}

    def test_moves_with_the_offsets(self):
        layer = dnn.DeformConv2dPack(1, 1, 3, padding=1).double()
        x = torch.randn(1, 11, 11, dtype=torch.float64)
        field = analysis.effective_receptive_field(layer, x, (5, 5)).magnitude
        with torch.no_grad():
            layer.conv_offset.bias[0::2] = 2.0
        moved = analysis.effective_receptive_field(layer, x, (5, 5)).magnitude
        np.testing.assert_allclose(moved[6:9, 4:7], field[4:7, 4:7], rtol=1e-12)
        assert np.count_nonzero(moved) == 9

    def test_channels(self):
        """The mean square over channels; random signs have it as expectation."""
        model, x = stack(), image()
        each = [
            analysis.effective_receptive_field(model, x, (1, 1), channel=c).magnitude
            for c in range(3)
        ]
        exact = analysis.effective_receptive_field(model, x, (1, 1)).magnitude
        np.testing.assert_allclose(exact**2, np.mean(np.square(each), 0), rtol=1e-12, atol=1e-18)

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_positions_of_any_kind(self, kind):
        model, x = stack(), image(1)
        expected = analysis.effective_receptive_field(model, x, (1, 2)).magnitude
        seen = analysis.effective_receptive_field(model, x, kind([1, 2])).magnitude
        np.testing.assert_array_equal(seen, expected)

    def test_projections(self):
        wide = torch.nn.Conv2d(1, 64, 3, padding=1).double()
        x = torch.randn(1, 1, 5, 5, dtype=torch.float64)
        field = analysis.effective_receptive_field
        exact = field(wide, x, (2, 2), projections=64).magnitude
        some = field(wide, x, (2, 2), projections=63).magnitude
        np.testing.assert_array_equal(some, field(wide, x, (2, 2), projections=63).magnitude)
        assert (some != field(wide, x, (2, 2), projections=63, seed=1).magnitude).any()
        np.testing.assert_allclose(some[0, 1:4, 1:4], exact[0, 1:4, 1:4], rtol=0.35)

    def test_images_are_apart(self):
        model, x = stack(), image()
        both = analysis.effective_receptive_field(model, x, (1, 2)).magnitude
        alone = analysis.effective_receptive_field(model, x[1], (1, 2)).magnitude
        np.testing.assert_allclose(both[1], alone, rtol=1e-9, atol=1e-15)

    def test_size(self):
        field = analysis.EffectiveReceptiveField(np.array([[4.0, 3], [2, 1]]))
        assert [int(field.size(share)) for share in (0.3, 0.7, 0.71, 1.0)] == [1, 2, 3, 4]

    def test_response_of_an_inner_layer_and_of_a_classifier(self):
        model, x = stack(), image()
        inner = analysis.effective_receptive_field(model, x, (6, 6), layer="0").magnitude
        first = analysis.effective_receptive_field(model[0], x, (6, 6)).magnitude
        np.testing.assert_array_equal(inner, first)
        head = torch.nn.Sequential(model, torch.nn.Flatten(), torch.nn.Linear(27, 5).double())
        assert (analysis.effective_receptive_field(head, x, channel=4).magnitude > 0).any()


class TestEffectiveLocations:
    def test_one_layer_is_the_gradient_of_the_offset(self):
        """The NumPy door's backward gives the same."""
        layer, x = moving(dnn.DeformConv2dPack(4, 3, 3, padding=1, deform_groups=2)).double(), None
        x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
        (seen,) = analysis.effective_sampling_locations(layer, x, (3, 2), channel=1)
        offset = layer.conv_offset(x).detach().numpy()
        node = np.zeros((2, 3, 7, 6))
        node[:, 1, 3, 2] = 1
        weight = layer.weight.detach().numpy()
        grads = dcnlib.deform_conv2d_backward(node, x.numpy(), offset, weight, padding=1)
        pairs = grads.offset.reshape(2, 2, 9, 2, 7, 6)
        expected = np.hypot(pairs[:, :, :, 0], pairs[:, :, :, 1])
        np.testing.assert_allclose(seen.magnitude, expected, rtol=1e-10, atol=1e-14)
        assert np.count_nonzero(seen.magnitude) == 2 * 2 * 9

    def test_through_a_stack_equals_autograd(self):
        """Squares add up to those of the gradients of leaves that are added to the offsets."""
        model, x = stack().eval(), image()
        leaves = [torch.zeros(2, 36, 12, 12).double(), torch.zeros(2, 18, 3, 3).double()]
        for pack, leaf in zip((model[0], model[5]), leaves, strict=True):
            leaf.requires_grad_()
            pack.conv_offset.register_forward_hook(
                lambda _m, _i, out, leaf=leaf: torch.cat(
                    [out[:, : leaf.shape[1]] + leaf, out[:, leaf.shape[1] :]], 1
                )
            )
        y = model(x)
        for channel in range(3):
            grads = torch.autograd.grad(y[:, channel, 1, 2].sum(), leaves, retain_graph=True)
            seen = analysis.effective_sampling_locations(model, x, (1, 2), channel=channel)
            assert [row.name for row in seen] == ["0", "5"]
            for row, grad in zip(seen, grads, strict=True):
                n, channels, *out = grad.shape
                pairs = grad.reshape(n, channels // 18, 9, 2, *out)
                np.testing.assert_allclose(
                    row.magnitude, pairs.norm(dim=3).numpy(), rtol=1e-9, atol=1e-15
                )

    def test_mean_over_channels(self):
        model, x = stack(), image()
        every = analysis.effective_sampling_locations(model, x, (1, 2))[0].magnitude
        each = [
            analysis.effective_sampling_locations(model, x, (1, 2), channel=c)[0].magnitude
            for c in range(3)
        ]
        np.testing.assert_allclose(every**2, np.mean(np.square(each), 0), rtol=1e-10, atol=1e-18)

    def test_locations_are_sampling_locations(self):
        model, x = stack(), image()
        for row, name in zip(
            analysis.effective_sampling_locations(model, x, (1, 2)), "05", strict=True
        ):
            seen = analysis.sampling_locations(model, input=x, layers=[name]).locations
            groups = row.locations.shape[1]
            np.testing.assert_array_equal(
                row.locations[1, groups - 1, 4, 1, 2], seen[1, 1, 2, 9 * groups - 5]
            )

    def test_on_image(self):
        row = analysis.EffectiveLocations("", np.array([0.0, 7.0]), np.array(1.0), (8, 8))
        np.testing.assert_array_equal(row.on_image((32, 16)), [1.5, 14.5])

    def test_frozen_models_and_no_grad(self):
        model, x = stack().requires_grad_(False), image()
        with torch.no_grad():
            rows = analysis.effective_sampling_locations(model, x, (1, 2))
        assert all(row.magnitude.any() for row in rows)


class TestEffectiveBins:
    ROIS = torch.tensor([[0, 2.2, 1.0, 9.4, 8.0], [1, 0.0, 3.0, 6.0, 10.4]], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("dialect", "parts"), [("roi", (3, 2)), ("psroi", (3, 2)), ("psroi", (1, 1))]
    )
    def test_is_the_slope_by_a_move_of_the_bin(self, dialect, parts):
        """Against differences of a pooling whose bins have offsets of their own."""
        x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
        offset = torch.rand(2, 2, *parts, dtype=torch.float64)

        def pool(x, offset, parts=parts):
            if dialect == "roi":
                return dcnlib.deform_roi_pool(x, self.ROIS, offset, (3, 2), 0.9, 2, 0.2)
            options = {"part_size": parts, "sample_per_part": 2, "offset_std": 0.2}
            return dcnlib.deform_psroi_pool(x, self.ROIS, offset, 0.9, (3, 2), 4, **options)

        model = torch.nn.Identity()
        model.forward = lambda x: pool(x, offset)
        (seen,) = analysis.effective_bin_locations(model, x, (2, 1), channel=3)
        assert seen.magnitude.shape == (2, 1, 3, 2)
        assert np.count_nonzero(seen.magnitude) == 2
        every = offset.expand(2, 2, 3, 2).clone()
        corner, end = self.ROIS[:, [2, 1]], self.ROIS[:, [4, 3]]
        if dialect == "psroi":
            corner, end = corner.round(), end.round() + 1
        corner, size = corner * 0.9, (end - corner) * 0.9
        step, slopes = 1e-6, []
        for axis in (0, 1):  # y, x
            moved = every.clone()
            moved[:, 1 - axis, 2, 1] += step / (0.2 * size[:, axis])
            change = (pool(x, moved, (3, 2)) - pool(x, every, (3, 2)))[:, 3, 2, 1]
            slopes.append((change / step).numpy())
        np.testing.assert_allclose(seen.magnitude[:, 0, 2, 1], np.hypot(*slopes), rtol=1e-4)
        middle = torch.tensor([2.5 / 3, 1.5 / 2]) + 0.2 * every[:, [1, 0], 2, 1]
        middle = corner - 0.5 + size * middle
        np.testing.assert_allclose(seen.locations[:, 0, 2, 1], middle, atol=1e-12)
        np.testing.assert_allclose(seen.bin_size, size / torch.tensor([3, 2]))
        assert seen.images.tolist() == [0, 1]
        assert seen.in_size == (12, 12)

    def test_pack_with_a_head(self):
        """The Pack pools twice; its second call, where the offsets are, is what the head sees."""

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.pool = dnn.DeformRoIPoolPack(4, output_channels=4).double()
                self.head = torch.nn.Linear(64, 3).double()

            def forward(self, x, rois):
                return self.head(self.pool(x, rois).flatten(1))

        x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
        first, second = analysis.effective_bin_locations(Model(), (x, self.ROIS), channel=2)
        assert (first.name, second.name) == ("pool", "pool:2")
        assert (second.magnitude > 0).all()
        with pytest.raises(ValueError, match="model: needs a deformable RoI pooling"):
            analysis.effective_bin_locations(CONV, x[:, :2], (0, 0))


def small():
    return torch.nn.Sequential(
        moving(dnn.ModulatedDeformConv2dPack(2, 4, 3, padding=1)),
        torch.nn.Tanh(),
        torch.nn.Conv2d(4, 3, 3, padding=1),
    ).double()


@pytest.fixture(scope="module")
def found():
    """A model, an image, and its saliency."""
    torch.manual_seed(0)
    model, x = small(), image(1)
    call = {"bound": 0.2, "baseline": 0.0, "steps": 30}
    return model, x, analysis.error_bounded_saliency(model, x, (6, 6), **call)


class TestSaliency:
    @pytest.mark.parametrize("bound", [0.0, 0.05, 0.2, 0.5])
    def test_keeps_the_response_within_the_bound(self, found, bound):
        """Computed again, from the mask alone."""
        model, x, saliency = found
        saliency = saliency.within(bound)
        y = [model(i)[0, :, 6, 6] for i in (x * torch.from_numpy(saliency.mask), x, 0 * x)]
        error = ((y[0] - y[1]).norm() / (y[2] - y[1]).norm()).item()
        assert error <= bound + 1e-12
        assert saliency.error == pytest.approx(error, abs=1e-12)

    def test_is_monotone(self, found):
        """A tighter bound's mask contains that of a looser one."""
        masks = [found[2].within(bound).mask for bound in (1, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01, 0)]
        assert not masks[0].any()
        for loose, tight in itertools.pairwise(masks):
            assert (tight | loose == tight).all()
        assert 0 < masks[3].sum() < masks[-1].sum() < 144

    def test_bound_is_that_of_the_call(self, found):
        model, x, saliency = found
        again = analysis.error_bounded_saliency(
            model, x, (6, 6), bound=0.05, baseline=0.0, steps=30
        )
        np.testing.assert_array_equal(again.mask, saliency.within(0.05).mask)
        np.testing.assert_array_equal(again.errors, saliency.errors)
        assert again.area == again.mask.mean()

    def test_a_linear_unit_needs_its_window(self):
        """Without error, all of the window and nothing else; with one, the largest products."""
        layer = torch.nn.Conv2d(1, 1, 3, padding=1).double()
        x = torch.randn(1, 9, 9, dtype=torch.float64)
        exact = analysis.error_bounded_saliency(layer, x, (3, 5), bound=0, baseline=0.0, steps=0)
        expected = np.zeros((9, 9), bool)
        expected[2:5, 4:7] = True
        np.testing.assert_array_equal(exact.mask, expected)

    @pytest.mark.parametrize("seed", [11, 38])
    def test_weak_pixels_come_before_those_that_do_not_matter(self, seed):
        rng = np.random.default_rng(seed)
        layer = torch.nn.Conv2d(1, 1, 3, padding=1).double()
        with torch.no_grad():
            layer.weight[0, 0] = torch.from_numpy(rng.uniform(-0.3, 0.3, (3, 3)))
            layer.weight[0, 0, 1, 2] = 3e-3
            layer.bias[0] = 0.1
        x = torch.from_numpy(rng.random((1, 8, 8)) + 1)
        found = analysis.error_bounded_saliency(layer, x, (4, 4), bound=1e-9, cell=1, baseline=0.0)
        assert found.mask.sum() == 9

    def test_steps_make_it_smaller(self):
        """What the optimisation is for: the errors of the family fall faster."""
        model, x = small(), image(1)
        first, last = (
            analysis.error_bounded_saliency(model, x, (6, 6), baseline=0.0, steps=steps)
            for steps in (0, 60)
        )
        assert last.errors.mean() < 0.9 * first.errors.mean()

    def test_cells(self):
        """Cells of 5 pixels on 12 x 12: the last ones are cut off."""
        saliency = analysis.error_bounded_saliency(small(), image(1), (6, 6), cell=5, steps=2)
        assert saliency.errors.shape == (10,)
        assert len(np.unique(saliency.order)) == 9
        assert (saliency.order[:5, :5] == saliency.order[0, 0]).all()
        assert (saliency.order[10:, 10:] == saliency.order[11, 11]).all()

    def test_a_response_that_depends_on_nothing_needs_nothing(self):
        model = torch.nn.Conv2d(2, 1, 3, padding=1).double()
        torch.nn.init.zeros_(model.weight)
        saliency = analysis.error_bounded_saliency(model, image(1), (6, 6), bound=0, steps=2)
        assert saliency.area == 0

    def test_half_precision(self):
        """More cells than bfloat16 can count."""
        model, x = small().bfloat16(), torch.randn(1, 2, 24, 24, dtype=torch.bfloat16)
        saliency = analysis.error_bounded_saliency(model, x, (6, 6), bound=0.2, cell=1, steps=2)
        assert len(np.unique(saliency.order)) == 576
        assert saliency.error <= 0.2
        assert analysis.effective_receptive_field(model, x, (6, 6)).magnitude.any()

    def test_progress(self):
        told = []
        analysis.error_bounded_saliency(
            small(), image(1), (6, 6), cell=4, steps=3, progress=lambda *step: told.append(step)
        )
        assert told == [(done, 4) for done in range(1, 5)]


CONV = torch.nn.Conv2d(2, 3, 3, padding=1).double()


@pytest.mark.parametrize(
    ("name", "arguments", "keywords", "error", "text"),
    [
        ("effective_receptive_field", (abs, image()), {}, TypeError, "model: unknown kind"),
        ("effective_receptive_field", (CONV, 3), {}, TypeError, "input: unknown kind"),
        ("effective_receptive_field", (CONV, image()[0, 0]), {}, ValueError, "input: must be images"),
        ("effective_receptive_field", (CONV, image()), {}, ValueError, "position: needed for a map"),
        (
            "effective_receptive_field", (CONV, image(), (12, 0)), {}, ValueError,
            r"position: must lie on the map; expected less than \(12, 12\), got \(12, 0\)",
        ),
        ("effective_receptive_field", (CONV, image(), (-1, 0)), {}, ValueError, "position: must be in"),
        (
            "effective_receptive_field", (CONV, image(), (0, 0)), {"channel": 3}, ValueError,
            "channel: no such channel; expected less than 3, got 3",
        ),
        (
            "effective_receptive_field", (CONV, image(), (0, 0)), {"layer": "x"}, ValueError,
            "layer: no such module",
        ),
        (
            "effective_receptive_field", (torch.nn.Flatten(), image(), (0, 0)), {}, ValueError,
            "position: the response has no height and width",
        ),
        (
            "effective_receptive_field", (CONV, image().long(), (0, 0)), {}, TypeError,
            r"input: must have gradients; expected a floating-point dtype, got torch\.int64",
        ),
        (
            "error_bounded_saliency", (CONV, image(1).long(), (0, 0)), {}, TypeError,
            "input: must have gradients",
        ),
        ("sampling_locations", (stack(),), {"input": 3}, TypeError, "input: unknown kind"),
        (
            "effective_sampling_locations", (CONV, image(), (0, 0)), {}, ValueError,
            "model: needs a deformable layer",
        ),
        ("error_bounded_saliency", (CONV, image(), (0, 0)), {}, ValueError, "input: must be one image"),
        (
            "error_bounded_saliency", (CONV, image(1), (0, 0)), {"bound": -1}, ValueError,
            "bound: must be a number; expected at least 0, got -1",
        ),
        (
            "error_bounded_saliency", (CONV, image(1), (0, 0)), {"bound": "a"}, TypeError,
            "bound: must be a number",
        ),
        (
            "error_bounded_saliency", (CONV, image(1), (0, 0)), {"baseline": "blur"}, ValueError,
            "baseline: unknown name",
        ),
        (
            "error_bounded_saliency", (CONV, image(1), (0, 0)), {"baseline": torch.zeros(3, 1, 1)},
            ValueError, r"baseline: must broadcast to the image; .*got \(3, 1, 1\)",
        ),
        (
            "error_bounded_saliency", (CONV, image(1) * math.nan, (0, 0)), {}, ValueError,
            "model: its response must be finite",
        ),
        ("sampling_locations", (CONV,), {}, ValueError, "input: a module is run on it"),
        ("sampling_locations", (CONV,), {"input": image()}, ValueError, "layer_or_offset: needs a def"),
    ],
)  # fmt: skip
def test_errors(name, arguments, keywords, error, text):
    with pytest.raises(error, match=f"^{name}: {text}"):
        getattr(analysis, name)(*arguments, **keywords)
