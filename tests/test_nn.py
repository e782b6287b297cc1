"""The modules: torchvision's layer and the Packs, their values, states and messages."""

import copy
import io
import math
import pickle
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import dcnlib  # noqa: E402
from dcnlib.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack  # noqa: E402

LAYERS = (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack)
PACKS = LAYERS[1:]
OPTIONS = {
    "default": {},
    "strided": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "same": {"padding": "same", "dilation": 2},
    "four_sides": {"padding": (0, 1, 2, 1), "stride": 2},
    "grouped": {"padding": 1, "groups": 2, "bias": False},
}


def arguments(layer, x):
    """What a call of the layer needs: offsets and mask for `DeformConv2d`."""
    if type(layer) is not DeformConv2d:
        return (x,)
    kernel_h, kernel_w = layer.kernel_size
    taps = kernel_h * kernel_w
    plain = torch.nn.functional.conv2d(
        padded(layer, x), layer.weight, None, layer.stride, 0, layer.dilation, layer.groups
    )
    size = plain.shape[-2:]
    return x, torch.randn(*x.shape[:-3], 2 * taps, *size), torch.rand(*x.shape[:-3], taps, *size)


def padded(layer, x):
    sides = layer.padding if len(layer.padding) == 4 else np.repeat(layer.padding, 2).tolist()
    top, bottom, left, right = sides
    return torch.nn.functional.pad(x, (left, right, top, bottom))


def stirred(layer):
    """The layer with a predictor that says something."""
    if hasattr(layer, "conv_offset"):
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.2)
        torch.nn.init.normal_(layer.conv_offset.bias, std=0.2)
    return layer


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_untrained_layer_is_a_convolution(layer, options):
    """Offsets begin at 0, the mask at 1/2."""
    layer = layer(4, 6, (3, 2), **OPTIONS[options]).double()
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(
        padded(layer, x), layer.weight, None, layer.stride, 0, layer.dilation, layer.groups
    )
    bias = 0 if layer.bias is None else layer.bias[:, None, None]
    if type(layer) is DeformConv2d:
        offset = x.new_zeros(2, 2 * 6, *plain.shape[2:])
        mask = x.new_full((2, 6, *plain.shape[2:]), 0.5)
        torch.testing.assert_close(layer(x, offset), plain + bias)
        torch.testing.assert_close(layer(x, offset, mask), plain / 2 + bias)
    else:
        scale = 0.5 if isinstance(layer, ModulatedDeformConv2dPack) else 1
        torch.testing.assert_close(layer(x), scale * plain + bias)
        assert not any(p.any() for p in layer.conv_offset.parameters())


@pytest.mark.parametrize("deform_groups", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_packs_compute_what_they_say(options, deform_groups):
    """A Pack is its predictor, the activation, and the function; first offsets, then mask."""
    for pack in PACKS:
        options_ = OPTIONS[options] | {"deform_groups": deform_groups}
        layer = stirred(pack(4, 6, (3, 2), **options_)).double()
        x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
        predicted = torch.nn.functional.conv2d(
            padded(layer, x),
            layer.conv_offset.weight,
            layer.conv_offset.bias,
            layer.stride,
            0,
            layer.dilation,
        )
        taps = 6 * deform_groups
        mask = predicted[:, 2 * taps :].sigmoid() if pack is ModulatedDeformConv2dPack else None
        assert predicted.shape[1] == (2 if mask is None else 3) * taps
        expected = dcnlib.deform_conv2d(
            x, predicted[:, : 2 * taps], layer.weight, layer.bias, layer.stride, layer.padding,
            layer.dilation, mask, groups=layer.groups, offset_groups=deform_groups,
        )  # fmt: skip
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "start"),
    [
        ("sigmoid", 0.5),
        ("2*sigmoid", 1.0),
        (None, 0.0),
        (torch.nn.Softplus(), math.log(2)),
        (lambda mask: mask + 3, 3.0),
    ],
    ids=["sigmoid", "2*sigmoid", "None", "module", "function"],
)
def test_mask_activation(activation, start):
    layer = ModulatedDeformConv2dPack(3, 4, 3, padding=1, mask_activation=activation, bias=False)
    plain = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
    plain.weight = layer.weight
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(x), start * plain(x))
    assert isinstance(activation, torch.nn.Module) == (
        "mask_activation" in dict(layer.named_modules())
    )


