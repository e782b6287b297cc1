"""torch.ops.dcnlib.deform_roi_pool and deform_psroi_pool: see `operator.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._problem import Spec, integer, pair, real
from .._problem_pool import (
    DeformRoIPoolProblem,
    check_image_numbers,
    deform_psroi_pool_problem,
    deform_roi_pool_problem,
    samples,
)
from . import composite_pool
from .operator import Call, Operator, in_front


class _Pool(Operator):
    """What both dialects share."""

    functions = ("roi_pool_forward", "roi_pool_backward")
    operands = ("input", "rois", "offset", "mask")
    gradients = ("input", "offset", "mask")
    keeps_format = True

    def operand(self, op: str, name: str, tensor: Tensor, problem: Any) -> Tensor:
        tensor = super().operand(op, name, tensor, problem)
        if name == "rois":
            tensor = tensor.double()
            if tensor.device.type == "cpu":
                check_image_numbers(op, tensor.detach().numpy(), problem.batch)
        return tensor

    def compose(self, problem: DeformRoIPoolProblem, call: Call) -> Tensor:
        return composite_pool.forward(problem, *(call.get(name) for name in self.operands))

    def compose_backward(
        self, problem: DeformRoIPoolProblem, call: Call, output_mask: Sequence[bool]
    ) -> list[Tensor | None]:
        grads = composite_pool.backward(
            problem,
            call["grad_output"],
            *(call.get(name) for name in self.operands),
            [*output_mask, False][:3],
        )
        return grads[: len(output_mask)]

    def fold(self, size: int, call: Call, axes: Call, every_input: bool) -> tuple[Call, Any]:
        """RoIs of all examples behind each other, on the images of all or on shared ones."""
        own_images = every_input or axes["input"] is not None
        folded = dict(call)
        for name, axis in axes.items():
            if call[name] is not None and (name != "input" or own_images):
                folded[name] = in_front(call[name], axis, size)
        if own_images:
            batch = folded["input"].shape[1]
            rois = folded["rois"].double()
            first = batch * torch.arange(size, dtype=rois.dtype, device=rois.device)
            folded["rois"] = rois + torch.nn.functional.pad(first[:, None, None], (0, 4))
        for name in axes:
            if folded[name] is not None and (name != "input" or own_images):
                folded[name] = folded[name].flatten(0, 1)
        return folded, None

    def unfold(self, name: str, tensor: Tensor, size: int, note: Any) -> Tensor:
        return tensor.unflatten(0, (size, tensor.shape[0] // size))


class RoIPool(_Pool):
    """mmcv's dialect."""

    name = "deform_roi_pool"
    arguments = (
        "Tensor input, Tensor rois, Tensor? offset, int[2] output_size, float spatial_scale=1.0,"
        " int sampling_ratio=0, float gamma=0.1, str? backend=None"
    )
    tensors = ("input", "rois", "offset")
    differentiable = ("input", "offset")

    def describe(
        self, op: str, specs: dict[str, Spec | None], options: Call, channels_last: bool
    ) -> DeformRoIPoolProblem:
        return deform_roi_pool_problem(
            op,
            *(specs[name] for name in ("input", "rois", "offset", "grad_output")),
            pair(op, "output_size", options["output_size"]),
            real(op, "spatial_scale", options["spatial_scale"], above_zero=True),
            samples(op, "sampling_ratio", options["sampling_ratio"], 0),
            real(op, "gamma", options["gamma"]),
            channels_last,
        )


class PSRoIPool(_Pool):
    """MXNet's dialect: position-sensitive and modulated."""

    name = "deform_psroi_pool"
    arguments = (
        "Tensor input, Tensor rois, Tensor? offset, float spatial_scale, int[2] output_size,"
        " int output_dim, int[2] group_size=1, int[2]? part_size=None, int sample_per_part=4,"
        " float offset_std=0.1, Tensor? mask=None, str? backend=None"
    )
    tensors = ("input", "rois", "offset", "mask")
    differentiable = ("input", "offset", "mask")

    def describe(
        self, op: str, specs: dict[str, Spec | None], options: Call, channels_last: bool
    ) -> DeformRoIPoolProblem:
        output_size = pair(op, "output_size", options["output_size"])
        part_size = options["part_size"]
        return deform_psroi_pool_problem(
            op,
            *(specs[name] for name in ("input", "rois", "offset", "mask", "grad_output")),
            real(op, "spatial_scale", options["spatial_scale"], above_zero=True),
            output_size,
            integer(op, "output_dim", options["output_dim"], 1),
            pair(op, "group_size", options["group_size"]),
            output_size if part_size is None else pair(op, "part_size", part_size),
            samples(op, "sample_per_part", options["sample_per_part"], 1),
            real(op, "offset_std", options["offset_std"]),
            channels_last,
        )
