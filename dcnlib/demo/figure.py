"""The demo's picture: where the trained deformable layers look, and how the networks learnt."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from ..analysis import plot, sampling_locations
from .digits import Digits
from .networks import DEEPER, DEFORMABLE, PLAIN, Result

_COLOUR = {PLAIN: plot.PLAIN, DEEPER: "#77828d", DEFORMABLE: plot.DEFORMED}
_SHOWN = (3, 6, 2, 7, 4, 8)  # one digit of each
_TAPS = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], float)
_WIDTH, _HEIGHT = 10.5, 6.2  # inches
_LEFT, _GAP = 0.012, 0.01  # shares of the width


def draw(results: list[Result], test: Digits, path: Path) -> None:
    """Write the figure as PNG. `results` may hold several seeds of each network."""
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), plot.INK)
    with matplotlib.rc_context({"font.size": 10, "font.family": "DejaVu Sans", **colours}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=120, facecolor="white")
        _heading(figure, 0.955, "What one unit of the last layer looks at")
        deformable = next(result for result in results if result.name == DEFORMABLE)
        _draw_samples(figure, deformable.network, test)
        _heading(figure, 0.58, "Accuracy on test digits in %")
        _draw_curves(figure.add_axes((0.065, 0.085, 0.665, 0.46)), results)
        figure.savefig(path)


def _heading(figure: Figure, y: float, text: str) -> None:
    figure.text(_LEFT, y, text, fontsize=11.5, weight="bold", va="center")


def _draw_samples(figure: Figure, network: nn.Sequential, test: Digits) -> None:
    """Digits that the network reads right, with the samples of the unit nearest to their middle."""
    figure.legend(
        [_dots(DEFORMABLE, 6), _dots(PLAIN, 4)],
        ["deformable, darker where the masks are larger", "plain"],
        loc="center right", bbox_to_anchor=(1 - _LEFT, 0.955), bbox_transform=figure.transFigure,
        ncols=2, frameon=False, handletextpad=0, columnspacing=1, borderpad=0,
    )  # fmt: skip
    network.eval()
    with torch.no_grad():
        right = network(torch.from_numpy(test.images)).argmax(1).numpy() == test.labels
    width = (1 - 2 * _LEFT - _GAP * (len(_SHOWN) - 1)) / len(_SHOWN)
    for column, digit in enumerate(_SHOWN):
        # One of another class if the network knows none of this one, as after a quick run.
        image = test.images[np.lexsort((~right, test.labels != digit))[0]]
        ink = np.clip(image[0] - image.min(), 0, None)
        where = (np.indices(ink.shape) * ink).sum((1, 2)) / ink.sum()
        unit = tuple(np.clip(where // 4, 0, 7).astype(int))
        seen = sampling_locations(network, unit, input=torch.from_numpy(image[None]))
        plain = 4 * np.array(unit) + 1.5 + (4 * _TAPS[:, None] + 2 * _TAPS).reshape(-1, 2)
        place = (_LEFT + column * (width + _GAP), 0.65, width, width * _WIDTH / _HEIGHT)
        ax = figure.add_axes(place)
        ax.imshow(ink, cmap="Greys", vmax=2 * ink.max(), interpolation="nearest")
        ax.scatter(plain[:, 1], plain[:, 0], s=5, color=_COLOUR[PLAIN], alpha=0.6, lw=0)
        plot.draw_locations(ax, seen)
        ax.set(xlim=(-0.5, 31.5), ylim=(31.5, -0.5), xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_color(plot.FAINT)


def _dots(name: str, size: float) -> Line2D:
    return Line2D([], [], color=_COLOUR[name], marker="o", ms=size, mew=0, ls="")


def _draw_curves(ax: Axes, results: list[Result]) -> None:
    ends = {}
    for name, colour in _COLOUR.items():
        runs = np.array([result.accuracy for result in results if result.name == name])
        epochs = np.arange(1, runs.shape[1] + 1)
        mean = runs.mean(0)
        ax.plot(epochs, mean, color=colour, lw=2.2, marker="o", ms=4)
        label = f"{mean[-1]:.1f} %"
        if len(runs) > 1:
            ax.fill_between(epochs, runs.min(0), runs.max(0), color=colour, alpha=0.15, lw=0)
            label = f"{mean[-1]:.1f} ± {runs[:, -1].std(ddof=1):.1f} %"
        ends[name] = (mean[-1], label)
    lowest = -np.inf
    for name, (height, label) in sorted(ends.items(), key=lambda item: item[1][0]):
        lowest = max(height, lowest + 5.5)  # a line of text
        ax.annotate(
            f"{label}  {name}", (epochs[-1], lowest), (9, 0), textcoords="offset points",
            va="center", color=_COLOUR[name], weight="bold", annotation_clip=False,
        )  # fmt: skip
    ax.set(xlabel="epoch", ylim=(0, 100), xlim=(0.7, epochs[-1] + 0.3))
    ax.set_xticks(epochs)
    ax.grid(axis="y", color="#e6eaee")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
