"""The CPU backend: the compiled core behind the contract of `dcnlib.backends`."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from ... import _config


def _forked_with_openmp() -> bool:
    """Whether an OpenMP runtime came into this process by a fork: its threads stayed behind."""
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
        forked_without_exec = flags & 0x40
        return bool(forked_without_exec) and "libgomp" in Path("/proc/self/maps").read_text()
    except (OSError, ValueError, IndexError):  # no Linux
        return False


def _import_core():
    """The compiled part; with the wheel's own libgomp if the system has none.

    The copy has its plain name, so that whoever loads libgomp later, torch from 2.8 on, gets this one.
    """
    # "from . import" would call a missing module a circular import
    try:
        return importlib.import_module("._core", __name__)
    except ImportError as error:
        copy = Path(__file__).parents[2] / "_libs" / "libgomp.so.1"
        if "libgomp.so.1" not in str(error) or not copy.exists():
            raise
    import ctypes

    ctypes.CDLL(str(copy), ctypes.RTLD_GLOBAL)
    return importlib.import_module("._core", __name__)


_alone = _forked_with_openmp()
try:
    _core = _import_core()
except (ImportError, OSError) as error:
    raise ImportError(
        "dcnlib: its compiled part is missing or does not load "
        f"({error}); in a source folder run: python -m pip install -e . "
        "(or start Python in another folder to use an installed dcnlib)"
    ) from error
if _alone:
    _core.stay_alone()

name = "cpu"


def why_not(device: str) -> str | None:
    """None on CPUs; the reason elsewhere."""
    if device == "cpu":
        return None
    return f"it computes on the CPU; move the tensors there with .cpu() (they are on {device})"


def pack_weight(problem, weight):
    """`weight` as the kernels read it, to be given to `forward` in its place; a copy.

    It serves every call with these channels, kernel, groups, offset groups and dtype; "amx" has a
    form for outputs of 64 pixels and more and one for smaller ones. Other calls take `weight`.
    """
    return _core.PackedWeight(problem, _storage(weight))


def forward(problem, input, offset, weight, bias, mask, output, num_threads=None) -> None:
    """Fill `output`; operands as in `dcnlib.backends`, `weight` also from `pack_weight`."""
    if problem.dtype == "bfloat16":
        input, offset, weight, bias, mask, output = map(
            _storage, (input, offset, weight, bias, mask, output)
        )
    threads = _config.num_threads() if num_threads is None else num_threads
    _core.forward(problem, threads, input, offset, weight, bias, mask, output)


def backward(problem, grad_output, input, offset, weight, mask, grads, num_threads=None) -> None:
    """Fill the wanted `grads`; operands as in `dcnlib.backends`."""
    if problem.dtype == "bfloat16":
        grad_output, input, offset, weight, mask = map(
            _storage, (grad_output, input, offset, weight, mask)
        )
        grads = map(_storage, grads)
    threads = _config.num_threads() if num_threads is None else num_threads
    _core.backward(problem, threads, grad_output, input, offset, weight, mask, *grads)


def roi_pool_forward(problem, input, rois, offset, mask, output, num_threads=None) -> None:
    """Fill `output`; operands as in `dcnlib.backends`."""
    if problem.dtype == "bfloat16":
        input, offset, mask, output = map(_storage, (input, offset, mask, output))
    threads = _config.num_threads() if num_threads is None else num_threads
    _core.roi_pool_forward(problem, threads, input, rois, offset, mask, output)


def roi_pool_backward(
    problem, grad_output, input, rois, offset, mask, grads, num_threads=None
) -> None:
    """Fill the wanted `grads`; operands as in `dcnlib.backends`."""
    if problem.dtype == "bfloat16":
        grad_output, input, offset, mask = map(_storage, (grad_output, input, offset, mask))
        grads = map(_storage, grads)
    threads = _config.num_threads() if num_threads is None else num_threads
    _core.roi_pool_backward(problem, threads, grad_output, input, rois, offset, mask, *grads)


def resample_forward(problem, input, offset, output, num_threads=None) -> None:
    """Fill `output`; operands as in `dcnlib.backends`."""
    if problem.dtype == "bfloat16":
        input, offset, output = map(_storage, (input, offset, output))
    threads = _config.num_threads() if num_threads is None else num_threads
    _core.resample_forward(problem, threads, input, offset, output)


def resample_backward(problem, grad_output, input, offset, grads, num_threads=None) -> None:
    """Fill the wanted `grads`; operands as in `dcnlib.backends`."""
    if problem.dtype == "bfloat16":
        grad_output, input, offset = map(_storage, (grad_output, input, offset))
        grads = map(_storage, grads)
    threads = _config.num_threads() if num_threads is None else num_threads
    _core.resample_backward(problem, threads, grad_output, input, offset, *grads)


def _storage(operand):
    """NumPy lends no buffer of a dtype that is not its own: bfloat16 goes as its bits."""
    return operand.view(np.uint16) if isinstance(operand, np.ndarray) else operand
