"""The exact lattice through torch: bitwise equal to the reference, in all dtypes and formats.

As `tests/test_lattice.py`, by autograd: the forward operator and the backward operator behind it. A
failure prints the call that repeats it.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 is compared with torch's")

import dcnlib  # noqa: E402
from dcnlib import testing  # noqa: E402
from dcnlib.testing import OUTPUTS, PROBLEMS  # noqa: E402

CONFIGURATIONS = 2000
PER_TEST = 50
SMALL = (2, 2, 1)  # amplitudes that keep the longest sums of PROBLEMS exact
DTYPES = ("float32", "float64", "float16", "bfloat16")


def differentiated(call, backend=None):
    """`Call.run` by autograd."""
    call = call.map(lambda tensor: tensor.detach().requires_grad_())
    output = call.forward(backend)
    tensors = [tensor for tensor in call[:5] if tensor is not None]
    found = iter(torch.autograd.grad(output, tensors, call.grad_output))
    grads = [None if tensor is None else next(found) for tensor in call[:5]]
    return dict(zip(OUTPUTS, (output, *grads), strict=True))


def channels_last(call):
    """The call with images in channels-last format."""
    return call._replace(
        **{
            name: getattr(call, name).contiguous(memory_format=torch.channels_last)
            for name in ("input", "grad_output")
        }
    )


def check(call, repeat, backends=("cpu",)):
    assert testing.is_exact(call), repeat
    expected = call.run("reference")
    for dtype in DTYPES:
        tensors = call.astype(dtype).to_torch()
        for backend in backends:
            testing.assert_equal(differentiated(tensors, backend), expected, f"{backend}, {repeat}")
            testing.assert_equal(
                differentiated(channels_last(tensors), backend),
                expected,
                f"channels_last, {backend}, {repeat}",
            )


@pytest.mark.parametrize("first", range(0, CONFIGURATIONS, PER_TEST))
def test_random_configurations(first):
    for seed in range(first, first + PER_TEST):
        check(testing.random_lattice(seed), f"testing.random_lattice({seed})")


@pytest.mark.parametrize("name", PROBLEMS)
def test_named_problem(name):
    call = testing.lattice(PROBLEMS[name], 1, SMALL)
    repeat = f"testing.lattice(testing.PROBLEMS[{name!r}], 1, {SMALL})"
    check(call, repeat, ("cpu", "reference"))


@pytest.mark.parametrize("isa", testing.cpu_isas())
@pytest.mark.parametrize("name", ["plain", "groups_across", "channels_33", "depthwise"])
def test_every_instruction_set(name, isa):
    call = testing.lattice(PROBLEMS[name], 2, SMALL)
    with dcnlib.cpu_isa(isa):
        check(call, f"{isa}, testing.lattice(testing.PROBLEMS[{name!r}], 2, {SMALL})")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "v1", "strided"])
def test_backward_function(name, dtype):
    """`deform_conv2d_backward` of tensors, without autograd."""
    call = testing.lattice(PROBLEMS[name], 3, SMALL)
    expected = call.run("reference")
    testing.assert_equal(call.astype(dtype).to_torch().run(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(10))
def test_real_data_as_through_numpy(seed, dtype):
    """The same kernels: equal bits on any data, by either door."""
    call = testing.real(PROBLEMS["groups_across"], seed).astype(dtype)
    testing.assert_equal(differentiated(call.to_torch()), call.run())
