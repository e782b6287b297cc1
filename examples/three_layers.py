"""What units on a coin and beside it read, through one, two and three deformable layers.

A small network learns to find the coins of a photograph and their sizes (`coins.py`). Each row follows
one unit of its output: the nine taps of the last layer, the 81 that these nine units read one layer
below, and the 729 of three layers. Units on coins spread over the whole coin, large or small.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from coins import PIXEL, pictures, to_pixels, to_units, train
from common import DEFORMED, INK, PLAIN, Figure, arguments, save
from dcnlib import analysis
from dcnlib.analysis import plot

STEPS = 400
VIEW = 54  # pixels from the middle of a close-up to its side
UNITS = {"large coin": (187, 347), "small coin": (198, 154), "background": (90, 186)}
DEPTHS = ("last layer: 9 taps", "last two layers: 81", "all three layers: 729")
_STEP = np.array([-1, 0, 1])


def main(argv: list[str] | None = None) -> None:
    options = arguments(__file__, __doc__, argv)
    start = time.perf_counter()
    torch.set_num_threads(2)
    network = train("modulated (v2)", 3 if options.quick else STEPS, options.seed)
    photo, view = pictures()
    layers = analysis.record_layers(network, torch.from_numpy(view[None, None]))
    deformable = [layer for layer in layers if layer.offset is not None]
    for row in analysis.offset_statistics(deformable):
        print(
            f"layer {row.name}: offsets of {row.length[2]:.1f} units in the median, "
            f"effective dilation {row.effective_dilation:.2f}"
        )

    figure = Figure(figsize=(11, 5.6))
    grid = figure.add_gridspec(
        3, 4, width_ratios=[3.06, 1, 1, 1], left=0.008, right=0.995, bottom=0.012, top=0.945,
        wspace=0.02, hspace=0.025,
    )  # fmt: skip
    overview(figure.add_subplot(grid[:, 0]), photo)
    for row, (name, place) in enumerate(UNITS.items()):
        for depth, title in enumerate(DEPTHS, 1):
            ax = figure.add_subplot(grid[row, depth])
            seen = analysis.sampling_locations(deformable[-depth:], to_units(np.array(place)))
            close_up(ax, photo, place, seen, depth)
            if row == 0:
                ax.set_title(title, fontsize=10, weight="bold")
            if depth == 1:
                ax.text(
                    0.03, 0.96, name, transform=ax.transAxes, va="top", weight="bold",
                    bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 2}, zorder=6,
                )  # fmt: skip
    save(figure, options.output, start)


def overview(ax, photo: np.ndarray) -> None:
    plot.draw_image(ax, photo, fade=0.15)
    ax.set_anchor("N")
    for name, (row, column) in UNITS.items():
        top, left = window((row, column), photo.shape)
        corner = (left, top)
        ax.add_patch(Rectangle(corner, 2 * VIEW, 2 * VIEW, fc="none", ec="white", lw=1.6))
        ax.text(
            corner[0] + 5, corner[1] + 6, name, color="white", va="top", fontsize=9, weight="bold",
            bbox={"fc": INK, "ec": "none", "alpha": 0.7, "pad": 2},
        )  # fmt: skip
    ax.set(xlim=(-0.5, photo.shape[1] - 0.5), ylim=(photo.shape[0] - 0.5, -0.5))
    dot = {"marker": "o", "ls": "", "mec": "white", "mew": 0.4}
    ax.legend(
        [
            Line2D([], [], color=DEFORMED, ms=7, **dot),
            Line2D([], [], color=PLAIN, ms=5, **dot),
            Line2D([], [], color=INK, marker="+", ms=11, mew=2, ls=""),
        ],
        [
            "what the unit reads: darker where the masks are larger",
            "what it would read without offsets",
            "the unit",
        ],
        loc="upper left", bbox_to_anchor=(-0.015, -0.02), frameon=False, fontsize=10.5,
        labelspacing=0.6, handletextpad=0.3,
    )  # fmt: skip


def close_up(ax, photo, place, seen, depth: int) -> None:
    plot.draw_image(ax, photo, fade=0.5)
    regular = np.zeros((1, 2))
    for _ in range(depth):
        taps = np.stack(np.meshgrid(_STEP, _STEP, indexing="ij"), -1).reshape(-1, 2)
        regular = (regular[:, None] + taps).reshape(-1, 2)
    at = np.array(place) + PIXEL * np.unique(regular, axis=0)
    plot.draw_locations(ax, to_pixels(seen.locations), seen.weight, size=(64, 36, 18)[depth - 1])
    plot.draw_locations(ax, at, size=9, colour=PLAIN).set_zorder(4)
    ax.plot(place[1], place[0], "+", color=INK, ms=13, mew=2.2, zorder=5)
    top, left = window(place, photo.shape)
    ax.set(xlim=(left, left + 2 * VIEW), ylim=(top + 2 * VIEW, top))


def window(place, size) -> tuple[float, float]:
    """The corner (top, left) of a close-up around a place, all of it on the photograph."""
    top, left = np.clip(np.array(place) - VIEW, -0.5, np.array(size) - 0.5 - 2 * VIEW)
    return top, left


if __name__ == "__main__":
    main()
