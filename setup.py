"""Builds the compiled parts: a Cython module and the kernels for CPUs, the same for CUDA.

Everything else about the package is in pyproject.toml. Switches (environment variables):

DCNLIB_OPENMP=auto|1|0   0 builds single-threaded, 1 fails if there is no OpenMP (default auto)
DCNLIB_CUDA=auto|1|0     0 builds no CUDA module, 1 fails if it cannot be built (default auto; for
                         releases 0)
DCNLIB_CUDA_ARCHS        its architectures, "80 90+ptx": machine code for both, PTX of the last; "all";
                         default: those of the GPUs that are here, "90+ptx" where there are none
CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is, if not on the PATH, in /usr/local/cuda or from pip
DCNLIB_WERROR=1          compiler warnings are errors
DCNLIB_SYMBOLS=1         functions keep their names, for profilers
DCNLIB_RELEASE=1         for wheels: cp311-abi3, one for Python 3.11 and all later ones, and small
CC, CXX, LDSHARED, LDCXXSHARED, _PYTHON_HOST_PLATFORM   of another machine, for a cross build
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)

MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).rsplit("-", 1)[-1]
X86 = MACHINE in ("x86_64", "AMD64", "amd64")

#: Of every C++ file. No fast math: NaN and infinities are values, sums keep their order.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-fno-math-errno", "-fno-semantic-interposition", "-fstack-protector-strong",
    "-Wall", "-Wextra",
]  # fmt: skip
#: Of the kernels: a multiply and an add become one instruction where the machine has it.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-trapping-math", "-fno-threadsafe-statics", "-Wno-psabi"]
#: New versions of GCC take some of them apart again where they think that faster: not the same ones in
#: all variants of a kernel, and bits would depend on which of them runs.
KEEP_FUSED = "--param=avoid-fma-max-bits=0"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
KERNELS = {
    "scalar": ["-fno-tree-vectorize", "-fno-tree-slp-vectorize"],
    "baseline": [],
}
if MACHINE in ("aarch64", "arm64"):
    # Scheduled before registers are given, the 28 sums of the register kernel would not keep theirs.
    KERNELS["baseline"] = ["-fno-schedule-insns"]
if X86:
    KERNELS["avx2"] = AVX2
    KERNELS["avx512"] = [
        *AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512",
    ]  # fmt: skip

#: What each kernel file is compiled to, one object a part: DCN_PART of kernel_table.inc.
PARTS = ("CONV", "POOL", "RESAMPLE", "CONV_DOUBLE", "POOL_DOUBLE", "RESAMPLE_DOUBLE")
RELEASE = os.environ.get("DCNLIB_RELEASE") == "1"
SYMBOLS = os.environ.get("DCNLIB_SYMBOLS") == "1"
#: Parts that an instruction set has from another one.
BORROWED: dict[tuple[str, str], str] = {}
#: Beyond KERNELS, of the parts that are compiled.
PART_FLAGS: dict[tuple[str, str], list[str]] = {(i, part): [] for i in KERNELS for part in PARTS}
if RELEASE:
    # A wheel is to have half a megabyte. All options give the same bits; what they cost in speed:
    #   FAST   of -O3's loops hand-vectorised ones keep their speed; loops that the compiler vectorises
    #          need the cost model of -O3. float32, both directions, 1 % longer than in the default build
    #   SMALL  float64, and what comes from SSE2, a tenth to a third slower
    # Without the scalar kernels, an instrument of the tests. Below -O3 GCC does not see that a loop over
    # lanes fills the vector, and warns.
    del KERNELS["scalar"]
    KERNEL_FLAGS += [
        "-Wno-maybe-uninitialized", "-fno-asynchronous-unwind-tables", "-fno-stack-protector",
        "-ffunction-sections",
    ]  # fmt: skip
    FAST = [
        "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "--param=vect-epilogues-nomask=0",
        "-fno-tree-pre", "-DDCN_VARIANTS=1",
    ]  # fmt: skip
    SMALL = ["-Os", "-fno-schedule-insns2", "-DDCN_VARIANTS=0"]
    PART_FLAGS = {(isa, part): FAST for isa in KERNELS for part in PARTS}
    if X86:
        # What the rest costs: with AVX-512 float64 takes twice as long, resampling a third longer. From
        # SSE2 RoI pooling in float32 takes 1.3 to 1.7 times as long (8 kB), in float64 1.4 times;
        # resampling in float64 takes 1.7 times as long (7 kB), as planes of 2^29 pixels and more do (4 kB).
        # float64 convolutions from SSE2 would save 15 kB more and double their time.
        BORROWED |= {("avx512", part): "avx2" for part in PARTS if part != "CONV"}
        for isa in ("avx512", "avx2"):
            BORROWED |= {
                (isa, part): "baseline" for part in ("POOL", "POOL_DOUBLE", "RESAMPLE_DOUBLE")
            }
        BORROWED["avx2", "LARGE_RESAMPLE"] = "baseline"
        for isa, part in list(PART_FLAGS):
            if (isa, part) in BORROWED:
                del PART_FLAGS[isa, part]
            elif isa == "baseline" or part not in ("CONV", "RESAMPLE"):
                PART_FLAGS[isa, part] = SMALL  # baseline: of processors before 2013

#: Of every .cu file. A multiply and an add become one instruction, as on the CPU.
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
#: Everything that CUDA 13 knows as a product of its own; PTX for what comes later.
ALL_ARCHS = "75 80 86 89 90 100 120+ptx"
CUDA_WANTED = os.environ.get("DCNLIB_CUDA", "0" if RELEASE else "auto")
CUDA_MODULE = "dcnlib.backends.cuda._core"
CUDA_NOTE = "dcnlib/backends/cuda/not_built.txt"  # what the backend gives as its reason

NO_COMPILER = """
dcnlib: no working C++ compiler: {reason}
dcnlib needs one to build its kernels, GCC or Clang. On Debian and Ubuntu:
    apt-get install build-essential python3-dev
