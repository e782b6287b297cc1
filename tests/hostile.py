"""The hostile arguments: every value, shape and dtype that has broken such a library before.

`cases` says for each what has to happen, worked out here from Python's unbounded integers and not
from `dcnlib._problem`: an error of one type that names one of a few arguments, or acceptance, and
then the oracle's result. `attempt` runs one case through one door; `test_hostile.py` judges.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import doors
import oracle
from dcnlib import testing
from dcnlib.testing import Call, Geometry
from doors import DOORS, TENSORS, Door, Request

LARGEST = 2**31 - 1

GEOMETRIES = {
    "usual": Geometry(2, 6, 9, 8, 4, (3, 2), (2, 1), (1, 1, 2, 2), (1, 2), 2, 3),
    # Here dilation does not matter, here stride does not, and here all is as large as it may be.
    "pointwise": Geometry(1, 2, 4, 5, 2, (1, 1), groups=2),
    "single": Geometry(1, 2, 3, 4, 2, (3, 4)),
    "far": Geometry(1, 1, 5, 5, 1, (1, 1), (LARGEST, LARGEST), (LARGEST,) * 4),
}
assert tuple(GEOMETRIES) == doors.GEOMETRIES


class Case(NamedTuple):
    """`error` None means that the call has to succeed with the oracle's result."""

    request: Callable[[], Request]
    error: str | None
    names: tuple[str, ...] = ()
    backward_only: bool = False
    of_memory: bool = False
    """No matter of shapes and dtypes: doors without memory are spared."""


class Stubborn:
    """An index that fails."""

    def __index__(self):
        raise ValueError("no")


class Fickle:
    """An index that is 1 once, and more every time it is asked again."""

    def __init__(self):
        self.value = 0

    def __index__(self):
        self.value += 1
        return self.value


INTEGERS: dict[str, Any] = {
    text: eval(text)
    for text in (
        "-2**63", "-2**31", "-1", "0", "1", "2", "3", "9", "2**30", "2**31-2", "2**31-1", "2**31",
        "2**31+1", "2**32-1", "2**32", "2**32+1", "2**32+2", "2**62", "2**63-1", "2**63", "2**64",
        "2**64+1", "10**30",
    )
}  # fmt: skip
NUMPY_INTEGERS: dict[str, Any] = {
    f"np.{kind}({value})": getattr(np, kind)(value)
    for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    for value in (1, 2)
} | {
    "np.int64(-1)": np.int64(-1),
    "np.uint64(2**63)": np.uint64(2**63),
    "np.uint64(2**64-1)": np.uint64(2**64 - 1),
    "np.array(1)": np.array(1),
    "np.array(2)": np.array(2),
}
NO_INTEGERS: dict[str, Any] = {
    "1.0": 1.0,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "1j": 1j,
    "True": True,
    "False": False,
    "np.float64(1)": np.float64(1),
    "np.float16(1)": np.float16(1),
    "np.bool_(1)": np.bool_(True),
    "np.array(1.0)": np.array(1.0),
    "np.array(True)": np.array(True),
    "np.array([1,1])": np.array([1, 1]),
    "np.datetime64": np.datetime64("2000-01-01"),
    "b'1'": b"1",
    "{}": {},
    "{1,2}": {1, 2},
    "object": object(),
    "stubborn": Stubborn(),
    "int": int,
}
#: NumPy's own integers are tried where an argument matters and where it does not.
WITH_NUMPY_INTEGERS = ("usual", "single")
NO_PAIRS: dict[str, Any] = {"()": (), "(1,)": (1,), "(1,1,1)": (1, 1, 1), "5 values": (1,) * 5}
NESTED: dict[str, Any] = {"((1,1),(1,1))": ((1, 1), (1, 1)), "[[1],[1]]": [[1], [1]]}


@cache
def _call(name: str) -> Call:
    return testing.lattice(GEOMETRIES[name], 0).astype("float32")


