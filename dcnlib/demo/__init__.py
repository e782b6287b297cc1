"""`python -m dcnlib demo`: does letting the taps move help? On real digits, in minutes.

The same small network is trained three times on deformed handwritten digits (`digits`): plain,
plain with one more layer, and with two deformable layers (`networks`). A table and a picture
(`figure`) show the outcome. Then the deformable network runs without torch (`device`).
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from .._info import summary
from .._markdown import table
from .._problem import integer
from .digits import PACKAGE, deformed_digits


class _Size(NamedTuple):
    train: int
    test: int
    epochs: int
    seeds: int


SIZES = {
    "quick": _Size(500, 250, 2, 1),
    "default": _Size(4000, 1000, 12, 1),
    "full": _Size(4000, 1000, 12, 3),
}

BLOCK = "demo table"
_HEADS = ("network", "test accuracy", "parameters", "ms per step", "training")
_BAR = "{desc:<28} {percentage:3.0f} % |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"


def run(size: str = "default", output: str | Path = "demo-output", seed: int = 0) -> list:
    """Train, print, draw; the results of all runs (`networks.Result`)."""
    _require("torch", "tqdm", "matplotlib", "safetensors")
    seed = integer("demo", "seed", seed, 0)
    path = Path(output) / "demo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"demo: output: {path.parent} cannot be written to")
    import torch
    from tqdm import tqdm

    from . import device, figure, networks

    train, test, epochs, seeds = SIZES[size]
    print(summary())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"data: {train} training and {test} test digits (MNIST), turned, stretched and bent\n")
    data = deformed_digits(train, test)

    results = []
    steps = epochs * (train // networks.BATCH)
    bars = {"bar_format": _BAR, "ncols": 96, "mininterval": 0.2 if sys.stderr.isatty() else 10}
    for number in range(seed, seed + seeds):
        for name in networks.NAMES:
            label = name if seeds == 1 else f"{name}, seed {number}"
            with tqdm(total=steps, desc=label, **bars) as bar:

                def advance(accuracy: float | None, bar: tqdm = bar) -> None:
                    if accuracy is None:
                        bar.update()
                    else:
                        bar.set_postfix_str(f"test {accuracy:.1f} %")

                results.append(networks.train(name, data, epochs, number, advance))
    print("\n" + text(results))

    figure.draw(results, data[1], path)
    print(f"\nfigure: {path.resolve()}\n")

    model = path.with_name("deformable.safetensors")
    last = next(r for r in reversed(results) if r.name == networks.DEFORMABLE)
    print(device.text(device.run(last.network, data[1], model), model))
    return results


def text(results: list) -> str:
    """The table for a terminal."""
    lines = ["{:<21} {:>15} {:>11} {:>12} {:>9}".format(*_HEADS)]
    lines += ["{:<21} {:>15} {:>11} {:>12} {:>9}".format(*cells) for cells in _rows(results)]
    return "\n".join(lines)


def markdown(results: list) -> str:
    """The table for the README, and what it was made on."""
    from torch import __version__ as torch_version

    return f"{table(_HEADS, _rows(results))}\n\n{summary()}, torch {torch_version}."


def _rows(results: list) -> list[list[str]]:
    """A line a network: mean over the seeds, with the standard deviation if there are several."""
    rows = []
    for name in dict.fromkeys(result.name for result in results):
        runs = [result for result in results if result.name == name]
        final = [run.accuracy[-1] for run in runs]
        spread = f" ± {statistics.stdev(final):.1f}" if len(runs) > 1 else ""
        rows.append(
            [
                name,
                f"{statistics.mean(final):.1f}{spread} %",
                f"{runs[0].parameters:,}",
                f"{statistics.median(run.step_ms for run in runs):.1f}",
                f"{statistics.mean(run.seconds for run in runs):.0f} s",
            ]
        )
    return rows


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"the demo also needs {', '.join(missing)}; install with: python -m pip install "
            f"{' '.join(missing)} && python -m pip install --no-deps {PACKAGE}"
        )
