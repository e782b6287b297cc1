"""Where the nine taps of a 3x3 kernel read: regular, deformed, and two special cases.

Run ``python docs/figures/sampling_grids.py``; it writes the PNG of the same name.
"""

from __future__ import annotations

import numpy as np
from style import CENTRE, INK, MOVED, REGULAR, pixels, plt, save

SIDE = 7
GRID = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)], float)  # the taps, (y, x)
FREE = np.array(
    [
        (-0.9, -1.3), (-1.6, 0.5), (-0.5, 1.6),
        (0.7, -1.5), (0.4, 0.3), (-0.9, 1.2),
        (1.5, -0.2), (0.6, 0.7), (1.4, 0.9),
    ]
)  # fmt: skip
TURN = np.deg2rad(45)
ROTATION = np.array([[np.cos(TURN), np.sin(TURN)], [-np.sin(TURN), np.cos(TURN)]])

PANELS = {
    "regular convolution\nall offsets zero": 0 * GRID,
    "deformable convolution\nan offset for every tap": FREE,
    "scale\nwhat dilation 2 does": GRID,
    "rotation\nby 45 degrees": GRID @ ROTATION.T - GRID,
}

figure, axes = plt.subplots(1, 4, figsize=(11, 3.4))
centre = SIDE // 2
for ax, (title, offset) in zip(axes, PANELS.items(), strict=True):
    pixels(ax, SIDE, SIDE)
    start = GRID + centre
    moved = start + offset
    if offset.any():
        ax.scatter(start[:, 1], start[:, 0], s=34, fc="white", ec=REGULAR, lw=1.2, zorder=2)
    for (y0, x0), (y1, x1) in zip(start, moved, strict=True):
        if np.hypot(y1 - y0, x1 - x0) > 0.3:
            ax.annotate(
                "",
                (x1, y1),
                (x0, y0),
                arrowprops={
                    "arrowstyle": "-|>", "color": INK, "lw": 0.9, "alpha": 0.75,
                    "shrinkA": 2.5, "shrinkB": 3.5, "mutation_scale": 10,
                },
                zorder=3,
            )  # fmt: skip
    colour = MOVED if offset.any() else CENTRE
    ax.scatter(moved[:, 1], moved[:, 0], s=60, color=colour, ec="white", lw=0.8, zorder=4)
    ax.scatter([centre], [centre], s=170, marker="s", fc="none", ec=CENTRE, lw=1.4, zorder=5)
    name, detail = title.split("\n")
    ax.text(centre, -1.55, name, ha="center", fontsize=11.5, weight="bold")
    ax.text(centre, -0.85, detail, ha="center", fontsize=10.5)
figure.tight_layout(w_pad=1.5)
save(figure, __file__)
