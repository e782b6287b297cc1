"""The CUDA backend: kernels behind a C ABI, torch for matrix products, memory and streams.

    _status.py     is there a compiled part, a driver, a device; the reasons
    _settings.py   workspace and the like
    _plan.py       how a call is cut into waves of images and chunks of pixels: integers only
    _pipeline.py   runs the passes of csrc/cuda and torch's products over those chunks
    _family.py     the same for RoI pooling and resampling, which have no products

Importing this imports neither torch nor the driver. Operands are torch tensors on one CUDA device, in
the shapes of `dcnlib.backends`, contiguous in the call's layout; with ``DCNLIB_CUDA_EMULATE=1`` CPU
tensors or NumPy arrays.
"""

from __future__ import annotations

from . import _status
from ._settings import Settings, current, settings

__all__ = [
    "Settings",
    "backward",
    "forward",
    "name",
    "resample_backward",
    "resample_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "settings",
    "why_not",
]

name = "cuda"


def why_not(device: str) -> str | None:
    """The reason why this backend cannot run on that device, None if it can."""
    if current().emulate:
        core = _status.core(True)
        if isinstance(core, str):
            return core
        return None if device == "cpu" else "it is emulated on the CPU (DCNLIB_CUDA_EMULATE=1)"
    if device != "cuda":
        return f"it computes on NVIDIA GPUs; move the tensors there with .cuda() (they are on {device})"
    return _status.why_no_device()


def forward(problem, input, offset, weight, bias, mask, output) -> None:
    """Fill `output` on its device's current stream."""
    from . import _pipeline

    _pipeline.forward(problem, input, offset, weight, bias, mask, output)


def backward(problem, grad_output, input, offset, weight, mask, grads) -> None:
    """Fill the wanted `grads` on their device's current stream."""
    from . import _pipeline

    _pipeline.backward(problem, grad_output, input, offset, weight, mask, grads)


def roi_pool_forward(problem, input, rois, offset, mask, output) -> None:
    """Fill `output` on its device's current stream."""
    from . import _family

    _family.roi_pool_forward(problem, input, rois, offset, mask, output)


def roi_pool_backward(problem, grad_output, input, rois, offset, mask, grads) -> None:
    """Fill the wanted `grads` on their device's current stream."""
    from . import _family

    _family.roi_pool_backward(problem, grad_output, input, rois, offset, mask, grads)


def resample_forward(problem, input, offset, output) -> None:
    """Fill `output` on its device's current stream."""
    from . import _family

    _family.resample_forward(problem, input, offset, output)


def resample_backward(problem, grad_output, input, offset, grads) -> None:
    """Fill the wanted `grads` on their device's current stream."""
    from . import _family

    _family.resample_backward(problem, grad_output, input, offset, grads)
