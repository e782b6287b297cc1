"""What the examples share: the command line, photographs, and the look of their pictures.

The photographs lie in scikit-image's wheel; they are read where pip has put it and scikit-image
itself, which would pull in much more, is never imported.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import metadata
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.figure import Figure
from PIL import Image

from dcnlib.analysis.plot import DEFORMED, FAINT, INK, PLAIN

__all__ = ["DEFORMED", "FAINT", "INK", "PLAIN", "Figure"]

PHOTOGRAPHS = "scikit-image==0.26.0"
GOLD = "#d99a1c"  # a third colour that colour-blind readers can tell from the other two

matplotlib.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "savefig.facecolor": "white",
    }
)


def arguments(script: str, text: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The options that every example has; `output` is the path of its picture."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("example-output"),
        metavar="DIR",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a run of seconds that shows that everything works; its picture means nothing",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    options.output = options.output / Path(script).with_suffix(".png").name
    return options


def photograph(name: str) -> np.ndarray:
    """One of scikit-image's photographs, (H, W) or (H, W, 3), float32 in [0, 1]."""
    try:
        path = metadata.distribution("scikit-image").locate_file(f"skimage/data/{name}.png")
        return np.asarray(Image.open(str(path)), np.float32) / 255
    except (metadata.PackageNotFoundError, FileNotFoundError):
        sys.exit(
            "the photographs are missing; install the package that carries them: "
            f"python -m pip install --no-deps {PHOTOGRAPHS}"
        )


def save(figure: Figure, path: Path, start: float) -> None:
    """Write the picture in 255 colours, which keeps it small, and say where it is."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=104)
    picture = Image.open(buffer).convert("RGB")
    # The few dots on a large photograph have to get their colours, too.
    method = Image.Quantize.MAXCOVERAGE
    picture = picture.quantize(255, method, kmeans=4, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    seconds = time.perf_counter() - start
    print(f"{path.resolve()} ({path.stat().st_size / 1000:.0f} kB, {seconds:.0f} s)")
