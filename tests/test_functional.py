"""The public functions through NumPy: forms of arguments, kinds and layouts of arrays, results.

What the numbers must be is the business of the lattice, accuracy and value tests; here a call in an
unusual form has to give the bytes of the same call in the usual one.
"""

import inspect
import pickle
from functools import cache

import numpy as np
import pytest

import dcnlib
import doors
from dcnlib import functional, testing
from dcnlib.backends import reference
from dcnlib.testing import OUTPUTS, PROBLEMS, Geometry

BACKENDS = ("reference", "cpu")
DTYPES = ("float32", "float64", "float16", "bfloat16")
TENSORS = doors.TENSORS


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@cache
def call_of(name="groups_across", dtype="float32"):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return testing.real(PROBLEMS[name], 7).astype(dtype)


@cache
def results_of(name, dtype, backend):
    return call_of(name, dtype).run(backend)


def assert_same_bytes(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        if array is None:
            assert actual[name] is None, name
            continue
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape), name
        assert actual[name].tobytes() == array.tobytes(), name


# ---- signature ---------------------------------------------------------------------------------


def test_signatures():
    """torchvision's, position for position, and keywords behind it."""
    shared = [
        "input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask",
        "groups", "offset_groups", "backend",
    ]  # fmt: skip
    for function, names in (
        (dcnlib.deform_conv2d, shared),
        (dcnlib.deform_conv2d_backward, ["grad_output", *shared]),
    ):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names
        assert [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == shared[-3:]
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        assert defaults == dict.fromkeys(("bias", "mask", *shared[-3:])) | {
            "stride": 1,
            "padding": 0,
            "dilation": 1,
        }


def test_gradients_are_a_named_tuple():
    call = call_of()
    grads = call.backward("cpu")
    assert grads._fields == ("input", "offset", "weight", "bias", "mask")
    assert grads == tuple(grads) and grads.weight is grads[2]
    for one, other in zip(pickle.loads(pickle.dumps(grads)), grads, strict=True):
        np.testing.assert_array_equal(one, other)
    without = call._replace(bias=None, mask=None).backward("cpu")
    assert without.bias is None and without.mask is None


def test_new_arrays_every_time(backend):
    """Results belong to the caller: contiguous, writable, and no view of anything."""
    call = call_of()
    for array in call.run(backend).values():
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.owndata
        assert not any(np.shares_memory(array, a) for a in call[:6])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_dtype_and_shapes_of_results(name, dtype, backend):
    call = call_of(name, dtype)
    shapes = dict(zip(OUTPUTS, (call.grad_output, *call[:5]), strict=True))
    for output, array in results_of(name, dtype, backend).items():
        like = shapes[output]
        if like is None:
            assert array is None
        else:
            assert array.shape == like.shape and array.dtype == call.input.dtype
            assert np.isfinite(array.astype(np.float64)).all()


# ---- integers ----------------------------------------------------------------------------------

SQUARE = Geometry(1, 2, 7, 7, 2, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1))


@pytest.mark.parametrize("kind", [int, np.int16, np.uint8, np.array], ids=lambda k: k.__name__)
def test_forms_of_integers(kind, backend):
    """One number for both axes, tuples, lists, and integers of other types."""
    call = testing.real(SQUARE, 0)
    expected = call.forward(backend)
    for stride in (kind(2), (kind(2), 2), [2, kind(2)]):
        for padding in (kind(1), (1, kind(1)), [1, 1], (1, 1, kind(1), 1), [1, 1, 1, 1]):
            for dilation in (kind(1), (kind(1), 1)):
                actual = dcnlib.deform_conv2d(
                    *call[:4], stride, padding, dilation, call.mask, backend=backend
                )
                assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kernel", [(3, 3), (2, 5), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)], ids=str)
def test_padding_by_name(kernel, dilation, backend):
    """ "same" keeps the size, an odd total goes to the end; "valid" is none."""
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    sides = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    geometry = Geometry(2, 3, 13, 15, 2, kernel, padding=sides, dilation=dilation)
    call = testing.real(geometry, 0)
    arguments = (call.stride, "same", call.dilation, call.mask)
    same = dcnlib.deform_conv2d(*call[:4], *arguments, backend=backend)
    assert same.shape[2:] == call.input.shape[2:]
    assert same.tobytes() == call.forward(backend).tobytes()
    grads = dcnlib.deform_conv2d_backward(call.grad_output, *call[:4], *arguments, backend=backend)
    for actual, expected in zip(grads, call.backward(backend), strict=True):
        assert actual.tobytes() == expected.tobytes()

    call = testing.real(geometry._replace(padding=(0, 0, 0, 0)), 0)
    valid = dcnlib.deform_conv2d(*call[:4], 1, "valid", call.dilation, call.mask, backend=backend)
    assert valid.tobytes() == call.forward(backend).tobytes()


