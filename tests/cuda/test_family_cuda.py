"""RoI pooling and resampling through the emulated CUDA backend: the CPU's lattices, values and promises."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import dcnlib  # noqa: E402
import pools  # noqa: E402
from dcnlib import testing  # noqa: E402
from dcnlib.backends import cuda  # noqa: E402

DTYPES = ("float32", "float64", "float16", "bfloat16")
SCHEDULES = ("round", "up", "down", "random", "preempt")


def tensors(call, channels_last=False):
    """A call of NumPy arrays as one of tensors."""

    def convert(array):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.astype(np.float32)).bfloat16()
        return torch.from_numpy(np.ascontiguousarray(array))

    call = call.map(convert, convert) if isinstance(call, pools.Pool) else call.map(convert)
    if not channels_last:
        return call
    layout = torch.channels_last
    return call._replace(
        input=call.input.contiguous(memory_format=layout),
        grad_output=call.grad_output.contiguous(memory_format=layout),
    )


def run(call):
    """Results through the emulation, as arrays."""
    return {
        name: None if value is None else testing.to_numpy(value.detach())
        for name, value in call.run("cuda").items()
    }


@pytest.fixture
def deterministic(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


both_sums = pytest.mark.parametrize(
    "deterministic", [False, True], ids=["reductions", "ordered"], indirect=True
)


@both_sums
def test_lattices(emulation, deterministic):
    """Every bit is the reference's, in all dtypes and layouts, whatever the cut and the schedule."""
    for seed in range(60):
        emulation.schedule(SCHEDULES[seed % 5], seed)
        how = {"workspace": (64 << 20, 0)[seed % 2], "blocks": (0, 1, 3)[seed % 3]}
        for call, oracle in (
            (pools.lattice_pool(seed), pools.pool_oracle),
            (pools.lattice_resample(seed), pools.resample_oracle),
        ):
            expected = oracle(call)
            dtype = DTYPES[seed // 2 % 4]
            with cuda.settings(**how):
                found = run(tensors(call.astype(dtype), bool(seed // 3 % 2)))
            testing.assert_equal(found, expected, f"seed {seed}, {dtype}, {how}")


@pytest.mark.parametrize("dtype", DTYPES)
@both_sums
def test_accuracy(emulation, deterministic, dtype):
    """The CPU's targets: adaptive samples, many samples, classes, parts and groups."""
    for sensitive, options in (
        (False, {}),
        (False, {"sampling_ratio": 7}),
        (True, {"group_size": (2, 1), "classes": 3, "part_size": (2, 4)}),
    ):
        call = pools.real_pool(3, sensitive, **options).astype(dtype, "float32")
        expected = call.astype("float64", "float64").run("reference")
        found = run(tensors(call, channels_last=True))
        if dtype == "float64":
            for name, exact in expected.items():
                if exact is not None:
                    np.testing.assert_allclose(found[name], exact, rtol=1e-10, atol=1e-12)
        else:
            testing.assert_close(found, expected, dtype, options)


def not_numbers(seed):
    """A lattice call with values that are no numbers somewhere."""
    rng = np.random.default_rng(seed)
    is_pool = seed % 3 > 0
    call = pools.lattice_pool(seed) if is_pool else pools.lattice_resample(seed)
    call = call.map(np.copy, np.copy) if is_pool else call.map(np.copy)
    if is_pool and not call.sensitive and rng.random() < 0.3:
        call.options["sampling_ratio"] = 0
    name = rng.choice(["input", "offset", "grad_output"] + ["rois", "mask"] * is_pool)
    array = getattr(call, name)
    if array is not None and array.size:
        values = [np.nan, np.inf, -np.inf]
        values += [1e30, -1e30, 2.0**31, -(2.0**63)] * (name in ("rois", "offset"))
        for _ in range(1 + array.size // 20):
            at = rng.integers(array.size)
            if name != "rois" or at % 5:
                array.flat[at] = rng.choice(values)
    return call


@both_sums
def test_special_values_as_in_the_reference(emulation, deterministic):
    """The same elements not finite, all others equal."""
    for seed in range(90):
        call = not_numbers(seed)
        with np.errstate(all="ignore"):
            expected = call.run("reference")
        found = run(tensors(call))
        for name, exact in expected.items():
            if exact is not None:
                np.testing.assert_allclose(
                    found[name], exact, rtol=1e-9, atol=1e-9, err_msg=f"{seed} {name}"
                )


def test_regions_of_any_size(emulation):
    """As many samples as pixels of a huge region: nobody looks at those outside."""
    image = torch.ones(1, 2, 5, 6, dtype=torch.float64)
    for size in (1e3, 1e9, 1e30, 1e300):
        rois = torch.tensor([[0, -size, -size, size, size]], dtype=torch.float64)
        found = dcnlib.deform_roi_pool(image, rois, None, 1, backend="cuda")
        assert torch.isfinite(found).all()
        if size <= 1e9:
            assert found[0, 0, 0, 0].item() == pytest.approx(7 * 8 / (2 * size) ** 2)


@pytest.mark.parametrize("number", [-1, 2, 0.5, 1e30, -1e30, np.nan, np.inf])
@pytest.mark.parametrize("sensitive", [False, True], ids=["aligned", "sensitive"])
@both_sums
def test_wrong_image_numbers_are_nan(emulation, monkeypatch, deterministic, sensitive, number):
    """A GPU's values cannot be looked at in time: the region is NaN, the others are as they were."""
    from dcnlib.torch_ops import pooling

    monkeypatch.setattr(pooling, "check_image_numbers", lambda *_: None)
    call = pools.real_pool(0, sensitive)
    right = run(tensors(call))
    others = [r for r in range(len(call.rois)) if r != 3]
    without = call._replace(grad_output=call.grad_output.copy())
    without.grad_output[3] = 0
    wrong = call.map(np.copy, np.copy)
    wrong.rois[3, 0] = number
    found = run(tensors(wrong))
    assert np.isnan(found["output"][3]).all() and np.isnan(found["grad_offset"][3]).all()
    for name in ("output", "grad_offset", "grad_mask"):
        if found[name] is not None:
            np.testing.assert_array_equal(found[name][others], right[name][others])
    spread = run(tensors(without))["grad_input"]
    np.testing.assert_allclose(found["grad_input"], spread, rtol=1e-12, atol=1e-12)


def test_ordered_sums_have_the_same_bits(emulation):
    """Whatever runs when, however large the grid and the workspace."""
    pool = tensors(pools.real_pool(1, False, sampling_ratio=2).astype("float32", "float32"))
    rng = np.random.default_rng(0)
    resample = tensors(
        pools.Resample(
            rng.standard_normal((2, 3, 9, 8)), 3 * rng.standard_normal((2, 6, 9, 8)),
            rng.standard_normal((2, 3, 9, 8)), "border",
        ).astype("float32")
    )  # fmt: skip
    for call in (pool, resample):
        bits: dict[bool, set[bytes]] = {False: set(), True: set()}
        for ordered, schedule, blocks in itertools.product(
            bits, ("round", "down", "random"), (0, 1)
        ):
            emulation.schedule(schedule, blocks)
            torch.use_deterministic_algorithms(ordered)
            try:
                with cuda.settings(blocks=blocks, workspace=(64 << 20, 0)[blocks]):
                    bits[ordered].add(call.backward("cuda").input.numpy().tobytes())
            finally:
                torch.use_deterministic_algorithms(False)
        assert len(bits[True]) == 1 and len(bits[False]) > 1


@pytest.mark.parametrize("wanted", range(1, 8))
def test_only_wanted_gradients(emulation, wanted):
    call = pools.lattice_pool(1, True)
    problem = pools.problem_of(call)
    full = call.backward("reference")
    arrays = [torch.from_numpy(getattr(call, n)) for n in pools.Pool._fields[:5]]
    input, rois, offset, mask, grad_output = arrays
    grads = [
        torch.full(g.shape, torch.nan, dtype=torch.float64) if wanted & 1 << i else None
        for i, g in enumerate(full)
    ]
    cuda.roi_pool_backward(problem, grad_output, input, rois, offset, mask, grads)
    for grad, exact in zip(grads, full, strict=True):
        if grad is not None:
            np.testing.assert_array_equal(grad.numpy(), exact)


def test_empty(emulation):
    """No regions, no images."""
    for call in (pools.real_pool(0, False), pools.real_pool(0, True)):
        empty = tensors(
            call._replace(
                rois=call.rois[:0], offset=call.offset[:0], grad_output=call.grad_output[:0],
                mask=None if call.mask is None else call.mask[:0],
            )
        )  # fmt: skip
        found = run(empty)
        assert found["output"].shape[0] == 0 and not found["grad_input"].any()
    nothing = torch.zeros(0, 2, 4, 5)
    assert dcnlib.deform_resample2d(nothing, torch.zeros(0, 4, 4, 5), backend="cuda").numel() == 0


def test_through_numpy_and_torch(emulation):
    """NumPy's door, and derivatives through torch's."""
    call = pools.lattice_pool(4, True).astype("float32")
    testing.assert_equal(call.run("cuda"), call.run("cpu"))
    call = pools.lattice_resample(4).astype("float32")
    testing.assert_equal(call.run("cuda"), call.run("cpu"))
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.3, 0.4, 4.1, 3.9]], dtype=torch.float64)
    offset = (0.1 * torch.randn(1, 2, 2, 2, dtype=torch.float64)).requires_grad_()

    def pool(x, offset):
        return dcnlib.deform_roi_pool(x, rois, offset, 2, sampling_ratio=2, backend="cuda")

    assert torch.autograd.gradcheck(pool, (x, offset))
    assert torch.autograd.gradgradcheck(pool, (x, offset), fast_mode=True)


def test_failed_launch_names_the_pass(emulation):
    core = cuda._status.core(True)
    call = pools.lattice_resample(0, (1, 1, 2, 2)).astype("float32")
    address = call.input.ctypes.data
    with pytest.raises(
        RuntimeError,
        match=r"^deform_resample2d: backend: the CUDA pass 'resample' failed; .*device",
    ):
        core.resample(pools.problem_of(call), 7, 0, 8, address, call.offset.ctypes.data, address)
