"""What dcnlib is tested with, for use in other people's tests too: calls, tolerances, assertions.

A `Geometry` fixes sizes, a `Call` holds the arrays. Two kinds of data:

`lattice`   small integers, offsets and masks in eighths: every product and every sum is exact in
            float32, so any right implementation gives the same bits, whatever its order of sums
`real`      normal data and offsets, uniform masks, for comparison within `TOLERANCES`

Importing this module imports neither torch nor pytest.

Examples
--------
>>> import dcnlib.testing as testing
>>> call = testing.lattice(testing.PROBLEMS["strided"], seed=0).astype("float32")
>>> expected = call.run(backend="reference")
>>> testing.assert_equal(call.run(backend="reference"), expected)
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from ._config import cpu_isa
from ._problem import DeformConv2dProblem, deform_conv2d_problem
from .backends.reference import rounded
from .functional import deform_conv2d, deform_conv2d_backward

#: The forward result and the five gradients, as `Call.run` names them.
OUTPUTS = ("output", "grad_input", "grad_offset", "grad_weight", "grad_bias", "grad_mask")

#: Unit roundoff u of each dtype: half the distance from 1 to the next larger number.
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}

_SUMS = {
    "output": 32.0,
    "grad_input": 16.0,
    "grad_offset": 16.0,
    "grad_weight": 64.0,
    "grad_bias": 16.0,
    "grad_mask": 16.0,
}
_ROUNDED_ONCE = dict.fromkeys(OUTPUTS, 1.1)
#: Largest error over largest reference value, in units of u, whatever the image's size; the root
#: mean square error over the root mean square value may be half of it. For data of order 1 and
#: at most 4608 products in a sum.
TOLERANCES = {
    "float64": _SUMS,
    "float32": _SUMS,
    "float16": _ROUNDED_ONCE,
    "bfloat16": _ROUNDED_ONCE,
}


class Geometry(NamedTuple):
    """The sizes of a call; `padding` is (top, bottom, left, right)."""

    batch: int
    in_channels: int
    in_h: int
    in_w: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True

    @property
    def out_h(self) -> int:
        span = self.dilation[0] * (self.kernel[0] - 1) + 1
        return (self.in_h + self.padding[0] + self.padding[1] - span) // self.stride[0] + 1

    @property
    def out_w(self) -> int:
        span = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (self.in_w + self.padding[2] + self.padding[3] - span) // self.stride[1] + 1

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


#: Calls worth naming, odd on purpose: prime sizes, tails of every vector and tile, one of anything.
PROBLEMS = {
    "plain": Geometry(2, 6, 9, 11, 4, (3, 3), padding=(1, 1, 1, 1)),
    "v1": Geometry(2, 6, 9, 11, 4, (3, 3), padding=(1, 1, 1, 1), mask=False, bias=False),
    "no_mask": Geometry(1, 5, 7, 8, 3, (3, 2), mask=False),
    "no_bias": Geometry(1, 5, 7, 8, 3, (2, 3), bias=False),
    "empty_batch": Geometry(0, 4, 6, 5, 2, (3, 3), padding=(1, 1, 1, 1)),
    "one_of_all": Geometry(1, 1, 1, 1, 1, (1, 1)),
    "one_row": Geometry(3, 2, 1, 13, 3, (1, 3), padding=(0, 0, 1, 1)),
    "one_column": Geometry(2, 3, 17, 1, 2, (3, 1), padding=(2, 1, 0, 0)),
    "pointwise": Geometry(2, 17, 7, 9, 19, (1, 1)),
    "strided": Geometry(2, 4, 13, 11, 6, (3, 2), (2, 3), (1, 0, 2, 1)),
    "dilated": Geometry(1, 4, 14, 17, 3, (2, 3), (1, 2), (3, 1, 0, 4), (3, 2)),
    "grouped": Geometry(2, 12, 8, 7, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3, 1),
    "offset_groups": Geometry(2, 12, 8, 7, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 4),
    "groups_across": Geometry(2, 12, 8, 7, 6, (2, 3), (2, 1), (1, 2, 0, 1), (1, 2), 3, 4),
    "depthwise": Geometry(2, 18, 9, 8, 18, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 18, 1),
    "depthwise_2": Geometry(1, 6, 9, 8, 12, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 6, 6),
    "kernel_7": Geometry(1, 3, 12, 13, 5, (7, 7), padding=(3, 3, 3, 3)),
    "channels_1": Geometry(1, 1, 15, 16, 1, (3, 3)),
    "channels_16": Geometry(2, 16, 9, 12, 5, (3, 3), padding=(1, 1, 1, 1)),
    "channels_17": Geometry(1, 17, 10, 15, 3, (3, 3)),
    "channels_33": Geometry(1, 33, 6, 19, 17, (3, 3), padding=(1, 1, 1, 1)),
    "channels_64": Geometry(1, 64, 7, 16, 32, (3, 3), padding=(1, 1, 1, 1)),
    "channels_72": Geometry(1, 72, 5, 14, 33, (3, 3), padding=(1, 1, 1, 1)),
    "channels_130": Geometry(1, 130, 5, 9, 66, (3, 3), padding=(1, 1, 1, 1)),
    "channels_130_split": Geometry(
        1, 130, 5, 9, 10, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, 13, True, False
    ),
    "width_113": Geometry(1, 3, 5, 113, 2, (3, 3), padding=(1, 1, 1, 1)),
    "width_225": Geometry(2, 2, 4, 225, 3, (3, 3), padding=(1, 1, 1, 1)),
    "many_pixels": Geometry(1, 2, 67, 71, 2, (3, 3), padding=(1, 1, 1, 1)),
}


class Call(NamedTuple):
    """The arguments of `deform_conv2d` and its backward; `bias` and `mask` may be None."""

    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any
    grad_output: Any
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1

    def map(self, function) -> Call:
        """The same call with `function` applied to every array."""
        arrays = (None if array is None else function(array) for array in self[:6])
        return Call(*arrays, *self[6:])

    def astype(self, dtype: str) -> Call:
        """The same call in another dtype, "bfloat16" included."""
        return self.map(lambda array: array.astype(numpy_dtype(dtype)))

    def to_torch(self) -> Call:
        """The same call with torch tensors, which share the memory of its arrays."""
        import torch

        def tensor(array):
            if array.dtype.name == "bfloat16":
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

        return self.map(tensor)

    def problem(self) -> DeformConv2dProblem:
        """This call of NumPy arrays as backends are told about it."""
        specs = (None if a is None else (a.shape, a.dtype.name) for a in self[:6])
        return deform_conv2d_problem("testing", *specs, *self[6:])

    def forward(self, backend: str | None = None):
        """`deform_conv2d` of this call."""
        return deform_conv2d(
            *self[:4],
            self.stride,
            self.padding,
            self.dilation,
            self.mask,
            groups=self.groups,
            offset_groups=self.offset_groups,
            backend=backend,
        )

    def backward(self, backend: str | None = None):
        """`deform_conv2d_backward` of this call."""
        return deform_conv2d_backward(
            self.grad_output,
            *self[:4],
            self.stride,
            self.padding,
            self.dilation,
            self.mask,
            groups=self.groups,
            offset_groups=self.offset_groups,
            backend=backend,
        )

    def run(self, backend: str | None = None) -> dict[str, Any]:
        """The result and the gradients by name (`OUTPUTS`); None where an argument is None."""
        grads = self.backward(backend)
        return dict(zip(OUTPUTS, (self.forward(backend), *grads), strict=True))


def to_numpy(array: Any) -> np.ndarray:
    """`array` as NumPy has it: arrays as they are, torch's tensors without a copy."""
    if isinstance(array, np.ndarray) or not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch

        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def cpu_isas() -> list[str]:
    """The instruction sets that the CPU backend can use on this machine."""
    usable = []
    for isa in ("scalar", "baseline", "avx2", "avx512", "amx"):
        with cpu_isa(isa):
            if cpu_isa() == isa:
                usable.append(isa)
    return usable


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of that name; "bfloat16" needs the package ml_dtypes."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def random_geometry(rng: np.random.Generator) -> Geometry:
    """Small sizes with everything anisotropic and groups that cut across offset groups."""
    groups, offset_groups = int(rng.choice([1, 1, 2, 3, 4])), int(rng.choice([1, 1, 2, 3, 6]))
    in_channels = lcm(groups, offset_groups) * int(rng.integers(1, 3))
    kernel, stride, dilation = (
        tuple(int(v) for v in rng.integers(1, high, 2)) for high in (6, 4, 4)
    )
    padding, sizes = [], []
    for axis in range(2):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        padded = span + int(rng.integers(0, 7)) * stride[axis] + int(rng.integers(stride[axis]))
        before, after = (int(v) for v in rng.integers(0, 5, 2))
        if before + after >= padded:
            before = after = 0
        padding += [before, after]
        sizes.append(padded - before - after)
    return Geometry(
        int(rng.choice([0, 1, 2, 3], p=[0.04, 0.46, 0.3, 0.2])),
        in_channels,
        *sizes,
        groups * int(rng.integers(1, 4)),
        kernel,
        stride,
        tuple(padding),
        dilation,
        groups,
        offset_groups,
        bool(rng.random() < 0.6),
        bool(rng.random() < 0.6),
    )


