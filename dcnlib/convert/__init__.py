"""Moving what other libraries made to dcnlib: offsets, checkpoints and whole models.

`layouts.py`    offsets and masks between the orders of channels in use; NumPy and torch
`models.py`     checkpoints by key, and swapping the layers of a model; imports torch on first use
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layouts import LAYOUTS, mask, mask_channels, offset, offset_channels

if TYPE_CHECKING:
    from .models import Replacements, equivalent, replace_modules, state_dict

__all__ = [
    "LAYOUTS",
    "Replacements",
    "equivalent",
    "mask",
    "mask_channels",
    "offset",
    "offset_channels",
    "replace_modules",
    "state_dict",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
