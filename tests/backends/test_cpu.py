"""The CPU backend's own door (`dcnlib.backends`): arrays or addresses, layouts, wanted gradients."""

import itertools

import numpy as np
import pytest

import dcnlib
from dcnlib import testing
from dcnlib._problem import deform_conv2d_problem
from dcnlib.backends import cpu
from dcnlib.testing import OUTPUTS, PROBLEMS

ISAS = testing.cpu_isas()
DTYPES = ("float32", "float64", "float16", "bfloat16")
SMALL = (2, 2, 1)  # amplitudes that keep the longest sums of PROBLEMS exact
NAMES = ["plain", "v1", "groups_across", "depthwise", "channels_130_split", "width_113", "kernel_7"]


def lattice(name, dtype="float32"):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return testing.lattice(PROBLEMS[name], 0, SMALL).astype(dtype)


def nan(shape, dtype):
    """Memory for a result that holds no right number yet."""
    return np.full(shape, np.nan, dtype)


def gradient_memory(problem, dtype, wanted=(True,) * 5):
    shapes = (
        problem.input_shape,
        problem.offset_shape,
        problem.weight_shape,
        problem.bias_shape,
        problem.mask_shape if problem.has_mask else None,
    )
    return [
        nan(shape, dtype) if want and shape is not None else None
        for shape, want in zip(shapes, wanted, strict=True)
    ]


