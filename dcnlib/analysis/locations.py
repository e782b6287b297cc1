"""Where the taps of deformable layers read, and statistics of their offsets: geometry in NumPy.

A `Layer` is what one layer did with a batch; `recording.record_layers` makes them from a torch model.
Positions are (y, x) in pixels, (0, 0) the centre of the first pixel, computed in float64.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._problem import four_sides, integer, pair, type_error, value_error

_LARGEST = 10_000_000  # locations of one call: 160 MB
_POSITION = "one (row, column), or several of shape (M, 2)"


@dataclass(frozen=True)
class Layer:
    """What one layer did with a batch of inputs: where its windows lie and how its taps moved.

    Attributes
    ----------
    name : str
        The module's name in the model, or "" for an offset that came alone.
    kernel_size, stride, dilation : (h, w)
    padding : (top, left)
    in_size, out_size : (height, width)
        Of the map that it reads and of the one that it makes.
    offset : array of shape (N, offset_groups, KH*KW, 2, out_h, out_w), or None
        (y, x) of every tap in pixels of the input map; None for a plain convolution or pooling.
    mask : array of shape (N, offset_groups, KH*KW, out_h, out_w), or None
    reads : frozenset of str, or None
        Names of the layers that its input was made from, near and far; None if that is unknown.
    """

    name: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    offset: np.ndarray | None = None
    mask: np.ndarray | None = None
    reads: frozenset[str] | None = None

    @property
    def grid(self) -> np.ndarray:
        """(KH*KW, 2): the taps of the window at unit (0, 0), before any offset."""
        rows, columns = (
            np.arange(size) * dilation - padding
            for size, dilation, padding in zip(
                self.kernel_size, self.dilation, self.padding, strict=True
            )
        )
        grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1)
        return grid.reshape(-1, 2).astype(np.float64)


@dataclass(frozen=True)
class SamplingLocations:
    """Where output units read the input.

    Attributes
    ----------
    locations : array of shape (..., P, 2), float64
        (y, x) in pixels of the input of the first layer. P is the product over the layers of
        offset_groups*KH*KW, the last layer's taps outermost. The leading axes are (N,) and (M,) for
        several positions, or (out_h, out_w) where no position was given.
    weight : array of shape (..., P), float64
        The product of the masks along the way, 1 without masks; 0 where a step reads outside its
        map, as nothing is read there.
    """

    locations: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True)
class OffsetStatistics:
    """The offsets (and the mask) of one layer in numbers, over all images, units and groups.

    Attributes
    ----------
    name : str
    mean, std : arrays of shape (2,)
        Of the offsets, (y, x), in pixels of the layer's input.
    length : array of shape (5,)
        Minimum, quartiles and maximum of the offsets' lengths in pixels.
    tap_mean : array of shape (KH*KW, 2)
        The mean offset of each tap.
    effective_dilation : float
        Mean distance between taps that are neighbours in the kernel; the dilation of an undeformed
        layer. NaN for a 1 x 1 kernel.
    outside : float
        Share of the samples that read outside the map, where everything is 0.
    mask_mean, mask_std : float or None
        None for a layer without a mask.
    """

    name: str
    mean: np.ndarray
    std: np.ndarray
    length: np.ndarray
    tap_mean: np.ndarray
    effective_dilation: float
    outside: float
    mask_mean: float | None
    mask_std: float | None


def sampling_locations(
    layer_or_offset: Any,
    position: Any = None,
    *,
    input: Any = None,
    layers: Sequence[str] | None = None,
    plain_taps: bool = False,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Any = None,
    in_size: tuple[int, int] | None = None,
) -> SamplingLocations:
    """Where output units read: the positions of all their taps, through one layer or a stack.

    Through a stack, each sample of the last layer is taken as a unit of the layer below, and so on
    down to the input: n layers of nine taps give 9**n locations. Between units, where samples fall,
    offsets and masks are interpolated.

    Parameters
    ----------
    layer_or_offset : array, tensor, Layer, sequence of Layer, or torch.nn.Module
        An offset (N, 2*offset_groups*KH*KW, OH, OW), or without N, needs no torch and is described by
        the last six arguments. Layers are those of `record_layers`, in the order of the forward
        pass, each reading what the one before made. A module is run on `input`.
    position : (row, column), or array of shape (M, 2), optional
        Units of the last layer's output; fractions are allowed. None takes all of them.
    input : tensor, or tuple of tensors
        What the module is called with; needed for a module, refused otherwise.
    layers : sequence of str, optional
        Names of the layers to follow, where a model is no chain of layers. None follows all
        convolutions and poolings that are modules, except those that only predict offsets or masks.
    plain_taps : bool
        Whether to follow each tap of plain convolutions and poolings too. By default these only
        move locations to the middle of their windows, so that taps of deformable layers are seen.
    kernel_size, stride, padding, dilation
        Of the layer whose `offset` is given, as for `dcnlib.deform_conv2d`.
    mask : array or tensor of shape (N, offset_groups*KH*KW, OH, OW), optional
        Goes with an offset.
    in_size : (height, width), optional
        Of the input, to know what is outside. None: the largest with an output as large as that of
        `offset`; at stride 1 there is only one.

    Returns
    -------
    SamplingLocations

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, among them layers that are no chain and more than ten million
        locations.

    Examples
    --------
    >>> import numpy as np
    >>> from dcnlib.analysis import sampling_locations
    >>> offset = np.zeros((2 * 9, 5, 5))
    >>> offset[0] = -0.5  # the first tap half a pixel up
    >>> seen = sampling_locations(offset, (2, 2), padding=1)
    >>> seen.locations[:4].tolist()
    [[0.5, 1.0], [1.0, 2.0], [1.0, 3.0], [2.0, 1.0]]
    """
    op = "sampling_locations"
    alone = _is_array(layer_or_offset)
    stack, batched = as_layers(
        op, layer_or_offset, input, layers, kernel_size, stride, padding, dilation, mask, in_size
    )
    _check_chain(op, stack, named=layers is not None)
    start, lead = _start(op, stack[-1].out_size, position)
    images = {len(layer.offset) for layer in stack if layer.offset is not None} or {1}
    if len(images) > 1:
        raise value_error(
            op, "layers", "must have seen the same images", "one batch size", sorted(images)
        )
    (n,) = images
    followed = [layer for layer in stack if plain_taps or layer.offset is not None]
    each = math.prod(map(_fan_out, followed))
    points = n * len(start) * each
    if points > _LARGEST:
        raise value_error(
            op,
            "position",
            "too many locations",
            f"at most {_LARGEST}",
            points,
            "ask for fewer positions or layers, or one image",
        )

    at = np.broadcast_to(start, (n, *start.shape))
    weight = np.ones(at.shape[:2])
    for layer in reversed(stack):
        at, weight = _step(layer, at, weight, plain_taps)
    at = at.reshape(n, *lead, each, 2)
    weight = weight.reshape(n, *lead, each)
    if alone and not batched:
        return SamplingLocations(at[0], weight[0])
    return SamplingLocations(at, weight)


def offset_statistics(
    layer_or_offset: Any,
    *,
    input: Any = None,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Any = None,
    in_size: tuple[int, int] | None = None,
) -> list[OffsetStatistics]:
    """How far the taps of each deformable layer move, and how its mask weighs them.

    Parameters
    ----------
    layer_or_offset, input, kernel_size, stride, padding, dilation, mask, in_size
        As for `sampling_locations`.

    Returns
    -------
    list of OffsetStatistics
        One for each deformable layer, in the order of the forward pass.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; for a model without a deformable layer.

    Examples
    --------
    >>> import numpy as np
    >>> from dcnlib.analysis import offset_statistics
    >>> taps = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1)  # (3, 3, 2)
    >>> offset = np.broadcast_to(taps.reshape(18, 1, 1), (18, 5, 5))  # twice as wide
    >>> (row,) = offset_statistics(offset, padding=1)
    >>> row.effective_dilation, row.length.round(2).tolist()
    (2.0, [0.0, 1.0, 1.0, 1.41, 1.41])
    """
    op = "offset_statistics"
    stack, _ = as_layers(
        op, layer_or_offset, input, None, kernel_size, stride, padding, dilation, mask, in_size
    )
    stack = [layer for layer in stack if layer.offset is not None]
    for layer in stack:
        if not layer.offset.size:
            raise value_error(op, "offset", "needs images", "N of at least 1", layer.offset.shape)
    return [_statistics(layer) for layer in stack]


@np.errstate(invalid="ignore")  # the difference of infinities is NaN
def _statistics(layer: Layer) -> OffsetStatistics:
    assert layer.offset is not None
    offset = np.moveaxis(layer.offset.astype(np.float64), 3, -1)  # (N, G, K, OH, OW, 2)
    length = np.hypot(offset[..., 0], offset[..., 1])
    moved = offset + layer.grid[:, None, None]
    window = moved.reshape(*moved.shape[:2], *layer.kernel_size, *moved.shape[3:])
    steps = [np.linalg.norm(np.diff(window, axis=axis), axis=-1).ravel() for axis in (2, 3)]
    distance = np.concatenate(steps)
    unit = np.stack(np.indices(layer.out_size), -1) * layer.stride
    inside = _inside(moved + unit, layer.in_size)
    none = layer.mask is None
    return OffsetStatistics(
        layer.name,
        offset.mean((0, 1, 2, 3, 4)),
        offset.std((0, 1, 2, 3, 4)),
        np.quantile(length, [0, 0.25, 0.5, 0.75, 1]),
        offset.mean((0, 1, 3, 4)),
        float(distance.mean()) if distance.size else math.nan,
        float(1 - inside.mean()),
        None if none else float(layer.mask.mean()),
        None if none else float(layer.mask.std()),
    )


def _step(
    layer: Layer, at: np.ndarray, weight: np.ndarray, plain_taps: bool
) -> tuple[np.ndarray, np.ndarray]:
    """From units (N, M, 2) of the layer's output to the samples (N, M*P, 2) of its input."""
    n, m, _ = at.shape
    grid = layer.grid
    if layer.offset is None and not plain_taps:
        grid = grid.mean(0, keepdims=True)
    reads = (at * layer.stride)[:, :, None] + grid  # (N, M, K, 2)
    weight = weight[:, :, None]
    if layer.offset is not None:
        taps = math.prod(layer.offset.shape[1:3])
        moved = _between(layer.offset.reshape(n, 2 * taps, *layer.out_size), at)
        reads = np.tile(reads, (1, 1, layer.offset.shape[1], 1)) + moved.reshape(n, m, taps, 2)
        if layer.mask is not None:
            weight = weight * _between(layer.mask.reshape(n, taps, *layer.out_size), at)
    weight = np.where(_inside(reads, layer.in_size), weight, 0.0)
    samples = m * reads.shape[2]
    return reads.reshape(n, samples, 2), weight.reshape(n, samples)


