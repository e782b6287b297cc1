"""What the layers of a torch model do with an input, seen while the model runs; imports torch.

Deformable layers are recognised by the operators they call, dcnlib's or torchvision's, so any module
around them will do; plain convolutions and poolings by their modules. `watch` is for the instruments
of this package, `record_layers` for users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .. import torch_ops  # noqa: F401  (registers the operators, before anything is watched)
from .._problem import four_sides, type_error, value_error
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
        ``MaxPool2d`` and ``AvgPool2d`` modules but those that only predict offsets or masks. A
        module's second call is named ``name:2``. Resampling is one tap and an offset group for each
        channel, its offsets limited to the image as its ``boundary`` says.

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
    return recorded("record_layers", model, input)


def recorded(op: str, model: nn.Module, input: Any) -> list[Layer]:
    """`record_layers` for the function `op`."""
    inputs = as_inputs(op, input)
    with torch.no_grad(), watch(op, model) as calls:
        model(*inputs)
    return layers_of(calls)


@dataclass
class Call:
    """One call of an operator (or of a plain module), its tensors still in autograd's graph."""

    name: str
    kind: str  # "conv", "roi" or "plain"
    arguments: dict[str, Any]
    output: Tensor
    plain: nn.Module | None = field(default=None, repr=False)
    #: Indices of the calls that its input was made from, and its offset and mask; None: not known.
    reads: frozenset[int] | None = None
    predicted_by: frozenset[int] = frozenset()

    @property
    def offset(self) -> Tensor:
        return self.arguments["offset"]

    def layer(self, reads: frozenset[str] | None = None) -> Layer:
        """The call without torch, for one that is a convolution or a pooling."""
        layer = _plain_layer(self) if self.plain is not None else _deformable_layer(self)
        return replace(layer, reads=reads)


@contextmanager
def watch(op: str, model: nn.Module) -> Iterator[list[Call]]:
    """Collects the calls that `model` makes within the block, in evaluation mode."""
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "unknown kind", "a torch.nn.Module", type(model).__name__)
    calls: list[Call] = []
    seen = _Watch(calls)
    training = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        model.eval()
        for name, module in model.named_modules():
            enter, leave = seen.enter(name), seen.leave(name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        with seen:
            yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training:
            module.training = was
    _number(calls)


class _Watch(TorchFunctionMode):
    """Sees every operator before autograd does, and follows which calls a tensor was made from."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls
        self.active: list[str] = []
        self.made_from = WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func).removesuffix(".default")
        sources = self._sources(args, kwargs)
        if name in (*_CONVOLUTIONS, *_POOLINGS):
            output = self._deformable(name, func, args, kwargs)
            sources |= {len(self.calls) - 1}
        else:
            output = func(*args, **kwargs)
        # What returns nothing, as `x[i] = y`, writes into its first argument.
        for tensor in _tensors(args[:1] if output is None else output):
            self.made_from[tensor] = sources
        return output

    def _deformable(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        schema = getattr(func, "default", func)._schema
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        kind = "conv" if name in _CONVOLUTIONS else "roi"
        predicted_by = self._sources(arguments["offset"], arguments.get("mask"))
        if kind == "roi":
            arguments["offset"] = _offset_of_bins(arguments)
            if "part_size" in arguments:
                arguments["part_size"] = arguments["output_size"]
        offset = arguments["offset"]
        if torch.is_grad_enabled() and not offset.requires_grad:
            arguments["offset"] = offset.detach().requires_grad_()  # a constant has no gradient
        output = func(**arguments)
        call = Call(
            self.active[-1] if self.active else "", kind, arguments, output,
            reads=self.made_from.get(arguments["input"]), predicted_by=predicted_by,
        )  # fmt: skip
        self.calls.append(call)
        return output

    def enter(self, name: str) -> Callable[..., None]:
        """A hook before the forward pass of the module called `name`."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.active:  # the model
                self.made_from.update((tensor, frozenset()) for tensor in _tensors((args, kwargs)))
            self.active.append(name)

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        """A hook behind it."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.active.pop()
            if isinstance(module, _PLAIN) and isinstance(output, Tensor):
                input = args[0] if args else kwargs["input"]
                reads = self.made_from.get(input)
                self.made_from[output] = self._sources(output) | {len(self.calls)}
                self.calls.append(Call(name, "plain", {"input": input}, output, module, reads))

        return hook

    def _sources(self, *values: Any) -> frozenset[int]:
        """The calls that any tensor within the values was made from."""
        known = (self.made_from.get(tensor, ()) for tensor in _tensors(values))
        return frozenset().union(*known)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _offset_of_bins(arguments: dict[str, Any]) -> Tensor:
    """One offset for every bin: zeros where there was none, copies where bins share a part."""
    rows, columns = _numbers(arguments["output_size"], 2)
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
    """The calls as layers, less those of plain modules that only predict offsets or masks."""
    predictors: set[int] = set()
    for call in calls:
        if call.kind == "conv":
            predictors |= call.predicted_by - (call.reads or frozenset())
    return [
        call.layer(None if call.reads is None else frozenset(calls[i].name for i in call.reads))
        for i, call in enumerate(calls)
        if call.kind == "conv" or (call.kind == "plain" and i not in predictors)
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
        stride, dilation = (_numbers(given[key], 2) for key in ("stride", "dilation"))
        top, _, left, _ = _numbers(given["padding"], 4)
        top_left = (top, left)
    taps = kernel[0] * kernel[1]
    out = tuple(offset.shape[-2:])
    groups = offset.shape[-3] // (2 * taps)
    return Layer(
        call.name, kernel, stride, top_left, dilation, tuple(input.shape[-2:]), out,
        to_numpy(offset).reshape(-1, groups, taps, 2, *out),
        None if mask is None else to_numpy(mask).reshape(-1, groups, taps, *out),
    )  # fmt: skip


def _numbers(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """torch's operators and modules take one number for all axes."""
    return (value,) * count if isinstance(value, int) else tuple(value)


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
    kernel, stride, dilation = (
        _numbers(getattr(module, name, 1), 2) for name in ("kernel_size", "stride", "dilation")
    )
    top, _, left, _ = four_sides("", module.padding, kernel, stride, dilation)
    sizes = (tuple(tensor.shape[-2:]) for tensor in (call.arguments["input"], call.output))
    return Layer(call.name, kernel, stride, (top, left), dilation, *sizes)


def as_inputs(op: str, input: Any, differentiable: bool = False) -> tuple[Tensor, ...]:
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
    if differentiable and not inputs[0].is_floating_point():
        raise type_error(
            op, "input", "must have gradients", "a floating-point dtype", inputs[0].dtype,
            "give the model .float() images, scaled as in its training",
        )  # fmt: skip
    return inputs
