"""torch.ops.dcnlib.deform_resample2d: see `operator.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._problem import Spec
from .._problem_resample import (
    DeformResample2dProblem,
    boundary_name,
    deform_resample2d_problem,
)
from . import composite_resample
from .operator import Call, Operator, in_front


class Resample(Operator):
    """One offset a channel and pixel."""

    name = "deform_resample2d"
    arguments = 'Tensor input, Tensor offset, str boundary="border", str? backend=None'
    tensors = operands = ("input", "offset")
    differentiable = gradients = ("input", "offset")
    functions = ("resample_forward", "resample_backward")

    def describe(
        self, op: str, specs: dict[str, Spec | None], options: Call, channels_last: bool
    ) -> DeformResample2dProblem:
        boundary = boundary_name(op, options["boundary"])
        return deform_resample2d_problem(
            op, specs["input"], specs["offset"], specs["grad_output"], boundary
        )

    def compose(self, problem: DeformResample2dProblem, call: Call) -> Tensor:
        return composite_resample.forward(problem, call["input"], call["offset"])

    def compose_backward(
        self, problem: DeformResample2dProblem, call: Call, output_mask: Sequence[bool]
    ) -> list[Tensor | None]:
        return composite_resample.backward(
            problem, call["grad_output"], call["input"], call["offset"], output_mask
        )

    def fold(self, size: int, call: Call, axes: Call, every_input: bool) -> tuple[Call, Any]:
        """Examples are a batch, or one more of them."""
        example_rank = call["input"].dim() - (axes["input"] is not None)
        folded = dict(call)
        for name, axis in axes.items():
            tensor = in_front(call[name], axis, size)
            folded[name] = tensor.flatten(0, 1) if example_rank == 4 else tensor
        return folded, example_rank == 4

    def unfold(self, name: str, tensor: Tensor, size: int, note: Any) -> Tensor:
        return tensor.unflatten(0, (size, tensor.shape[0] // size)) if note else tensor
