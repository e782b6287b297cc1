"""Every state of the CUDA backend but one that needs a GPU: not built, no driver, too old, no device.

Drivers are played by a libcuda.so.1 of a few lines; the CUDA runtime that meets it is the real one of
the compiled module.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dcnlib
import isolated
from dcnlib import _info
from dcnlib.backends import cuda
from dcnlib.backends.cuda import _status

BUILT = importlib.util.find_spec("dcnlib.backends.cuda._core") is not None

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuGetProcAddress_v2(const char *name, void **found, int v, unsigned long long f, int *status) {
  *found = !strcmp(name, "cuInit") ? (void *)cuInit
         : !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
         : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2 : 0;
  if (status) *status = *found ? 0 : 1;
  return *found ? 0 : 500;
}
"""
ASK = "import json, dcnlib; print(json.dumps(dcnlib.backends()['cuda']))"


def ask(**environment):
    """`dcnlib.backends()["cuda"]` of a fresh process."""
    done = isolated.python(ASK, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def driver(tmp_path):
    """A folder with a driver that answers as asked."""
    if not BUILT:
        pytest.skip(f"there is no CUDA module: {_status.core(False)}")

    def make(init, version):
        source = tmp_path / "driver.c"
        source.write_text(DRIVER)
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-DINIT={init}", f"-DVERSION={version}", str(source),
             "-o", str(tmp_path / "libcuda.so.1")],
            check=True,
        )  # fmt: skip
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("init", "version", "reason"),
    [
        (100, 13000, "no device that this process may use"),
        (0, 12080, "too old: it supports CUDA 12.8 and dcnlib was built with CUDA 1"),
        (3, 13000, r"does not start: initialization error \(error 3\)"),
    ],
    ids=["no_device", "too_old", "broken"],
)
def test_drivers(driver, init, version, reason):
    available, text = ask(LD_LIBRARY_PATH=driver(init, version))
    assert not available
    assert re.search(reason, text), text


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a driver")
def test_no_driver():
    if not BUILT:
        pytest.skip(f"there is no CUDA module: {_status.core(False)}")
    available, text = ask()
    assert not available
    assert text.startswith("there is no NVIDIA driver on this machine; ") and ".cpu()" in text


@pytest.fixture
def forget():
    """The backend is asked afresh, before the test and after it."""
    _status.why_no_device.cache_clear()
    yield _status.why_no_device.cache_clear
    _status.why_no_device.cache_clear()


def test_not_built(monkeypatch, tmp_path, forget):
    """The reason that setup.py noted comes through, with the way out."""
    monkeypatch.setattr(_status, "core", lambda emulate: _status._not_built())
    note = Path(_status.__file__).with_name("not_built.txt")
    monkeypatch.setattr(_status, "_NOTE", tmp_path / note.name)
    assert "no reason was noted" in cuda.why_not("cuda")
    (tmp_path / note.name).write_text("no nvcc was found\n")
    forget()
    assert cuda.why_not("cuda") == (
        "this dcnlib was built without its CUDA part: no nvcc was found; "
        "move the tensors to the CPU with .cpu() and dcnlib runs there"
    )


class Core:
    """The compiled module as it answers in some state."""

    def __init__(self, *state, capability=(9, 0)):
        self.state = lambda: state
        self.device = lambda index: ("NVIDIA H100", *capability, 132, 80 << 30)
        self.archs = lambda: "90+ptx"
        self.error_text = lambda code: f"error {code}"


STATES = {
    "this dcnlib was built without its CUDA part: ": "this dcnlib was built without its CUDA part: ?",
    "there is no NVIDIA driver": Core(35, 0, 13000, 0),
    "the NVIDIA driver is too old: ": Core(35, 12080, 13000, 0),
    "there is an NVIDIA driver, but no device": Core(100, 13000, 13000, 0),
    "there is no kernel image for NVIDIA H100 (capability 7.5)": Core(
        0, 13000, 13000, 1, capability=(7, 5)
    ),
    "ready": Core(0, 13000, 13000, 1),
}


