"""RoI pooling and resampling through torch: values, derivatives of all orders, and torch's services.

The same promises as for the convolution, for every operator of `OPERATORS`.
"""

import importlib
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.func import grad, jacfwd, jacrev, jvp, vmap  # noqa: E402

import dcnlib  # noqa: E402
import pools  # noqa: E402
from dcnlib import testing  # noqa: E402
from dcnlib.torch_ops import composite_pool, composite_resample  # noqa: E402
from pools import Pool, Resample  # noqa: E402

DTYPES = ("float32", "float64", "float16", "bfloat16")
CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5, "nondet_tol": 0.0}


def tensors(call):
    """A call of NumPy arrays as one of tensors."""

    def convert(array):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.astype(np.float32)).bfloat16()
        return torch.from_numpy(np.ascontiguousarray(array))

    return call.map(convert, convert) if isinstance(call, Pool) else call.map(convert)


def arrays(results):
    """Results as NumPy arrays."""
    return {
        name: None if value is None else testing.to_numpy(value.detach())
        for name, value in results.items()
    }


def differentiable(call):
    return ["input", "offset"] + ["mask"] * (isinstance(call, Pool) and call.mask is not None)


def function(call, backend=None):
    """The operator as a function of its differentiable tensors, the rest as in `call`."""
    names = [name for name in differentiable(call) if getattr(call, name) is not None]
    operator, fixed = getattr(dcnlib, call.op), call.keywords() | {"backend": backend}
    return names, lambda *given: operator(**{**fixed, **dict(zip(names, given, strict=True))})


def by_autograd(call, backend=None):
    """`run`, with the gradients from autograd."""
    names, apply = function(call, backend)
    leaves = [getattr(call, name).detach().requires_grad_() for name in names]
    output = apply(*leaves)
    grads = torch.autograd.grad(output, leaves, call.grad_output)
    results = {"output": output}
    results |= {f"grad_{name}": value for name, value in zip(names, grads, strict=True)}
    expected = pools.OUTPUTS if isinstance(call, Pool) else pools.OUTPUTS[:3]
    return {name: results.get(name) for name in expected}


