"""What torch does with a call besides calling it: vmap, autocast, compile, export, formats."""

import contextlib
import gc
import itertools
import threading
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.func import functional_call, grad, jacrev, jvp, vmap  # noqa: E402

import dcnlib  # noqa: E402
import torch_calls  # noqa: E402
from dcnlib import nn, testing  # noqa: E402
from dcnlib.testing import PROBLEMS, Geometry  # noqa: E402
from dcnlib.torch_ops import autograd  # noqa: E402

EXAMPLES = 3
NAMES = torch_calls.TENSORS


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test compiles its own functions for its own shapes."""
    yield
    torch.compiler.reset()


# ---- vmap


def examples(name):
    """Several calls of one geometry: for each the leaves' values."""
    calls = [torch_calls.smooth(torch_calls.SMALL["v2"], seed) for seed in range(EXAMPLES)]
    if name == "unbatched":
        calls = [torch_calls.unbatched(call) for call in calls]
    return calls


def stacked(calls, axes):
    """For each tensor: the examples along an axis, or the one that all share."""
    return [
        calls[0][i] if axis is None else torch.stack([c[i] for c in calls], axis)
        for i, axis in enumerate(axes)
    ]


def alone(calls, axes, k):
    """What example k gets."""
    return [calls[0 if axis is None else k][i] for i, axis in enumerate(axes)]


MAPPED = [axes for axes in itertools.product([None, 0], repeat=5) if any(a == 0 for a in axes)]
ODD_AXES = [(1, None, None, None, 2), (-1, 1, 3, 1, None), (None, 2, -2, None, 0)]


@pytest.mark.parametrize("axes", [*MAPPED, *ODD_AXES], ids=str)
@pytest.mark.parametrize("name", ["batched", "unbatched"])
def test_vmap(name, axes):
    calls = examples(name)
    apply = torch_calls.function(calls[0])
    found = vmap(apply, axes)(*stacked(calls, axes))
    for k in range(EXAMPLES):
        expected = apply(*alone(calls, axes, k))
        torch.testing.assert_close(found[k], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3, 4), (0, 1, 4)], ids=["all", "no_weights"])
@pytest.mark.parametrize("axes", MAPPED, ids=str)
@pytest.mark.parametrize("name", ["batched", "unbatched"])
def test_vmap_of_gradients(name, axes, wanted):
    """Each example has gradients of its own, also of what all examples share."""
    calls = examples(name)
    gradients = grad(torch_calls.loss(calls[0]), wanted)
    found = vmap(gradients, axes)(*stacked(calls, axes))
    for k in range(EXAMPLES):
        for value, expected in zip(found, gradients(*alone(calls, axes, k)), strict=True):
            torch.testing.assert_close(value[k], expected, rtol=1e-12, atol=1e-12)


def test_vmap_of_the_gradient_of_bias():
    """Alone, of a bias that all examples share: each has its own."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    x, offset, weight, bias, mask = (t.detach() for t in torch_calls.leaves(call))
    apply = torch_calls.function(call)

    def loss(bias, scale):
        return (scale * apply(x, offset, weight, bias, mask)).sum()

    scales = torch.tensor([1.0, 2.0, -3.0]).double()
    found = vmap(grad(loss), (None, 0))(bias, scales)
    expected = torch.stack([grad(loss)(bias, scale) for scale in scales])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_vmap_nested_and_mixed():
    """vmap in vmap, vmap of jvp, and torch.func's per-sample Jacobians."""
    call = torch_calls.smooth(Geometry(2, 2, 3, 3, 2, (2, 2), mask=False, bias=False))
    apply = torch_calls.function(call)
    inputs = torch.randn(3, 2, *call.input.shape, dtype=torch.float64)
    found = vmap(vmap(apply, (0, None, None)), (0, None, None))(inputs, *call[1:3])
    for i, j in itertools.product(range(3), range(2)):
        expected = apply(inputs[i, j], *call[1:3])
        torch.testing.assert_close(found[i, j], expected, rtol=1e-13, atol=1e-13)
    tangents = torch.randn(4, *call.offset.shape, dtype=torch.float64)

    def pushed(tangent):
        return jvp(lambda offset: apply(call.input, offset, call.weight), call[1:2], (tangent,))[1]

    jacobian = jacrev(apply, 1)(*call[:3])
    expected = torch.einsum("abcdefgh,nefgh->nabcd", jacobian, tangents)
    torch.testing.assert_close(vmap(pushed)(tangents), expected, rtol=1e-12, atol=1e-12)


