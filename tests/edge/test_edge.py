"""`dcnlib.edge`: what a module computes with torch, its file computes without."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import dcnlib
import isolated
from dcnlib import edge, testing

safetensors = pytest.importorskip("safetensors", reason="files need safetensors")
torch = pytest.importorskip("torch", reason="modules need torch")
from torch import nn  # noqa: E402

import dcnlib.nn as dnn  # noqa: E402
from edge_modules import MODULES, X, randomised, to_torch  # noqa: E402


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_torch(name, dtype, path):
    """Both against the module in float64, within the accuracy table of a convolution."""
    make, inputs = MODULES[name]
    module = randomised(make()).to(getattr(torch, dtype))
    edge.save(module, path)
    model = edge.load(path)
    assert model.dtype == (dtype if list(module.state_dict()) else None)
    got = model(*(array.astype(dtype) for array in inputs))
    with torch.no_grad():
        same = module(*(to_torch(array, dtype) for array in inputs)).numpy()
        exact = module.double()(*(to_torch(a.astype(dtype), "float64") for a in inputs)).numpy()
    assert got.dtype == same.dtype and got.shape == same.shape
    limit = testing.TOLERANCES[dtype]["output"]
    if dtype == "float32":
        for result in (got, same):
            largest, rms = testing.errors(result, exact, dtype)
            assert largest <= limit and rms <= limit / 2, (largest, rms)
    assert testing.errors(got, same.astype(np.float64), dtype)[0] <= 2 * limit


def test_modules_in_several_places(path):
    """Each place counts: one activation, one convolution, one block."""
    block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU())
    conv = nn.Conv2d(2, 2, 1)
    net = nn.Sequential(block, conv, block[1], conv, block).eval()
    edge.save(net, path)
    x = torch.randn(1, 2, 5, 6)
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(edge.load(path)(x.numpy()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [nn.ReLU, nn.Sequential])
def test_a_forward_of_its_own(make, path):
    net = nn.Sequential(make())
    net[0].forward = lambda x: -x
    with pytest.raises(TypeError, match=r"0 is of a kind .* got .* with a forward of its own"):
        edge.save(net, path)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["modulated", "roi_pool_modulated", "network"])
def test_16_bit_weights(name, stored, path, tmp_path):
    """Half the file; computed in float32 with exactly the rounded weights."""
    make, inputs = MODULES[name]
    module = randomised(make())
    edge.save(module, tmp_path / "wide.safetensors")
    edge.save(module, path, dtype=stored)
    header = [
        8 + int.from_bytes(p.read_bytes()[:8], "little")
        for p in (path, tmp_path / "wide.safetensors")
    ]
    sizes = [p.stat().st_size for p in (path, tmp_path / "wide.safetensors")]
    assert 2 * (sizes[0] - header[0]) == sizes[1] - header[1]
    got = edge.load(path)(*(array.astype("float32") for array in inputs))
    rounded = module.to(getattr(torch, stored)).double()
    with torch.no_grad():
        exact = rounded(*(to_torch(a.astype("float32"), "float64") for a in inputs)).numpy()
    largest, _ = testing.errors(got, exact, "float32")
    assert largest <= testing.TOLERANCES["float32"]["output"], largest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["deform_mask_groups", "modulated", "roi_pool_pack", "network"])
def test_16_bit_activations(name, dtype, path):
    """As the module computes in 16 bits, up to what roundings between layers may move."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    make, inputs = MODULES[name]
    module = randomised(make()).to(getattr(torch, dtype))
    edge.save(module, path)
    numpy_dtype = testing.numpy_dtype(dtype)
    got = edge.load(path, dtype)(*(array.astype(numpy_dtype) for array in inputs))
    assert got.dtype == numpy_dtype
    exact_inputs = [to_torch(a.astype(numpy_dtype).astype("float64"), "float64") for a in inputs]
    with torch.no_grad():
        exact = module.double()(*exact_inputs).numpy()
    layers = 12 if name == "network" else 3 if "deform" not in name else 1.1
    assert testing.errors(got, exact, dtype)[1] <= layers


