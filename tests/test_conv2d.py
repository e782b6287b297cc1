"""`conv2d` against a sum over windows in NumPy, and packed weights against plain ones.

Taps are copied: what lies beside them must not count, not even as 0 times infinity.
"""

import math
from functools import cache

import numpy as np
import pytest

import dcnlib
import isolated
from dcnlib import testing
from dcnlib._problem import deform_conv2d_problem
from dcnlib.backends import cpu
from dcnlib.testing import PROBLEMS, Geometry

DTYPES = ("float32", "float64", "float16", "bfloat16")
ISAS = testing.cpu_isas()


def windows(call):
    """The convolution of `call`'s input, weight and bias in float64, by strided windows."""
    x, weight, bias = (None if a is None else a.astype(np.float64) for a in (call[0], *call[2:4]))
    top, bottom, left, right = call.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    span = [d * (k - 1) + 1 for d, k in zip(call.dilation, weight.shape[2:], strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=(2, 3))
    view = view[
        :, :, :: call.stride[0], :: call.stride[1], :: call.dilation[0], :: call.dilation[1]
    ]
    parts = zip(np.split(view, call.groups, 1), np.split(weight, call.groups), strict=True)
    y = np.concatenate([np.einsum("nchwij,ocij->nohw", v, w) for v, w in parts], 1)
    return y if bias is None else y + bias[:, None, None]


def convolve(call):
    return dcnlib.conv2d(
        call.input, call.weight, call.bias, call.stride, call.padding, call.dilation, call.groups
    )


@cache
def lattice(name):
    return testing.lattice(PROBLEMS[name], 1, (2, 2, 1))


@pytest.fixture(params=DTYPES)
def dtype(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return request.param


# ---- values ------------------------------------------------------------------------------------


def check(call, dtype, note):
    expected = {"output": windows(call)}
    for isa in ISAS:
        with dcnlib.cpu_isa(isa):
            testing.assert_equal({"output": convolve(call.astype(dtype))}, expected, (isa, note))


@pytest.mark.parametrize("name", PROBLEMS)
def test_lattice(name, dtype):
    check(lattice(name), dtype, name)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_random_lattice(first):
    for seed in range(first, first + 50):
        rng = np.random.default_rng(seed)
        check(testing.lattice(testing.random_geometry(rng), rng), "float32", seed)


@pytest.mark.parametrize("name", ["groups_across", "channels_130", "depthwise", "kernel_7"])
def test_accuracy(name, dtype):
    call = testing.real(PROBLEMS[name], 2).astype(dtype)
    expected = {"output": windows(call)}
    testing.assert_close({"output": convolve(call)}, expected, dtype, name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_as_offsets_of_zero(name, isa):
    geometry = PROBLEMS[name]._replace(offset_groups=1, mask=False)
    call = testing.real(geometry, 3).astype("float32")
    call = call._replace(offset=np.zeros_like(call.offset))
    with dcnlib.cpu_isa(isa):
        assert convolve(call).tobytes() == call.forward("cpu").tobytes()


@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_only_windows_with_the_value_have_it(value, groups):
    x = np.ones((1, 8, 9, 11), np.float32)
    x[0, :, 4, 6] = value
    weight = np.ones((8, 8 // groups, 3, 3), np.float32)
    y = dcnlib.conv2d(x, weight, padding=1)
    touched = np.zeros(y.shape, bool)
    touched[:, :, 3:6, 5:8] = True
    assert not np.isfinite(y[touched]).any()
    assert np.isfinite(y[~touched]).all()


def test_threads_do_not_change_bits():
    call = testing.real(Geometry(3, 40, 33, 31, 24, (3, 3), padding=(1, 1, 1, 1)), 4)
    call = call.astype("float32")
    before, results = dcnlib.get_num_threads(), set()
    for threads in (1, 2, 3, 5):
        dcnlib.set_num_threads(threads)
        results.add(convolve(call).tobytes())
    dcnlib.set_num_threads(before)
    assert len(results) == 1


def test_unbatched_and_strided_memory():
    call = testing.real(PROBLEMS["strided"], 5).astype("float32")
    expected = convolve(call)
    first = call._replace(input=call.input[0])
    assert convolve(first).tobytes() == expected[0].tobytes()
    odd = call._replace(
        input=np.asfortranarray(call.input), weight=call.weight[:, :, ::-1].copy()[:, :, ::-1]
    )
    assert convolve(odd).tobytes() == expected.tobytes()
    swapped = call._replace(input=call.input.astype(">f4"))
    assert convolve(swapped).tobytes() == expected.tobytes()


# ---- errors ------------------------------------------------------------------------------------

X, WEIGHT = np.zeros((1, 4, 5, 6), np.float32), np.zeros((6, 2, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"input": np.zeros((4, 5), np.float32)}, ValueError, "input"),
        ({"input": np.zeros((1, 0, 5, 6), np.float32)}, ValueError, "input"),
        ({"input": np.zeros((1, 4, 2, 6), np.float32)}, ValueError, "input"),
        ({"input": X.astype(np.int32)}, TypeError, "input"),
        ({"input": [[1.0]]}, TypeError, "input"),
        ({"input": np.ma.zeros((1, 4, 5, 6), np.float32)}, TypeError, "input"),
        ({"weight": WEIGHT.astype(np.float64)}, TypeError, "weight"),
        ({"weight": WEIGHT[:, :, 0]}, ValueError, "weight"),
        ({"weight": WEIGHT[:5]}, ValueError, "weight"),
        ({"weight": np.zeros((6, 3, 3, 3), np.float32)}, ValueError, "weight"),
        ({"bias": np.zeros(5, np.float32)}, ValueError, "bias"),
        ({"bias": 0.0}, TypeError, "bias"),
        ({"stride": 0}, ValueError, "stride"),
        ({"stride": True}, TypeError, "stride"),
        ({"stride": 2**31}, ValueError, "stride"),
        ({"padding": -1}, ValueError, "padding"),
        ({"padding": "sane"}, ValueError, "padding"),
        ({"padding": 2**63}, ValueError, "padding"),
        ({"dilation": 1.0}, TypeError, "dilation"),
        ({"dilation": 2**31 - 1}, ValueError, "input"),
        ({"groups": 0}, ValueError, "groups"),
        ({"groups": 3}, ValueError, "groups"),
        ({"groups": 4}, ValueError, "weight"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else None,
)
def test_errors(arguments, error, names):
    with pytest.raises(error) as caught:
        dcnlib.conv2d(**{"input": X, "weight": WEIGHT, **arguments})
    assert str(caught.value).startswith(f"conv2d: {names}: ")
    assert "; expected " in str(caught.value) and ", got " in str(caught.value)


def test_far_away_and_empty():
    """The largest paddings and strides are no danger; an empty batch is a batch."""
    far = dcnlib.conv2d(
        np.ones((1, 1, 5, 5), np.float32), np.ones((1, 1, 1, 1), np.float32), np.ones(1, np.float32),
        2**31 - 1, 2**31 - 1,
    )  # fmt: skip
    assert far.shape == (1, 1, 3, 3)
    assert far[0, 0].tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 1]]
    assert dcnlib.conv2d(X[:0], WEIGHT).shape == (0, 6, 3, 4)


def test_tensors_are_sent_to_torch():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"conv2d: input: .*torch\.nn\.functional\.conv2d"):
        dcnlib.conv2d(torch.from_numpy(X), torch.from_numpy(WEIGHT))


def test_no_memory():
    """A workspace that does not fit is a MemoryError of this function's name."""
    child = isolated.python(
        """
import resource
import numpy as np
import dcnlib
x, weight = np.zeros((1, 64, 1500, 1500), np.float32), np.zeros((1, 64, 1, 1), np.float32)
dcnlib.conv2d(x[:, :, :8, :8], weight)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
try:
    dcnlib.conv2d(x, weight)
except MemoryError as error:
    print(error)
"""
    )
    assert child.stdout.startswith("conv2d: workspace: does not fit into memory"), child.stderr


# ---- packed weights ----------------------------------------------------------------------------


def run(call, offset, weight):
    """One call on the CPU backend; `weight` plain or packed."""
    specs = [
        None if a is None else (a.shape, a.dtype.name)
        for a in (call.input, offset, call.weight, call.bias, None, None)
    ]
    problem = deform_conv2d_problem("testing", *specs, *call[6:])
    output = np.full(problem.output_shape, np.nan).astype(call.input.dtype)
    cpu.forward(problem, call.input, offset, weight or call.weight, call.bias, None, output)
    return output, problem


def pixels(problem):
    return math.prod(problem.output_shape[2:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_packed_weights_give_the_same_bits(name, isa, dtype):
    """On both operators, for another batch and size than they were packed for, source overwritten.

    Unless the size asks for another form: then the source is read.
    """
    call = testing.real(PROBLEMS[name], 6).astype(dtype)
    wide = call._replace(input=np.pad(call.input, ((0, 1), (0, 0), (0, 3), (2, 0))))
    with dcnlib.cpu_isa(isa):
        for offset in (None, call.offset):
            expected, problem = run(call, offset, None)
            source = call.weight.copy()
            packed = cpu.pack_weight(problem, source)
            source[...] = np.nan
            assert run(call, offset, packed)[0].tobytes() == expected.tobytes()
            if offset is None:
                expected, other = run(wide, None, None)
                if isa == "amx" and (pixels(problem) < 64) != (pixels(other) < 64):
                    source[...] = call.weight
                assert run(wide, None, packed)[0].tobytes() == expected.tobytes()


def test_packed_weights_that_do_not_fit_are_not_read():
    """Another instruction set, another use of the groups: the source is packed again."""
    call = testing.real(PROBLEMS["channels_130_split"]._replace(bias=False), 7).astype("float32")
    expected, problem = run(call, call.offset, None)
    packed = cpu.pack_weight(problem, call.weight)
    for isa in ISAS:
        with dcnlib.cpu_isa(isa):
            expected, _ = run(call, call.offset, None)
            assert run(call, call.offset, packed)[0].tobytes() == expected.tobytes()
    plain, _ = run(call, None, None)
    assert run(call, None, packed)[0].tobytes() == plain.tobytes()
