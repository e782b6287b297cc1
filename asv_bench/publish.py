"""Makes pages of the results that open without a network, and without a server.

    python asv_bench/publish.py                    asv_bench/html/index.html and report.html
    python asv_bench/publish.py --figures docs/figures     the report's pictures alone, there

index.html is asv's own site with its libraries beside it and its data inside; it needs asv, and npm
the first time. report.html is drawn by matplotlib from the result files and needs nothing else.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent.resolve()
VENDOR = HERE / "html-vendor"

#: What asv's page loads from elsewhere: npm's package and the file in it, all MIT.
LIBRARIES = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
#: Browsers refuse to read files for a page that is a file: the page carries them itself.
_SHIM = """
(function () {
  var ajax = $.ajax;
  $.ajax = function (request) {
    var name = decodeURIComponent(request.url.split('?')[0]);
    var loaded = $.Deferred();
    if (!(name in window.ASV_FILES)) {
      if (window.location.protocol !== 'file:') { return ajax(request); }
      setTimeout(function () {
        if (request.dataType === 'text') { loaded.resolve(''); } else { loaded.reject(); }
      }, 0);
      return loaded.promise();
    }
    setTimeout(function () { loaded.resolve(window.ASV_FILES[name]); }, 0);
    return loaded.promise();
  };
})();
"""


class Unavailable(Exception):
    """What is missing, for the user."""


class Result(NamedTuple):
    """One commit on one machine."""

    machine: str
    commit: str
    date: int
    values: dict[str, dict[tuple[str, ...], float]]  # benchmark -> parameters -> figure


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    results = load(Path(options.results))
    if not results:
        print(f"publish: there are no results in {options.results}", file=sys.stderr)
        return 2
    if options.figures:
        for path in draw(results, Path(options.figures)):
            print(path)
        return 0
    pages = Path(options.html)
    shutil.rmtree(pages, ignore_errors=True)
    try:
        site(pages, Path(options.results))
        print(pages / "index.html")
    except Unavailable as error:
        print(f"publish: asv's own pages are left out: {error}")
    print(report(results, pages))
    return 0


# --- asv's site -----------------------------------------------------------------------------------


def site(pages: Path, results: Path) -> None:
    """asv's pages, made to open from the disk."""
    if importlib.util.find_spec("asv") is None:
        raise Unavailable("asv is not installed")
    libraries()
    with tempfile.TemporaryDirectory() as folder:
        # asv reads all paths from its configuration.
        config = json.loads(_without_comments((HERE / "asv.conf.json").read_text()))
        config |= {"repo": str(HERE.parent), "benchmark_dir": str(HERE / "benchmarks")}
        config |= {"results_dir": str(results.resolve()), "html_dir": str(pages.resolve())}
        config |= {"env_dir": f"{folder}/env"}
        path = Path(folder) / "asv.conf.json"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "asv", "publish", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"asv publish failed: {(done.stderr or done.stdout)[-1000:]}")
    offline(pages)


def offline(pages: Path) -> None:
    """Libraries beside the page, data in a script, no other host."""
    shutil.copytree(VENDOR, pages / "vendor")
    files = {
        path.relative_to(pages).as_posix(): json.loads(path.read_text())
        for path in sorted(pages.rglob("*.json"))
    }
    data = json.dumps(files, separators=(",", ":")).replace("</", "<\\/")
    (pages / "data.js").write_text(f"window.ASV_FILES = {data};\n{_SHIM}")
    page = (pages / "index.html").read_text()
    for name in LIBRARIES:
        page = re.sub(
            rf'(src|href)="https?://[^"]*/{re.escape(name)}"', rf'\1="vendor/{name}"', page
        )
    page = re.sub(r'\s(integrity|crossorigin|referrerpolicy)="[^"]*"', "", page)
    # The data has to be there before asv.js asks for it, and after jQuery.
    start = page.rindex("<script", 0, page.index("asv.js"))
    page = f'{page[:start]}<script src="data.js"></script>\n    {page[start:]}'
    outside = loads_from_elsewhere(page)
    if outside:
        raise Unavailable(f"asv's page loads {outside[0]}, which this script does not know")
    (pages / "index.html").write_text(page)


def loads_from_elsewhere(page: str) -> list[str]:
    """Addresses of other hosts that a browser would fetch; mere links are not fetched."""
    fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*", page)
    return [
        url for tag in fetched for url in re.findall(r'(?:src|href)="((?:https?:)?//[^"]*)"', tag)
    ]


