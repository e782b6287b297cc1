"""The operators on data: from tensors to addresses, new memory for results, one backend call.

torch's dispatcher picks the function here by device, below autograd; `_dispatch` picks the backend.
Tensors in channels-last format go to backends as they are. Other strides are made contiguous first.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _config
from .._dispatch import choose
from .._problem import DeformConv2dProblem, value_error
from .schemas import (
    BACKWARD,
    FORWARD,
    LIBRARY,
    check_dense,
    new_gradients,
    new_output,
    problem,
    wanted,
)


def register() -> None:
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(FORWARD, _forward, device)
        LIBRARY.impl(BACKWARD, _backward, device)
    # Every other device, and sparse, quantized and nested tensors, which count as devices.
    LIBRARY.impl(FORWARD, _no_forward, "CompositeExplicitAutograd")
    LIBRARY.impl(BACKWARD, _no_backward, "CompositeExplicitAutograd")


def _forward(
    input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), mask=None,
    *, groups=None, offset_groups=None, backend=None,
):  # fmt: skip
    call = problem(
        FORWARD, None, input, offset, weight, bias, stride, padding, dilation, mask,
        groups=groups, offset_groups=offset_groups, symbolic=False,
    )  # fmt: skip
    chosen = choose(FORWARD, backend, input.device.type)
    if chosen.name == "reference":
        return _reference_forward(chosen, call, input, offset, weight, bias, mask)
    input = _dense(FORWARD, "input", input, call.channels_last)
    offset = _dense(FORWARD, "offset", offset)
    weight = _dense(FORWARD, "weight", weight)
    bias = _dense(FORWARD, "bias", bias)
    mask = _dense(FORWARD, "mask", mask)
    output = new_output(call, input)
    if chosen.name == "cuda":  # it takes tensors: torch multiplies its matrices
        chosen.forward(call, input, offset, weight, bias, mask, output)
        return output
    chosen.forward(
        call,
        input.data_ptr(),
        offset.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if mask is None else mask.data_ptr(),
        output.data_ptr(),
        num_threads=_config.num_threads(torch.get_num_threads()),
    )
    return output


def _backward(
    grad_output, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, *, groups=None, offset_groups=None, backend=None,
    output_mask=(True, True, True, True, True),
):  # fmt: skip
    output_mask = wanted(BACKWARD, output_mask, mask)
    call = problem(
        BACKWARD, grad_output, input, offset, weight, bias, stride, padding, dilation, mask,
        groups=groups, offset_groups=offset_groups, wants_bias=output_mask[3], symbolic=False,
    )  # fmt: skip
    chosen = choose(BACKWARD, backend, input.device.type)
    if chosen.name == "reference":
        return _reference_backward(
            chosen, call, grad_output, input, offset, weight, mask, output_mask
        )
    grad_output = _dense(BACKWARD, "grad_output", grad_output, call.channels_last)
    input = _dense(BACKWARD, "input", input, call.channels_last)
    offset = _dense(BACKWARD, "offset", offset)
    weight = _dense(BACKWARD, "weight", weight)
    mask = _dense(BACKWARD, "mask", mask)
    grads = new_gradients(call, input, output_mask)
    if chosen.name == "cuda":
        asked = [g if w else None for g, w in zip(grads, output_mask, strict=True)]
        chosen.backward(call, grad_output, input, offset, weight, mask, asked)
    elif any(output_mask):
        chosen.backward(
            call,
            grad_output.data_ptr(),
            input.data_ptr(),
            offset.data_ptr(),
            weight.data_ptr(),
            None if mask is None else mask.data_ptr(),
            [g.data_ptr() if is_wanted else None for g, is_wanted in zip(grads, output_mask)],
            num_threads=_config.num_threads(torch.get_num_threads()),
        )
    return grads


def _dense(
    op: str, name: str, tensor: Tensor | None, channels_last: bool = False
) -> Tensor | None:
    """`tensor` as native code reads it: whole, in order, aligned."""
    if tensor is None:
        return None
    if channels_last:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    else:
        tensor = tensor.contiguous()
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise value_error(
            op,
            name,
            "its memory has been freed",
            f"{tensor.numel() * tensor.element_size()} bytes of storage",
            f"{tensor.untyped_storage().nbytes()} bytes",
        )
    return tensor.clone() if address % tensor.element_size() else tensor


def _no_forward(
    input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), mask=None,
    *, groups=None, offset_groups=None, backend=None,
):  # fmt: skip
    check_dense(FORWARD, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    choose(FORWARD, backend, input.device.type)


def _no_backward(
    grad_output, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, *, groups=None, offset_groups=None, backend=None,
    output_mask=(True, True, True, True, True),
):  # fmt: skip
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    check_dense(BACKWARD, grad_output=grad_output, **tensors)
    choose(BACKWARD, backend, input.device.type)


# The reference backend takes arrays. NumPy has no bfloat16: its operands go as float32, which holds
# them exactly, and its results come as float64 and are rounded here.


def _reference_forward(
    reference: ModuleType, call: DeformConv2dProblem, input: Tensor, *others: Tensor | None
) -> Tensor:
    output = np.empty(call.output_shape, _result_dtype(call))
    reference.forward(call, *_arrays(call, input, *others), output)
    result = new_output(call, input)
    result.copy_(_tensor(reference, call, output).view(result.shape))
    return result


def _reference_backward(
    reference: ModuleType,
    call: DeformConv2dProblem,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    shapes = (
        call.input_shape,
        call.offset_shape,
        call.weight_shape,
        call.bias_shape,
        call.mask_shape,
    )
    grads = [
        np.empty(shape, _result_dtype(call)) if is_wanted else None
        for shape, is_wanted in zip(shapes, output_mask, strict=True)
    ]
    reference.backward(call, *_arrays(call, grad_output, input, offset, weight, mask), grads)
    results = new_gradients(call, input, output_mask)
    for result, grad in zip(results, grads, strict=True):
        if grad is not None:
            result.copy_(_tensor(reference, call, grad).view(result.shape))
    return results


def _result_dtype(call: DeformConv2dProblem) -> str:
    return "float64" if call.dtype == "bfloat16" else call.dtype


def _arrays(call: DeformConv2dProblem, *tensors: Tensor | None) -> list[np.ndarray | None]:
    """NumPy's view of the tensors, with a batch axis."""
    return [None if t is None else _array(call, t.detach()) for t in tensors]


def _array(call: DeformConv2dProblem, tensor: Tensor) -> np.ndarray:
    if tensor.dim() == 3 and not call.batched:
        tensor = tensor[None]
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous().numpy()


def _tensor(reference: Any, call: DeformConv2dProblem, array: np.ndarray) -> Tensor:
    if call.dtype == "bfloat16":
        array = reference.on_bfloat16_grid(array)
    return torch.from_numpy(array)