"""


class BuildExt(build_ext):
    """build_ext with an object file for each instruction set, OpenMP and CUDA where there are any."""

    def run(self) -> None:
        self.cuda_objects: list[str] = []
        reason = self.build_cuda()
        if reason:
            self.extensions = [ext for ext in self.extensions if ext.name != CUDA_MODULE]
        folders = [Path(self.build_lib)]
        if self.inplace or getattr(self, "editable_mode", False):
            folders.append(ROOT)
        for folder in folders:
            note = folder / CUDA_NOTE
            note.unlink(missing_ok=True)
            if reason:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{reason}\n")
        super().run()

    def build_extensions(self) -> None:
        self.openmp = self.find_openmp()
        self.keep_fused = self.find_keep_fused()
        self.force = self.force or self.settings_changed()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        flags = list(CXX_FLAGS)
        if os.environ.get("DCNLIB_WERROR") == "1":
            flags.append("-Werror")
        ext.extra_compile_args = [*flags, "-Wno-unused-function"]
        if RELEASE:
            ext.extra_compile_args += ["-Os", "-fno-asynchronous-unwind-tables"]
        ext.extra_link_args = ["-Wl,-z,relro,-z,now,-z,noexecstack"]
        if not SYMBOLS:
            ext.extra_link_args.append("-Wl,-s")
        if ext.name == CUDA_MODULE:
            ext.extra_objects = self.cuda_objects
            ext.libraries = ["rt", "pthread", "dl"]  # of the static CUDA runtime
        else:
            ext.extra_compile_args += self.openmp
            ext.extra_link_args += self.openmp
            ext.extra_objects = self.kernel_objects(flags)
        super().build_extension(ext)

    def build_cuda(self) -> str:
        """Compile csrc/cuda/*.cu; why there is no CUDA module, "" if there is one."""
        if CUDA_WANTED == "0":
            return "DCNLIB_CUDA=0 when it was built"
        try:
            nvcc, library = find_toolkit()
            archs = cuda_archs()
            self.cuda_objects = [*cuda_objects(nvcc, archs, Path(self.build_temp)), library]
        except CudaMissing as missing:
            if CUDA_WANTED == "1":
                sys.exit(f"dcnlib: DCNLIB_CUDA=1, but {missing}")
            print(f"dcnlib: no CUDA backend: {missing}. The CPU backend is complete without it.")
            return str(missing)
        print(f"dcnlib: CUDA backend for {archs}, by {nvcc}")
        return ""

    def kernel_objects(self, flags: list[str]) -> list[str]:
        """Compile csrc/cpu/kernels/<isa>.cpp, every part of it, all at once."""
        flags = [*flags, *self.keep_fused]
        headers = [path for path in cpu_sources() if path.suffix in (".h", ".inc")]
        newest = max(path.stat().st_mtime for path in headers)

        def compile_one(key: tuple[str, str]) -> str:
            isa, part = key
            source = f"csrc/cpu/kernels/{isa}.cpp"
            folder = Path(self.build_temp) / part.lower()
            target = folder / f"{source.removesuffix('.cpp')}.o"
            macros: list[tuple[str, str | None]] = [("DCN_PART", f"DCN_PART_{part}")]
            macros += [(f"DCN_{what}_OF", BORROWED[i, what]) for i, what in BORROWED if i == isa]
            if (
                self.force
                or not target.exists()
                or target.stat().st_mtime < max(newest, Path(source).stat().st_mtime)
            ):
                self.compiler.compile(
                    [source],
                    output_dir=str(folder),
                    macros=macros,
                    extra_postargs=[*flags, *KERNEL_FLAGS, *PART_FLAGS[key], *KERNELS[isa]],
                )
                if RELEASE and X86:
                    sort_functions(target)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, PART_FLAGS))

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

    def find_keep_fused(self) -> list[str]:
        """KEEP_FUSED where the compiler knows it; if the environment's flags warn, that cannot be seen."""
        program = "int main() { return 0; }"
        is_known = not self.try_to_link(program, ["-Werror", KEEP_FUSED])
        warns_anyway = bool(self.try_to_link(program, ["-Werror"]))
        return [KEEP_FUSED] if is_known or warns_anyway else []

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
        settings = [CXX_FLAGS, KERNEL_FLAGS, KERNELS, repr(PART_FLAGS), repr(BORROWED), self.openmp,
                    self.keep_fused, self.compiler.compiler_so_cxx, RELEASE, SYMBOLS,
                    os.environ.get("DCNLIB_WERROR", "")]  # fmt: skip
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        stamp = Path(self.build_temp) / "settings"
        changed = not stamp.exists() or stamp.read_text() != digest
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)
        return changed


class BuildPy(build_py):
    """build_py; a wheel without CUDA has what says so, and not what only CUDA's compiled part needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if not RELEASE or CUDA_WANTED != "0" or package != "dcnlib.backends.cuda":
            return modules
        return [found for found in modules if found[1] in ("__init__", "_settings", "_status")]


def sort_functions(target: Path) -> None:
    """Have the linker put functions of one name side by side, whatever their instruction set.

    What they share then lies near enough for a wheel's compression to find it: 28 kB less. GNU ld sorts
    sections of this name; to others they are names like all.
    """
    listing = subprocess.run(["objdump", "-h", target], check=True, capture_output=True, text=True)
    pattern = rf" (\.text\.(?:unlikely\.)?_ZZ?NK?\d+({'|'.join(KERNELS)})(\S+))"
    renames = []
    for section, isa, name in re.findall(pattern, listing.stdout):
        renames += ["--rename-section", f"{section}=.text.sorted.{name}.{isa}"]
    subprocess.run(["objcopy", *renames, target], check=True)


def cpu_sources() -> list[Path]:
    """Everything that the CPU module is made of."""
    return [path for path in [*ROOT.glob("csrc/*"), *ROOT.glob("csrc/cpu/**/*")] if path.is_file()]