def test_padding_sides_are_top_bottom_left_right(backend):
    """A single pixel moves by the top and left padding; bottom and right only add to the result."""
    x = np.zeros((1, 1, 4, 5), np.float32)
    x[0, 0, 1, 2] = 1
    weight = np.ones((1, 1, 1, 1), np.float32)
    for top, bottom, left, right in ((1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (0, 0, 0, 4)):
        offset = np.zeros((1, 2, 4 + top + bottom, 5 + left + right), np.float32)
        y = dcnlib.deform_conv2d(
            x, offset, weight, padding=(top, bottom, left, right), backend=backend
        )
        assert y.shape[2:] == offset.shape[2:]
        assert np.argwhere(y[0, 0]).tolist() == [[1 + top, 2 + left]]


@pytest.mark.parametrize(
    "name", ["plain", "grouped", "offset_groups", "groups_across", "depthwise"]
)
def test_groups_are_inferred(name, backend):
    call = call_of(name)
    expected = results_of(name, "float32", backend)
    for groups in (None, call.groups):
        for offset_groups in (None, call.offset_groups):
            given = call._replace(groups=groups, offset_groups=offset_groups)
            assert_same_bytes(given.run(backend), expected)


@pytest.mark.parametrize("name", ["plain", "v1", "groups_across", "one_of_all", "depthwise"])
def test_without_a_batch(name, backend):
    """Three dimensions in, three out, the same bytes as the only image of a batch."""
    call = call_of(name)
    one = call._replace(
        **{n: None if (a := getattr(call, n)) is None else a[0] for n in
           ("input", "offset", "mask", "grad_output")}
    )  # fmt: skip
    batch = one._replace(
        **{n: None if (a := getattr(one, n)) is None else a[None] for n in
           ("input", "offset", "mask", "grad_output")}
    )  # fmt: skip
    expected = batch.run(backend)
    for output, array in one.run(backend).items():
        if array is None:
            assert expected[output] is None
            continue
        whole = output in ("grad_weight", "grad_bias")
        want = expected[output] if whole else expected[output][0]
        assert array.shape == want.shape and array.tobytes() == want.tobytes()


# ---- arrays ------------------------------------------------------------------------------------


def memmap(array, tmp_path):
    on_disk = np.memmap(tmp_path / "array", array.dtype, "w+", shape=array.shape)
    on_disk[...] = array
    on_disk.flush()
    return np.memmap(tmp_path / "array", array.dtype, "r", shape=array.shape)


def unaligned(array, tmp_path):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def every_second(array, tmp_path):
    larger = np.zeros(tuple(2 * n for n in array.shape), array.dtype)
    view = larger[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def backwards(array, tmp_path):
    every = tuple(slice(None, None, -1) for _ in array.shape)
    return array[every].copy()[every]


def repeated(array, tmp_path):
    """A stride of 0: all rows are the first."""
    return np.broadcast_to(array[:1], array.shape)


def read_only(array, tmp_path):
    array = array.copy()
    array.setflags(write=False)
    return array


def last_axis_first(array, tmp_path):
    return np.ascontiguousarray(np.moveaxis(array, -1, 0)).transpose(*range(1, array.ndim), 0)


def channels_last(array, tmp_path):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, min(1, array.ndim - 1), -1)), -1,
                       min(1, array.ndim - 1))  # fmt: skip


def byte_swapped(array, tmp_path):
    return array.astype(array.dtype.newbyteorder())


def in_a_record(array, tmp_path):
    record = np.zeros(array.shape, [("before", "u1"), ("value", array.dtype), ("after", "u1")])
    record["value"] = array
    return record["value"]


class Sub(np.ndarray):
    """A subclass with a mind of its own about arithmetic and copies."""

    def __array_finalize__(self, obj):
        self.extra = "extra"

    def __array_ufunc__(self, *arguments, **keywords):
        raise TypeError("not for you")

    def __array_function__(self, *arguments, **keywords):
        raise TypeError("not for you")


