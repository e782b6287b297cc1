"""Checkpoints and layers of other libraries: renaming keys, swapping layers with a proof."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import nn as layers
from .._problem import type_error, value_error
from ..compat import mmcv

#: Relative difference in float64 above which two layers do not compute the same. mmcv keeps the
#: scales of its pooling in float32, which alone makes 1e-8.
TOLERANCE = 1e-6


class Replacement(NamedTuple):
    """One layer that was swapped."""

    name: str
    before: str
    after: str
    difference: float | None
    """Largest relative difference of results and gradients; None if not proved."""


class Replacements(NamedTuple):
    """What `replace_modules` did; ``print`` shows it as a table."""

    replaced: tuple[Replacement, ...]
    skipped: tuple[tuple[str, str], ...]
    """Names of layers that stayed, and why."""

    @property
    def largest_difference(self) -> float:
        """Of all layers that were proved; 0 without any."""
        return max((r.difference for r in self.replaced if r.difference is not None), default=0.0)

    def __str__(self) -> str:
        rows = [
            f"{r.name}: {r.before} -> {r.after}, "
            + ("not proved" if r.difference is None else f"largest difference {r.difference:.1e}")
            for r in self.replaced
        ]
        rows += [f"{name}: stays: {reason}" for name, reason in self.skipped]
        return "\n".join(rows) or "nothing to replace"


def replace_modules(model: nn.Module, *, prove: bool = True) -> Replacements:
    """Swap the deformable layers of torchvision and mmcv in a model for ours, in place.

    The new layers have the parameters of the old ones, the very same objects: optimizers and shared
    parameters stay as they are, and so do the keys of the ``state_dict``. Layers of torchvision
    become those of `dcnlib.nn`, layers of mmcv those of `dcnlib.compat.mmcv`.

    Parameters
    ----------
    model : torch.nn.Module
    prove : bool
        Run each layer and its successor on random data, in float64 on the layer's device, and
        compare results and all gradients. False swaps without: for a layer that cannot run here, as
        mmcv's pooling on a CPU.

    Returns
    -------
    Replacements
        ``replaced``, ``skipped`` and ``largest_difference``. Skipped are layers of derived classes and
        those with hooks, buffers or a ``forward`` of their own, since these may do more.

    Raises
    ------
    ValueError
        If a layer and its successor differ by more than 1e-6, or `model` is itself such a layer
        (`equivalent` makes its successor). Nothing is swapped then.
    RuntimeError
        If a layer cannot run, with its reason. Nothing is swapped then.

    Notes
    -----
    Models that call ``torchvision.ops.deform_conv2d`` as a function have no layer to swap: change
    the import, `dcnlib.deform_conv2d` has the same signature.

    Examples
    --------
    >>> import torch
    >>> from dcnlib import convert
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> print(convert.replace_modules(model))
    nothing to replace
    """
    op = "convert.replace_modules"
    if not isinstance(model, nn.Module):
        raise type_error(op, "model", "must be a module", "torch.nn.Module", type(model).__name__)
    successors: dict[int, nn.Module] = {}
    replaced, skipped = [], []
    for name, layer in model.named_modules():
        kind = _kind(layer)
        if kind is None:
            continue
        reason = _why_not(layer)
        if reason is not None:
            skipped.append((name, reason))
            continue
        if layer is model:
            raise value_error(
                op, "model", "is itself a layer to be swapped", "a model that has it", kind,
                "make its successor with convert.equivalent(model)",
            )  # fmt: skip
        successor = successors[id(layer)] = equivalent(layer)
        with torch.inference_mode(False), torch.enable_grad():
            difference = _difference(op, name, layer) if prove else None
        if difference is not None and not difference <= TOLERANCE:
            raise value_error(
                op, name, f"{kind} and its successor must compute the same",
                f"a relative difference of at most {TOLERANCE:g}", f"{difference:.1e}",
            )  # fmt: skip
        after = f"{_HOMES[kind.partition('.')[0]]}.{type(successor).__name__}"
        replaced.append(Replacement(name, kind, after, difference))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in successors:
                parent._modules[name] = successors[id(child)]
    return Replacements(tuple(replaced), tuple(skipped))


def equivalent(layer: nn.Module) -> nn.Module:
    """Our layer for one of torchvision or mmcv, with its parameters: the same objects.

    Parameters
    ----------
    layer : torch.nn.Module
        ``DeformConv2d`` of torchvision; ``DeformConv2d``, ``DeformConv2dPack``,
        ``ModulatedDeformConv2d``, ``ModulatedDeformConv2dPack``, ``DeformRoIPool``,
        ``DeformRoIPoolPack`` or ``ModulatedDeformRoIPoolPack`` of mmcv.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    TypeError
        For any other layer.

    Examples
    --------
    >>> from dcnlib import convert
    >>> from torch import nn
    >>> convert.equivalent(nn.Conv2d(1, 1, 1))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    TypeError: convert.equivalent: layer: no deformable layer of another library; expected ...
    """
    kind = _kind(layer)
    if kind is None or type(layer).__name__ != kind.rpartition(".")[2]:
        expected = ", ".join(_SUCCESSORS)
        got = f"{type(layer).__module__}.{type(layer).__name__}"
        raise type_error(
            "convert.equivalent", "layer", "no deformable layer of another library", expected, got
        )
    with torch.device("meta"):  # no memory, no random numbers: the parameters come from `layer`
        successor = _SUCCESSORS[kind](layer)
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(successor, name, parameter)
    for name, child in layer.named_children():
        setattr(successor, name, child)
    successor.training = layer.training
    return successor


def state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with the keys of today's layers, whose predictors are called ``conv_offset``.

    Renames the keys of mmdetection before version 2 (``conv2_offset.weight`` beside
    ``conv2.weight`` becomes ``conv2.conv_offset.weight``) and those of the DCNv2 repositories
    (``conv_offset_mask``), whose channels are in the same order. Anything else stays.

    Parameters
    ----------
    state_dict : mapping

    Returns
    -------
    dict

    Examples
    --------
    >>> from dcnlib import convert
    >>> list(convert.state_dict({"conv2.weight": 1, "conv2_offset.weight": 2}))
    ['conv2.weight', 'conv2.conv_offset.weight']
    >>> list(convert.state_dict({"dcn.weight": 1, "dcn.conv_offset_mask.bias": 2}))
    ['dcn.weight', 'dcn.conv_offset.bias']
    """

    if not isinstance(state_dict, Mapping):
        raise type_error(
            "convert.state_dict", "state_dict", "must be a mapping", "dict", type(state_dict).__name__,
            "a module has it as .state_dict()",
        )  # fmt: skip

    def today(key: str) -> str:
        layer, _, parameter = key.rpartition(".")
        before, _, name = layer.rpartition(".")
        prefix = f"{before}." if before else ""
        if name == "conv_offset_mask":
            return f"{prefix}conv_offset.{parameter}"
        owner = name.removesuffix("_offset")
        if owner != name and f"{prefix}{owner}.weight" in state_dict:
            return f"{prefix}{owner}.conv_offset.{parameter}"
        return key

    renamed = OrderedDict((today(key), value) for key, value in state_dict.items())
    # What load_state_dict knows versions from.
    if metadata := getattr(state_dict, "_metadata", None):
        renamed._metadata = metadata  # type: ignore[attr-defined]
    return renamed


