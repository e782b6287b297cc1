"""Layouts of offsets and masks against their definitions."""

import itertools

import numpy as np
import pytest

from dcnlib import convert
from dcnlib.convert import LAYOUTS

GROUPS, KERNEL = 2, (2, 3)


def channel(layout, g, u, v, component):
    """The channel of one component (0 is y) of one tap, from the words of the documentation."""
    kernel_h, kernel_w = KERNEL
    taps, second = kernel_h * kernel_w, component
    if layout in ("xy", "blocked_xy", "dcnv3"):
        second = 1 - component
    if layout == "dcnv3":
        return 2 * (g * taps + v * kernel_h + u) + second
    tap = g * taps + u * kernel_w + v
    return tap + GROUPS * taps * second if "blocked" in layout else 2 * tap + second


def labelled(layout, components=2):
    """An array in a layout whose values tell what they belong to."""
    sizes = (GROUPS, *KERNEL, components)
    array = np.zeros((2, np.prod(sizes), 4, 5))
    for at in np.ndindex(sizes):
        number = channel(layout, *at) if components == 2 else channel(layout, *at[:3], 0) // 2
        if components == 1 and "blocked" in layout:
            number = channel(layout, *at[:3], 0) % np.prod(sizes)
        array[:, number] = np.ravel_multi_index(at, sizes)
    array += np.arange(2 * 20).reshape(2, 1, 4, 5) * 1000
    return np.moveaxis(array, 1, -1) if layout == "dcnv3" else array


@pytest.mark.parametrize(("source", "target"), [*itertools.product(LAYOUTS, repeat=2)])
def test_layouts(source, target):
    options = {"kernel_size": KERNEL, "offset_groups": GROUPS}
    for function, components in ((convert.offset, 2), (convert.mask, 1)):
        given = labelled(source, components)
        found = function(given, source, target, **options)
        np.testing.assert_array_equal(found, labelled(target, components))
        np.testing.assert_array_equal(function(given[0], source, target, **options), found[0])
        assert found.flags.c_contiguous and not np.shares_memory(found, given)


def test_layouts_of_tensors():
    torch = pytest.importorskip("torch")
    given = torch.from_numpy(labelled("dcnv3")).requires_grad_()
    found = convert.offset(given, "dcnv3", kernel_size=KERNEL, offset_groups=GROUPS)
    np.testing.assert_array_equal(found.detach().numpy(), labelled("dcnlib"))
    found.square().sum().backward()
    assert torch.equal(given.grad, 2 * given)


def test_channels_of_a_predictor():
    """Permuted weights predict permuted offsets."""
    torch = pytest.importorskip("torch")
    predictor = torch.nn.Conv2d(3, 24, 3).double()
    x = torch.randn(1, 3, 6, 7).double()
    expected = convert.offset(predictor(x), "blocked_xy", kernel_size=KERNEL, offset_groups=GROUPS)
    order = convert.offset_channels("blocked_xy", "dcnlib", KERNEL, GROUPS)
    found = torch.nn.functional.conv2d(x, predictor.weight[order], predictor.bias[order])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"source": "torch"},
            ValueError,
            "convert.offset: source: unknown layout; expected dcnlib",
        ),
        ({"target": None}, TypeError, "convert.offset: target: must be the name of a layout"),
        ({"kernel_size": 2}, ValueError, "convert.offset: offset: .*; expected 16, got"),
        ({"kernel_size": 0}, ValueError, "convert.offset: kernel_size: "),
        ({"offset_groups": True}, TypeError, "convert.offset: offset_groups: "),
        ({"offset": [1.0]}, TypeError, "convert.offset: offset: must be an array or a tensor"),
        ({"offset": np.zeros((24, 5))}, ValueError, "convert.offset: offset: must have a channel"),
    ],
)
def test_messages(change, error, text):
    given = {"offset": labelled("xy"), "source": "xy", "kernel_size": KERNEL} | {
        "offset_groups": GROUPS
    }
    with pytest.raises(error, match=text):
        convert.offset(**given | change)
