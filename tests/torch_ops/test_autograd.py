"""Derivatives of all orders, in reverse and forward mode, and torch's rules for who gets them."""

import importlib
import itertools
from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.autograd.functional import hessian as autograd_hessian  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp  # noqa: E402
from torch.overrides import BaseTorchFunctionMode  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import dcnlib  # noqa: E402
import torch_calls  # noqa: E402
from dcnlib import testing  # noqa: E402
from dcnlib.testing import OUTPUTS, PROBLEMS  # noqa: E402
from dcnlib.torch_ops import composite, schemas  # noqa: E402

# What gradcheck may differ by: documented for float64, offsets at least 0.1 away from any kink.
CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5, "nondet_tol": 0.0}


def case(name):
    """A call with everything, or one of `torch_calls.SMALL`."""
    if name == "unbatched":
        return torch_calls.unbatched(torch_calls.smooth(torch_calls.SMALL["v2"]))
    return torch_calls.smooth(torch_calls.SMALL[name])


CASES = [*torch_calls.SMALL, "unbatched"]


@pytest.mark.filterwarnings("ignore:Backwards compatibility:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    call = case(name)
    assert gradcheck(
        torch_calls.function(call),
        torch_calls.leaves(call),
        check_undefined_grad=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        **CHECK,
    )


@pytest.mark.filterwarnings("ignore:Backwards compatibility:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name):
    """Reverse and forward mode over reverse mode."""
    call = case(name)
    assert gradgradcheck(
        torch_calls.function(call),
        torch_calls.leaves(call),
        check_batched_grad=True,
        check_fwd_over_rev=True,
        fast_mode=name != "v1",  # the smallest is checked entry by entry
        **CHECK | {"rtol": 1e-4},
    )


@pytest.mark.parametrize("name", ["v2", "v1", "unbatched"])
def test_backward_operator_gradcheck(name):
    """The backward operator is differentiable by itself, as the function of six tensors it is."""
    call = case(name)
    given = [i for i, tensor in enumerate(call[:6]) if tensor is not None and i != 3]

    def gradients(*tensors):
        arguments = list(call)
        for i, tensor in zip(given, tensors, strict=True):
            arguments[i] = tensor
        grads = testing.Call(*arguments).backward()
        return tuple(g for g in grads if g is not None)

    leaves = [call[i].clone().requires_grad_() for i in given]
    assert gradcheck(gradients, leaves, fast_mode=True, check_forward_ad=True, **CHECK)


@pytest.mark.parametrize("name", ["v2", "v1"])
def test_second_derivatives_agree(name):
    """Hessians by every order of modes, and by double backward."""
    call = torch_calls.smooth(testing.Geometry(1, 2, 3, 3, 2, (2, 2), mask=name == "v2"))
    loss, leaves = torch_calls.loss(call), [leaf.detach() for leaf in torch_calls.leaves(call)]
    every = tuple(range(len(leaves)))
    expected = autograd_hessian(loss, tuple(leaves))
    for modes in ((jacfwd, jacrev), (jacrev, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd)):
        outer, inner = modes
        found = outer(inner(loss, every), every)(*leaves)
        for i, j in itertools.product(every, every):
            torch.testing.assert_close(found[i][j], expected[i][j], rtol=1e-11, atol=1e-11)
    assert hessian(loss, 1)(*leaves).shape == (*call.offset.shape, *call.offset.shape)


def test_third_derivatives():
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = torch_calls.leaves(call)
    loss = torch_calls.loss(call)

    def once(scalar):
        return lambda offset: grad(scalar)(offset).pow(3).sum()

    def by_offset(offset):
        return loss(leaves[0], offset, *leaves[2:])

    expected = by_offset(leaves[1])
    for _ in range(2):
        (derivative,) = torch.autograd.grad(expected, leaves[1], create_graph=True)
        expected = derivative.pow(3).sum()
    (expected,) = torch.autograd.grad(expected, leaves[1])
    found = grad(once(once(by_offset)))(leaves[1].detach())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().max() > 0


def test_forward_mode_without_functorch():
    """Dual tensors, and a tangent of one tensor only."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = [leaf.detach() for leaf in torch_calls.leaves(call)]
    apply = torch_calls.function(call)
    for i, leaf in enumerate(leaves):
        tangent = torch.randn_like(leaf)
        _, expected = jvp(
            lambda t, i=i: apply(*leaves[:i], t, *leaves[i + 1 :]), (leaf,), (tangent,)
        )
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, tangent)
            output = apply(*leaves[:i], dual, *leaves[i + 1 :])
            primal, found = forward_ad.unpack_dual(output)
        torch.testing.assert_close(primal, apply(*leaves), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_vjp_outlives_its_transform():
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = [leaf.detach() for leaf in torch_calls.leaves(call)]
    output, pull_back = vjp(torch_calls.function(call), *leaves)
    grads = pull_back(call.grad_output.requires_grad_())
    expected = call.backward()
    assert torch.equal(output, call.forward())
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5)), ids=str)
def test_who_needs_a_gradient(needed, monkeypatch):
    """Each subset gets the same values as all together, and nothing else is computed."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"], dtype="float32")
    expected = call.backward()
    cpu = importlib.import_module("dcnlib.backends.cpu")
    backward, asked = cpu.backward, []

    def spy(*operands, **settings):
        asked.append(tuple(address is not None for address in operands[6]))
        backward(*operands, **settings)

    monkeypatch.setattr(cpu, "backward", spy)
    tensors = [t.clone().requires_grad_(n) for t, n in zip(call[:5], needed, strict=True)]
    output = testing.Call(*tensors, *call[5:]).forward()
    assert output.requires_grad == any(needed)
    if any(needed):
        output.backward(call.grad_output)
    assert asked == [needed] * any(needed)
    for tensor, is_needed, value in zip(tensors, needed, expected, strict=True):
        assert torch.equal(tensor.grad, value) if is_needed else tensor.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_recording(mode):
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    expected = call.forward()
    leaves = torch_calls.leaves(call)
    with mode():
        output = torch_calls.function(call)(*leaves)
    assert not output.requires_grad and torch.equal(output, expected)
    assert output.is_inference() == (mode is torch.inference_mode)


