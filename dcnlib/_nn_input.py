"""What the modules of `dcnlib.nn` that predict check before they do."""

from __future__ import annotations

from typing import Any

import torch

from ._problem import type_error, value_error


def check_input(
    op: str, input: Any, channels: int, name: str = "in_channels", unbatched: bool = True
) -> None:
    """Images with `channels` channels; else the predictor's error would be of its own weight."""
    if torch.jit.is_tracing():  # sizes are no plain ints then
        return
    if not isinstance(input, torch.Tensor):
        got = f"{type(input).__module__}.{type(input).__qualname__}"
        cure = "convert with torch.as_tensor"
        raise type_error(op, "input", "must be a tensor", "torch.Tensor", got, cure)
    shape = tuple(input.shape)
    if len(shape) != 4 and not (unbatched and len(shape) == 3):
        layout = "(N, C, H, W) or (C, H, W)" if unbatched else "(N, C, H, W)"
        raise value_error(op, "input", "must be images", layout, shape)
    if shape[-3] != channels:
        raise value_error(
            op, "input", f"must have {name} channels", channels, f"{shape[-3]} in shape {shape}"
        )
