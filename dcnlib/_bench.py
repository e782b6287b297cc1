"""`python -m dcnlib bench`: what this machine does, against a plain convolution.

One thread, processor time, alternating rounds in one process, medians of per-round figures: other
programs then disturb little. With torch, dcnlib's torch door runs against `conv2d` and, where it
can be imported, torchvision's operator; without torch, the NumPy door runs against nothing.
"""

from __future__ import annotations

import datetime
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _config
from ._info import cpu_model, version_of
from ._markdown import table
from ._version import __version__
from .functional import deform_conv2d, deform_conv2d_backward

BLOCK = "speed table"


class Layer(NamedTuple):
    """A convolution with padding K // 2 on a square image."""

    channels: int
    out_channels: int
    side: int
    kernel: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        text = f"{self.channels} -> {self.out_channels}, {self.side} x {self.side}, K{self.kernel}"
        if self.stride > 1:
            text += f", stride {self.stride}"
        return text + (", depthwise" if self.groups > 1 else "")

    @property
    def out_side(self) -> int:
        return (self.side - 1) // self.stride + 1

    @property
    def flop(self) -> float:
        """Of the convolution alone, forward; backward is twice that."""
        taps = self.kernel**2 * self.channels // self.groups
        return 2.0 * taps * self.out_channels * self.out_side**2


LAYERS = (
    Layer(16, 16, 28, 3),
    Layer(64, 64, 56, 3),
    Layer(256, 256, 56, 3),
    Layer(512, 512, 14, 3),
    Layer(128, 256, 112, 3, stride=2),
    Layer(256, 256, 56, 3, groups=256),
)
_PASSES = ("forward", "forward + backward")


