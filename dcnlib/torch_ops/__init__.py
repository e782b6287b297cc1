"""torch.ops.dcnlib: the operators as torch sees them; with `nn` and `compat` all that imports it.

    schemas.py      definitions, the check of a call, fake kernels: the contract
    kernels.py      CPU and CUDA: tensors to addresses, new tensors for results, call a backend
    autograd.py     first derivatives by the backward operator, all others by composite.py
    transforms.py   autocast and vmap
    composite.py    the operator and its derivative in differentiable torch code

Importing registers everything, once in a process: what torch already knows is left alone.
"""

from __future__ import annotations

from . import autograd, kernels, schemas, transforms
from .autograd import deform_conv2d, deform_conv2d_backward
from .schemas import check_dense

if schemas.DEFINED_HERE:
    for part in (schemas, kernels, autograd, transforms):
        part.register()

__all__ = ["check_dense", "deform_conv2d", "deform_conv2d_backward"]