def _between(field: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`field` (N, A, OH, OW) interpolated at units (N, M, 2), the border's values beyond it."""
    last = np.array(field.shape[2:]) - 1
    inner = np.clip(np.nan_to_num(at, nan=0.0), 0, last)
    low = np.floor(inner).astype(np.int64)
    high = np.minimum(low + 1, last)
    y, x = np.moveaxis((inner - low)[..., None], 2, 0)  # (N, M, 1) each
    values = np.moveaxis(field.astype(np.float64), 1, -1)
    image = np.arange(len(field))[:, None]

    def row(rows: np.ndarray) -> np.ndarray:
        left, right = values[image, rows, low[..., 1]], values[image, rows, high[..., 1]]
        return np.where(x == 0, left, left + x * (right - left))

    with np.errstate(invalid="ignore"):  # infinities next to each other are NaN
        upper, lower = row(low[..., 0]), row(high[..., 0])
        return np.where(y == 0, upper, upper + y * (lower - upper))


def _inside(at: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Whether a sample can be anything but 0; NaN is not."""
    return ((at > -1) & (at < np.array(size))).all(-1)


def _fan_out(layer: Layer) -> int:
    groups = 1 if layer.offset is None else layer.offset.shape[1]
    return groups * math.prod(layer.kernel_size)


def _start(op: str, size: tuple[int, int], position: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """The units to begin with (M, 2), and the axes that they have in the result."""
    if position is None:
        return np.stack(np.indices(size), -1).reshape(-1, 2).astype(np.float64), size
    try:
        start = np.asarray(position, np.float64)
    except (TypeError, ValueError):
        raise type_error(op, "position", "must be numbers", _POSITION, repr(position)) from None
    if start.ndim not in (1, 2) or start.shape[-1] != 2:
        raise value_error(op, "position", "unknown shape", _POSITION, start.shape)
    if not ((start >= 0) & (start <= np.array(size) - 1)).all():
        raise value_error(
            op,
            "position",
            "must lie on the output map",
            f"rows in [0, {size[0] - 1}], columns in [0, {size[1] - 1}]",
            start.tolist(),
        )
    return start.reshape(-1, 2), start.shape[:-1]


def _check_chain(op: str, stack: Sequence[Layer], named: bool) -> None:
    """Each layer must read a map as large as the one before makes, and unless named, that one."""
    for below, above in itertools.pairwise(stack):
        branch = not named and above.reads is not None and below.name not in above.reads
        if branch or below.out_size != above.in_size:
            raise value_error(
                op,
                "layers",
                f"{above.name!r} does not read what {below.name!r} makes",
                f"a map of {below.out_size}",
                "one of another branch" if branch else above.in_size,
                "name the layers that follow each other with layers=",
            )


def as_layers(
    op: str, source: Any, input: Any, names: Sequence[str] | None,
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, mask: Any, in_size: Any,
) -> tuple[list[Layer], bool]:  # fmt: skip
    """What the caller gave as layers, at least one of them, and whether it had a batch axis."""
    if _is_array(source):
        for name, value in (("input", input), ("layers", names)):
            if value is not None:
                raise value_error(
                    op, name, "goes with a module", "None for an offset", _kind(value)
                )
        layer = _from_offset(op, source, kernel_size, stride, padding, dilation, mask, in_size)
        return [layer], source.ndim == 4
    for name, value in (("mask", mask), ("in_size", in_size)):
        if value is not None:
            raise value_error(op, name, "goes with an offset", "None for layers", _kind(value))
    if _is_instance(source, "torch.nn", "Module"):
        if input is None:
            raise value_error(op, "input", "a module is run on it", "a tensor", None)
        from .recording import recorded

        stack = recorded(op, source, input)
    else:
        if input is not None:
            raise value_error(op, "input", "goes with a module", "None for layers", _kind(input))
        stack = [source] if isinstance(source, Layer) else source
        if not isinstance(stack, list | tuple) or not all(isinstance(i, Layer) for i in stack):
            raise type_error(
                op,
                "layer_or_offset",
                "unknown kind",
                "an offset (array or tensor), Layer, sequence of Layer or torch.nn.Module",
                _kind(source),
            )
    if names is not None:
        if isinstance(names, str):
            raise type_error(op, "layers", "must be names", "a list of str", repr(names))
        found = {layer.name: layer for layer in stack}
        for name in names:
            if name not in found:
                raise value_error(
                    op, "layers", "no such layer", f"names out of {sorted(found)}", repr(name)
                )
        stack = [found[name] for name in names]
    if not stack or (names is None and all(layer.offset is None for layer in stack)):
        raise value_error(
            op,
            "layer_or_offset",
            "needs a deformable layer",
            "one that calls deform_conv2d",
            f"{[layer.name for layer in stack]}",
            "name plain layers with layers= to follow these alone",
        )
    return list(stack), True


def _from_offset(
    op: str, offset: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, mask: Any,
    in_size: Any,
) -> Layer:  # fmt: skip
    kernel, stride = pair(op, "kernel_size", kernel_size), pair(op, "stride", stride)
    dilation = pair(op, "dilation", dilation)
    sides = four_sides(op, padding, kernel, stride, dilation)
    offset, taps = to_numpy(offset), math.prod(kernel)
    if offset.dtype.kind in "cOSUMm":
        raise type_error(op, "offset", "must be real numbers", "float64 or the like", offset.dtype)
    if offset.ndim not in (3, 4) or offset.shape[-3] % (2 * taps) or 0 in offset.shape[-3:]:
        raise value_error(
            op,
            "offset",
            "must have shape (N, 2*offset_groups*KH*KW, OH, OW) or, unbatched, without N",
            f"a multiple of {2 * taps} channels for a kernel of {kernel}",
            offset.shape,
        )
    offset = offset.reshape(-1, *offset.shape[-3:])
    n, channels, *out = offset.shape
    groups = channels // (2 * taps)
    if mask is not None:
        if not _is_array(mask):
            raise type_error(op, "mask", "unknown kind", "an array or tensor", _kind(mask))
        expected = (n, groups * taps, *out)
        mask = to_numpy(mask)
        if mask.shape not in (expected, expected[1:]):
            raise value_error(op, "mask", "must fit the offset", expected, mask.shape)
        mask = mask.reshape(n, groups, taps, *out)
    largest = [
        out[a] * stride[a] + dilation[a] * (kernel[a] - 1) - sides[2 * a] - sides[2 * a + 1]
        for a in (0, 1)
    ]
    if in_size is None:
        in_size = largest
    elif not isinstance(in_size, list | tuple) or len(in_size) != 2:
        raise value_error(op, "in_size", "must be a pair", "(height, width)", repr(in_size))
    height, width = (integer(op, "in_size", size, 1) for size in in_size)
    if not all(0 <= largest[a] - (height, width)[a] < stride[a] for a in (0, 1)):
        ranges = " x ".join(
            f"{last}" if step == 1 else f"[{last - step + 1}, {last}]"
            for last, step in zip(largest, stride, strict=True)
        )
        raise value_error(
            op, "in_size", "must give an output as large as that of the offset", ranges,
            (height, width), "check kernel_size, stride, padding and dilation",
        )  # fmt: skip
    return Layer(
        "", kernel, stride, (sides[0], sides[2]), dilation, (height, width), (out[0], out[1]),
        offset.reshape(n, groups, taps, 2, *out), mask,
    )  # fmt: skip


def to_numpy(array: Any) -> np.ndarray:
    """An array as it is, a tensor as a float64 array."""
    return array if isinstance(array, np.ndarray) else array.detach().cpu().double().numpy()


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_instance(value, "torch", "Tensor")


def _is_instance(value: Any, module: str, name: str) -> bool:
    """`isinstance` without an import: if nobody has imported it, nothing can be one."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def _kind(value: Any) -> str:
    return type(value).__name__