class CudaMissing(Exception):
    """The reason why there is no CUDA module."""


def find_toolkit() -> tuple[str, str]:
    """nvcc, of a toolkit that can link a program, and its libcudart_static.a.

    A toolkit that the environment names is the only one asked.
    """
    suffixes = {"CUDACXX": "", "CUDA_HOME": "/bin/nvcc", "CUDA_PATH": "/bin/nvcc"}
    for name, suffix in suffixes.items():
        if root := os.environ.get(name):
            candidates = [Path(root + suffix)]
            if not candidates[0].exists():
                raise CudaMissing(f"{name}={root} does not exist")
            break
    else:
        candidates = [Path(shutil.which("nvcc") or "nvcc"), Path("/usr/local/cuda/bin/nvcc")]
        candidates += [p for f in sys.path for p in Path(f or ".").glob("nvidia/cu1*/bin/nvcc")]
    reason = (
        "no nvcc was found (CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, pip); "
        'python -m pip install "cuda-toolkit[nvcc,cudart,cccl]==13.0.*" brings one'
    )
    for nvcc in filter(Path.exists, candidates):
        root = nvcc.parents[1]
        libraries = [*root.glob("lib*/libcudart_static.a"),
                     *root.glob("targets/*/lib/libcudart_static.a")]  # fmt: skip
        if not libraries:
            reason = f"{nvcc} has no libcudart_static.a beside it"
            continue
        failure = try_nvcc(nvcc, libraries[0])
        if not failure:
            return str(nvcc), str(libraries[0])
        reason = f"{nvcc} does not work: {failure}"
    raise CudaMissing(reason)