def lattice(geometry: Geometry, seed, amplitudes: tuple[int, int, int] = (8, 4, 4)) -> Call:
    """A float64 call on the exact lattice, the same numbers in all four dtypes.

    `amplitudes` are the largest input, weight and grad_output; long sums need smaller ones, see
    `is_exact`. The offsets hold small fractions, integers, positions exactly at -1 and at
    the far border, and jumps far outside.
    """
    rng = np.random.default_rng(seed)
    shapes = _shapes(geometry)

    def integers(name, largest):
        return rng.integers(-largest, largest, shapes[name], endpoint=True).astype(np.float64)

    largest_input, largest_weight, largest_grad = amplitudes
    return _call(
        geometry,
        integers("input", largest_input),
        _lattice_offset(geometry, rng),
        integers("weight", largest_weight),
        integers("bias", 8),
        rng.integers(0, 8, shapes["mask"], endpoint=True) / 8,
        integers("grad_output", largest_grad),
    )


def random_lattice(seed) -> Call:
    """A random small call on the exact lattice that is worth testing.

    One with more than 60 % zero outputs, which would prove little, is drawn again.
    """
    rng = np.random.default_rng(seed)
    while True:
        call = lattice(random_geometry(rng), rng)
        output = call.forward(backend="reference")
        if output.size == 0 or np.count_nonzero(output) >= 0.4 * output.size:
            return call


