"""One text from every door: NumPy and torch functions, raw operators, meta and fake tensors.

The cases are those of `tests/hostile.py`; the NumPy door's answer is the expectation, which
`tests/test_hostile.py` judges. Behind them what only torch has: layouts, devices, freed memory.
"""

import logging
import re

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import dcnlib  # noqa: E402
import hostile  # noqa: E402
import isolated  # noqa: E402
import torch_calls  # noqa: E402
from dcnlib import nn, testing, torch_ops  # noqa: E402, F401
from dcnlib.compat import paddle  # noqa: E402
from dcnlib.torch_ops import kernels  # noqa: E402
from doors import TENSORS  # noqa: E402

ALL = "deform_conv2d", "deform_conv2d_backward"


@pytest.fixture(autouse=True)
def quiet_fake_tensors():
    """They log every error that passes through them."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def function(op, request):
    arguments = request if op.endswith("backward") else request | {"grad_output": None}
    arguments = {k: v for k, v in arguments.items() if k != "grad_output" or v is not None}
    return getattr(dcnlib, op)(**arguments)


def operator(op, request):
    """The raw operator, with the padding as it takes it."""
    padding = request["padding"]
    if isinstance(padding, tuple | list) and len(padding) == 2:
        padding = (padding[0], padding[0], padding[1], padding[1])
    arguments = [request[name] for name in ("input", "offset", "weight", "bias")]
    arguments += [request["stride"], padding, request["dilation"], request["mask"]]
    arguments += [request["groups"], request["offset_groups"]]
    if op.endswith("backward"):
        arguments.insert(0, request["grad_output"])
    return getattr(torch.ops.dcnlib, op)(*arguments)


def tensors(request, change=lambda tensor: tensor):
    """The request with tensors for arrays."""
    return {
        name: change(torch.from_numpy(value)) if name in TENSORS and value is not None else value
        for name, value in request.items()
    }


def leaf(tensor):
    return tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def on_fake_tensors(call):
    def faked(op, request):
        with FakeTensorMode() as mode:
            return call(op, tensors(request, mode.from_tensor))

    return faked


DOORS = {
    "function": lambda op, request: function(op, tensors(request)),
    "function_grad": lambda op, request: function(op, tensors(request, leaf)),
    "function_meta": lambda op, request: function(op, tensors(request, lambda t: t.to("meta"))),
    "function_fake": on_fake_tensors(function),
    "operator": lambda op, request: operator(op, tensors(request)),
    "operator_grad": lambda op, request: operator(op, tensors(request, leaf)),
    "operator_meta": lambda op, request: operator(op, tensors(request, lambda t: t.to("meta"))),
    "operator_fake": on_fake_tensors(operator),
}


def answer(call, op, request):
    """("ok", ""), or type and text of the error."""
    try:
        call(op, request)
    except Exception as error:
        return type(error).__name__, str(error)
    return "ok", ""


def torch_can_hold(request):
    for name in TENSORS:
        if request[name] is not None:
            try:
                torch.from_numpy(request[name])
            except (TypeError, ValueError):
                return False
    return True


def integers_of(request):
    for name in ("stride", "padding", "dilation", "groups", "offset_groups"):
        value = request[name]
        yield from value if isinstance(value, tuple | list) else (value,)


def parser_takes(request):
    """torch converts a raw operator's arguments first: 64-bit ints pass unchanged, None for groups.

    What is no such int is its own error, or becomes one, before this library sees it.
    """
    return all(
        (type(value) is int and -(2**63) <= value < 2**63) or value is None
        for value in integers_of(request)
    ) and not any(request[name] is None for name in ("stride", "padding", "dilation"))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("family", ["integers", "shapes", "dtypes"])
def test_every_door_says_the_same(family, door):
    compared, different = 0, []
    for name, case in hostile.cases("numpy").items():
        if not name.startswith(f"{family}-") or not torch_can_hold(case.request()):
            continue
        if door.startswith("operator") and not parser_takes(case.request()):
            continue
        for op in ALL if not case.backward_only else ALL[1:]:
            expected = answer(function, op, case.request())
            found = answer(DOORS[door], op, case.request())
            compared += 1
            if found != expected:
                different.append(f"{name}, {op}: expected {expected}, got {found}")
    assert not different, "\n".join([f"{len(different)} of {compared}", *different[:10]])
    assert compared >= {"integers": 1000, "shapes": 300, "dtypes": 40}[family]


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30, 1.5, "1", None, (1, 1.5), object()])
def test_what_torch_refuses_itself(value):
    """Values that no operator's schema admits: an error of torch, and nothing worse."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    with pytest.raises(RuntimeError, match=r"dcnlib::deform_conv2d\(\) Expected a value of type"):
        torch.ops.dcnlib.deform_conv2d(*call[:4], value)


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("kind", ["list", "array", "None", "scalar", "type"])
def test_no_tensor(kind, tensor):
    """Arrays among tensors, and things that are neither."""
    request = tensors(hostile.request("usual"))
    array = request[tensor].numpy()
    request[tensor] = {
        "list": array.tolist(), "array": array, "None": None, "scalar": 1.0, "type": torch.Tensor
    }[kind]  # fmt: skip
    if kind == "None" and tensor in ("bias", "mask"):
        return
    text = f"deform_conv2d_backward: {tensor}: arguments must be all NumPy arrays or all torch tens"
    if tensor == "input":
        text = "deform_conv2d_backward: .*: arguments must be all NumPy arrays or all torch tensors"
    with pytest.raises(TypeError, match=text):
        dcnlib.deform_conv2d_backward(**request)