def try_nvcc(nvcc: Path, library: Path) -> str:
    """The first line of what it says against a small program, "" if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(
            "#include <cuda_bf16.h>\n__global__ void f(float *x) { *x = 1; }\n"
            "int main() { f<<<1, 1>>>(nullptr); return cudaGetLastError(); }\n"
        )
        command = [str(nvcc), *NVCC_FLAGS, *gencode(cuda_archs()), str(source),
                   "-L", str(library.parent), "-o", f"{folder}/probe"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[0] if done.returncode else ""


def cuda_archs() -> str:
    """What to build for, as DCNLIB_CUDA_ARCHS has it."""
    wanted = os.environ.get("DCNLIB_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").lower()
    if wanted.strip() == "all":
        return ALL_ARCHS
    if not wanted.strip():
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            found = ""
        return " ".join(sorted({line.replace(".", "") for line in found.split()})) or "90+ptx"
    archs = [arch.replace(".", "") for arch in wanted.split()]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}(\+ptx)?", arch):
            raise CudaMissing(f"DCNLIB_CUDA_ARCHS has {arch!r}; expected numbers as in 80 90+ptx")
    return " ".join(archs)


def gencode(archs: str) -> list[str]:
    """nvcc's flags for architectures; many are compressed, at no cost but a moment at load time."""
    flags = []
    for arch in archs.split():
        number, _, ptx = arch.partition("+")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cuda_objects(nvcc: str, archs: str, folder: Path) -> list[str]:
    """Compile csrc/cuda/*.cu, all at once, into a folder for these flags."""
    command = [nvcc, *NVCC_FLAGS, *gencode(archs), f'-DDCN_CUDA_ARCHS="{archs}"']
    if len(archs.split()) > 2:
        command.append("-Xfatbin=-compress-all")
    folder = folder / f"cuda-{hashlib.sha256(repr(command).encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h")]
    newest = max(path.stat().st_mtime for path in headers)

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            done = subprocess.run(
                [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
            )
            print(done.stdout, done.stderr, sep="", end="")
            if done.returncode:
                error = re.search(r".*\berror\b.*", done.stderr) or [f"status {done.returncode}"]
                raise CudaMissing(f"nvcc failed on {source.name}: {error[0].strip()}")
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sorted(ROOT.glob("csrc/cuda/*.cu"))))


LIMITED_API = {
    "define_macros": [("Py_LIMITED_API", "0x030B0000"), ("DCN_RELEASE", "1")] if RELEASE else [],
    "py_limited_api": RELEASE,
}
CPU = Extension(
    "dcnlib.backends.cpu._core",
    [
        "csrc/cpu/_core.pyx",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/threads.cpp",
        "csrc/cpu/workspace.cpp",
    ],
    include_dirs=["csrc", "csrc/cpu"],
    depends=[str(path.relative_to(ROOT)) for path in cpu_sources()],
    language="c++",
    **LIMITED_API,
)
CUDA = Extension(
    CUDA_MODULE,
    ["csrc/cuda/_core.pyx"],
    include_dirs=["csrc", "csrc/cuda"],
    depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*")],
    language="c++",
    **LIMITED_API,
)

setup(
    ext_modules=cythonize(
        [CPU, CUDA],
        include_path=["csrc", "csrc/cpu", "csrc/cuda"],
        build_dir="build/cython",
        compiler_directives={"language_level": 3, "embedsignature": True, "binding": False},
    ),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if RELEASE else {},
)
