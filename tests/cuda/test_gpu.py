"""On a GPU: `pytest -m gpu tests/cuda`. Everywhere else this file is skipped, with the reason."""

from __future__ import annotations

import numpy as np
import pytest

import dcnlib
import pools
from dcnlib import testing
from dcnlib.backends import cuda
from dcnlib.testing import OUTPUTS, PROBLEMS, Geometry

if reason := cuda.why_not("cuda"):
    pytest.skip(f"no GPU: {reason}", allow_module_level=True)
pytestmark = pytest.mark.gpu
DTYPES = ("float32", "float64", "float16", "bfloat16")
TYPICAL = Geometry(2, 64, 28, 30, 32, (3, 3), padding=(1, 1, 1, 1))


@pytest.fixture(autouse=True)
def cublas_is_deterministic(monkeypatch):
    """torch wants this set before it lets products run under deterministic algorithms."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("kernels", ["planar", "rows"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["reductions", "sorted"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_named_problem(on_gpu, name, channels_last, deterministic, kernels):
    call = testing.lattice(PROBLEMS[name], 1, (2, 2, 1))
    expected = call.run("reference")
    for dtype in DTYPES:
        actual = on_gpu.run(
            call, dtype, channels_last=channels_last, deterministic=deterministic,
            kernels=kernels, workspace=100_000,
        )  # fmt: skip
        typed = {
            name: None if array is None else array.astype(testing.numpy_dtype(dtype))
            for name, array in actual.items()
        }
        testing.assert_equal(typed, expected, f"{dtype} {kernels}")


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_lattice(on_gpu, first):
    for seed in range(first, first + 25):
        call = testing.random_lattice(seed)
        expected = call.run("reference")
        for dtype in DTYPES:
            actual = on_gpu.run(call, dtype, channels_last=bool(seed % 2))
            for name, exact in expected.items():
                if exact is not None:
                    want = testing.rounded(exact, testing.numpy_dtype(dtype)).astype(np.float64)
                    np.testing.assert_array_equal(actual[name], want, f"{seed} {dtype} {name}")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_accuracy(on_gpu, dtype):
    """Within the documented bounds: float32 products are not TF32."""
    call = testing.real(TYPICAL, 0)
    expected = call.astype(dtype).astype("float64").run("reference")
    for channels_last in (False, True):
        actual = on_gpu.run(call, dtype, channels_last=channels_last)
        testing.assert_close(actual, expected, dtype)


def test_deterministic_runs_have_the_same_bits(on_gpu):
    call = testing.real(TYPICAL, 1)
    bits = set()
    for _ in range(100):
        results = on_gpu.run(call, "float32", channels_last=True, deterministic=True)
        bits.add(tuple(results[name].tobytes() for name in OUTPUTS))
    assert len(bits) == 1


def arguments(torch, dtype):
    shapes = ((2, 16, 20, 20), (2, 18, 20, 20), (8, 16, 3, 3), (8,), (2, 9, 20, 20))
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(s, dtype=dtype, device="cuda", generator=generator, requires_grad=True)
        for s in shapes
    ]


def run(input, offset, weight, bias, mask):
    return dcnlib.deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)


def test_side_stream_with_a_late_producer():
    """Everything is queued on the current stream: no stale reads behind a slow producer."""
    torch = pytest.importorskip("torch")
    input, offset, weight, bias, mask = (t.detach() for t in arguments(torch, torch.float32))
    expected = run(input, offset, weight, bias, mask)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        late = torch.zeros_like(input)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            late.copy_(input)
            output = run(late, offset, weight, bias, mask)
        stream.synchronize()
        assert torch.equal(output, expected)


def test_graph_capture_and_no_synchronisation():
    torch = pytest.importorskip("torch")
    leaves = arguments(torch, torch.float32)
    grad = torch.ones(2, 8, 20, 20, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            output = run(*leaves)
            torch.autograd.grad(output, leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        run(*leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = run(*leaves)
    for seed in range(100):
        with torch.no_grad():
            leaves[0].normal_(generator=torch.Generator("cuda").manual_seed(seed))
            graph.replay()
            assert torch.equal(captured, run(*leaves))


def test_gradients_of_any_order():
    torch = pytest.importorskip("torch")
    small = [t[..., :4, :4] if t.dim() == 4 and t.shape[-1] > 4 else t
             for t in arguments(torch, torch.float64)]  # fmt: skip
    small = [t.detach().clone().requires_grad_() for t in small]
    assert torch.autograd.gradcheck(run, small, fast_mode=True, nondet_tol=1e-10)
    assert torch.autograd.gradgradcheck(run, small, fast_mode=True, nondet_tol=1e-10)


def test_memory_stays_within_the_workspace():
    """Peak memory of a forward call: output, workspace, one copy of the weights."""
    torch = pytest.importorskip("torch")
    x = torch.randn(16, 256, 56, 56, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    offset = torch.randn(16, 18, 56, 56, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(256, 256, 3, 3, device="cuda", dtype=torch.bfloat16)
    dcnlib.deform_conv2d(x[:1], offset[:1], weight, padding=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = dcnlib.deform_conv2d(x, offset, weight, padding=1)
    torch.cuda.synchronize()
    allowed = output.nbytes + (64 << 20) + 4 * weight.nbytes + (1 << 20)
    assert torch.cuda.max_memory_allocated() - before <= allowed


def test_float32_follows_torch_on_tf32():
    torch = pytest.importorskip("torch")
    leaves = [t.detach() for t in arguments(torch, torch.float32)]
    exact = run(*(t.double() for t in leaves))
    errors = []
    before = torch.backends.cuda.matmul.allow_tf32
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        errors.append((run(*leaves) - exact).abs().max().item() / exact.abs().max().item())
    torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[0] < 2e-6 and errors[1] > 1e-5


def test_other_devices_are_left_alone():
    """The current device is what it was, whichever device the tensors are on."""
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    leaves = [t.detach().to("cuda:1") for t in arguments(torch, torch.float32)]
    torch.cuda.set_device(0)
    output = run(*leaves)
    assert torch.cuda.current_device() == 0 and output.device.index == 1
    assert torch.allclose(output.cpu(), run(*(t.cpu() for t in leaves)), atol=1e-4)


@pytest.mark.parametrize("deterministic", [False, True], ids=["reductions", "ordered"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pooling_and_resampling(dtype, deterministic):
    """Every bit is the reference's, in both layouts."""
    torch = pytest.importorskip("torch")

    def moved(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to("cuda", getattr(torch, dtype))

    def same(array):
        return torch.from_numpy(array).cuda()

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        for seed in range(60):
            layout = torch.channels_last if seed % 2 else torch.contiguous_format
            pool, resample = pools.lattice_pool(seed), pools.lattice_resample(seed)
            for call, on_gpu in ((pool, pool.map(moved, same)), (resample, resample.map(moved))):
                is_pool = isinstance(call, pools.Pool)
                expected = (pools.pool_oracle if is_pool else pools.resample_oracle)(call)
                on_gpu = on_gpu._replace(input=on_gpu.input.contiguous(memory_format=layout))
                for name, found in on_gpu.run().items():
                    if found is not None:
                        array = testing.to_numpy(found.cpu())
                        testing.assert_equal({name: array}, {name: expected[name]}, seed)
    finally:
        torch.use_deterministic_algorithms(before)
