"""Checkpoints of other libraries by key, and layers swapped with a proof."""

import copy

import pytest

torch = pytest.importorskip("torch")

import dcnlib  # noqa: E402
import standins  # noqa: E402
from dcnlib import convert  # noqa: E402
from dcnlib.compat import mmcv  # noqa: E402
from dcnlib.convert import models  # noqa: E402

CONVOLUTION = {"stride": (1, 2), "padding": (1, 2), "dilation": (2, 1), "groups": 2}
LAYERS = {
    "torchvision": lambda: standins.TorchvisionDeformConv2d(4, 6, (3, 2), **CONVOLUTION),
    "torchvision plain": lambda: standins.TorchvisionDeformConv2d(3, 2, 1, bias=False),
    "v1": lambda: standins.DeformConv2d(4, 6, (3, 2), deform_groups=2, **CONVOLUTION),
    "v1 pack": lambda: standins.DeformConv2dPack(4, 6, (3, 2), deform_groups=2, **CONVOLUTION),
    "v2": lambda: standins.ModulatedDeformConv2d(4, 6, 3, deform_groups=4, padding=1),
    "v2 pack": lambda: standins.ModulatedDeformConv2dPack(4, 6, 3, padding=1, bias=False),
    "pool": lambda: standins.DeformRoIPool((3, 2), 0.25, 2),
    "pool adaptive": lambda: standins.DeformRoIPool((2, 2), 1.0, 0, 0.2),
    "pool pack": lambda: standins.DeformRoIPoolPack((3, 2), 4, 8, 0.5),
    "pool modulated": lambda: standins.ModulatedDeformRoIPoolPack((3, 2), 4, 8, 0.5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_swapped_with_a_proof(name):
    """All that anybody holds of the layer stays: parameters, keys, mode."""
    torch.manual_seed(0)
    old = LAYERS[name]()
    old.training = False
    model = torch.nn.ModuleDict({"a": torch.nn.Sequential(torch.nn.ReLU(), old), "again": old})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = copy.deepcopy(model.state_dict())
    report = convert.replace_modules(model)
    (row,) = report.replaced
    assert row.name == "a.1" and row.after.endswith(row.before.split(".")[1])
    assert row.difference is not None and row.difference < 1e-12
    assert report.largest_difference == row.difference and not report.skipped
    new = model["a"][1]
    assert model["again"] is new and type(new).__module__.startswith("dcnlib") and not new.training
    assert all(p is parameters[n] for n, p in model.named_parameters(remove_duplicate=False))
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(model.state_dict()[n], value) for n, value in values.items())
    assert f"a.1: {row.before} -> {row.after}, largest difference" in str(report)
    assert convert.replace_modules(model) == models.Replacements((), ())


def test_random_numbers_stay():
    torch.manual_seed(0)
    layer = LAYERS["v2 pack"]()
    before = torch.get_rng_state()
    convert.replace_modules(torch.nn.Sequential(layer))
    assert torch.equal(torch.get_rng_state(), before)


def test_swapped_layer_has_the_gradient_of_mmcv():
    model = torch.nn.Sequential(LAYERS["v1 pack"]())
    convert.replace_modules(model)
    assert type(model[0]) is mmcv.DeformConv2dPack and isinstance(model[0], dcnlib.nn.DeformConv2d)


class Wrong(standins.TorchvisionDeformConv2d):
    """Takes x before y."""

    def forward(self, input, offset, mask=None):
        swapped = convert.offset(offset, "xy", kernel_size=self.kernel_size)
        return super().forward(input, swapped, mask)


def test_difference_is_an_error():
    Wrong.__name__, Wrong.__module__ = "DeformConv2d", "torchvision.ops"
    model = torch.nn.Sequential(LAYERS["v1"](), Wrong(1, 1, 3))
    before = list(model)
    with pytest.raises(
        ValueError, match=r"convert.replace_modules: 1: torchvision.DeformConv2d and"
    ):
        convert.replace_modules(model)
    assert list(model) == before
    convert.replace_modules(model, prove=False)
    assert type(model[1]) is dcnlib.nn.DeformConv2d


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_proof_without_gradients(mode):
    """Whoever swaps the layers of a model for inference has turned them off."""
    model = torch.nn.Sequential(standins.TorchvisionDeformConv2d(2, 3, 3))
    with mode():
        report = convert.replace_modules(model)
    assert report.replaced[0].difference is not None


def test_layer_that_cannot_run():
    class Broken(standins.DeformRoIPool):
        def forward(self, *arguments):
            raise NotImplementedError("no kernel for this device")

    Broken.__name__, Broken.__module__ = "DeformRoIPool", "mmcv.ops"
    model = torch.nn.Sequential(Broken((2, 2)))
    with pytest.raises(RuntimeError, match=r"0: .*: no kernel for this device; .* prove=False"):
        convert.replace_modules(model)
    report = convert.replace_modules(model, prove=False)
    assert type(model[0]) is dcnlib.nn.DeformRoIPool
    assert report.replaced[0].difference is None and "not proved" in str(report)
    assert report.largest_difference == 0


def test_what_is_skipped():
    class Derived(standins.ModulatedDeformConv2d):
        pass

    hooked, saved, watched, patched = (LAYERS["v1"]() for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    watched.register_state_dict_post_hook(lambda *_: None)
    saved.register_buffer("steps", torch.zeros(1))
    patched.forward = lambda x, offset: x
    plain = torch.nn.Conv2d(1, 1, 1)
    model = torch.nn.Sequential(Derived(1, 1, 3), hooked, watched, saved, patched, plain)
    before = list(model)
    report = convert.replace_modules(model)
    assert not report.replaced and list(model) == before
    assert report.skipped == (
        (
            "0",
            "test_what_is_skipped.<locals>.Derived is derived from a known layer and may do more",
        ),
        ("1", "it has hooks, which would be lost"),
        ("2", "it has hooks, which would be lost"),
        ("3", "it has buffers, which would be lost"),
        ("4", "it has a forward of its own, which would be lost"),
    )


def test_messages_of_models():
    with pytest.raises(ValueError, match=r"convert.replace_modules: model: is itself a layer"):
        convert.replace_modules(LAYERS["pool"]())
    with pytest.raises(TypeError, match=r"convert.replace_modules: model: must be a module"):
        convert.replace_modules([])
    with pytest.raises(
        TypeError, match=r"convert.equivalent: layer: no deformable layer of another"
    ):
        convert.equivalent(dcnlib.nn.DeformConv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"convert.state_dict: state_dict: must be a mapping"):
        convert.state_dict(torch.nn.Conv2d(1, 1, 1))


def test_keys():
    """Those of old checkpoints; what only looks like them stays."""
    given = {
        "conv1.weight": 0, "layer3.0.conv2.weight": 1, "layer3.0.conv2_offset.weight": 2,
        "layer3.0.conv2_offset.bias": 3, "conv1_offset.bias": 4, "pos_offset.weight": 5,
        "up.conv_offset_mask.weight": 6, "up.conv_offset.running": 7, "scale": 8,
    }  # fmt: skip
    expected = {
        "conv1.weight": 0, "layer3.0.conv2.weight": 1, "layer3.0.conv2.conv_offset.weight": 2,
        "layer3.0.conv2.conv_offset.bias": 3, "conv1.conv_offset.bias": 4, "pos_offset.weight": 5,
        "up.conv_offset.weight": 6, "up.conv_offset.running": 7, "scale": 8,
    }  # fmt: skip
    assert convert.state_dict(given) == expected
    layer = mmcv.ModulatedDeformConv2dPack(2, 2, 3)
    old = {k.replace("conv_offset", "conv_offset_mask"): v for k, v in layer.state_dict().items()}
    layer.load_state_dict(convert.state_dict(old))
    state = torch.nn.BatchNorm2d(2).state_dict()
    assert convert.state_dict(state)._metadata == state._metadata
