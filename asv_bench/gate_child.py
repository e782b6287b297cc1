"""The measuring process of gate.py: one side, one kind of measurement, results as JSON on stdout.

    python gate_child.py time|memory|instructions FOLDER [case ...]

FOLDER holds the package `dcnlib` that is measured. "instructions" expects to run under callgrind,
and the library of `marks.c` in the environment variable DCNLIB_GATE_MARKS.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

from benchmarks import common, memory
from benchmarks.common import Case

#: What is judged: one of each kernel in the library, sizes that take a millisecond or a few.
CASES = {
    "64@40x40 K3": Case(64, 64, 40, 40, 3),
    "128@28x28 K3 stride 2": Case(128, 128, 28, 28, 3, 2),
    "32@24x24 K5 dilation 2": Case(32, 32, 24, 24, 5, 1, 2),
    "256->128@20x20 K1": Case(256, 128, 20, 20, 1),
    "64@28x28 K3 groups 4": Case(64, 64, 28, 28, 3, groups=4, offset_groups=4),
    "128@28x28 K3 depthwise": Case(128, 128, 28, 28, 3, groups=128),
    "8 x 16@14x14 K3": Case(16, 16, 14, 14, 3, batch=8),
    "64@20x20 K3 float16": Case(64, 64, 20, 20, 3),
    "32@20x20 K3 float64": Case(32, 32, 20, 20, 3),
}
#: The same kernels on fewer pixels: an emulated instruction takes long.
SMALL = {name: case._replace(height=10, width=10, batch=1) for name, case in CASES.items()}
AT_REST = "after import and a call"


def rows() -> list[str]:
    return [f"{name} {direction}" for name in CASES for direction in common.DIRECTIONS]


def call_of(row: str, cases: dict[str, Case]) -> common.Call:
    name, _, direction = row.rpartition(" ")
    dtype = name.rpartition(" ")[2]
    dtype = dtype if dtype in common.DTYPES else "float32"
    return common.numpy_call(cases[name], direction, dtype)


def times(wanted: list[str]) -> dict[str, float]:
    """Processor seconds of the shortest call."""
    return {row: common.least_seconds(call_of(row, CASES), budget=0.12) for row in wanted}


def memories(wanted: list[str]) -> dict[str, float]:
    """Bytes that a call adds, and bytes of the process before any."""
    memory.settle()
    call_of("8 x 16@14x14 K3 backward", SMALL)()
    gc.collect()
    found = {AT_REST: float(memory.resident())}
    return found | {row: float(memory.extra_bytes(call_of(row, CASES))) for row in wanted}


def instructions(wanted: list[str]) -> None:
    """Run each call between two marks; callgrind writes the counts."""
    marks = ctypes.CDLL(os.environ["DCNLIB_GATE_MARKS"])
    gc.disable()
    for number, row in enumerate(wanted):
        call = call_of(row, SMALL)
        marks.begin()
        call()
        marks.end(str(number).encode())


def main() -> None:
    kind, folder, *wanted = sys.argv[1:]
    import dcnlib

    found = Path(dcnlib.__file__).resolve().parent.parent
    if found != Path(folder).resolve():
        sys.exit(f"gate: dcnlib was imported from {found}, not from {folder}")
    wanted = wanted or rows()
    result = {"time": times, "memory": memories, "instructions": instructions}[kind](wanted)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
