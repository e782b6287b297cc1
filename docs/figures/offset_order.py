"""The channels of `offset` and `mask`, and the tap that each one moves.

Run ``python docs/figures/offset_order.py``; it writes the PNG of the same name.
"""

from __future__ import annotations

from matplotlib.patches import Rectangle
from matplotlib.transforms import blended_transform_factory
from style import CENTRE, INK, MOVED, REGULAR, plt, save

TAPS = [(i, j) for i in range(3) for j in range(3)]
SHADES = {"y": "#dcebf1", "x": "#f7dfe1", "m": "#ece9dd"}
UNIT = 1.0


def cell(ax, x, y, text, shade, width=UNIT, colour=INK):
    ax.add_patch(Rectangle((x, y), width, UNIT, fc=shade, ec="white", lw=1.5))
    ax.text(x + width / 2, y + UNIT / 2, text, ha="center", va="center", fontsize=9, color=colour)


figure, (strip, kernel) = plt.subplots(
    1, 2, figsize=(12.5, 3.5), width_ratios=[2.7, 1], gridspec_kw={"wspace": 0.02}
)

# Left: the channel axis of one offset group.
left = 0.0
for k, (i, j) in enumerate(TAPS):
    for a, axis in enumerate("yx"):
        channel = 2 * k + a
        cell(strip, left + channel, 0, str(channel), SHADES[axis])
        strip.text(
            left + channel + 0.5, 1.32, axis, ha="center", va="center", fontsize=9,
            color=CENTRE if axis == "y" else MOVED, weight="bold",
        )  # fmt: skip
    middle = left + 2 * k + 1
    strip.plot([middle - 0.9, middle + 0.9], [-0.25, -0.25], color=REGULAR, lw=1)
    strip.text(middle, -0.65, f"({i}, {j})", ha="center", va="center", fontsize=9)
    cell(strip, left + 2 * k, -2.45, str(k), SHADES["m"], width=2)
strip.text(0, 2.15, "offset: 2 channels a tap, first y (down), then x (right), in input pixels",
           fontsize=10.5, weight="bold")  # fmt: skip
strip.text(-0.35, -0.65, "tap (i, j)", ha="right", va="center", fontsize=9, color=INK)
strip.text(-0.35, 0.5, "channel", ha="right", va="center", fontsize=9, color=INK)
strip.text(-0.35, -1.95, "channel", ha="right", va="center", fontsize=9, color=INK)
strip.text(0, -3.1, "mask: 1 channel a tap", fontsize=10.5, weight="bold", va="center")
strip.text(
    0, -4.15,
    "With offset groups the whole strip repeats: group g starts at channel g*2*KH*KW of offset\n"
    "and at g*KH*KW of mask, and moves input channels g*C/G to (g+1)*C/G - 1.",
    fontsize=9.5, va="center", linespacing=1.5,
)  # fmt: skip
strip.set_xlim(-2.6, 18.3)
strip.set_ylim(-4.9, 2.8)
strip.axis("off")

# Right: the taps of the kernel, and one of them moving.
for k, (i, j) in enumerate(TAPS):
    cell(kernel, j * 1.65, -i * 1.35, f"{2 * k}, {2 * k + 1}", "#eef1f4", width=1.4)
start = (2 * 1.65 + 0.7, 0.5)
arrow = {"arrowstyle": "-|>", "lw": 1.6, "mutation_scale": 12, "shrinkA": 0}
for tip, tail, colour in (
    ((start[0], -0.62), (start[0], 0.2), CENTRE),
    ((start[0] + 1.6, 0.5), (start[0] + 0.5, 0.5), MOVED),
):
    kernel.annotate("", tip, tail, zorder=5, arrowprops=arrow | {"color": colour})
kernel.text(
    start[0] + 0.85, -0.18, "4 moves down", color=CENTRE, fontsize=9, weight="bold", va="center"
)
kernel.text(
    start[0] + 0.85, 0.9, "5 moves right", color=MOVED, fontsize=9, weight="bold", va="center"
)
level = blended_transform_factory(kernel.transData, strip.transData)
kernel.text(0, 2.15, "the taps of a 3 x 3 kernel", fontsize=10.5, weight="bold", transform=level)
kernel.set_xlim(-0.4, 7.7)
kernel.set_ylim(-4.2, 2.3)
kernel.set_aspect("equal")
kernel.axis("off")
save(figure, __file__)
