"""What a call costs when there is nothing to compute, from the inside out.

core      the compiled entry point with everything prepared
backend   the backend's Python function
numpy     `dcnlib.deform_conv2d` on arrays, with all checks
op        `torch.ops.dcnlib` in inference mode
torch     `dcnlib.deform_conv2d` on tensors in inference mode
autograd  the same with gradients wanted
module    `dcnlib.nn.DeformConv2d` with gradients wanted

The difference between neighbours is what a layer adds. The inner two are private, so an old commit
that has other names skips them.
"""

from __future__ import annotations

import time
import timeit

from .common import DIRECTIONS, TINY, arrays, need_torch, numpy_call, options, skip


class Overhead:
    params = [
        ["core", "backend", "numpy", "op", "torch", "autograd", "module"],
        DIRECTIONS,
    ]
    param_names = ["layer", "direction"]

    def setup(self, layer, direction):
        try:
            self.call = _CALLS[layer](direction)
        except (ImportError, AttributeError, TypeError) as error:
            skip(f"{layer}: {error}")
        self.call()

    def track_us(self, *parameters):
        timer = timeit.Timer(self.call, timer=time.process_time)
        return 1e6 * min(timer.repeat(15, 300)) / 300

    track_us.unit = "us"


def _operands(direction):
    from dcnlib._problem import deform_conv2d_problem

    input, offset, weight, bias, mask, grad_output = arrays(TINY)
    specs = [(array.shape, array.dtype.name) for array in (input, offset, weight, bias, mask)]
    problem = deform_conv2d_problem("benchmark", *specs, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, 1)
    if direction == "forward":
        return problem, (input, offset, weight, bias, mask, grad_output.copy())
    grads = [array.copy() for array in (input, offset, weight, bias, mask)]
    return problem, (grad_output, input, offset, weight, mask, grads)


def _core(direction):
    from dcnlib.backends.cpu import _core as core

    problem, operands = _operands(direction)
    if direction == "forward":
        return lambda: core.forward(problem, 1, *operands)
    *inputs, grads = operands
    return lambda: core.backward(problem, 1, *inputs, *grads)


def _backend(direction):
    from dcnlib.backends import cpu

    problem, operands = _operands(direction)
    run = cpu.forward if direction == "forward" else cpu.backward
    return lambda: run(problem, *operands, 1)


def _tensors(gradients=False):
    torch = need_torch()
    torch.set_num_threads(1)
    tensors = [torch.from_numpy(array.copy()) for array in arrays(TINY)]
    for tensor in tensors[:5]:
        tensor.requires_grad_(gradients)
    return torch, tensors


def _op(direction):
    torch, (input, offset, weight, bias, mask, grad_output) = _tensors()
    place = ([1, 1], [0, 0, 0, 0], [1, 1], mask)
    if direction == "forward":
        op = torch.ops.dcnlib.deform_conv2d
        leading = (input, offset, weight, bias)
    else:
        op = torch.ops.dcnlib.deform_conv2d_backward
        leading = (grad_output, input, offset, weight, bias)

    def call():
        with torch.inference_mode():
            op(*leading, *place)

    return call


def _torch(direction):
    import dcnlib

    torch, (input, offset, weight, bias, mask, grad_output) = _tensors()
    keywords = options(TINY) | {"mask": mask}

    def forward():
        with torch.inference_mode():
            dcnlib.deform_conv2d(input, offset, weight, bias, **keywords)

    def backward():
        with torch.inference_mode():
            dcnlib.deform_conv2d_backward(grad_output, input, offset, weight, bias, **keywords)

    return forward if direction == "forward" else backward


def _differentiated(torch, run, leaves, direction):
    """`run` with gradients wanted; the backward direction is the gradient alone."""
    if direction == "forward":
        return run
    output = run()
    ones = torch.ones_like(output)
    return lambda: torch.autograd.grad(output, leaves, ones, retain_graph=True)


def _autograd(direction):
    import dcnlib

    torch, (input, offset, weight, bias, mask, _) = _tensors(gradients=True)
    keywords = options(TINY) | {"mask": mask}
    return _differentiated(
        torch,
        lambda: dcnlib.deform_conv2d(input, offset, weight, bias, **keywords),
        (input, offset, weight, bias, mask),
        direction,
    )


def _module(direction):
    torch, (input, offset, _, _, mask, _) = _tensors(gradients=True)
    from dcnlib.nn import DeformConv2d

    layer = DeformConv2d(1, 1, 1)
    leaves = (input, offset, mask, *layer.parameters())
    return _differentiated(torch, lambda: layer(input, offset, mask), leaves, direction)


_CALLS = {
    "core": _core,
    "backend": _backend,
    "numpy": lambda direction: numpy_call(TINY, direction),
    "op": _op,
    "torch": _torch,
    "autograd": _autograd,
    "module": _module,
}
