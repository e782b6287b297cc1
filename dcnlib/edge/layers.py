"""The modules that `dcnlib.edge` knows, computed with NumPy and dcnlib's kernels.

A `Layer` is made from the settings and the tensors of one torch module and computes what that
module computes in evaluation mode. Weights of convolutions are packed when it is made. 16-bit types
are storage, as everywhere: what NumPy computes between two layers is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from .._arrays import is_torch, memory, plain, spec
from .._problem import (
    cached_problem,
    four_sides,
    integer,
    pair,
    ranked,
    type_error,
    value_error,
)
from ..backends import cpu
from ..functional import _run
from ..pooling import deform_psroi_pool, deform_roi_pool
from ..resample import deform_resample2d

Tensors = Mapping[str, np.ndarray]


class Layer:
    """One torch module without torch; subclasses are registered under their own name.

    Class attributes
    ----------------
    saves : tuple of str
        Full names of the torch classes that it stands for. Subclasses of those may compute
        something else and are not taken for them.
    settings : tuple of str
        Attributes of the module that it needs, ints, floats, bools, strings, None or tuples of
        them; the file keeps them.
    tensors : tuple of str
        Keys of the module's ``state_dict`` that it needs; a ``?`` in front: if there.
    fixed : dict
        Attributes of the module that have to have this value.
    """

    saves: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        self.__dict__.update(settings)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __repr__(self) -> str:
        text = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.settings)
        return f"{type(self).__name__}({text})"


#: Every registered layer by its name in files.
LAYERS: dict[str, type[Layer]] = {}


def register(layer: type[Layer]) -> type[Layer]:
    """Make a `Layer` known to `save` and `load`; a decorator.

    Examples
    --------
    >>> import numpy as np
    >>> from dcnlib import edge
    >>> @edge.register
    ... class Tanh(edge.Layer):
    ...     saves = ("torch.nn.modules.activation.Tanh",)
    ...     def __call__(self, input):
    ...         return np.tanh(input)
    """
    LAYERS[layer.__name__] = layer
    return layer


class Weight:
    """A convolution's weight and bias, packed once for each number of offset groups."""

    def __init__(self, tensors: Tensors, prefix: str = "") -> None:
        self.weight = plain(tensors[f"{prefix}weight"])
        layout = "(out_channels, in_channels/groups, kernel_h, kernel_w)"
        ranked("edge.load", f"{prefix}weight", self.weight.shape, 4, layout)
        self.bias = tensors.get(f"{prefix}bias")
        self.packed: dict[int, Any] = {}
        self.out_channels, self.group_channels, *self.kernel_size = self.weight.shape

    def pack(self, groups: int, offset_groups: int) -> None:
        in_channels = groups * self.group_channels
        place = (1, in_channels, *self.kernel_size)
        offset = (1, 2 * offset_groups * math.prod(self.kernel_size), 1, 1)
        dtype = self.weight.dtype.name
        problem = cached_problem(
            "edge", (place, dtype), (offset, dtype), spec(self.weight), spec(self.bias), None, None,
            (1, 1), (0, 0, 0, 0), (1, 1), groups, offset_groups,
        )  # fmt: skip
        self.packed[offset_groups] = cpu.pack_weight(problem, self.weight)

    def __call__(
        self,
        op: str,
        input: np.ndarray,
        offset: np.ndarray | None,
        mask: np.ndarray | None,
        place: tuple,
        groups: int,
        offset_groups: int | None,
    ) -> np.ndarray:
        stride, padding, dilation = place
        sides = four_sides(op, padding, self.kernel_size, stride, dilation)
        problem = cached_problem(
            op, spec(input), spec(offset), spec(self.weight), spec(self.bias), spec(mask), None,
            stride, sides, dilation, groups, offset_groups,
        )  # fmt: skip
        if problem.offset_groups not in self.packed:
            self.pack(groups, problem.offset_groups)
        weight = self.packed[problem.offset_groups]
        return _run(op, problem, input, offset, weight, self.bias, mask)


def arrays(op: str, given: dict[str, Any], optional: tuple[str, ...] = ()) -> list[Any]:
    """The arguments of a call, NumPy arrays all."""
    if is_torch(op, given, optional):
        raise type_error(
            op, "input", "computes with NumPy arrays", "numpy.ndarray", "torch.Tensor",
            "call .numpy() on the tensors",
        )  # fmt: skip
    return [memory(array) for array in given.values()]