LAYOUTS = {
    "sparse_coo": (lambda t: t.to_sparse(), "layout torch.sparse_coo; convert it with .to_dense()"),
    "sparse_csr": (
        lambda t: t.reshape(len(t), -1).to_sparse_csr() if t.dim() > 1 else t.to_sparse(),
        r"layout torch.sparse_\w+; convert it with .to_dense()",
    ),
    "mkldnn": (lambda t: t.to_mkldnn(), "layout torch._mkldnn; convert it with .to_dense()"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
        "a quantized tensor (torch.quint8); convert it with .dequantize()",
    ),
    "nested": (
        lambda t: torch.nested.nested_tensor([t[0], t[0]]) if t.dim() > 1 else t.to_sparse(),
        "",
    ),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t.flatten()] * 2, layout=torch.jagged),
        "a nested tensor; call once for each of its tensors, or pad them",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_layouts_without_plain_memory(mode, layout, tensor):
    make, got = LAYOUTS[layout]
    request = tensors(hostile.request("usual"))
    request[tensor] = make(request[tensor])
    for op in ALL:
        if op == "deform_conv2d" and tensor == "grad_output":
            continue
        calls = [function] if layout == "jagged" else [function, operator]
        for call in calls:
            with mode(), pytest.raises(TypeError) as raised:
                call(op, request)
            text = str(raised.value)
            start = f"{op}: {tensor}: must be a dense tensor; expected layout torch.strided, got "
            assert text.startswith(start)
            assert re.search(re.escape(got).replace(r"\\w\+", r"\w+"), text[len(start) :])
    if layout == "jagged":  # a class of its own, which knows torch's operators only
        with pytest.raises((TypeError, NotImplementedError)):
            operator("deform_conv2d_backward", request)


@pytest.mark.parametrize("tensor", ["offset", "weight", "bias", "mask", "grad_output"])
def test_devices(tensor):
    """Two devices in one call, each of them named."""
    request = tensors(hostile.request("usual"))
    request[tensor] = request[tensor].to("meta")
    for call in (function, operator):
        with pytest.raises(ValueError, match=f"deform_conv2d_backward: {tensor}: ") as raised:
            call("deform_conv2d_backward", request)
        text = str(raised.value)
        assert "must be on the device of input; expected cpu, got " in text
        for name in TENSORS:
            assert f"{name} on {'meta' if name == tensor else 'cpu'}" in text


def test_fake_devices():
    """On fake CUDA tensors shapes are computed; with one on the CPU among them, they are not."""
    with FakeTensorMode():
        request = {
            name: torch.empty(value.shape, device="cuda") if name in TENSORS else value
            for name, value in hostile.request("usual").items()
        }
        output = function("deform_conv2d", request)
        assert str(output.device) == "cuda:0"
        request["mask"] = torch.empty(request["mask"].shape)
        with pytest.raises(
            ValueError, match="mask: must be on the device of input; expected cuda:0"
        ):
            function("deform_conv2d", request)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA tensors are computed")