def test_without_torch(path):
    """In a process that cannot import torch, the same bits."""
    make, inputs = MODULES["network"]
    edge.save(randomised(make()), path)
    x = inputs[0].astype(np.float32)
    np.save(path.with_suffix(".npy"), x)
    child = isolated.python(
        f"""
import sys
sys.modules["torch"] = None
import numpy as np
from dcnlib import edge
assert "safetensors" not in sys.modules
y = edge.load({str(path)!r})(np.load({str(path.with_suffix(".npy"))!r}))
print(y.tobytes().hex())
"""
    )
    assert child.stdout.strip() == edge.load(path)(x).tobytes().hex(), child.stderr


def test_weights_are_packed_once(path, monkeypatch):
    from dcnlib.backends import cpu

    edge.save(randomised(MODULES["deform_mask_groups"][0]()), path)
    model = edge.load(path)
    calls = []
    pack = cpu.pack_weight
    monkeypatch.setattr(cpu, "pack_weight", lambda *given: (calls.append(given), pack(*given))[1])
    inputs = [array.astype(np.float32) for array in MODULES["deform_mask_groups"][1]]
    first = model(*inputs)
    assert len(calls) == 1, "three offset groups, which the module does not know"
    assert model(*inputs).tobytes() == first.tobytes()
    assert len(calls) == 1


def test_any_instruction_set(path):
    """One that is chosen after loading finds weights packed for another, and packs its own."""
    edge.save(randomised(MODULES["modulated"][0]()), path)
    model, x = edge.load(path), X.astype(np.float32)
    for isa in testing.cpu_isas():
        with dcnlib.cpu_isa(isa):
            assert model(x).tobytes() == edge.load(path)(x).tobytes()


class Twice(nn.ReLU):
    """Not what the class that it comes from computes."""


def hooked():
    module = nn.Sequential(nn.Conv2d(3, 4, 1))
    module[0].register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), Twice()), TypeError, "1 is of a kind that is"),
        (lambda: nn.Tanh(), TypeError, "expected .*DeformConv2dPack.*, got torch.*Tanh; write an"),
        (lambda: nn.Conv2d(1, 1, 3, padding_mode="reflect"), ValueError, "padding_mode: .*'zeros'"),
        (lambda: nn.MaxPool2d(2, ceil_mode=True), ValueError, "ceil_mode: "),
        (lambda: nn.AdaptiveAvgPool2d(2), ValueError, "output_size: "),
        (
            lambda: dnn.ModulatedDeformConv2dPack(2, 2, 1, mask_activation=torch.tanh),
            ValueError,
            "mask_activation: ",
        ),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), ValueError, "no tensor of that"),
        (hooked, ValueError, "hooks cannot be saved"),
        (lambda: "module", TypeError, "must be a module"),
    ],
)
def test_what_cannot_be_saved(make, error, text, path):
    with pytest.raises(error, match=text) as caught:
        edge.save(make(), path)
    assert re.match(r"edge\.save: \w+: .*; expected .*, got ", str(caught.value))
    assert not path.exists()


def test_registering_a_layer(path):
    @edge.register
    class Doubled(edge.Layer):
        saves = (f"{Twice.__module__}.{Twice.__qualname__}",)

        def __call__(self, input):
            return 2 * input

    try:
        edge.save(Twice(), path)
        assert edge.load(path)(np.ones(2, np.float32)).tolist() == [2, 2]
    finally:
        del edge.layers.LAYERS["Doubled"]
    with pytest.raises(ValueError, match="has a layer that is not known"):
        edge.load(path)


