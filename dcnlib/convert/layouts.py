"""Offsets and masks between the orders of channels that libraries use, by moving channels only.

| layout       | channels of the offset, outer to inner | taps    | stored as      |
| ------------ | -------------------------------------- | ------- | -------------- |
| `dcnlib`     | group, row, column, {y, x}             | by rows | (..., C, H, W) |
| `xy`         | group, row, column, {x, y}             | by rows | (..., C, H, W) |
| `blocked`    | {y, x}, group, row, column             | by rows | (..., C, H, W) |
| `blocked_xy` | {x, y}, group, row, column             | by rows | (..., C, H, W) |
| `dcnv3`      | group, column, row, {x, y}             | by columns | (..., H, W, C) |

`dcnlib` is that of torchvision, mmcv, Paddle and ONNX, too.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .._problem import integer, pair, type_error, value_error

Array = TypeVar("Array")


class _Layout(NamedTuple):
    axes: str  # of the offset's channels, outer to inner: group, height, width, pair
    x_first: bool = False
    channels_last: bool = False


LAYOUTS = {
    "dcnlib": _Layout("ghwp"),
    "xy": _Layout("ghwp", True),
    "blocked": _Layout("pghw"),
    "blocked_xy": _Layout("pghw", True),
    "dcnv3": _Layout("gwhp", True, True),
}


def offset(
    offset: Array,
    source: str,
    target: str = "dcnlib",
    *,
    kernel_size: int | tuple[int, int],
    offset_groups: int = 1,
) -> Array:
    """An offset in another layout; values and units stay.

    Parameters
    ----------
    offset : array or tensor in the layout `source`
    source, target : {"dcnlib", "xy", "blocked", "blocked_xy", "dcnv3"}
        "dcnlib" is the layout of torchvision, mmcv, Paddle and ONNX: interleaved, y before x.
        "xy" has x before y. "blocked" has all y, then all x ("blocked_xy": all x, then all y).
        "dcnv3" has channels last, taps by columns, and x before y.
    kernel_size : int or (h, w)
    offset_groups : int

    Returns
    -------
    array or tensor in the layout `target`
        A new one in memory of its own.

    Raises
    ------
    TypeError, ValueError
        For unknown layouts, and channels that are not 2 * offset_groups * KH * KW.

    Examples
    --------
    >>> import numpy as np
    >>> from dcnlib import convert
    >>> blocked = np.array([10, 11, 20, 21]).reshape(4, 1, 1)  # y of two taps, x of two taps
    >>> convert.offset(blocked, "blocked", kernel_size=(1, 2)).ravel()
    array([10, 20, 11, 21])
    """
    channels = _channels("convert.offset", source, target, kernel_size, offset_groups, 2)
    return _moved("offset", offset, source, target, channels)


def mask(
    mask: Array,
    source: str,
    target: str = "dcnlib",
    *,
    kernel_size: int | tuple[int, int],
    offset_groups: int = 1,
) -> Array:
    """A mask in another layout: the same as `offset` with one channel a tap.

    Parameters
    ----------
    mask : array or tensor in the layout `source`
    source, target, kernel_size, offset_groups
        As for `offset`.

    Returns
    -------
    array or tensor in the layout `target`

    Raises
    ------
    TypeError, ValueError
        As `offset`.

    Examples
    --------
    >>> import numpy as np
    >>> from dcnlib import convert
    >>> by_columns = np.array([[[11, 21, 12, 22]]])  # (H, W, taps)
    >>> convert.mask(by_columns, "dcnv3", kernel_size=2).ravel()
    array([11, 12, 21, 22])
    """
    channels = _channels("convert.mask", source, target, kernel_size, offset_groups, 1)
    return _moved("mask", mask, source, target, channels)


def offset_channels(
    source: str, target: str, kernel_size: int | tuple[int, int], offset_groups: int = 1
) -> np.ndarray:
    """Which channel of `source` is each channel of `target`: for weights that predict offsets.

    Parameters
    ----------
    source, target, kernel_size, offset_groups
        As for `offset`.

    Returns
    -------
    array of shape (2*offset_groups*KH*KW,)

    Examples
    --------
    >>> import torch
    >>> from dcnlib import convert
    >>> predictor = torch.nn.Conv2d(4, 18, 3)  # predicts all y, then all x
    >>> channels = convert.offset_channels("blocked", "dcnlib", 3)
    >>> weight, bias = predictor.weight[channels], predictor.bias[channels]
    >>> channels[:4]
    array([ 0,  9,  1, 10])
    """
    return _channels("convert.offset_channels", source, target, kernel_size, offset_groups, 2)


def mask_channels(
    source: str, target: str, kernel_size: int | tuple[int, int], offset_groups: int = 1
) -> np.ndarray:
    """The same for channels of masks.

    Parameters
    ----------
    source, target, kernel_size, offset_groups
        As for `offset`.

    Returns
    -------
    array of shape (offset_groups*KH*KW,)

    Examples
    --------
    >>> from dcnlib import convert
    >>> convert.mask_channels("dcnv3", "dcnlib", 2)
    array([0, 2, 1, 3])
    """
    return _channels("convert.mask_channels", source, target, kernel_size, offset_groups, 1)


def _channels(
    op: str, source: Any, target: Any, kernel_size: Any, offset_groups: Any, per_tap: int
) -> np.ndarray:
    given, wanted = _layout(op, "source", source), _layout(op, "target", target)
    height, width = pair(op, "kernel_size", kernel_size)
    groups = integer(op, "offset_groups", offset_groups, 1)
    sizes = {"g": groups, "h": height, "w": width, "p": per_tap}
    numbers = np.arange(groups * height * width * per_tap)
    numbers = numbers.reshape([sizes[axis] for axis in given.axes])
    numbers = numbers.transpose([given.axes.index(axis) for axis in wanted.axes])
    if given.x_first != wanted.x_first:
        numbers = np.flip(numbers, wanted.axes.index("p"))
    return numbers.ravel()


def _layout(op: str, argument: str, name: Any) -> _Layout:
    expected = ", ".join(LAYOUTS)
    if not isinstance(name, str):
        raise type_error(
            op, argument, "must be the name of a layout", expected, type(name).__name__
        )
    if name not in LAYOUTS:
        raise value_error(op, argument, "unknown layout", expected, repr(name))
    return LAYOUTS[name]


def _moved(name: str, array: Any, source: str, target: str, channels: np.ndarray) -> Any:
    op = f"convert.{name}"
    torch = sys.modules.get("torch")  # never imported: then nothing can be a tensor
    if not isinstance(array, np.ndarray | getattr(torch, "Tensor", np.ndarray)):
        expected, got = "numpy.ndarray or torch.Tensor", type(array).__name__
        raise type_error(op, name, "must be an array or a tensor", expected, got)
    old, new = (-1 if LAYOUTS[layout].channels_last else -3 for layout in (source, target))
    if array.ndim < 3 or array.shape[old] != len(channels):
        rule = f"must have a channel for every component of every tap in axis {old}"
        raise value_error(op, name, rule, len(channels), tuple(array.shape))
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(np.moveaxis(array.take(channels, old), old, new))
    index = torch.from_numpy(channels).to(array.device)
    return array.index_select(old, index).movedim(old, new).contiguous()