@pytest.mark.parametrize("op", ALL)
def test_cuda_tensors_without_cuda(op):
    """torch sends them to the same kernel, which says what is missing and what to do."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dcnlib::{op}", "CUDA")
    with FakeTensorMode():
        request = {
            name: torch.empty(value.shape, device="cuda") if name in TENSORS else value
            for name, value in hostile.request("usual").items()
        }
    arguments = [request[name] for name in ("input", "offset", "weight", "bias")]
    sides = [1, 1, 2, 2]
    arguments += [request["stride"], sides, request["dilation"], request["mask"]]
    kernel = kernels.forward
    if op.endswith("backward"):
        kernel = kernels.backward
        arguments.insert(0, request["grad_output"])
    text = f"{op}: backend: 'cuda' cannot run on cuda: {dcnlib.backends()['cuda'].reason}"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        kernel(*arguments)
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run on cuda: .*\.cpu\(\)"):
        kernel(*arguments, backend="cpu")


@pytest.mark.parametrize("op", ALL)
def test_other_devices(op):
    """What neither CPU nor CUDA nor a fake is gets an error that says so."""
    no_kernel = kernels._no_backward if op.endswith("backward") else kernels._no_forward
    with FakeTensorMode():
        tensors = [torch.empty(1, device="xpu") for _ in range(4 if op.endswith("backward") else 3)]
    text = f"{op}: input: no backend for this device; expected cpu or cuda, got xpu"
    with pytest.raises(ValueError, match=text):
        no_kernel(*tensors)


@pytest.mark.parametrize("call", [function, operator])
@pytest.mark.parametrize("tensor", TENSORS)
def test_freed_memory(tensor, call):
    """As parameters have it that a sharded module has put away."""
    request = tensors(hostile.request("usual"))
    request[tensor] = request[tensor].clone()
    size = request[tensor].untyped_storage().nbytes()
    request[tensor].untyped_storage().resize_(0)
    # The backward pass does not read the bias.
    op = "deform_conv2d" if tensor == "bias" else "deform_conv2d_backward"
    text = (
        f"{op}: {tensor}: its memory has been freed, all or in part; "
        f"expected {size} bytes of storage, got 0 bytes"
    )
    with pytest.raises(ValueError, match=text):
        call(op, request)


@pytest.mark.parametrize(
    ("backend", "error", "text"),
    [
        ("numpy", ValueError, "unknown name; expected cpu, cuda, reference, got 'numpy'"),
        (3, TypeError, "must be a name or None; expected cpu, cuda, reference, got int"),
    ],
)
def test_backend(backend, error, text):
    for change in (torch.Tensor.cpu, lambda t: t.to("meta"), torch.Tensor.numpy):
        arguments = testing.lattice(hostile.GEOMETRIES["single"], 0).to_torch()[:3]
        for op in ALL:
            first = (
                [change(torch.ones(1, 2, 1, 1, dtype=torch.float64))]
                if op.endswith("backward")
                else []
            )
            with pytest.raises(error, match=f"{op}: backend: {text}"):
                getattr(dcnlib, op)(*first, *map(change, arguments), backend=backend)
    if isinstance(backend, str):
        for device in ("cpu", "meta"):
            given = [t.to(device) for t in arguments]
            with pytest.raises(error, match=f"deform_conv2d: backend: {text}"):
                torch.ops.dcnlib.deform_conv2d(*given, backend=backend)


def test_modules_say_the_same():
    """Constructors and calls use the function's words."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"], dtype="float32")
    for options in ({"stride": 0}, {"dilation": -1}, {"padding": 2**31}, {"stride": 1.5}):
        expected = answer(lambda op, _, o=options: dcnlib.deform_conv2d(*call[:3], **o), "", None)
        for layer in (nn.DeformConv2d, nn.DeformConv2dPack, nn.ModulatedDeformConv2dPack):
            found = answer(lambda op, _, o=options, c=layer: c(4, 4, (2, 3), **o), "", None)
            assert found == expected and "deform_conv2d: " in expected[1]
    layer = nn.DeformConv2d(4, 4, (2, 3), padding=1, groups=2)
    wrong = call.offset[:, 1:]
    with pytest.raises(ValueError, match=r"deform_conv2d: offset: ") as module:
        layer(call.input, wrong)
    with pytest.raises(ValueError, match=r"deform_conv2d: offset: ") as plain:
        dcnlib.deform_conv2d(call.input, wrong, layer.weight, padding=1, groups=2)
    assert str(module.value) == str(plain.value)
    with pytest.raises(ValueError, match=r"deform_conv2d: offset: ") as other:
        paddle.deform_conv2d(call.input, wrong, layer.weight, padding=1, groups=2)
    assert "offset" in str(other.value)


def test_no_memory():
    answers = isolated.outcomes("torch_calls", "run_out_of_memory", ALL)
    for op, given in zip(ALL, answers, strict=True):
        assert given.get("error") == "MemoryError", given
        assert given["text"].startswith(f"{op}: memory: ")
