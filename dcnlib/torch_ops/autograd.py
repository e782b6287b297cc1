"""Derivatives: what the operators do under torch's Autograd key.

First derivatives in reverse mode are the backward operator; double backward differentiates
`composite.backward`; a call with forward-mode tangents is composed of torch's own operators.

``torch.library.register_autograd`` would do for the first only: it refuses forward mode and every
``torch.func`` transform. So the kernels sit on the Autograd key themselves, at the price of a few
private names of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset as _AFTER_AUTOGRAD
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _is_any_autocast_enabled,
)
from torch._C import _dispatch_keys as _keys
from torch._C import _dispatch_tls_local_include_set as _included_keys
from torch._C._dynamo.guards import TensorGuards
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import _profiler_enabled, forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import has_torch_function

from .._problem import DeformConv2dProblem
from . import composite, kernels
from .schemas import (
    BACKWARD,
    FORWARD,
    LIBRARY,
    backward_operator,
    forward_operator,
    is_channels_last,
    problem,
    wanted,
    without_none,
)


def _bits(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(torch._C._dispatch_key_parse(name)) for name in names)
    return reduce(or_, keys).raw_repr()


#: All dispatch keys but those at work in every eager call, and but those of plain tensors.
_NOT_EAGER = ~_bits("BackendSelect", "ADInplaceOrView")
_NOT_PLAIN = ~_bits(
    "CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA", "ADInplaceOrView"
)


def register() -> None:
    LIBRARY.impl(FORWARD, _forward, "Autograd", with_keyset=True)
    LIBRARY.impl(BACKWARD, _backward, "Autograd", with_keyset=True)


def deform_conv2d(
    input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, backend
):
    """The forward operator; all arguments given, in its order."""
    tensors = (input, offset, weight, bias, mask)
    place, options = (stride, padding, dilation), (groups, offset_groups, backend)
    call = _plain_problem(FORWARD, None, *tensors, place, options)
    if call is None:
        return forward_operator(input, offset, weight, bias, *place, mask, *options)
    if _is_recorded(tensors):
        return _Forward.apply(call, None, *tensors, place, options)
    return kernels.run_forward(call, backend, *tensors)


def deform_conv2d_backward(
    grad_output, input, offset, weight, bias, stride, padding, dilation, mask,
    groups, offset_groups, backend, output_mask,
) -> Sequence[Tensor | None]:  # fmt: skip
    """The backward operator; all arguments given, in its order. None for what nobody wants."""
    tensors = (grad_output, input, offset, weight, bias, mask)
    place, options = (stride, padding, dilation), (groups, offset_groups, backend)
    call = _plain_problem(BACKWARD, *tensors, place, options)
    if call is None or _is_recorded(tensors):
        grads = backward_operator(*tensors[:5], *place, mask, *options, output_mask)
        return [g if w else None for g, w in zip(grads, output_mask, strict=True)]
    return kernels.run_backward(
        call, backend, grad_output, input, offset, weight, mask, output_mask
    )


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch's dispatcher would find nothing but autograd and the kernels of a device.

    That is: all tensors are plain ones, and no mode, transform, trace or profile is at work. A call
    then goes to those directly; the dispatcher's way costs 4 microseconds more, 10
    where autograd records it.
    """
    return not (
        _is_heard(tensors)
        or [t for t in tensors if t is not None and _keys(t).raw_repr() & _NOT_PLAIN]
    )


