"""What torch is told about the operators, and that they keep to it."""

import importlib
import sys

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import dcnlib  # noqa: E402
import isolated  # noqa: E402
import torch_calls  # noqa: E402
from dcnlib import testing, torch_ops  # noqa: E402
from dcnlib.testing import PROBLEMS  # noqa: E402

OPERATORS = ("deform_conv2d", "deform_conv2d_backward")
DTYPES = ("float32", "float64", "float16", "bfloat16")
FORMATS = (torch.contiguous_format, torch.channels_last)


def arguments(operator, call, backend=None):
    """Positional arguments of an operator."""
    given = torch_calls.operator_arguments(call, backend)
    return given if operator == "deform_conv2d" else (call.grad_output, *given)


def overload(operator):
    return getattr(torch.ops.dcnlib, operator).default


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "case", ["v2", "v1", "unbatched", "empty_batch", "float16", "channels_last", "cut"]
)
def test_opcheck(case, operator):
    """Schema, autograd registration, fake tensors, and AOTAutograd with dynamic shapes."""
    geometry = {"v1": torch_calls.SMALL["v1"], "empty_batch": PROBLEMS["empty_batch"]}
    call = torch_calls.smooth(
        geometry.get(case, torch_calls.SMALL["v2"]), dtype=case if case == "float16" else "float32"
    )
    if case == "unbatched":
        call = torch_calls.unbatched(call)
    elif case == "channels_last":
        call = call._replace(input=call.input.contiguous(memory_format=torch.channels_last))
    elif case == "cut":
        call = call._replace(offset=torch.cat([call.offset] * 2, 3)[..., ::2])
    # Double backward through AOTAutograd takes seconds to trace: two cases of it are enough.
    leaves = operator == "deform_conv2d" or case in ("v1", "unbatched")
    call = call.map(lambda t: t.detach().requires_grad_(leaves))
    results = torch.library.opcheck(overload(operator), arguments(operator, call))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_results_without_data(name, operator, memory_format):
    """Meta and fake tensors come out with the shape, strides, dtype and device of real ones."""
    for dtype in DTYPES[:: 3 if name == "plain" else 1][:2]:
        call = testing.lattice(PROBLEMS[name], 0, (1, 1, 1)).astype(dtype).to_torch()
        call = call._replace(input=call.input.contiguous(memory_format=memory_format))
        described = [described_results(operator, call)]
        described.append(described_results(operator, call.map(lambda t: t.to("meta")), "meta"))
        with FakeTensorMode() as mode:
            described.append(described_results(operator, call.map(mode.from_tensor)))
        assert described[0] == described[1] == described[2]


def described_results(operator, call, device="cpu"):
    results = overload(operator)(*arguments(operator, call))
    results = results if isinstance(results, tuple) else (results,)
    assert all(str(result.device) == device for result in results)
    return [(result.shape, result.stride(), result.dtype) for result in results]


@pytest.mark.parametrize("wanted", range(2**5))
def test_only_what_is_wanted(wanted, monkeypatch):
    """The backend is asked for exactly these; the others come back empty; no bit depends on it."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"], dtype="float32")
    output_mask = [bool(wanted & 1 << i) for i in range(5)]
    every = overload("deform_conv2d_backward")(*arguments("deform_conv2d_backward", call))
    cpu = importlib.import_module("dcnlib.backends.cpu")
    backward, asked = cpu.backward, []

    def spy(*operands, **settings):
        asked.append([address is not None for address in operands[6]])
        backward(*operands, **settings)

    monkeypatch.setattr(cpu, "backward", spy)
    some = overload("deform_conv2d_backward")(
        *arguments("deform_conv2d_backward", call), output_mask
    )
    assert asked == [output_mask]
    for is_wanted, grad, expected in zip(output_mask, some, every, strict=True):
        assert torch.equal(grad, expected) if is_wanted else grad.shape == (0,)


def test_gradients_of_absent_arguments():
    """There is one of a bias that is not given, as autograd asks for; there is none of a mask."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    backward = overload("deform_conv2d_backward")
    every = backward(*arguments("deform_conv2d_backward", call))
    without = backward(*arguments("deform_conv2d_backward", call._replace(bias=None)))
    assert all(map(torch.equal, every, without))
    without = backward(*arguments("deform_conv2d_backward", call._replace(mask=None)))
    assert without[4].shape == (0,) and without[0].shape == call.input.shape


