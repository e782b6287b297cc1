"""Parameter groups: who is a predictor, and at what rate it is trained."""

import pytest

torch = pytest.importorskip("torch")

from dcnlib import nn, optim  # noqa: E402


def model():
    return torch.nn.ModuleDict(
        {
            "stem": torch.nn.Conv2d(3, 4, 3),
            "v1": nn.DeformConv2dPack(4, 4, 3),
            "v2": torch.nn.Sequential(nn.ModulatedDeformConv2dPack(4, 4, 3)),
            "flow": nn.ConvOffset2D(4),
            "pool": nn.ModulatedDeformRoIPoolPack(2, 4, 8),
        }
    )


def names(module, group):
    found = {id(p): name for name, p in module.named_parameters()}
    return {found[id(p)] for p in group["params"]}


def test_groups():
    """Every parameter once; those of predictors by their names."""
    net = model()
    others, predictors = optim.offset_param_groups(net, 0.02)
    assert (others["lr"], predictors["lr"]) == (0.02, 0.02 * 0.1)
    every = {name for name, _ in net.named_parameters()}
    assert names(net, others) | names(net, predictors) == every
    assert names(net, others) == {
        "stem.weight", "stem.bias", "v1.weight", "v1.bias", "v2.0.weight", "v2.0.bias"
    }  # fmt: skip
    assert len(predictors["params"]) == 2 * 3 + 2 * (3 + 2)


def test_a_step_of_sgd():
    """With the same gradient a predictor moves by `mult` of what others move."""
    net = model()
    optimizer = torch.optim.SGD(optim.offset_param_groups(net, 0.5, mult=0.25), lr=1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        moved = 0.125 if "conv_offset" in name or "_fc" in name else 0.5
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, moved))


def test_a_shared_predictor():
    """It has several names, of which the first may tell nothing."""
    net = torch.nn.Module()
    net.head = torch.nn.Conv2d(1, 18, 3)
    net.block = torch.nn.Module()
    net.block.conv_offset = net.head
    others, predictors = optim.offset_param_groups(net, 1.0)
    assert others["params"] == [] and names(net, predictors) == {"head.weight", "head.bias"}


def test_names_of_parameters_do_not_count():
    net = torch.nn.Module()
    net.conv_offset = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="must have modules that predict offsets"):
        optim.offset_param_groups(net, 1.0)


def test_own_names():
    net = torch.nn.Sequential()
    net.add_module("shift", torch.nn.Conv2d(1, 18, 3))
    net.add_module("shifted", torch.nn.Conv2d(1, 1, 3))
    _, predictors = optim.offset_param_groups(net, 1.0, predictors=["shift"])
    assert names(net, predictors) == {"shift.weight", "shift.bias"}


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (([], 0.1), TypeError, "model: must be a module"),
        (
            (torch.nn.Conv2d(1, 1, 1), 0.1),
            ValueError,
            "model: must have modules .* name yours with",
        ),
        ((model(), -0.1), ValueError, "base_lr: must not be negative"),
        ((model(), "0.1"), TypeError, "base_lr: must be a number"),
        ((model(), 0.1, float("nan")), ValueError, "mult: must be a finite number"),
        ((model(), 0.1, -1), ValueError, "mult: must not be negative"),
    ],
)
def test_messages(given, error, text):
    with pytest.raises(error, match=f"optim.offset_param_groups: {text}"):
        optim.offset_param_groups(*given)


@pytest.mark.parametrize("given", ["conv_offset", None, [1]])
def test_predictors_are_a_list_of_names(given):
    with pytest.raises(TypeError, match="predictors: must be names"):
        optim.offset_param_groups(model(), 0.1, predictors=given)