def test_nothing_to_record_is_a_usual_tensor():
    """What skips autograd's key can still be changed in place and take part in later graphs."""
    output = torch_calls.smooth(torch_calls.SMALL["v2"]).forward()
    assert not output.is_inference()
    leaf = torch.ones((), dtype=output.dtype, requires_grad=True)
    output.add_(leaf).sum().backward()
    assert leaf.grad == output.numel()


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced", "zero"])
def test_strides_of_grad_output(kind):
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    g = call.grad_output
    other = {
        "expanded": g[..., :1].expand_as(g),
        "transposed": g.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.stack([g, g], -1)[..., 0],
        "zero": torch.zeros(()).double().expand_as(g),
    }[kind]
    assert not other.is_contiguous()
    expected = call._replace(grad_output=other.contiguous()).backward()
    leaves = torch_calls.leaves(call)
    grads = torch.autograd.grad(torch_calls.function(call)(*leaves), leaves, other)
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize("changed", ["input", "offset", "weight", "mask"])
def test_saved_tensor_is_modified(changed):
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = [leaf * 1 for leaf in torch_calls.leaves(call)]
    output = torch_calls.function(call)(*leaves)
    with torch.no_grad():
        leaves[torch_calls.TENSORS.index(changed)].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_bias_may_be_modified():
    """No gradient depends on its values, so none is kept."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = torch_calls.leaves(call)
    output = torch_calls.function(call)(*leaves)
    with torch.no_grad():
        leaves[3].mul_(2)
    output.backward(call.grad_output)
    assert torch.equal(leaves[0].grad, call.backward().input)


@pytest.mark.parametrize("operator", ["deform_conv2d", "deform_resample2d"])
@pytest.mark.parametrize("dispatched", [False, True])
def test_compiled_autograd(operator, dispatched):
    """torch compiles the backward pass of an eager call."""
    from torch._dynamo import compiled_autograd

    call = case("v2")
    leaves = torch_calls.leaves(call)
    if operator == "deform_conv2d":
        apply = torch_calls.function(call)
    else:
        leaves = [torch.randn(2, 3, 5, 6).double(), torch.rand(2, 6, 5, 6).double()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        apply = dcnlib.deform_resample2d
    mode = BaseTorchFunctionMode() if dispatched else nullcontext()

    def gradients(context):
        with mode:
            output = apply(*leaves)
        with context:
            output.square().sum().backward()
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return found

    expected = gradients(nullcontext())
    compiler = torch.compile(backend="eager")
    for found, exact in zip(gradients(compiled_autograd._enable(compiler)), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_backward_twice():
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = torch_calls.leaves(call)
    output = torch_calls.function(call)(*leaves).sum()
    first = torch.autograd.grad(output, leaves, retain_graph=True)
    second = torch.autograd.grad(output, leaves)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output, leaves)


def test_hooks():
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = torch_calls.leaves(call)
    saved, seen = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch_calls.function(call)(*leaves)
    assert [t.shape for t in saved] == [call[i].shape for i in (0, 1, 2, 4)]
    output = torch_calls.function(call)(*leaves)
    output.register_hook(lambda g: 2 * g)
    leaves[1].register_hook(seen.append)
    output.backward(call.grad_output)
    assert torch.equal(seen[0], 2 * call.backward().offset)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = torch_calls.leaves(call)
    output = checkpoint(torch_calls.function(call), *leaves, use_reentrant=use_reentrant)
    grads = torch.autograd.grad(output, leaves, call.grad_output) if not use_reentrant else None
    if use_reentrant:
        output.backward(call.grad_output)
        grads = [leaf.grad for leaf in leaves]
    assert all(map(torch.equal, grads, call.backward()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backend_of_the_gradient(backend, monkeypatch):
    """A forced backend is forced in both directions."""
    asked = []
    for name in ("cpu", "reference"):
        module = importlib.import_module(f"dcnlib.backends.{name}")
        backward = module.backward
        monkeypatch.setattr(
            module, "backward", lambda *a, n=name, b=backward, **k: asked.append(n) or b(*a, **k)
        )
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = torch_calls.leaves(call)
    torch_calls.loss(call, backend=backend)(*leaves).backward()
    assert asked == [backend]


# ---- the composite, which all but first derivatives come from


def composed(call):
    """`Call.run` by the composite."""
    problem = schemas.problem("test", call.grad_output, *call[:4], *call[6:9], call.mask, *call[9:])
    output = composite.forward(problem, *call[:5])
    wanted = [True, True, True, call.bias is not None, call.mask is not None]
    grads = composite.backward(problem, call.grad_output, *call[:3], call.mask, wanted)
    return dict(zip(OUTPUTS, (output, *grads), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_composite_on_the_lattice(name, dtype):
    call = testing.lattice(PROBLEMS[name], 1, (2, 2, 1))
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    testing.assert_equal(composed(call.astype(dtype).to_torch()), call.run("reference"))


def test_composite_on_random_lattices():
    for seed in range(200):
        call = testing.random_lattice(seed)
        testing.assert_equal(composed(call.to_torch()), call.run("reference"), seed)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e30, 2.0**31, -(2.0**63)]
)
@pytest.mark.parametrize("tensor", ["input", "offset", "weight", "mask", "grad_output"])
def test_composite_with_special_values(tensor, value):
    """The same non-finite elements as the reference has, and all others equal."""
    for seed in range(5):
        call = testing.lattice(PROBLEMS["groups_across"], seed, (2, 2, 1))
        array = getattr(call, tensor)
        array.flat[:: array.size // 7] = value
        found, expected = composed(call.to_torch()), call.run("reference")
        for name, exact in expected.items():
            torch.testing.assert_close(
                found[name],
                torch.from_numpy(exact),
                rtol=1e-12,
                atol=1e-12,
                equal_nan=True,
                msg=name,
            )


@pytest.mark.parametrize("operator", ["deform_conv2d", "deform_resample2d"])
def test_derivative_at_kinks_in_every_mode(operator):
    """Right-hand at integers, exactly at -1 too, 0 where nothing is read; NaN for a NaN offset."""
    image = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]).double()[None, None, None]
    positions = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 4.0, 5.0, 6.0, 1e30, float("inf")])
    expected = torch.tensor([0.0, 3.0, -2.0, 3.0, 4.0, -5.0, 0.0, 0.0, 0.0, 0.0]).double()
    if operator == "deform_resample2d":  # as many positions as pixels
        image = torch.nn.functional.pad(image, (0, 5))
    offset = torch.zeros(1, 2, 1, len(positions)).double()
    offset[0, 1, 0] = positions - torch.arange(len(positions))
    weight = torch.ones(1, 1, 1, 1).double()

    def output(offset):
        if operator == "deform_resample2d":
            return dcnlib.deform_resample2d(image, offset, boundary="zeros")
        return dcnlib.deform_conv2d(image, offset, weight, padding=(0, 0, 0, 5))

    leaf = offset.clone().requires_grad_()
    output(leaf).sum().backward()
    tangent = torch.zeros_like(offset)
    tangent[0, 1] = 1
    _, forward = jvp(output, (offset,), (tangent,))
    assert leaf.grad[0, 1, 0].tolist() == expected.tolist()
    assert forward[0, 0, 0].tolist() == expected.tolist()

    offset[0, 1, 0, 3] = float("nan")
    primal, forward = jvp(output, (offset,), (tangent,))
    assert primal[0, 0, 0].isnan().nonzero().flatten().tolist() == [3]
    assert forward[0, 0, 0].isnan().nonzero().flatten().tolist() == [3]


def test_second_derivatives_of_resampling_at_kinks():
    """Right-hand in either order, with positions at exactly -1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3, 4, generator=generator).double()
    offset = torch.zeros(1, 4, 3, 4).double() - 1  # the first row and column

    def loss(x, offset):
        return dcnlib.deform_resample2d(x, offset, boundary="zeros").sin().sum()

    blocks = hessian(loss, (0, 1))(x, offset)
    one, other = blocks[0][1].reshape(24, 48), blocks[1][0].reshape(48, 24).T
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert one.count_nonzero() > 24