@pytest.mark.parametrize("says", STATES)
def test_states_are_told_apart(monkeypatch, forget, says):
    """By `dcnlib.backends` and by `python -m dcnlib info`; only the last one is available."""
    monkeypatch.setattr(_status, "core", lambda emulate: STATES[says])
    available, reason = dcnlib.backends()["cuda"]
    assert available == (says == "ready") and reason.startswith(says)
    assert available or reason.endswith(
        "; move the tensors to the CPU with .cpu() and dcnlib runs there"
    )
    text = _info.text(_info.collect())
    assert f"cuda       {'runs' if available else 'does not run: ' + reason}" in text
    assert ("NVIDIA H100, capability 9.0, 132 multiprocessors, 80 GiB" in text) == available


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("90+ptx", (9, 0), True), ("90+ptx", (10, 0), True), ("90+ptx", (12, 1), True),
        ("90+ptx", (8, 9), False), ("75 80", (8, 6), True), ("75 80", (7, 5), True),
        ("75 80", (9, 0), False), ("75 80", (7, 0), False), ("86", (8, 0), False),
        ("75 80 86 89 90 100 120+ptx", (8, 7), True), ("100", (10, 3), True),
        ("120+ptx", (10, 0), False),
    ],
)  # fmt: skip
def test_which_devices_a_build_serves(archs, capability, runs):
    assert _status.has_code(archs, *capability) == runs


def test_no_kernel_image():
    devices = [("Tesla V100", 7, 0, 80, 16 << 30), ("Tesla T4", 7, 5, 40, 16 << 30)]
    assert _status.no_code("90+ptx", devices) == (
        "there is no kernel image for Tesla V100 (capability 7.0), Tesla T4 (capability 7.5): this "
        'build has 90+ptx; build dcnlib with DCNLIB_CUDA_ARCHS="70 75"'
    )


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ((0, 13000, 13000, 2), None),
        ((0, 13000, 13000, 0), "no device"),
        ((100, 13000, 13000, 0), "no device"),
        ((35, 0, 13000, 0), "no NVIDIA driver"),
        ((35, 11040, 12080, 0), "supports CUDA 11.4 and dcnlib was built with CUDA 12.8"),
        ((804, 13000, 13000, 0), r"does not start: what 804 means \(error 804\)"),
    ],
)
def test_what_a_state_means(state, reason):
    text = _status.explain(*state, lambda code: f"what {code} means")
    assert text is None if reason is None else re.search(reason, text)


def test_emulation_says_so(emulation):
    """As a whole process: on CPU tensors and arrays it runs, for CUDA tensors it has a reason."""
    code = (
        "import numpy as np, dcnlib\n"
        "x = np.ones((1, 1, 2, 2), np.float32); o = np.zeros((1, 2, 2, 2), np.float32)\n"
        "y = dcnlib.deform_conv2d(x, o, np.ones((1, 1, 1, 1), np.float32), backend='cuda')\n"
        "print(y.sum(), dcnlib.backends()['cuda'].reason)"
    )
    done = isolated.python(code, DCNLIB_CUDA_EMULATE="1")
    assert done.stdout == "4.0 it is emulated on the CPU (DCNLIB_CUDA_EMULATE=1)\n", done.stderr


def test_a_bad_environment_is_an_error():
    for name, value, text in (
        ("DCNLIB_CUDA_WORKSPACE", "much", "DCNLIB_CUDA_WORKSPACE: must be a number of MiB"),
        ("DCNLIB_CUDA_KERNELS", "fast", "kernels: unknown; expected auto, planar, rows, got fast"),
        ("DCNLIB_CUDA_SAMPLES", "half", "samples: unknown; expected exact, rounded, got half"),
    ):
        done = isolated.python("from dcnlib.backends import cuda", **{name: value})
        assert done.returncode and text in done.stderr


def test_import_asks_no_driver():
    """Fork after import stays possible: neither import nor a CPU call loads the driver."""
    code = (
        "import numpy as np, dcnlib\n"
        "x = np.ones((1, 1, 2, 2), np.float32); o = np.zeros((1, 2, 2, 2), np.float32)\n"
        "dcnlib.deform_conv2d(x, o, np.ones((1, 1, 1, 1), np.float32))\n"
        "import sys; print('torch' in sys.modules, 'dcnlib.backends.cuda' in sys.modules)\n"
        "print('libcuda' in open('/proc/self/maps').read())"
    )
    assert isolated.python(code).stdout.split() == ["False", "False", "False"]


def test_the_module_needs_no_cuda_library():
    """The CUDA runtime is inside and loads the driver itself, when somebody asks for devices."""
    if not BUILT:
        pytest.skip(f"there is no CUDA module: {_status.core(False)}")
    path = importlib.util.find_spec("dcnlib.backends.cuda._core").origin
    said = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(\w[\w+-]*)", said.stdout)
    assert "libc" in needed and not {"libcuda", "libcudart", "libtorch", "libc10"} & {*needed}


