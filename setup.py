"""Builds the compiled parts: a Cython module, and the kernels once for each instruction set.

Everything else about the package is in pyproject.toml. Switches (environment variables):

DCNLIB_OPENMP=auto|1|0   0 builds single-threaded, 1 fails if there is no OpenMP (default auto)
DCNLIB_WERROR=1          compiler warnings are errors
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)

MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).rsplit("-", 1)[-1]
X86 = MACHINE in ("x86_64", "AMD64", "amd64")

#: Of every C++ file. No -ffast-math: NaN and infinities are values, sums keep their order.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-fno-math-errno", "-fno-semantic-interposition", "-fstack-protector-strong",
    "-Wall", "-Wextra",
]  # fmt: skip
#: Of the kernels: a multiply and an add become one instruction where the machine has it.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-trapping-math", "-fno-threadsafe-statics", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
KERNELS = {
    "scalar": ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"],
    "baseline": [],
}
if X86:
    KERNELS["avx2"] = AVX2
    KERNELS["avx512"] = [
        *AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512",
    ]  # fmt: skip

NO_COMPILER = """
dcnlib: no working C++ compiler: {reason}
dcnlib needs one to build its kernels, GCC or Clang. On Debian and Ubuntu:
    apt-get install build-essential python3-dev
"""


class BuildExt(build_ext):
    """build_ext with an object file for each instruction set and OpenMP where there is one."""

    def build_extensions(self) -> None:
        self.openmp = self.find_openmp()
        self.force = self.force or self.settings_changed()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        flags = list(CXX_FLAGS)
        if os.environ.get("DCNLIB_WERROR") == "1":
            flags.append("-Werror")
        ext.extra_compile_args = [*flags, "-Wno-unused-function", *self.openmp]
        ext.extra_link_args = [*self.openmp, "-Wl,-z,relro,-z,now,-z,noexecstack", "-Wl,-s"]
        ext.extra_objects = self.kernel_objects(flags)
        super().build_extension(ext)

    def kernel_objects(self, flags: list[str]) -> list[str]:
        """Compile csrc/cpu/kernels/<isa>.cpp, all at once; every object exports one symbol."""
        headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.inc")]
        newest = max(path.stat().st_mtime for path in headers)

        def compile_one(isa: str) -> str:
            source = f"csrc/cpu/kernels/{isa}.cpp"
            target = Path(self.build_temp) / f"{source.removesuffix('.cpp')}.o"
            if (
                self.force
                or not target.exists()
                or target.stat().st_mtime < max(newest, Path(source).stat().st_mtime)
            ):
                self.compiler.compile(
                    [source],
                    output_dir=self.build_temp,
                    extra_postargs=[*flags, *KERNEL_FLAGS, *KERNELS[isa]],
                )
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, KERNELS))

    def find_openmp(self) -> list[str]:
        """The flags for OpenMP, none without it; the end of the build without a compiler."""
        wanted = os.environ.get("DCNLIB_OPENMP", "auto")
        failure = self.try_to_link("int main() { return 0; }", [])
        if failure:
            sys.exit(NO_COMPILER.format(reason=failure))
        if wanted == "0":
            return []
        program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
        failure = self.try_to_link(program, ["-fopenmp"])
        if not failure:
            return ["-fopenmp"]
        if wanted == "1":
            sys.exit(f"dcnlib: DCNLIB_OPENMP=1, but there is no OpenMP: {failure}")
        print(f"dcnlib: WARNING: no OpenMP, the build is single-threaded: {failure}")
        return []

    def try_to_link(self, program: str, flags: list[str]) -> str:
        """The first line of what the compiler says against `program`, "" if nothing."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(program)
            command = [*self.compiler.compiler_so_cxx, *flags, str(source), "-o", f"{folder}/probe"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                return str(error)
        lines = done.stderr.strip().splitlines() or [f"{command[0]} failed"]
        return lines[0] if done.returncode else ""

    def settings_changed(self) -> bool:
        """Whether flags or compiler differ from the last build: setuptools looks at times alone."""
        settings = [CXX_FLAGS, KERNEL_FLAGS, KERNELS, self.openmp, self.compiler.compiler_so_cxx,
                    os.environ.get("DCNLIB_WERROR", "")]  # fmt: skip
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        stamp = Path(self.build_temp) / "settings"
        changed = not stamp.exists() or stamp.read_text() != digest
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)
        return changed


CPU = Extension(
    "dcnlib.backends.cpu._core",
    ["csrc/cpu/_core.pyx", "csrc/cpu/dispatch.cpp", "csrc/cpu/threads.cpp"],
    include_dirs=["csrc", "csrc/cpu"],
    depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()],
    language="c++",
)

setup(
    ext_modules=cythonize(
        [CPU],
        include_path=["csrc/cpu"],
        build_dir="build/cython",
        compiler_directives={"language_level": 3, "embedsignature": True},
    ),
    cmdclass={"build_ext": BuildExt},
)