def is_exact(call: Call) -> bool:
    """Whether no sum of this lattice call, in whatever order, can leave the 24 bits of float32.

    Every product is a whole number of units of 2**-9, so it is enough that sums of absolute values
    stay below 2**15. Slopes have signs of their own: their sums are bounded by the largest terms.
    """
    sums = call.map(np.abs)._replace(offset=call.offset).run(backend="reference")
    terms = call.input.shape[1] // call.offset_groups * (call.weight.shape[0] // call.groups)
    input, weight, grad_output = (
        np.max(np.abs(a), initial=0.0) for a in (call.input, call.weight, call.grad_output)
    )
    sums["grad_offset"] = terms * grad_output * weight * 2 * input / 8  # units of 2**-6
    return all(np.max(a, initial=0.0) < 2.0**15 for a in sums.values() if a is not None)


def real(geometry: Geometry, seed) -> Call:
    """A float64 call on normal data: offsets N(0, 2), masks U(0, 1), the rest N(0, 1)."""
    rng = np.random.default_rng(seed)
    shapes = _shapes(geometry)
    return _call(
        geometry,
        rng.standard_normal(shapes["input"]),
        2 * rng.standard_normal(shapes["offset"]),
        rng.standard_normal(shapes["weight"]),
        rng.standard_normal(shapes["bias"]),
        rng.random(shapes["mask"]),
        rng.standard_normal(shapes["grad_output"]),
    )


def errors(actual, expected, dtype: str) -> tuple[float, float]:
    """Error of `actual` in units of u: (largest / largest value, rms / rms of the values)."""
    expected = np.asarray(expected)
    difference = to_numpy(actual).astype(expected.dtype) - expected
    if expected.size == 0:
        return 0.0, 0.0
    u = UNIT_ROUNDOFF[dtype]
    largest, rms = np.max(np.abs(expected)), np.sqrt(np.mean(expected**2))
    if largest == 0:
        return (0.0, 0.0) if not difference.any() else (np.inf, np.inf)
    return (
        float(np.max(np.abs(difference)) / (u * largest)),
        float(np.sqrt(np.mean(difference**2)) / (u * rms)),
    )


