"""The operators on data: from tensors to a backend's operands, and new memory for results.

torch's dispatcher picks the function here by device, below autograd; `_dispatch` picks the backend:
"cpu" gets addresses, "cuda" tensors (it takes its workspace and its stream from torch), "reference"
arrays. Tensors in channels-last format stay so. Other strides are made contiguous first.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .. import _config
from .._dispatch import choose
from .._problem import DeformConv2dProblem, value_error
from . import packing
from .schemas import (
    BACKWARD,
    FORWARD,
    LIBRARY,
    check_dense,
    is_channels_last,
    new_gradients,
    new_output,
    problem,
    wanted,
    without_none,
)


def register() -> None:
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(FORWARD, forward, device)
        LIBRARY.impl(BACKWARD, backward, device)
    # Every other device, and sparse, quantized and nested tensors, which count as devices.
    for key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
        LIBRARY.impl(FORWARD, _no_forward, key)
        LIBRARY.impl(BACKWARD, _no_backward, key)


def forward(
    input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
    mask=None, groups=None, offset_groups=None, backend=None,
):  # fmt: skip
    call = problem(
        FORWARD, None, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, channels_last=is_channels_last(input), symbolic=False,
    )  # fmt: skip
    return run_forward(call, backend, input, offset, weight, bias, mask)


def run_forward(
    call: DeformConv2dProblem,
    backend: str | None,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The result of a checked call."""
    chosen = choose(FORWARD, backend, "cuda" if input.is_cuda else "cpu")
    try:
        input = _dense(FORWARD, "input", input, call.channels_last)
        offset = _dense(FORWARD, "offset", offset)
        weight = _dense(FORWARD, "weight", weight)
        bias = _dense(FORWARD, "bias", bias)
        mask = _dense(FORWARD, "mask", mask)
        output = new_output(call, input)
    except RuntimeError as error:
        raise _memory_error(FORWARD, error) from None
    if chosen.name == "cpu":
        chosen.forward(
            call,
            input.data_ptr(),
            offset.data_ptr(),
            packing.operand(chosen, call, weight),
            None if bias is None else bias.data_ptr(),
            None if mask is None else mask.data_ptr(),
            output.data_ptr(),
            num_threads=_config.num_threads(torch.get_num_threads()),
        )
    else:
        run = _reference_forward if chosen.name == "reference" else chosen.forward
        input, offset, mask, result = (_batched(call, t) for t in (input, offset, mask, output))
        run(call, input, offset, weight, bias, mask, result)
    return output


def backward(
    grad_output, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, groups=None, offset_groups=None, backend=None,
    output_mask=(True, True, True, True, True),
):  # fmt: skip
    output_mask = wanted(BACKWARD, output_mask, mask)
    call = problem(
        BACKWARD, grad_output, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, channels_last=is_channels_last(input), symbolic=False,
    )  # fmt: skip
    grads = run_backward(call, backend, grad_output, input, offset, weight, mask, output_mask)
    return without_none(grads, input)


def run_backward(
    call: DeformConv2dProblem,
    backend: str | None,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of a checked call, None where nobody wants one."""
    chosen = choose(BACKWARD, backend, "cuda" if input.is_cuda else "cpu")
    try:
        grad_output = _dense(BACKWARD, "grad_output", grad_output, call.channels_last)
        input = _dense(BACKWARD, "input", input, call.channels_last)
        offset = _dense(BACKWARD, "offset", offset)
        weight = _dense(BACKWARD, "weight", weight)
        mask = _dense(BACKWARD, "mask", mask)
        grads = new_gradients(call, input, offset, weight, mask, output_mask)
    except RuntimeError as error:
        raise _memory_error(BACKWARD, error) from None
    if chosen.name == "cpu":
        chosen.backward(
            call,
            grad_output.data_ptr(),
            input.data_ptr(),
            offset.data_ptr(),
            weight.data_ptr(),
            None if mask is None else mask.data_ptr(),
            [None if g is None else g.data_ptr() for g in grads],
            num_threads=_config.num_threads(torch.get_num_threads()),
        )
    else:
        run = _reference_backward if chosen.name == "reference" else chosen.backward
        grad_output, input, offset, mask = (
            _batched(call, t) for t in (grad_output, input, offset, mask)
        )
        filled = [g if i in (2, 3) else _batched(call, g) for i, g in enumerate(grads)]
        run(call, grad_output, input, offset, weight, mask, filled)
    return grads


def _dense(op: str, name: str, tensor: Tensor | None, channels_last: bool = False) -> Tensor | None:
    """`tensor` as native code reads it: whole, in order, aligned."""
    if tensor is None:
        return None
    if channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    elif not tensor.is_contiguous():
        tensor = tensor.contiguous()
    size = tensor.element_size()
    needed = (tensor.storage_offset() + tensor.numel()) * size
    # Whoever resizes a storage leaves tensors behind that reach beyond it.
    if tensor.untyped_storage().nbytes() < needed and tensor.numel():
        raise value_error(
            op,
            name,
            "its memory has been freed, all or in part",
            f"{needed} bytes of storage",
            f"{tensor.untyped_storage().nbytes()} bytes",
        )
    return tensor.clone() if tensor.data_ptr() % size else tensor


def _memory_error(op: str, error: RuntimeError) -> Exception:
    """What NumPy and the backends raise where torch's CPU allocator has a RuntimeError."""
    text = str(error)
    if "can't allocate memory" not in text:
        return error
    return MemoryError(
        f"{op}: memory: {text[text.index('DefaultCPUAllocator') :]}; use a smaller batch or image"
    )


def _batched(call: DeformConv2dProblem, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or call.batched else tensor[None]


def _no_forward(
    input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
    mask=None, groups=None, offset_groups=None, backend=None,
):  # fmt: skip
    check_dense(FORWARD, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    choose(FORWARD, backend, input.device.type)


def _no_backward(
    grad_output, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, groups=None, offset_groups=None, backend=None,
    output_mask=(True, True, True, True, True),
):  # fmt: skip
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    check_dense(BACKWARD, grad_output=grad_output, **tensors)
    choose(BACKWARD, backend, input.device.type)


# The reference takes arrays in the order of their axes, and NumPy has no bfloat16: such operands go
# as float32, which holds them exactly, and results come as float64 and are rounded here.


def _reference_forward(call: DeformConv2dProblem, *tensors: Tensor | None) -> None:
    *operands, output = tensors
    reference = choose(FORWARD, "reference", "cpu")
    result = _new_array(call, output)
    reference.forward(call, *map(_array, operands), result)
    _fill(reference, output, result)


def _reference_backward(call: DeformConv2dProblem, *tensors) -> None:
    *operands, grads = tensors
    reference = choose(BACKWARD, "reference", "cpu")
    results = [_new_array(call, grad) for grad in grads]
    reference.backward(call, *map(_array, operands), results)
    for grad, result in zip(grads, results, strict=True):
        _fill(reference, grad, result)


def _array(tensor: Tensor | None) -> np.ndarray | None:
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.detach().contiguous().numpy()


def _new_array(call: DeformConv2dProblem, tensor: Tensor | None) -> np.ndarray | None:
    if tensor is None:
        return None
    return np.empty(tensor.shape, "float64" if call.dtype == "bfloat16" else call.dtype)


def _fill(reference: ModuleType, tensor: Tensor | None, array: np.ndarray | None) -> None:
    if tensor is None:
        return
    if tensor.dtype == torch.bfloat16:
        array = reference.on_bfloat16_grid(array)
    tensor.copy_(torch.from_numpy(array))
