"""Whole calls through the emulated CUDA backend: accuracy, determinism, cuts, memory, errors, torch."""

from __future__ import annotations

import contextlib
import itertools
import types

import numpy as np
import pytest

import dcnlib
from dcnlib import testing
from dcnlib.backends import cuda
from dcnlib.testing import OUTPUTS, PROBLEMS, Geometry

DTYPES = ("float32", "float64", "float16", "bfloat16")
SAME = (1, 1, 1, 1)
THREE = (3, 3)
SHAPES = {
    "typical": Geometry(2, 64, 20, 21, 16, THREE, padding=SAME),
    "deepest": Geometry(1, 512, 9, 9, 16, THREE, padding=SAME),
    "strided": Geometry(2, 20, 33, 31, 12, (5, 3), (2, 1), (2, 1, 0, 3), (1, 2), 2, 5),
    "depthwise": Geometry(1, 32, 24, 24, 32, THREE, padding=SAME, groups=32, offset_groups=2),
    "pointwise": Geometry(1, 128, 20, 20, 24, (1, 1), mask=False),
    "wide": Geometry(1, 3, 2, 4096, 16, THREE, padding=SAME),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(emulation, shape, dtype):
    """The CPU's targets, in several chunks and with either kind of sum."""
    call = testing.real(SHAPES[shape], 0)
    expected = call.astype(dtype).astype("float64").run("reference")
    for deterministic in (False, True):
        actual = emulation.run(
            call, dtype, channels_last=True, deterministic=deterministic, workspace=3 << 20
        )
        testing.assert_close(actual, expected, dtype, f"{shape}, deterministic {deterministic}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_samples_cost_their_rounding(emulation, dtype):
    """`samples="rounded"` is less accurate than the documented bound, and not by more than that."""
    call = testing.real(SHAPES["typical"], 1)
    expected = call.astype(dtype).astype("float64").run("reference")
    actual = emulation.run(call, dtype, channels_last=True, samples="rounded")
    for name, exact in expected.items():
        largest, rms = testing.errors(actual[name], exact, dtype)
        assert largest < 1.6 and rms < 0.8, (name, largest, rms)
    assert testing.errors(actual["output"], expected["output"], dtype)[1] > 0.5


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_sums_have_the_same_bits(emulation, dtype, channels_last):
    """Whatever runs when, however large the grid; reductions in memory do not promise that."""
    call = testing.real(Geometry(2, 16, 11, 13, 4, THREE, padding=SAME, offset_groups=2), 2)
    call = call._replace(offset=2 * call.offset)
    bits, free = set(), set()
    for schedule, blocks in itertools.product(("round", "down", "random", "preempt"), (0, 1)):
        emulation.schedule(schedule, blocks)
        for found, deterministic in ((bits, True), (free, False)):
            results = emulation.run(
                call, dtype, channels_last=channels_last, deterministic=deterministic,
                workspace=60_000, blocks=blocks,
            )  # fmt: skip
            found.add(tuple(results[name].tobytes() for name in OUTPUTS))
    assert len(bits) == 1
    assert dtype in ("float16", "bfloat16") or len(free) > 1


@pytest.mark.parametrize("deterministic", [False, True], ids=["reductions", "sorted"])
@pytest.mark.parametrize("name", ["groups_across", "channels_64"])
def test_every_subset_of_gradients(emulation, name, deterministic):
    """What is asked for does not depend on what else is."""
    call = testing.lattice(PROBLEMS[name], 1, (2, 2, 1))
    expected = call.run("reference")
    for wanted in itertools.product((False, True), repeat=5):
        actual = emulation.run(call, "float16", deterministic=deterministic, wanted=wanted)
        for output, is_wanted in zip(OUTPUTS[1:], wanted, strict=True):
            if not is_wanted:
                assert actual[output] is None
            else:
                want = testing.rounded(expected[output], np.dtype("float16"))
                np.testing.assert_array_equal(actual[output], want.astype("float64"), output)


def test_unaligned_channels_last_input(emulation):
    """Tensors that begin anywhere: 16-byte loads need a copy, which the rows kernels get."""
    torch = pytest.importorskip("torch")
    call = testing.lattice(Geometry(1, 16, 6, 7, 4, THREE, padding=SAME), 3, (2, 2, 1))
    problem = call.astype("float32").problem()._replace(channels_last=True)
    memory = torch.zeros(call.input.size + 1)
    input = memory[1:].view(1, 6, 7, 16).permute(0, 3, 1, 2)
    input.copy_(torch.from_numpy(call.input))
    assert input.data_ptr() % 16 == 4
    offset, weight, bias, mask = (torch.from_numpy(a).float() for a in call[1:5])
    output = torch.empty(call.grad_output.shape).contiguous(memory_format=torch.channels_last)
    cuda.forward(problem, input, offset, weight, bias, mask, output)
    np.testing.assert_array_equal(output.numpy(), call.forward("reference"))


def test_temporaries_stay_within_the_workspace(emulation, monkeypatch):
    """The sum of all temporaries but the weights', for workspaces that have room for one pixel."""
    from dcnlib.backends.cuda import _pipeline

    taken = []
    take = _pipeline._Run.empty

    def counted(run, count, dtype):
        memory = take(run, count, dtype)
        taken.append(memory.numel() * memory.element_size())
        return memory

    monkeypatch.setattr(_pipeline._Run, "empty", counted)
    call = testing.real(Geometry(3, 32, 12, 11, 8, THREE, padding=SAME, offset_groups=2), 0)
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        for workspace in (40_000, 100_000, 400_000, 4_000_000):
            taken.clear()
            emulation.run(
                call, dtype, channels_last=channels_last, workspace=workspace,
                wanted=(True, True, False, True, True),
            )  # fmt: skip
            # Forward and backward one after the other; a float32 sum of one image may exceed it.
            allowed = 2 * workspace + 4 * call.input[0].size * (dtype in ("float16", "bfloat16"))
            assert 0 < sum(taken) <= allowed, (dtype, channels_last, workspace, sum(taken))


def test_failed_launch_raises_and_leaves_nothing_behind(emulation):
    """The error names the pass and CUDA's reason; the next call is right."""
    core = cuda._status.core(True)
    call = testing.lattice(PROBLEMS["channels_64"], 0, (2, 2, 1)).astype("float32")
    offset = np.ascontiguousarray(call.offset)
    columns = np.empty(64 * 9 * 4 + 1, np.float32)
    broken = core.Call(
        call.problem(), rows=True, pieces=1, device=0, stream=0, blocks=8,
        offset=offset.ctypes.data,
    )  # fmt: skip
    broken.images(0, call.input.ctypes.data, True)
    broken.pixels(0, 4)
    misaligned = columns.ctypes.data + (4 if columns.ctypes.data % 16 == 0 else 0)
    if call.input.ctypes.data % 16 == 0:
        broken.images(0, call.input.ctypes.data + 4, True)
    with pytest.raises(RuntimeError, match=r"CUDA pass 'sample' failed; .*'unspecified launch"):
        broken.sample(misaligned)
    wrong_device = core.Call(
        call.problem(), rows=False, pieces=1, device=7, stream=0, blocks=8,
        offset=offset.ctypes.data,
    )  # fmt: skip
    wrong_device.images(0, call.input.ctypes.data, False)
    wrong_device.pixels(0, 4)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        wrong_device.sample(columns.ctypes.data)
    expected = call.astype("float64").run("reference")
    testing.assert_equal(call.run("cuda"), expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_device_and_stream_of_every_launch(emulation, monkeypatch, channels_last):
    """The call's own, whichever is current; the current device is left as it was."""
    core = cuda._status.core(True)

    def call_elsewhere(problem, **keywords):
        return core.Call(problem, **(keywords | {"device": 1, "stream": 64}))

    elsewhere = types.SimpleNamespace(Call=call_elsewhere)
    monkeypatch.setattr(cuda._status, "core", lambda emulate: elsewhere)
    call = testing.lattice(PROBLEMS["channels_64"], 0, (2, 2, 1))
    passes = {"finish_rows"} if channels_last else {"finish_planar", "pack_planar"}
    emulation.launches()
    for kernels, deterministic in itertools.product(("planar", "rows"), (False, True)):
        emulation.run(
            call, "float32", channels_last=channels_last, deterministic=deterministic,
            kernels=kernels,
        )  # fmt: skip
        passes |= {f"{kernels}_sample", f"{kernels}_backward"}
        passes |= {"corner_keys", "gather"} if deterministic else set()
        assert emulation.launches() == " ".join([*sorted(passes), "device 1 stream 64 now 0"])
        passes -= {f"{kernels}_sample", f"{kernels}_backward", "corner_keys", "gather"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_asked_of_torch_for_a_gpu(monkeypatch, dtype):
    """Tensors without data that call themselves CUDA's: shapes, dtypes, stream, and no value is read.

    Whoever read one would wait for the device. The products are those that the emulation cannot make.
    """
    torch = pytest.importorskip("torch")
    from dcnlib.backends.cuda import _pipeline

    class OnGpu(torch.Tensor):
        is_cuda = True

        def get_device(self):
            return 1

        def data_ptr(self):
            return 16

    seen = []

    class Passes:
        def __init__(self, problem, *, device, stream, blocks, **others):
            seen.append((device, stream, blocks))

        def __getattr__(self, name):
            return lambda *arguments: seen.append(name)

    stream = types.SimpleNamespace(cuda_stream=64)
    take = _pipeline._Run.empty
    monkeypatch.setattr(cuda._status, "core", lambda emulate: types.SimpleNamespace(Call=Passes))
    monkeypatch.setattr(_pipeline, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(_pipeline._Run, "empty", lambda *a: take(*a).as_subclass(OnGpu))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    call = testing.real(Geometry(2, 16, 9, 10, 4, THREE, padding=SAME), 0).astype(dtype)
    for channels_last, deterministic in itertools.product((False, True), repeat=2):
        problem = call.problem()._replace(channels_last=channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        tensors = [
            torch.empty(array.shape, dtype=getattr(torch, dtype), device="meta")
            .to(memory_format=layout if index in (0, 5) else torch.contiguous_format)
            .as_subclass(OnGpu)
            for index, array in enumerate(call[:6])
        ]
        grads = [torch.empty_like(tensor) for tensor in tensors[:5]]
        input, offset, weight, _, mask, grad_output = tensors
        seen.clear()
        torch.use_deterministic_algorithms(deterministic)
        try:
            cuda.forward(problem, *tensors[:5], torch.empty_like(grad_output))
            cuda.backward(problem, grad_output, input, offset, weight, mask, grads)
        finally:
            torch.use_deterministic_algorithms(False)
        begin = [(1, 64, 16 * 132), "images", "pixels"]
        pack, sort = ["pack"] * (not channels_last), ["keys", "gather"] * deterministic
        assert seen == [*begin, "sample", "finish", *begin, *pack, "backward", *sort]


# ---- torch -------------------------------------------------------------------------------------


def tensors(dtype):
    """Input, offset, weight, bias and mask of a small call with two offset groups."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 3, 4), (2, 16, 2, 3), (2, 4, 2, 2), (2,), (2, 8, 2, 3))
    return [
        torch.randn(shape, dtype=dtype, generator=generator, requires_grad=True) for shape in shapes
    ]


def through_cuda(input, offset, weight, bias, mask):
    return dcnlib.deform_conv2d(input, offset, weight, bias, mask=mask, backend="cuda")


def test_gradients_of_any_order(emulation):
    torch = pytest.importorskip("torch")
    arguments = tensors(torch.float64)
    assert torch.autograd.gradcheck(through_cuda, arguments)
    assert torch.autograd.gradgradcheck(through_cuda, arguments, fast_mode=True)


def test_operators_obey_torch(emulation):
    """opcheck: schema, autograd registration, fake tensors, AOT dispatch."""
    torch = pytest.importorskip("torch")
    input, offset, weight, bias, mask = tensors(torch.float32)
    torch.library.opcheck(
        torch.ops.dcnlib.deform_conv2d.default,
        (input, offset, weight, bias, [1, 1], [0, 0, 0, 0], [1, 1], mask),
        {"backend": "cuda"},
    )


@pytest.mark.parametrize("kernels", ["planar", "rows"])
def test_deterministic_algorithms_sort(emulation, kernels):
    """torch's switch decides for a program that knows nothing of this backend."""
    torch = pytest.importorskip("torch")
    torch_before = torch.are_deterministic_algorithms_enabled()
    for deterministic in (False, True):
        arguments = tensors(torch.float64)
        emulation.launches()
        torch.use_deterministic_algorithms(deterministic)
        try:
            with cuda.settings(kernels=kernels):
                through_cuda(*arguments).sum().backward()
        finally:
            torch.use_deterministic_algorithms(torch_before)
        launched = emulation.launches().split()
        assert ({"corner_keys", "gather"} <= set(launched)) == deterministic, launched


def test_results_keep_channels_last(emulation):
    torch = pytest.importorskip("torch")
    input, *others = tensors(torch.float32)
    input = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    output = through_cuda(input, *others)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert input.grad.is_contiguous(memory_format=torch.channels_last)


def test_same_errors_as_the_cpu(emulation):
    """The text of a wrong argument does not depend on the backend."""
    torch = pytest.importorskip("torch")
    input, offset, weight, _, _ = tensors(torch.float32)
    texts = set()
    for backend in ("cpu", "cuda"):
        with pytest.raises(ValueError, match=r"^deform_conv2d: offset: ") as error:
            dcnlib.deform_conv2d(input, offset[:, 1:], weight, backend=backend)
        texts.add(str(error.value))
    assert len(texts) == 1


def test_no_fallback_without_emulation():
    """A forced backend that cannot run is an error with its reason."""
    call = testing.lattice(PROBLEMS["plain"], 0).astype("float32")
    with pytest.raises(
        RuntimeError, match=r"^deform_conv2d: backend: 'cuda' cannot run on cpu: .*GPU"
    ):
        call.forward("cuda")
