"""Export to the standard DeformConv: onnxruntime computes what dcnlib computes, and dcnlib the node.

Needs onnx, onnxscript and onnxruntime beside torch (`make test-onnx`).
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the exporter is torch's")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from torch import nn  # noqa: E402

import dcnlib.nn as dnn  # noqa: E402
from dcnlib import edge, testing  # noqa: E402
from edge_modules import MODULES, randomised  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself
NAMES = [name for name in MODULES if "deform" in name or "pack" in name.split("_") or "mod" in name]
CONVOLUTIONS = [name for name in NAMES if "roi" not in name] + ["network"]


def export(module, inputs, opset):
    return torch.onnx.export(
        module, tuple(torch.from_numpy(a) for a in inputs), dynamo=True, opset_version=opset,
        custom_translation_table=edge.onnx_translations(opset), verbose=False,
    ).model_proto  # fmt: skip


def run(model, inputs):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


def case(name, dtype="float32"):
    make, inputs = MODULES[name]
    module = randomised(make()).to(getattr(torch, dtype))
    return module, [array.astype(dtype) for array in inputs]


@pytest.mark.parametrize(
    ("name", "opset"), [(name, (19, 22)[i % 2]) for i, name in enumerate(CONVOLUTIONS)]
)
def test_onnxruntime_equals_us(name, opset):
    module, inputs = case(name)
    model = export(module, inputs, opset)
    onnx.checker.check_model(model)
    assert {o.version for o in model.opset_import if o.domain == ""} == {opset}
    (node,) = [node for node in model.graph.node if node.op_type == "DeformConv"]
    assert not node.domain
    with torch.no_grad():
        ours = module(*map(torch.from_numpy, inputs)).numpy()
        exact = module.double()(*(torch.from_numpy(a).double() for a in inputs)).numpy()
    theirs = run(model, inputs)
    assert theirs.shape == ours.shape
    for result in (ours, theirs):
        assert (
            testing.errors(result, exact, "float32")[0] <= testing.TOLERANCES["float32"]["output"]
        )


@pytest.mark.parametrize("name", ["deform_mask_groups"])
def test_node_through_our_core(name):
    """The node's attributes and initialisers, as they are in the file."""
    module, inputs = case(name)
    model = export(module, inputs, 19)
    (node,) = [node for node in model.graph.node if node.op_type == "DeformConv"]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, inputs)).numpy()
    assert edge.from_onnx_node(node, constants)(*inputs).tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match=r"edge\.from_onnx_node: weight: must be an initializer"):
        edge.from_onnx_node(node, {})
    with pytest.raises(ValueError, match=r"expected DeformConv, got Relu"):
        edge.from_onnx_node(onnx.helper.make_node("Relu", ["x"], ["y"]), {})


def test_node_with_defaults():
    """A node that says nothing but its inputs."""
    node = onnx.helper.make_node("DeformConv", ["x", "w", "offset"], ["y"])
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((1, 2, 5, 6), (3, 2, 2, 3)))
    layer = edge.from_onnx_node(node, {"w": w})
    import dcnlib

    y = layer(x, np.zeros((1, 12, 4, 4), np.float32))
    assert y.tobytes() == dcnlib.conv2d(x, w).tobytes()
    with pytest.raises(ValueError, match=r"deform_conv2d: offset: must have shape"):
        layer(x, np.zeros((1, 24, 4, 4), np.float32))


@pytest.mark.parametrize("name", ["roi_pool", "psroi_pool", "conv_offset"])
def test_the_others_say_that_they_cannot(name):
    module, inputs = case(name)
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        export(module, inputs, 19)
    op = {"roi_pool": "deform_roi_pool", "psroi_pool": "deform_psroi_pool"}
    text = f"{op.get(name, 'deform_resample2d')}: ONNX has no operator for it"
    errors = [caught.value]
    while errors[-1].__cause__ is not None:
        errors.append(errors[-1].__cause__)
    assert any(text in str(error) for error in errors)


def test_dynamic_batch():
    """The batch may stay open: groups come from the channels alone."""
    module = randomised(nn.Sequential(dnn.ModulatedDeformConv2dPack(4, 6, 3, padding=1))).eval()
    model = torch.onnx.export(
        module, (torch.ones(2, 4, 7, 8),), dynamo=True, opset_version=19, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        custom_translation_table=edge.onnx_translations(19),
    ).model_proto  # fmt: skip
    x = np.random.default_rng(1).standard_normal((5, 4, 7, 8)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy().astype(np.float64)
    assert testing.errors(run(model, [x]), expected, "float32")[0] <= 64


@pytest.mark.parametrize("opset", [18, 0, 99, "19"])
def test_opsets_without_the_operator(opset):
    with pytest.raises(ValueError, match=r"edge\.onnx_translations: opset: must be one that has"):
        edge.onnx_translations(opset)
