"""mmcv's names, defaults, keys and initial values; its gradient of the offset at exactly -1."""

import inspect
import math

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import gradgradcheck  # noqa: E402
from torch.func import jvp, vmap  # noqa: E402

import dcnlib  # noqa: E402
from dcnlib.compat import mmcv  # noqa: E402

LAYER = "self in_channels out_channels kernel_size stride=1 padding=0 dilation=1 groups=1 "
LAYER += "deform_groups=1 "
POOL = "spatial_scale=1.0 sampling_ratio=0 gamma=0.1"
OPTIONS = {"stride": (1, 2), "padding": (1, 2), "dilation": (2, 1), "deform_groups": 2}


def test_names_order_and_defaults():
    """Those of mmcv.ops, written down from its sources."""
    signatures = {
        mmcv.deform_conv2d: "input offset weight stride=1 padding=0 dilation=1 groups=1 "
        "deform_groups=1 bias=False im2col_step=32",
        mmcv.modulated_deform_conv2d: "input offset mask weight bias=None stride=1 padding=0 "
        "dilation=1 groups=1 deform_groups=1",
        mmcv.deform_roi_pool: f"input rois offset output_size {POOL}",
        mmcv.DeformConv2d.__init__: LAYER + "bias=False im2col_step=32",
        mmcv.DeformConv2dPack.__init__: LAYER + "bias=False im2col_step=32",
        mmcv.ModulatedDeformConv2d.__init__: LAYER + "bias=True",
        mmcv.ModulatedDeformConv2dPack.__init__: LAYER + "bias=True",
        mmcv.DeformConv2d.forward: "self x offset",
        mmcv.DeformConv2dPack.forward: "self x",
        mmcv.ModulatedDeformConv2d.forward: "self x offset mask",
        mmcv.ModulatedDeformConv2dPack.forward: "self x",
        mmcv.DeformRoIPool.__init__: f"self output_size {POOL}",
        mmcv.DeformRoIPoolPack.__init__: "self output_size output_channels "
        f"deform_fc_channels=1024 {POOL}",
        mmcv.ModulatedDeformRoIPoolPack.__init__: "self output_size output_channels "
        f"deform_fc_channels=1024 {POOL}",
    }
    for function, text in signatures.items():
        parameters = inspect.signature(function).parameters.values()
        found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        assert " ".join(found) == text, function


def call(seed=0):
    """A float64 call of DCNv2; offsets in halves, so that many samples lie at whole positions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    offset = (2 * normal(2, 24, 5, 5)).round() / 2
    return normal(2, 4, 5, 7), offset, normal(2, 12, 5, 5), normal(6, 4, 2, 3), normal(6)


def at_the_border():
    """Where mmcv's kernels have no gradient: one position after the other, as they count."""
    offset = call()[1]
    found = torch.zeros(offset.shape, dtype=torch.bool)
    for n, g, u, v, i, j in torch.cartesian_prod(*map(torch.arange, (2, 2, 2, 3, 5, 5))).tolist():
        k = 2 * (g * 6 + u * 3 + v)
        y = i * 1 - 1 + u * 2 + offset[n, k, i, j].item()
        x = j * 2 - 2 + v * 1 + offset[n, k + 1, i, j].item()
        found[n, k : k + 2, i, j] = y <= -1 or x <= -1 or y >= 5 or x >= 7
    return found


def ours(input, offset, mask, weight, bias):
    return dcnlib.deform_conv2d(
        input, offset, weight, bias, (1, 2), (1, 2), (2, 1), mask, offset_groups=2
    )


def theirs(input, offset, mask, weight, bias):
    return mmcv.modulated_deform_conv2d(input, offset, mask, weight, bias, **OPTIONS)


def gradients(function, given):
    leaves = [t.clone().requires_grad_() for t in given]
    output = function(*leaves)
    return output, torch.autograd.grad(output, leaves, torch.ones_like(output))


def test_only_the_gradient_at_the_border_differs():
    given, held = call(), at_the_border()
    (expected, by_ours), (output, by_mmcv) = gradients(ours, given), gradients(theirs, given)
    assert torch.equal(output, expected)
    assert (by_ours[1][held] != 0).sum() >= 10
    assert torch.equal(by_mmcv[1], by_ours[1].masked_fill(held, 0))
    for i in (0, 2, 3, 4):
        assert torch.equal(by_mmcv[i], by_ours[i])


def test_first_version():
    """Without a mask, without a batch, in half precision; only who asks has a gradient."""
    input, offset, _, weight, _ = call()
    expected = ours(input, offset, None, weight, None)
    assert torch.equal(mmcv.deform_conv2d(input, offset, weight, **OPTIONS), expected)
    leaf = offset.clone().requires_grad_()
    alone = mmcv.deform_conv2d(input[0], leaf[0], weight, **OPTIONS)
    assert torch.equal(alone, expected[0])
    alone.sum().backward()
    assert not leaf.grad[0][at_the_border()[0]].any() and leaf.grad[0].any()
    half = offset.half().requires_grad_()
    mmcv.deform_conv2d(input.half(), half, weight.half(), **OPTIONS).sum().backward()
    assert not half.grad[at_the_border()].any() and half.grad.any()


