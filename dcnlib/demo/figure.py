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

from .digits import Digits
from .networks import DEEPER, DEFORMABLE, PLAIN, Result

_COLOUR = {PLAIN: "#1f6f8b", DEEPER: "#77828d", DEFORMABLE: "#d1495b"}
_INK, _FAINT = "#22303c", "#d5dbe1"
_SHOWN = (3, 6, 2, 7, 4, 8)  # one digit of each
_TAPS = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], float)
_WIDTH, _HEIGHT = 10.5, 6.2  # inches
_LEFT, _GAP = 0.012, 0.01  # shares of the width


def draw(results: list[Result], test: Digits, path: Path) -> None:
    """Write the figure as PNG. `results` may hold several seeds of each network."""
    colours = {"text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK}
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


def sampling_points(
    network: nn.Sequential, image: np.ndarray, centre: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """What unit `centre` (row, column) of the last 8 x 8 map reads, through both deformable layers.

    Returns the 81 positions (y, x) in pixels of the 32 x 32 canvas and their weights, the products
    of the two masks relative to the largest.
    """
    packs = [layer for layer in network if hasattr(layer, "conv_offset")]
    predicted: list[np.ndarray] = []
    hooks = [
        pack.conv_offset.register_forward_hook(lambda _m, _i, out: predicted.append(out[0].numpy()))
        for pack in packs
    ]
    network.eval()
    with torch.no_grad():
        network(torch.from_numpy(image[None]))
    for hook in hooks:
        hook.remove()

    on_16, on_8 = predicted
    points, weights = [], []
    for p8, mask8 in zip(*_taps_at(on_8, centre), strict=True):
        p16 = 2 * p8 + 0.5  # the middle of the 2 x 2 pixels that were pooled
        unit = np.clip(np.rint(p16), 0, 15).astype(int)
        taps, masks = _taps_at(on_16, (unit[0], unit[1]))
        points.append(2 * (taps - unit + p16) + 0.5)
        weights.append(mask8 * masks)
    weight = np.concatenate(weights)
    return np.concatenate(points), weight / weight.max()


def _taps_at(predicted: np.ndarray, unit: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The nine positions (y, x) that `unit` samples and their mask values."""
    channels = predicted[:, unit[0], unit[1]]
    offset, mask = channels[:18].reshape(9, 2), channels[18:]
    return unit + _TAPS + offset, 1 / (1 + np.exp(-mask))


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
        points, weight = sampling_points(network, image, unit)
        plain = 4 * np.array(unit) + 1.5 + (4 * _TAPS[:, None] + 2 * _TAPS).reshape(-1, 2)
        place = (_LEFT + column * (width + _GAP), 0.65, width, width * _WIDTH / _HEIGHT)
        ax = figure.add_axes(place)
        ax.imshow(ink, cmap="Greys", vmax=2 * ink.max(), interpolation="nearest")
        ax.scatter(plain[:, 1], plain[:, 0], s=5, color=_COLOUR[PLAIN], alpha=0.6, lw=0)
        order = np.argsort(weight)
        ax.scatter(
            points[order, 1], points[order, 0], s=14, color=_COLOUR[DEFORMABLE],
            alpha=0.12 + 0.88 * weight[order], ec="white", lw=0.3,
        )  # fmt: skip
        ax.set(xlim=(-0.5, 31.5), ylim=(31.5, -0.5), xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_color(_FAINT)


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
