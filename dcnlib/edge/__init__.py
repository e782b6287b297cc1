"""From a trained torch module to a device that has NumPy alone.

    save(module, path)     where torch is: weights and settings into one safetensors file
    load(path)             where it is not: a callable over NumPy arrays, by dcnlib's own kernels
    onnx_translations()    what ``torch.onnx.export`` needs to know of dcnlib's operators
    from_onnx_node(...)    one ``DeformConv`` node of an ONNX file as such a callable

`layers.py` has the modules that are known, `files.py` the file, `onnx.py` the last two. Importing this
imports neither torch nor safetensors.
"""

from __future__ import annotations

from .files import load, save
from .layers import Layer, register
from .onnx import from_onnx_node, onnx_translations

__all__ = ["Layer", "from_onnx_node", "load", "onnx_translations", "register", "save"]
