"""Where the time of a call goes: what `ratios.py --part stages` measures.

Each pass of a layer runs again and again in a process of its own (this file), on one thread, and
Linux's perf asks it 5,000 times a second which function it is in: shares of samples are shares of
time. perf's software clock is enough, so it works in virtual machines. The functions' names are wanted:
build with

    DCNLIB_SYMBOLS=1 python setup.py build_ext --inplace
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a checkout that was built in place

from dcnlib._bench import PASSES, Layer, measure, one_thread, torch_calls
from ratios_layers import SAMPLE

Row = dict[str, Any]

#: Stage: what the names of its functions begin with, the longest decides. All else is the call: Python,
#: torch, memory. The matrix unit's `gemm_split` is for the most part what it has inlined, the splitting of
#: its rows; samples are split where they are made.
STAGES = {
    "product": ("gemm", "multiply"),
    "splitting": ("gemm_split", "split_", "find_hard", "join_block"),
    "sampling": ("sample_", "depthwise_", "scatter_", "with_variant", "edge_products"),
    "corners": ("chunk_corners", "tap_corners", "tile_positions"),
    "layout": (
        "pack_frame", "pack_pixels", "prepare_image", "turn_pixels", "write_walked", "read_row",
        "write_row", "finish_image",
    ),
    "weights": (
        "pack_weight", "pack_whole_panel", "pack_depthwise", "pack_slab_weights", "transpose_rows",
        "finish_weight",
    ),
    "offset, mask": ("add_sample_gradients", "touch"),
    "call": (),
}  # fmt: skip
LAYERS = (*SAMPLE, Layer(16, 16, 28, 3))
_SECONDS, _HERTZ = 3, 5000


def stages(options: argparse.Namespace) -> Iterator[Row]:
    if not shutil.which("perf"):
        print("stages: left out, there is no perf; Debian, Ubuntu: apt-get install linux-perf")
        return
    for index, layer in enumerate(LAYERS):
        if re.search(options.only, f": {layer}"):
            for which in PASSES:
                row = _watch(index, which, options.rounds)
                if row is None:
                    print("stages: left out, the core has no symbols: DCNLIB_SYMBOLS=1 builds them")
                    return
                yield {"class": "stages", "layer": str(layer), "pass": which, **row}


def _watch(index: int, which: str, rounds: int) -> Row | None:
    """What a call takes and the shares of its stages; None without symbols."""
    command = [sys.executable, __file__, str(index), which, str(rounds)]
    with (
        tempfile.NamedTemporaryFile() as data,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdout is not None
        try:
            row = json.loads(child.stdout.readline())
            record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(_HERTZ)]
            record += ["-p", str(child.pid), "-o", data.name, "--", "sleep", str(_SECONDS)]
            subprocess.run(record, check=True, capture_output=True)
        finally:
            child.kill()
        script = ["perf", "script", "-i", data.name, "-F", "ip,sym"]
        names = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    counts = collections.Counter(map(stage_of, names.splitlines()))
    if not set(counts) - {"call"}:
        return None
    return row | {"shares": {stage: counts[stage] / counts.total() for stage in STAGES}}


def stage_of(symbol: str) -> str:
    """The stage of a function as perf names it."""
    found = re.search(r"(?:avx512|avx2|baseline|scalar)::(\w+)", symbol)
    matches = {
        beginning: stage
        for stage, beginnings in STAGES.items()
        for beginning in beginnings
        if found and found[1].startswith(beginning)
    }
    return matches[max(matches, key=len)] if matches else "call"


def _run(index: int, which: str, rounds: int) -> None:
    """The child: prints what a call takes, then goes on with it until it is ended."""
    with one_thread():
        calls = torch_calls(LAYERS[index], ["conv2d"])[PASSES.index(which)]
        seconds = measure(calls, rounds)
        turns = [a / b for a, b in zip(seconds["dcnlib"], seconds["conv2d"], strict=True)]
        row = {"ms": 1e3 * statistics.median(seconds["dcnlib"]), "ratio": statistics.median(turns)}
        print(json.dumps(row), flush=True)
        while True:
            calls["dcnlib"]()


if __name__ == "__main__":
    _run(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
