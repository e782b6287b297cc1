"""Other people's operators on the same arrays: forward calls, ready to be timed.

conv2d       torch's plain convolution: the same multiplications, nothing sampled
torchvision  `torchvision.ops.deform_conv2d`
onnxruntime  the ONNX operator DeformConv, through a model of one node
openvino     DeformableConvolution-8, compiled for the CPU in float32

`why_not(name)` is None where one can run here, else the reason. Nothing is imported before it is
asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = ("conv2d", "torchvision", "onnxruntime", "openvino")
_NEEDS = {
    "conv2d": ("torch",),
    "torchvision": ("torch", "torchvision.ops"),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
}


def why_not(name: str) -> str | None:
    """The reason why a rival cannot run here, None if it can."""
    for module in _NEEDS[name]:
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError, OSError) as error:  # made for another torch, say
            return f"{name}: {module} cannot be imported ({error})"
    return None


def forward(
    name: str,
    input: np.ndarray,
    offset: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    mask: np.ndarray,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    offset_groups: int,
    threads: int = 1,
) -> Callable[[], Any]:
    """A call without arguments that computes the layer and returns something like an array."""
    operands = (input, offset, weight, bias, mask)
    return _BUILDERS[name](operands, stride, padding, dilation, groups, offset_groups, threads)


def _torch(operands, threads):
    import torch

    torch.set_num_threads(threads)
    return torch, [torch.from_numpy(array) for array in operands]


def _conv2d(operands, stride, padding, dilation, groups, offset_groups, threads):
    torch, (input, _, weight, bias, _) = _torch(operands, threads)

    def call():
        with torch.inference_mode():
            return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)

    return call


def _torchvision(operands, stride, padding, dilation, groups, offset_groups, threads):
    torch, (input, offset, weight, bias, mask) = _torch(operands, threads)
    from torchvision.ops import deform_conv2d

    def call():
        with torch.inference_mode():
            return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    return call


def _onnxruntime(operands, stride, padding, dilation, groups, offset_groups, threads):
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    input, offset, weight, bias, mask = operands
    kernel = weight.shape[-2:]
    node = helper.make_node(
        "DeformConv",
        ["input", "weight", "offset", "bias", "mask"],
        ["output"],
        kernel_shape=kernel,
        strides=[stride] * 2,
        pads=[padding] * 4,
        dilations=[dilation] * 2,
        group=groups,
        offset_group=offset_groups,
    )
    number = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "layer",
        [
            helper.make_tensor_value_info(name, number, array.shape)
            for name, array in (("input", input), ("offset", offset), ("mask", mask))
        ],
        [helper.make_tensor_value_info("output", number, None)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"input": input, "offset": offset, "mask": mask}
    return lambda: session.run(None, feed)[0]


def _openvino(operands, stride, padding, dilation, groups, offset_groups, threads):
    import openvino
    from openvino import opset8

    input, offset, weight, bias, mask = operands
    parameters = [opset8.parameter(array.shape, np.float32) for array in (input, offset, mask)]
    data, offsets, modulation = parameters
    deformed = opset8.deformable_convolution(
        data,
        offsets,
        opset8.constant(weight),
        [stride] * 2,
        [padding] * 2,
        [padding] * 2,
        [dilation] * 2,
        modulation,
        group=groups,
        deformable_group=offset_groups,
        bilinear_interpolation_pad=True,
    )
    result = opset8.add(deformed, opset8.constant(bias.reshape(1, -1, 1, 1)))
    compiled = openvino.Core().compile_model(
        openvino.Model([result], parameters),
        "CPU",
        {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"},
    )
    request = compiled.create_infer_request()
    arrays = (input, offset, mask)
    for i, array in enumerate(arrays):
        request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
    output = request.get_output_tensor(0)

    def call():
        assert arrays  # OpenVINO reads their memory and does not keep them
        request.infer()
        return output.data

    return call


_BUILDERS = {
    "conv2d": _conv2d,
    "torchvision": _torchvision,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
