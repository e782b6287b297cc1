"""Pictures of what the other modules return: each function draws into axes that it is given.

Coordinates are pixels, row 0 on top. Colours are told apart by colour-blind readers too. Imports
matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgb
from matplotlib.image import AxesImage

from .._problem import type_error, value_error
from .locations import OffsetStatistics, SamplingLocations, to_numpy

#: Ink, light lines, and the colours of plain and of deformable things.
INK, FAINT, PLAIN, DEFORMED = "#22303c", "#d5dbe1", "#1f6f8b", "#d1495b"


def draw_image(ax: Axes, image: Any, fade: float = 0.0) -> AxesImage:
    """Show an image without ticks, in a thin frame.

    Parameters
    ----------
    ax : matplotlib Axes
    image : array or tensor (H, W), (H, W, 3), (C, H, W) or (1, C, H, W); array (H, W, 4)
        Stretched from its smallest to its largest value; one channel is shown in grey, the first
        three of several in colour.
    fade : float
        0 shows it as it is, 1 white.

    Returns
    -------
    AxesImage
        The three channels that are shown, in [0, 1].
    """
    pixels = np.clip(_as_rgb(image) * (1 - fade) + fade, 0, 1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color(FAINT)
    return ax.imshow(pixels, interpolation="nearest")


def draw_locations(
    ax: Axes, locations: Any, weight: Any = None, *, size: float = 14, colour: str = DEFORMED
) -> PathCollection:
    """Dots where taps read, darker where the weight is larger, the heaviest on top.

    Parameters
    ----------
    ax : matplotlib Axes
    locations : SamplingLocations, or array of shape (..., 2)
        (y, x) in pixels.
    weight : array of shape (...), optional
        Of an array of locations. Relative to the largest; where it is 0, nothing is drawn.
    size : float
        Area of a dot in square points.
    colour : str

    Returns
    -------
    PathCollection
        Its offsets are (x, y), in the order of weight.
    """
    if isinstance(locations, SamplingLocations):
        locations, weight = locations.locations, locations.weight
    expected = "SamplingLocations or an array of shape (..., 2)"
    try:
        at = np.asarray(locations, np.float64)
    except TypeError:
        got = type(locations).__name__
        raise type_error("draw_locations", "locations", "unknown kind", expected, got) from None
    if at.shape[-1:] != (2,):
        raise value_error("draw_locations", "locations", "unknown shape", expected, at.shape)
    at = at.reshape(-1, 2)
    strength = np.ones(len(at)) if weight is None else np.asarray(weight, np.float64).ravel()
    if len(strength) != len(at):
        raise value_error(
            "draw_locations", "weight", "one for each location", len(at), len(strength)
        )
    order = np.argsort(strength, kind="stable")
    order = order[strength[order] > 0]
    alpha = strength[order] / strength.max(initial=1e-300)
    return ax.scatter(
        at[order, 1], at[order, 0], s=size, color=colour, alpha=0.1 + 0.9 * alpha if len(alpha) else None,
        ec="white", lw=0.3, zorder=3,
    )  # fmt: skip


def draw_receptive_field(
    ax: Axes, magnitude: np.ndarray, *, colour: str = DEFORMED, gamma: float = 0.5
) -> AxesImage:
    """A veil over an image, denser where the response depends more strongly on the pixel.

    Parameters
    ----------
    ax : matplotlib Axes
    magnitude : array of shape (H, W) or (1, H, W)
        Of an `EffectiveReceptiveField`.
    colour : str
    gamma : float
        The opacity is the magnitude over its largest value, to this power.

    Returns
    -------
    AxesImage
        RGBA; the opacity is the last channel.
    """
    if magnitude.ndim == 3 and len(magnitude) == 1:
        magnitude = magnitude[0]
    if magnitude.ndim != 2 or not magnitude.size:
        raise value_error(
            "draw_receptive_field", "magnitude", "must be of one image", "(H, W) or (1, H, W)",
            magnitude.shape,
        )  # fmt: skip
    largest = magnitude.max()
    veil = np.empty((*magnitude.shape, 4))
    veil[..., :3] = to_rgb(colour)
    veil[..., 3] = (magnitude / largest if largest > 0 else magnitude) ** gamma
    return ax.imshow(veil, interpolation="nearest", zorder=2)


def draw_saliency(
    ax: Axes, image: Any, mask: np.ndarray, *, colour: str = DEFORMED, fade: float = 0.75
) -> tuple[AxesImage, LineCollection]:
    """The image, faded where it is not kept, and an outline around what is.

    Parameters
    ----------
    ax : matplotlib Axes
    image : as for `draw_image`
    mask : array of shape (H, W), bool
        Of a `Saliency`.
    colour : str
    fade : float
        0 shows the rest of the image as it is, 1 white.

    Returns
    -------
    AxesImage, LineCollection
        The image as it is shown, and the outline as (x, y) segments of pixels' sides.
    """
    shown = draw_image(ax, image)
    pixels = np.asarray(shown.get_array())
    if np.shape(mask) != pixels.shape[:2]:
        raise value_error(
            "draw_saliency", "mask", "must fit the image", pixels.shape[:2], np.shape(mask)
        )
    shown.set_data(np.where(mask[..., None], pixels, pixels * (1 - fade) + fade))
    padded = np.pad(mask, 1)
    segments = []
    for y, x in np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]):  # sides between rows
        segments.append([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)])
    for y, x in np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]):
        segments.append([(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)])
    outline = LineCollection(segments, colors=colour, linewidths=1.2, zorder=3, capstyle="round")
    ax.add_collection(outline)
    return shown, outline


def draw_statistics(ax: Axes, statistics: Sequence[OffsetStatistics]) -> LineCollection:
    """How far the taps of each layer move: range, quartiles and median of the offsets' lengths.

    Parameters
    ----------
    ax : matplotlib Axes
    statistics : sequence of OffsetStatistics
        The first layer is drawn on top.

    Returns
    -------
    LineCollection
        The range of each layer, then the quartiles of each, as (x, y) segments.
    """
    rows = np.arange(len(statistics))
    spans = [[(row.length[a], y), (row.length[b], y)]
             for a, b in ((0, 4), (1, 3)) for y, row in zip(rows, statistics, strict=True)]  # fmt: skip
    widths = [1.2] * len(rows) + [7] * len(rows)
    lines = LineCollection(spans, colors=DEFORMED, linewidths=widths, capstyle="butt")
    ax.add_collection(lines)
    median = [row.length[2] for row in statistics]
    ax.scatter(median, rows, s=42, color="white", ec=INK, lw=1.2, zorder=3)
    ax.set_yticks(rows, [row.name for row in statistics])
    ax.set(xlabel="length of the offsets in pixels of the layer's input", ylabel="layer")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.autoscale_view(scaley=False)
    ax.grid(axis="x", color="#e6eaee")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return lines


def _as_rgb(image: Any) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    tensor = hasattr(image, "detach")
    pixels = to_numpy(image if tensor else np.asarray(image)).astype(np.float64)
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    colours_last = (3,) if tensor or pixels.shape[:1] <= (4,) else (3, 4)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim == 3 and pixels.shape[-1] not in colours_last:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or not pixels.size:
        raise value_error(
            "draw_image", "image", "unknown shape", "(H, W), (H, W, 3), (C, H, W) or (1, C, H, W)",
            np.shape(image),
        )  # fmt: skip
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, -1)
    low, high = pixels.min(), pixels.max()
    return (pixels - low) / (high - low if high > low else 1.0)
