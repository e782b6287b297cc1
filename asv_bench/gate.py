"""Says whether a change made dcnlib slower or larger: two versions, compared on a busy machine.

    python asv_bench/gate.py BASE [HEAD]       HEAD is the last commit if it is not given

BASE and HEAD are commits, wheels, or folders that hold the package `dcnlib` (the root of a checkout
that was built in place, say). Commits are built into wheels by pip and kept in asv_bench/env-gate.

Both run in fresh processes in alternating order. Judged are
  time          the shortest call, in processor time of one thread: more than 10 % is a regression
  memory        what a call adds at its peak: more than 3 % and 64 kB
  instructions  of the processor, where valgrind and a C compiler are there: more than 2 %
A time or memory that fails is measured again, with twice the rounds, before it counts.

Exit status: 0 no regression, 3 regression, 2 nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import memory
from gate_child import AT_REST, rows

HERE = Path(__file__).parent.resolve()
CHILD = HERE / "gate_child.py"
CACHE = HERE / "env-gate"

Figures = dict[str, float]
Readings = dict[str, list[float]]


class Kind(NamedTuple):
    """How a measurement is judged: head <= base * (1 + share) + slack."""

    share: float
    slack: float
    unit: float
    unit_name: str

    def fails(self, base: float, head: float) -> bool:
        return head > base * (1 + self.share) + self.slack


KINDS = {
    "time": Kind(0.10, 0.0, 1e-6, "us"),
    "memory": Kind(0.03, 65536, 1024, "kB"),
    "instructions": Kind(0.02, 0.0, 1e3, "thousand"),
}

_MARKS = r"""
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


class CannotMeasure(Exception):
    """What stands in the way, for the user."""


class Row(NamedTuple):
    kind: str
    name: str
    base: float
    head: float
    retried: bool

    @property
    def ratio(self) -> float:
        return self.head / self.base if self.base else 1.0

    @property
    def fails(self) -> bool:
        return KINDS[self.kind].fails(self.base, self.head)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            sides = [package(side, Path(folder) / name) for side, name in
                     ((options.base, "base"), (options.head, "head"))]  # fmt: skip
            wanted = [row for row in rows() if re.search(options.only, row)]
            if not wanted:
                raise CannotMeasure(f"no row matches {options.only!r}")
            found = judge(*sides, kinds(options.kinds), options.rounds, wanted)
    except CannotMeasure as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.json:
        Path(options.json).write_text(json.dumps([row._asdict() for row in found], indent=1) + "\n")
    return 3 if any(row.fails for row in found) else 0


def kinds(wanted: str) -> list[str]:
    """The kinds asked for; "auto" leaves out what this machine cannot measure, and says so."""
    if wanted != "auto":
        if unknown := set(wanted.split(",")) - KINDS.keys():
            raise CannotMeasure(
                f"--kinds: there is no {', '.join(unknown)}, only {', '.join(KINDS)}"
            )
        return wanted.split(",")
    reasons = {"memory": memory.why_not(), "instructions": no_instructions()}
    for kind, reason in reasons.items():
        if reason:
            print(f"gate: {kind} is left out: {reason}")
    return [kind for kind in KINDS if not reasons.get(kind)]


def judge(base: Path, head: Path, kinds: list[str], rounds: int, wanted: list[str]) -> list[Row]:
    """Measure both sides, and what fails once more."""
    found = []
    for kind in kinds:
        again: list[str] = []
        if kind == "instructions":
            readings = count_instructions(base, head, wanted)
        else:
            readings = read(kind, base, head, rounds if kind == "time" else 1, wanted)
            again = [row.name for row in summary(kind, readings) if row.fails]
        if again:
            for old, new in zip(readings, read(kind, base, head, 2 * rounds, again), strict=True):
                for name in again:
                    old[name] += new[name]
        found += [row._replace(retried=row.name in again) for row in summary(kind, readings)]
    return found


def summary(kind: str, readings: list[Readings]) -> list[Row]:
    """One figure a row and side: others only add to a time, but disturb memory both ways."""
    figure = min if kind == "time" else statistics.median
    base, head = readings
    return [Row(kind, name, figure(base[name]), figure(head[name]), False) for name in base]


def read(kind: str, base: Path, head: Path, rounds: int, wanted: list[str]) -> list[Readings]:
    """The readings of each row on each side; the sides take turns in going first."""
    found: list[Readings] = [{}, {}]
    order = [0, 1]
    for _ in range(rounds):
        for side in order:
            for name, value in measure(kind, (base, head)[side], wanted).items():
                found[side].setdefault(name, []).append(value)
        order.reverse()
    return found