def wide(array: np.ndarray) -> np.ndarray:
    """`array` as NumPy should compute with it."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def fits(op: str, name: str, shape: tuple[int, ...], axis: int, size: int) -> None:
    """NumPy would repeat a size of 1."""
    if len(shape) < -axis or shape[axis] != size:
        raise value_error(op, name, f"axis {axis} has another size", size, f"shape {shape}")


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) infinite: the result is 0, as it should be
        return (1 / (1 + np.exp(-wide(x)))).astype(x.dtype)


class _Convolution(Layer):
    """What all convolutions have: `place` and the weight."""

    settings = ("stride", "padding", "dilation", "groups")
    tensors = ("weight", "?bias")
    stride: Any
    padding: Any
    dilation: Any
    groups: int

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.weight = Weight(tensors)
        self.groups = integer("edge", "groups", self.groups, 1)
        self.place = (
            pair("edge", "stride", self.stride),
            self.padding,
            pair("edge", "dilation", self.dilation),
        )


@register
class Conv2d(_Convolution):
    saves = ("torch.nn.modules.conv.Conv2d",)
    fixed = {"padding_mode": ("zeros",)}

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.weight.pack(self.groups, 1)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        (input,) = arrays("conv2d", {"input": input})
        return self.weight("conv2d", input, None, None, self.place, self.groups, None)


@register
class DeformConv2d(_Convolution):
    saves = ("dcnlib.nn.DeformConv2d",)
    offset_groups: int | None = None  # as many as the offset has

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.weight.pack(self.groups, 1)  # packed anew by a call with more offset groups

    def __call__(
        self, input: np.ndarray, offset: np.ndarray, mask: np.ndarray | None = None
    ) -> np.ndarray:
        op = "deform_conv2d"
        given = {"input": input, "offset": offset, "mask": mask}
        input, offset, mask = arrays(op, given, ("mask",))
        groups = self.groups, self.offset_groups
        return self.weight(op, input, offset, mask, self.place, *groups)


class _Pack(_Convolution):
    settings = (*_Convolution.settings, "deform_groups")
    tensors = ("weight", "?bias", "conv_offset.weight", "conv_offset.bias")
    deform_groups: int

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.deform_groups = integer("edge", "deform_groups", self.deform_groups, 1)
        self.weight.pack(self.groups, self.deform_groups)
        self.predictor = Weight(tensors, "conv_offset.")
        self.predictor.pack(1, 1)

    def predict(self, input: np.ndarray) -> np.ndarray:
        return self.predictor("conv2d", input, None, None, self.place, 1, None)

    def convolve(
        self, input: np.ndarray, offset: np.ndarray, mask: np.ndarray | None
    ) -> np.ndarray:
        groups = self.groups, self.deform_groups
        return self.weight("deform_conv2d", input, offset, mask, self.place, *groups)


@register
class DeformConv2dPack(_Pack):
    saves = ("dcnlib.nn.DeformConv2dPack",)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        (input,) = arrays("deform_conv2d", {"input": input})
        return self.convolve(input, self.predict(input), None)


@register
class ModulatedDeformConv2dPack(_Pack):
    saves = ("dcnlib.nn.ModulatedDeformConv2dPack",)
    settings = (*_Pack.settings, "mask_activation")
    mask_activation: str | None
    activations: ClassVar[dict[str | None, Callable[[np.ndarray], np.ndarray]]] = {
        "sigmoid": sigmoid,
        "2*sigmoid": lambda mask: 2 * sigmoid(mask),
        None: lambda mask: mask,
    }
    fixed = {"mask_activation": tuple(activations)}

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.activation = self.activations[self.mask_activation]

    def __call__(self, input: np.ndarray) -> np.ndarray:
        (input,) = arrays("deform_conv2d", {"input": input})
        predicted = self.predict(input)
        offsets = predicted.shape[-3] // 3 * 2
        offset, mask = np.split(predicted, [offsets], axis=-3)
        return self.convolve(input, offset, self.activation(mask))


@register
class DeformRoIPool(Layer):
    saves = ("dcnlib._nn_pool.DeformRoIPool",)
    settings = ("output_size", "spatial_scale", "sampling_ratio", "gamma")
    output_size: Any
    spatial_scale: float
    sampling_ratio: int
    gamma: float

    def __call__(
        self, input: np.ndarray, rois: np.ndarray, offset: np.ndarray | None = None
    ) -> np.ndarray:
        given = {"input": input, "rois": rois, "offset": offset}
        return self.pool(*arrays("deform_roi_pool", given, ("offset",)))

    def pool(self, input: np.ndarray, rois: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
        return deform_roi_pool(
            input,
            rois,
            offset,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.gamma,
        )


def _linear(tensors: Tensors, prefix: str = "") -> tuple[np.ndarray, np.ndarray | None]:
    """Weight and bias of a linear layer."""
    weight, bias = tensors[f"{prefix}weight"], tensors.get(f"{prefix}bias")
    ranked("edge.load", f"{prefix}weight", weight.shape, 2, "(out_features, in_features)")
    if bias is None:
        return wide(weight), None
    fits("edge.load", f"{prefix}bias", bias.shape, -1, len(weight))
    return wide(weight), wide(bias)


def _hidden(tensors: Tensors, name: str, count: int) -> list[tuple[np.ndarray, Any]]:
    """The linear layers of a predictor, every other one of a Sequential."""
    return [_linear(tensors, f"{name}.{2 * i}.") for i in range(count)]


def _perceptron(x: np.ndarray, layers: list[tuple[np.ndarray, Any]]) -> np.ndarray:
    for number, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        if number + 1 < len(layers):
            np.maximum(x, 0, out=x)
    return x


@register
class DeformRoIPoolPack(DeformRoIPool):
    saves = ("dcnlib._nn_pool.DeformRoIPoolPack",)
    tensors = tuple(f"offset_fc.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias"))

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.output_size = pair("edge", "output_size", self.output_size)
        self.offset_fc = _hidden(tensors, "offset_fc", 3)

    def __call__(self, input: np.ndarray, rois: np.ndarray) -> np.ndarray:  # type: ignore[override]
        return self.predicted(input, rois)[0]

    def predicted(self, input: np.ndarray, rois: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pooled regions, and what the predictions were made from."""
        input, rois = arrays("deform_roi_pool", {"input": input, "rois": rois})
        plain = self.pool(input, rois, None)
        features = wide(plain.reshape(len(plain), -1))
        offset = _perceptron(features, self.offset_fc).reshape(-1, 2, *self.output_size)
        return self.pool(input, rois, offset.astype(input.dtype)), features