def test_vmap_chooses_groups():
    """Explicit and inferred numbers of groups, with mapped weights."""
    calls = examples("batched")
    for groups, offset_groups in ((None, None), (2, None), (None, 2), (2, 2)):

        def apply(x, offset, weight, bias, mask, g=groups, o=offset_groups):
            return dcnlib.deform_conv2d(
                x, offset, weight, bias, padding=1, mask=mask, groups=g, offset_groups=o
            )

        found = vmap(apply)(*stacked(calls, (0,) * 5))
        assert torch.equal(found[1], calls[1].forward())


def test_vmap_checks_one_example():
    """The text is that of the call that would be made without vmap."""
    calls = examples("batched")
    tensors = stacked(calls, (0,) * 5)
    with pytest.raises(ValueError, match="deform_conv2d: offset: ") as single:
        dcnlib.deform_conv2d(calls[0].input, calls[0].mask, calls[0].weight, groups=2)
    with pytest.raises(ValueError, match="deform_conv2d: offset: ") as mapped:
        vmap(lambda x, o, w: dcnlib.deform_conv2d(x, o, w, groups=2))(
            tensors[0], tensors[4], tensors[2]
        )
    assert str(mapped.value) == str(single.value)


def test_per_sample_gradients_of_a_module():
    """torch.func's recipe: functional_call, grad, vmap; without a batch axis inside."""
    layer = nn.ModulatedDeformConv2dPack(2, 3, 3, padding=1).double()
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for k in range(4):
        expected = grad(loss)(parameters, x[k])
        for name, value in expected.items():
            torch.testing.assert_close(found[name][k], value, rtol=1e-10, atol=1e-10)


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """A plain call in the region's dtype; gradients are cast back."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"], dtype="float32")
    leaves = torch_calls.leaves(call)
    expected = call.map(lambda t: t.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        output = torch_calls.function(call)(*leaves)
        raw = torch.ops.dcnlib.deform_conv2d(*torch_calls.operator_arguments(call))
    assert output.dtype == dtype
    assert torch.equal(output, expected.forward()) and torch.equal(raw, output)
    output.backward(expected.grad_output)
    for leaf, value in zip(leaves, expected.backward(), strict=True):
        assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, value.float())


@pytest.mark.parametrize(
    "kinds", list(itertools.product(["float32", "bfloat16", "float16"], repeat=2))
)
def test_autocast_takes_any_mixture(kinds):
    """Which dtypes meet depends on what autocast did before; none is an error."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"], dtype="float32")
    one, other = (getattr(torch, kind) for kind in kinds)
    mixed = call._replace(offset=call.offset.to(one), mask=call.mask.to(other))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixed.forward().dtype == torch.bfloat16


def test_autocast_leaves_float64():
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call.forward(), call.forward())
        assert call.forward().dtype == torch.float64
    with torch.autocast("cpu", enabled=False):
        assert call.map(torch.Tensor.float).forward().dtype == torch.float32