def request(name: str) -> Request:
    """A valid call on the exact lattice, with its groups given."""
    call = _call(name).map(np.copy)
    arrays = dict(zip(TENSORS, call[:6], strict=True))
    return arrays | {
        "stride": call.stride,
        "padding": call.padding,
        "dilation": call.dilation,
        "groups": call.groups,
        "offset_groups": call.offset_groups,
    }


def attempt(case: tuple[str, str]) -> str:
    """Run the case of that (door, name) in this process."""
    door, name = case
    return outcome(DOORS[door], cases(DOORS[door].kind)[name])


def outcome(door: Door, case: Case) -> str:
    """Run a case: "equal" if the oracle agrees, an exception otherwise."""
    given = case.request()
    arrays = {key: given[key] for key in TENSORS if isinstance(given[key], np.ndarray)}
    before = {key: array.tobytes() for key, array in arrays.items()}
    results = door.call(given)
    for key, data in before.items():
        assert arrays[key].tobytes() == data, f"{key} was written"
    given = case.request()  # anew: an index may have changed
    given |= {key: plain(given[key]) for key in TENSORS}
    if not door.takes_grad_output:
        shape = (len(given["input"]), len(given["weight"]), *given["offset"].shape[2:])
        given["grad_output"] = np.zeros(shape)
    call = Call(
        *(given[key] for key in TENSORS),
        as_pair(given["stride"]),
        as_sides(given["padding"]),
        as_pair(given["dilation"]),
        *groups_of(given),
    )
    expected = oracle.run(call.map(lambda array: array.astype(np.float64)))
    if door.shapes_only:
        shapes = {key: array.shape for key, array in results.items()}
        assert shapes == {key: expected[key].shape for key in results}, shapes
    else:
        testing.assert_equal(results, {key: expected[key] for key in results})
    return "equal"


def plain(value: Any) -> np.ndarray | None:
    """What an accepted argument holds."""
    if value is None or isinstance(value, np.ndarray):
        return None if value is None else np.asarray(value)
    if value._is_zerotensor():  # which has no memory, and old torch shows somebody else's
        value = value.clone()
    return (value.double() if value.dtype.itemsize < 4 else value).numpy(force=True)


def run_out_of_memory(door: str) -> None:
    """A legal call on arrays of stride 0 that claim a petabyte."""
    one = np.ones((), np.float32)
    side = 2**24
    image = np.broadcast_to(one, (1, 1, side, side))
    offset = np.broadcast_to(one, (1, 2, side, side))
    arguments = {"input": image, "offset": offset, "weight": np.ones((1, 1, 1, 1), np.float32)}
    if DOORS[door].takes_grad_output:
        arguments["grad_output"] = image
    DOORS[door].call(arguments)


def as_pair(value: Any) -> tuple[int, int]:
    value = value if isinstance(value, tuple | list) else (value, value)
    return (int(value[0]), int(value[1]))


def as_sides(value: Any) -> tuple[int, int, int, int]:
    if isinstance(value, str):
        return (0, 0, 0, 0)  # "same" too, for the kernels it is given with
    if isinstance(value, tuple | list) and len(value) == 4:
        return tuple(int(side) for side in value)  # type: ignore[return-value]
    h, w = as_pair(value)
    return (h, h, w, w)


def has_torch_types(given: Request) -> bool:
    """Whether all is as a torch operator declares it: tensors, and integers of 64 bits."""
    numbers: list[Any] = []
    for name in ("stride", "padding", "dilation"):
        value = given[name]
        numbers += value if isinstance(value, tuple | list) else [value]
    numbers += [given[name] for name in ("groups", "offset_groups") if given[name] is not None]
    arrays = [given[name] for name in TENSORS if given[name] is not None]
    return all(type(n) is int and -(2**63) <= n < 2**63 for n in numbers) and all(
        type(array) is np.ndarray or hasattr(array, "requires_grad") for array in arrays
    )


def groups_of(given: Request) -> tuple[int, int]:
    groups, offset_groups = given["groups"], given["offset_groups"]
    _, group_channels, kernel_h, kernel_w = given["weight"].shape
    channels, offset_channels = given["input"].shape[-3], given["offset"].shape[-3]
    return (
        channels // group_channels if groups is None else int(groups),
        offset_channels // (2 * kernel_h * kernel_w)
        if offset_groups is None
        else int(offset_groups),
    )


