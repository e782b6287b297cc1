"""One file of a model: its tensors as safetensors keeps them, its structure as JSON beside them.

The metadata of the file hold ``dcnlib.edge`` (the form's number) and ``network``, a tree:

    {"layer": name, "key": prefix of its tensors, "settings": {...}}    or
    {"layer": "Sequential", "layers": [...]}

Tensors have the names of the module's ``state_dict``. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from .._problem import DTYPES, type_error, value_error
from .layers import LAYERS, Layer, Sequential, check_fixed

_FORM = "1"
_MARK = "dcnlib.edge"
_DTYPE_OF = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}

Path = str | os.PathLike


class Model:
    """A loaded network: call it with NumPy arrays as its torch module with tensors.

    Attributes
    ----------
    dtype : str or None
        Of inputs and results; None, any, for a network without weights.
    layer : Layer
        What computes: one layer, or all of them in a row.
    """

    def __init__(self, layer: Layer, dtype: str | None) -> None:
        self.layer, self.dtype = layer, dtype

    def __call__(self, input: np.ndarray, *others: np.ndarray | None) -> np.ndarray:
        name = str(getattr(input, "dtype", self.dtype)).removeprefix("torch.")
        if self.dtype not in (None, name):
            raise type_error(
                "edge", "input", "must have the dtype of the model", self.dtype, name,
                "convert it, or load the model with dtype=",
            )  # fmt: skip
        return self.layer(input, *others)  # type: ignore[call-arg]

    def __repr__(self) -> str:
        return f"edge.Model({self.layer!r}, dtype={self.dtype!r})"


def save(module: Any, path: Path, dtype: str | None = None) -> None:
    """Write a trained torch module for `load`, as it computes in evaluation mode.

    Parameters
    ----------
    module : torch.nn.Module
        One of dcnlib's modules, or a ``torch.nn.Sequential`` of them and of ``Conv2d``, ``Linear``,
        ``BatchNorm2d``, ``ReLU``, ``Sigmoid``, ``MaxPool2d``, ``AdaptiveAvgPool2d(1)``, ``Flatten``,
        ``Dropout``, ``Identity``; `register` adds others.
    path : str or path
        By custom with the ending ``.safetensors``.
    dtype : {"float32", "float64", "float16", "bfloat16"}, optional
        To store the weights in; None keeps what the module has. 16 bits halve the file.

    Raises
    ------
    TypeError
        If there is a module that is not known, with those that are.
    ValueError
        For a module with settings that cannot be saved, or with hooks, which would be lost.
    ImportError
        Without the package safetensors: ``pip install "dcnlib[edge]"``.

    Examples
    --------
    >>> import os, tempfile, torch
    >>> from dcnlib import edge, nn
    >>> layer = nn.DeformConv2dPack(4, 8, kernel_size=3, padding=1)
    >>> path = os.path.join(tempfile.mkdtemp(), "layer.safetensors")
    >>> edge.save(layer, path, dtype="float16")
    >>> edge.load(path)(torch.ones(1, 4, 9, 9).numpy()).shape
    (1, 8, 9, 9)
    """
    op = "edge.save"
    if dtype is not None:
        _check_dtype(op, dtype)
    if not hasattr(module, "named_modules"):
        raise type_error(op, "module", "must be a module", "torch.nn.Module", type(module).__name__)
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise value_error(
                op, "module", "hooks cannot be saved", "none", f"some on {name or 'the module'}"
            )
    tensors: dict[str, Any] = {}
    network = _describe(op, module, "", tensors)
    if dtype is not None:
        import torch

        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    metadata = {_MARK: _FORM, "network": json.dumps(network)}
    _needs_safetensors()
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)


def load(path: Path, dtype: str | None = None) -> Model:
    """Read what `save` has written, with NumPy alone; weights are packed here, once.

    Parameters
    ----------
    path : str or path
    dtype : {"float32", "float64", "float16", "bfloat16"}, optional
        Of inputs, results and what lies between layers. None: float64 for a file in float64,
        otherwise float32, into which 16-bit weights go without loss. 16-bit types are storage, as
        everywhere, and not faster; bfloat16 needs ml_dtypes.

    Returns
    -------
    Model
        A callable with the arguments of the module's ``forward``, as NumPy arrays. Its convolutions
        use the threads of `dcnlib.set_num_threads`; it keeps no state between calls.

    Raises
    ------
    ValueError
        For a file of another kind or of a newer dcnlib, or one with missing or misshapen tensors.
    ImportError
        Without the package safetensors.

    Examples
    --------
    See `save`.
    """
    op = "edge.load"
    if dtype is not None:
        _check_dtype(op, dtype)
    tensors, metadata = _read(op, path)
    if metadata.get(_MARK) != _FORM:
        raise value_error(
            op, "path", "must be a file of edge.save", f"{_MARK} {_FORM} in its metadata",
            metadata.get(_MARK), "save the module again, or use a newer dcnlib",
        )  # fmt: skip
    stored = {tensor.dtype.name for tensor in tensors.values()}
    if dtype is None and stored:
        dtype = "float64" if stored == {"float64"} else "float32"
    if dtype is not None:
        target = _numpy_dtype(op, dtype)
        tensors = {name: tensor.astype(target) for name, tensor in tensors.items()}
    try:
        layer = _build(json.loads(metadata["network"]), tensors)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise value_error(
            op, "path", "its description of the network is not one", "layers and their settings",
            f"{type(error).__name__}: {error}",
        ) from error  # fmt: skip
    return Model(layer, dtype)


def _describe(op: str, module: Any, key: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tree of `module`; its tensors go into `tensors`."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if "forward" in vars(module):
        kind += " with a forward of its own"
    if kind in Sequential.saves:
        parts = [
            _describe(op, part, f"{key}{name}.", tensors)
            for name, part in module._modules.items()  # named_children leaves out those it had before
        ]
        return {"layer": "Sequential", "layers": parts}
    layer = next((layer for layer in LAYERS.values() if kind in layer.saves), None)
    if layer is None:
        known = sorted(
            name.rpartition(".")[2] for one in (Sequential, *LAYERS.values()) for name in one.saves
        )
        raise type_error(
            op, "module", f"{key.rstrip('.') or 'the module'} is of a kind that is not known",
            ", ".join(known), kind, "write an edge.Layer for it and edge.register it",
        )  # fmt: skip
    check_fixed(op, key.rstrip("."), layer, module)
    state = module.state_dict()
    for name in layer.tensors:
        if (plain := name.lstrip("?")) in state:
            tensors[key + plain] = state[plain].detach().cpu().contiguous().clone()
        elif plain == name:
            raise value_error(
                op, "module", "has no tensor of that name", key + name, ", ".join(state) or "none"
            )
    settings = {name: getattr(module, name) for name in layer.settings}
    return {"layer": layer.__name__, "key": key, "settings": settings}


def _build(node: dict[str, Any], tensors: dict[str, np.ndarray]) -> Layer:
    name = node["layer"]
    if name == "Sequential":
        return Sequential([_build(part, tensors) for part in node["layers"]])
    if name not in LAYERS:
        raise value_error(
            "edge.load", "path", "has a layer that is not known", ", ".join(LAYERS), repr(name),
            "edge.register it first, or use a newer dcnlib",
        )  # fmt: skip
    layer, key = LAYERS[name], node["key"]
    own = {}
    for tensor in layer.tensors:
        plain = tensor.lstrip("?")
        if key + plain in tensors:
            own[plain] = tensors[key + plain]
        elif plain == tensor:
            raise value_error("edge.load", "path", "a tensor is missing", key + plain, "none")
    settings = {
        setting: tuple(value) if isinstance(value := node["settings"][setting], list) else value
        for setting in layer.settings
    }
    return layer(own, **settings)


def _read(op: str, path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata; bfloat16 is widened here, since NumPy has none."""
    _needs_safetensors()
    from safetensors import SafetensorError, deserialize

    with open(path, "rb") as file:
        data = file.read()
    try:
        found = deserialize(data)
    except SafetensorError as error:
        raise value_error(op, "path", "must be a safetensors file", "one", error) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {}
    for name, tensor in found:
        if tensor["dtype"] not in _DTYPE_OF:
            expected = ", ".join(_DTYPE_OF.values())
            raise value_error(op, name, "must be a tensor of floats", expected, tensor["dtype"])
        if tensor["dtype"] == "BF16":
            bits = np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16
            array = bits.view(np.float32)
        else:
            array = np.frombuffer(tensor["data"], _DTYPE_OF[tensor["dtype"]])
        tensors[name] = array.reshape(tensor["shape"])
    return tensors, header.get("__metadata__") or {}


def _check_dtype(op: str, dtype: Any) -> None:
    if dtype not in DTYPES:
        raise value_error(op, "dtype", "unknown name", ", ".join(DTYPES), repr(dtype))


def _numpy_dtype(op: str, dtype: str) -> np.dtype:
    if dtype != "bfloat16":
        return np.dtype(dtype)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            f"{op}: dtype: bfloat16 arrays need ml_dtypes: python -m pip install ml_dtypes; "
            "without dtype= a bfloat16 file is read as float32"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def _needs_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'dcnlib.edge: files need safetensors: python -m pip install "dcnlib[edge]"'
        ) from error
