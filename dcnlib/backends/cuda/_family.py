"""RoI pooling and resampling on a device: the passes of csrc/cuda in order, and memory for them.

As `_pipeline.py`: everything is queued on the current stream of the operands' device and nothing waits.
RoIs are cut into as many at a time as the workspace has room for. Under torch's deterministic
algorithms the input's gradient is summed in a fixed order, by far fewer threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..._problem_pool import DeformRoIPoolProblem
from ..._problem_resample import DeformResample2dProblem
from . import _settings, _status
from ._pipeline import _ARITHMETIC, _BLOCKS, _address, _multiprocessors, _on, _poisoned, _tensor


@torch.no_grad()
def roi_pool_forward(problem: DeformRoIPoolProblem, input, rois, offset, mask, output) -> None:
    """Fill `output`; operands as in this package's `__init__`."""
    input, rois, offset, mask, output = map(_tensor, (input, rois, offset, mask, output))
    if problem.rois == 0:
        return
    with _on(input):
        call = _roi_call(problem, input, rois=rois, offset=offset, mask=mask, output=output)
        for _, touches in _some_rois(problem, call, input, 0):
            call.pool(touches.data_ptr())


@torch.no_grad()
def roi_pool_backward(
    problem: DeformRoIPoolProblem, grad_output, input, rois, offset, mask, grads
) -> None:
    """Fill the wanted `grads`: of input, offset and mask."""
    operands = map(_tensor, (grad_output, input, rois, offset, mask, *grads))
    grad_output, input, rois, offset, mask, grad_input, grad_offset, grad_mask = operands
    arithmetic = _ARITHMETIC[input.dtype]
    with _on(input):
        sums = _zeros_for(grad_input, arithmetic)
        samples = grad_offset is not None or grad_mask is not None
        if problem.rois:
            call = _roi_call(
                problem, input, rois=rois, offset=offset, mask=mask, grad_output=grad_output,
                grad_offset=grad_offset, grad_mask=grad_mask,
            )  # fmt: skip
            values = 3 * problem.classes * problem.out_h * problem.out_w if samples else 0
            ordered = torch.are_deterministic_algorithms_enabled()
            for count, touches in _some_rois(problem, call, input, values * arithmetic.itemsize):
                if samples:
                    products = _empty(count * values, arithmetic, input)
                    call.sums(touches.data_ptr(), products.data_ptr())
                if sums is not None and problem.batch:
                    call.spread(touches.data_ptr(), ordered, sums.data_ptr())
        if sums is not None and sums is not grad_input:
            grad_input.copy_(sums)


@torch.no_grad()
def resample_forward(problem: DeformResample2dProblem, input, offset, output) -> None:
    """Fill `output`."""
    input, offset, output = map(_tensor, (input, offset, output))
    if problem.batch == 0:
        return
    with _on(input):
        _core().resample(problem, *_where(input), *map(_address, (input, offset, output)))


@torch.no_grad()
def resample_backward(problem: DeformResample2dProblem, grad_output, input, offset, grads) -> None:
    """Fill the wanted `grads`: of input and offset."""
    grad_output, input, offset, grad_input, grad_offset = map(
        _tensor, (grad_output, input, offset, *grads)
    )
    if problem.batch == 0:
        return
    with _on(input):
        sums = _zeros_for(grad_input, _ARITHMETIC[input.dtype])
        _core().resample_backward(
            problem, *_where(input), *map(_address, (grad_output, input, offset, grad_offset)),
            torch.are_deterministic_algorithms_enabled(), _address(sums),
        )  # fmt: skip
        if sums is not None and sums is not grad_input:
            grad_input.copy_(sums)


def _some_rois(
    problem: DeformRoIPoolProblem, call: Any, input: Tensor, more: int
) -> Iterator[tuple[int, Tensor]]:
    """As many RoIs at a time as fit into the workspace, `more` bytes each included, and their touches."""
    bytes = call.bytes()
    most = max(1, _settings.current().workspace // (bytes + more))
    most = min(most, problem.rois)
    touches = _empty(-(-most * bytes // 8), torch.float64, input)  # 8-byte aligned
    for first in range(0, problem.rois, most):
        count = min(most, problem.rois - first)
        call.touches(first, count, touches.data_ptr())
        yield count, touches


def _roi_call(problem: DeformRoIPoolProblem, input: Tensor, **operands: Tensor | None) -> Any:
    device, stream, blocks = _where(input)
    return _core().RoiCall(
        problem, device=device, stream=stream, blocks=blocks, input=_address(input),
        **{name: _address(operand) for name, operand in operands.items()},
    )  # fmt: skip


def _where(input: Tensor) -> tuple[int, int, int]:
    """Device, stream, and the most blocks of a launch."""
    chosen = _settings.current().blocks
    if not input.is_cuda:
        return 0, 0, chosen or 1 << 20
    device = input.get_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    return device, stream, chosen or _BLOCKS * _multiprocessors(device)


def _core() -> Any:
    return _status.core(_settings.current().emulate)


def _zeros_for(grad_input: Tensor | None, arithmetic: torch.dtype) -> Tensor | None:
    """Where the kernels add: the gradient itself if it has their type."""
    if grad_input is None:
        return None
    if grad_input.dtype == arithmetic:
        return grad_input.zero_()
    return torch.zeros_like(grad_input, dtype=arithmetic)


def _empty(count: int, dtype: torch.dtype, input: Tensor) -> Tensor:
    """New memory; the emulation's is full of NaN, so that nothing relies on what it holds."""
    memory = torch.empty(count, dtype=dtype, device=input.device)
    return _poisoned(memory) if _settings.current().emulate else memory
