"""`python -m dcnlib bench`: what this machine does, against a plain convolution.

One thread, processor time, alternating rounds in one process, medians of per-round figures: other
programs then disturb little. With torch, dcnlib's torch door runs against `conv2d` and, where it
can be imported, torchvision's operator; without torch, the NumPy door runs against nothing.

The table of every class, dtype and rival is `asv_bench/ratios.py`, which measures with this.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from . import _config
from ._info import cpu_model, version_of
from ._markdown import table
from ._version import __version__
from .functional import deform_conv2d, deform_conv2d_backward

BLOCK = "speed table"

#: Seconds that one round of a callable lasts, and the longest call that runs in every round even
#: if it is much slower than the others.
_ROUND, _SLOW = 0.03, 0.2

Call = Callable[[], object]


class Layer(NamedTuple):
    """A layer with padding dilation * (K // 2), on images of side x side or height x width."""

    channels: int
    out_channels: int
    side: int | tuple[int, int]
    kernel: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    offset_groups: int = 1
    batch: int = 1

    def __str__(self) -> str:
        height, width = self.size
        text = f"{self.channels} -> {self.out_channels}, {height} x {width}, K{self.kernel}"
        if self.batch > 1:
            text = f"{self.batch} x {text}"
        for name in ("stride", "dilation"):
            if getattr(self, name) > 1:
                text += f", {name} {getattr(self, name)}"
        if 1 < self.groups == self.channels:
            text += ", depthwise"
        elif self.groups > 1:
            text += f", groups {self.groups}"
        return text + (f", offset groups {self.offset_groups}" if self.offset_groups > 1 else "")

    @property
    def size(self) -> tuple[int, int]:
        return self.side if isinstance(self.side, tuple) else (self.side, self.side)

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = self.size
        return (height - 1) // self.stride + 1, (width - 1) // self.stride + 1

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel // 2)

    @property
    def flop(self) -> float:
        """Of the convolution alone, forward; backward is twice that."""
        taps = self.kernel**2 * self.channels // self.groups
        out_height, out_width = self.out_size
        return 2.0 * self.batch * taps * self.out_channels * out_height * out_width


#: One of each class of layers.
LAYERS = (
    Layer(128, 128, 56, 3),
    Layer(128, 128, 56, 3, stride=2),
    Layer(64, 64, 56, 3),
    Layer(32, 32, 80, 3),
    Layer(64, 64, 40, 5),
    Layer(64, 64, 28, 7),
    Layer(256, 256, 28, 1),
    Layer(512, 512, 14, 3),
    Layer(128, 128, 56, 3, groups=4, offset_groups=4),
    Layer(128, 128, 56, 3, groups=128),
    Layer(16, 16, 28, 3),
    Layer(16, 16, 28, 3, batch=32),
)
PASSES = ("forward", "forward + backward")


def bench(rounds: int = 5, layers: tuple[Layer, ...] = LAYERS) -> dict[str, Any]:
    """Measure; a dict that JSON can hold, with a row for each layer and pass."""
    rivals, rows = _rivals(), []
    with one_thread():
        for layer in layers:
            for name, calls in zip(PASSES, _calls(layer, rivals), strict=True):
                seconds = measure(calls, rounds)
                mine = seconds["dcnlib"]
                flop = layer.flop * (1 if name == "forward" else 3)
                row = {
                    "layer": str(layer),
                    "pass": name,
                    "ms": 1e3 * statistics.median(mine),
                    "gflops": 1e-9 * flop / statistics.median(mine),
                }
                row |= {f"ratio_{rival}": ratio(mine, seconds[rival]) for rival in rivals}
                rows.append(row)
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
    rivals, wide = report["against"], max(len(row["layer"]) for row in report["rows"])
    head = f"{'layer':<{wide}}  {'pass':<18} {'ms':>9} {'GFLOP/s':>8}"
    head += "".join(f"  {'time / ' + rival:>18}" for rival in rivals)
    lines = [_machine(report), "", head]
    for row in report["rows"]:
        line = f"{row['layer']:<{wide}}  {row['pass']:<18} {row['ms']:>9.3f} {row['gflops']:>8.1f}"
        lines.append(line + "".join(f"  {row[f'ratio_{rival}']:>18.2f}" for rival in rivals))
    if not rivals:
        lines += ["", "torch is not installed: nothing to compare with"]
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The report for the README."""
    rivals = report["against"]
    heads = ["layer, float32"]
    for name in PASSES:
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


def arrays(layer: Layer) -> tuple[np.ndarray, ...]:
    """input, offset, weight, bias, mask, grad_output; offsets spread by 2 pixels."""
    rng = np.random.default_rng(0)
    batch, taps = layer.batch, layer.offset_groups * layer.kernel**2

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return (
        normal(batch, layer.channels, *layer.size),
        2 * normal(batch, 2 * taps, *layer.out_size),
        normal(layer.out_channels, layer.channels // layer.groups, layer.kernel, layer.kernel),
        normal(layer.out_channels),
        rng.random((batch, taps, *layer.out_size), dtype=np.float32),
        normal(batch, layer.out_channels, *layer.out_size),
    )


def torch_calls(
    layer: Layer, rivals: list[str], dtype: str = "float32", channels_last: bool = False
) -> list[dict[str, Call]]:
    """For each of `PASSES`, dcnlib's torch door and the rivals on the same tensors."""
    import torch

    tensors = [torch.from_numpy(array).to(getattr(torch, dtype)) for array in arrays(layer)]
    if channels_last:
        tensors[0], tensors[5] = (
            tensors[i].contiguous(memory_format=torch.channels_last) for i in (0, 5)
        )
    input, offset, weight, bias, mask, grad_output = tensors
    place = (layer.stride, layer.padding, layer.dilation)

    def deform(operator):
        return lambda input, offset, weight, bias, mask: operator(
            input, offset, weight, bias, *place, mask
        )

    def conv2d(input, weight, bias):
        return torch.conv2d(input, weight, bias, *place, layer.groups)

    leaves = (input, offset, weight, bias, mask)
    operators = {"dcnlib": (deform(deform_conv2d), leaves)}
    if "conv2d" in rivals:
        operators["conv2d"] = (conv2d, (input, weight, bias))
    if "torchvision" in rivals:
        import torchvision.ops

        operators["torchvision"] = (deform(torchvision.ops.deform_conv2d), leaves)

    def forward(operator, leaves):
        def call():
            with torch.inference_mode():
                return operator(*leaves)

        return call

    def both(operator, leaves):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        return lambda: torch.autograd.grad(operator(*leaves), leaves, grad_output)

    return [{name: bind(*pair) for name, pair in operators.items()} for bind in (forward, both)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """dcnlib and, where it is installed, torch on one thread each."""
    before = _config._explicit_threads
    _config.set_num_threads(1)
    torch = None
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
    try:
        yield
    finally:
        _config._explicit_threads = before
        if torch is not None:
            torch.set_num_threads(torch_threads)


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Processor seconds a call of each callable in each round; the rounds alternate between them.

    What is long and far behind the fastest runs in the first round only.
    """
    # Once so much has been given back, glibc keeps what it gets: else large results, of one side or the
    # other as it happens, are pages that the system clears again in each call.
    np.empty(31 << 20, np.uint8)
    once = {}
    for name, call in calls.items():
        call()
        once[name] = max(_seconds(call, 1), 1e-6)
    behind = max(_SLOW, 3 * min(once.values()))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number == 0 or once[name] < behind:
                seconds[name].append(_seconds(call, max(1, round(_ROUND / once[name]))))
    return seconds


def ratio(mine: list[float], other: list[float]) -> float:
    """The median of the per-round ratios, over the rounds that both ran in."""
    return statistics.median(a / b for a, b in zip(mine, other, strict=False))


def _rivals() -> list[str]:
    """What can be compared with: conv2d with torch, and torchvision where it loads."""
    if importlib.util.find_spec("torch") is None:
        return []
    try:
        import torchvision.ops  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: made for another torch
        return ["conv2d"]
    return ["conv2d", "torchvision"]


def _calls(layer: Layer, rivals: list[str]) -> list[dict[str, Call]]:
    """For each pass, the callables to measure, under the names of the table."""
    return torch_calls(layer, rivals) if rivals else _numpy_calls(layer, *arrays(layer))


def _numpy_calls(layer, input, offset, weight, bias, mask, grad_output):
    place = (layer.stride, layer.padding, layer.dilation, mask)

    def forward():
        return deform_conv2d(input, offset, weight, bias, *place)

    def both():
        forward()
        return deform_conv2d_backward(grad_output, input, offset, weight, bias, *place)

    return [{"dcnlib": forward}, {"dcnlib": both}]


def _seconds(call: Call, repeat: int) -> float:
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
