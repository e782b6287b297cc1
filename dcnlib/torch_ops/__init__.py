"""torch.ops.dcnlib: the operators as torch sees them. With `nn` and `compat`, all that imports torch.

    schemas.py      definitions, the check of a call, fake kernels: the contract
    kernels.py      CPU and CUDA: tensors to addresses, new tensors for results, call a backend
    autograd.py     first derivatives by the backward operator, all others by composite.py
    transforms.py   autocast and vmap
    composite.py    the operator and its derivative in differentiable torch code

Importing registers everything, once in a process: what torch already knows is left alone.
"""

from __future__ import annotations

import torch

from . import autograd, kernels, schemas, transforms

if schemas.define():
    for part in (schemas, kernels, autograd, transforms):
        part.register()

deform_conv2d = torch.ops.dcnlib.deform_conv2d.default
deform_conv2d_backward = torch.ops.dcnlib.deform_conv2d_backward.default