def test_backward_within_autocast():
    """Gradients have the dtype of the forward call, wherever the backward pass runs."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"], dtype="float32")
    leaves = torch_calls.leaves(call)
    output = torch_calls.function(call)(*leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = torch.autograd.grad(output, leaves, call.grad_output, create_graph=True)
        second = torch.autograd.grad([g.sum() for g in first[:3]], leaves[:3])
    assert all(map(torch.equal, first, call.backward()))
    expected = torch_calls.leaves(call)
    plain = torch.autograd.grad(
        torch_calls.function(call)(*expected), expected, call.grad_output, create_graph=True
    )
    plain = torch.autograd.grad([g.sum() for g in plain[:3]], expected[:3])
    assert all(map(torch.equal, second, plain))


# ---- compile and export


def counted_backend(backend):
    """torch.compile's backend, counting graphs: one means that nothing broke it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic):
    """One graph, the same bits, forward and backward, in several batch sizes."""
    counter = counted_backend(backend)
    calls = [
        testing.real(Geometry(n, 4, 9, 10, 6, (3, 3), (1, 1), (1,) * 4, (1, 1), 2, 2), n)
        .astype("float32")
        .to_torch()
        for n in (5, 8, 11)  # equal sizes would be one symbol
    ]
    compiled = torch.compile(
        torch_calls.function(calls[0]), fullgraph=True, dynamic=dynamic, backend=counter
    )
    for call in calls[: 3 if dynamic else 1]:
        leaves = torch_calls.leaves(call)
        output = compiled(*leaves)
        assert torch.equal(output, call.forward())
        grads = torch.autograd.grad(output, leaves, call.grad_output)
        assert all(map(torch.equal, grads, call.backward()))
    assert counter.frame_count == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compile_a_module(memory_format):
    layer = nn.ModulatedDeformConv2dPack(4, 6, 3, padding="same", deform_groups=2)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    x = torch.randn(2, 4, 8, 9).contiguous(memory_format=memory_format)
    counter = counted_backend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert counter.frame_count == 1 and layer.conv_offset.weight.grad.abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_compile_other_transforms():
    """Transforms and autocast inside of a graph."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    apply = torch_calls.function(call)
    input, others = call.input, tuple(call[2:5])

    def by_offset(offset, tangent):
        return jvp(lambda o: apply(input, o, *others), (offset,), (tangent,))

    tangent = torch.randn_like(call.offset)
    compiled = torch.compile(by_offset, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        compiled(call.offset, tangent), by_offset(call.offset, tangent), strict=True
    ):
        torch.testing.assert_close(found, expected)

    gradients = grad(torch_calls.loss(call), (0, 1, 2))
    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*call[:5]), gradients(*call[:5]), strict=True):
        torch.testing.assert_close(found, expected)

    single = call.map(torch.Tensor.float)
    apply_single = torch_calls.function(single)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def cast(*tensors):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return apply_single(*tensors)

    assert torch.equal(cast(*single[:5]), single.map(torch.Tensor.bfloat16).forward())


def test_compile_reports_bad_arguments():
    """While tracing; torch puts its own words around ours."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    with pytest.raises(ValueError, match="deform_conv2d: offset: ") as eager:
        dcnlib.deform_conv2d(call.input, call.offset[:, 1:], call.weight, padding=1)
    compiled = torch.compile(
        lambda x, o, w: dcnlib.deform_conv2d(x, o, w, padding=1), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception) as traced:  # noqa: PT011
        compiled(call.input, call.offset[:, 1:], call.weight)
    assert str(eager.value) in str(traced.value)


class Pack(torch.nn.Module):
    """A network around a Pack, with a 4-sided padding too."""

    def __init__(self):
        super().__init__()
        self.pack = nn.ModulatedDeformConv2dPack(4, 6, 3, padding=(0, 1, 2, 1), deform_groups=2)
        torch.nn.init.normal_(self.pack.conv_offset.weight, std=0.3)

    def forward(self, x):
        return self.pack(x).relu()


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_dynamic_batch(strict, tmp_path):
    network = Pack().eval()
    program = torch.export.export(
        network,
        (torch.randn(2, 4, 8, 9),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        strict=strict,
    )
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("dcnlib.deform_conv2d.default") == 1
    torch.export.save(program, tmp_path / "program.pt2")
    for exported in (program, torch.export.load(tmp_path / "program.pt2")):
        for n in (1, 2, 7):
            x = torch.randn(n, 4, 8, 9)
            torch.testing.assert_close(exported.module()(x), network(x))


def test_export_dynamic_size():
    network = Pack().eval()
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(network, (torch.randn(2, 4, 8, 9),), dynamic_shapes=(dynamic,))
    for shape in ((1, 4, 8, 9), (3, 4, 31, 17)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), network(x))