def test_output_mask_is_checked():
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    text = "deform_conv2d_backward: output_mask: must tell for .*; expected 5 values, got"
    for mask in ([], [True] * 4, [True] * 6):
        for tensors in (call, call.map(lambda t: t.to("meta"))):
            with pytest.raises(ValueError, match=text):
                overload("deform_conv2d_backward")(
                    *arguments("deform_conv2d_backward", tensors), mask
                )


@pytest.mark.parametrize("operator", OPERATORS)
def test_dispatch_keys(operator):
    keys = ["CPU", "CUDA", "Meta", "Autograd", "FuncTorchBatched"]
    if operator == "deform_conv2d":
        keys += ["AutocastCPU", "AutocastCUDA"]
    for key in keys:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dcnlib::{operator}", key), key


@pytest.mark.parametrize("operator", OPERATORS)
def test_names_and_order(operator):
    """Those of the public function, position for position; its options may be positional."""
    names = [argument.name for argument in overload(operator)._schema.arguments]
    expected = list(getattr(dcnlib, operator).__annotations__)[:-1]
    assert names == expected + (["output_mask"] if operator == "deform_conv2d_backward" else [])
    assert torch.Tag.pt2_compliant_tag in overload(operator).tags


def test_import_twice():
    """Another copy of the package in one process leaves the operators as they are."""
    before = torch_calls.smooth(torch_calls.SMALL["v2"])
    expected = before.run()
    names = [name for name in sys.modules if name.startswith("dcnlib.torch_ops")]
    saved = {name: sys.modules.pop(name) for name in names}
    try:
        again = importlib.import_module("dcnlib.torch_ops")
        assert again is not torch_ops
        importlib.reload(again)
        testing.assert_equal(before.run(), {k: v.numpy() for k, v in expected.items()})
        output = torch.ops.dcnlib.deform_conv2d(*torch_calls.operator_arguments(before))
        assert torch.equal(output, expected["output"])
    finally:
        for name in [n for n in sys.modules if n.startswith("dcnlib.torch_ops")]:
            del sys.modules[name]
        sys.modules.update(saved)
        dcnlib.torch_ops = torch_ops


def test_registered_by_the_first_tensor_or_module():
    """Before that, importing dcnlib beside torch registers nothing."""
    code = """
import sys, torch, dcnlib
assert not hasattr(torch.ops.dcnlib, "deform_conv2d") and "dcnlib.torch_ops" not in sys.modules
{}
assert torch.ops.dcnlib.deform_conv2d.default
"""
    for first in (
        "dcnlib.deform_conv2d(*map(torch.ones, [(1, 1, 2, 2), (1, 2, 2, 2), (1, 1, 1, 1)]))",
        "dcnlib.nn",
        "import dcnlib.compat.paddle",
    ):
        child = isolated.python(code.format(first))
        assert child.returncode == 0, child.stderr


def test_problems_are_remembered():
    """A repeated call of the operator is a look-up."""
    schemas = importlib.import_module("dcnlib.torch_ops.schemas")
    given = arguments("deform_conv2d", torch_calls.smooth(torch_calls.SMALL["v2"]))
    overload("deform_conv2d")(*given)
    before = schemas._cached_problem.cache_info()
    overload("deform_conv2d")(*given)
    after = schemas._cached_problem.cache_info()
    assert after.hits == before.hits + 1 and after.misses == before.misses
