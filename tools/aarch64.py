"""The aarch64 wheel under emulation, on any Debian-like x86-64 machine: what `make test-aarch64` runs.

    .aarch64/root    libc, libgomp and Python of Debian's arm64, unpacked, not installed
    .aarch64/site    NumPy, pytest and what they need as aarch64 wheels, and dcnlib's from dist
    .aarch64/python  runs that Python through qemu-user; tests start their child processes by it

Nothing outside that folder is touched: apt works on lists of its own. ``python tools/aarch64.py missing``
says in words what is not there, and nothing if all is; ``setup`` only makes the folder; ``test`` makes
it and runs SUBSET, with the given pytest arguments; tests named among them take its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".aarch64"
SYSTEM, SITE, PYTHON = HOME / "root", HOME / "site", HOME / "python"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libgomp1", "libstdc++6")
WHEELS = ("numpy", "pytest", "hypothesis", "ml_dtypes", "safetensors")
#: 200 random configurations and the named ones of the exact lattice in all dtypes, values at borders
#: and of no number, threads, import order: a quarter of an hour.
SUBSET = (
    *(f"tests/test_lattice.py::test_random_configurations[{first}]" for first in range(0, 200, 50)),
    "tests/test_lattice.py::test_named_problem", "tests/test_conv2d.py", "tests/test_values.py",
    "tests/test_threads.py", "tests/test_import.py",
    "-k", "not reference and not no_memory",  # a limit of memory would be the emulator's, too
)  # fmt: skip


def missing() -> list[str]:
    """What is needed and not there, as sentences with the cure."""
    needed = {
        "an emulator, qemu-aarch64-static (apt-get install qemu-user-static)": EMULATORS,
        "a cross compiler, aarch64-linux-gnu-g++ (apt-get install g++-aarch64-linux-gnu)": (
            "aarch64-linux-gnu-g++",
        ),
        "apt-get, to download Debian's Python for arm64": ("apt-get",),
        "dpkg-deb, to unpack it": ("dpkg-deb",),
    }
    return [text for text, tools in needed.items() if not any(map(shutil.which, tools))]


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def debian() -> None:
    """Debian's Python for arm64 and what it needs, downloaded by an apt that knows nothing else."""
    if SYSTEM.exists():
        return
    apt = HOME / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = [
        "-qq", "-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64",
        f"-oDir::State::Lists={apt}/lists", f"-oDir::Cache={apt}/cache",
        f"-oDir::State::status={apt}/status", "-oAPT::Install-Recommends=false",
        "-oDebug::NoLocking=1", "-oAPT::Sandbox::User=root",
    ]  # fmt: skip
    run("apt-get", *options, "update")
    run("apt-get", *options, "--yes", "--download-only", "install", *DEBIAN)
    unpacked = HOME / "unpacking"
    shutil.rmtree(unpacked, ignore_errors=True)
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, unpacked)
    unpacked.rename(SYSTEM)
    shutil.rmtree(apt)


def version() -> str:
    """Of that Python: "3.11"."""
    return max(
        (p.name.removeprefix("python") for p in (SYSTEM / "usr/bin").glob("python3.*")),
        key=lambda text: int(text.partition(".")[2]),
    )


def wheels() -> None:
    """The wheels of others once, dcnlib's every time."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(17, 40)]
    platforms.append("manylinux2014_aarch64")
    pip = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--upgrade",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", version(),
        *(word for name in platforms for word in ("--platform", name)), "--target", SITE,
    ]  # fmt: skip
    if not SITE.exists():
        run(*pip, *WHEELS)
    found = list(ROOT.glob("dist/*_aarch64.whl"))
    if not found:
        run(sys.executable, ROOT / "tools/wheel.py", "--machine", "aarch64")
        found = list(ROOT.glob("dist/*_aarch64.whl"))
    run(*pip, "--no-deps", found[0])


def wrapper() -> None:
    """A script that runs the emulated Python, and makes it call itself by the script's name."""
    emulator = next(filter(None, map(shutil.which, EMULATORS)))
    (SITE / "sitecustomize.py").write_text(
        "import os, sys\nsys.executable = os.environ['DCNLIB_EMULATED_PYTHON']\n"
    )
    PYTHON.write_text(
        "#!/bin/sh\n"
        f'export DCNLIB_EMULATED_PYTHON="{PYTHON}" PYTHONHOME="{SYSTEM}/usr"\n'
        f'export PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{SITE}"\n'
        f'exec "{emulator}" -L "{SYSTEM}" "{SYSTEM}/usr/bin/python{version()}" "$@"\n'
    )
    PYTHON.chmod(0o755)


def setup() -> None:
    HOME.mkdir(exist_ok=True)
    debian()
    wheels()
    wrapper()


def test(arguments: list[str]) -> int:
    """pytest of a copy of the tests, beside no source of the package."""
    begin = time.monotonic()
    setup()
    tree = HOME / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for name in ("tests", "pyproject.toml", "README.md"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tree / name)
    print(f"dcnlib: set up in {time.monotonic() - begin:.0f} s, {PYTHON}", flush=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"}
    command = [PYTHON, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=tree, env=env, check=False).returncode


def main(action: str = "test", *arguments: str) -> int:
    lacking = missing()
    if action == "missing":
        print(*lacking, sep="\n", end="\n" if lacking else "")
        return 0
    if lacking:
        print(*(f"dcnlib: no test on aarch64 without {text}" for text in lacking), sep="\n")
        return 1
    if action == "setup":
        setup()
        return 0
    named = any(argument.startswith("tests") for argument in arguments)
    return test([*(() if named else SUBSET), *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
