"""The modules for pooling and resampling: values, states, training and messages."""

import copy
import io

import pytest

torch = pytest.importorskip("torch")

import dcnlib  # noqa: E402
from dcnlib.nn import (  # noqa: E402
    ConvOffset2D,
    DeformPSRoIPool,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
)

PACKS = (DeformRoIPoolPack, ModulatedDeformRoIPoolPack)
OPTIONS = {"spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.2}


def images():
    return torch.randn(2, 4, 12, 14, generator=torch.Generator().manual_seed(0))


def regions():
    return torch.tensor([[0, 2.0, 4.0, 20.0, 17.0], [1, 6.0, 1.0, 25.0, 22.0], [0, -3.0, 0, 9, 9]])


def pack(kind):
    torch.manual_seed(0)
    return kind((3, 2), 4, 16, **OPTIONS)


def stirred(layer):
    """The layer with predictors that say something."""
    torch.manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def test_pool_is_the_function():
    layer, x, rois = DeformRoIPool((3, 2), **OPTIONS), images(), regions()
    offset = torch.randn(3, 2, 3, 2)
    expected = dcnlib.deform_roi_pool(x, rois, offset, (3, 2), *OPTIONS.values())
    assert torch.equal(layer(x, rois, offset), expected)
    expected = dcnlib.deform_roi_pool(x, rois, None, (3, 2), *OPTIONS.values())
    assert torch.equal(layer(x, rois), expected)
    assert not layer.state_dict()


def test_psroi_pool_is_the_function():
    x, rois = images(), regions()
    offset, mask = torch.randn(3, 2, 2, 2), torch.rand(3, 1, 3, 2)
    options = (0.5, (3, 2), 2, False, (1, 2), (2, 2), 3, 0.2)
    expected = dcnlib.deform_psroi_pool(x, rois, offset, *options, mask)
    assert torch.equal(DeformPSRoIPool(*options)(x, rois, offset, mask), expected)
    options = (0.5, (3, 2), 2, True, (1, 2), (2, 2), 3, 0.2)
    expected = dcnlib.deform_psroi_pool(x, rois, None, *options)
    assert torch.equal(DeformPSRoIPool(*options)(x, rois, offset), expected)


@pytest.mark.parametrize("kind", PACKS)
def test_untrained_pack_is_plain_pooling(kind):
    """Half of it where there is a mask."""
    plain = DeformRoIPool((3, 2), **OPTIONS)(images(), regions())
    factor = 0.5 if kind is ModulatedDeformRoIPoolPack else 1
    assert torch.equal(pack(kind)(images(), regions()), factor * plain)


@pytest.mark.parametrize("kind", PACKS)
def test_pack_in_its_parts(kind):
    layer, x, rois = stirred(pack(kind)), images(), regions()
    plain = dcnlib.deform_roi_pool(x, rois, None, (3, 2), *OPTIONS.values()).flatten(1)
    offset = layer.offset_fc(plain).view(3, 2, 3, 2)
    expected = dcnlib.deform_roi_pool(x, rois, offset, (3, 2), *OPTIONS.values())
    if kind is ModulatedDeformRoIPoolPack:
        expected = expected * layer.mask_fc(plain).view(3, 1, 3, 2)
    assert torch.equal(layer(x, rois), expected)
    assert layer(x, rois[:0]).shape == (0, 4, 3, 2)


@pytest.mark.parametrize("kind", PACKS)
def test_keys_are_those_of_mmcv(kind):
    shapes = {name: tuple(tensor.shape) for name, tensor in pack(kind).state_dict().items()}
    expected = {
        "offset_fc.0.weight": (16, 24),
        "offset_fc.0.bias": (16,),
        "offset_fc.2.weight": (16, 16),
        "offset_fc.2.bias": (16,),
        "offset_fc.4.weight": (12, 16),
        "offset_fc.4.bias": (12,),
    }
    if kind is ModulatedDeformRoIPoolPack:
        expected |= {
            "mask_fc.0.weight": (16, 24),
            "mask_fc.0.bias": (16,),
            "mask_fc.2.weight": (6, 16),
            "mask_fc.2.bias": (6,),
        }
    assert shapes == expected
    assert kind(7, 2).offset_fc[0].out_features == 1024


@pytest.mark.parametrize("boundary", ["border", "zeros"])
def test_untrained_resampling_changes_nothing(boundary):
    x = images()
    layer = ConvOffset2D(4, (3, 5), boundary)
    assert torch.equal(layer(x), x)
    assert torch.equal(layer(x[0]), x[0])
    assert sorted(layer.state_dict()) == ["conv_offset.bias", "conv_offset.weight"]
    assert layer.conv_offset.weight.shape == (8, 4, 3, 5)


def test_resampling_in_its_parts():
    layer, x = stirred(ConvOffset2D(4)), images()
    expected = dcnlib.deform_resample2d(x, layer.conv_offset(x))
    assert torch.equal(layer(x), expected) and not torch.equal(expected, x)


@pytest.mark.parametrize(
    "layer", [*map(pack, PACKS), ConvOffset2D(4)], ids=lambda layer: type(layer).__name__
)
def test_every_parameter_trains_from_the_beginning(layer):
    """The predictors' last layers have gradients at zero offsets; then all have."""
    layer = copy.deepcopy(layer)
    given = (images(),) if isinstance(layer, ConvOffset2D) else (images(), regions())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = [p.detach().clone() for p in layer.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        (layer(*given) * given[0].sum()).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "layer",
    [DeformRoIPool(7), DeformPSRoIPool(0.5, 7, 2), *map(pack, PACKS), ConvOffset2D(4)],
    ids=lambda layer: type(layer).__name__,
)
def test_saved_and_shown(layer):
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    again = torch.load(memory, weights_only=False)
    assert str(again) == str(layer) and type(layer).__name__ in str(layer)
    assert again.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: DeformRoIPool(0), ValueError, "deform_roi_pool: output_size: "),
        (lambda: DeformRoIPool(7, -1.0), ValueError, "deform_roi_pool: spatial_scale: "),
        (lambda: DeformRoIPool(7, 1.0, 0.5), TypeError, "deform_roi_pool: sampling_ratio: "),
        (lambda: DeformRoIPoolPack(7, 0), ValueError, "deform_roi_pool: output_channels: "),
        (lambda: DeformRoIPoolPack(7, 4, -1), ValueError, "deform_roi_pool: deform_fc_channels: "),
        (lambda: DeformPSRoIPool(1.0, 7, 0), ValueError, "deform_psroi_pool: output_dim: "),
        (lambda: ConvOffset2D(0), ValueError, "deform_resample2d: in_channels: "),
        (lambda: ConvOffset2D(4, 3, "reflect"), ValueError, "deform_resample2d: boundary: "),
        (
            lambda: pack(DeformRoIPoolPack)(images()[:, :3], regions()),
            ValueError,
            "deform_roi_pool: input: must have output_channels channels; expected 4, got 3",
        ),
        (
            lambda: pack(DeformRoIPoolPack)(images()[0], regions()),
            ValueError,
            "deform_roi_pool: input: must be images; expected ",
        ),
    ],
)
def test_messages(make, error, text):
    with pytest.raises(error, match=text):
        make()