def test_mask_activation_is_checked():
    with pytest.raises(ValueError, match="mask_activation: unknown name; expected 'sigmoid', "):
        ModulatedDeformConv2dPack(3, 4, 3, mask_activation="relu")
    with pytest.raises(TypeError, match=r"mask_activation: unknown kind; .* got 2 \(int\)"):
        ModulatedDeformConv2dPack(3, 4, 3, mask_activation=2)


@pytest.mark.parametrize("layer", LAYERS)
def test_initial_values(layer):
    """torchvision's and mmcv's: uniform within 1/sqrt(fan-in), weights and bias alike."""
    layer = layer(32, 64, (3, 5), groups=2)
    bound = 1 / math.sqrt(16 * 15)
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
    assert layer.weight.abs().max() > 0.99 * bound
    assert abs(layer.weight.std().item() * math.sqrt(3) / bound - 1) < 0.02
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


KEYS = {
    DeformConv2d: {"weight": (6, 2, 3, 2), "bias": (6,)},
    DeformConv2dPack: {
        "weight": (6, 2, 3, 2),
        "bias": (6,),
        "conv_offset.weight": (24, 4, 3, 2),
        "conv_offset.bias": (24,),
    },
    ModulatedDeformConv2dPack: {
        "weight": (6, 2, 3, 2),
        "bias": (6,),
        "conv_offset.weight": (36, 4, 3, 2),
        "conv_offset.bias": (36,),
    },
}


@pytest.mark.parametrize("layer", LAYERS)
def test_state_dict(layer):
    """Keys and shapes of torchvision (the layer) and mmcv (the Packs)."""
    deform_groups = {} if layer is DeformConv2d else {"deform_groups": 2}
    shapes = {
        k: tuple(v.shape)
        for k, v in layer(4, 6, (3, 2), groups=2, **deform_groups).state_dict().items()
    }
    assert shapes == KEYS[layer]
    assert "bias" not in layer(4, 6, 3, bias=False).state_dict()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict", "meta"])
def test_copies(way, layer):
    original = stirred(layer(4, 6, 3, padding=1, groups=2))
    x = arguments(original, torch.randn(2, 4, 6, 7))
    if way == "deepcopy":
        other = copy.deepcopy(original)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(original))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(original.state_dict(), file)
        file.seek(0)
        other = layer(4, 6, 3, padding=1, groups=2)
        other.load_state_dict(torch.load(file, weights_only=True))
    elif way == "state_dict":
        other = layer(4, 6, 3, padding=1, groups=2)
        other.load_state_dict(original.state_dict(), strict=True)
    else:
        with torch.device("meta"):
            other = layer(4, 6, 3, padding=1, groups=2)
        other.load_state_dict(original.state_dict(), assign=True)
    assert torch.equal(other(*x), original(*x)) and repr(other) == repr(original)
    assert other.weight is not original.weight or way == "meta"


@pytest.mark.parametrize("layer", LAYERS)
def test_unbatched_input(layer):
    layer = stirred(layer(4, 6, 3, padding=1))
    x = arguments(layer, torch.randn(4, 6, 7))
    torch.testing.assert_close(layer(*x), layer(*(t[None] for t in x))[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_dtypes(layer, dtype):
    layer = stirred(layer(4, 6, 3, padding=1)).to(dtype)
    x = tuple(t.to(dtype) for t in arguments(layer.float(), torch.randn(2, 4, 6, 7)))
    y = layer.to(dtype)(*x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("pack", PACKS)
def test_all_parameters_learn(pack):
    """From the untrained state on, the predictor too."""
    torch.manual_seed(0)
    layer = pack(2, 3, 3, padding=1)
    x = torch.randn(8, 2, 9, 9)
    target = torch.nn.functional.conv2d(x.roll(1, 3), torch.randn(3, 2, 3, 3), padding=1)
    optimiser = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in layer.parameters())
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_channels_last(layer):
    layer = stirred(layer(4, 6, 3, padding=1)).to(memory_format=torch.channels_last)
    x, *rest = arguments(layer, torch.randn(2, 4, 6, 7))
    y = layer(x.contiguous(memory_format=torch.channels_last), *rest)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x, *rest))


