"""Benchmarks on a machine without a network, a GPU server say, into the results of this repository.

    python asv_bench/carry.py pack DIR         here: everything that the other machine needs, in DIR
    sh DIR/run.sh PYTHON MACHINE               there, with a PYTHON that has NumPy (and torch)
    python asv_bench/carry.py take DIR/results/MACHINE     here again, when DIR is back

DIR gets the repository as a git bundle, this suite, a wheel of the last commit, asv and what asv
needs. The other machine needs git, and a compiler only if its Python is another than this one's.
Its results become a second machine in the same graphs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gate

HERE = Path(__file__).parent.resolve()

#: What run.sh is told: the commit, and what to run by default.
_SCRIPT = """#!/bin/sh
# sh run.sh PYTHON MACHINE [PROFILE [asv options]]: runs the suite here; see asv_bench/carry.py.
set -eu
python=$1 machine=$2 profile=${{3:-cuda}}
shift 2
[ $# -gt 0 ] && shift
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
rm -rf venv work
"$python" -m venv venv
# What PYTHON has, whether it is the system's or a virtual environment of its own.
site="import sysconfig; print(sysconfig.get_path('purelib'))"
"$python" -c "$site" > "$(venv/bin/python -c "$site")/there.pth"
pip="venv/bin/python -m pip install --quiet --no-index --find-links wheels"
$pip asv
git -c advice.detachedHead=false clone --quiet repo.bundle work
git -C work branch --quiet --force main origin/main 2> /dev/null || true # asv wants it to exist
git -C work -c advice.detachedHead=false checkout --quiet {commit}
$pip --no-deps --force-reinstall dcnlib || venv/bin/python -m pip install --no-deps \\
    --no-build-isolation ./work
rm -rf work/asv_bench
cp -r suite work/asv_bench
venv/bin/python work/asv_bench/run.py "$profile" --machine "$machine" \\
    -E existing:"$here/venv/bin/python" --set-commit-hash {commit} "$@" \\
    || echo "asv ended with status $?: see above which benchmarks failed"
mkdir -p results
cp -r "work/asv_bench/results/$machine" results/
echo "results/$machine"
"""


def pack(folder: Path) -> None:
    """Fill a new folder."""
    folder.mkdir(parents=True)
    sha = _git("rev-parse", "HEAD")
    # asv needs the branch that its configuration names.
    _git("bundle", "create", str(folder.resolve() / "repo.bundle"), "HEAD", "main")
    leave = shutil.ignore_patterns("env*", "html*", "results", "ratios", "__pycache__")
    shutil.copytree(HERE, folder / "suite", ignore=leave)
    wheels = folder / "wheels"
    wheels.mkdir()
    shutil.copy(gate.wheel(sha), wheels)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(wheels), "asv"]
    subprocess.run(command, check=True)
    (folder / "run.sh").write_text(_SCRIPT.format(commit=sha))


def take(folder: Path, results: Path) -> list[Path]:
    """Copy a machine's results, if they say which machine, of which commit, and name no path."""
    if not (folder / "machine.json").exists():
        raise ValueError(f"carry: {folder} has no machine.json; take results/MACHINE")
    machine = json.loads((folder / "machine.json").read_text())["machine"]
    taken = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if path.name != "machine.json":
            _check(path, content)
        target = results / machine / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        taken.append(target)
    return taken


def _check(path: Path, content: dict) -> None:
    _git("cat-file", "-e", f"{content['commit_hash']}^{{commit}}")
    named = [path.name, content["env_name"], content["python"], *content["params"].values()]
    for value in named:
        if "/" in str(value) or "_bin_python" in str(value):
            raise ValueError(f"carry: {path.name}: {value!r} is a path of the other machine")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"carry: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["pack", "take"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.what == "pack":
            pack(options.folder)
            print(f"sh {options.folder}/run.sh PYTHON MACHINE")
        else:
            print(*take(options.folder, options.results), sep="\n")
    except (ValueError, OSError, gate.CannotMeasure) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
