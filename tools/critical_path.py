"""How the CPU core would scale to many threads, from the times of its tasks on one core.

    python tools/critical_path.py [--threads 2,8,64] [--isa avx512] [LAYER ...]

LAYER is N,C,O,H,W,K,stride,groups,offset_groups. Needs a tree that was built in place (python setup.py
build_ext --inplace): its object files are linked with critical_path.cpp, which says what such a figure
sees and what it cannot see. Prints two Markdown tables, efficiency (the speed of T threads over T times
the speed of one) and workspace, forward / backward. LAYERS take about two minutes. Exit status 1 if
the bits of a result depend on the number of threads.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAYERS = (
    "1,64,64,56,56,3,1,1,1",
    "8,64,64,56,56,3,1,1,1",
    "8,128,128,56,56,3,1,1,1",
    "8,256,256,28,28,3,1,1,1",
    "2,256,256,100,152,3,1,1,1",
    "32,512,512,14,14,3,1,1,1",
    "8,128,256,112,112,3,2,1,1",
    "8,128,128,56,56,3,1,4,4",
    "8,256,256,56,56,3,1,256,1",
    "32,16,16,28,28,3,1,1,1",
)
#: Of both directions, forward first.
Figures = list[dict[str, Any]]


def objects() -> list[Path]:
    """The CPU core's object files of the build in place."""
    build = ROOT / f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    parts = re.search(r"^PARTS = (.*)$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    folders = [build / part.lower() for part in ast.literal_eval(parts[1])]
    found = [build / f"csrc/cpu/{name}.o" for name in ("dispatch", "workspace")]
    found += [path for folder in folders for path in folder.glob("csrc/cpu/kernels/*.o")]
    headers = [path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".inc")]
    newest = max(path.stat().st_mtime for path in headers if "cuda" not in path.parts)
    if not all(path.exists() and path.stat().st_mtime >= newest for path in found):
        sys.exit("no finished build of this tree; run python setup.py build_ext --inplace first")
    return found


def measure(program: str, isa: str, layer: str, threads: list[int]) -> Figures:
    command = [program, isa, *layer.split(","), *map(str, threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"critical_path failed on {layer}: exit status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def name_of(layer: str) -> str:
    batch, channels, outputs, h, w, kernel, stride, groups, offset_groups = layer.split(",")
    name = f"{batch} x {channels} → {outputs}, {h} x {w}, K{kernel}"
    for what, number in ("stride", stride), ("groups", groups), ("offset groups", offset_groups):
        name += f", {what} {number}" if number != "1" else ""
    return name


def print_table(rows: dict[str, Figures], heads: list[str], cell: Callable[..., str]) -> None:
    """`cell(figures, head)` of each direction."""
    print("| layer | " + " | ".join(heads) + " |\n| ---" + " | ---:" * len(heads) + " |")
    for layer, both in rows.items():
        cells = [" / ".join(cell(figures, head) for figures in both) for head in heads]
        print(f"| {name_of(layer)} | " + " | ".join(cells) + " |")
    print()


def layer_of(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){8}", text):
        raise argparse.ArgumentTypeError("expected N,C,O,H,W,K,stride,groups,offset_groups")
    return text


def threads_of(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError("expected numbers as in 2,8,64")
    return sorted({1, *map(int, text.split(","))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--threads", type=threads_of, default="1,2,4,8,16,32", help="default %(default)s; always 1")
    add("--isa", default="best", help="amx, avx512, avx2, baseline, scalar; default %(default)s")
    add("layers", type=layer_of, nargs="*", metavar="LAYER", default=LAYERS)
    options = parser.parse_args()
    rows: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/critical_path"
        compiler = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O2"]
        source = ROOT / "tools/critical_path.cpp"
        subprocess.run([*compiler, source, *objects(), "-o", program], check=True)
        for i, layer in enumerate(options.layers, 1):
            print(f"[{i}/{len(options.layers)}] {layer} ", end="", file=sys.stderr, flush=True)
            rows[layer] = measure(program, options.isa, layer, options.threads)
            print(file=sys.stderr)

    def efficiency(figures: dict[str, Any], head: str) -> str:
        of_head = figures["threads"].get(head)
        return f"{of_head['efficiency']:.2f}" if of_head else f"{figures['ms']:.1f}"

    def megabytes(figures: dict[str, Any], head: str) -> str:
        return f"{figures['threads'][head]['megabytes']:.1f}"

    isa = next(iter(rows.values()))[0]["isa"]
    threads = [str(count) for count in options.threads]
    print(f"Efficiency on so many threads, forward / backward, instruction set {isa}:\n")
    print_table(rows, ["1, ms", *threads[1:]], efficiency)
    print("Workspace in MB:\n")
    print_table(rows, threads, megabytes)
    differ = [layer for layer, both in rows.items() if not all(one["same_bits"] for one in both)]
    if differ:
        sys.exit(f"the bits depend on the number of threads: {' '.join(differ)}")
    print("All numbers of threads gave the same bits.")


if __name__ == "__main__":
    main()
