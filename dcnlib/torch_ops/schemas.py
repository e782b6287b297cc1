"""The operators' signatures, what a call of them means, and results without data.

Every kernel begins with `problem`: a raw call of ``torch.ops.dcnlib`` gets the same errors as the
public functions. Fake kernels serve meta and fake tensors; their sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .._dispatch import check_name
from .._problem import (
    DeformConv2dProblem,
    Shape,
    deform_conv2d_problem,
    four_sides,
    optional_integer,
    pair,
    type_error,
    value_error,
)

FORWARD, BACKWARD = "deform_conv2d", "deform_conv2d_backward"

# Padding is (top, bottom, left, right). `output_mask` tells which gradients are wanted, of input,
# offset, weight, bias and mask; the others come back empty. The backward pass reads no values of
# bias: its gradient can be had without it.
_CALL = (
    "Tensor input, Tensor offset, Tensor weight, Tensor? bias=None, int[2] stride=1, "
    "int[4] padding=0, int[2] dilation=1, Tensor? mask=None, int? groups=None, "
    "int? offset_groups=None, str? backend=None"
)
_SCHEMAS = (
    f"{FORWARD}({_CALL}) -> Tensor",
    f"{BACKWARD}(Tensor grad_output, {_CALL}, bool[5] output_mask=[True, True, True, True, True])"
    " -> (Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_mask)",
)

LIBRARY = torch.library.Library("dcnlib", "FRAGMENT")


def _define() -> bool:
    if hasattr(torch.ops.dcnlib, FORWARD):
        return False
    for schema in _SCHEMAS:
        LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    return True


#: False if this process has the operators already, from another import of this package.
DEFINED_HERE = _define()
forward_operator = torch.ops.dcnlib.deform_conv2d.default
backward_operator = torch.ops.dcnlib.deform_conv2d_backward.default

_DTYPE_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def register() -> None:
    torch.library.register_fake(f"dcnlib::{FORWARD}", _fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"dcnlib::{BACKWARD}", _fake_backward, lib=LIBRARY)


def problem(
    op: str,
    grad_output: Tensor | None,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    groups: int | None = None,
    offset_groups: int | None = None,
    backend: str | None = None,
    *,
    channels_last: bool = False,
    symbolic: bool = True,
) -> DeformConv2dProblem:
    """Check a call, given as to the operator, and describe it; `backend` has no say in that.

    Where no size is a symbol, a repeated call costs one look-up.
    """
    device = input.device
    if not (
        offset.device == device
        and weight.device == device
        and (bias is None or bias.device == device)
        and (mask is None or mask.device == device)
        and (grad_output is None or grad_output.device == device)
    ):
        raise _different_devices(op, device, (grad_output, input, offset, weight, bias, mask))
    return (_problem if symbolic else _cached_problem)(
        op,
        (input.shape, input.dtype),
        (offset.shape, offset.dtype),
        (weight.shape, weight.dtype),
        None if bias is None else (bias.shape, bias.dtype),
        None if mask is None else (mask.shape, mask.dtype),
        None if grad_output is None else (grad_output.shape, grad_output.dtype),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        offset_groups,
        channels_last,
    )


def wanted(op: str, output_mask: Sequence[bool], mask: Tensor | None) -> tuple[bool, ...]:
    """`output_mask` checked; a mask that is not there has no gradient."""
    if len(output_mask) != 5:
        raise value_error(
            op,
            "output_mask",
            "must tell for input, offset, weight, bias and mask",
            "5 values",
            list(output_mask),
        )
    return (*output_mask[:4], output_mask[4] and mask is not None)


def check_dense(op: str, **tensors: Tensor | None) -> None:
    """Only plain memory can be read: not sparse, quantized, nested or of another library."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.is_nested:
            got, cure = "a nested tensor", "call once for each of its tensors, or pad them"
        elif tensor.is_quantized:
            got, cure = f"a quantized tensor ({tensor.dtype})", "convert it with .dequantize()"
        elif tensor.layout is not torch.strided:
            got, cure = f"layout {tensor.layout}", "convert it with .to_dense()"
        else:
            continue
        raise type_error(op, name, "must be a dense tensor", "layout torch.strided", got, cure)