def test_launches_are_all_that_kernels_sources_ask_of_cuda():
    """No allocation, no copy, no synchronisation: calls can be queued and captured."""
    root = Path(__file__).parents[2] / "csrc/cuda"
    used = {
        name
        for path in root.glob("*.*")
        for name in re.findall(r"\bcuda[A-Z]\w+(?=\()", path.read_text())
    }
    assert used == {
        "cudaGetDevice", "cudaSetDevice", "cudaGetLastError", "cudaGetErrorString",
        "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaDriverGetVersion",
        "cudaRuntimeGetVersion",
    }  # fmt: skip


# ---- setup.py ----------------------------------------------------------------------------------


@pytest.fixture
def setup_py():
    """Calls an expression over setup.py's names, without a build; (status, output)."""
    pytest.importorskip("Cython", reason="setup.py needs Cython")
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    root = Path(__file__).parents[2]
    code = (
        "import runpy, sys, setuptools, Cython.Build\n"
        "setuptools.setup = lambda **k: None\n"
        "Cython.Build.cythonize = lambda *a, **k: []\n"
        f"names = runpy.run_path({str(root / 'setup.py')!r})\n"
        "names['build'] = names['BuildExt'](setuptools.Distribution())\n"
        "names['build'].build_temp = '/nonexistent'\n"
        "try: print(eval(sys.argv[1], names))\n"
        "except SystemExit as stop: print('stopped:', stop)\n"
        "except names['CudaMissing'] as missing: print('missing:', missing)"
    )

    def call(expression, **environment):
        done = isolated.python(code, expression, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


def test_setup_architectures(setup_py):
    assert setup_py("cuda_archs()", DCNLIB_CUDA_ARCHS="8.0;90+PTX") == "80 90+ptx"
    assert setup_py("cuda_archs()", DCNLIB_CUDA_ARCHS="all").startswith("75 80")
    assert "'ninety'" in setup_py("cuda_archs()", DCNLIB_CUDA_ARCHS="ninety")
    flags = setup_py("' '.join(gencode('80 90+ptx'))")
    assert flags == (
        "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 "
        "-gencode arch=compute_90,code=compute_90"
    )


def test_setup_takes_the_nvcc_that_is_named(setup_py, tmp_path):
    """A named toolkit that does not work is the reason; no other one is taken in its place."""
    nvcc = tmp_path / "bin/nvcc"
    nowhere = setup_py("find_toolkit()", CUDACXX=str(nvcc))
    assert nowhere == f"missing: CUDACXX={nvcc} does not exist"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'error: the toolkit is broken' >&2; exit 1\n")
    nvcc.chmod(0o755)
    bare = setup_py("find_toolkit()", CUDA_HOME=str(tmp_path))
    assert bare == f"missing: {nvcc} has no libcudart_static.a beside it"
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcudart_static.a").touch()
    broken = setup_py("find_toolkit()", CUDA_HOME=str(tmp_path))
    assert broken == f"missing: {nvcc} does not work: error: the toolkit is broken"


def test_setup_switch(setup_py, tmp_path):
    """auto goes on without CUDA and notes why, 1 stops with the reason, 0 does not look."""
    nowhere = {"CUDA_HOME": str(tmp_path)}
    reason = f"CUDA_HOME={tmp_path} does not exist"
    auto = setup_py("build.build_cuda()", DCNLIB_CUDA="auto", **nowhere)
    assert auto == (
        f"dcnlib: no CUDA backend: {reason}. The CPU backend is complete without it.\n{reason}"
    )
    must = setup_py("build.build_cuda()", DCNLIB_CUDA="1", **nowhere)
    assert must == f"stopped: dcnlib: DCNLIB_CUDA=1, but {reason}"
    assert setup_py("build.build_cuda()", DCNLIB_CUDA="0") == "DCNLIB_CUDA=0 when it was built"


def test_setup_compiles_for_every_architecture(setup_py, tmp_path):
    """What nvcc is asked for: sm_75 to sm_120 and PTX, compressed; a plain build is sm_90 and PTX."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    nvcc.chmod(0o755)
    sources = len(list((Path(__file__).parents[2] / "csrc/cuda").glob("*.cu")))
    for archs in ("all", "90+ptx"):
        (tmp_path / "asked").unlink(missing_ok=True)
        expression = f"cuda_objects({str(nvcc)!r}, cuda_archs(), Path({str(tmp_path / archs)!r}))"
        assert setup_py(expression, DCNLIB_CUDA_ARCHS=archs).count(".o'") == sources
        asked = (tmp_path / "asked").read_text().splitlines()
        assert len(asked) == sources
        for line in asked:
            codes = re.findall(r"code=(\w+)", line)
            numbers = [75, 80, 86, 89, 90, 100, 120] if archs == "all" else [90]
            assert codes == [*(f"sm_{n}" for n in numbers), f"compute_{numbers[-1]}"]
            assert ("-compress-all" in line) == (archs == "all")


# ---- machine code ------------------------------------------------------------------------------


def test_machine_code_is_as_committed():
    """Registers, spills, shared memory and wide accesses of every kernel, where nvcc is present."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools/gpu"))
    import resources

    version, expected = resources.committed()
    assert all(row["spilled"] == "0" and row["local"] == "0" for row in expected.values())
    for kernel, row in expected.items():
        if kernel.startswith("rows_"):
            assert int(row["load16"]) >= 4 and int(row["store16"]) == 2, kernel
        if kernel.startswith("rows_backward") and "double" not in kernel:
            assert int(row["reduce16"]) in (4, 8) and row["reduce"] == "0", kernel
    tools = resources.toolkit()
    if tools is None:
        pytest.skip("there is no nvcc here: the committed table was read, nothing compiled")
    if tools.version != version:
        pytest.skip(f"the table is of nvcc {version}, this is {tools.version}: not compared")
    assert not resources.differences(resources.measure(tools), expected)