def test_repr():
    """All that is not the default can be read off."""
    assert repr(DeformConv2d(4, 6, 3)) == ("DeformConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))")
    layer = DeformConv2d(4, 6, (3, 2), 2, (1, 2, 0, 0), 2, 2, False)
    assert repr(layer) == (
        "DeformConv2d(4, 6, kernel_size=(3, 2), stride=(2, 2), padding=(1, 2, 0, 0), "
        "dilation=(2, 2), groups=2, bias=False)"
    )
    layer = ModulatedDeformConv2dPack(4, 6, 3, deform_groups=2, mask_activation="2*sigmoid")
    text = repr(layer).splitlines()
    assert text[1].strip() == (
        "4, 6, kernel_size=(3, 3), stride=(1, 1), deform_groups=2, mask_activation='2*sigmoid'"
    )


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"in_channels": 0}, ValueError, "in_channels: must be in [1, 2147483647]"),
        ({"out_channels": 2.0}, TypeError, "out_channels: must be an integer"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size: must be an int or a pair (h, w)"),
        ({"kernel_size": -1}, ValueError, "kernel_size: must be in [1, 2147483647]"),
        ({"stride": 0}, ValueError, "stride: must be in [1, 2147483647]"),
        ({"dilation": 2**31}, ValueError, "dilation: must be in [1, 2147483647]"),
        ({"padding": "half"}, ValueError, 'padding: unknown name; expected "same" or "valid"'),
        ({"padding": "same", "stride": 2}, ValueError, 'padding: "same" needs stride 1'),
        ({"groups": 0}, ValueError, "groups: must be in [1, 2147483647]"),
        ({"groups": 3}, ValueError, "groups: must divide in_channels"),
        ({"groups": 4}, ValueError, "groups: must divide out_channels"),
        ({"groups": True}, TypeError, "groups: must be an integer"),
        ({"deform_groups": 3}, ValueError, "deform_groups: must divide in_channels"),
        ({"deform_groups": None}, TypeError, "deform_groups: must be an integer"),
    ],
    ids=str,
)
def test_bad_arguments(changes, error, text):
    usual = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    for layer in LAYERS if "deform_groups" not in changes else PACKS:
        with pytest.raises(error) as raised:
            layer(**usual | changes)
        assert str(raised.value).startswith(f"deform_conv2d: {text}")


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(1, 5, 9, 9), ValueError, "must have in_channels channels; expected 4, got 5"),
        (torch.zeros(4, 9), ValueError, "must be images; expected (N, C, H, W) or (C, H, W), got"),
        (torch.zeros(1, 1, 4, 9, 9), ValueError, "must be images; expected (N, C, H, W)"),
        (np.zeros((1, 4, 9, 9)), TypeError, "must be a tensor; expected torch.Tensor, got numpy."),
    ],
    ids=["channels", "matrix", "video", "array"],
)
def test_bad_input_is_not_blamed_on_the_predictor(x, error, text):
    layers = [pack(4, 6, 3) for pack in PACKS] + [dcnlib.nn.ConvOffset2D(4)]
    for layer in layers:
        with pytest.raises(error) as raised:
            layer(x)
        assert re.match(rf"deform_(conv|resample)2d: input: {re.escape(text)}", str(raised.value))


def test_freeze_takes_a_module():
    with pytest.raises(TypeError, match="freeze: module: must be a module"):
        dcnlib.nn.freeze([])
