"""Every state of the CUDA backend but one that needs a GPU: not built, no driver, too old, no device.

Drivers are played by a libcuda.so.1 of a few lines; the CUDA runtime that meets it is the real one of
the compiled module.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import isolated
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


def test_not_built(monkeypatch, tmp_path):
    """The reason that setup.py noted comes through, with the way out."""
    monkeypatch.setattr(_status, "core", lambda emulate: _status._not_built())
    note = Path(_status.__file__).with_name("not_built.txt")
    monkeypatch.setattr(_status, "_NOTE", tmp_path / note.name)
    _status.why_no_device.cache_clear()  # other tests may have asked
    assert "no reason was noted" in cuda.why_not("cuda")
    (tmp_path / note.name).write_text("no nvcc was found\n")
    _status.why_no_device.cache_clear()
    text = cuda.why_not("cuda")
    _status.why_no_device.cache_clear()
    assert text == (
        "this dcnlib was built without its CUDA part: no nvcc was found; "
        "move the tensors to the CPU with .cpu() and dcnlib runs there"
    )


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


def test_emulation_says_so(emulation_path):
    """As a whole process: on CPU tensors and arrays it runs, for CUDA tensors it has a reason."""
    pytest.importorskip("torch")
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
        "try: print(eval(sys.argv[1], names))\n"
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
