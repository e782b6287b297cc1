"""Derivatives: what the operators do under torch's Autograd key.

First derivatives in reverse mode are the backward operator; double backward differentiates
`composite.backward`; a call with forward-mode tangents is composed of torch's own operators.

``torch.library.register_autograd`` would do for the first only: it refuses forward mode and every
``torch.func`` transform. So the kernels sit on the Autograd key themselves, at the price of a few
private names of torch, all of them in `_below_autograd`, `_apply` and `_Recorded`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as _Recorded

from . import composite
from .schemas import BACKWARD, FORWARD, LIBRARY, problem, wanted


def register() -> None:
    LIBRARY.impl(FORWARD, _forward, "Autograd", with_keyset=True)
    LIBRARY.impl(BACKWARD, _backward, "Autograd", with_keyset=True)


def _forward(
    keyset, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, **options,
):  # fmt: skip
    place = (stride, padding, dilation)
    tensors = (input, offset, weight, bias, mask)
    if _has_tangents(tensors):
        call = problem(
            FORWARD, None, input, offset, weight, bias, *place, mask, **options
        )
        return composite.forward(call, *tensors)
    if torch.is_grad_enabled() and _requires_grad(tensors):
        return _apply(_Forward, keyset, *tensors, place, options)
    return _below_autograd(
        torch.ops.dcnlib.deform_conv2d.default, keyset, *tensors[:4], *place, mask, **options
    )


def _backward(
    keyset, grad_output, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, *, output_mask=(True, True, True, True, True), **options,
):  # fmt: skip
    place = (stride, padding, dilation)
    tensors = (grad_output, input, offset, weight, mask)
    if _has_tangents(tensors):
        output_mask = wanted(BACKWARD, output_mask, mask)
        call = problem(
            BACKWARD, grad_output, input, offset, weight, bias, *place, mask, **options
        )
        grads = composite.backward(call, *tensors, output_mask)
        return tuple(input.new_empty(0) if grad is None else grad for grad in grads)
    if torch.is_grad_enabled() and _requires_grad(tensors):
        return _apply(_Backward, keyset, *tensors, bias, place, output_mask, options)
    return _below_autograd(
        torch.ops.dcnlib.deform_conv2d_backward.default, keyset, *tensors[:4], bias, *place, mask,
        output_mask=output_mask, **options,
    )  # fmt: skip


class _Forward(_Recorded):
    """The forward operator with its gradients."""

    @staticmethod
    def forward(ctx, keyset, input, offset, weight, bias, mask, place, options):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.place, ctx.options = place, options
        return _below_record(
            torch.ops.dcnlib.deform_conv2d.default,
            keyset, input, offset, weight, bias, *place, mask, **options,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 8
        input, offset, weight, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:6]
        grads = torch.ops.dcnlib.deform_conv2d_backward.default(
            grad_output, input, offset, weight, None, *ctx.place, mask, output_mask=needed,
            **ctx.options,
        )  # fmt: skip
        grads = (grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True))
        return None, *grads, None, None


class _Backward(_Recorded):
    """The backward operator with its gradients: those of `composite.backward`."""

    @staticmethod
    def forward(
        ctx, keyset, grad_output, input, offset, weight, mask, bias, place, output_mask, options
    ):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, offset, weight, mask)
        ctx.place, ctx.output_mask, ctx.options = place, output_mask, options
        return _below_record(
            torch.ops.dcnlib.deform_conv2d_backward.default,
            keyset, grad_output, input, offset, weight, bias, *place, mask,
            output_mask=output_mask, **options,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, *grads):
        grad_output, input, offset, weight, mask = ctx.saved_tensors
        call = problem(
            BACKWARD, grad_output, input, offset, weight, None, *ctx.place, mask, **ctx.options
        )
        needed = ctx.needs_input_grad[1:6]
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            # Stand-ins to differentiate by: equal tensors, on the way to what those depend on.
            tensors = [
                t.view_as(t).requires_grad_() if is_needed else t
                for t, is_needed in zip(ctx.saved_tensors, needed, strict=True)
            ]
            output_mask = [grad is not None for grad in grads]
            outputs = composite.backward(call, *tensors, output_mask)
            found = torch.autograd.grad(
                [output for output in outputs if output is not None],
                [t for t, is_needed in zip(tensors, needed, strict=True) if is_needed],
                [grad for grad in grads if grad is not None],
                create_graph=further,
                allow_unused=True,
            )
        found = iter(found)
        return None, *(next(found) if is_needed else None for is_needed in needed), *(None,) * 4


def _has_tangents(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether forward mode is at work on one of them."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _apply(function: type[_Recorded], *arguments: Any):
    """Record a call; under a ``torch.func`` transform for its level, like torch's own operators."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def _below_autograd(operator: torch._ops.OpOverload, keyset: Any, *arguments: Any, **options: Any):
    """The operator's next kernel: that of a device, or of the next level of ``torch.func``."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(
            keyset & torch._C._after_autograd_keyset, *arguments, **options
        )


def _below_record(*arguments: Any, **options: Any):
    """The same from within `_apply`, which has switched recording off: outer levels record too."""
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd(*arguments, **options)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below_autograd(*arguments, **options)
