"""The measuring behind `python -m dcnlib bench` and asv_bench: layers, inputs, rounds, threads."""

import importlib.util

import numpy as np
import pytest

import dcnlib
from dcnlib import _bench, _config
from dcnlib._bench import Layer

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)


class TestLayer:
    @pytest.mark.parametrize(
        ("layer", "text"),
        [
            (Layer(16, 32, 28, 3), "16 -> 32, 28 x 28, K3"),
            (Layer(16, 32, (9, 11), 1, stride=2), "16 -> 32, 9 x 11, K1, stride 2"),
            (Layer(8, 8, 7, 3, groups=8), "8 -> 8, 7 x 7, K3, depthwise"),
            (Layer(8, 8, 7, 3, groups=2), "8 -> 8, 7 x 7, K3, groups 2"),
            (Layer(8, 8, 7, 3, offset_groups=4), "8 -> 8, 7 x 7, K3, offset groups 4"),
            (Layer(8, 8, 7, 5, dilation=2, batch=3), "3 x 8 -> 8, 7 x 7, K5, dilation 2"),
            (Layer(1, 1, 1, 1), "1 -> 1, 1 x 1, K1"),
        ],
        ids=str,
    )  # fmt: skip
    def test_text(self, layer, text):
        assert str(layer) == text

    def test_work(self):
        layer = Layer(8, 12, (9, 11), 3, stride=2, groups=4, batch=2)
        assert layer.flop == 2 * 2 * (8 // 4) * 9 * 12 * 5 * 6

    @pytest.mark.parametrize("layer", _bench.LAYERS, ids=str)
    def test_default_layers_are_valid(self, layer):
        assert layer.channels % layer.groups == 0
        assert layer.channels % layer.offset_groups == 0


def test_arrays_fit_the_layer():
    layer = Layer(8, 12, (9, 11), 3, stride=2, groups=4, dilation=2, offset_groups=2, batch=2)
    input, offset, weight, bias, mask, grad_output = _bench.arrays(layer)
    place = (layer.stride, layer.padding, layer.dilation, mask)
    output = dcnlib.deform_conv2d(
        input, offset, weight, bias, *place, groups=4, offset_groups=2, backend="reference"
    )
    assert output.shape == grad_output.shape
    assert 1.8 < offset.std() < 2.2


class TestMeasure:
    @pytest.fixture
    def clock(self, monkeypatch):
        """Calls that take as long as they say, by a clock of their own."""
        now = [0.0]
        monkeypatch.setattr(_bench.time, "process_time", lambda: now[0])

        def taking(seconds):
            durations = iter(seconds) if isinstance(seconds, list) else None

            def call():
                call.count += 1
                now[0] += next(durations) if durations else seconds

            call.count = 0
            return call

        return taking

    def test_rounds_repeat_short_calls(self, clock):
        short, long = clock(0.001), clock(0.05)
        seconds = _bench.measure({"short": short, "long": long}, 3)
        assert seconds["short"] == pytest.approx([0.001] * 3)
        assert seconds["long"] == pytest.approx([0.05] * 3)
        assert short.count == 2 + 3 * 30
        assert long.count == 2 + 3

    def test_what_is_far_behind_runs_once(self, clock):
        slow = clock(1.0)
        seconds = _bench.measure({"fast": clock(0.01), "slow": slow}, 4)
        assert len(seconds["fast"]) == 4
        assert len(seconds["slow"]) == 1
        assert slow.count == 3

    def test_two_slow_ones_both_run(self, clock):
        seconds = _bench.measure({"a": clock(0.5), "b": clock(0.6)}, 3)
        assert [len(times) for times in seconds.values()] == [3, 3]

    def test_ratio_is_the_median_of_the_rounds(self):
        assert _bench.ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == 1.0
        assert _bench.ratio([1.0, 2.0, 9.0], [2.0]) == 0.5


class TestOneThread:
    def test_restores_an_unset_number(self):
        before = _config._explicit_threads
        with _bench.one_thread():
            assert dcnlib.get_num_threads() == 1
        assert _config._explicit_threads == before

    @needs_torch
    def test_restores_torch(self):
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(2)
        with _bench.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        torch.set_num_threads(before)


@needs_torch
@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_calls_compute_the_layer(channels_last):
    layer = Layer(8, 12, 9, 3, stride=2, groups=4, dilation=2, offset_groups=2)
    input, offset, weight, bias, mask, grad_output = _bench.arrays(layer)
    place = (layer.stride, layer.padding, layer.dilation, mask)
    expected = dcnlib.deform_conv2d(input, offset, weight, bias, *place)
    grads = dcnlib.deform_conv2d_backward(grad_output, input, offset, weight, bias, *place)
    forward, both = _bench.torch_calls(layer, ["conv2d"], channels_last=channels_last)
    np.testing.assert_array_equal(forward["dcnlib"]().numpy(), expected)
    for got, want in zip(both["dcnlib"](), grads, strict=True):
        np.testing.assert_array_equal(got.numpy(), want)
    assert forward["conv2d"]().shape == expected.shape
    assert len(both["conv2d"]()) == 3
