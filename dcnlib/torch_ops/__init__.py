"""torch.ops.dcnlib: the operators as torch sees them; with `nn` and `compat` all that imports it.

    schemas.py      definitions, the check of a call, fake kernels: the contract
    kernels.py      CPU and CUDA: tensors to addresses, new tensors for results, call a backend
    autograd.py     first derivatives by the backward operator, all others by composite.py
    transforms.py   autocast and vmap
    composite.py    the operator and its derivative in differentiable torch code

for the convolution; the other operators say only what is theirs and share the rest:

    operator.py     what every operator has: schema, kernels, derivatives, autocast, vmap
    pooling.py      RoI pooling; composite_pool.py
    resampling.py   resampling; composite_resample.py

Importing registers everything, once in a process: what torch already knows is left alone.
"""

from __future__ import annotations

from . import autograd, kernels, schemas, transforms
from .autograd import deform_conv2d, deform_conv2d_backward
from .pooling import PSRoIPool, RoIPool
from .resampling import Resample
from .schemas import check_dense

if schemas.DEFINED_HERE:
    for part in (schemas, kernels, autograd, transforms):
        part.register()

deform_roi_pool, deform_psroi_pool, deform_resample2d = RoIPool(), PSRoIPool(), Resample()
for each in (deform_roi_pool, deform_psroi_pool, deform_resample2d):
    if each.defined_here:
        each.register()

__all__ = [
    "check_dense",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_psroi_pool",
    "deform_resample2d",
    "deform_roi_pool",
]
