"""What all benchmarks share: cases, inputs, calls, profiles, skipping.

Only the public names of dcnlib are used, so that the suite runs on old commits too.
"""

from __future__ import annotations

import os

# Before any OpenMP runtime loads: threads that spin while they wait spoil processor time.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import gc
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import numpy as np

Call = Callable[[], Any]

BACKENDS = ["cpu", "cuda"]
DIRECTIONS = ["forward", "backward"]
DTYPES = ["float32", "float64", "float16", "bfloat16"]

#: "quick" is for histories, less than a minute a commit; "full" takes more samples.
PROFILE = os.environ.get("DCNLIB_BENCH_PROFILE", "quick")


class Case(NamedTuple):
    """A layer with padding dilation * (K // 2), with mask and bias."""

    channels: int
    out_channels: int
    height: int
    width: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    batch: int = 1

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel // 2)

    @property
    def out_size(self) -> tuple[int, int]:
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1

    def macs(self, direction: str) -> int:
        """Multiply-adds of the convolution alone; the backward pass has twice as many."""
        out_height, out_width = self.out_size
        taps = self.kernel**2 * self.channels // self.groups
        forward = self.batch * taps * self.out_channels * out_height * out_width
        return forward if direction == "forward" else 2 * forward


#: Layers of real networks at usual image sizes (ResNet-50 at 224 and at 800 x 1216; others).
LAYERS = {
    "64@56x56": Case(64, 64, 56, 56, 3),
    "128@28x28": Case(128, 128, 28, 28, 3),
    "256@14x14": Case(256, 256, 14, 14, 3),
    "512@7x7": Case(512, 512, 7, 7, 3),
    "256@50x76": Case(256, 256, 50, 76, 3),
    "64@56x56 K5": Case(64, 64, 56, 56, 5),
    "256@28x28 K1": Case(256, 256, 28, 28, 1),
    "128@56x56 groups 4": Case(128, 128, 56, 56, 3, groups=4, offset_groups=4),
    "256@28x28 depthwise": Case(256, 256, 28, 28, 3, groups=256),
    "16@28x28 batch 32": Case(16, 16, 28, 28, 3, batch=32),
}
#: Nothing to compute: what remains is the call.
TINY = Case(1, 1, 1, 1, 1)


class Timed:
    """Attributes of the timing classes: processor time of one thread, few samples or many.

    Two rounds, which asv takes minutes apart: a busy neighbour rarely spoils both.
    """

    timer = staticmethod(time.process_time)
    number = 1
    rounds = 2
    warmup_time = 0.02 if PROFILE == "quick" else 0.1
    repeat = (3, 12, 0.15) if PROFILE == "quick" else (5, 40, 2.0)


def skip(reason: str) -> NoReturn:
    """Leave a benchmark out; for `setup`."""
    print(f"skipped: {reason}")
    raise NotImplementedError(reason)


@lru_cache(maxsize=2)
def arrays(case: Case, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    """input, offset, weight, bias, mask, grad_output; offsets spread by 2 pixels."""
    rng = np.random.default_rng(0)
    taps = case.offset_groups * case.kernel**2
    normal = rng.standard_normal
    made = (
        normal((case.batch, case.channels, case.height, case.width), np.float32),
        2 * normal((case.batch, 2 * taps, *case.out_size), np.float32),
        normal(
            (case.out_channels, case.channels // case.groups, case.kernel, case.kernel), np.float32
        ),
        normal(case.out_channels, np.float32),
        rng.random((case.batch, taps, *case.out_size), np.float32),
        normal((case.batch, case.out_channels, *case.out_size), np.float32),
    )
    return tuple(array.astype(numpy_dtype(dtype), copy=False) for array in made)


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of that name; skips bfloat16 where ml_dtypes is missing."""
    if dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            skip("bfloat16: ml_dtypes is not installed")
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def options(case: Case) -> dict[str, int]:
    """The keyword arguments that go with `arrays`."""
    return {
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
        "offset_groups": case.offset_groups,
    }


def numpy_call(
    case: Case, direction: str, dtype: str = "float32", threads: int = 1, backend: str | None = None
) -> Call:
    """One pass through the NumPy door, run once to start threads and touch pages."""
    import dcnlib

    input, offset, weight, bias, mask, grad_output = arrays(case, dtype)
    keywords = options(case) | {"mask": mask, "backend": backend}
    dcnlib.set_num_threads(threads)

    def forward():
        return dcnlib.deform_conv2d(input, offset, weight, bias, **keywords)

    def backward():
        return dcnlib.deform_conv2d_backward(grad_output, input, offset, weight, bias, **keywords)

    call = forward if direction == "forward" else backward
    call()
    return call


def torch_call(case: Case, direction: str, dtype: str = "float32", device: str = "cpu") -> Call:
    """One pass through the torch door without autograd; on CUDA it ends with a synchronisation."""
    torch = need_torch()
    import dcnlib

    tensors = [torch.from_numpy(a).to(device, getattr(torch, dtype)) for a in arrays(case)]
    input, offset, weight, bias, mask, grad_output = tensors
    keywords = options(case) | {"mask": mask}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.set_num_threads(1)

    def forward():
        with torch.inference_mode():
            result = dcnlib.deform_conv2d(input, offset, weight, bias, **keywords)
        wait()
        return result

    def backward():
        with torch.inference_mode():
            result = dcnlib.deform_conv2d_backward(
                grad_output, input, offset, weight, bias, **keywords
            )
        wait()
        return result

    call = forward if direction == "forward" else backward
    call()
    return call


def backend_call(backend: str, case: Case, direction: str, dtype: str = "float32") -> Call:
    """One pass on a backend: NumPy arrays on the CPU, tensors on CUDA; skips what cannot run."""
    if backend == "cpu":
        return numpy_call(case, direction, dtype)
    need_cuda()
    return torch_call(case, direction, dtype, "cuda")


def need_torch():
    """torch; skips where it or dcnlib's torch door is missing."""
    try:
        import torch

        import dcnlib.torch_ops  # noqa: F401
    except ImportError as error:
        skip(f"torch: {error}")
    return torch


def need_cuda() -> None:
    """Skips where dcnlib cannot compute on CUDA, with dcnlib's own reason."""
    import dcnlib

    status = dcnlib.backends().get("cuda")
    if status is None or not status.available:
        skip(f"cuda: {status.reason if status else 'no such backend'}")
    if not need_torch().cuda.is_available():
        skip("cuda: torch finds no device")


def least_seconds(call: Call, timer=time.process_time, budget: float = 0.25) -> float:
    """The shortest of the calls that fit into `budget` seconds on the wall, at least three."""
    gc.disable()
    try:
        best, runs, end = float("inf"), 0, time.perf_counter() + budget
        while runs < 3 or time.perf_counter() < end:
            start = timer()
            call()
            best = min(best, timer() - start)
            runs += 1
        return best
    finally:
        gc.enable()