# ---- which layers, and what becomes of them


def _convolution(new: type[nn.Module], *options: str) -> Callable[[Any], nn.Module]:
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )

    def make(layer: Any) -> nn.Module:
        keywords = {name: getattr(layer, name) for name in (*names, *options)}
        return new(**keywords, bias=getattr(layer, "bias", None) is not None)

    return make


def _pooling(new: type[nn.Module], *options: str) -> Callable[[Any], nn.Module]:
    names = ("output_size", "spatial_scale", "sampling_ratio", "gamma", *options)
    return lambda layer: new(**{name: getattr(layer, name) for name in names})


_HOMES = {"torchvision": "dcnlib.nn", "mmcv": "dcnlib.compat.mmcv"}
_FC = ("output_channels", "deform_fc_channels")
_SUCCESSORS: dict[str, Callable[[Any], nn.Module]] = {
    "torchvision.DeformConv2d": _convolution(layers.DeformConv2d),
    "mmcv.DeformConv2d": _convolution(mmcv.DeformConv2d, "deform_groups"),
    "mmcv.DeformConv2dPack": _convolution(mmcv.DeformConv2dPack, "deform_groups"),
    "mmcv.ModulatedDeformConv2d": _convolution(mmcv.ModulatedDeformConv2d, "deform_groups"),
    "mmcv.ModulatedDeformConv2dPack": _convolution(mmcv.ModulatedDeformConv2dPack, "deform_groups"),
    "mmcv.DeformRoIPool": _pooling(mmcv.DeformRoIPool),
    "mmcv.DeformRoIPoolPack": _pooling(mmcv.DeformRoIPoolPack, *_FC),
    "mmcv.ModulatedDeformRoIPoolPack": _pooling(mmcv.ModulatedDeformRoIPoolPack, *_FC),
}  # fmt: skip


