"""How time, throughput and memory depend on kernel, stride and dilation, on one real layer.

128 channels on 28 x 28 pixels: the third stage of a ResNet at 224. Compare two commits with
``asv continuous -b "grid.Time.*'cpu'" BASE HEAD``, or rather with gate.py.
"""

from __future__ import annotations

from . import memory
from .common import BACKENDS, DIRECTIONS, Case, Timed, backend_call, least_seconds, need_cuda, skip


def case(kernel: int, stride: int, dilation: int) -> Case:
    return Case(128, 128, 28, 28, kernel, stride, dilation)


class _Grid:
    params = [BACKENDS, [1, 3, 5, 7], [1, 2], [1, 2, 3], DIRECTIONS]
    param_names = ["backend", "kernel", "stride", "dilation", "direction"]

    def setup(self, backend, kernel, stride, dilation, direction):
        self.call = backend_call(backend, case(kernel, stride, dilation), direction)


class Time(_Grid, Timed):
    def time_call(self, *parameters):
        self.call()


class Throughput(_Grid):
    """asv takes lower for better: ns_per_mac is to be judged, gflops to be looked at."""

    def track_ns_per_mac(self, backend, kernel, stride, dilation, direction):
        macs = case(kernel, stride, dilation).macs(direction)
        return 1e9 * least_seconds(self.call) / macs

    track_ns_per_mac.unit = "ns"

    def track_gflops(self, backend, kernel, stride, dilation, direction):
        macs = case(kernel, stride, dilation).macs(direction)
        return 2e-9 * macs / least_seconds(self.call)

    track_gflops.unit = "GFLOP/s"


class Memory(_Grid):
    """What a call adds to the memory in use, its result included."""

    def setup(self, backend, kernel, stride, dilation, direction):
        if backend == "cpu" and memory.why_not():
            skip(memory.why_not())
        memory.settle()
        super().setup(backend, kernel, stride, dilation, direction)

    def track_extra_bytes(self, backend, *parameters):
        if backend == "cpu":
            return memory.extra_bytes(self.call)
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.call()
        return torch.cuda.max_memory_allocated() - before

    track_extra_bytes.unit = "bytes"


class Peak(_Grid):
    """asv's view of memory, the whole process, with the same process doing nothing beside it."""

    def peakmem_call(self, *parameters):
        self.call()


class PeakBaseline:
    """The interpreter, NumPy, dcnlib and a tiny call: what `Peak` holds before its layer."""

    params = [BACKENDS]
    param_names = ["backend"]

    def setup(self, backend):
        if backend == "cuda":
            need_cuda()
        backend_call(backend, Case(1, 1, 4, 4, 3), "forward")

    def peakmem_baseline(self, backend):
        pass
