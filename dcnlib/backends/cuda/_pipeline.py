"""One call on a device: the passes of csrc/cuda and torch's matrix products, chunk by chunk.

Everything is queued on the current stream of the operands' device and nothing waits, so calls can be
captured in CUDA graphs. Temporaries come from torch's allocator; `_plan` decides which and how large.

Products have float32 (float64) sums and results. 16-bit operands are multiplied as they are, on
tensor cores; float32 follows torch's own setting for matrix products (TF32 only where that allows it).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._problem import DeformConv2dProblem
from . import _settings, _status
from ._plan import Plan, chunks, plan

_ARITHMETIC = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_BLOCKS = 16  # of a launch, for each multiprocessor


@torch.no_grad()
def forward(problem, input, offset, weight, bias, mask, output) -> None:
    """Fill `output`; operands as in this package's `__init__`."""
    input, output = _images(problem.input_shape, input), _images(problem.output_shape, output)
    offset, weight, bias, mask = map(_tensor, (offset, weight, bias, mask))
    if problem.batch == 0:
        return
    settings = _settings.current()
    cut = plan(problem, settings, aligned=_is_aligned(input))
    with _on(input):
        run = _Run(problem, settings, cut, input)
        call = run.call(offset=offset, mask=mask, bias=bias, output=output)
        weights = run.weights(weight, cut.pieces)
        columns = run.empty(cut.chunk * run.samples * cut.pieces, input.dtype)
        products = run.empty(cut.chunk * problem.out_channels, run.arithmetic)
        for image, images, pixels in chunks(cut, problem):
            call.images(image, run.wave_input(image, images).data_ptr(), run.channels_last)
            for first, count in pixels:
                call.pixels(first, count)
                call.sample(columns.data_ptr())
                matrix = run.column_matrix(columns, count)
                product = run.groups_of(products, count, problem.channels_last)
                if problem.channels_last:
                    _multiply(matrix.mT, weights.mT, product)
                else:
                    _multiply(weights, matrix, product)
                call.finish(product.data_ptr())


@torch.no_grad()
def backward(problem, grad_output, input, offset, weight, mask, grads) -> None:
    """Fill the wanted `grads`; operands as in this package's `__init__`."""
    input = _images(problem.input_shape, input)
    grad_output = _images(problem.output_shape, grad_output)
    offset, weight, mask = map(_tensor, (offset, weight, mask))
    grad_input = _images(problem.input_shape, grads[0])
    grad_offset, grad_weight, grad_bias, grad_mask = map(_tensor, grads[1:])
    if problem.batch == 0:
        for grad in (grad_weight, grad_bias):
            if grad is not None:
                grad.zero_()
        return
    with _on(input):
        if grad_bias is not None:
            grad_bias.copy_(grad_output.sum((0, 2, 3), dtype=_ARITHMETIC[input.dtype]))
        samples = any(grad is not None for grad in (grad_input, grad_offset, grad_mask))
        if not samples and grad_weight is None:
            return
        sort = grad_input is not None and torch.are_deterministic_algorithms_enabled()
        settings = _settings.current()
        cut = plan(
            problem,
            settings,
            aligned=_is_aligned(input),
            columns=grad_weight is not None,
            grad_columns=samples,
            grad_input=grad_input is not None,
            sort=sort,
        )
        run = _Run(problem, settings, cut, input)
        call = run.call(
            offset=offset, mask=mask,
            grad_output=grad_output, grad_offset=grad_offset, grad_mask=grad_mask,
        )  # fmt: skip
        weights = run.weights(weight, 1)
        columns = grad_columns = packed = weight_sums = None
        if grad_weight is not None:
            columns = run.empty(cut.chunk * run.samples * cut.pieces, input.dtype)
        if samples:
            grad_columns = run.empty(cut.chunk * run.samples, run.arithmetic)
        if not problem.channels_last:
            packed = run.empty(cut.chunk * problem.out_channels, input.dtype)
        for image, images, pixels in chunks(cut, problem):
            call.images(image, run.wave_input(image, images).data_ptr(), run.channels_last)
            sums = run.wave_sums(grad_input, image, images)
            for first, count in pixels:
                call.pixels(first, count)
                if packed is not None:
                    call.pack(packed.data_ptr())
                    matrix = run.groups_of(packed, count, False)
                else:
                    matrix = run.rows_of(grad_output, first, count)
                if samples:
                    run.multiply_back(weights, matrix, grad_columns, count)
                    scattered = None if sort else sums
                    call.backward(grad_columns.data_ptr(), _address(columns), _address(scattered))
                    if sort:
                        run.gather(call, count, grad_columns, sums)
                else:
                    call.sample(columns.data_ptr())
                if grad_weight is not None:
                    product = run.empty(grad_weight.numel() * cut.pieces, run.arithmetic)
                    product = product.view(problem.groups, run.group_out, -1)
                    _multiply(matrix, run.column_matrix(columns, count).mT, product)
                    weight_sums = product if weight_sums is None else weight_sums.add_(product)
            run.store_sums(grad_input, sums, image, images)
        if grad_weight is not None:
            run.store_weights(grad_weight, weight_sums)


