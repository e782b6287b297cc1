"""Between the public functions and their two kinds of arguments: NumPy arrays and torch tensors."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np

from ._problem import Spec, type_error


def is_torch(op: str, arrays: dict[str, Any], optional: tuple[str, ...] = ()) -> bool:
    """True if every argument is a torch tensor, False if every one is a NumPy array.

    Those named in `optional` may be None.
    """
    torch = sys.modules.get("torch")  # never imported: then nothing can be a tensor
    tensor = getattr(torch, "Tensor", ())
    first = isinstance(arrays["input"], tensor)
    kind = tensor if first else np.ndarray
    for name, array in arrays.items():
        if isinstance(array, kind):
            if first:
                if array.is_nested:
                    torch_ops().check_dense(op, **{name: array})
                continue
            # A masked array would silently lose what it masks.
            if type(array) is np.ndarray or not isinstance(array, np.ma.MaskedArray):
                continue
        elif array is None and name in optional:
            continue
        raise type_error(
            op,
            name,
            "arguments must be all NumPy arrays or all torch tensors",
            "torch.Tensor" if first else "numpy.ndarray",
            f"{type(array).__module__}.{type(array).__qualname__}",
            "convert with numpy.asarray or torch.as_tensor",
        )
    return first


def memory(array: Any) -> Any:
    """The array itself, whatever a subclass says of its shape; None stays None."""
    return array if array is None or type(array) is np.ndarray else np.asarray(array)


def spec(array: np.ndarray | None) -> Spec | None:
    return None if array is None else (array.shape, _dtype_name(array.dtype))


@cache
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name


def plain(array: np.ndarray) -> np.ndarray:
    """`array` as native backends read it: C order, aligned, native byte order."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and array.dtype.isnative:
        return array
    return np.require(array, array.dtype.newbyteorder("="), ("C_CONTIGUOUS", "ALIGNED"))


_torch_ops: Any = None


def torch_ops() -> Any:
    """`dcnlib.torch_ops`, imported by the first call with a tensor."""
    global _torch_ops
    if _torch_ops is None:
        from . import torch_ops as package

        _torch_ops = package
    return _torch_ops