def test_export_of_the_function_with_all_tensors_dynamic():
    class Function(torch.nn.Module):
        def forward(self, x, offset, weight, mask):
            return dcnlib.deform_conv2d(x, offset, weight, padding=1, mask=mask)

    call = torch_calls.smooth(Geometry(2, 4, 6, 7, 6, (3, 3), (1, 1), (1,) * 4, bias=False))
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        Function(), (*call[:3], call.mask), dynamic_shapes=(batch, batch, {}, batch)
    )
    other = torch_calls.smooth(Geometry(5, 4, 6, 7, 6, (3, 3), (1, 1), (1,) * 4, bias=False), 1)
    found = program.module()(other.input, other.offset, call.weight, other.mask)
    assert torch.equal(found, other._replace(weight=call.weight).forward())
    with pytest.raises(Exception, match=r"mask|batch|shape"):
        program.module()(other.input, other.offset, call.weight, call.mask)


# ---- memory formats


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "strided", "groups_across", "depthwise", "channels_17"])
def test_channels_last(name, dtype, backend):
    """Images stay in their format, are not converted, and give the same bits."""
    call = testing.real(PROBLEMS[name], 0)
    call = call.to_torch().map(lambda t: t.to(getattr(torch, dtype)))
    last = call._replace(input=call.input.contiguous(memory_format=torch.channels_last))
    expected = call.run(backend)
    for grad_output in (call.grad_output, call.grad_output.to(memory_format=torch.channels_last)):
        found = last._replace(grad_output=grad_output).run(backend)
        for output, value in expected.items():
            assert (value is None and found[output] is None) or torch.equal(found[output], value)
        for output in ("output", "grad_input"):
            assert found[output].is_contiguous(memory_format=torch.channels_last)
            assert not found[output].is_contiguous()


def test_channels_last_is_not_copied(monkeypatch):
    """The backend reads and writes the tensors' own memory."""
    from dcnlib.backends import cpu

    call = testing.real(PROBLEMS["plain"], 0).astype("float32").to_torch()
    call = call._replace(input=call.input.contiguous(memory_format=torch.channels_last))
    forward, seen = cpu.forward, []

    def spy(problem, *operands, **settings):
        seen.append((problem.channels_last, operands[0], operands[5]))
        forward(problem, *operands, **settings)

    monkeypatch.setattr(cpu, "forward", spy)
    output = call.forward()
    assert seen == [(True, call.input.data_ptr(), output.data_ptr())]


def layouts(tensor):
    """The same values in other strides; contiguous, but misaligned, last."""
    doubled = torch.stack([tensor, tensor], -1)
    yield "sliced", doubled[..., 1]
    if tensor.dim() > 1:
        yield "transposed", tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield (
        "permuted",
        tensor.permute(*reversed(range(tensor.dim())))
        .contiguous()
        .permute(*reversed(range(tensor.dim()))),
    )
    yield "negated", torch._neg_view(-tensor)
    raw = bytearray(2) + tensor.numpy().tobytes()
    odd = torch.frombuffer(raw, dtype=tensor.dtype, offset=2, count=tensor.numel())
    assert odd.data_ptr() % tensor.element_size()
    yield "misaligned", odd.reshape(tensor.shape)


@pytest.mark.parametrize("name", [*NAMES, "grad_output"])
def test_layouts_of_arguments(name):
    call = testing.real(PROBLEMS["groups_across"], 0).astype("float32").to_torch()
    expected = call.run()
    for layout, tensor in layouts(getattr(call, name)):
        before = tensor.clone()
        found = call._replace(**{name: tensor}).run()
        assert all(map(torch.equal, found.values(), expected.values())), layout
        assert torch.equal(tensor, before), layout


