"""RoI pooling and resampling in tests: calls, random ones on the exact lattice, and an oracle.

The oracle takes the definitions literally: one sample after the other, four corners each, in
float64. It shares nothing with `dcnlib.backends.reference`, which sums weights per row and column.
Finite data only.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np

import dcnlib
from dcnlib._problem_pool import deform_psroi_pool_problem, deform_roi_pool_problem
from dcnlib._problem_resample import deform_resample2d_problem
from dcnlib.testing import numpy_dtype

OUTPUTS = ("output", "grad_input", "grad_offset", "grad_mask")


class Pool(NamedTuple):
    """The arguments of one of the two poolings and their backward functions; arrays first."""

    input: Any
    rois: Any
    offset: Any
    mask: Any
    grad_output: Any
    options: dict[str, Any]
    sensitive: bool

    @property
    def op(self) -> str:
        return "deform_psroi_pool" if self.sensitive else "deform_roi_pool"

    def map(self, function, rois=None) -> Pool:
        """The same call with `function` applied to every array, to `rois` the function of that name."""
        arrays = [None if a is None else function(a) for a in self[:5]]
        arrays[1] = self.rois if rois is None else rois(self.rois)
        return Pool(*arrays, *self[5:])

    def astype(self, dtype: str, rois: str = "float64") -> Pool:
        return self.map(
            lambda a: a.astype(numpy_dtype(dtype)), lambda a: a.astype(numpy_dtype(rois))
        )

    def keywords(self) -> dict[str, Any]:
        tensors = {"input": self.input, "rois": self.rois, "offset": self.offset}
        if self.sensitive:
            tensors["mask"] = self.mask
        return tensors | self.options

    def forward(self, backend=None):
        return getattr(dcnlib, self.op)(**self.keywords(), backend=backend)

    def backward(self, backend=None):
        function = getattr(dcnlib, f"{self.op}_backward")
        return function(grad_output=self.grad_output, **self.keywords(), backend=backend)

    def run(self, backend=None) -> dict[str, Any]:
        grads = self.backward(backend)
        results = {"output": self.forward(backend), **_named(grads)}
        return {name: results.get(name) for name in OUTPUTS}


class Resample(NamedTuple):
    """The arguments of `deform_resample2d` and its backward function."""

    input: Any
    offset: Any
    grad_output: Any
    boundary: str

    @property
    def op(self) -> str:
        return "deform_resample2d"

    def map(self, function) -> Resample:
        return Resample(*(function(a) for a in self[:3]), self.boundary)

    def astype(self, dtype: str) -> Resample:
        return self.map(lambda a: a.astype(numpy_dtype(dtype)))

    def keywords(self) -> dict[str, Any]:
        return {"input": self.input, "offset": self.offset, "boundary": self.boundary}

    def forward(self, backend=None):
        return dcnlib.deform_resample2d(**self.keywords(), backend=backend)

    def backward(self, backend=None):
        return dcnlib.deform_resample2d_backward(
            grad_output=self.grad_output, **self.keywords(), backend=backend
        )

    def run(self, backend=None) -> dict[str, Any]:
        return {"output": self.forward(backend), **_named(self.backward(backend))}


def _named(grads) -> dict[str, Any]:
    return {f"grad_{name}": grad for name, grad in grads._asdict().items()}


def lattice_pool(seed, sensitive: bool | None = None, channels: int | None = None) -> Pool:
    """A random small pooling whose every sum is exact in float32, the same numbers in all dtypes.

    Bins and samples are powers of two, positions multiples of 1/16. Regions lie inside, across the
    border, outside, are empty, reversed and much larger than the image.
    """
    rng = np.random.default_rng(seed)
    sensitive = bool(rng.integers(2)) if sensitive is None else sensitive
    classes = int(rng.choice([1, 1, 2, 3])) if sensitive else 1
    group = tuple(int(g) for g in rng.integers(1, 4, 2)) if sensitive else (1, 1)
    out = tuple(int(s) for s in rng.choice([1, 2, 4], 2))
    part = tuple(int(p) for p in rng.integers(1, 5, 2)) if rng.integers(2) and sensitive else out
    channels = classes * int(rng.integers(1, 4)) if channels is None else channels
    batch, count = int(rng.integers(1, 4)), int(rng.choice([0, 1, 3, 7], p=[0.05, 0.2, 0.3, 0.45]))
    height, width = (int(s) for s in rng.integers(1, 14, 2))
    scale = float(rng.choice([0.5, 1.0, 2.0]))

    def integers(largest, *shape):
        return rng.integers(-largest, largest, shape, endpoint=True).astype(np.float64)

    # In pixels: corners and sizes in halves, so that a bin of a quarter of them ends on 1/8.
    extent = np.array([width, height])
    corner = rng.integers(-3, 2 * extent, (count, 2)) / 2
    size = rng.integers(0, 2 * extent + 2, (count, 2)) / 2
    kind = rng.choice(5, (count, 1), p=[0.7, 0.1, 0.1, 0.05, 0.05])
    # A reversed region of the position-sensitive dialect has the size 0.1: `test_pool.py` has one.
    size = np.select([kind == 1, kind == 2], [size if sensitive else -size, 0 * size], size)
    corner = np.select([kind == 3], [corner - 40], corner)
    size = np.select([kind == 4], [size + 64], size)
    boxes = np.concatenate([corner, corner + size], 1) / scale
    if sensitive:
        boxes = np.rint(boxes)
        scale = max(scale, 1.0)  # so that sizes are integers
    rois = np.concatenate([rng.integers(0, batch, (count, 1)), boxes], 1).astype(np.float64)

    has_offset, has_mask = rng.random() < 0.85, sensitive and rng.random() < 0.6
    offset = integers(2, count, 2 * classes, *part)
    far = rng.random(offset.shape) < 0.05
    offset[far] *= 60
    options: dict[str, Any] = {"spatial_scale": scale, "output_size": out}
    samples = int(rng.choice([1, 2]) if sensitive else rng.choice([1, 2, 4]))
    if sensitive:
        options |= {
            "output_dim": channels,
            "group_size": group,
            "part_size": part,
            "sample_per_part": samples,
            "offset_std": 0.125,
        }
    else:
        options |= {"sampling_ratio": samples, "gamma": 0.125}
    return Pool(
        integers(8, batch, channels * group[0] * group[1], height, width),
        rois,
        offset if has_offset else None,
        rng.integers(0, 8, (count, 1, *out), endpoint=True) / 8 if has_mask else None,
        integers(4, count, channels, *out),
        options,
        sensitive,
    )


def real_pool(seed, sensitive: bool, shape=(2, 12, 20, 24), count=9, out=(3, 5), **options) -> Pool:
    """A float64 pooling on normal data; odd everything, regions of all sizes."""
    rng = np.random.default_rng(seed)
    batch, channels, height, width = shape
    corners = rng.uniform(-4, [height, width], (count, 2))
    sizes = rng.uniform(0.5, [height, width], (count, 2))
    scale = options.pop("spatial_scale", 0.3)
    y, x = corners.T
    h, w = sizes.T
    boxes = np.stack([x, y, x + w, y + h], 1) / scale
    rois = np.concatenate([rng.integers(0, batch, (count, 1)), boxes], 1)
    # float32 numbers, so that every dtype sees the same regions
    rois = rois.astype(np.float32).astype(np.float64)
    classes = options.pop("classes", 1)
    part = options.get("part_size", out)
    if sensitive:
        group = options.get("group_size", (1, 1))
        options.setdefault("output_dim", channels // (group[0] * group[1]))
        channels = options["output_dim"]
    options |= {"output_size": out, "spatial_scale": scale}
    return Pool(
        rng.standard_normal(shape),
        rois,
        rng.standard_normal((count, 2 * classes, *part)),
        rng.random((count, 1, *out)) if sensitive else None,
        rng.standard_normal((count, channels, *out)),
        options,
        sensitive,
    )


def lattice_resample(seed, shape=None) -> Resample:
    """A random small resampling that is exact in float32: integers, offsets in eighths."""
    rng = np.random.default_rng(seed)
    if shape is None:
        shape = (int(rng.integers(0, 4)), *(int(s) for s in rng.integers(1, 10, 3)))
    n, c, h, w = shape
    near = rng.integers(-24, 24, (n, c, 2, h, w), endpoint=True) / 8
    i, j = np.indices((h, w))
    position = np.stack([i, j])
    size = np.array([h, w])[:, None, None]
    kind = rng.choice(7, near.shape, p=[0.5, 0.2, 0.06, 0.06, 0.06, 0.06, 0.06])
    offset = np.select(
        [kind == 1, kind == 2, kind == 3, kind == 4, kind == 5, kind == 6],
        [
            np.rint(near),
            np.broadcast_to(-1.0 - position, near.shape),
            np.broadcast_to(size - 1.0 * position, near.shape),
            np.broadcast_to(size - 1.0 - position, near.shape),
            np.broadcast_to(0.0 - position, near.shape),
            rng.choice([-8192.0, -96.0, 96.0, 8192.0], near.shape),
        ],
        near,
    )
    return Resample(
        rng.integers(-8, 8, shape, endpoint=True).astype(np.float64),
        offset.reshape(n, 2 * c, h, w),
        rng.integers(-4, 4, shape, endpoint=True).astype(np.float64),
        str(rng.choice(["border", "zeros"])),
    )


def pool_oracle(call: Pool) -> dict[str, np.ndarray | None]:
    """What `Pool.run` gives, in float64."""
    x, rois, offset, mask, dy = (None if a is None else a.astype(np.float64) for a in call[:5])
    options = call.options
    bins_h, bins_w = options["output_size"]
    scale, out_channels = options["spatial_scale"], dy.shape[1]
    group_h, group_w = options.get("group_size", (1, 1))
    part_h, part_w = options.get("part_size", (bins_h, bins_w))
    gamma = options.get("offset_std" if call.sensitive else "gamma", 0.1)
    classes = 1 if offset is None else offset.shape[1] // 2
    y = np.zeros(dy.shape)
    dx, dmask = np.zeros(x.shape), np.zeros((len(rois), 1, bins_h, bins_w))
    doffset = None if offset is None else np.zeros(offset.shape)

    for r, (image, x1, y1, x2, y2) in enumerate(rois):
        left, top, wide, high = _box(call, x1, y1, x2, y2, scale)
        image = int(image)
        for o in range(out_channels):
            k = o * classes // out_channels
            for i in range(bins_h):
                for j in range(bins_w):
                    c = (o * group_h + i * group_h // bins_h) * group_w + j * group_w // bins_w
                    part = (i * part_h // bins_h, j * part_w // bins_w)
                    move_x = move_y = 0.0
                    if offset is not None:
                        move_x, move_y = offset[r, 2 * k : 2 * k + 2, *part]
                    samples, number = _samples(
                        call,
                        (top + gamma * high * move_y, high, i, bins_h, x.shape[2]),
                        (left + gamma * wide * move_x, wide, j, bins_w, x.shape[3]),
                    )
                    m = 1.0 if mask is None else mask[r, 0, i, j]
                    g = dy[r, o, i, j] * m / max(number, 1)
                    mean = 0.0
                    for p_y, p_x in samples:
                        value, slope_y, slope_x, corners = _bilinear(x[image, c], p_y, p_x)
                        mean += value / number
                        for q, weight in corners.items():
                            dx[image, c, *q] += g * weight
                        if offset is not None:
                            doffset[r, 2 * k, *part] += g * slope_x * gamma * wide
                            doffset[r, 2 * k + 1, *part] += g * slope_y * gamma * high
                    y[r, o, i, j] = m * mean
                    dmask[r, 0, i, j] += dy[r, o, i, j] * mean
    return dict(zip(OUTPUTS, (y, dx, doffset, None if mask is None else dmask), strict=True))


def _box(call: Pool, x1, y1, x2, y2, scale):
    if not call.sensitive:
        left, top = x1 * scale - 0.5, y1 * scale - 0.5
        return left, top, x2 * scale - 0.5 - left, y2 * scale - 0.5 - top
    x1, y1, x2, y2 = (floor(abs(v) + 0.5) * (1 if v >= 0 else -1) for v in (x1, y1, x2, y2))
    left, top = x1 * scale - 0.5, y1 * scale - 0.5
    return (
        left,
        top,
        max((x2 + 1) * scale - 0.5 - left, 0.1),
        max((y2 + 1) * scale - 0.5 - top, 0.1),
    )


def _samples(call: Pool, y, x):
    """The samples of a bin that are inside, and how many its mean is over."""
    inside, number = [], 1
    for start, size, index, bins, extent in (y, x):
        bin_size = size / bins
        if call.sensitive:
            n = call.options.get("sample_per_part", 4)
            limits, phase = (-0.5, extent - 0.5), 0.0
        else:
            n = call.options.get("sampling_ratio", 0) or max(ceil(bin_size), 0)
            limits, phase = (-1.0, extent), 0.5
        positions = [start + index * bin_size + (s + phase) * bin_size / n for s in range(n)]
        inside.append([p for p in positions if limits[0] <= p <= limits[1]])
        number *= len(inside[-1]) if call.sensitive else n
    return [(p_y, p_x) for p_y in inside[0] for p_x in inside[1]], number


def _bilinear(image, p_y, p_x):
    """Value, slopes and the corners' weights at a position that is limited to the image."""
    (y, ly, moves_y), (x, lx, moves_x) = (
        _limited(p, size) for p, size in zip((p_y, p_x), image.shape, strict=True)
    )
    y1, x1 = min(y + 1, image.shape[0] - 1), min(x + 1, image.shape[1] - 1)
    v00, v01, v10, v11 = image[y, x], image[y, x1], image[y1, x], image[y1, x1]
    value = (1 - ly) * ((1 - lx) * v00 + lx * v01) + ly * ((1 - lx) * v10 + lx * v11)
    slope_y = moves_y * ((1 - lx) * (v10 - v00) + lx * (v11 - v01))
    slope_x = moves_x * ((1 - ly) * (v01 - v00) + ly * (v11 - v10))
    corners: dict[tuple[int, int], float] = {}
    for row, weight_y in ((y, 1 - ly), (y1, ly)):
        for column, weight_x in ((x, 1 - lx), (x1, lx)):
            corners[row, column] = corners.get((row, column), 0.0) + weight_y * weight_x
    return value, slope_y, slope_x, corners


