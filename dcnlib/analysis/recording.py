"""What the layers of a torch model do with an input, seen while the model runs; imports torch.

Deformable layers are recognised by the operators they call, dcnlib's or torchvision's, so any module
around them will do; plain convolutions and poolings by their modules. `watch` is for the instruments
of this package, `record_layers` for users.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import torch_ops  # noqa: F401  (registers the operators, before anything is watched)
from .._problem import four_sides, pair, type_error, value_error
from .locations import Layer, to_numpy

_CONVOLUTIONS = ("dcnlib.deform_conv2d", "torchvision.deform_conv2d", "dcnlib.deform_resample2d")
_POOLINGS = ("dcnlib.deform_roi_pool", "dcnlib.deform_psroi_pool")
_PLAIN = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def record_layers(model: nn.Module, input: Tensor | tuple[Tensor, ...]) -> list[Layer]:
    """Run a model and keep, in the order of the forward pass, what its layers did.

    Parameters
    ----------
    model : torch.nn.Module
        Runs once, in evaluation mode and without gradients; afterwards it is as before.
    input : tensor (N, C, H, W), or tuple of tensors
        What it is called with.

    Returns
    -------
    list of Layer
        All calls of ``deform_conv2d``, dcnlib's or torchvision's, and of ``deform_resample2d``, by
        functions or modules, named after the innermost module that called; and all ``Conv2d``,
        ``MaxPool2d`` and ``AvgPool2d`` modules but those that predict offsets. A module's second call is
        named ``name:2``. Resampling is one tap and an offset group for each channel, its offsets
        limited to the image as its ``boundary`` says.

    Raises
    ------
    TypeError
        If `model` is no module or `input` no tensor.

    Notes
    -----
    Compiled and scripted modules hide their calls: give the module that was compiled. mmcv's own
    layers call no torch operator and are not seen.

    Examples
    --------
    >>> import torch
    >>> from dcnlib import analysis, nn
    >>> model = torch.nn.Sequential(torch.nn.MaxPool2d(2), nn.DeformConv2dPack(3, 8, 3, padding=1))
    >>> [layer.name for layer in analysis.record_layers(model, torch.zeros(1, 3, 8, 8))]
    ['0', '1']
    """
    with torch.no_grad(), watch("record_layers", model) as calls:
        model(*as_inputs("record_layers", input))
    return layers_of(calls)


@dataclass
class Call:
    """One call of an operator (or of a plain module), its tensors still in autograd's graph."""

    name: str
    kind: str  # "conv", "roi" or "plain"
    arguments: dict[str, Any]
    output: Tensor
    plain: nn.Module | None = field(default=None, repr=False)

    @property
    def offset(self) -> Tensor:
        return self.arguments["offset"]

    def layer(self) -> Layer:
        """The call without torch, for one that is a convolution or a pooling."""
        return _plain_layer(self) if self.plain is not None else _deformable_layer(self)


@contextmanager
def watch(op: str, model: nn.Module) -> Iterator[list[Call]]:
    """Collects the calls that `model` makes within the block, in evaluation mode."""
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "unknown kind", "a torch.nn.Module", type(model).__name__)
    calls: list[Call] = []
    active: list[str] = []
    training = [(module, module.training) for module in model.modules()]
    handles = []

    def enter(name: str):
        return lambda module, inputs: active.append(name)

    def leave(name: str):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            active.pop()
            if isinstance(module, _PLAIN) and isinstance(output, Tensor):
                calls.append(Call(name, "plain", {"input": inputs[0]}, output, module))

        return hook

    try:
        model.eval()
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name), always_call=True))
        with _Watch(calls, active):
            yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training:
            module.training = was
    _number(calls)


class _Watch(TorchFunctionMode):
    """Sees every operator before autograd does."""

    def __init__(self, calls: list[Call], active: list[str]) -> None:
        super().__init__()
        self.calls, self.active = calls, active

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func).removesuffix(".default")
        if name not in (*_CONVOLUTIONS, *_POOLINGS):
            return func(*args, **kwargs)
        schema = getattr(func, "default", func)._schema
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        kind = "conv" if name in _CONVOLUTIONS else "roi"
        if kind == "roi":
            arguments["offset"] = _offset_of_bins(arguments)
            if "part_size" in arguments:
                arguments["part_size"] = arguments["output_size"]
        offset = arguments["offset"]
        if torch.is_grad_enabled() and not offset.requires_grad:
            arguments["offset"] = offset.detach().requires_grad_()  # a constant has no gradient
        output = func(**arguments)
        self.calls.append(Call(self.active[-1] if self.active else "", kind, arguments, output))
        return output


