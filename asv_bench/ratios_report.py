"""What ratios.py measured as text for a terminal, as the README's table and as its figure."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from dcnlib._bench import PASSES, Layer
from dcnlib._markdown import table
from ratios_layers import CLASSES, GOALS, PEERS, SLACK
from ratios_stages import STAGES

Row = dict[str, Any]


def mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def ratios_of(rows: list[Row], **wanted: str) -> list[float]:
    return [row["ratio"] for row in rows if all(row[key] == value for key, value in wanted.items())]


class Line(NamedTuple):
    """One class of the summary: geometric mean, worst layer, goal and aim of each pass."""

    name: str
    means: list[float]
    worst: list[float]
    goal: tuple[float, float]
    aim: tuple[float, float]

    @property
    def reached(self) -> bool:
        """In the mean, and no single layer far behind."""
        pairs = zip(self.means, self.worst, self.goal, strict=True)
        return all(mean <= goal and worst <= SLACK * goal for mean, worst, goal in pairs)


def summary(rows: list[Row]) -> list[Line]:
    lines = []
    for name, group in CLASSES.items():
        found = [ratios_of(rows, **{"class": name, "pass": which}) for which in PASSES]
        if all(found):
            lines.append(
                Line(name, [mean(f) for f in found], [max(f) for f in found], group.goal, group.aim)
            )
    return lines


def text(report: dict[str, Row]) -> str:
    lines = []
    for part, content in report.items():
        threads = "one thread and two" if part == "threads" else "one thread"
        lines += [
            f"{part}: {machine(content, threads)}",
            *_TEXTS.get(part, _versus_text)(content["rows"]),
        ]
        lines.append("")
    return "\n".join(lines)


def machine(content: Row, threads: str = "one thread") -> str:
    versions = ", ".join(f"{name} {v}" for name, v in content["versions"].items() if v)
    door = "" if content["door"] == "torch" else f", {content['door']} alone"
    return (
        f"{content['cpu']}, {content['cores']} cores, {content['isa']}, {threads}, "
        f"{content['date']}, dcnlib {content['dcnlib']} at {content['commit']}{door}, "
        f"Python {content['python']}, {versions}"
    )


def _classes_text(rows: list[Row]) -> list[str]:
    lines = [
        "time of dcnlib / time of conv2d, geometric mean over the layers (worst layer)", "",
        f"{'class':<24}{'forward':>15}{'goal':>6}{'aim':>6}{'fwd + bwd':>17}{'goal':>6}{'aim':>6}",
    ]  # fmt: skip
    for line in summary(rows):
        text = f"{line.name:<24}"
        for i, wide in enumerate((15, 17)):
            text += f"{f'{line.means[i]:.2f} ({line.worst[i]:.2f})':>{wide}}"
            text += f"{line.goal[i]:>6.2f}{line.aim[i]:>6.2f}"
        lines.append(text + ("" if line.reached else "  not reached"))
    lines += ["", f"{'layer':<52}{'pass':<20}{'ms':>9}{'conv2d':>9}{'ratio':>7}  turns"]
    for row in rows:
        if row["class"] in CLASSES:
            lines.append(
                f"{row['layer']:<52}{row['pass']:<20}{row['ms']:>9.3f}{row['conv2d_ms']:>9.3f}"
                f"{row['ratio']:>7.2f}  {row['turns'][0]:.2f} - {row['turns'][1]:.2f}"
            )
    odd = [row for row in rows if row["class"] == "odd channels"]
    if odd:
        lines += [
            "",
            "odd channel counts: time over that of the padded layer (goal 1.15); to conv2d",
        ]
        lines += [
            f"{row['layer']:<44}{'as ' + row['as']:<44}{row['pass']:<20}{row['ratio']:>6.2f}"
            f"{row['to_conv2d']:>7.2f}"
            for row in odd
        ]
    return lines


def _versus_text(rows: list[Row]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["class"] for row in rows):
        means = [mean(ratios_of(rows, **{"class": name, "pass": which})) for which in PASSES]
        goal = f", goal {GOALS[name][0]}" if name in GOALS else ""
        lines.append(f"{name:<16} forward {means[0]:.2f}, forward + backward {means[1]:.2f}{goal}")
    lines += ["", f"{'':<16}{'layer':<52}{'pass':<20}{'ms':>9}{'ratio':>7}{'conv2d':>8}"]
    for row in rows:
        conv = f"{row['to_conv2d']:>8.2f}" if "to_conv2d" in row else ""
        lines.append(
            f"{row['class']:<16}{row['layer']:<52}{row['pass']:<20}{row['ms']:>9.3f}"
            f"{row['ratio']:>7.2f}{conv}"
        )
    return lines


def _threads_text(rows: list[Row]) -> list[str]:
    lines = [f"one thread to two, by the clock and by the time of the busiest thread (goal "
             f"{GOALS['threads']} above 2 ms, by either); GOMP_SPINCOUNT="
             f"{rows[0].get('spin', 0)}", "",
             f"{'layer':<52}{'pass':<20}{'ms':>9}{'speed-up':>9}{'busiest':>9}{'conv2d':>8}{'':>6}"
             "  clock"]  # fmt: skip
    for row in rows:
        lines.append(
            f"{row['layer']:<52}{row['pass']:<20}{row['dcnlib_ms'][0]:>9.3f}"
            f"{row['dcnlib_speedup']:>9.2f}{row.get('dcnlib_busiest', math.nan):>9.2f}"
            f"{row['conv2d_speedup']:>8.2f}{row.get('conv2d_busiest', math.nan):>6.2f}"
            f"  {row['clock']} ({row['undisturbed']} undisturbed)"
            + ("" if together(row) else "  not reached")
        )
    return lines


def together(row: Row) -> bool:
    """Whether two threads are as fast as is asked of a call that is not too short for them."""
    best = max(row["dcnlib_speedup"], row.get("dcnlib_busiest", 0))  # older files have one clock
    return row["dcnlib_ms"][0] <= 2 or best >= GOALS["threads"]


def _overhead_text(rows: list[Row]) -> list[str]:
    found = {row["layer"]: row["us"] for row in rows}
    lines = ["microseconds of a call with nothing to compute"]
    for name, us in found.items():
        goal = ""
        if name in GOALS:
            goal = f"; above the kernel {us - found['kernel']:.1f}, goal {GOALS[name]:.0f}"
        lines.append(f"{name:<28}{us:>8.1f}{goal}")
    return lines


def _memory_text(rows: list[Row]) -> list[str]:
    lines = ["kB above the results; what is allowed; what a packed weight takes", "",
             f"{'layer':<52}{'pass':<10}{'kB':>9}{'allowed':>9}{'weight':>9}"]  # fmt: skip
    for row in rows:
        kb = [row[key] / 1024 for key in ("bytes", "limit", "packed_weight")]
        lines.append(f"{row['layer']:<52}{row['pass']:<10}" + "".join(f"{v:>9.0f}" for v in kb))
    return lines


def _stages_text(rows: list[Row]) -> list[str]:
    lines = ["per cent of the time of a call; its time over conv2d's", "",
             f"{'layer':<52}{'pass':<20}{'ms':>9}{'ratio':>7}"
             + "".join(f"{stage:>14}" for stage in STAGES)]  # fmt: skip
    for row in rows:
        cells = "".join(f"{100 * row['shares'][stage]:>14.1f}" for stage in STAGES)
        lines.append(
            f"{row['layer']:<52}{row['pass']:<20}{row['ms']:>9.3f}{row['ratio']:>7.2f}" + cells
        )
    return lines


def _peers_text(rows: list[Row]) -> list[str]:
    if not rows:
        return ["none could be imported"]
    versions = ", ".join(f"{name} {v}" for name, v in rows[0]["versions"].items())
    lines = [f"time of each / time of dcnlib, one thread; {versions}", ""]
    for which in PASSES:
        here = [row for row in rows if row["pass"] == which]
        names = [name for name in here[0]["ratio"] if name != "dcnlib"]
        lines.append(f"{which:<52}{'ms':>9}" + "".join(f"{name:>13}" for name in names))
        table = {row["layer"]: [behind(row, name) for name in names] for row in here}
        for row in here:
            cells = "".join(f"{value:>13.2f}" for value in table[row["layer"]])
            lines.append(f"{row['layer']:<52}{row['ms']['dcnlib']:>9.3f}{cells}")
        for title, function in (("geometric mean", mean), ("least", min)):
            values = [function(list(column)) for column in zip(*table.values(), strict=True)]
            lines.append(f"{title:<61}" + "".join(f"{value:>13.2f}" for value in values))
        lines.append("")
    return lines[:-1]


def behind(row: Row, name: str) -> float:
    return row["ratio"][name] / row["ratio"]["dcnlib"]


_TEXTS = {
    "classes": _classes_text,
    "threads": _threads_text,
    "overhead": _overhead_text,
    "memory": _memory_text,
    "stages": _stages_text,
    "peers": _peers_text,
}


def markdown(report: dict[str, Row]) -> str:
    """The README's table: the classes, then how far behind the peers are."""
    rows = []
    for line in summary(report["classes"]["rows"]):
        name = line.name.replace(">=", "≥").replace("..", "–").replace("1x1", "1 × 1")
        rows.append([name, *(f"{value:.2f}" for value in line.means)])
    parts = [
        "Time of dcnlib / time of torch's plain `conv2d` of the same shape:",
        table(["layers, float32, one thread", *PASSES], rows),
        f"{machine(report['classes'])}. `python asv_bench/ratios.py`",
    ]
    if "peers" in report:
        met = report["peers"]["rows"]
        rows = []
        for name in PEERS:
            cells = [f"{name} {met[0]['versions'].get(name, '')}"]
            for which in PASSES:
                here = [row for row in met if row["pass"] == which and name in row["ratio"]]
                cells.append(_range([behind(row, name) for row in here]))
            if any(name in row["ratio"] for row in met):
                rows.append(cells)
        parts += [
            f"Time of others / time of dcnlib on {len(met) // 2} layers of these classes: "
            "geometric mean (least – most):",
            table(["one thread", *PASSES], rows),
        ]
    return "\n\n".join(parts)