def fits(given: Request) -> bool:
    """Whether shapes and integers (all in range) make a call, in unbounded integers."""
    shapes = {key: given[key].shape for key in TENSORS if given[key] is not None}
    if len(shapes["input"]) not in (3, 4) or len(shapes["weight"]) != 4:
        return False
    lead = shapes["input"][:-3]
    channels, *size = shapes["input"][-3:]
    out_channels, group_channels, *kernel = shapes["weight"]
    if 0 in (channels, *size, *shapes["weight"]) or len(shapes["offset"]) != len(shapes["input"]):
        return False
    sides, stride, dilation = (
        as_sides(given["padding"]),
        as_pair(given["stride"]),
        as_pair(given["dilation"]),
    )
    taps = kernel[0] * kernel[1]
    groups, offset_groups = groups_of(given)
    if not groups or channels != groups * group_channels or out_channels % groups:
        return False
    if not offset_groups or channels % offset_groups:
        return False
    out = []
    for axis in range(2):
        room = size[axis] + sides[2 * axis] + sides[2 * axis + 1]
        room -= dilation[axis] * (kernel[axis] - 1) + 1
        if room < 0:
            return False
        out.append(room // stride[axis] + 1)
    wanted = {
        "offset": (*lead, 2 * offset_groups * taps, *out),
        "mask": (*lead, offset_groups * taps, *out),
        "bias": (out_channels,),
        "grad_output": (*lead, out_channels, *out),
    }
    return all(shapes.get(key, shape) == shape for key, shape in wanted.items())


def integer_cases() -> Iterator[tuple[str, Case]]:
    """Every value in every place that takes integers."""
    for geometry in GEOMETRIES:
        for argument in ("stride", "padding", "dilation"):
            lowest = 0 if argument == "padding" else 1
            for label, value in _values(geometry).items():
                for form in ("both", "h", "w") if geometry == "usual" else ("both", "w"):
                    name = f"{geometry}-{argument}-{form}-{label}"
                    yield name, _integer_case(geometry, argument, form, value, lowest)
            for label, value in NO_PAIRS.items():
                case = Case(request_with(geometry, **{argument: value}), "ValueError", (argument,))
                yield f"{geometry}-{argument}-{label}", case
            for label, value in NESTED.items():
                case = Case(request_with(geometry, **{argument: value}), "TypeError", (argument,))
                yield f"{geometry}-{argument}-{label}", case
            case = Case(request_with(geometry, **{argument: None}), "TypeError", (argument,))
            yield f"{geometry}-{argument}-None", case
        for side in range(4):
            for label, value in INTEGERS.items():
                sides = list(GEOMETRIES[geometry].padding)
                sides[side] = value
                yield (
                    f"{geometry}-padding-side{side}-{label}",
                    _in_range_case(geometry, "padding", tuple(sides), [value], 0),
                )
        for argument in ("groups", "offset_groups"):
            for label, value in (_values(geometry) | NESTED).items():
                name = f"{geometry}-{argument}-{label}"
                if label in NO_INTEGERS or label in NESTED:
                    change = request_with(geometry, **{argument: value})
                    yield name, Case(change, "TypeError", (argument,))
                else:
                    yield name, _in_range_case(geometry, argument, value, [value], 1)
            yield (
                f"{geometry}-{argument}-None",
                Case(request_with(geometry, **{argument: None}), None),
            )
    for argument in ("stride", "padding", "dilation"):
        for text in ("1", "", "Same", "same ", "full"):
            error = "ValueError" if argument == "padding" else "TypeError"
            case = Case(request_with("usual", **{argument: text}), error, (argument,))
            yield f"usual-{argument}-{text!r}", case
    yield (
        "usual-padding-'same'",
        Case(request_with("usual", padding="same"), "ValueError", ("padding",)),
    )
    yield (
        "usual-padding-'valid'",
        Case(request_with("usual", padding="valid"), "ValueError", ("offset",)),
    )
    yield "pointwise-padding-'valid'", Case(request_with("pointwise", padding="valid"), None)
    yield "pointwise-padding-'same'", Case(request_with("pointwise", padding="same"), None)
    # Whoever reads this index twice computes another convolution, or one with no room for it.
    for argument in ("stride", "groups"):
        yield f"single-{argument}-fickle", Case(request_with("single", **{argument: Fickle}), None)


def _values(geometry: str) -> dict[str, Any]:
    numpy = NUMPY_INTEGERS if geometry in WITH_NUMPY_INTEGERS else {}
    return INTEGERS | numpy | NO_INTEGERS


def _integer_case(geometry: str, argument: str, form: str, value: Any, lowest: int) -> Case:
    usual = as_pair(request_integers(geometry)[argument])
    given = {"both": value, "h": (value, usual[1]), "w": (usual[0], value)}[form]
    if any(value is no for no in NO_INTEGERS.values()):
        return Case(request_with(geometry, **{argument: given}), "TypeError", (argument,))
    return _in_range_case(geometry, argument, given, [value], lowest)


def _in_range_case(geometry, argument, given, values, lowest) -> Case:
    change = request_with(geometry, **{argument: given})
    if not all(lowest <= int(value) <= LARGEST for value in values):
        return Case(change, "ValueError", (argument,))
    if fits(change()):
        return Case(change, None)
    partners = {"groups": ("weight",), "offset_groups": ("offset",)}
    return Case(change, "ValueError", (argument, *partners.get(argument, ("input", "offset"))))


def request_integers(geometry: str) -> Request:
    g = GEOMETRIES[geometry]
    return {"stride": g.stride, "padding": (g.padding[0], g.padding[2]), "dilation": g.dilation}


def request_with(geometry: str, **changes: Any) -> Callable[[], Request]:
    def build() -> Request:
        fresh = {k: Fickle() if v is Fickle else v for k, v in changes.items()}
        return request(geometry) | fresh

    return build


#: Who may be named when a dimension of a tensor is wrong and somebody else's shape disagrees.
PARTNERS = {
    ("input", 0): ("offset", "mask", "grad_output"),
    ("input", 1): ("input", "weight", "groups", "offset", "offset_groups"),
    ("input", 2): ("input", "offset"),
    ("input", 3): ("input", "offset"),
    ("offset", 1): ("offset", "mask"),
    ("weight", 0): ("weight", "bias", "grad_output"),
    ("weight", 1): ("weight", "groups"),
    ("weight", 2): ("weight", "offset", "input"),
    ("weight", 3): ("weight", "offset", "input"),
}


def shape_cases() -> Iterator[tuple[str, Case]]:
    """Every tensor with one wrong dimension or a wrong rank, groups given and inferred."""
    shapes = {key: array.shape for key, array in request("usual").items() if key in TENSORS}
    for tensor, shape in shapes.items():
        for label, dims, mutated in _mutations(shape):
            names = {name for dim in dims for name in PARTNERS.get((tensor, dim), ())} | {tensor}
            for groups in ("given", "inferred"):
                change = _reshaped(tensor, mutated, groups)
                error = None if fits_ranked(change()) else "ValueError"
                if label == "rank_3" and tensor == "input":
                    names |= {"offset"}  # a call without a batch, but for the others
                yield (
                    f"{tensor}-{label}-groups_{groups}",
                    Case(change, error, tuple(names), tensor == "grad_output"),
                )


def fits_ranked(given: Request) -> bool:
    """`fits` for shapes of any rank."""
    ranks = {key: given[key].ndim for key in TENSORS}
    usual = {"input": 4, "offset": 4, "weight": 4, "bias": 1, "mask": 4, "grad_output": 4}
    return ranks == usual and 0 not in given["weight"].shape and fits(given)


def _mutations(shape: tuple[int, ...]) -> Iterator[tuple[str, list[int], tuple[int, ...]]]:
    """(label, dimensions touched, new shape), the true shape excluded."""
    for dim, size in enumerate(shape):
        for label, other in {
            "is_0": 0,
            "is_1": 1,
            "less_1": size - 1,
            "plus_1": size + 1,
            "twice": 2 * size,
        }.items():
            mutated = (*shape[:dim], other, *shape[dim + 1 :])
            if mutated != shape:
                yield f"dim{dim}_{label}", [dim], mutated
        if dim + 1 < len(shape) and shape[dim] != shape[dim + 1]:
            mutated = (*shape[:dim], shape[dim + 1], size, *shape[dim + 2 :])
            yield f"dim{dim}_swapped", [dim, dim + 1], mutated
    for rank in range(7):
        if rank != len(shape):
            mutated = (1,) * (rank - len(shape)) + shape[max(0, len(shape) - rank) :]
            yield f"rank_{rank}", [], mutated


def _reshaped(tensor: str, shape: tuple[int, ...], groups: str) -> Callable[[], Request]:
    def build() -> Request:
        given = request("usual")
        numbers = np.random.default_rng(1).integers(-4, 4, shape)
        numbers = numbers / 8 if tensor in ("offset", "mask") else numbers
        given[tensor] = np.asarray(numbers, np.float32)
        if groups == "inferred":
            given["groups"] = given["offset_groups"] = None
        return given

    return build


def other_dtypes() -> dict[str, np.dtype]:
    """Every dtype that is not one of the four, by a name fit for a test."""
    kinds = {
        name: np.dtype(name)
        for name in (
            "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
            "complex64", "complex128", "longdouble", "clongdouble", "object", "S4", "U4", "V4",
            "M8[s]", "m8[s]",
        )
    }  # fmt: skip
    kinds["structured"] = np.dtype([("float32", "f4")])
    try:
        import ml_dtypes
    except ImportError:
        return kinds
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "int4", "uint4"):
        kinds[name] = np.dtype(getattr(ml_dtypes, name))
    return kinds