def bench(rounds: int = 5, layers: tuple[Layer, ...] = LAYERS) -> dict[str, Any]:
    """Measure; a dict that JSON can hold, with a row for each layer and pass."""
    setting = _config._explicit_threads
    _config.set_num_threads(1)
    try:
        rivals, rows = _rivals(), []
        for layer in layers:
            for name, calls in zip(_PASSES, _calls(layer, rivals), strict=True):
                seconds = _measure(calls, rounds)
                mine = seconds["dcnlib"]
                flop = layer.flop * (1 if name == "forward" else 3)
                row = {
                    "layer": str(layer),
                    "pass": name,
                    "ms": 1e3 * statistics.median(mine),
                    "gflops": 1e-9 * flop / statistics.median(mine),
                }
                for rival in rivals:
                    pairs = zip(mine, seconds[rival], strict=True)
                    row[f"ratio_{rival}"] = statistics.median(a / b for a, b in pairs)
                rows.append(row)
    finally:
        _config._explicit_threads = setting
    return {
        "dcnlib": __version__,
        "cpu": cpu_model(),
        "isa": str(_config.cpu_isa()),
        "threads": 1,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("numpy", "torch", "torchvision")},
        "against": rivals,
        "rounds": rounds,
        "rows": rows,
    }


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    rivals = report["against"]
    head = f"{'layer':<32} {'pass':<19} {'ms':>9} {'GFLOP/s':>8}"
    head += "".join(f"  {'time / ' + rival:>18}" for rival in rivals)
    lines = [_machine(report), "", head]
    for row in report["rows"]:
        line = f"{row['layer']:<32} {row['pass']:<19} {row['ms']:>9.3f} {row['gflops']:>8.1f}"
        lines.append(line + "".join(f"  {row[f'ratio_{rival}']:>18.2f}" for rival in rivals))
    if not rivals:
        lines += ["", "torch is not installed: nothing to compare with"]
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The report for the README."""
    rivals = report["against"]
    heads = ["layer, float32, batch 1"]
    for name in _PASSES:
        heads += [f"{name}, ms", "GFLOP/s", *(f"time / {rival}" for rival in rivals)]
    rows = []
    for layer in dict.fromkeys(row["layer"] for row in report["rows"]):
        cells = [layer.replace("->", "→").replace(" x ", " × ")]
        for row in report["rows"]:
            if row["layer"] == layer:
                cells += [f"{row['ms']:.2f}", f"{row['gflops']:.0f}"]
                cells += [f"{row[f'ratio_{rival}']:.2f}" for rival in rivals]
        rows.append(cells)
    return f"{table(heads, rows)}\n\n{_machine(report)}. `python -m dcnlib bench --markdown`"


def _rivals() -> list[str]:
    """What can be compared with: conv2d with torch, and torchvision where it loads."""
    if importlib.util.find_spec("torch") is None:
        return []
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: made for another torch
        return ["conv2d"]
    return ["conv2d", "torchvision"]


def _calls(layer: Layer, rivals: list[str]) -> list[dict[str, Callable[[], object]]]:
    """For each pass, the callables to measure, under the names of the table."""
    arrays = _arrays(layer)
    if not rivals:
        return _numpy_calls(layer, *arrays)
    return _torch_calls(layer, rivals, *arrays)


def _arrays(layer: Layer) -> tuple[np.ndarray, ...]:
    """input, offset, weight, bias, mask, grad_output; offsets spread by 2 pixels."""
    rng = np.random.default_rng(0)
    taps, side = layer.kernel**2, layer.out_side

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return (
        normal(1, layer.channels, layer.side, layer.side),
        2 * normal(1, 2 * taps, side, side),
        normal(layer.out_channels, layer.channels // layer.groups, layer.kernel, layer.kernel),
        normal(layer.out_channels),
        rng.random((1, taps, side, side), dtype=np.float32),
        normal(1, layer.out_channels, side, side),
    )


def _numpy_calls(layer, input, offset, weight, bias, mask, grad_output):
    options = {"stride": layer.stride, "padding": layer.kernel // 2, "mask": mask}

    def forward():
        return deform_conv2d(input, offset, weight, bias, **options)

    def both():
        forward()
        return deform_conv2d_backward(grad_output, input, offset, weight, bias, **options)

    return [{"dcnlib": forward}, {"dcnlib": both}]


def _torch_calls(layer, rivals, *arrays):
    import torch

    input, offset, weight, bias, mask, grad_output = map(torch.from_numpy, arrays)
    place = (layer.stride, layer.kernel // 2)

    def deform(operator):
        return lambda input, offset, weight, bias, mask: operator(
            input, offset, weight, bias, *place, mask=mask
        )

    leaves = (input, offset, weight, bias, mask)
    calls = {
        "dcnlib": (deform(deform_conv2d), leaves),
        "conv2d": (
            lambda input, weight, bias: torch.conv2d(
                input, weight, bias, *place, groups=layer.groups
            ),
            (input, weight, bias),
        ),
    }
    if "torchvision" in rivals:
        import torchvision.ops

        calls["torchvision"] = (deform(torchvision.ops.deform_conv2d), leaves)

    def forward(operator, leaves):
        with torch.inference_mode():
            return operator(*leaves)

    def both(operator, leaves):
        return torch.autograd.grad(operator(*leaves), leaves, grad_output)

    def bind(run, operator, leaves, gradients):
        leaves = [leaf.detach().clone().requires_grad_(gradients) for leaf in leaves]

        def call():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return run(operator, leaves)
            finally:
                torch.set_num_threads(threads)

        return call

    return [
        {name: bind(run, *call, gradients) for name, call in calls.items()}
        for run, gradients in ((forward, False), (both, True))
    ]


def _measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each callable in each round; the rounds alternate between them."""
    repeat = {}
    for name, call in calls.items():
        call()
        repeat[name] = max(1, round(0.04 / max(_seconds(call, 1), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, repeat[name]))
    return seconds


def _seconds(call: Callable[[], object], repeat: int) -> float:
    start = time.process_time()
    for _ in range(repeat):
        call()
    return (time.process_time() - start) / repeat


def _machine(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)
    return (
        f"{report['cpu']}, {report['isa']}, one thread, {report['date']}, "
        f"dcnlib {report['dcnlib']}, Python {report['python']}, {versions}"
    )