class _Run:
    """Sizes, views and temporaries of one call."""

    def __init__(
        self, problem: DeformConv2dProblem, settings: _settings.Settings, cut: Plan, input: Tensor
    ) -> None:
        self.problem, self.settings, self.cut, self.input = problem, settings, cut, input
        self.arithmetic = _ARITHMETIC[input.dtype]
        self.group_in = problem.in_channels // problem.groups
        self.group_out = problem.out_channels // problem.groups
        self.samples = problem.in_channels * problem.taps  # of a pixel
        #: The layout of what the kernels read and add to.
        self.channels_last = problem.channels_last or cut.staged
        self.staged = self.images(cut.wave, input.dtype) if cut.staged else None
        self.wave_buffer: Tensor | None = None

    def call(self, **operands: Tensor | None) -> Any:
        """The compiled module's `Call` for these tensors."""
        device, stream, blocks = 0, 0, 1 << 20
        if self.input.is_cuda:
            device = self.input.get_device()
            stream = torch.cuda.current_stream(device).cuda_stream
            blocks = _BLOCKS * _multiprocessors(device)
        return _status.core(self.settings.emulate).Call(
            self.problem,
            rows=self.cut.rows,
            pieces=self.cut.pieces,
            device=device,
            stream=stream,
            blocks=self.settings.blocks or blocks,
            **{name: _address(operand) for name, operand in operands.items()},
        )

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """New memory; the emulation's is full of NaN, so that nothing relies on what it holds."""
        memory = torch.empty(count, dtype=dtype, device=self.input.device)
        return _poisoned(memory) if self.settings.emulate else memory

    def images(self, count: int, dtype: torch.dtype) -> Tensor:
        """New memory for images of the input's size, (N, C, H, W) in the kernels' layout."""
        p = self.problem
        memory = self.empty(count * p.in_channels * p.in_h * p.in_w, dtype)
        if self.channels_last:
            return memory.view(count, p.in_h, p.in_w, p.in_channels).permute(0, 3, 1, 2)
        return memory.view(count, p.in_channels, p.in_h, p.in_w)

    def wave_input(self, image: int, images: int) -> Tensor:
        """Images of the wave as the kernels read them."""
        wave = self.input[image : image + images]
        return wave if self.staged is None else self.staged[:images].copy_(wave)

    def wave_sums(self, grad_input: Tensor | None, image: int, images: int) -> Tensor | None:
        """Zeros to which the kernels add the wave's input gradient."""
        if grad_input is None:
            return None
        if self.cut.direct:
            return grad_input[image : image + images].zero_()
        if self.wave_buffer is None:
            self.wave_buffer = self.images(self.cut.wave, self.arithmetic)
        return self.wave_buffer[:images].zero_()

    def store_sums(
        self, grad_input: Tensor | None, sums: Tensor | None, image: int, images: int
    ) -> None:
        """Round the wave's input gradient into its place."""
        if grad_input is not None and not self.cut.direct:
            grad_input[image : image + images].copy_(sums)

    def weights(self, weight: Tensor, pieces: int) -> Tensor:
        """(groups, O/groups, samples of a group) in the order of the columns, once for each piece."""
        groups = self.problem.groups
        if self.cut.rows:
            weight = weight.view(groups, self.group_out, self.group_in, self.problem.taps)
            weight = weight.transpose(2, 3)
        weight = weight.reshape(groups, self.group_out, -1)
        if pieces == 1:
            return weight
        # A low piece is often 0: it must not meet an infinity, whose product is in the high piece.
        return torch.cat([weight, torch.nan_to_num(weight, 0.0, 0.0, 0.0)], 2)

    def column_matrix(self, columns: Tensor, count: int) -> Tensor:
        """The columns as (groups, samples of a group and their pieces, pixels)."""
        columns = columns[: count * self.samples * self.cut.pieces]
        if self.cut.rows:
            return columns.view(self.problem.groups, count, -1).mT
        return columns.view(self.problem.groups, -1, count)

    def groups_of(self, matrix: Tensor, count: int, channels_last: bool) -> Tensor:
        """Output channels and pixels as (groups, O/groups, pixels), or with those two exchanged."""
        shape = (count, self.group_out) if channels_last else (self.group_out, count)
        return matrix[: count * self.problem.out_channels].view(self.problem.groups, *shape)

    def rows_of(self, grad_output: Tensor, first: int, count: int) -> Tensor:
        """The chunk of a channels-last grad_output as (groups, O/groups, pixels)."""
        rows = grad_output.permute(0, 2, 3, 1).view(-1, self.problem.groups, self.group_out)
        return rows[first : first + count].permute(1, 2, 0)

    def multiply_back(
        self, weights: Tensor, grad_output: Tensor, grad_columns: Tensor, count: int
    ) -> None:
        """grad_columns = weights^T x grad_output."""
        grad_columns = grad_columns[: count * self.samples]
        if self.cut.rows:
            _multiply(grad_output.mT, weights, grad_columns.view(self.problem.groups, count, -1))
        else:
            _multiply(weights.mT, grad_output, grad_columns.view(self.problem.groups, -1, count))

    def gather(self, call: Any, count: int, grad_columns: Tensor, sums: Tensor) -> None:
        """Add the chunk's share of the input gradient, each pixel's sum in a fixed order."""
        entries = 4 * self.problem.offset_groups * self.problem.taps * count
        keys = self.empty(entries, torch.int64 if self.cut.wide else torch.int32)
        weights = self.empty(entries, self.arithmetic)
        call.keys(self.cut.wide, keys.data_ptr(), weights.data_ptr())
        keys, places = torch.sort(keys, stable=True)
        call.gather(
            self.cut.wide, keys.data_ptr(), places.data_ptr(), weights.data_ptr(),
            grad_columns.data_ptr(), sums.data_ptr(),
        )  # fmt: skip

    def store_weights(self, grad_weight: Tensor, sums: Tensor) -> None:
        """Add the pieces, restore the weight's order, round."""
        samples = self.group_in * self.problem.taps
        if self.cut.pieces == 2:
            high, low = sums[..., :samples], sums[..., samples:]
            sums = torch.where(high.isfinite(), high + low, high)  # as in `weights`
        if self.cut.rows:
            sums = sums.view(*sums.shape[:2], self.problem.taps, self.group_in).transpose(2, 3)
        grad_weight.copy_(sums.reshape(grad_weight.shape))