def dtype_cases() -> Iterator[tuple[str, Case]]:
    """All tensors of one dtype, and every pair of a dtype of input and another of one tensor."""
    right = {name: np.dtype(name) for name in ("float32", "float64", "float16")}
    wrong = other_dtypes()
    for name, dtype in right.items():
        yield f"all-{name}", Case(_typed(dict.fromkeys(TENSORS, dtype)), None)
    for name, dtype in wrong.items():
        case = Case(_typed(dict.fromkeys(TENSORS, dtype)), "TypeError", ("input",))
        yield f"all-{name}", case
    for tensor in TENSORS[1:]:
        for name, dtype in right.items():
            for other, other_dtype in (right | wrong).items():
                if name != other:
                    dtypes = dict.fromkeys(TENSORS, dtype) | {tensor: other_dtype}
                    case = Case(_typed(dtypes), "TypeError", (tensor,), tensor == "grad_output")
                    yield f"{name}-{tensor}-{other}", case


def _typed(dtypes: dict[str, np.dtype]) -> Callable[[], Request]:
    def build() -> Request:
        given = request("pointwise")
        for tensor, dtype in dtypes.items():
            array = given[tensor]
            if dtype.kind in "SUVMm" or dtype.names:
                given[tensor] = np.zeros(array.shape, dtype)
            else:
                given[tensor] = array.astype(dtype)
        return given

    return build