@register
class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    saves = ("dcnlib._nn_pool.ModulatedDeformRoIPoolPack",)
    tensors = (
        *DeformRoIPoolPack.tensors,
        *(f"mask_fc.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")),
    )

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.mask_fc = _hidden(tensors, "mask_fc", 2)

    def __call__(self, input: np.ndarray, rois: np.ndarray) -> np.ndarray:  # type: ignore[override]
        pooled, features = self.predicted(input, rois)
        mask = sigmoid(_perceptron(features, self.mask_fc)).reshape(-1, 1, *self.output_size)
        return pooled * mask.astype(pooled.dtype)


@register
class DeformPSRoIPool(Layer):
    saves = ("dcnlib._nn_pool.DeformPSRoIPool",)
    settings = (
        "spatial_scale", "output_size", "output_dim", "no_offset", "group_size", "part_size",
        "sample_per_part", "offset_std",
    )  # fmt: skip

    def __call__(
        self,
        input: np.ndarray,
        rois: np.ndarray,
        offset: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        given = {"input": input, "rois": rois, "offset": offset, "mask": mask}
        input, rois, offset, mask = arrays("deform_psroi_pool", given, ("offset", "mask"))
        settings = [getattr(self, name) for name in self.settings]
        return deform_psroi_pool(input, rois, offset, *settings, mask)


@register
class ConvOffset2D(Layer):
    saves = ("dcnlib._nn_resample.ConvOffset2D",)
    settings = ("boundary",)
    tensors = ("conv_offset.weight", "conv_offset.bias")
    boundary: str

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.predictor = Weight(tensors, "conv_offset.")
        self.predictor.pack(1, 1)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        (input,) = arrays("deform_resample2d", {"input": input})
        place = ((1, 1), "same", (1, 1))
        offset = self.predictor("conv2d", input, None, None, place, 1, None)
        return deform_resample2d(input, offset, boundary=self.boundary)


# ---- what stands between deformable layers -------------------------------------------------------


class Sequential(Layer):
    """Layers one after the other; `files` makes it, since its children are layers themselves."""

    saves = ("torch.nn.modules.container.Sequential",)

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        for layer in self.layers:
            inputs = (layer(*inputs),)
        return inputs[0]

    def __repr__(self) -> str:
        return "Sequential(\n" + "".join(f"  {layer!r},\n" for layer in self.layers) + ")"


@register
class BatchNorm2d(Layer):
    saves = ("torch.nn.modules.batchnorm.BatchNorm2d",)
    settings = ("eps",)
    tensors = ("?weight", "?bias", "running_mean", "running_var")
    eps: float

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        for name, tensor in tensors.items():
            fits("edge.load", name, tensor.shape, -1, tensors["running_mean"].size)
        mean, variance = (tensors[n].astype(np.float64) for n in ("running_mean", "running_var"))
        scale = 1 / np.sqrt(variance + self.eps)
        if "weight" in tensors:
            scale *= tensors["weight"]
        shift = -mean * scale
        if "bias" in tensors:
            shift += tensors["bias"]
        dtype = wide(tensors["running_mean"]).dtype
        self.scale, self.shift = (a.astype(dtype)[:, None, None] for a in (scale, shift))

    def __call__(self, input: np.ndarray) -> np.ndarray:
        fits("batch_norm", "input", input.shape, -3, len(self.scale))
        output = wide(input) * self.scale
        output += self.shift
        return output.astype(input.dtype, copy=False)


@register
class ReLU(Layer):
    saves = ("torch.nn.modules.activation.ReLU",)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        return np.maximum(input, input.dtype.type(0))


@register
class Sigmoid(Layer):
    saves = ("torch.nn.modules.activation.Sigmoid",)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        return sigmoid(input)


@register
class Identity(Layer):
    saves = (
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.dropout.Dropout",
        "torch.nn.modules.dropout.Dropout2d",
    )

    def __call__(self, input: np.ndarray) -> np.ndarray:
        return input


@register
class MaxPool2d(Layer):
    saves = ("torch.nn.modules.pooling.MaxPool2d",)
    settings = ("kernel_size", "stride", "padding")
    fixed = {"dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,)}
    kernel_size: Any
    stride: Any
    padding: Any

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.kernel = pair("edge", "kernel_size", self.kernel_size)
        self.step = pair("edge", "stride", self.stride)
        self.border = pair("edge", "padding", self.padding, 0)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        for axis, kernel, side in zip((-2, -1), self.kernel, self.border, strict=True):
            if input.shape[axis] + 2 * side < kernel:
                raise value_error(
                    "max_pool2d", "input", "must be at least as large as the kernel",
                    f"{self.kernel} or more, padded", f"shape {input.shape}",
                )  # fmt: skip
        if any(self.border):
            around = [(0, 0)] * (input.ndim - 2) + [(side, side) for side in self.border]
            input = np.pad(input, around, constant_values=-np.inf)
        rows, columns = (
            (size - kernel) // step + 1
            for size, kernel, step in zip(input.shape[-2:], self.kernel, self.step, strict=True)
        )
        output = None
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                some = input[
                    ...,
                    i : i + (rows - 1) * self.step[0] + 1 : self.step[0],
                    j : j + (columns - 1) * self.step[1] + 1 : self.step[1],
                ]
                output = some.copy() if output is None else np.maximum(output, some, out=output)
        return output  # type: ignore[return-value]


@register
class GlobalAveragePool2d(Layer):
    saves = ("torch.nn.modules.pooling.AdaptiveAvgPool2d",)
    fixed = {"output_size": (1, (1, 1))}

    def __call__(self, input: np.ndarray) -> np.ndarray:
        return wide(input).mean(axis=(-2, -1), keepdims=True).astype(input.dtype, copy=False)


@register
class Flatten(Layer):
    saves = ("torch.nn.modules.flatten.Flatten",)
    fixed = {"start_dim": (1,), "end_dim": (-1,)}

    def __call__(self, input: np.ndarray) -> np.ndarray:
        return input.reshape(len(input), math.prod(input.shape[1:]))


@register
class Linear(Layer):
    saves = ("torch.nn.modules.linear.Linear",)
    tensors = ("weight", "?bias")

    def __init__(self, tensors: Tensors, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        weight, self.bias = _linear(tensors)
        self.weight = np.ascontiguousarray(weight.T)

    def __call__(self, input: np.ndarray) -> np.ndarray:
        fits("linear", "input", input.shape, -1, len(self.weight))
        output = wide(input) @ self.weight
        if self.bias is not None:
            output += self.bias
        return output.astype(input.dtype, copy=False)


def check_fixed(op: str, name: str, layer: type[Layer], module: Any) -> None:
    """Settings that the layer has no use for must be those that it computes."""
    for attribute, allowed in layer.fixed.items():
        value = getattr(module, attribute)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise value_error(
                op,
                attribute,
                f"{name or 'the module'}: a {type(module).__name__} can only be saved with",
                ", ".join(map(repr, allowed)),
                repr(value),
            )