def smooth(name):
    """A small float64 call with no position within 0.02 of a kink."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        if name in ("border", "zeros"):
            shape = (2, 2, 3, 4)
            whole = rng.integers(-2, 2, (2, 4, 3, 4))
            offset = whole + rng.uniform(0.1, 0.9, whole.shape)
            return tensors(
                Resample(rng.standard_normal(shape), offset, rng.standard_normal(shape), name)
            )
        sensitive = name in ("sensitive", "classes")
        options = {
            "aligned": {"sampling_ratio": 2},
            "adaptive": {},
            "plain": {"sampling_ratio": 1},
            "sensitive": {"sample_per_part": 2},
            "classes": {
                "group_size": (1, 2),
                "classes": 2,
                "part_size": (1, 2),
                "sample_per_part": 2,
            },
        }[name]
        channels = 4 if name == "classes" else 2
        call = pools.real_pool(
            seed, sensitive, (2, channels, 3, 4), 2, (2, 2), spatial_scale=0.5, **options
        )
        if name == "plain":
            call = call._replace(offset=None)
        if distance_to_kinks(call) > 0.02 and call.forward().any(axis=(1, 2, 3)).all():
            return tensors(call)
    raise AssertionError("no such call")


def distance_to_kinks(call):
    """Of all samples, to the next pixel or border."""
    distances = [1.0]
    bilinear = pools._bilinear

    def spy(image, p_y, p_x):
        for p in (p_y, p_x, 2 * p_y + 1, 2 * p_x + 1):
            distances.append(abs(p - round(p)))
        return bilinear(image, p_y, p_x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools, "_bilinear", spy)
        pools.pool_oracle(call)
    return min(distances)


CASES = ("aligned", "adaptive", "plain", "sensitive", "classes", "border", "zeros")
OPERATORS = {
    "aligned": "deform_roi_pool",
    "sensitive": "deform_psroi_pool",
    "border": "deform_resample2d",
}


def operator_arguments(call, backend=None):
    """The arguments of the operator of ``torch.ops.dcnlib``, all of them."""
    if isinstance(call, Resample):
        return (call.input, call.offset, call.boundary, backend)
    o = call.options
    first = (call.input, call.rois, call.offset)
    if not call.sensitive:
        return (
            *first, list(o["output_size"]), o["spatial_scale"], o.get("sampling_ratio", 0),
            o.get("gamma", 0.1), backend,
        )  # fmt: skip
    return (
        *first, o["spatial_scale"], list(o["output_size"]), o["output_dim"],
        list(o.get("group_size", (1, 1))), list(o.get("part_size", o["output_size"])),
        o.get("sample_per_part", 4), o.get("offset_std", 0.1), call.mask, backend,
    )  # fmt: skip


def overload(call, backward=False):
    return getattr(torch.ops.dcnlib, call.op + "_backward" * backward).default


# ---- values


@pytest.mark.parametrize(("backend", "seeds"), [("cpu", 60), ("reference", 15)])
def test_lattices(backend, seeds):
    """By autograd, by the backward function, in channels-last format: equal bits in all dtypes."""
    for seed in range(seeds):
        for call, oracle in (
            (pools.lattice_pool(seed), pools.pool_oracle),
            (pools.lattice_resample(seed), pools.resample_oracle),
        ):
            expected = oracle(call)
            for dtype in DTYPES:
                typed = tensors(call.astype(dtype))
                testing.assert_equal(arrays(by_autograd(typed, backend)), expected, seed)
                if isinstance(typed, Pool):
                    typed = typed._replace(rois=typed.rois.float())
                last = typed._replace(
                    input=typed.input.contiguous(memory_format=torch.channels_last),
                    grad_output=typed.grad_output.contiguous(memory_format=torch.channels_last),
                )
                testing.assert_equal(arrays(last.run(backend)), expected, seed)


@pytest.mark.parametrize("isa", testing.cpu_isas())
def test_real_data_as_through_numpy(isa):
    """The same kernels: equal bits by either door."""
    with dcnlib.cpu_isa(isa):
        for seed in range(3):
            for sensitive in (False, True):
                call = pools.real_pool(seed, sensitive, (2, 70, 20, 24)).astype(
                    "float32", "float32"
                )
                testing.assert_equal(arrays(by_autograd(tensors(call))), call.run())


@pytest.mark.parametrize("case", ["aligned", "sensitive"])
def test_channels_last_stays(case):
    call = smooth(case)
    call = call._replace(input=call.input.contiguous(memory_format=torch.channels_last))
    output, grads = call.forward(), call.backward()
    for tensor in (output, grads.input):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(output, call._replace(input=call.input.contiguous()).forward())


# ---- derivatives


@pytest.mark.filterwarnings("ignore:Backwards compatibility:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    call = smooth(case)
    names, apply = function(call)
    leaves = [getattr(call, name).clone().requires_grad_() for name in names]
    assert gradcheck(
        apply,
        leaves,
        check_undefined_grad=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        **CHECK,
    )


@pytest.mark.filterwarnings("ignore:Backwards compatibility:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_gradgradcheck(case):
    """Reverse and forward mode over reverse mode."""
    call = smooth(case)
    names, apply = function(call)
    leaves = [getattr(call, name).clone().requires_grad_() for name in names]
    assert gradgradcheck(
        apply, leaves, check_batched_grad=True, check_fwd_over_rev=True, fast_mode=True,
        **CHECK | {"rtol": 1e-4},
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_agree(case):
    """Hessians by every order of modes."""
    call = smooth(case)
    names, apply = function(call)
    leaves = [getattr(call, name) for name in names]
    every = tuple(range(len(leaves)))

    def loss(*given):
        return apply(*given).square().sum()

    expected = jacrev(jacrev(loss, every), every)(*leaves)
    assert any(block.abs().max() > 0 for row in expected for block in row)
    for outer, inner in ((jacfwd, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd)):
        found = outer(inner(loss, every), every)(*leaves)
        for row, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_without_functorch(case):
    call = smooth(case)
    names, apply = function(call)
    leaves = [getattr(call, name) for name in names]
    for i, leaf in enumerate(leaves):
        tangent = torch.randn_like(leaf)
        _, expected = jvp(
            lambda t, i=i: apply(*leaves[:i], t, *leaves[i + 1 :]), (leaf,), (tangent,)
        )
        with forward_ad.dual_level():
            output = apply(*leaves[:i], forward_ad.make_dual(leaf, tangent), *leaves[i + 1 :])
            primal, found = forward_ad.unpack_dual(output)
        torch.testing.assert_close(primal, apply(*leaves), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["aligned", "sensitive"])
def test_regions_have_no_gradient(case):
    call = smooth(case)
    call = call._replace(rois=call.rois.clone().requires_grad_())
    assert not call.forward().requires_grad
    call = call._replace(input=call.input.clone().requires_grad_())
    output = call.forward()
    output.sum().backward()
    assert call.rois.grad is None and call.input.grad is not None


@pytest.mark.parametrize("case", OPERATORS)
def test_who_needs_a_gradient(case, monkeypatch):
    """Nothing is computed that nobody asks for, and no bit depends on who asks."""
    call = smooth(case)
    expected = call.backward()
    cpu = importlib.import_module("dcnlib.backends.cpu")
    backward_name = "resample_backward" if case == "border" else "roi_pool_backward"
    backward, asked = getattr(cpu, backward_name), []

    def spy(*operands, **settings):
        asked.append([address is not None for address in operands[-1]])
        backward(*operands, **settings)

    monkeypatch.setattr(cpu, backward_name, spy)
    names = differentiable(call)
    for wanted in range(2 ** len(names)):
        needed = [bool(wanted & 1 << i) for i in range(len(names))]
        leaves = {
            name: getattr(call, name).clone().requires_grad_(is_needed)
            for name, is_needed in zip(names, needed, strict=True)
        }
        output = call._replace(**leaves).forward()
        assert output.requires_grad == any(needed)
        asked.clear()
        if any(needed):
            output.backward(call.grad_output)
            assert [a[: len(names)] for a in asked] == [needed]
        for name, is_needed in zip(names, needed, strict=True):
            found = leaves[name].grad
            assert torch.equal(found, getattr(expected, name)) if is_needed else found is None


@pytest.mark.parametrize("case", OPERATORS)
def test_output_mask_is_checked(case):
    call = smooth(case)
    given = (call.grad_output, *operator_arguments(call))
    text = f"{call.op}_backward: output_mask: must tell for .*; expected . values, got"
    for changed in (given, [t.to("meta") if isinstance(t, torch.Tensor) else t for t in given]):
        with pytest.raises(ValueError, match=text):
            overload(call, True)(*changed, [True] * 5)


@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("changed", ["input", "offset"])
def test_saved_tensor_is_modified(case, changed):
    call = smooth(case)
    leaves = {
        name: getattr(call, name).clone().requires_grad_() * 1 for name in ("input", "offset")
    }
    output = call._replace(**leaves).forward()
    with torch.no_grad():
        leaves[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# ---- the composites, which all but first derivatives come from


def composed(call):
    """`run` by the composite."""
    problem = pools.problem_of(call.map(torch.Tensor.numpy, torch.Tensor.numpy)
                               if isinstance(call, Pool) else call.map(torch.Tensor.numpy))  # fmt: skip
    if isinstance(call, Resample):
        output = composite_resample.forward(problem, *call[:2])
        grads = composite_resample.backward(problem, call.grad_output, *call[:2], [True, True])
        return dict(zip(pools.OUTPUTS[:3], (output, *grads), strict=True))
    wanted = [True, call.offset is not None, call.mask is not None]
    output = composite_pool.forward(problem, *call[:4])
    grads = composite_pool.backward(problem, call.grad_output, *call[:4], wanted)
    return dict(zip(pools.OUTPUTS, (output, *grads), strict=True))


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_composites_on_lattices(first):
    for seed in range(first, first + 50):
        call = pools.lattice_pool(seed)
        testing.assert_equal(arrays(composed(tensors(call))), pools.pool_oracle(call), seed)
        call = pools.lattice_resample(seed)
        testing.assert_equal(arrays(composed(tensors(call))), pools.resample_oracle(call), seed)


def test_composites_with_special_values():
    """The same elements not finite as in the reference, all others equal."""
    numbers = [np.nan, np.inf, -np.inf]
    for seed in range(120):
        rng = np.random.default_rng(seed)
        call = pools.lattice_pool(seed) if seed % 2 else pools.lattice_resample(seed)
        call = call.map(np.copy, np.copy) if seed % 2 else call.map(np.copy)
        if seed % 2 and not call.sensitive and rng.random() < 0.3:
            call.options["sampling_ratio"] = 0
        name = rng.choice(["input", "offset", "grad_output"] + ["rois", "mask"] * (seed % 2))
        array = getattr(call, name)
        if array is None or not array.size:
            continue
        values = numbers + [1e30, -1e30, 2.0**31, -(2.0**63)] * (name in ("rois", "offset"))
        for _ in range(1 + array.size // 20):
            at = rng.integers(array.size)
            if name != "rois" or at % 5:
                array.flat[at] = rng.choice(values)
        with np.errstate(all="ignore"):
            expected = call.run("reference")
        found = arrays(composed(tensors(call)))
        for output, exact in expected.items():
            if exact is not None:
                np.testing.assert_allclose(
                    found[output], exact, rtol=1e-9, atol=1e-9, err_msg=f"{seed} {name} {output}"
                )


@pytest.mark.parametrize("case", OPERATORS)
def test_nan_in_forward_mode(case):
    """A NaN offset has a NaN tangent, as it has a NaN gradient."""
    call = smooth(case)
    offset = call.offset.clone()
    offset[0, 1, 1, 1] = torch.nan

    def output(offset):
        return call._replace(offset=offset).forward()

    primal, tangent = jvp(output, (offset,), (torch.ones_like(offset),))
    assert primal.isnan().any() and torch.equal(primal.isnan(), tangent.isnan())


# ---- torch's services


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, backward):
    """Schema, autograd registration, fake tensors, and AOTAutograd with dynamic shapes."""
    call = smooth(case)
    record = not backward or case in ("aligned", "border")  # these trace for seconds

    def leaf(tensor):
        return tensor.detach().float().requires_grad_(record)

    call = call.map(leaf, torch.Tensor.float) if isinstance(call, Pool) else call.map(leaf)
    given = operator_arguments(call)
    if backward:
        given = (call.grad_output, *given)
    results = torch.library.opcheck(overload(call, backward), given)
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_results_without_data(case, memory_format):
    """Meta and fake tensors come out with the shape, strides, dtype and device of real ones."""

    def described(call, device="cpu"):
        given = operator_arguments(call)
        results = (overload(call)(*given), *overload(call, True)(call.grad_output, *given))
        assert all(str(result.device) == device for result in results)
        return [(result.shape, result.stride(), result.dtype) for result in results]

    call = smooth(case)
    call = call._replace(input=call.input.contiguous(memory_format=memory_format))

    def moved(to):
        return call.map(to, to) if isinstance(call, Pool) else call.map(to)

    expected = described(call)
    assert described(moved(lambda t: t.to("meta")), "meta") == expected
    with FakeTensorMode() as mode:
        assert described(moved(mode.from_tensor)) == expected


@pytest.mark.parametrize("case", CASES)
def test_vmap(case):
    """Every combination of mapped tensors, values and gradients, against a loop."""
    call, size = smooth(case), 3
    names = [n for n in ("input", "rois", "offset", "mask") if getattr(call, n, None) is not None]
    generator = torch.Generator().manual_seed(0)
    for mapped in range(1, 2 ** len(names)):
        axes, given = [], []
        for i, name in enumerate(names):
            tensor = getattr(call, name)
            if mapped & 1 << i:
                copies = torch.stack([tensor] * size)
                if name == "rois":
                    copies[:, :, 0] = torch.randint(0, 2, copies.shape[:2], generator=generator)
                else:
                    copies += 0.01 * torch.randn(copies.shape, generator=generator).double()
                axis = i % tensor.dim()
                tensor = copies.movedim(0, axis)
            axes.append(axis if mapped & 1 << i else None)
            given.append(tensor)

        def result(*tensors):
            return call._replace(**dict(zip(names, tensors, strict=True))).forward()

        def loss(*tensors, result=result):
            return result(*tensors).square().sum()

        by = tuple(i for i, name in enumerate(names) if name != "rois")

        def run(*tensors, result=result, loss=loss, by=by):
            return result(*tensors), grad(loss, by)(*tensors)

        found = vmap(run, tuple(axes))(*given)
        for example in range(size):
            one = [
                t if axis is None else t.select(axis, example)
                for t, axis in zip(given, axes, strict=True)
            ]
            output, grads = run(*one)
            torch.testing.assert_close(found[0][example], output, rtol=1e-12, atol=1e-12)
            for mine, theirs in zip(found[1], grads, strict=True):
                torch.testing.assert_close(mine[example], theirs, rtol=1e-12, atol=1e-12)


def test_vmap_of_resampling_without_a_batch():
    call = smooth("border")
    found = vmap(lambda x, o: dcnlib.deform_resample2d(x, o))(call.input, call.offset)
    assert torch.equal(found, call.forward())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", OPERATORS)
def test_autocast(case, dtype):
    """The region's type for all but regions of interest; gradients in the leaves' own type."""
    call = smooth(case)
    as_float = {n: getattr(call, n).float() for n in differentiable(call)}
    call = call._replace(**as_float, grad_output=call.grad_output.float())
    leaves = {n: t.clone().requires_grad_() for n, t in as_float.items()}
    with torch.autocast("cpu", dtype):
        output = call._replace(**leaves).forward()
    assert output.dtype == dtype
    low = call._replace(**{n: t.to(dtype) for n, t in as_float.items()})
    assert torch.equal(output, low.forward())
    output.backward(call.grad_output.to(dtype))
    expected = low._replace(grad_output=call.grad_output.to(dtype)).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, getattr(expected, name).float())


@pytest.mark.parametrize("case", OPERATORS)
def test_autocast_leaves_float64(case):
    call = smooth(case)
    with torch.autocast("cpu", torch.bfloat16):
        output = call.forward()
    assert output.dtype == torch.float64 and torch.equal(output, call.forward())


@pytest.mark.parametrize("case", OPERATORS)
def test_compile(case):
    """One graph, forwards and backwards, the same values."""
    call = smooth(case)
    names, apply = function(call)

    def step(*leaves):
        return (apply(*leaves) * call.grad_output).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        leaves = [getattr(call, name).clone().requires_grad_() for name in names]
        loss = run(*leaves)
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", OPERATORS)
def test_export(case):
    call = smooth(case)
    names, apply = function(call)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return apply(*tensors)

    leaves = tuple(getattr(call, name) for name in names)
    exported = torch.export.export(Module(), leaves, strict=False)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert f"dcnlib.{call.op}.default" in targets
    assert torch.equal(exported.module()(*leaves), apply(*leaves))


@pytest.mark.parametrize("case", OPERATORS)
def test_dispatch_keys(case):
    call = smooth(case)
    for suffix in ("", "_backward"):
        keys = ["CPU", "CUDA", "Meta", "Autograd", "FuncTorchBatched"]
        keys += ["AutocastCPU", "AutocastCUDA"] * (not suffix)
        for key in keys:
            name = f"dcnlib::{call.op}{suffix}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
        assert torch.Tag.pt2_compliant_tag in overload(call, bool(suffix)).tags


# ---- errors


@pytest.mark.parametrize("case", OPERATORS)
def test_errors_are_those_of_numpy(case):
    """Type and text of every door, meta tensors included; raw operators name themselves."""
    call = smooth(case)
    plain = call.map(torch.Tensor.numpy, torch.Tensor.numpy) if case != "border" else call.map(
        torch.Tensor.numpy
    )  # fmt: skip
    wrong = [
        {"input": call.input[0, 0]},
        {"input": call.input.int()},
        {"offset": call.offset[:, :1]},
        {"offset": call.offset.float()},
    ]
    if case != "border":
        wrong += [{"rois": call.rois[:, :4]}, {"rois": call.rois.int()}]
    for change in wrong:
        changed = call._replace(**change)
        with pytest.raises((ValueError, TypeError)) as numpy:
            plain._replace(**{n: t.numpy() for n, t in change.items()}).forward()
        for door in (
            changed.forward,
            lambda changed=changed: overload(changed)(*operator_arguments(changed)),
            lambda changed=changed: overload(changed)(
                *(
                    t.to("meta") if isinstance(t, torch.Tensor) else t
                    for t in operator_arguments(changed)
                )
            ),
        ):
            with pytest.raises(numpy.type, match=re.escape(str(numpy.value))):
                door()


def test_image_number():
    call = smooth("aligned")
    rois = call.rois.clone()
    rois[1, 0] = 2
    text = "deform_roi_pool: rois: column 0 .* expected a whole number in .0, 1., got 2 in row 1"
    for requires_grad in (False, True):
        given = call._replace(rois=rois, input=call.input.clone().requires_grad_(requires_grad))
        with pytest.raises(ValueError, match=text):
            given.forward()


@pytest.mark.parametrize("case", OPERATORS)
def test_other_kinds_of_tensors(case):
    """Sparse, on another device, in another library's memory: an error that says what to do."""
    call = smooth(case)
    for tensor, error, text in (
        (call.input.to_sparse(), TypeError, "must be a dense tensor"),
        (call.input.to("meta"), ValueError, "must be on the device of input"),
    ):
        with pytest.raises(error, match=f"{call.op}: .*: {text}"):
            call._replace(input=tensor).forward()
    with pytest.raises(TypeError, match=f"{call.op}: offset: arguments must be all"):
        call._replace(offset=call.offset.numpy()).forward()


@pytest.mark.parametrize("case", OPERATORS)
def test_backend_by_name(case):
    call = smooth(case)
    assert torch.allclose(call.forward("reference"), call.forward("cpu"), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match=f"{call.op}: backend: 'cuda' cannot run on cpu"):
        call.forward("cuda")
    with pytest.raises(ValueError, match=f"{call.op}: backend: unknown name"):
        call.forward("fast")