def _is_heard(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a mode, transform, trace, profile or ``__torch_function__`` is at work."""
    return bool(
        torch.compiler.is_compiling()
        or _included_keys().raw_repr() & _NOT_EAGER
        or forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
        or _profiler_enabled()
        or has_torch_function(tensors)
    )


def _plain_problem(
    op, grad_output, input, offset, weight, bias, mask, place, options
) -> DeformConv2dProblem | None:
    """The problem of a call that `_is_plain`; None of another one.

    Most calls are like one before, and one look of torch's own guards of compiled code says so: the
    same types, dispatch keys, dtypes, devices, sizes, strides and requires_grad. What was checked
    then, plain and without errors, holds again. Of modes the guards do not see all.
    """
    tensors = [t for t in (grad_output, input, offset, weight, bias, mask) if t is not None]
    if _is_heard(tensors):
        return None
    try:
        known = _known_like(
            op, input.shape, weight.shape, bias is None, mask is None, place, options
        )
    except TypeError:  # sizes that are symbols do not hash
        return None
    for guards, call in known[0]:
        if guards.check(*tensors):
            return call
    if not _is_plain(tensors):
        return None
    call = problem(
        op, grad_output, input, offset, weight, bias, *place, mask, *options,
        channels_last=is_channels_last(input), symbolic=False,
    )  # fmt: skip
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    )
    known[0] = ((guards, call), *known[0][:3])
    return call


@lru_cache(maxsize=1024)
def _known_like(*key: Any) -> list[tuple[tuple[TensorGuards, DeformConv2dProblem], ...]]:
    """Where the last four calls of a kind are kept, as training and inference differ; no tensor is."""
    return [()]


def _may_record(tensors: Sequence[Tensor | None]) -> bool:
    """Whether somebody may ask for derivatives by one of these: autograd, a transform, a trace."""
    return (
        torch.compiler.is_compiling()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_recorded(tensors)
    )


def _forward(
    keyset, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
    mask=None, groups=None, offset_groups=None, backend=None,
):  # fmt: skip
    tensors = (input, offset, weight, bias, mask)
    place, options = (stride, padding, dilation), (groups, offset_groups, backend)
    if _has_tangents(tensors):
        call = problem(FORWARD, None, input, offset, weight, bias, *place, mask, *options)
        with _as_typed(input):
            return composite.forward(call, *tensors)
    if _is_recorded(tensors):
        return _record(_Forward, None, keyset, *tensors, place, options)
    return _below(
        forward_operator,
        keyset, input, offset, weight, bias, stride, padding, dilation, mask, *options,
    )  # fmt: skip


def _backward(
    keyset, grad_output, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, groups=None, offset_groups=None, backend=None,
    output_mask=(True, True, True, True, True),
):  # fmt: skip
    tensors = (grad_output, input, offset, weight, mask)
    place, options = (stride, padding, dilation), (groups, offset_groups, backend)
    if _has_tangents(tensors):
        output_mask = wanted(BACKWARD, output_mask, mask)
        call = problem(BACKWARD, grad_output, input, offset, weight, bias, *place, mask, *options)
        with _as_typed(input):
            grads = composite.backward(call, *tensors, output_mask)
        return without_none(grads, input)
    if _is_recorded(tensors):
        return _record(_Backward, keyset, *tensors, bias, place, options, output_mask)
    return _below(
        backward_operator,
        keyset, grad_output, input, offset, weight, bias, stride, padding, dilation, mask, *options,
        output_mask,
    )  # fmt: skip


class Record(_SingleLevelFunction):
    """A step that autograd records, at one level of ``torch.func`` alone."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class _Forward(Record):
    """The forward operator with its gradients."""

    @staticmethod
    def forward(ctx, call, keyset, input, offset, weight, bias, mask, place, options):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.place, ctx.options = place, options
        if call is not None:  # a plain one, which has not come through the dispatcher
            return kernels.run_forward(call, options[2], input, offset, weight, bias, mask)
        return _below_record(
            forward_operator,
            keyset, input, offset, weight, bias, *place, mask, *options,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 9
        input, offset, weight, mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:7]
        grads = deform_conv2d_backward(
            grad_output, input, offset, weight, None, *ctx.place, mask, *ctx.options, needed
        )
        return None, None, *grads, None, None


class _Backward(Record):
    """The backward operator with its gradients: those of `composite.backward`."""

    @staticmethod
    def forward(
        ctx, keyset, grad_output, input, offset, weight, mask, bias, place, options, output_mask
    ):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, offset, weight, mask)
        ctx.place, ctx.options = place, options
        ctx.output_mask = wanted(BACKWARD, output_mask, mask)
        return _below_record(
            backward_operator,
            keyset, grad_output, input, offset, weight, bias, *place, mask, *options, output_mask,
        )  # fmt: skip

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:6]
        output_mask = [w and g is not None for w, g in zip(ctx.output_mask, grads, strict=True)]
        if not any(output_mask):
            return (None,) * 10
        saved = grad_output, input, offset, weight, mask = ctx.saved_tensors
        call = problem(
            BACKWARD, grad_output, input, offset, weight, None, *ctx.place, mask, *ctx.options
        )

        def wanted_gradients(*differentiated):
            rest = iter(differentiated)
            tensors = [next(rest) if n else t for t, n in zip(saved, needed, strict=True)]
            outputs = composite.backward(call, *tensors, output_mask)
            return tuple(output for output in outputs if output is not None)

        with _as_typed(grad_output):
            _, pull_back = torch.func.vjp(
                wanted_gradients, *[t for t, n in zip(saved, needed, strict=True) if n]
            )
            grads = tuple(grad for grad, w in zip(grads, output_mask, strict=True) if w)
            found = iter(pull_back(grads))
        return None, *[next(found) if n else None for n in needed], None, None, None, None


def _has_tangents(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether forward mode is at work on one of them; it has one level only."""
    if forward_ad._current_level < 0 and not _are_functorch_transforms_active():
        return False
    return any(
        t is not None and forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors
    )


def _is_recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records a call with these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _as_typed(tensor: Tensor) -> AbstractContextManager:
    """No autocast: a composite gets tensors that went through it, and chooses its own dtypes."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _record(function: type[Record], *arguments: Any):
    """Call and record; under ``torch.func`` at its present level only, as torch's operators do."""
    if not _are_functorch_transforms_active():
        return function.apply(*arguments)
    with enable_single_level_autograd_function():
        return function.apply(*arguments)


def _below(operator: torch._ops.OpOverload, keyset: Any, *arguments: Any):
    """The operator's next kernel: that of a device, or of the next level of ``torch.func``."""
    with _AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & _AFTER_AUTOGRAD, *arguments)


def _below_record(operator: torch._ops.OpOverload, keyset: Any, *arguments: Any):
    """`_below` from within `_record`, which has stopped all recording: the next levels go on."""
    if not _are_functorch_transforms_active():
        return _below(operator, keyset, *arguments)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _below(operator, keyset, *arguments)