def to_nhwc(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def to_nchw(array):
    return array.transpose(0, 3, 1, 2)


def address(array):
    return None if array is None else array.ctypes.data


def test_runs_on_cpus():
    assert cpu.name == "cpu" and cpu.why_not("cpu") is None
    for device in ("cuda", "meta"):
        assert device in cpu.why_not(device) and ".cpu()" in cpu.why_not(device)


# ---- gradients that nobody wants ---------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["plain", "groups_across", "depthwise", "channels_130_split"])
def test_only_wanted_gradients(name, isa):
    """All 32 subsets: the same bytes as with all five, and nothing else is touched."""
    call = testing.real(PROBLEMS[name], 0).astype("float32")
    problem = call.problem()
    arrays = (call.grad_output, call.input, call.offset, call.weight, call.mask)
    with dcnlib.cpu_isa(isa):
        full = gradient_memory(problem, "float32")
        cpu.backward(problem, *arrays, full)
        for wanted in itertools.product((False, True), repeat=5):
            grads = gradient_memory(problem, "float32", wanted)
            cpu.backward(problem, *arrays, grads)
            for grad, all_of_it, output in zip(grads, full, OUTPUTS[1:], strict=True):
                if grad is not None:
                    assert grad.tobytes() == all_of_it.tobytes(), (wanted, output)


def test_bias_gradient_of_a_call_without_bias():
    """It needs no values of bias."""
    call = lattice("no_bias")
    problem = call.problem()
    grads = [None, None, None, np.full(problem.bias_shape, np.nan, np.float32), None]
    cpu.backward(problem, call.grad_output, call.input, call.offset, call.weight, call.mask, grads)
    np.testing.assert_array_equal(grads[3], call.grad_output.sum(axis=(0, 2, 3)))


@pytest.mark.parametrize("name", ["plain", "depthwise"])
def test_unwanted_gradients_cost_no_work(name):
    """An empty wish leaves everything alone: none of these addresses can be read."""
    cpu.backward(lattice(name).problem(), *[1] * 5, [None] * 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_bias_gradient_that_is_no_number(batch, dtype):
    """Infinities of one sign sum up to one."""
    call = testing.lattice(testing.Geometry(batch, 2, 5, 6, 4, (1, 1)), 0).astype(dtype)
    grad_output = call.grad_output.copy()
    grad_output[0, 0, 0, 0] = grad_output[-1, 0, 4, 5] = np.inf
    grad_output[0, 1, 0, 0] = -np.inf
    grad_output[0, 2, 0, 0], grad_output[-1, 2, 1, 0] = np.inf, -np.inf
    call = call._replace(grad_output=grad_output)
    found = call.backward("cpu").bias.astype(np.float64)
    np.testing.assert_array_equal(found[:3], [np.inf, -np.inf, np.nan])
    assert found[3] == call.grad_output[:, 3].astype(np.float64).sum()


# ---- layouts and addresses ---------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_channels_last_by_address(name, dtype, isa):
    """(N, H, W, C) memory given as integers: the exact result, and the bytes of the other layout."""
    call = lattice(name, dtype)
    expected = call.run("reference")
    problem = call.problem()._replace(channels_last=True)
    dtype = call.input.dtype
    input, grad_output = to_nhwc(call.input), to_nhwc(call.grad_output)
    batch, channels, height, width = problem.output_shape
    output = nan((batch, height, width, channels), dtype)
    grads = gradient_memory(problem, dtype)
    grads[0] = nan(input.shape, dtype)
    wanted = [grad if expected[name] is not None else None
              for grad, name in zip(grads, OUTPUTS[1:], strict=True)]  # fmt: skip
    others = [address(a) for a in (call.offset, call.weight, call.bias, call.mask)]
    with dcnlib.cpu_isa(isa):
        cpu.forward(problem, address(input), *others, address(output))
        cpu.backward(
            problem, address(grad_output), address(input), others[0], others[1], others[3],
            [address(grad) for grad in wanted],
        )  # fmt: skip
        usual = call.run("cpu")
    results = [to_nchw(output), to_nchw(grads[0]), *wanted[1:]]
    testing.assert_equal(dict(zip(OUTPUTS, results, strict=True)), expected)
    for result, key in zip(results, OUTPUTS, strict=True):
        assert result is None or (result == usual[key]).all(), key


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_channels_last_changes_no_bit(name, dtype, isa):
    """On numbers that do not come out exactly."""
    call = testing.real(PROBLEMS[name], 1).astype(dtype)
    problem = call.problem()._replace(channels_last=True)
    input, grad_output = to_nhwc(call.input), to_nhwc(call.grad_output)
    output = to_nhwc(nan(problem.output_shape, dtype))
    grads = gradient_memory(problem, dtype)
    grads[0] = to_nhwc(grads[0])
    if not problem.has_bias:
        grads[3] = None
    with dcnlib.cpu_isa(isa):
        cpu.forward(problem, input, call.offset, call.weight, call.bias, call.mask, output)
        cpu.backward(problem, grad_output, input, call.offset, call.weight, call.mask, grads)
        usual = call.run("cpu")
    results = (to_nchw(output), to_nchw(grads[0]), *grads[1:])
    for result, key in zip(results, OUTPUTS, strict=True):
        expected = usual[key]
        assert (result is None) == (expected is None)
        if result is not None:
            assert np.ascontiguousarray(result).tobytes() == expected.tobytes(), key


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value_is_widened_and_rounded(dtype, channels_last, isa):
    """Products of two are exact in float32: all that can go wrong are the types."""
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    values = rng.permutation(np.arange(1 << 16, dtype="uint16")).view(dtype)
    input = np.resize(values, (1, 67, 29, 35))
    weight = rng.standard_normal((67, 1, 1, 1)).astype(dtype)
    with np.errstate(all="ignore"):
        expected = (input.astype("float32") * weight[:, 0].astype("float32")).astype(dtype)
    specs = [(array.shape, str(dtype)) for array in (input, weight)]
    problem = deform_conv2d_problem(
        "test", specs[0], None, specs[1], None, None, None, (1, 1), (0,) * 4, (1, 1), 67, None,
        channels_last,
    )  # fmt: skip
    output = np.zeros_like(to_nhwc(input) if channels_last else input)
    with dcnlib.cpu_isa(isa):
        cpu.forward(
            problem, to_nhwc(input) if channels_last else input, None, weight, None, None, output
        )
    output = to_nchw(output) if channels_last else output
    np.testing.assert_array_equal(output.astype("float32"), expected.astype("float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch_by_address(dtype):
    """Empty tensors may have the address 0, which is no missing argument."""
    call = lattice("empty_batch", dtype)
    problem = call.problem()
    output = nan(problem.output_shape, call.input.dtype)
    cpu.forward(problem, 0, 0, address(call.weight), address(call.bias), 0, address(output))
    grads = gradient_memory(problem, call.input.dtype)
    addresses = [0, 0, address(grads[2]), address(grads[3]), 0]
    cpu.backward(problem, 0, 0, 0, address(call.weight), 0, addresses)
    assert not grads[2].any() and not grads[3].any()


# ---- arguments of the backend itself -----------------------------------------------------------


@pytest.mark.parametrize("num_threads", [None, 1, 2, 7, 300, 2**31 - 1])
def test_number_of_threads(num_threads):
    call = testing.real(testing.Geometry(1, 32, 40, 40, 32, (3, 3), padding=(1, 1, 1, 1)), 0)
    expected = call.forward("cpu")
    output = nan(expected.shape, "float64")
    arrays = (call.input, call.offset, call.weight, call.bias, call.mask)
    cpu.forward(call.problem(), *arrays, output, num_threads=num_threads)
    np.testing.assert_array_equal(output, expected)


def test_results_have_to_be_writable():
    """The one thing that a backend can see without a check."""
    call = lattice("plain")
    output = nan(call.grad_output.shape, "float32")
    output.setflags(write=False)
    arrays = (call.input, call.offset, call.weight, call.bias, call.mask)
    with pytest.raises(ValueError, match="read-only"):
        cpu.forward(call.problem(), *arrays, output)


def test_arguments_may_be_read_only():
    call = lattice("plain")
    expected = call.run("cpu")
    call.map(lambda array: array.setflags(write=False))
    testing.assert_equal(call.run("cpu"), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_in_every_dtype(isa):
    """`cpu_isas` lists what can be used, weakest first, "baseline" always among them."""
    assert "baseline" in ISAS[:2]
    for dtype in DTYPES:
        call = lattice("groups_across", dtype)
        with dcnlib.cpu_isa(isa):
            testing.assert_equal(call.run("cpu"), call.run("reference"))