def libraries() -> None:
    """`LIBRARIES` in html-vendor, from npm the first time."""
    if all((VENDOR / name).exists() for name in LIBRARIES):
        return
    if shutil.which("npm") is None:
        raise Unavailable("its libraries come from npm, which is not installed")
    VENDOR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for package in sorted({package for package, _ in LIBRARIES.values()}):
            command = ["npm", "pack", "--silent", "--pack-destination", folder, package]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
            if done.returncode:
                raise Unavailable(f"npm pack {package} failed: {done.stderr.strip()[-500:]}")
            with tarfile.open(Path(folder) / done.stdout.split()[-1]) as archive:
                for name, (source, inside) in LIBRARIES.items():
                    if source == package:
                        member = archive.extractfile(f"package/{inside}")
                        (VENDOR / name).write_bytes(member.read())


def _without_comments(text: str) -> str:
    return re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)


# --- the plain report -----------------------------------------------------------------------------


def load(folder: Path) -> list[Result]:
    """All result files, oldest commit first; several files of a commit and machine become one."""
    found: dict[tuple[str, str], Result] = {}
    for path in sorted(folder.glob("*/*.json")):
        if path.name == "machine.json":
            continue
        content = json.loads(path.read_text())
        columns = content["result_columns"]
        values = {
            name: _figures(dict(zip(columns, row, strict=False)))
            for name, row in content["results"].items()
        }
        key = (path.parent.name, content["commit_hash"])
        old = found.get(key)
        merged = (old.values if old else {}) | {name: v for name, v in values.items() if v}
        found[key] = Result(*key, content["date"], merged)
    return sorted(found.values(), key=lambda result: result.date)


def _figures(row: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """The figure of each combination of parameters that has one.

    Of a time the lower quartile of its samples: other programs only ever make it longer.
    """
    combinations = itertools.product(*row.get("params", []))
    names = (tuple(value.strip("'") for value in values) for values in combinations)
    results = row["result"] or []
    quartiles = row.get("stats_q_25") or [None] * len(results)
    results = [
        value if quartile is None else quartile
        for value, quartile in zip(results, quartiles, strict=True)
    ]
    return {
        name: value
        for name, value in zip(names, results, strict=False)
        if value is not None and not math.isnan(value)
    }


def report(results: list[Result], pages: Path) -> Path:
    """report.html with its pictures beside it."""
    pages.mkdir(parents=True, exist_ok=True)
    pictures = draw(results, pages)
    machines = sorted({result.machine for result in results})
    newest = {m: [r for r in results if r.machine == m][-1] for m in machines}
    rows = "".join(
        f"<tr><td>{html.escape(m)}</td><td>{sum(r.machine == m for r in results)}</td>"
        f"<td>{newest[m].commit[:10]}</td></tr>"
        for m in machines
    )
    images = "".join(f'<p><img src="{path.name}" alt="{path.stem}"></p>' for path in pictures)
    page = pages / "report.html"
    page.write_text(
        "<!doctype html><html><head><meta charset='utf-8'><title>dcnlib: benchmarks</title><style>"
        "body{font:15px/1.5 sans-serif;color:#22303c;max-width:1100px;margin:2em auto}"
        "img{max-width:100%}td,th{padding:.2em 1em;text-align:left}</style></head><body>"
        "<h1>dcnlib: benchmarks over the commits</h1>"
        "<table><tr><th>machine</th><th>commits</th><th>newest</th></tr>"
        f"{rows}</table>{images}</body></html>\n"
    )
    return page


def draw(results: list[Result], folder: Path) -> list[Path]:
    """The pictures of the report: history of each machine, throughput of each backend."""
    folder.mkdir(parents=True, exist_ok=True)
    plt = _pyplot()
    drawn = []
    for backend in ("cpu", "cuda"):
        mine = [r for r in results if _grid(r, "grid.Time.time_call", backend)]
        if not mine:
            continue
        machine = max({r.machine for r in mine}, key=lambda m: sum(r.machine == m for r in mine))
        mine = [r for r in mine if r.machine == machine]
        for kind, picture in (
            ("history", history(plt, mine, backend)),
            ("throughput", throughput(plt, mine[-1], backend)),
        ):
            path = folder / f"asv_{kind}_{backend}.png"
            picture.savefig(path, dpi=120, metadata={"Software": None})
            plt.close(picture)
            drawn.append(path)
    return drawn


def history(plt: Any, results: list[Result], backend: str) -> Any:
    """Time and memory over the commits, for each kernel size at stride 1 and dilation 1."""
    picture, axes = plt.subplots(2, 2, figsize=(11, 6.6), sharex=True)
    places = range(len(results))
    colours = dict(zip("1357", ("#9aa7b3", "#1f6f8b", "#d1495b", "#e3a857"), strict=True))
    for column, direction in enumerate(("forward", "backward")):
        for (row, name, scale) in ((0, "grid.Time.time_call", 1e3),
                                   (1, "grid.Memory.track_extra_bytes", 2**-20)):  # fmt: skip
            ax = axes[row][column]
            for kernel, colour in colours.items():
                key = (kernel, "1", "1", direction)
                series = [_grid(result, name, backend).get(key) for result in results]
                points = [(x, scale * y) for x, y in zip(places, series, strict=True) if y]
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, lw=1.4,
                            label=f"{kernel} x {kernel}")  # fmt: skip
            ax.set_yscale("log" if row == 0 else "linear")
            if row:
                ax.set_ylim(bottom=0)
            ax.grid(axis="y", color="#d5dbe1", lw=0.6)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(f"{direction}: {('processor time, ms', 'memory of a call, MB')[row]}",
                         loc="left", fontsize=10)  # fmt: skip
            ax.set_xticks(places, [r.commit[:8] for r in results], rotation=60, fontsize=7)
    for ax in axes[0]:
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
                 if ax.get_ylim()[0] <= t <= ax.get_ylim()[1]]  # fmt: skip
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="upper right", ncols=4, frameon=False)
    picture.suptitle(f"128 channels, 28 x 28, backend {backend}, one thread, {results[0].machine}",
                     x=0.01, ha="left", fontsize=11)  # fmt: skip
    picture.tight_layout()
    return picture