def assert_close(actual: dict, expected: dict, dtype: str, note: object = "") -> None:
    """All of `actual` (as `Call.run` gives it) within `TOLERANCES` of the exact `expected`."""
    for name, exact in _pairs(actual, expected, note):
        largest, rms = errors(actual[name], exact, dtype)
        limit = TOLERANCES[dtype][name]
        _require(largest <= limit, f"{name} {dtype}: {largest:.3g} u > {limit} u; {note}")
        _require(rms <= limit / 2, f"{name} {dtype}: rms {rms:.3g} u > {limit / 2} u; {note}")


def assert_equal(actual: dict, expected: dict, note: object = "") -> None:
    """All of `actual` equal `expected`, rounded to its dtype; a NaN equals a NaN, -0 equals 0."""
    for name, exact in _pairs(actual, expected, note):
        got = to_numpy(actual[name])
        want = exact if got.dtype == exact.dtype else rounded(exact, got.dtype)
        wrong = ~((got == want) | ((got != got) & (want != want)))
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{name} {got.dtype}: {np.count_nonzero(wrong)} of {wrong.size} differ, first at "
                f"{first}: expected {want[first]}, got {got[first]}; {note}"
            )


def _shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    g = geometry
    out = (g.out_h, g.out_w)
    return {
        "input": (g.batch, g.in_channels, g.in_h, g.in_w),
        "offset": (g.batch, 2 * g.offset_groups * g.taps, *out),
        "weight": (g.out_channels, g.in_channels // g.groups, *g.kernel),
        "bias": (g.out_channels,),
        "mask": (g.batch, g.offset_groups * g.taps, *out),
        "grad_output": (g.batch, g.out_channels, *out),
    }


def _call(geometry: Geometry, input, offset, weight, bias, mask, grad_output) -> Call:
    return Call(
        input,
        offset,
        weight,
        bias if geometry.bias else None,
        mask if geometry.mask else None,
        grad_output,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        geometry.offset_groups,
    )


def _lattice_offset(geometry: Geometry, rng: np.random.Generator) -> np.ndarray:
    g = geometry
    shape = (g.batch, g.offset_groups, *g.kernel, 2, g.out_h, g.out_w)  # 2: {y, x}
    base_y = (
        np.arange(g.kernel[0])[:, None] * g.dilation[0]
        + np.arange(g.out_h) * g.stride[0]
        - g.padding[0]
    )[:, None, :, None]
    base_x = (
        np.arange(g.kernel[1])[:, None] * g.dilation[1]
        + np.arange(g.out_w) * g.stride[1]
        - g.padding[2]
    )[None, :, None, :]
    base = np.stack(np.broadcast_arrays(base_y, base_x), axis=2)
    size = np.array([g.in_h, g.in_w])[:, None, None]

    near = rng.integers(-24, 24, shape, endpoint=True) / 8
    kind = rng.choice(6, shape, p=[0.64, 0.14, 0.06, 0.06, 0.06, 0.04])
    offset = np.select(
        [kind == 1, kind == 2, kind == 3, kind == 4, kind == 5],
        [
            np.rint(near),
            np.broadcast_to(-1.0 - base, shape),
            np.broadcast_to(size - 1.0 * base, shape),
            np.broadcast_to(size - 1.0 * base, shape) - np.abs(near) / 4,
            rng.choice([-8192.0, -96.0, 96.0, 8192.0], shape),
        ],
        near,
    )
    # On the grid that bfloat16's 8 bits leave: eighths below 32, coarser beyond.
    unit = np.maximum(np.frexp(offset)[1] - 8, -3)
    offset = np.ldexp(np.rint(np.ldexp(offset, -unit)), unit)
    return offset.reshape(_shapes(g)["offset"])


def _pairs(actual: dict, expected: dict, note: object) -> Iterator[tuple[str, np.ndarray]]:
    """The names and the exact arrays of those that are not None; shapes are the same."""
    _require(actual.keys() == expected.keys(), f"{[*actual]}, not {[*expected]}; {note}")
    for name, exact in expected.items():
        if exact is None:
            _require(actual[name] is None, f"{name} should be None; {note}")
            continue
        _require(actual[name] is not None, f"{name} is None; {note}")
        shape = tuple(np.shape(actual[name]))
        _require(shape == exact.shape, f"{name}: shape {shape}, not {exact.shape}; {note}")
        yield name, exact


def _require(condition: object, text: str) -> None:
    """An assert that ``python -O`` leaves in."""
    if not condition:
        raise AssertionError(text)
