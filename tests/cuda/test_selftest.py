"""tools/gpu/selftest.cu on the CPU: every pass against plain loops, and bugs that it has to find.

Here the emulation itself is under test: each planted bug is one that a kernel could have, and is told
by what the emulation says about it.
"""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

import emulate
import pytest

PLAIN = ["-O0", "-DDCN_FLOAT32_ONLY"]
WATCHED = ["-O1", "-DDCN_FLOAT32_ONLY", *emulate.SANITIZE]


def selftest(flags, planted=None):
    return emulate.program(emulate.SELFTEST, flags, planted)


def run(program, *arguments):
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def test_all_types_without_a_finding():
    """Address and undefined-behaviour sanitizers over all passes, types, layouts and schedules."""
    status, text = run(selftest(["-O1", *emulate.SANITIZE]), 96)
    assert status == 0 and text.strip() == "selftest: 96 configurations, 0 failures", text


def test_indices_beyond_32_bits():
    status, text = run(selftest(PLAIN), "large")
    assert status == 0 and text.strip() == "selftest: indices beyond 2^31, 0 failures", text


class Bug(NamedTuple):
    """In `file`, `old` (there once, or the one number `which`) becomes `new`; `says` is found."""

    file: str
    old: str
    new: str
    says: str
    which: int = 0
    arguments: tuple = (64,)
    flags: list = PLAIN


LAST_READ = "__syncthreads(); /* the last unit's slots and samples have been read */"
FILLED = "__syncthreads(); /* slots are filled, the last taps' samples have been read */"
AFTER_FILL = "      __syncthreads();\n"

BUGS = {
    "no barrier after the table": Bug(
        "rows.cu", AFTER_FILL, "\n", r"FAILED sample\[\d+\]|died", 0
    ),
    "no barrier after the table, backward": Bug(
        "rows.cu", AFTER_FILL, "\n", r"FAILED backward grad_\w+\[\d+\]|died", 1
    ),
    "no barrier between units": Bug("rows.cu", LAST_READ, "", r"FAILED sample\[\d+\]|died", 0),
    "no barrier before the next taps": Bug(
        "rows.cu", FILLED, "", r"FAILED sample\[\d+\]|died", 0
    ),
    "one buffer for the table's taps": Bug(
        "rows.cu", "samples[h * PIXELS + j]", "samples[j]", r"FAILED sample\[\d+\]"
    ),
    "return before a barrier": Bug(
        "rows.cu", LAST_READ, f"if (threadIdx.x > 200) return;\n    {LAST_READ}", "divergent barrier", 1
    ),
    "some threads skip a shuffle": Bug(
        "rows.cu", "        Sample<A> s = {};", "        if (j >= pixels) continue;\n"
        "        Sample<A> s = {};", "divergent shuffle|others in a shuffle",
    ),
    "half of a shuffle's steps": Bug(
        "rows.cu", "apart = lanes / 2", "apart = lanes / 4", r"FAILED backward grad_\w+\[\d+\]"
    ),
    "lanes and workers exchanged": Bug(
        "rows.cu", "lane = threadIdx.x & (lanes - 1), worker = threadIdx.x / lanes",
        "lane = threadIdx.x / (THREADS / lanes), worker = threadIdx.x & (THREADS / lanes - 1)",
        r"FAILED backward grad_\w+\[\d+\]", 1,
    ),
    "the table in another order": Bug(
        "rows.cu", "samples[j] = s;", "samples[j % PIXELS * taps + j / PIXELS] = s;",
        r"FAILED sample\[\d+\]|died",
    ),
    "a table that is too small": Bug(
        "rows.cu", "DCN_SHARED(Sample<A>, samples, TAPS * PIXELS)",
        "DCN_SHARED(Sample<A>, samples, TAPS * PIXELS - 20)", "overrun of the shared array samples",
        arguments=(120,),
    ),
    "a vector that is not aligned": Bug(
        "rows.cu", "s.pixel * right + c, right, down, s.value_corners()",
        "s.pixel * right + c + 1, right, down, s.value_corners()", "a 16-byte access at",
    ),
    "a loop over the grid that stays in its block": Bug(
        "planar.cu", "unit += unit_step()", "unit += blockDim.x", r"FAILED backward grad_input\[", 1
    ),
    "a loop over the grid that skips": Bug(
        "sorted.cu", "unit_step() / lanes", "unit_step()", r"FAILED gather grad_input\["
    ),
    "every entry of a run works": Bug(
        "sorted.cu", "first > 0 && keys[first - 1] == key", "first < 0",
        r"FAILED gather grad_input\[",
    ),
    "a corner that is not there": Bug(
        "planar.cu", "bits & BOTTOM_RIGHT ?", "bits & TOP_LEFT ?",
        "heap-buffer-overflow", flags=WATCHED,
    ),
    "pixels of the next chunk": Bug(
        "rows.cu", "i >= 0 && i < chunk.count ? i : -1", "i >= 0 ? i : -1",
        "heap-buffer-overflow", flags=WATCHED,
    ),
    "offsets of the tap behind the last": Bug(
        "sorted.cu", "sample_at<T>(p, t, o, offset_group, tap)",
        "sample_at<T>(p, t, o, offset_group, tap + 1)", "heap-buffer-overflow", flags=WATCHED,
    ),
    "32 bits for an index of the input": Bug(
        "planar.cu", "at * pixel + c * channel", "(int32_t)(at * pixel + c * channel)",
        r"FAILED|died", arguments=("large",),
    ),
    "32 bits for an index of the output": Bug(
        "matrices.cu", "return (n * p.out_channels + o) * plane + (pixel - n * plane);",
        "return (int32_t)((n * p.out_channels + o) * plane + (pixel - n * plane));",
        r"FAILED|died", arguments=("large",),
    ),
    "32 bits for a key": Bug(
        "sorted.cu", "(Key)(pixel * p.offset_groups + offset_group)",
        "(Key)(int16_t)(pixel * p.offset_groups + offset_group)", r"FAILED|died",
        arguments=("large",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name):
    bug = BUGS[name]
    text = (emulate.ROOT / "csrc/cuda" / bug.file).read_text()
    parts = text.split(bug.old)
    assert len(parts) > bug.which + 1, f"the planted bug's place is gone: {bug.old}"
    planted = bug.old.join(parts[: bug.which + 1]) + bug.new + bug.old.join(parts[bug.which + 1 :])
    status, said = run(selftest(bug.flags, {bug.file: planted}), *bug.arguments)
    if status < 0:
        said += f"\ndied: signal {-status}"
    assert status != 0, "nothing was found"
    assert re.search(bug.says, said), said[-2000:]


def test_without_a_bug_nothing_is_found():
    status, text = run(selftest(PLAIN), 64)
    assert status == 0 and text.strip() == "selftest: 64 configurations, 0 failures", text