def test_inputs_are_checked(path):
    edge.save(randomised(MODULES["modulated"][0]()), path)
    model = edge.load(path)
    with pytest.raises(
        TypeError, match=r"input: must have the dtype of the model; expected float32"
    ):
        model(X)
    with pytest.raises(TypeError, match=r"computes with NumPy arrays"):
        model(torch.ones(1, 6, 9, 9))
    with pytest.raises(ValueError, match=r"conv2d: weight: "):
        model(np.ones((1, 5, 9, 9), np.float32))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.BatchNorm2d(8), (1, 1, 5, 5)),
        (lambda: nn.BatchNorm2d(1), (1, 8, 5, 5)),
        (lambda: nn.MaxPool2d(4, 1), (1, 1, 3, 3)),
        (lambda: nn.MaxPool2d(3, 2), (1, 1, 4, 2)),
        (lambda: nn.Linear(3, 2), (4, 1)),
    ],
    ids=["channels_1", "norm_1", "pool", "pool_width", "linear"],
)
def test_what_torch_refuses(make, shape, path):
    """NumPy would repeat sizes of 1, or compute nothing."""
    edge.save(make().eval(), path)
    with pytest.raises(RuntimeError):
        make().eval()(torch.ones(shape))
    with pytest.raises(
        ValueError, match=r"^[a-z_0-9]+: input: [^;]+; expected [^;]+, got shape \("
    ):
        edge.load(path)(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Linear(3, 2), "bias"),
        (lambda: nn.BatchNorm2d(5), "weight"),
        (lambda: nn.BatchNorm2d(5), "running_mean"),
    ],
    ids=["bias", "scale", "mean"],
)
def test_tensors_of_one_value(make, name, path):
    """NumPy would repeat them."""
    from safetensors.numpy import load_file, save_file

    edge.save(make().eval(), path)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {name: np.ones(1, np.float32)}, path, metadata)
    with pytest.raises(ValueError, match=r"edge\.load: \w+: axis -1 has another size"):
        edge.load(path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data, network: (data, None), "must be a file of edge.save"),
        (lambda data, network: ({}, network), "a tensor is missing"),
        (lambda data, network: ({**data, "weight": data["bias"]}, network), "weight: must have shape"),
        (lambda data, network: (data, {"layer": "Conv"}), "a layer that is not known"),
        (lambda data, network: (data, {"layer": "Conv2d"}), "its description of the network"),
        (lambda data, network: (data, []), "its description of the network"),
        (lambda data, network: ({**data, "bias": np.zeros(3, np.int64)}, network), "floats"),
        (
            lambda data, network: (
                data, {**network, "settings": {**network["settings"], "stride": 0}}
            ),
            "stride",
        ),
    ],
    ids=["metadata", "tensors", "shape", "layer", "settings", "tree", "integers", "stride"],
)  # fmt: skip
def test_damaged_files(damage, text, path):
    from safetensors.numpy import load_file, save_file

    edge.save(nn.Conv2d(2, 3, 1), path)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    tensors, network = damage(load_file(path), json.loads(metadata["network"]))
    metadata = metadata | {"network": json.dumps(network)} if network is not None else None
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=text):
        edge.load(path)


def test_initializers_in_another_byte_order():
    node = SimpleNamespace(op_type="DeformConv", input=["x", "w", "o", "b"], attribute=[])
    rng = np.random.default_rng(0)
    x, offset, w, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((1, 3, 8, 8), (1, 18, 6, 6), (4, 3, 3, 3), 4)
    )
    swapped = {name: a.astype(a.dtype.newbyteorder()) for name, a in (("w", w), ("b", b))}
    same = edge.from_onnx_node(node, swapped)(x, offset)
    np.testing.assert_array_equal(same, edge.from_onnx_node(node, {"w": w, "b": b})(x, offset))


def test_no_file_at_all(path):
    with pytest.raises(FileNotFoundError):
        edge.load(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"edge\.load: path: must be a safetensors file"):
        edge.load(path)


def test_safetensors_missing(monkeypatch, path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "dcnlib\[edge\]"'):
        edge.load(path)