def test_other_transforms_agree():
    given, held = call(), at_the_border()
    by_mmcv = gradients(theirs, given)[1][1]

    def apply(offset):
        return theirs(given[0], offset, *given[2:])

    _, tangent = jvp(apply, (given[1],), (torch.ones_like(given[1]),))
    torch.testing.assert_close(tangent.sum(), by_mmcv.sum())
    each = vmap(torch.func.grad(lambda offset: apply(offset).sum()))(given[1][None])
    torch.testing.assert_close(each[0], by_mmcv)
    torch._dynamo.reset()
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    leaf = given[1].clone().requires_grad_()
    compiled(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, by_mmcv)
    smooth = (given[1] + 0.23).masked_fill(held, 0.23).requires_grad_()
    assert gradgradcheck(apply, smooth, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize(
    "kind", [mmcv.DeformConv2d, mmcv.DeformConv2dPack, mmcv.ModulatedDeformConv2d,
             mmcv.ModulatedDeformConv2dPack],
)  # fmt: skip
def test_layers(kind):
    """Keys, initial values, and the function with the layer's parameters."""
    torch.manual_seed(0)
    layer = kind(8, 64, (3, 5), (1, 2), (1, 2), deform_groups=2, groups=2)
    modulated, pack = "Modulated" in kind.__name__, "Pack" in kind.__name__
    keys = ["weight"] + ["bias"] * modulated + ["conv_offset.weight", "conv_offset.bias"] * pack
    assert list(layer.state_dict()) == keys
    # kaiming_uniform_ for ReLU, and uniform within 1/sqrt(n): both by their standard deviation.
    fan_in, channels = 4 * 15, 8 * 15
    std = 1 / math.sqrt(3 * channels) if modulated else math.sqrt(2 / fan_in)
    assert abs(layer.weight.std().item() / std - 1) < 0.03
    if modulated:
        assert not layer.bias.any()
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 8, 6, 7)
    offset, mask = torch.randn(2, 60, 6, 4), torch.rand(2, 30, 6, 4)
    if pack:
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
        predicted = layer.conv_offset(x)
        offset, mask = predicted[:, :60], predicted[:, 60:].sigmoid()
    given = (x,) if pack else (x, offset, mask) if modulated else (x, offset)
    expected = dcnlib.deform_conv2d(
        x, offset, layer.weight, layer.bias, (1, 2), (1, 2),
        mask=mask if modulated else None, groups=2, offset_groups=2,
    )  # fmt: skip
    assert torch.equal(layer(*given), expected)
    assert repr(layer).count("deform_groups=2") == 1
    if pack:
        (layer.init_weights if modulated else layer.init_offset)()
        assert not layer.conv_offset.weight.any() and not layer.conv_offset.bias.any()


def test_untrained_layer_begins_as_in_mmcv():
    """With padding 1 the samples beside the image have no gradient: that of the bias shows it."""
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    found = []
    for kind in (mmcv.DeformConv2dPack, dcnlib.nn.DeformConv2dPack):
        layer = kind(1, 1, 3, padding=1, bias=False).double()
        torch.nn.init.ones_(layer.weight)
        layer(x).sum().backward()
        found.append(layer.conv_offset.bias.grad.reshape(3, 3, 2)[..., 0])
    # On ones only samples at row -1 have a slope of 1 by y, and those at row 3 one of -1.
    rise = torch.tensor([3, 4, 3], dtype=torch.float64)
    assert torch.equal(found[1], torch.stack([rise, 0 * rise, 0 * rise]) - fall(rise))
    assert torch.equal(found[0], -fall(rise))


def fall(rise):
    return torch.stack([0 * rise, rise, rise])


def test_traced():
    """By people who forget no_grad, too: torch checks what it has traced without gradients."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 7)
    for layer in (mmcv.DeformConv2dPack(2, 3, 3), mmcv.ModulatedDeformConv2dPack(2, 3, 3)):
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x), rtol=0, atol=0)


def test_pooling_is_ours():
    assert mmcv.DeformRoIPool is dcnlib.nn.DeformRoIPool
    x, rois = torch.randn(1, 3, 9, 9), torch.tensor([[0, 1.0, 1.0, 7.0, 6.0]])
    offset = torch.randn(1, 2, 2, 2)
    found = mmcv.deform_roi_pool(x, rois, offset, 2, 0.5, 1, 0.2)
    assert torch.equal(found, dcnlib.deform_roi_pool(x, rois, offset, 2, 0.5, 1, 0.2))


def test_messages():
    x, weight = torch.zeros(1, 2, 5, 5), torch.zeros(2, 2, 3, 3)
    with pytest.raises(ValueError, match=r"deform_conv2d: bias: .*; dcnlib\.nn\.DeformConv2d can"):
        mmcv.DeformConv2d(1, 1, 1, bias=True)
    with pytest.raises(ValueError, match="deform_conv2d: padding: "):
        mmcv.DeformConv2dPack(1, 1, 3, padding=(1, 1, 0, 0))
    for offset in (torch.zeros(1, 17, 3, 3), torch.zeros(0), torch.zeros(1, 18, 3, 4)):
        with pytest.raises(ValueError, match="deform_conv2d: offset: "):
            mmcv.deform_conv2d(x, offset.requires_grad_(), weight)
    with pytest.raises(TypeError, match="deform_conv2d: offset: "):
        mmcv.deform_conv2d(x, None, weight)
    with pytest.raises(ValueError, match="deform_conv2d: weight: "):
        mmcv.deform_conv2d(x, torch.zeros(1, 18, 3, 3).requires_grad_(), weight[0])
