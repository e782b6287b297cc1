"""From a trained torch module to a device that has NumPy alone.

    save(module, path)     where torch is: weights and settings into one safetensors file
    load(path)             where it is not: a callable over NumPy arrays, by dcnlib's own kernels

`layers.py` has the modules that are known, `files.py` the file. Importing this imports neither torch
nor safetensors.
"""

from __future__ import annotations

from .files import load, save
from .layers import Layer, register

__all__ = ["Layer", "load", "register", "save"]