def throughput(plt: Any, result: Result, backend: str) -> Any:
    """GFLOP/s over kernel x stride x dilation, from the times of the grid."""
    times = _grid(result, "grid.Time.time_call", backend)
    columns = [(s, d) for s in "12" for d in "123"]
    picture, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    for ax, direction in zip(axes, ("forward", "backward"), strict=True):
        cells = [
            [
                _gflops(times.get((k, s, d, direction)), int(k), int(s), direction)
                for s, d in columns
            ]
            for k in "1357"
        ]
        known = [value for line in cells for value in line if not math.isnan(value)]
        ax.imshow(cells, cmap="YlGnBu", aspect="auto", vmin=0, vmax=1.15 * max(known))
        for y, x in itertools.product(range(4), range(6)):
            value = cells[y][x]
            ax.text(x, y, "" if math.isnan(value) else f"{value:.0f}", ha="center", va="center",
                    color="white" if value > 0.6 * max(known) else "#22303c")  # fmt: skip
        ax.set_xticks(range(6), [f"{s}, {d}" for s, d in columns])
        ax.set_yticks(range(4), [f"{k} x {k}" for k in "1357"])
        ax.set_xlabel("stride, dilation")
        ax.set_title(f"{direction}: GFLOP/s of the convolution", loc="left", fontsize=10)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    picture.suptitle(f"128 channels, 28 x 28, backend {backend}, {result.machine}, "
                     f"{result.commit[:8]}", x=0.01, ha="left", fontsize=11)  # fmt: skip
    picture.tight_layout()
    return picture


def _gflops(seconds: float | None, kernel: str, stride: str, direction: str) -> float:
    if not seconds:
        return math.nan
    macs = (
        int(kernel) ** 2
        * 128
        * 128
        * (28 // int(stride)) ** 2
        * (1 if direction == "forward" else 2)
    )
    return 2e-9 * macs / seconds


def _grid(result: Result, name: str, backend: str) -> dict[tuple[str, ...], float]:
    values = result.values.get(name, {})
    return {key[1:]: value for key, value in values.items() if key[0] == backend}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 9, "text.color": "#22303c",
         "axes.labelcolor": "#22303c", "figure.facecolor": "white"}
    )  # fmt: skip
    return plt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=str(HERE / "results"), metavar="DIR")
    parser.add_argument("--html", default=str(HERE / "html"), metavar="DIR")
    parser.add_argument("--figures", metavar="DIR", help="only the pictures, there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
