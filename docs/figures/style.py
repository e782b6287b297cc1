"""Colours and small helpers that the figure scripts of this folder share."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INK = "#22303c"
FAINT = "#d5dbe1"
REGULAR = "#9aa7b3"
MOVED = "#d1495b"
CENTRE = "#1f6f8b"

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.titlesize": 11,
        "figure.dpi": 130,
        "figure.facecolor": "white",
    }
)


def pixels(ax, height: int, width: int) -> None:
    """An empty image: one square a pixel, row 0 on top, no ticks."""
    for row in range(height + 1):
        ax.plot([-0.5, width - 0.5], [row - 0.5] * 2, color=FAINT, lw=0.8, zorder=0)
    for column in range(width + 1):
        ax.plot([column - 0.5] * 2, [-0.5, height - 0.5], color=FAINT, lw=0.8, zorder=0)
    ax.set_xlim(-0.6, width - 0.4)
    ax.set_ylim(height - 0.4, -0.6)
    ax.set_aspect("equal")
    ax.axis("off")


def save(figure, script: str) -> None:
    """Beside the script, under its name."""
    path = Path(script).with_suffix(".png")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    print(path)
