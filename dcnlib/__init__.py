"""dcnlib: deformable convolution and pooling for NumPy and torch, fast on CPUs.

The public names live here; `dcnlib.nn`, `dcnlib.edge` and the like load on first use, since most of them
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._config import cpu_isa, get_num_threads, set_num_threads
from ._dispatch import backends
from ._info import show_config
from ._version import __version__
from .functional import conv2d, deform_conv2d, deform_conv2d_backward
from .pooling import (
    deform_psroi_pool,
    deform_psroi_pool_backward,
    deform_roi_pool,
    deform_roi_pool_backward,
)
from .resample import deform_resample2d, deform_resample2d_backward

if TYPE_CHECKING:
    from . import analysis as analysis
    from . import compat as compat
    from . import convert as convert
    from . import edge as edge
    from . import nn as nn
    from . import optim as optim
    from . import testing as testing

__all__ = [
    "__version__",
    "backends",
    "conv2d",
    "cpu_isa",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_psroi_pool",
    "deform_psroi_pool_backward",
    "deform_resample2d",
    "deform_resample2d_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "get_num_threads",
    "set_num_threads",
    "show_config",
]

_LAZY = ("analysis", "compat", "convert", "edge", "nn", "optim", "testing")


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