def new_like(tensor: Tensor, shape: Shape, channels_last: bool = False) -> Tensor:
    """An uninitialised tensor beside `tensor`."""
    if channels_last:
        return torch.empty(
            shape, dtype=tensor.dtype, device=tensor.device, memory_format=torch.channels_last
        )
    return tensor.new_empty(shape)


def new_output(problem: DeformConv2dProblem, input: Tensor) -> Tensor:
    """Memory for the result, in the caller's shape and the format of `input`."""
    return new_like(input, problem.unbatch(problem.output_shape), problem.channels_last)


def new_gradients(
    problem: DeformConv2dProblem,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Memory for the wanted gradients, each in the shape of its argument; None for the others."""
    of_input, of_offset, of_weight, of_bias, of_mask = output_mask
    whole = torch.contiguous_format
    kept = torch.channels_last if problem.channels_last else whole
    return [
        torch.empty_like(input, memory_format=kept) if of_input else None,
        torch.empty_like(offset, memory_format=whole) if of_offset else None,
        torch.empty_like(weight, memory_format=whole) if of_weight else None,
        weight.new_empty(problem.bias_shape) if of_bias else None,
        torch.empty_like(mask, memory_format=whole) if of_mask else None,
    ]


def without_none(grads: Sequence[Tensor | None], input: Tensor) -> tuple[Tensor, ...]:
    """The same with empty tensors: an operator returns tensors only."""
    return tuple([input.new_empty(0) if grad is None else grad for grad in grads])


def _fake_forward(
    input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
    mask=None, groups=None, offset_groups=None, backend=None,
):  # fmt: skip
    check_dense(FORWARD, input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    check_name(FORWARD, backend)
    call = problem(
        FORWARD, None, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, channels_last=is_channels_last(input),
    )  # fmt: skip
    return new_output(call, input)


def _fake_backward(
    grad_output, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, groups=None, offset_groups=None, backend=None,
    output_mask=(True, True, True, True, True),
):  # fmt: skip
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    check_dense(BACKWARD, grad_output=grad_output, **tensors)
    check_name(BACKWARD, backend)
    call = problem(
        BACKWARD, grad_output, input, offset, weight, bias, stride, padding, dilation, mask,
        groups, offset_groups, channels_last=is_channels_last(input),
    )  # fmt: skip
    output_mask = wanted(BACKWARD, output_mask, mask)
    return without_none(new_gradients(call, input, offset, weight, mask, output_mask), input)


_TorchSpec = tuple[torch.Size, torch.dtype]


def _problem(
    op: str,
    input: _TorchSpec,
    offset: _TorchSpec,
    weight: _TorchSpec,
    bias: _TorchSpec | None,
    mask: _TorchSpec | None,
    grad_output: _TorchSpec | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int | None,
    offset_groups: int | None,
    channels_last: bool,
) -> DeformConv2dProblem:
    """`deform_conv2d_problem` of a raw call's sizes, dtypes and integers."""
    stride = pair(op, "stride", stride)
    dilation = pair(op, "dilation", dilation)
    padding = four_sides(op, padding, weight[0][-2:], stride, dilation)
    groups = optional_integer(op, "groups", groups)
    offset_groups = optional_integer(op, "offset_groups", offset_groups)
    specs = (
        None if spec is None else (tuple(spec[0]), _DTYPE_NAMES[spec[1]])
        for spec in (input, offset, weight, bias, mask, grad_output)
    )
    return deform_conv2d_problem(
        op, *specs, stride, padding, dilation, groups, offset_groups, channels_last
    )


_cached_problem = lru_cache(maxsize=1024)(_problem)


def is_channels_last(input: Tensor) -> bool:
    """Whether the memory of a batch of images is (N, H, W, C) and nothing else."""
    return (
        not input.is_contiguous()
        and input.dim() == 4
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def _different_devices(
    op: str, device: torch.device, tensors: Sequence[Tensor | None]
) -> ValueError:
    names = ("grad_output", "input", "offset", "weight", "bias", "mask")
    devices = {n: t.device for n, t in zip(names, tensors, strict=True) if t is not None}
    name = next(n for n, other in devices.items() if other != device)
    return value_error(
        op,
        name,
        "must be on the device of input",
        device,
        ", ".join(f"{n} on {d}" for n, d in devices.items()),
        "move them with .to(device)",
    )