def _multiply(a: Tensor, b: Tensor, product: Tensor) -> None:
    """product = a x b, batched, with sums in the product's dtype."""
    if a.dtype == product.dtype:
        torch.bmm(a, b, out=product)
    elif a.is_cuda:
        torch.bmm(a, b, out_dtype=product.dtype, out=product)
    else:  # emulated: torch has this product for CUDA alone
        torch.bmm(a.to(product.dtype), b.to(product.dtype), out=product)


@contextlib.contextmanager
def _on(tensor: Tensor) -> Iterator[None]:
    """On the tensor's device, with products as they are written here and not as autocast likes them."""
    with contextlib.ExitStack() as stack:
        if tensor.is_cuda:
            stack.enter_context(torch.cuda.device(tensor.get_device()))
        if torch.is_autocast_enabled(tensor.device.type):
            stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
        yield


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _images(shape: tuple[int, ...], operand: Any) -> Tensor | None:
    """An operand with a batch axis, which an unbatched call's lack."""
    tensor = _tensor(operand)
    return tensor if tensor is None or tensor.dim() == 4 else tensor.view(shape)


def _tensor(operand: Any) -> Tensor | None:
    """A tensor; the emulation takes NumPy arrays too, bfloat16 by its bits."""
    if operand is None or isinstance(operand, Tensor):
        return operand
    if not operand.flags.writeable:  # torch has no tensors that are
        operand = operand.copy()
    if operand.dtype.name == "bfloat16":
        return torch.from_numpy(operand.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(operand)


def _poisoned(memory: Tensor) -> Tensor:
    return memory.fill_(float("nan") if memory.is_floating_point() else -(2**31))
