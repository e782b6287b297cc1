"""Instruments to see what deformable layers do, for any torch model and for plain offsets.

    locations.py    where taps read, for one layer or through a stack; offset statistics: NumPy
    recording.py    what the layers of a torch model did with an input
    gradients.py    effective receptive field, effective sampling and bin locations
    saliency.py     the smallest part of the input that keeps a response
    plot.py         a thin layer of matplotlib over the arrays that the others return

All return arrays. Importing this imports neither torch nor matplotlib; what needs them does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .locations import (
    Layer,
    OffsetStatistics,
    SamplingLocations,
    offset_statistics,
    sampling_locations,
)

if TYPE_CHECKING:
    from . import plot as plot
    from .gradients import (
        EffectiveBins,
        EffectiveLocations,
        EffectiveReceptiveField,
        effective_bin_locations,
        effective_receptive_field,
        effective_sampling_locations,
    )
    from .recording import record_layers
    from .saliency import Saliency, error_bounded_saliency

__all__ = [
    "EffectiveBins",
    "EffectiveLocations",
    "EffectiveReceptiveField",
    "Layer",
    "OffsetStatistics",
    "Saliency",
    "SamplingLocations",
    "effective_bin_locations",
    "effective_receptive_field",
    "effective_sampling_locations",
    "error_bounded_saliency",
    "offset_statistics",
    "record_layers",
    "sampling_locations",
]

#: Names whose modules import torch (or, `plot`, matplotlib) and therefore load on first use.
_LAZY = {
    "EffectiveBins": "gradients",
    "effective_bin_locations": "gradients",
    "EffectiveLocations": "gradients",
    "EffectiveReceptiveField": "gradients",
    "effective_receptive_field": "gradients",
    "effective_sampling_locations": "gradients",
    "record_layers": "recording",
    "Saliency": "saliency",
    "error_bounded_saliency": "saliency",
    "plot": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name] or name}", __name__)
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return sorted([*__all__, "plot"])
