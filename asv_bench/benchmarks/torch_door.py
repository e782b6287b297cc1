"""The layers through torch, as people train and infer: `deform_conv2d` with autograd around it."""

from __future__ import annotations

from .common import LAYERS, Case, Timed, arrays, need_cuda, need_torch, options

_PASSES = ["inference", "forward and backward"]


def _call(case: Case, which: str, device: str = "cpu"):
    torch = need_torch()
    import dcnlib

    torch.set_num_threads(1)
    *leaves, grad_output = (torch.from_numpy(array).to(device) for array in arrays(case))
    keywords = options(case)

    def run():
        input, offset, weight, bias, mask = leaves
        return dcnlib.deform_conv2d(input, offset, weight, bias, mask=mask, **keywords)

    def inference():
        with torch.inference_mode():
            return run()

    def both():
        return torch.autograd.grad(run(), leaves, grad_output)

    for leaf in leaves:
        leaf.requires_grad_(which != "inference")
    call = inference if which == "inference" else both
    call()
    return call


class Cpu(Timed):
    params = [list(LAYERS), _PASSES]
    param_names = ["layer", "pass"]

    def setup(self, layer, which):
        self.call = _call(LAYERS[layer], which)

    def time_call(self, *parameters):
        self.call()


class Cuda:
    """Time on the device: the median of pairs of events, inputs larger than its caches in turn."""

    params = [list(LAYERS), _PASSES]
    param_names = ["layer", "pass"]

    def setup(self, layer, which):
        need_cuda()
        self.calls = [_call(LAYERS[layer], which, "cuda") for _ in range(4)]

    def track_device_us(self, *parameters):
        import torch

        pairs = []
        for number in range(48):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            self.calls[number % len(self.calls)]()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        times = sorted(start.elapsed_time(end) for start, end in pairs[8:])
        return 1e3 * times[len(times) // 2]

    track_device_us.unit = "us"

    def track_peak_bytes(self, *parameters):
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.calls[0]()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    track_peak_bytes.unit = "bytes"
