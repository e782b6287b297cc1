"""Three instruments on three networks: what does a unit on a coin look at?

A plain, a deformable and a modulated network learn the sizes of coins (`coins.py`). For the features of
the unit in the middle of one coin, the rows show the effective receptive field, the samples that they
depend on in all three layers, and the smallest part of the picture that keeps them as they are.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from tqdm import tqdm

from coins import LAYERS, PIXEL, errors, pictures, train
from common import DEFORMED, PLAIN, Figure, arguments, save
from dcnlib import analysis
from dcnlib.analysis import plot

STEPS, SALIENCY_STEPS = 300, 60
PLACE = (46, 86)  # the unit: in the middle of the largest coin
PIECE = (slice(28, 64), slice(60, 96))  # what is looked at, in units
LAYER = "11"  # the last ReLU: the 16 features from which the answer is made
BOUND = 0.2
FAINTEST = 0.03  # samples with less than this share of the largest gradient are not drawn
ROWS = (
    "effective receptive field\n(denser: larger gradient)",
    "effective sampling locations\n(darker: larger gradient)",
    "error-bounded saliency\n(outlined: what is kept)",
)


def main(argv: list[str] | None = None) -> None:
    options = arguments(__file__, __doc__, argv)
    start = time.perf_counter()
    torch.set_num_threads(2)
    photo, view = pictures()
    piece = torch.from_numpy(np.ascontiguousarray(view[PIECE]))[None, None]
    shown = photo[tuple(slice(PIXEL * s.start, PIXEL * s.stop) for s in PIECE)]
    unit = (PLACE[0] - PIECE[0].start, PLACE[1] - PIECE[1].start)
    background = float(np.median(view))

    figure = Figure(figsize=(8.6, 8.8))
    axes = figure.subplots(3, 3)
    figure.subplots_adjust(0.075, 0.035, 0.995, 0.94, wspace=0.03, hspace=0.12)
    for column, name in enumerate(LAYERS):
        network = train(name, 3 if options.quick else STEPS, options.seed)
        colour = PLAIN if name == "plain" else DEFORMED
        _, size = errors(network, view)
        ax = axes[0, column]
        ax.set_title(name, weight="bold", fontsize=12, pad=22)
        ax.text(0.5, 1.025, f"sizes within {size:.1f} px", transform=ax.transAxes, ha="center")

        field = analysis.effective_receptive_field(network, piece, unit, layer=LAYER)
        plot.draw_image(axes[0, column], shown, fade=0.5)
        plot.draw_receptive_field(axes[0, column], enlarged(field.magnitude[0]), colour=colour)
        pixels = PIXEL**2 * int(field.size(0.9)[0])
        note(axes[0, column], f"90 % of the gradient in {pixels:,} px")

        rows = analysis.effective_sampling_locations(network, piece, unit, layer=LAYER)
        at = np.concatenate([row.on_image(shown.shape).reshape(-1, 2) for row in rows])
        strength = np.concatenate([row.magnitude.ravel() for row in rows])
        strength[strength < FAINTEST * strength.max()] = 0
        plot.draw_image(axes[1, column], shown, fade=0.5)
        plot.draw_locations(axes[1, column], at, strength, size=24, colour=colour)
        note(axes[1, column], f"{np.count_nonzero(strength):,} samples in three layers")

        steps = 3 if options.quick else SALIENCY_STEPS
        with tqdm(desc="saliency       ", ncols=80) as bar:

            def advance(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update()

            found = analysis.error_bounded_saliency(
                network, piece, unit, layer=LAYER, bound=BOUND, baseline=background,
                cell=8 if options.quick else 2, steps=steps, seed=options.seed, progress=advance,
            )  # fmt: skip
        plot.draw_saliency(axes[2, column], shown, enlarged(found.mask), colour=colour)
        kept = PIXEL**2 * int(found.mask.sum())
        note(axes[2, column], f"{kept:,} px are enough (error {100 * found.error:.0f} %)")

    for ax, label in zip(axes[:, 0], ROWS, strict=True):
        ax.set_ylabel(label, fontsize=11, labelpad=6)
    for ax in axes.flat:
        middle = [PIXEL * (index + 0.5) - 0.5 for index in unit]
        ax.plot(middle[1], middle[0], "+", color="black", ms=11, mew=1.8, zorder=5)
        ax.set(xlim=(-0.5, shown.shape[1] - 0.5), ylim=(shown.shape[0] - 0.5, -0.5))
    save(figure, options.output, start)


def enlarged(array: np.ndarray) -> np.ndarray:
    """Units as squares of pixels of the photograph."""
    return array.repeat(PIXEL, 0).repeat(PIXEL, 1)


def note(ax, text: str) -> None:
    ax.set_xlabel(text, fontsize=9.5, labelpad=4)


if __name__ == "__main__":
    main()