class Liar(np.ndarray):
    """An array that claims another shape or dtype than its memory has."""

    claims: dict[str, Any]

    @property
    def shape(self):
        return self.claims.get("shape", np.ndarray.shape.__get__(self))

    @property
    def dtype(self):
        return self.claims.get("dtype", np.ndarray.dtype.__get__(self))


class Converts:
    """No array, but NumPy would make one of it."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __array__(self, dtype=None, copy=None):
        return self.array


class Interface:
    """Memory of another size each time that somebody looks."""

    def __init__(self, array):
        self.array = array
        self.looks = 0

    @property
    def __array_interface__(self):
        self.looks += 1
        if self.looks == 1:
            return self.array.__array_interface__
        return self.array.__array_interface__ | {"shape": (1000, *self.array.shape[1:])}


NO_ARRAYS: dict[str, Callable[[np.ndarray], Any]] = {
    "list": np.ndarray.tolist,
    "tuple": tuple,
    "scalar": lambda array: 1.0,
    "numpy_scalar": lambda array: np.float32(1),
    "string": lambda array: "array",
    "bytes": np.ndarray.tobytes,
    "memoryview": memoryview,
    "masked": np.ma.masked_array,
    "converts": Converts,
    "interface": Interface,
    "type": lambda array: np.ndarray,
}


def object_cases() -> Iterator[tuple[str, Case]]:
    """Every tensor as something else than an array, or as an array that lies."""
    for tensor in TENSORS:
        last = tensor == "grad_output"
        for label, make in NO_ARRAYS.items():
            change = _replaced(tensor, make)
            yield f"{tensor}-{label}", Case(change, "TypeError", (tensor,), last)
        if tensor not in ("bias", "mask"):
            change = _replaced(tensor, lambda array: None)
            yield f"{tensor}-None", Case(change, "TypeError", (tensor,), last)
        for label, lie in {"claims_more": _claims_more, "claims_other": _claims_other}.items():
            yield f"{tensor}-{label}", Case(_replaced(tensor, lie), None, (), last)
        names = (tensor, *PARTNERS.get((tensor, 0), ()))
        yield f"{tensor}-is_less", Case(_replaced(tensor, _is_less), "ValueError", names, last)


def _claims_more(array: np.ndarray) -> np.ndarray:
    return _liar(array, shape=(array.shape[0] + 1000, *array.shape[1:]))


def _claims_other(array: np.ndarray) -> np.ndarray:
    return _liar(array, dtype=np.dtype("float64"))


def _is_less(array: np.ndarray) -> np.ndarray:
    return _liar(array[:1], shape=array.shape)


def _liar(array: np.ndarray, **claims: Any) -> np.ndarray:
    liar = array.view(Liar)
    liar.claims = claims
    return liar


def _replaced(tensor: str, make: Callable[[np.ndarray], Any]) -> Callable[[], Request]:
    def build() -> Request:
        given = request("usual")
        return given | {tensor: make(given[tensor])}

    return build


def torch_dtype_cases() -> Iterator[tuple[str, Case]]:
    """As `dtype_cases`, for every dtype that torch has."""
    import torch

    right = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    every = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
    for dtype in every:
        name = str(dtype)[6:]
        change = _torch_typed(dict.fromkeys(TENSORS, dtype))
        case = Case(change, "TypeError", ("input", "grad_output"), of_memory="q" in name)
        yield f"all-{name}", case._replace(error=None) if dtype in right else case
    for dtype in right:
        for tensor in TENSORS:
            for other in every:
                if other != dtype:
                    change = _torch_typed(dict.fromkeys(TENSORS, dtype) | {tensor: other})
                    names = ("input", "offset") if tensor == "input" else (tensor,)
                    quantized = "q" in str(other)
                    case = Case(change, "TypeError", names, tensor == "grad_output", quantized)
                    yield f"{str(dtype)[6:]}-{tensor}-{str(other)[6:]}", case


def _torch_typed(dtypes: dict[str, Any]) -> Callable[[], Request]:
    def build() -> Request:
        import torch

        given = request("pointwise")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about the future of some dtypes
            for name, dtype in dtypes.items():
                tensor = torch.from_numpy(given[name])
                if dtype.is_floating_point and dtype.itemsize > 1:
                    given[name] = tensor.to(dtype)
                else:
                    given[name] = torch.empty(tensor.shape, dtype=dtype)
        return given

    return build


def torch_object_cases() -> Iterator[tuple[str, Case]]:
    """Tensors without plain memory, and tensors whose memory is not what it seems."""
    for tensor in TENSORS:
        last = tensor == "grad_output"
        for label, (make, error) in TORCH_OBJECTS.items():
            names = TENSORS if tensor == "input" and error else (tensor,)
            yield f"{tensor}-{label}", Case(_replaced(tensor, make), error, names, last, True)


def _made_by_torch(make: Callable) -> Callable[[np.ndarray], Any]:
    def convert(array: np.ndarray):
        import torch

        return make(torch, torch.from_numpy(array))

    return convert


def _without_storage(torch, tensor, elements=0):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(4 * elements)
    return tensor


def _unaligned(torch, tensor):
    memory = torch.empty(4 * tensor.numel() + 1, dtype=torch.uint8)
    # A view that starts one byte into its storage: torch itself makes none of these.
    array = np.frombuffer(memory.numpy(), np.uint8)[1:].view(np.float32).reshape(tensor.shape)
    array[...] = tensor.numpy()
    return torch.from_numpy(array)


def _subclass(torch, tensor):
    return tensor.as_subclass(type("Sub", (torch.Tensor,), {}))


def _channels_last(torch, tensor):
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def _strided(torch, tensor):
    return torch.stack([tensor, -tensor], -1)[..., 0]


TORCH_OBJECTS: dict[str, tuple[Callable[[np.ndarray], Any], str | None]] = {
    name: (_made_by_torch(make), error)
    for name, make, error in (
        ("numpy", lambda torch, t: np.recarray(t.shape, np.float32), "TypeError"),
        ("list", lambda torch, t: t.tolist(), "TypeError"),
        ("storage", lambda torch, t: t.untyped_storage(), "TypeError"),
        ("sparse_coo", lambda torch, t: t.to_sparse(), "TypeError"),
        ("mkldnn", lambda torch, t: t.to_mkldnn(), "TypeError"),
        (
            "quantized",
            lambda torch, t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "TypeError",
        ),
        ("meta", lambda torch, t: t.to("meta"), "ValueError"),
        ("no_storage", _without_storage, "ValueError"),
        ("short_storage", lambda torch, t: _without_storage(torch, t, t.numel() - 1), "ValueError"),
        ("empty", lambda torch, t: torch.empty(0), "ValueError"),
        ("negated", lambda torch, t: torch._neg_view(-t), None),
        ("zeros", lambda torch, t: torch._efficientzerotensor(t.shape), None),
        ("parameter", lambda torch, t: torch.nn.Parameter(t), None),
        ("subclass", _subclass, None),
        ("channels_last", _channels_last, None),
        ("strided", _strided, None),
        ("unaligned", _unaligned, None),
    )
}


@cache
def cases(kind: str) -> dict[str, Case]:
    """What the doors of one kind, "numpy" or "torch", have to face: by family and name."""
    families: dict[str, Iterable[tuple[str, Case]]] = {
        "integers": integer_cases(),
        "shapes": shape_cases(),
    }
    if kind == "numpy":
        families |= {"dtypes": dtype_cases(), "objects": object_cases()}
    else:
        families |= {"dtypes": torch_dtype_cases(), "objects": torch_object_cases()}
    named = [
        (f"{family}-{name}", case) for family, found in families.items() for name, case in found
    ]
    assert len(dict(named)) == len(named)
    return dict(named)


#: How the names begin, in portions fit for a test.
GROUPS = (
    *(
        f"integers-{geometry}-{argument}-"
        for geometry in GEOMETRIES
        for argument in ("stride", "padding", "dilation", "groups", "offset_groups")
    ),
    *(f"shapes-{tensor}-" for tensor in TENSORS),
    *(f"dtypes-{name}-" for name in ("all", "float32", "float64", "float16", "bfloat16")),
    *(f"objects-{tensor}-" for tensor in TENSORS),
)


def cases_of(door: str, group: str = "") -> list[str]:
    """The names of the cases that concern a door."""
    backward, shapes_only = DOORS[door].takes_grad_output, DOORS[door].shapes_only
    return [
        name
        for name, case in cases(DOORS[door].kind).items()
        if name.startswith(group)
        and name.startswith(DOORS[door].only)
        and (backward or not case.backward_only)
        and not (shapes_only and case.of_memory)
        and not (door == "module" and name.endswith("groups_inferred"))
    ]