@pytest.fixture
def verified():
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools/gpu"))
    import verified

    return verified


def test_the_record_of_hardware_runs(verified):
    """VERIFIED.json says what a GPU has run, or that none has, file by file."""
    record = json.loads(verified.RECORD.read_text())
    assert record.keys() == {"hardware_run", "device", "date", "stages", "sources"}
    ran = record["hardware_run"] == "passed"
    assert ran or record["hardware_run"] == "outstanding"
    assert ran == bool(record["device"]) == bool(record["date"]) == bool(record["stages"])
    assert {"csrc/bilinear.h", "csrc/cuda/rows.cu"} < record["sources"].keys()
    for name, digest in record["sources"].items():
        assert re.fullmatch("[0-9a-f]{64}", digest), name
    if not ran:  # what waits is what is there; `tools/gpu/verified.py --outstanding` notes it
        present = verified.sources()
        assert {n: d for n, d in record["sources"].items() if "cuda/" in n and n in present} == {
            n: d for n, d in present.items() if "cuda/" in n
        }
    assert ran or verified.state().startswith("The hardware run is outstanding")


def test_a_hardware_run_is_recorded(verified, monkeypatch, tmp_path):
    """From outstanding to passed, and what is said when a source changes afterwards."""
    monkeypatch.setattr(verified, "RECORD", tmp_path / "VERIFIED.json")
    verified.write("outstanding")
    assert (
        verified.state() == "The hardware run is outstanding: no GPU has run the CUDA sources yet."
    )
    verified.write("passed", "NVIDIA H100, 580.1", ["build 60 s passed"])
    assert verified.state().startswith("NVIDIA H100, 580.1 ran these CUDA sources on 20")
    found = json.loads(verified.RECORD.read_text())
    found["sources"]["csrc/cuda/rows.cu"] = "0" * 64
    del found["sources"]["csrc/cuda/sorted.cu"]
    verified.RECORD.write_text(json.dumps(found))
    assert verified.state().endswith(
        "have changed since: csrc/cuda/rows.cu, csrc/cuda/sorted.cu. The hardware run is outstanding."
    )


# ---- tools/gpu/check.sh ------------------------------------------------------------------------


def test_check_goes_on_behind_failures(tmp_path):
    """Every stage runs and is judged, also when none before it has passed."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["bash", str(root / "tools/gpu/check.sh"), str(tmp_path / "out")],
        env=os.environ | {"PYTHON": "false", "CUDACXX": "false"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    summary = (tmp_path / "out/summary.txt").read_text()
    stages = re.findall(r"^(\w+) +\d+ s  (\w+)", summary, re.M)
    assert [name for name, _ in stages] == [
        "environment", "build", "selftest", "sanitizer", "tests", "bench", "profile"
    ]  # fmt: skip
    verdicts = dict(stages)
    assert {verdicts[name] for name in ("build", "selftest", "tests", "bench")} == {"FAILED"}
    assert done.returncode == 1 and "failed: build selftest" in done.stdout.splitlines()[-1]
    budgets = re.findall(r"limit (\d+) s", done.stdout)
    assert len(budgets) == len(stages) and sum(map(int, budgets)) <= 600