def test_expanded_arguments():
    """Stride 0: one image, offset and mask for the whole batch."""
    call = testing.real(PROBLEMS["plain"], 0).astype("float32").to_torch()
    n = len(call.input)
    expanded = call.map(lambda t: t[:1].expand(n, *t.shape[1:]) if t.dim() == 4 else t)
    expanded = expanded._replace(weight=call.weight)
    dense = expanded.map(lambda t: t.contiguous())
    assert all(map(torch.equal, expanded.run().values(), dense.run().values()))


# ---- other modes of torch


def test_tensor_subclasses():
    """They come out as torch's own operators return them."""

    class Named(torch.Tensor):
        pass

    call = testing.real(PROBLEMS["plain"], 0).astype("float32").to_torch()
    output = call._replace(input=call.input.as_subclass(Named)).forward()
    expected = torch.conv2d(call.input.as_subclass(Named), call.weight, padding=1)
    assert type(output) is type(expected)
    assert torch.equal(output.as_subclass(torch.Tensor), call.forward())
    parameter = torch.nn.Parameter(call.weight)
    assert torch.equal(call._replace(weight=parameter).forward(), call.forward())


def test_dispatch_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.seen.append(str(operator))
            return operator(*args, **(kwargs or {}))

    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    leaves = torch_calls.leaves(call)
    with Record() as record:
        call.forward()
        torch_calls.function(call)(*leaves).backward(call.grad_output)
    names = [name for name in record.seen if name.startswith("dcnlib")]
    assert names == ["dcnlib.deform_conv2d.default"] * 2 + ["dcnlib.deform_conv2d_backward.default"]