def _range(values: list[float]) -> str:
    if not values:
        return "has none"
    return f"{mean(values):.1f} ({min(values):.1f} – {max(values):.0f})"


def figure(report: dict[str, Row], path: Path) -> None:
    """Bars: time over conv2d's, dcnlib and the peers, one layer of each class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {(row["layer"], row["pass"]): row for row in report["peers"]["rows"]}
    shown = [
        Layer(128, 128, 56, 3), Layer(64, 64, 56, 3), Layer(32, 32, 80, 3), Layer(64, 64, 40, 5),
        Layer(256, 256, 28, 1), Layer(512, 512, 14, 3),
        Layer(128, 128, 56, 3, groups=4, offset_groups=4), Layer(256, 256, 56, 3, groups=256),
        Layer(16, 16, 28, 3, batch=32),
    ]  # fmt: skip
    names = {"dcnlib": "dcnlib", "onnxruntime": "onnxruntime", "openvino": "OpenVINO",
             "torchvision": "torchvision"}  # fmt: skip
    colours = dict(zip(names, ("#d1495b", "#1f6f8b", "#7fb7c9", "#b9c2ca"), strict=True))
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": "#22303c"})
    picture, axes = plt.subplots(2, 1, figsize=(11, 6.4), sharex=True)
    for ax, which in zip(axes, PASSES, strict=True):
        here = [(layer, rows[str(layer), which]) for layer in shown if (str(layer), which) in rows]
        present = [name for name in names if any(name in row["ratio"] for _, row in here)]
        width = 0.8 / 4
        for i, name in enumerate(present):
            for place, (_, row) in enumerate(here):
                if name not in row["ratio"]:
                    continue
                value = row["ratio"][name]
                left = place + (i - (len(present) - 1) / 2) * width
                ax.bar(left, value - 0.5, width * 0.94, bottom=0.5, color=colours[name],
                       label=names[name] if place == 0 else None)  # fmt: skip
                digits = 2 if value < 2.95 else 1 if value < 9.95 else 0
                label = f"{value:.{digits}f}"
                above = value if value > 1 or value < 0.75 else 1  # not across the line at 1
                ax.text(left, above * 1.05, label, ha="center", va="bottom", fontsize=6.5)
        ax.axhline(1, color="#22303c", lw=1, label="plain conv2d")
        ax.set_yscale("log")
        ax.set_ylim(0.5, 2.2 * max(max(row["ratio"].values()) for _, row in here))
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if t <= ax.get_ylim()[1]]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_title(f"{which}: time / time of a plain convolution", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#d5dbe1", lw=0.6)
        ax.set_axisbelow(True)
    axes[0].legend(ncols=5, frameon=False, loc="upper left", fontsize=8.5)
    labels = [str(layer).replace("->", "→").replace(", ", "\n", 1) for layer, _ in here]
    for word in (", groups", ", depthwise"):
        labels = [label.replace(word, "\n" + word[2:]) for label in labels]
    axes[1].set_xticks(range(len(here)), labels, fontsize=8)
    content = report["peers"]
    foot = f"{content['cpu']}, {content['isa']}, one thread, {content['date']}; less is better"
    picture.text(0.01, 0.005, foot, fontsize=7.5, color="#5b6873")
    picture.tight_layout(rect=(0, 0.02, 1, 1))
    picture.savefig(path, dpi=130, metadata={"Software": None})


def stages_figure(report: dict[str, Row], path: Path) -> None:
    """Stacked bars: the time of each stage over that of conv2d."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = report["stages"]
    colours = (
        "#1f6f8b",
        "#5fa8a0",
        "#d1495b",
        "#e59aa4",
        "#7fb7c9",
        "#b7d3b0",
        "#edc06b",
        "#d5dbe1",
    )
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": "#22303c"})
    picture, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for ax, which in zip(axes, PASSES, strict=True):
        rows = [row for row in content["rows"] if row["pass"] == which]
        lefts = [0.0] * len(rows)
        for stage, colour in zip(STAGES, colours, strict=True):
            widths = [row["ratio"] * row["shares"][stage] for row in rows]
            ax.barh(range(len(rows)), widths, 0.72, lefts, color=colour, label=stage)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        for place, right in enumerate(lefts):
            ax.text(right + 0.02, place, f"{right:.2f}", va="center", fontsize=8)
        ax.axvline(1, color="#22303c", lw=1)
        ax.set_xlim(0, 1.12 * max(lefts))
        ax.set_title(which, loc="left", fontsize=10)
        ax.set_xlabel("time / time of a plain convolution")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_yticks(range(len(rows)), [row["layer"].replace("->", "→") for row in rows])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, ncols=len(STAGES), frameon=False, loc="upper center")
    foot = f"{content['cpu']}, {content['isa']}, one thread, {content['date']}; less is better"
    picture.text(0.01, 0.01, foot, fontsize=7.5, color="#5b6873")
    picture.tight_layout(rect=(0, 0.02, 1, 0.94))
    picture.savefig(path, dpi=130, metadata={"Software": None})