def _kind(layer: nn.Module) -> str | None:
    """The layer's library and class, of a derived one those of its base; None for any other layer.

    By name: neither library has to be there, and a class is one wherever its library keeps it.
    """
    for base in type(layer).__mro__:
        kind = f"{base.__module__.partition('.')[0]}.{base.__name__}"
        if kind in _SUCCESSORS:
            return kind
    return None


def _why_not(layer: nn.Module) -> str | None:
    if f"{type(layer).__module__.partition('.')[0]}.{type(layer).__name__}" not in _SUCCESSORS:
        return f"{type(layer).__qualname__} is derived from a known layer and may do more"
    hooks = (name for name in vars(layer) if name.endswith("_hooks"))
    if any(getattr(layer, name) for name in hooks):
        return "it has hooks, which would be lost"
    if layer._buffers:
        return "it has buffers, which would be lost"
    if "forward" in vars(layer):
        return "it has a forward of its own, which would be lost"
    return None


# ---- the proof


def _difference(op: str, name: str, layer: nn.Module) -> float:
    """Largest relative difference of a copy of `layer` and its successor: results and gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    try:
        old = copy.deepcopy(layer).double()
        device = next((p.device for p in old.parameters()), torch.device("cpu"))
        for parameter in old.parameters():
            # Predictors begin at zero: with that in them nothing would be seen of their channels.
            if not parameter.any():
                scale = parameter[0].numel() ** -0.5
                parameter.data = (scale * normal(*parameter.shape)).to(device)
        new = equivalent(old)
        given_by = _pooling_inputs if "RoIPool" in type(layer).__name__ else _convolution_inputs
        largest = 0.0
        for inputs in given_by(old, normal):
            given = [t if t is None else t.to(device) for t in inputs]
            leaves = [t for t in given if t is not None and t.requires_grad]
            leaves += [p.requires_grad_() for p in old.parameters()]
            expected, found = (
                _with_gradients(old, given, leaves),
                _with_gradients(new, given, leaves),
            )
            for mine, theirs in zip(found, expected, strict=True):
                size = theirs.abs().max().item()
                difference = (mine - theirs).abs().max().item()
                largest = max(largest, difference / size if size else difference, key=_nan_last)
        return largest
    except Exception as error:
        raise RuntimeError(
            f"{op}: {name}: the layer cannot be compared with its successor: "
            f"{type(error).__name__}: {error}; swap without a proof with prove=False"
        ) from error


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _with_gradients(layer: nn.Module, given: list, leaves: list[Tensor]) -> list[Tensor]:
    output = layer(*given)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    grads = torch.autograd.grad(output, leaves, weights.reshape(output.shape))
    return [output.detach(), *grads]


def _convolution_inputs(layer: Any, normal: Callable[..., Tensor]) -> Iterator[list]:
    """Input, offset and mask, as the layer takes them."""
    kernel, stride, padding, dilation = (
        layer.kernel_size, layer.stride, layer.padding, layer.dilation,
    )  # fmt: skip
    out = (5, 6)
    size = [
        max(dilation[i] * (kernel[i] - 1) + 1 + (out[i] - 1) * stride[i] - 2 * padding[i], 1)
        for i in (0, 1)
    ]
    out = tuple(
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    x = normal(2, layer.in_channels, *size).requires_grad_()
    if type(layer).__name__.endswith("Pack"):
        yield [x]
        return
    groups = getattr(layer, "deform_groups", math.gcd(layer.in_channels, 2))
    taps = groups * math.prod(kernel)
    offset = (1.5 * normal(2, 2 * taps, *out)).requires_grad_()
    mask = normal(2, taps, *out).requires_grad_()
    kind = _kind(layer)
    if kind != "mmcv.ModulatedDeformConv2d":
        yield [x, offset]
    if kind != "mmcv.DeformConv2d":
        yield [x, offset, mask]


def _pooling_inputs(layer: Any, normal: Callable[..., Tensor]) -> Iterator[list]:
    """Input, regions and offset; far from the border, where mmcv's gradient is none."""
    x = normal(2, getattr(layer, "output_channels", 3), 48, 48).requires_grad_()
    corner, size = 20 + normal(3, 2).clamp(-2, 2), 8 + normal(3, 2).clamp(-2, 2)
    boxes = torch.cat([corner, corner + size], 1) / layer.spatial_scale
    rois = torch.cat([torch.tensor([[0.0], [1], [1]], dtype=torch.float64), boxes], 1)
    if type(layer).__name__.endswith("Pack"):
        yield [x, rois]
        return
    offset = normal(3, 2, *layer.output_size).clamp(-2, 2) / max(10 * abs(layer.gamma), 1)
    yield [x, rois, None]
    yield [x, rois, offset.requires_grad_()]
