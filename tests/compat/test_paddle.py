"""Paddle's two documentation examples with only the import changed, and Paddle's values."""

import importlib.util
import inspect
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dcnlib.compat import paddle  # noqa: E402
from dcnlib.testing import UNIT_ROUNDOFF  # noqa: E402

DATA = Path(__file__).parent.parent / "data"


def load_script():
    spec = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_golden = load_script()


def stored(case):
    with np.load(DATA / "paddle.npz") as file:
        return {k.removeprefix(f"{case}/"): file[k] for k in file if k.startswith(f"{case}/")}


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["exact", "real"])
def test_documentation_example(kind, version):
    """The layer on (8, 1, 28, 28), without mask and with: shape and values of Paddle."""
    arrays = make_golden.paddle_example(unit={"exact": 0.125, "real": 0.001}[kind])
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    layer = paddle.DeformConv2D(in_channels=1, out_channels=16, kernel_size=[3, 3])
    layer.load_state_dict({"weight": tensors["weight"], "bias": tensors["bias"]})
    call = [tensors["input"], tensors["offset"]] + ([tensors["mask"]] if version == "v2" else [])
    output = layer(*call)
    assert list(output.shape) == [8, 16, 26, 26]
    golden = stored(f"example/{kind}/{version}")
    found = output.detach().numpy()
    if kind == "exact":
        np.testing.assert_array_equal(found[make_golden.PART], golden["part"])
        assert make_golden.checksum(found) == str(golden["sha256"])
    else:
        # Paddle adds offset and position in float32 and so is the less precise of the two.
        tolerance = 64 * UNIT_ROUNDOFF["float32"] * np.abs(golden["part"]).max()
        np.testing.assert_allclose(found[make_golden.PART], golden["part"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", make_golden.SMALL)
def test_values_and_gradients(case):
    """Paddle's order of arguments, its results and its gradients, in float64."""
    arrays = stored(case)
    sizes = arrays.pop("sizes").tolist()
    stride, padding, dilation, groups, deformable_groups = (
        sizes[:2], sizes[2:4], sizes[4:6], sizes[6], sizes[7]
    )  # fmt: skip
    names = [n for n in ("input", "offset", "weight", "bias", "mask") if n in arrays]
    tensors = {n: torch.from_numpy(arrays[n]).double().requires_grad_() for n in names}
    output = paddle.deform_conv2d(
        tensors["input"], tensors["offset"], tensors["weight"], tensors.get("bias"),
        stride, padding, dilation, deformable_groups, groups, tensors.get("mask"),
    )  # fmt: skip
    np.testing.assert_allclose(output.detach().numpy(), arrays["output"], rtol=1e-13, atol=1e-13)
    output.backward(torch.from_numpy(arrays["grad_output"]).double())
    for name in names:
        if f"grad_{name}" in arrays:
            found = tensors[name].grad.numpy()
            np.testing.assert_allclose(found, arrays[f"grad_{name}"], rtol=1e-12, atol=1e-12)


def test_names_order_and_defaults():
    """Those of paddle.vision.ops, written down from its documentation."""
    signatures = {
        paddle.deform_conv2d: "x offset weight bias=None stride=1 padding=0 dilation=1 "
        "deformable_groups=1 groups=1 mask=None name=None",
        paddle.DeformConv2D.__init__: "self in_channels out_channels kernel_size stride=1 "
        "padding=0 dilation=1 deformable_groups=1 groups=1 weight_attr=None bias_attr=None",
        paddle.DeformConv2D.forward: "self x offset mask=None",
    }
    for function, text in signatures.items():
        parameters = inspect.signature(function).parameters.values()
        found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        assert " ".join(found) == text


def test_initial_values():
    """Normal with variance 2/(in_channels*KH*KW), whatever the groups; the bias 0."""
    layer = paddle.DeformConv2D(64, 128, [3, 5], groups=2)
    assert layer.weight.shape == (128, 32, 3, 5) and not layer.bias.any()
    assert abs(layer.weight.std().item() / math.sqrt(2 / (64 * 15)) - 1) < 0.02
    assert paddle.DeformConv2D(4, 4, 3, bias_attr=False).bias is None
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_deformable_groups():
    layer = paddle.DeformConv2D(4, 6, 3, 2, [1, 2], (1, 2), deformable_groups=2, groups=2)
    x = torch.randn(2, 4, 9, 10)
    offset, mask = torch.randn(2, 36, 5, 5), torch.rand(2, 18, 5, 5)
    expected = paddle.deform_conv2d(
        x, offset, layer.weight, layer.bias, 2, (1, 2), [1, 2], 2, 2, mask, name="ignored"
    )
    assert torch.equal(layer(x, offset, mask), expected) and expected.shape == (2, 6, 5, 5)
    assert "deformable_groups=2" in repr(layer)
    with pytest.raises(ValueError, match="deform_conv2d: offset: "):
        layer(x, offset[:, :18], mask)


def test_what_has_no_counterpart():
    for name in ("weight_attr", "bias_attr"):
        with pytest.raises(
            TypeError, match=f"deform_conv2d: {name}: .*; set weight and bias of the"
        ):
            paddle.DeformConv2D(1, 1, 1, **{name: "ParamAttr"})
    with pytest.raises(TypeError, match="deform_conv2d: padding: must be an integer"):
        paddle.DeformConv2D(1, 1, 1, padding="same")
    with pytest.raises(ValueError, match="deform_conv2d: padding: must be an int or a pair"):
        paddle.deform_conv2d(
            torch.ones(1, 1, 2, 2),
            torch.ones(1, 2, 2, 2),
            torch.ones(1, 1, 1, 1),
            padding=[0, 1, 2],
        )
