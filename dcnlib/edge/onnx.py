"""ONNX: the standard operator ``DeformConv`` for `deform_conv2d`, in both directions.

    torch.onnx.export(model, inputs, dynamo=True, opset_version=19,
                      custom_translation_table=edge.onnx_translations(19))

The operator came with opset 19; opset 22 added bfloat16. Its offsets, masks and groups are those of
dcnlib, its pads are in another order. RoI pooling and resampling have no operator, and their export
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._problem import value_error
from .layers import DeformConv2d

_OPSETS = (19, 20, 21, 22, 23)


def onnx_translations(opset: int = 19) -> dict[Any, Callable]:
    """What ``torch.onnx.export(..., dynamo=True)`` needs to know of dcnlib's operators.

    Parameters
    ----------
    opset : int
        The ``opset_version`` of the export, 19 to 23.

    Returns
    -------
    dict
        For ``custom_translation_table``. `deform_conv2d` becomes one ``DeformConv``; operators that
        ONNX has no counterpart for become an error with their name.

    Raises
    ------
    ValueError
        For an opset that has no ``DeformConv``, or that is newer than this function.
    ImportError
        Without torch or onnxscript, which ``torch.onnx.export`` needs anyway.
    """
    if opset not in _OPSETS:
        raise value_error(
            "edge.onnx_translations", "opset", "must be one that has DeformConv",
            ", ".join(map(str, _OPSETS)), repr(opset),
        )  # fmt: skip
    import onnxscript
    import torch

    from .. import torch_ops  # noqa: F401  (registers the operators)

    # DeformConv is that of opset 22 from there on.
    operators = getattr(onnxscript, f"opset{22 if opset >= 22 else 19}")

    def deform_conv2d(
        input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
        mask=None, groups=None, offset_groups=None, backend=None,
    ):  # fmt: skip
        kernel = [int(size) for size in weight.shape[2:]]
        top, bottom, left, right = padding
        if groups is None:
            groups = int(input.shape[-3]) // int(weight.shape[1])
        if offset_groups is None:
            offset_groups = int(offset.shape[-3]) // (2 * kernel[0] * kernel[1])
        batched = len(input.shape) == 4
        if not batched:
            axis = operators.Constant(value_ints=[0])
            input, offset, mask = (
                None if t is None else operators.Unsqueeze(t, axis) for t in (input, offset, mask)
            )
        output = operators.DeformConv(
            input, weight, offset, bias, mask, dilations=list(dilation), group=groups,
            kernel_shape=kernel, offset_group=offset_groups, pads=[top, left, bottom, right],
            strides=list(stride),
        )  # fmt: skip
        return output if batched else operators.Squeeze(output, axis)

    def refuse(name: str) -> Callable:
        def translation(*_, **__):
            raise NotImplementedError(
                f"{name}: ONNX has no operator for it; export the parts of the model before and "
                "behind it, and run it with dcnlib.edge"
            )

        return translation

    table: dict[Any, Callable] = {torch.ops.dcnlib.deform_conv2d.default: deform_conv2d}
    for name in ("deform_roi_pool", "deform_psroi_pool", "deform_resample2d"):
        table[getattr(torch.ops.dcnlib, name).default] = refuse(name)
    return table


def from_onnx_node(node: Any, initializers: Mapping[str, np.ndarray]) -> DeformConvNode:
    """A ``DeformConv`` node of an ONNX graph as a callable over NumPy arrays.

    Parameters
    ----------
    node : onnx.NodeProto
    initializers : mapping of str to array
        The graph's constants by name, for the weight and the bias:
        ``{t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}``.

    Returns
    -------
    DeformConvNode
        Takes ``(X, offset, mask=None)``; its weight is packed already.

    Raises
    ------
    ValueError
        For a node of another kind, or with weights that are no initializers.
    """
    op = "edge.from_onnx_node"
    if node.op_type != "DeformConv":
        raise value_error(op, "node", "must be of one kind", "DeformConv", node.op_type)
    names = [*node.input, "", ""]
    tensors = {}
    for place, name in ((1, "weight"), (3, "bias")):
        if names[place] in initializers:
            tensors[name] = np.ascontiguousarray(initializers[names[place]])
        elif names[place] or name == "weight":
            raise value_error(
                op,
                name,
                "must be an initializer",
                "a constant of the graph",
                names[place] or "none",
            )
    # onnx.AttributeProto, by its fields: 2 is INT, 7 is INTS.
    given = {a.name: a.i if a.type == 2 else list(a.ints) for a in node.attribute}
    top, left, bottom, right = given.get("pads") or (0, 0, 0, 0)
    return DeformConvNode(
        tensors,
        stride=tuple(given.get("strides") or (1, 1)),
        padding=(top, bottom, left, right),
        dilation=tuple(given.get("dilations") or (1, 1)),
        groups=given.get("group", 1),
        offset_groups=given.get("offset_group", 1),
    )


class DeformConvNode(DeformConv2d):
    """`from_onnx_node` makes it."""

    settings = (*DeformConv2d.settings, "offset_groups")
    offset_groups: int

    def __init__(self, tensors: Mapping[str, np.ndarray], **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.weight.pack(self.groups, self.offset_groups)
