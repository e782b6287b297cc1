"""Times of the CUDA backend beside its yardsticks, on one GPU: lines of JSON, and a table of them.

    python asv_bench/gpu/bench.py --output results.jsonl     all of it, under three minutes
    python asv_bench/gpu/bench.py --table results.jsonl      the ratios
    python asv_bench/gpu/bench.py --profile                  one launch of every kernel, for ncu
    python asv_bench/gpu/bench.py --rehearse --output FILE   tiny sizes through the emulation: only
                                                             shows that the script works

Every time is the median of single calls between CUDA events, with the inputs rotated so that the
second-level cache holds none of them; each is taken twice, and both stand in the file. Offsets are
normal with a standard deviation of 2 pixels where nothing else is said; mask and bias are on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dcnlib
from dcnlib.backends import cuda


class Layer(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


LAYERS = [Layer(8, 256, 56, 56), Layer(32, 256, 56, 56), Layer(8, 256, 100, 152)]
LAYERS += [Layer(32, 64, 56, 56), Layer(32, 512, 7, 7)]
TINY = [Layer(2, 16, 6, 7)]
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
#: The backend's variants: its settings, and whether the input's gradient is sorted.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "v0": ({"kernels": "planar"}, False),
    "v0.5": ({"kernels": "rows"}, False),
    "v0.5 sorted": ({"kernels": "rows"}, True),
    "v0.5 rounded": ({"kernels": "rows", "samples": "rounded"}, False),
}


class Bench:
    """Where it runs, and the file that it fills."""

    def __init__(self, output: str | None, rehearse: bool, seconds: float) -> None:
        self.device = "cpu" if rehearse else "cuda"
        self.rehearse = rehearse
        self.layers = TINY if rehearse else LAYERS
        self.output = output
        self.end = time.monotonic() + seconds
        self.backend = "cuda" if rehearse else None

    def write(self, **row: Any) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if self.output:
            with open(self.output, "a") as file:
                print(line, file=file)

    def times(self, calls: list[Callable[[], object]], least: int = 12) -> list[float]:
        """Two medians in milliseconds, the calls in turn."""
        if self.rehearse:
            begin = time.perf_counter()
            calls[0]()
            return [1e3 * (time.perf_counter() - begin)] * 2
        for call in calls:
            call()
        medians = []
        for _ in range(2):
            events = []
            for turn in range(least):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                calls[turn % len(calls)]()
                end.record()
                events.append((begin, end))
            torch.cuda.synchronize()
            medians.append(statistics.median(begin.elapsed_time(end) for begin, end in events))
        return medians

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call takes beyond what is there, its result included."""
        if self.rehearse:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def room(self) -> bool:
        return time.monotonic() < self.end


def tensors(
    bench: Bench, layer: Layer, dtype: torch.dtype, sigma: float
) -> dict[str, torch.Tensor]:
    """The arguments of a 3 x 3 call, channels last."""
    n, c, h, w = layer
    make = partial(torch.randn, device=bench.device, dtype=dtype)
    return {
        "input": make(n, c, h, w).contiguous(memory_format=torch.channels_last),
        "offset": sigma * make(n, 18, h, w),
        "weight": make(c, c, 3, 3) / (9 * c) ** 0.5,
        "bias": make(c),
        "mask": torch.rand(n, 9, h, w, device=bench.device, dtype=dtype),
    }


def implementations() -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """Name and function of (input, offset, weight, bias, mask)."""

    def dense(input, offset, weight, bias, mask):
        last = weight.contiguous(memory_format=torch.channels_last)
        return torch.nn.functional.conv2d(input, last, bias, padding=1)

    def ours(input, offset, weight, bias, mask, backend=None):
        return dcnlib.deform_conv2d(
            input, offset, weight, bias, padding=1, mask=mask, backend=backend
        )

    yield "conv2d", dense
    with contextlib.suppress(ImportError, RuntimeError):
        other = importlib.import_module("torchvision.ops").deform_conv2d
        yield "torchvision", lambda i, o, w, b, m: other(i, o, w, b, padding=1, mask=m)
    yield from ((name, ours) for name in VARIANTS)


@contextlib.contextmanager
def variant(name: str, tf32: bool, rehearse: bool) -> Iterator[None]:
    """The settings of a row of the table."""
    changes, deterministic = VARIANTS.get(name, ({}, False))
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)
    try:
        with cuda.settings(emulate=rehearse, **changes):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def measure_layer(bench: Bench, layer: Layer, dtype_name: str, sigma: float) -> None:
    """Forward and backward of every implementation."""
    dtype = DTYPES[dtype_name]
    sets = [tensors(bench, layer, dtype, sigma) for _ in range(1 if bench.rehearse else 3)]
    grad = torch.ones_like(sets[0]["input"])
    for name, function in implementations():
        if name == "v0.5 rounded" and dtype == torch.float32:
            continue
        if bench.rehearse and name in VARIANTS:
            function = partial(function, backend="cuda")
        row = {"kind": "layer", "layer": str(layer), "dtype": dtype_name, "sigma": sigma}
        row["implementation"] = name
        try:
            with variant(name, dtype_name == "tf32", bench.rehearse):
                with torch.no_grad():
                    calls = [partial(function, **s) for s in sets]
                    bench.write(
                        **row,
                        direction="forward",
                        ms=bench.times(calls),
                        bytes=bench.peak(calls[0]),
                    )

                calls = [backward_of(function, s, grad) for s in sets]
                bench.write(
                    **row,
                    direction="backward",
                    ms=bench.times(calls, 8),
                    bytes=bench.peak(calls[0]),
                )
        except (RuntimeError, NotImplementedError) as error:
            bench.write(**row, error=str(error).splitlines()[0][:200])


