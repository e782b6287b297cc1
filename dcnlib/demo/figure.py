"""The demo's picture: where the trained deformable layers look, and how the networks learnt."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from .digits import Digits
from .networks import DEEPER, DEFORMABLE, PLAIN, Result

_COLOUR = {PLAIN: "#9aa7b3", DEEPER: "#1f6f8b", DEFORMABLE: "#d1495b"}
_INK = "#22303c"
_SHOWN = (3, 6, 2, 7, 4, 8)  # one digit of each
_TAPS = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], float)


def draw(results: list[Result], test: Digits, path: Path) -> None:
    """Write the figure as PNG. `results` may hold several seeds of each network."""
    with matplotlib.rc_context({"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK}):
        figure = Figure(figsize=(10.5, 6.6), dpi=120, layout="constrained", facecolor="white")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.35], hspace=0.04)
        deformable = next(r for r in results if r.name == DEFORMABLE)
        _draw_samples(above, deformable.network, test)
        _draw_curves(below, results)
        figure.savefig(path)


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


def _draw_samples(figure, network, test: Digits) -> None:
    figure.suptitle(
        "What one unit of the last layer looks at: its 81 samples, and those of a plain network",
        fontsize=11,
    )
    for ax, digit in zip(figure.subplots(1, len(_SHOWN)), _SHOWN, strict=True):
        image = test.images[np.flatnonzero(test.labels == digit)[0]]
        ink = np.clip(image[0] - image.min(), 0, None)
        where = (np.indices(ink.shape) * ink).sum((1, 2)) / ink.sum()
        unit = tuple(np.clip(where // 4, 0, 7).astype(int))
        points, weight = sampling_points(network, image, unit)
        plain = 4 * np.array(unit) + 1.5 + (4 * _TAPS[:, None] + 2 * _TAPS).reshape(-1, 2)
        ax.imshow(ink, cmap="Greys", vmax=1.6 * ink.max(), interpolation="nearest")
        ax.scatter(plain[:, 1], plain[:, 0], s=4, color=_COLOUR[DEEPER], alpha=0.45, lw=0)
        ax.scatter(
            points[:, 1], points[:, 0], s=12, color=_COLOUR[DEFORMABLE], alpha=0.25 + 0.75 * weight,
            ec="white", lw=0.3,
        )  # fmt: skip
        ax.set(xlim=(-0.5, 31.5), ylim=(31.5, -0.5), xticks=[], yticks=[])
        for side in ax.spines.values():
            side.set_color("#d5dbe1")


def _draw_curves(figure, results: list[Result]) -> None:
    ax = figure.subplots()
    for name, colour in _COLOUR.items():
        runs = np.array([r.accuracy for r in results if r.name == name])
        epochs = np.arange(1, runs.shape[1] + 1)
        mean = runs.mean(0)
        ax.plot(epochs, mean, color=colour, lw=2.2, marker="o", ms=4, label=name)
        if len(runs) > 1:
            ax.fill_between(epochs, runs.min(0), runs.max(0), color=colour, alpha=0.15, lw=0)
        ax.annotate(
            f"{mean[-1]:.1f} %", (epochs[-1], mean[-1]), (8, 0), textcoords="offset points",
            va="center", color=colour, weight="bold",
        )  # fmt: skip
    ax.set(xlabel="epoch", ylabel="test accuracy in %", ylim=(0, 100), xlim=(0.7, epochs[-1] + 0.9))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="y", color="#e6eaee")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
