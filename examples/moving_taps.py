"""What one unit of a convolution reads from a photograph: regular, scaled, rotated and deformed.

Each column is one output unit with a 25 x 25 kernel. Above, where its 625 taps lie; below, the values
that they read, by `dcnlib.deform_conv2d` itself: a weight with a single 1 for each tap gives an
output channel that is what that tap reads.
"""

from __future__ import annotations

import time

import numpy as np

import dcnlib
from common import DEFORMED, GOLD, INK, PLAIN, Figure, arguments, photograph, save
from dcnlib import analysis
from dcnlib.analysis import plot

SIDE, SPACING = 25, 11  # taps along each axis of the kernel, and pixels between them (the dilation)
CENTRE = np.array([200.0, 285.0])  # (row, column) of the unit: the middle of the saucer
CUP = np.array([112.0, 291.0])  # the middle of the cup's rim, an ellipse with these half axes
RIM = np.array([88.0, 102.0])


def main(argv: list[str] | None = None) -> None:
    options = arguments(__file__, __doc__, argv)
    start = time.perf_counter()
    side = 9 if options.quick else SIDE
    photo = photograph("coffee")

    steps = (np.arange(side) - (side - 1) / 2) * SPACING * (SIDE - 1) / (side - 1)
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1)  # (side, side, {y, x})
    print("four kernels read", photo.shape)
    columns = {
        "regular": ("all offsets zero", CENTRE + grid),
        "scaled": ("half as wide, twice as fine", CUP + 0.5 * grid),
        "rotated": ("by 22 degrees, as the handle is", CENTRE + grid @ rotation(-22).T),
        "deformed": ("along the rim: it becomes straight", around_the_rim(side)),
    }
    figure = Figure(figsize=(12, 5.55))
    axes = figure.subplots(2, 4, height_ratios=[400 / 600, 1])
    figure.subplots_adjust(0.035, 0.012, 0.995, 0.885, wspace=0.04, hspace=0.04)
    for column, (name, (detail, wanted)) in enumerate(columns.items()):
        locations, values = read(photo, wanted)
        draw(axes[:, column], photo, locations, values, PLAIN if name == "regular" else DEFORMED)
        axes[0, column].set_title(name, weight="bold", pad=20, fontsize=11.5)
        axes[0, column].text(0.5, 1.03, detail, transform=axes[0, column].transAxes, ha="center")
    for ax, label in zip(axes[:, 0], ("where the taps read", "what they read"), strict=True):
        ax.set_ylabel(label, fontsize=11, labelpad=8)
    save(figure, options.output, start)


def rotation(degrees: float) -> np.ndarray:
    turn = np.deg2rad(degrees)
    return np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])


def around_the_rim(side: int) -> np.ndarray:
    """Columns go once around the cup's rim, clockwise from the bottom; rows go outwards."""
    angle = np.linspace(-np.pi, np.pi, side) + np.pi / 2
    radius = np.linspace(0.4, 1.25, side)[:, None, None]
    return CUP + radius * RIM * np.stack([np.sin(angle), np.cos(angle)], -1)


def read(photo: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (side*side, 2) that the kernel of one unit reads, and their values."""
    side = len(wanted)
    # A stride this large leaves one unit, whose window begins at pixel (0, 0).
    place = {"stride": 10_000, "dilation": SPACING if side == SIDE else 1}
    rows = np.arange(side) * place["dilation"]
    window = np.stack(np.meshgrid(rows, rows, indexing="ij"), -1)
    offset = (wanted - window).reshape(-1, 1, 1).astype(np.float32)  # {y, x} of each tap in turn
    weight = np.eye(side * side, dtype=np.float32).reshape(-1, 1, side, side)
    channels = np.ascontiguousarray(photo[..., :3].transpose(2, 0, 1))
    values = [dcnlib.deform_conv2d(channel[None], offset, weight, **place) for channel in channels]
    seen = analysis.sampling_locations(offset, (0, 0), kernel_size=side, **place)
    return seen.locations, np.stack(values, -1).reshape(side, side, 3)


def draw(axes, photo, locations, values, colour) -> None:
    side = len(values)
    corners = locations.reshape(side, side, 2)
    plot.draw_image(axes[0], photo, fade=0.45)
    plot.draw_locations(axes[0], locations, size=6, colour=colour)
    # The first row of taps in gold, so that the two pictures can be compared.
    axes[0].plot(corners[0, :, 1], corners[0, :, 0], color=GOLD, lw=2.2, zorder=4)
    axes[0].set(xlim=(-0.5, photo.shape[1] - 0.5), ylim=(photo.shape[0] - 0.5, -0.5))
    plot.draw_image(axes[1], values)
    axes[1].plot([-0.5, side - 0.5], [-0.5, -0.5], color=GOLD, lw=5, clip_on=False)
    axes[1].spines[:].set_color(INK)


if __name__ == "__main__":
    main()
