"""Other libraries' names, argument orders and defaults on top of dcnlib; each imports torch.

`mmcv`      the deformable convolutions and RoI pooling of ``mmcv.ops``
`paddle`    ``paddle.vision.ops.deform_conv2d`` and ``DeformConv2D``
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import mmcv as mmcv
    from . import paddle as paddle

__all__ = ["mmcv", "paddle"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
