"""Weights that stay packed from call to call, where their owner has frozen them (`dcnlib.nn.freeze`).

The CPU kernels read a copy of the weight, packed for them in every call: up to a tenth of the time
where images are small and channels many. torch cannot tell for certain that a weight is what it was: its
version counter misses writes through ``.data``, through arrays that share the memory, and those of
fused optimizers. So nothing is kept unasked. What is asked for is kept

- while the tensor lives and does not require gradients, so that no optimizer writes to it,
- for one memory, version and use of it; another one takes its place,
- from the second call alike on: a weight that changes with every call is never packed twice.

Threads may share a weight. Each call holds the packed form that it uses; two that pack at once make
the same one.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any
from weakref import ref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._problem import DeformConv2dProblem


class _Frozen:
    """A weight, how it was used last, and its packed form or None."""

    def __init__(self, weight: Tensor) -> None:
        key = id(weight)
        # Called before anything else can get this id.
        self.weight = ref(weight, lambda _: _frozen.pop(key, None))
        self.state: tuple[Any, Any, Any] = (None, None, None)


_frozen: dict[int, _Frozen] = {}


def freeze(weight: Tensor) -> None:
    """Allow a weight to stay packed; forgets what has been packed of it."""
    _frozen[id(weight)] = _Frozen(weight)


def operand(backend: ModuleType, call: DeformConv2dProblem, weight: Tensor) -> Any:
    """What the CPU backend gets for a dense weight: its address, or its packed form."""
    address = weight.data_ptr()
    frozen = _frozen.get(id(weight)) if _frozen else None
    if frozen is None or frozen.weight() is not weight:
        return address
    if weight.requires_grad or weight.is_inference():  # inference tensors have no version
        frozen.state = (None, None, None)
        return address
    storage = weight.untyped_storage()
    use = (
        storage._cdata, address, weight._version, weight.shape, weight.dtype,
        call.in_channels, call.offset_groups,
    )  # fmt: skip
    known, held, packed = frozen.state
    if known != use:
        # Held weakly, a storage may die, but no other one gets its identity.
        frozen.state = (use, StorageWeakRef(storage), None)
    elif packed is not None:
        return packed
    else:
        try:
            packed = backend.pack_weight(call, address)
        except MemoryError:
            return address
        frozen.state = (use, held, packed)
        return packed
    return address
