"""Builds the CUDA backend for the CPU: csrc/cuda against the headers of this folder.

    python tests/cuda/emulation/emulate.py               -> dcnlib/backends/cuda/_emulated.so
    DCNLIB_CUDA_EMULATE=1 python -c "..."                backend="cuda" takes CPU tensors

`module` builds the Cython module, `program` those of tools/gpu; both compile only what has changed.
Never part of a wheel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build/emulation"
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
EMULATION = HERE / "emulation.cpp"
SELFTEST = ROOT / "tools/gpu/selftest.cu"
RATES = ROOT / "tools/gpu/rates.cu"
FLAGS = [
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-psabi",
    '-DDCN_CUDA_ARCHS="emulation"', f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'csrc'}",
]  # fmt: skip
SANITIZE = ["-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow"]


def default_target() -> Path:
    """Where `DCNLIB_CUDA_EMULATE=1` looks: beside the package that Python imports."""
    found = importlib.util.find_spec("dcnlib")
    package = Path(found.origin).parent if found and found.origin else ROOT / "dcnlib"
    return package / "backends/cuda/_emulated.so"


def module(target: Path) -> Path:
    """The Cython module over the emulated kernels, at `target`."""
    source = BUILD / "_core.cpp"
    pyx = ROOT / "csrc/cuda/_core.pyx"
    newest = max(path.stat().st_mtime for path in (pyx, *ROOT.glob("csrc/**/*.pxd")))
    if not source.exists() or source.stat().st_mtime < newest:
        BUILD.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
        command = [sys.executable, "-m", "cython", "-3", "--cplus", *include, str(pyx)]
        subprocess.run([*command, "-o", str(source)], check=True)
    python = ["-w", "-O0", f"-I{sysconfig.get_path('include')}"]
    objects = _compile(
        [*((kernel, ["-O1"]) for kernel in KERNELS), (EMULATION, ["-O2"]), (source, python)]
    )
    built = _link(objects, ["-shared"])
    if not target.exists() or target.read_bytes() != built.read_bytes():
        target.write_bytes(built.read_bytes())
    return target


def program(main: Path, extra: Sequence[str], planted: Mapping[str, str] | None = None) -> Path:
    """`main` with the kernels as a program, compiled with `extra` flags.

    `planted` has other texts for some files of csrc/cuda, by name.
    """
    planted = planted or {}
    sources = []
    for kernel in KERNELS:
        if kernel.name in planted:
            text = planted[kernel.name]
            kernel = (
                BUILD / "planted" / hashlib.sha256(text.encode()).hexdigest()[:16] / kernel.name
            )
            kernel.parent.mkdir(parents=True, exist_ok=True)
            kernel.write_text(text.replace('#include "../', f'#include "{ROOT}/csrc/'))
        sources.append(kernel)
    objects = _compile([(source, list(extra)) for source in (*sources, main, EMULATION)])
    return _link(objects, [flag for flag in extra if flag.startswith("-fsanitize")])


def _compile(jobs: Sequence[tuple[Path, list[str]]]) -> list[Path]:
    """Object files of (source, flags), named after all that they depend on."""
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, flags = job
        command = ["g++", *(["-x", "c++"] if source.suffix == ".cu" else []), *FLAGS, *flags]
        digest = hashlib.sha256(repr((command, _headers())).encode() + source.read_bytes())
        target = BUILD / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            part = f"{target}.{os.getpid()}"
            subprocess.run([*command, "-c", str(source), "-o", part], check=True)
            os.replace(part, target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def _link(objects: Sequence[Path], flags: Sequence[str]) -> Path:
    digest = hashlib.sha256(repr((flags, objects)).encode()).hexdigest()[:16]
    target = BUILD / f"linked-{digest}"
    if not target.exists():
        part = f"{target}.{os.getpid()}"
        subprocess.run(["g++", *flags, *map(str, objects), "-o", part], check=True)
        os.replace(part, target)
    return target


@cache
def _headers() -> str:
    """A hash of every header that a source may include."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/**/*.h"), *HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(module(default_target()))