def measure(kind: str, folder: Path, wanted: list[str]) -> Figures:
    """One fresh process of gate_child.py."""
    calls = [name for name in wanted if name != AT_REST]  # that one is always measured
    command = [sys.executable, str(CHILD), kind, str(folder), *calls]
    done = subprocess.run(
        command, env=_environment(folder), cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotMeasure(f"{folder}: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def count_instructions(base: Path, head: Path, wanted: list[str]) -> list[Readings]:
    """Both sides at once under callgrind: a count does not depend on what else runs."""
    reason = no_instructions()
    if reason:
        raise CannotMeasure(f"instructions: {reason}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        marks = Path(folder) / "marks.so"
        source = Path(folder) / "marks.c"
        source.write_text(_MARKS)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(marks)], check=True)
        outputs = [Path(folder) / name for name in ("base", "head")]
        sides = pool.map(_callgrind, (base, head), outputs, (marks, marks), (wanted, wanted))
        return [{name: [count] for name, count in side.items()} for side in sides]


def _callgrind(folder: Path, output: Path, marks: Path, wanted: list[str]) -> Figures:
    output.mkdir()
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-line=no",
                f"--callgrind-out-file={output}/counts"]  # fmt: skip
    environment = _environment(folder) | {"DCNLIB_GATE_MARKS": str(marks), "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [*valgrind, sys.executable, str(CHILD), "instructions", str(folder), *wanted],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CannotMeasure(f"{folder}: under valgrind: {done.stderr.strip()[-500:]}")
    return counted(output, wanted)


def counted(folder: Path, wanted: list[str]) -> Figures:
    """The totals of callgrind's dumps, which name their rows by number."""
    found = {}
    for path in folder.glob("counts*"):
        text = path.read_text(errors="replace")
        trigger = re.search(r"^desc: Trigger: Client Request: (\d+)$", text, re.MULTILINE)
        total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
        if trigger and total:
            found[wanted[int(trigger[1])]] = float(total[1])
    if len(found) != len(wanted):
        raise CannotMeasure(f"callgrind counted {len(found)} of {len(wanted)} rows")
    return {name: found[name] for name in wanted}


def no_instructions() -> str | None:
    """The reason why instructions cannot be counted, None if they can."""
    for tool in ("valgrind", "cc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    probe = ["cc", "-E", "-include", "valgrind/callgrind.h", "-x", "c", os.devnull]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "valgrind's headers are not installed"
    return None


def package(side: str, folder: Path) -> Path:
    """The folder with the package of a side: a folder itself, a wheel unpacked, a commit built."""
    path = Path(side)
    if (path / "dcnlib" / "__init__.py").exists():
        return path.resolve()
    if path.suffix == ".whl" and path.exists():
        return _unpack(path, folder)
    return _unpack(wheel(side), folder)


def wheel(commit: str) -> Path:
    """The wheel of a commit, from the cache or built by pip from a clean copy."""
    sha = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").stdout.strip()
    if not sha:
        raise CannotMeasure(f"{commit!r} is no commit, no wheel and no folder with dcnlib in it")
    kept = CACHE / f"{sha[:12]}-{sys.implementation.cache_tag}"
    if not list(kept.glob("*.whl")):
        print(f"gate: building {sha[:12]}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "source.tar"
            _git("archive", "--output", str(archive), sha)
            shutil.unpack_archive(archive, f"{folder}/source", filter="data")
            pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                   "--wheel-dir", f"{folder}/wheel", f"{folder}/source"]  # fmt: skip
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CannotMeasure(f"{commit}: no wheel can be built: {done.stderr[-2000:]}")
            kept.mkdir(parents=True, exist_ok=True)
            for made in Path(folder, "wheel").glob("*.whl"):
                shutil.move(made, kept / made.name)
    return next(kept.glob("*.whl"))


def table(found: list[Row]) -> str:
    """All rows, the verdict below."""
    wide = max(len(row.name) for row in found)
    lines = []
    for kind, (share, slack, unit, unit_name) in KINDS.items():
        here = [row for row in found if row.kind == kind]
        if here:
            limit = f"limit {1 + share:.2f}" + (f" + {slack / 1024:.0f} kB" if slack else "")
            lines += ["", f"{kind}, {unit_name}; {limit}",
                      f"  {'':<{wide}} {'base':>12} {'head':>12} {'ratio':>7}"]  # fmt: skip
        for row in here:
            line = f"  {row.name:<{wide}} {row.base / unit:>12.1f} {row.head / unit:>12.1f}"
            line += f" {row.ratio:>7.3f}"
            line += "  REGRESSION" if row.fails else ""
            lines.append(line + ("  measured again" if row.retried else ""))
    failed = sum(row.fails for row in found)
    verdict = f"{failed} of {len(found)} rows got worse" if failed else "no regression"
    return "\n".join([*lines[1:], "", verdict])


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DCNLIB_")}
    return kept | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0",
                   "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip


def _unpack(path: Path, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side (default 3)")
    parser.add_argument(
        "--kinds", default="auto", help="of time,memory,instructions; auto: what can be measured"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="of the rows' names")
    parser.add_argument("--json", metavar="FILE", help="the rows, for programs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