def _limited(p, size):
    """The pixel before a position limited to the image, the fraction, whether it is free to move."""
    if p < 0:
        return 0, 0.0, False
    if p >= size - 1:
        return size - 1, 0.0, False
    return floor(p), p - floor(p), True


def resample_oracle(call: Resample) -> dict[str, np.ndarray]:
    """What `Resample.run` gives, in float64."""
    x, offset, dy = (a.astype(np.float64) for a in call[:3])
    y, dx, doffset = np.zeros(x.shape), np.zeros(x.shape), np.zeros(offset.shape)
    height, width = x.shape[2:]
    pad = 0 if call.boundary == "border" else 1
    for n, c, i, j in np.ndindex(x.shape):
        p_y, p_x = i + offset[n, 2 * c, i, j], j + offset[n, 2 * c + 1, i, j]
        if pad and not (-1 <= p_y < height and -1 <= p_x < width):
            continue
        # Against zeros: the same image with a frame of them, two deep so that -1 has a right side.
        image = np.pad(x[n, c], 2 * pad)
        value, slope_y, slope_x, corners = _bilinear(image, p_y + 2 * pad, p_x + 2 * pad)
        g = dy[n, c, i, j]
        y[n, c, i, j] = value
        doffset[n, 2 * c, i, j] = g * slope_y
        doffset[n, 2 * c + 1, i, j] = g * slope_x
        for (row, column), weight in corners.items():
            row, column = row - 2 * pad, column - 2 * pad
            if 0 <= row < height and 0 <= column < width:
                dx[n, c, row, column] += g * weight
    return {"output": y, "grad_input": dx, "grad_offset": doffset}


def problem_of(call: Pool | Resample):
    """The call of NumPy arrays as backends are told about it."""

    def spec(array):
        return None if array is None else (array.shape, array.dtype.name)

    if isinstance(call, Resample):
        return deform_resample2d_problem(
            "testing", spec(call.input), spec(call.offset), spec(call.grad_output), call.boundary
        )
    o = call.options
    tensors = [spec(a) for a in (call.input, call.rois, call.offset)]
    if not call.sensitive:
        return deform_roi_pool_problem(
            "testing", *tensors, spec(call.grad_output), o["output_size"], o["spatial_scale"],
            o.get("sampling_ratio", 0), o.get("gamma", 0.1),
        )  # fmt: skip
    return deform_psroi_pool_problem(
        "testing", *tensors, spec(call.mask), spec(call.grad_output), o["spatial_scale"],
        o["output_size"], o["output_dim"], o.get("group_size", (1, 1)),
        o.get("part_size", o["output_size"]), o.get("sample_per_part", 4), o.get("offset_std", 0.1),
    )  # fmt: skip
