"""A quick before and after while working on the kernels; CONTRIBUTING.md has the commands.

One of each kernel, one thread. What counts is the shortest call in processor time.
"""

import pytest

import dcnlib
from dcnlib import _bench
from dcnlib._bench import Layer

LAYERS = {
    "conv3x3": Layer(64, 64, 40, 3),
    "strided": Layer(128, 128, 28, 3, stride=2),
    "conv5x5": Layer(32, 32, 24, 5),
    "pointwise": Layer(256, 128, 20, 1),
    "groups": Layer(64, 64, 28, 3, groups=4, offset_groups=4),
    "depthwise": Layer(128, 128, 28, 3, groups=128),
    "batch": Layer(16, 16, 14, 3, batch=8),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", LAYERS)
def test_speed(benchmark, name, direction):
    layer = LAYERS[name]
    input, offset, weight, bias, mask, grad_output = _bench.arrays(layer)
    rest = (input, offset, weight, bias, layer.stride, layer.padding, layer.dilation, mask)
    with _bench.one_thread():
        if direction == "forward":
            result = benchmark(dcnlib.deform_conv2d, *rest)
            assert result.shape == grad_output.shape
        else:
            result = benchmark(dcnlib.deform_conv2d_backward, grad_output, *rest)
            assert result.input.shape == input.shape
