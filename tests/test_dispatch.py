"""Which backend runs, why the others do not, and what the chosen one is handed."""

import types

import numpy as np
import pytest

import dcnlib
from dcnlib import _dispatch, testing
from dcnlib.testing import PROBLEMS

NAMES = ("cpu", "cuda", "reference")


def without_gpu():
    """Whether this machine has none, as is usual where these tests run."""
    return not dcnlib.backends()["cuda"].available


def test_status_of_every_backend():
    status = dcnlib.backends()
    assert tuple(status) == NAMES
    for name, (available, reason) in status.items():
        assert isinstance(available, bool) and reason == status[name].reason
        assert reason == "ready" if available else len(reason) > 20
    assert status["cpu"].available and status["reference"].available


def test_every_backend_has_the_same_functions():
    for name in NAMES:
        module = _dispatch._load(name)
        assert module.name == name
        for function in ("why_not", "forward", "backward"):
            assert callable(getattr(module, function))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_forced_by_name(name):
    assert _dispatch.choose("op", name, "cpu").name == name


def test_chosen_by_device():
    assert _dispatch.choose("op", None, "cpu").name == "cpu"


@pytest.mark.parametrize("device", ["cuda", "meta", "mps"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_named_backend_does_not_fall_back(name, device):
    """The error carries its reason, and what to do."""
    with pytest.raises(
        RuntimeError, match=f"^op: backend: '{name}' cannot run on {device}: .*move"
    ):
        _dispatch.choose("op", name, device)


@pytest.mark.skipif(not without_gpu(), reason="there is a GPU")
def test_cuda_says_why_not():
    call = testing.lattice(PROBLEMS["plain"], 0)
    reason = dcnlib.backends()["cuda"].reason
    assert reason and not reason.isspace()
    for function in (call.forward, call.backward):
        with pytest.raises(
            RuntimeError, match=r"^deform_conv2d\w*: backend: 'cuda' cannot run on cpu"
        ):
            function("cuda")


def test_unknown_device():
    with pytest.raises(ValueError, match=r"^op: input: no backend for this device; .*got xpu$"):
        _dispatch.choose("op", None, "xpu")


@pytest.mark.parametrize(
    ("backend", "error", "text"),
    [
        ("gpu", ValueError, "unknown name; expected cpu, cuda, reference, got 'gpu'"),
        ("CPU", ValueError, "unknown name; expected cpu, cuda, reference, got 'CPU'"),
        ("", ValueError, "unknown name; expected cpu, cuda, reference, got ''"),
        (1, TypeError, "must be a name or None; expected cpu, cuda, reference, got int"),
        (b"cpu", TypeError, "must be a name or None; expected cpu, cuda, reference, got bytes"),
        (["cpu"], TypeError, "must be a name or None; expected cpu, cuda, reference, got list"),
    ],
    ids=repr,
)
def test_unknown_names(backend, error, text):
    call = testing.lattice(PROBLEMS["plain"], 0)
    for op, function in (
        ("deform_conv2d", call.forward),
        ("deform_conv2d_backward", call.backward),
    ):
        with pytest.raises(error, match=f"^{op}: backend: {text}$"):
            function(backend)


# ---- what a backend is handed ------------------------------------------------------------------


@pytest.fixture
def spy(monkeypatch):
    """A backend that keeps what it was called with and fills results with ones."""
    calls = []

    def forward(problem, input, offset, weight, bias, mask, output, num_threads=None):
        calls.append((problem, [input, offset, weight, bias, mask], [output]))
        output.fill(1)

    def backward(problem, grad_output, input, offset, weight, mask, grads, num_threads=None):
        calls.append((problem, [grad_output, input, offset, weight, mask], list(grads)))
        for grad in grads:
            if grad is not None:
                grad.fill(1)

    module = types.SimpleNamespace(
        name="cpu", why_not=lambda device: None, forward=forward, backward=backward
    )
    monkeypatch.setattr(_dispatch, "_load", lambda name: module)
    return calls


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no_batch"])
def test_operands_are_as_promised(spy, direction, batched):
    """Plain arrays: C order, aligned, native, with a batch axis, in the problem's shapes."""
    call = testing.lattice(PROBLEMS["groups_across"], 0).astype("float32")
    if not batched:
        call = call._replace(
            **{n: getattr(call, n)[0] for n in ("input", "offset", "mask", "grad_output")}
        )
    odd = call.map(lambda a: np.asfortranarray(a.astype(a.dtype.newbyteorder())).view(np.recarray))
    getattr(odd, direction)()
    ((problem, operands, results),) = spy
    shapes = {
        "forward": [
            problem.input_shape, problem.offset_shape, problem.weight_shape, problem.bias_shape,
            problem.mask_shape, problem.output_shape,
        ],
        "backward": [
            problem.output_shape, problem.input_shape, problem.offset_shape, problem.weight_shape,
            problem.mask_shape, problem.input_shape, problem.offset_shape, problem.weight_shape,
            problem.bias_shape, problem.mask_shape,
        ],
    }[direction]  # fmt: skip
    assert problem.batched is batched and not problem.channels_last
    assert len(operands + results) == len(shapes)
    for array, shape in zip(operands + results, shapes, strict=True):
        assert type(array) is np.ndarray and array.shape == shape
        assert array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative
    assert all(array.flags.writeable for array in results)


def test_plain_arrays_are_not_copied(spy):
    call = testing.lattice(PROBLEMS["plain"], 0)
    call.forward()
    (_, operands, _) = spy[0]
    for array, given in zip(operands, call[:5], strict=True):
        assert array.ctypes.data == given.ctypes.data and np.shares_memory(array, given)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_absent_arguments_are_none(spy, direction):
    call = testing.lattice(PROBLEMS["v1"], 0)
    results = getattr(call, direction)()
    (problem, operands, grads) = spy[0]
    assert not problem.has_mask and not problem.has_bias
    assert operands[-1] is None
    if direction == "backward":
        assert grads[3] is None and grads[4] is None
        assert results.bias is None and results.mask is None


def test_nothing_runs_before_the_check(spy):
    call = testing.lattice(PROBLEMS["plain"], 0)
    with pytest.raises(ValueError, match="stride"):
        call._replace(stride=(0, 1)).forward()
    assert not spy
