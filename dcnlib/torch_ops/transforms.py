"""autocast and vmap: a call turned into another call of the same operator.

autocast  casts all tensors to the region's 16-bit type, as torch does for convolutions; float64
          stays. The backward operator computes in the dtype of the forward call, wherever it runs.
vmap      folds the mapped axis into the batch or, where weights or their gradients are mapped, into
          the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._problem import DeformConv2dProblem
from .schemas import (
    BACKWARD,
    FORWARD,
    LIBRARY,
    backward_operator,
    forward_operator,
    problem,
    wanted,
)


def register() -> None:
    LIBRARY.impl(FORWARD, _autocast("cpu"), "AutocastCPU")
    LIBRARY.impl(FORWARD, _autocast("cuda"), "AutocastCUDA")
    torch.library.register_vmap(f"dcnlib::{FORWARD}", _vmap_forward, lib=LIBRARY)
    torch.library.register_vmap(f"dcnlib::{BACKWARD}", _vmap_backward, lib=LIBRARY)


def _autocast(device: str) -> Callable[..., Tensor]:
    def forward(
        input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
        mask=None, *options,
    ):  # fmt: skip
        dtype = torch.get_autocast_dtype(device)
        castable = (torch.float32, torch.float16, torch.bfloat16)
        input, offset, weight, bias, mask = (
            t.to(dtype) if t is not None and t.dtype in castable else t
            for t in (input, offset, weight, bias, mask)
        )
        with torch.autocast(device, enabled=False):
            return forward_operator(
                input, offset, weight, bias, stride, padding, dilation, mask, *options
            )

    return forward


def _vmap_forward(
    info, in_dims, input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0),
    dilation=(1, 1), mask=None, groups=None, offset_groups=None, backend=None,
):  # fmt: skip
    place = (stride, padding, dilation)
    tensors = (input, offset, weight, bias, mask)
    axes = _axes(in_dims, (0, 1, 2, 3, 7))
    example = _examples(tensors, axes)
    call = problem(FORWARD, None, *example[:4], *place, example[4], groups, offset_groups)
    fold = _Fold(info.batch_size, call, axes[2] is not None or axes[3] is not None)
    input, offset, mask = (fold.image(tensors[i], axes[i]) for i in (0, 1, 4))
    weight, bias = (fold.weight(tensors[i], axes[i]) for i in (2, 3))
    output = forward_operator(
        input, offset, weight, bias, *place, mask, *fold.groups(groups, offset_groups), backend
    )
    return fold.unfold_image(output)


def _vmap_backward(
    info, in_dims, grad_output, input, offset, weight, bias=None, stride=(1, 1),
    padding=(0, 0, 0, 0), dilation=(1, 1), mask=None, groups=None, offset_groups=None, backend=None,
    output_mask=(True, True, True, True, True),
):  # fmt: skip
    output_mask = wanted(BACKWARD, output_mask, mask)
    place = (stride, padding, dilation)
    tensors = (grad_output, input, offset, weight, bias, mask)
    axes = _axes(in_dims, (0, 1, 2, 3, 4, 8))
    example = _examples(tensors, axes)
    call = problem(BACKWARD, *example[:5], *place, example[5], groups, offset_groups)
    # Each example has its own gradient of a weight, even of one that all of them share.
    by_groups = axes[3] is not None or output_mask[2] or output_mask[3]
    fold = _Fold(info.batch_size, call, by_groups)
    grad_output, input, offset, mask = (fold.image(tensors[i], axes[i]) for i in (0, 1, 2, 5))
    grads = backward_operator(
        grad_output, input, offset, fold.weight(weight, axes[3]), None, *place, mask,
        *fold.groups(groups, offset_groups), backend, output_mask,
    )  # fmt: skip
    unfold = (
        fold.unfold_image,
        fold.unfold_image,
        fold.unfold_weight,
        fold.unfold_weight,
        fold.unfold_image,
    )
    results = [
        unfolded(grad) if is_wanted else (grad, None)
        for unfolded, grad, is_wanted in zip(unfold, grads, output_mask, strict=True)
    ]
    return tuple(zip(*results, strict=True))


class _Fold:
    """Puts `size` examples of one call into one call, and its results apart again."""

    def __init__(self, size: int, call: DeformConv2dProblem, by_groups: bool) -> None:
        self.size, self.call, self.by_groups = size, call, by_groups

    def image(self, tensor: Tensor | None, axis: int | None) -> Tensor | None:
        """A tensor with one image or map for each of the batch."""
        if tensor is None:
            return None
        tensor = self._mapped(tensor, axis)
        if self.by_groups and self.call.batched:
            tensor = tensor.transpose(0, 1)
            return tensor.flatten(1, 2)
        # Examples without a batch axis are a batch, or stay without one.
        return tensor.flatten(0, 1) if self.by_groups or self.call.batched else tensor

    def weight(self, tensor: Tensor | None, axis: int | None) -> Tensor | None:
        if tensor is None or not self.by_groups:
            return tensor
        return self._mapped(tensor, axis).flatten(0, 1)

    def groups(self, *groups: int | None) -> tuple[int | None, ...]:
        """groups and offset_groups of the one call."""
        if not self.by_groups:
            return groups
        return self.size * self.call.groups, self.size * self.call.offset_groups

    def unfold_image(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The result for each example, and the mapped axis."""
        if self.by_groups:
            axis = 1 if self.call.batched else 0
            return tensor.unflatten(axis, (self.size, tensor.shape[axis] // self.size)), axis
        if self.call.batched:
            tensor = tensor.unflatten(0, (self.size, self.call.batch))
        return tensor, 0

    def unfold_weight(self, tensor: Tensor) -> tuple[Tensor, int]:
        return tensor.unflatten(0, (self.size, self.call.out_channels)), 0

    def _mapped(self, tensor: Tensor, axis: int | None) -> Tensor:
        """The mapped axis first."""
        if axis is None:
            return tensor.expand(self.size, *tensor.shape)
        return tensor.movedim(axis, 0)


def _axes(in_dims: Sequence, places: Sequence[int]) -> list[int | None]:
    """The mapped axes of the tensors at these places of a call; the dispatcher drops defaults."""
    return [in_dims[i] if i < len(in_dims) else None for i in places]


def _examples(tensors: Sequence[Tensor | None], axes: Sequence[int | None]) -> list[Tensor | None]:
    """Stand-ins for what one example gets, to be checked: shape, dtype and device."""
    examples = []
    for tensor, axis in zip(tensors, axes, strict=True):
        if tensor is not None and axis is not None:
            shape = list(tensor.shape)
            del shape[axis]
            tensor = tensor.new_empty(()).expand(shape)
        examples.append(tensor)
    return examples