def test_second_derivatives_at_kinks():
    """Of offsets of zero, as an untrained layer has, some at exactly -1: right-hand in either order."""
    generator = torch.Generator().manual_seed(0)
    x, w, direction = torch.randn(3, 1, 2, 3, 3, generator=generator).double()
    offset, mask = torch.zeros(1, 18, 3, 3).double(), torch.rand(1, 9, 3, 3).double() + 0.5

    def loss(x, offset, mask):
        return dcnlib.deform_conv2d(x, offset, w, padding=1, mask=mask).sum()

    blocks = hessian(loss, (0, 1, 2))(x, offset, mask)
    for i, j in ((0, 1), (1, 2)):
        size = (x, offset, mask)[i].numel()
        one, other = blocks[i][j].reshape(size, -1), blocks[j][i].reshape(-1, size).T
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def slope(offset):  # of the input, in a direction
        return (grad(loss)(x, offset, mask) * direction).sum()

    step = 1e-6
    expected = torch.stack(
        [
            (slope(offset + step * e.reshape(offset.shape)) - slope(offset)) / step
            for e in torch.eye(162)
        ]
    )
    found = grad(slope)(offset).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.count_nonzero() > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_double_backward_in_16_bits(dtype):
    """As in float32, rounded: nothing in between is 16 bits wide but the first gradients."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"]).map(lambda t: t.to(dtype))

    def second(call):
        leaves = torch_calls.leaves(call)
        output = torch_calls.function(call)(*leaves)
        first = torch.autograd.grad(output, leaves, call.grad_output, create_graph=True)
        return torch.autograd.grad([g.float().sum() for g in first[:3]], leaves[:3])

    for found, expected in zip(second(call), second(call.map(torch.Tensor.float)), strict=True):
        assert found.dtype == dtype
        scale = expected.abs().max()
        assert (found.float() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * scale
