"""Builds the CUDA backend for the CPU: csrc/cuda and its Cython module against the headers here.

    python tests/cuda/emulation/emulate.py                          -> dcnlib/backends/cuda/_emulated.so
    DCNLIB_CUDA_EMULATE=1 python -c "..."                         backend="cuda" takes CPU tensors

Never part of a wheel. `build` compiles only what has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
FLAGS = [
    "-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-psabi",
    '-DDCN_CUDA_ARCHS="emulation"', f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'csrc'}",
]  # fmt: skip
SANITIZE = [
    "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow",
]  # fmt: skip


def default_target() -> Path:
    """Where `DCNLIB_CUDA_EMULATE=1` looks: beside the package that Python imports."""
    found = importlib.util.find_spec("dcnlib")
    package = Path(found.origin).parent if found and found.origin else ROOT / "dcnlib"
    return package / "backends/cuda/_emulated.so"


def build(target: Path, extra: Sequence[str] = (), folder: Path | None = None) -> Path:
    """Compile and link `target` unless it is what the sources give; `extra` are more flags."""
    folder = folder or ROOT / "build/emulation"
    digest = fingerprint(extra)
    stamp = folder / f"{digest}.so"
    if not stamp.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = compile_all(folder / digest, extra)
        subprocess.run(["g++", "-shared", *extra, *map(str, objects), "-o", f"{stamp}.part"], check=True)
        os.replace(f"{stamp}.part", stamp)
    if not target.exists() or target.read_bytes() != stamp.read_bytes():
        target.write_bytes(stamp.read_bytes())
    return target


def fingerprint(extra: Sequence[str]) -> str:
    """A hash of all that the result depends on."""
    digest = hashlib.sha256(repr((FLAGS, list(extra), sys.version)).encode())
    for path in sorted([*ROOT.glob("csrc/**/*"), *HERE.glob("*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_all(folder: Path, extra: Sequence[str]) -> list[Path]:
    """Object files of kernels, emulation and Cython module."""
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / "_core.cpp"
    subprocess.run(
        [sys.executable, "-m", "cython", "-3", "--cplus", f"-I{ROOT / 'csrc'}",
         f"-I{ROOT / 'csrc/cuda'}", str(ROOT / "csrc/cuda/_core.pyx"), "-o", str(module)],
        check=True,
    )  # fmt: skip
    python = ["-w", "-O0", f"-I{sysconfig.get_path('include')}"]
    jobs = [(source, ["-x", "c++", *FLAGS, *extra]) for source in KERNELS]
    jobs += [(HERE / "emulation.cpp", [*FLAGS, "-O2", *extra]), (module, [*FLAGS, *python])]

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


if __name__ == "__main__":
    print(build(default_target()))