def backward_of(function, arguments: dict[str, torch.Tensor], grad: torch.Tensor):
    """A call that computes the gradients of all arguments, as often as it is called."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    output = function(**leaves)
    # A dense convolution has none for offset and mask.
    return partial(
        torch.autograd.grad, output, [*leaves.values()], grad, retain_graph=True, allow_unused=True
    )


def ceilings(bench: Bench) -> None:
    """What the device can do: copies and products; tools/gpu/rates.cu has reads and additions."""
    count = 1 << 10 if bench.rehearse else 1 << 28
    side = 64 if bench.rehearse else 8192
    make = partial(torch.randn, device=bench.device)

    source = make(count)
    target = torch.empty_like(source)
    ms = bench.times([partial(target.copy_, source)])
    bench.write(kind="ceiling", what="copy", ms=ms, rate=8e-9 * count / min(ms), unit="TB/s")
    del source, target
    for name, dtype in DTYPES.items():
        a, b = (make(side, side).to(dtype) for _ in range(2))
        with variant("", name == "tf32", bench.rehearse):
            ms = bench.times([lambda a=a, b=b: a @ b])
        bench.write(
            kind="ceiling", what=f"product {name}", ms=ms,
            rate=2e-9 * side**3 / min(ms), unit="TFLOP/s",
        )  # fmt: skip


def workspaces(bench: Bench) -> None:
    """The forward time of one layer by the workspace's size."""
    layer = bench.layers[min(1, len(bench.layers) - 1)]
    call = tensors(bench, layer, torch.bfloat16, 2.0)
    for mib in (32, 64, 128, 256):
        with cuda.settings(workspace=mib << 20, emulate=bench.rehearse), torch.no_grad():
            run = partial(dcnlib.deform_conv2d, **call, padding=1, backend=bench.backend)
            bench.write(kind="workspace", layer=str(layer), mib=mib, ms=bench.times([run]))


def profile(bench: Bench) -> None:
    """One launch of every kernel in float32 and bfloat16, without warming up: for a profiler."""
    for dtype in (torch.float32, torch.bfloat16):
        call = tensors(bench, bench.layers[0], dtype, 2.0)
        for name, (changes, deterministic) in VARIANTS.items():
            if name == "v0":  # NCHW, for the kernels of that layout
                leaves = {k: t.detach().contiguous().requires_grad_() for k, t in call.items()}
            else:
                leaves = {k: t.detach().requires_grad_() for k, t in call.items()}
            torch.use_deterministic_algorithms(deterministic)
            with cuda.settings(workspace=2 << 30, emulate=bench.rehearse, **changes):
                output = dcnlib.deform_conv2d(**leaves, padding=1, backend=bench.backend)
                output.backward(torch.ones_like(output))
    torch.use_deterministic_algorithms(False)


def table(path: Path) -> str:
    """Times, their ratios to conv2d and peak memory, a line for each layer, type and direction."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cells: dict[tuple[str, ...], dict[str, tuple[float, int | None]]] = {}
    for row in rows:
        if row["kind"] == "layer" and "ms" in row:
            key = (row["layer"], row["dtype"], f"sigma {row['sigma']:g}", row["direction"])
            cells.setdefault(key, {})[row["implementation"]] = min(row["ms"]), row["bytes"]
    lines = [
        f"{r['what']:32} {r['rate']:10.2f} {r['unit']}" for r in rows if r["kind"] == "ceiling"
    ]
    for key, found in cells.items():
        dense, _ = found.get("conv2d", (None, None))
        shown = []
        for name, (ms, peak) in found.items():
            ratio = f" {ms / dense:.2f}x" if dense else ""
            memory = "" if peak is None else f" {peak / 2**20:.0f} MiB"
            shown.append(f"{name} {ms:.3f} ms{ratio}{memory}")
        lines.append(f"{' '.join(key)}: {', '.join(shown)}")
    return "\n".join(lines)[:12000]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=125)
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return 0
    bench = Bench(options.output, options.rehearse, options.seconds)
    # torch wants it set before products run under deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Else deterministic algorithms would be charged for filling what is overwritten anyway.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(0)
    if options.profile:
        profile(bench)
        return 0
    if not bench.rehearse:
        bench.write(
            kind="machine", device=torch.cuda.get_device_name(), torch=torch.__version__,
            cuda=torch.version.cuda, dcnlib=dcnlib.__version__,
        )  # fmt: skip
    ceilings(bench)
    for dtype in ("bfloat16", "float16", "tf32", "float32"):
        for layer in bench.layers:
            if bench.room():
                measure_layer(bench, layer, dtype, 2.0)
    for sigma in (0.0, 8.0):
        if bench.room():
            measure_layer(bench, bench.layers[0], "bfloat16", sigma)
    if bench.room():
        workspaces(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