def _function_mode(names):
    class Record(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    return Record()


@contextlib.contextmanager
def _profile(names):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    names += [event.key.replace("::", ".") for event in profile.key_averages()]


@pytest.mark.parametrize("listen", [_function_mode, _profile])
def test_who_listens_hears_of_a_call(listen):
    """Eager calls of plain tensors take a way of their own if nobody does."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    call.forward()  # and not if one alike is known
    names = []
    with listen(names):
        call.forward()
    assert sum("dcnlib.deform_conv2d" in name for name in names) == 1


NOT_PLAIN = {
    "sparse": lambda plain: plain.to_sparse(),
    "mkldnn": lambda plain: plain.to_mkldnn(),
    "negated": torch._neg_view,
    "zero": lambda plain: torch._efficientzerotensor(plain.shape),
    "functional": torch._to_functional_tensor,
    "meta": lambda plain: plain.to("meta"),
    "nested": lambda plain: torch.nested.nested_tensor([plain]),
    "quantized": lambda plain: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
    "subclass": lambda plain: plain.as_subclass(type("Sub", (torch.Tensor,), {})),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_the_dispatcher_has_to_see(kind):
    plain = torch.ones(2)
    assert autograd._is_plain((plain, torch.nn.Parameter(plain), plain[1:], None))
    assert not autograd._is_plain((plain, NOT_PLAIN[kind](plain)))


def known(*tensors):
    """What `autograd` says of a plain forward call; None of one that is not."""
    return autograd._plain_problem(
        "deform_conv2d", None, *tensors, ((1, 1), (1, 1, 1, 1), (1, 1)), (2, 2, None)
    )


def plain_tensors():
    return torch_calls.smooth(torch_calls.SMALL["v2"], dtype="float32")[:5]


def test_a_call_like_one_before_is_not_checked_again(monkeypatch):
    call = torch_calls.smooth(torch_calls.SMALL["v2"])

    def run():
        leaves = torch_calls.leaves(call)
        output = torch_calls.function(call)(*leaves)
        return [call.forward(), output, *torch.autograd.grad(output, leaves, call.grad_output)]

    expected = run()
    for name in ("problem", "_is_plain", "forward_operator", "backward_operator"):
        monkeypatch.setattr(autograd, name, None)
    assert all(map(torch.equal, run(), expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", range(5), ids=NAMES)
@pytest.mark.parametrize("kind", sorted(NOT_PLAIN.keys() - {"nested"}))  # those have no shape
def test_no_other_tensor_passes_for_a_known_one(kind, place):
    tensors = plain_tensors()
    assert known(*tensors) is known(*tensors)
    others = list(tensors)
    others[place] = NOT_PLAIN[kind](tensors[place])
    assert known(*others) is None


@pytest.mark.parametrize("place", range(5), ids=NAMES)
def test_other_sizes_and_dtypes_are_checked(place):
    tensors = plain_tensors()
    for other in (tensors[place].double(), tensors[place][..., 1:], tensors[place][None]):
        assert known(*tensors)
        with pytest.raises((TypeError, ValueError)):
            known(*tensors[:place], other, *tensors[place + 1 :])


def test_other_formats_are_described():
    input, *others = plain_tensors()
    for _ in range(2):
        assert not known(input, *others).channels_last
        last = input.contiguous(memory_format=torch.channels_last)
        assert known(last, *others).channels_last
        assert not known(last.mT.contiguous().mT, *others).channels_last


@contextlib.contextmanager
def _vmapped():
    with torch._functorch.vmap.vmap_increment_nesting(2, "error"):
        yield


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": torch.autograd.forward_ad.dual_level,
    "functions": lambda: _function_mode([]),
    "dispatch": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "profile": lambda: _profile([]),
    "transform": _vmapped,
}


@pytest.mark.parametrize("mode", MODES)
def test_under_a_mode_no_call_is_known(mode):
    tensors = plain_tensors()
    assert known(*tensors)
    with MODES[mode]():
        assert known(*tensors) is None
    with torch.no_grad(), torch.inference_mode():
        assert known(*tensors)


def test_what_is_known_keeps_no_tensor():
    """Four calls of a kind are kept, and of tensors only what the guards compare."""
    tensors = plain_tensors()
    died = [weakref.ref(tensor) for tensor in tensors]
    for needed in itertools.product((False, True), repeat=3):
        for tensor, is_needed in zip(tensors, needed, strict=False):
            tensor.requires_grad_(is_needed)
        assert known(*tensors)
    *_, bias, mask = tensors
    kept = autograd._known_like(
        "deform_conv2d", tensors[0].shape, tensors[2].shape, bias is None, mask is None,
        ((1, 1), (1, 1, 1, 1), (1, 1)), (2, 2, None),
    )  # fmt: skip
    assert len(kept[0]) == 4 and autograd._known_like.cache_info().maxsize
    del tensors, tensor, bias, mask, _
    gc.collect()
    assert not any(reference() for reference in died)


def test_negated_views_and_zero_tensors():
    """Tensors whose memory is not their value."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    expected = call.forward()
    negated = torch._neg_view(-call.input)
    assert torch.equal(call._replace(input=negated).forward(), expected)
    zero = torch._efficientzerotensor(call.input.shape, dtype=call.input.dtype)
    assert torch.equal(
        call._replace(input=zero).forward(), call._replace(input=call.input * 0).forward()
    )


def test_deterministic_algorithms():
    """Nothing to alert on the CPU."""
    call = torch_calls.smooth(torch_calls.SMALL["v2"])
    expected = call.run()
    torch.use_deterministic_algorithms(True)
    try:
        found = call.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found.values(), expected.values()))


def test_python_threads():
    """Calls and graphs of eight threads at once, each with other shapes."""
    calls = [testing.real(Geometry(1, 3, 9 + k, 8, 4, (3, 3)), k).to_torch() for k in range(8)]
    expected = [call.run() for call in calls]
    wrong = []

    def work(k):
        for _ in range(20):
            leaves = torch_calls.leaves(calls[k])
            output = torch_calls.function(calls[k])(*leaves)
            grads = torch.autograd.grad(output, leaves, calls[k].grad_output)
            if not all(map(torch.equal, (output, *grads), expected[k].values())):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