LAYOUTS = {
    "fortran": lambda array, tmp_path: np.asfortranarray(array),
    "channels_last": channels_last,
    "last_axis_first": last_axis_first,
    "every_second": every_second,
    "backwards": backwards,
    "repeated": repeated,
    "read_only": read_only,
    "unaligned": unaligned,
    "byte_swapped": byte_swapped,
    "in_a_record": in_a_record,
    "memmap": memmap,
    "subclass": lambda array, tmp_path: array.view(Sub),
    "recarray": lambda array, tmp_path: array.view(np.recarray),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tensor, dtype, tmp_path):
    """The bytes of the contiguous call, plain arrays out, and nothing written."""
    call = call_of("groups_across", dtype)
    array = LAYOUTS[layout](getattr(call, tensor), tmp_path)
    usual = call._replace(**{tensor: np.array(array, getattr(call, tensor).dtype)})
    unusual = call._replace(**{tensor: array})
    before = [a.tobytes() for a in unusual[:6]]
    repeats = layout == "repeated"
    expected = usual.run("cpu") if repeats else results_of("groups_across", dtype, "cpu")
    actual = unusual.run("cpu")
    assert_same_bytes(actual, expected)
    assert all(type(a) is np.ndarray and a.dtype.isnative for a in actual.values())
    assert [a.tobytes() for a in unusual[:6]] == before


def test_matrix_is_no_bias(backend):
    """np.matrix has two dimensions, always."""
    call = call_of()
    with pytest.warns(PendingDeprecationWarning):
        bias = np.asmatrix(call.bias)
    with pytest.raises(ValueError, match=r"deform_conv2d: bias: .*expected \(6,\), got \(1, 6\)"):
        call._replace(bias=bias).forward(backend)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arguments_are_not_written(name, dtype, backend):
    call = call_of(name, dtype).map(np.copy)
    before = [None if a is None else a.tobytes() for a in call[:6]]
    call.run(backend)
    assert [None if a is None else a.tobytes() for a in call[:6]] == before


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_outputs_come_poisoned(function, monkeypatch):
    """What a kernel forgets to write is NaN in these tests, not zero by luck."""
    monkeypatch.setattr(reference, function, lambda *arguments, **keywords: None)
    results = getattr(call_of(), function)("reference")
    for array in results if function == "backward" else (results,):
        assert np.isnan(array).all()


def test_masked_arrays_are_refused():
    """They would lose silently what they mask."""
    call = call_of()
    with pytest.raises(
        TypeError, match=r"input: .*expected numpy\.ndarray, got numpy\.ma\..*MaskedArray"
    ):
        call._replace(input=np.ma.masked_less(call.input, 0)).forward()


def test_same_array_twice(backend):
    """An array may serve as several arguments."""
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)
    weight = np.ones((2, 2, 1, 1), np.float32)
    actual = dcnlib.deform_conv2d(x, x, weight, backend=backend)
    expected = dcnlib.deform_conv2d(x, x.copy(), weight, backend=backend)
    assert actual.tobytes() == expected.tobytes()


# ---- kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", TENSORS)
def test_numpy_and_torch_do_not_mix(tensor):
    """The first that differs from `input` is named; if input differs, that is the next one."""
    torch = pytest.importorskip("torch")
    call = call_of()
    mixed = call._replace(**{tensor: torch.from_numpy(getattr(call, tensor))})
    named = {"input": "grad_output"}.get(tensor, tensor)
    kinds = "expected torch.Tensor, got numpy.ndarray" if tensor == "input" else (
        "expected numpy.ndarray, got torch.Tensor"
    )  # fmt: skip
    with pytest.raises(TypeError, match=f"^deform_conv2d_backward: {named}: .*; {kinds}"):
        mixed.backward()
    mixed = mixed.map(lambda a: torch.from_numpy(a) if isinstance(a, np.ndarray) else a.numpy())
    kinds = "expected numpy.ndarray, got torch.Tensor" if tensor == "input" else (
        "expected torch.Tensor, got numpy.ndarray"
    )  # fmt: skip
    with pytest.raises(TypeError, match=f"^deform_conv2d_backward: {named}: .*; {kinds}"):
        mixed.backward()


@pytest.mark.parametrize("name", ["plain", "v1", "groups_across", "depthwise", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_doors_give_the_same_bytes(name, dtype):
    pytest.importorskip("torch")
    call = call_of(name, dtype)
    request = dict(zip(TENSORS, call[:6], strict=True)) | dict(
        zip(("stride", "padding", "dilation", "groups", "offset_groups"), call[6:], strict=True)
    )
    expected = results_of(name, dtype, "cpu")
    for door in ("torch", "torch_backward"):
        actual = doors.DOORS[door].call(request)
        assert_same_bytes(actual, {key: expected[key] for key in actual})


def test_functions_are_the_public_ones():
    assert dcnlib.deform_conv2d is functional.deform_conv2d
    assert dcnlib.deform_conv2d_backward is functional.deform_conv2d_backward