def _offset_of_bins(arguments: dict[str, Any]) -> Tensor:
    """One offset for every bin: zeros where there was none, copies where bins share a part."""
    rows, columns = pair("", "", list(arguments["output_size"]))
    offset = arguments["offset"]
    if offset is None:
        input = arguments["input"]
        return input.new_zeros(len(arguments["rois"]), 2, rows, columns)
    parts = [
        torch.arange(count, device=offset.device) * size // count
        for count, size in zip((rows, columns), offset.shape[2:], strict=True)
    ]
    return offset[:, :, parts[0]][:, :, :, parts[1]]


def _number(calls: list[Call]) -> None:
    seen: dict[str, int] = {}
    for call in calls:
        seen[call.name] = seen.get(call.name, 0) + 1
        if seen[call.name] > 1:
            call.name += f":{seen[call.name]}"


def layers_of(calls: list[Call]) -> list[Layer]:
    """The calls as layers, less the convolutions that predict offsets."""
    predicted = {call.offset.untyped_storage().data_ptr() for call in calls if call.kind == "conv"}
    return [
        call.layer()
        for call in calls
        if call.kind == "conv"
        or (call.kind == "plain" and call.output.untyped_storage().data_ptr() not in predicted)
    ]


def _deformable_layer(call: Call) -> Layer:
    given = call.arguments
    if "boundary" in given:
        return _resampling_layer(call)
    input, offset, weight, mask = (given[key] for key in ("input", "offset", "weight", "mask"))
    kernel = (weight.shape[-2], weight.shape[-1])
    if "stride_h" in given:  # torchvision's schema
        stride = (given["stride_h"], given["stride_w"])
        dilation = (given["dilation_h"], given["dilation_w"])
        top_left = (given["pad_h"], given["pad_w"])
        mask = mask if given["use_mask"] else None
    else:
        stride, dilation = (
            pair("", "", list(given["stride"])),
            pair("", "", list(given["dilation"])),
        )
        top, _, left, _ = given["padding"]
        top_left = (top, left)
    taps = kernel[0] * kernel[1]
    out = tuple(offset.shape[-2:])
    groups = offset.shape[-3] // (2 * taps)
    return Layer(
        call.name, kernel, stride, top_left, dilation, tuple(input.shape[-2:]), out,
        to_numpy(offset).reshape(-1, groups, taps, 2, *out),
        None if mask is None else to_numpy(mask).reshape(-1, groups, taps, *out),
    )  # fmt: skip


def _resampling_layer(call: Call) -> Layer:
    size = tuple(call.offset.shape[-2:])
    offset = to_numpy(call.offset)
    offset = offset.reshape(-1, offset.shape[-3] // 2, 1, 2, *size)
    if call.arguments["boundary"] == "border":
        units = np.stack(np.indices(size)).astype(np.float64)
        last = np.reshape(size, (2, 1, 1)) - 1
        offset = np.clip(units + offset, 0, last) - units
    return Layer(call.name, (1, 1), (1, 1), (0, 0), (1, 1), size, size, offset)


def _plain_layer(call: Call) -> Layer:
    module: Any = call.plain
    kernel, dilation = (
        pair("", "", module.kernel_size),
        pair("", "", getattr(module, "dilation", 1)),
    )
    stride = pair("", "", module.stride)
    top, _, left, _ = four_sides("", module.padding, kernel, stride, dilation)
    sizes = (tuple(tensor.shape[-2:]) for tensor in (call.arguments["input"], call.output))
    return Layer(call.name, kernel, stride, (top, left), dilation, *sizes)


def as_inputs(op: str, input: Any) -> tuple[Tensor, ...]:
    """What the model is called with, the image first."""
    inputs = tuple(input) if isinstance(input, tuple | list) else (input,)
    if not inputs or not isinstance(inputs[0], Tensor):
        got = type(inputs[0] if inputs else input).__name__
        raise type_error(op, "input", "unknown kind", "a tensor, or a tuple of them", got)
    if inputs[0].ndim not in (3, 4):
        raise value_error(
            op,
            "input",
            "must be images",
            "shape (N, C, H, W) or (C, H, W)",
            tuple(inputs[0].shape),
        )
    return inputs
