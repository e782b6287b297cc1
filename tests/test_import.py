"""What `import dcnlib` loads and leaves alone, and what it says when the compiled part is missing.

Each case is a fresh interpreter: what has been imported cannot be taken back.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest

import dcnlib
import isolated
from dcnlib.backends.cpu import _core

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no torch")
needs_openmp = pytest.mark.skipif(not _core.openmp(), reason="built without OpenMP")

#: Modules that cost more than all of dcnlib, none of which its import or its NumPy door needs.
SLOW = ("torch", "ml_dtypes", "matplotlib", "asyncio", "email", "multiprocessing", "subprocess")

USE = """
import numpy as np
import dcnlib
x = np.ones((1, 1, 64, 64), np.float32)
offset, weight = np.zeros((1, 18, 62, 62), np.float32), np.ones((64, 1, 3, 3), np.float32)
dcnlib.set_num_threads(2)
y = dcnlib.deform_conv2d(x, offset, weight)
dcnlib.deform_conv2d_backward(y, x, offset, weight)
"""

USE_TORCH = """
import torch
torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)
"""

PRINT_RUNTIMES = """
from dcnlib._info import openmp_runtimes
print(*openmp_runtimes(), sep="\\n")
"""


def without_renamed(runtimes):
    """Torch before 2.8 loads a runtime of another name even where there is one already."""
    return [path for path in runtimes if "/torch/lib/libgomp-" not in path]


def output(code):
    child = isolated.python(code)
    assert child.returncode == 0, child.stderr
    return child.stdout.split()


@needs_torch
def test_everything_is_reached_from_the_package():
    """Without an import of its part; `convert` imports a part of `compat`, so that comes first."""
    names = (
        "compat.mmcv.deform_conv2d", "compat.paddle.DeformConv2D", "nn.DeformConv2d",
        "convert.replace_modules", "optim.PREDICTORS", "analysis.record_layers", "edge.save",
    )  # fmt: skip
    used = "; ".join(f"dcnlib.{name}" for name in names)
    assert output(f"import dcnlib; {used}; print('there')") == ["there"]


CONVERT = "from dcnlib import convert; convert.offset_channels('dcnv3', 'dcnlib', 3)"


@pytest.mark.parametrize(
    "code", ["import dcnlib", USE, "import dcnlib; dcnlib.show_config()", CONVERT]
)
def test_torch_is_not_imported(code):
    """Not even tried, which a finder sees where torch is not installed, too."""
    watch = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit("torch was asked for")
sys.meta_path.insert(0, Finder())
"""
    child = isolated.python(watch + code)
    assert child.returncode == 0, child.stderr


def test_import_is_cheap():
    """By what is loaded, since a test that takes the time would fail on a busy machine."""
    modules = "print(*{name.partition('.')[0] for name in sys.modules})"
    before = output(f"import sys, numpy; {modules}")
    after = output(f"import sys, dcnlib; {modules}")
    assert not (set(after) - set(before)) & set(SLOW)
    assert "dcnlib" in after


@needs_openmp
@pytest.mark.parametrize(
    "code",
    [
        USE,
        pytest.param(USE_TORCH + USE, marks=needs_torch),
        pytest.param(USE + USE_TORCH, marks=needs_torch),
        pytest.param("import torch\nimport dcnlib\n" + USE + USE_TORCH, marks=needs_torch),
        pytest.param("import dcnlib\nimport torch\n" + USE_TORCH + USE, marks=needs_torch),
    ],
    ids=["alone", "torch_used_first", "dcnlib_used_first", "torch_first", "dcnlib_first"],
)
def test_one_openmp_runtime(code):
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc/self/maps")
    runtimes = output(code + PRINT_RUNTIMES)
    torch_first = code.startswith((USE_TORCH, "import torch"))
    (only,) = runtimes if torch_first else without_renamed(runtimes)
    assert "libgomp" in only or "libomp" in only


@needs_openmp
@pytest.mark.parametrize("use", [USE, pytest.param(USE + USE_TORCH, marks=needs_torch)])
@pytest.mark.parametrize("system_has_one", [True, False])
def test_own_libgomp_only_where_there_is_none(tmp_path, system_has_one, use):
    """A wheel's copy is not touched as long as the core finds one by itself, and torch then has it, too."""
    runtime = next(iter(output(USE + PRINT_RUNTIMES)))
    if "libgomp" not in runtime:
        pytest.skip("built with another OpenMP runtime")
    package = Path(dcnlib.__file__).parent
    shutil.copytree(package, tmp_path / "dcnlib", ignore=shutil.ignore_patterns("__pycache__"))
    copy = tmp_path / "dcnlib" / "_libs" / "libgomp.so.1"
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(runtime, copy)
    hide = """
import importlib
real, asked = importlib.import_module, []
def without_libgomp(name, package=None):
    asked.append(name)
    if asked.count("._core") == 1 and name == "._core":
        raise ImportError("libgomp.so.1: cannot open shared object file: No such file or directory")
    return real(name, package)
importlib.import_module = without_libgomp
"""
    child = isolated.python(
        ("" if system_has_one else hide) + use + PRINT_RUNTIMES, PYTHONPATH=str(tmp_path)
    )
    assert child.returncode == 0, child.stderr
    (only,) = without_renamed(child.stdout.split())
    is_systems = package not in Path(runtime).parents  # and not that of an installed wheel
    assert only == (runtime if system_has_one and is_systems else str(copy))


@pytest.fixture
def source_only(tmp_path):
    """A copy of the package as it stands in a fresh clone."""
    package = Path(dcnlib.__file__).parent
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(package, tmp_path / "dcnlib", ignore=ignore)
    return tmp_path


@pytest.mark.parametrize(
    "code", ["import dcnlib", "import dcnlib.testing", "from dcnlib import nn"]
)
def test_missing_core_says_what_to_do(source_only, code):
    child = isolated.python(code, PYTHONPATH=str(source_only))
    assert child.returncode == 1
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dcnlib: its compiled part is missing or does not load")
    assert "python -m pip install -e ." in last
    assert "circular" not in last


def test_broken_core_says_why(source_only):
    suffix = Path(_core.__file__).name.partition(".")[2]
    broken = source_only / "dcnlib" / "backends" / "cpu" / f"_core.{suffix}"
    broken.write_bytes(b"no library")
    child = isolated.python("import dcnlib", PYTHONPATH=str(source_only))
    assert child.returncode == 1
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dcnlib: its compiled part is missing or does not load")
    assert broken.name in last
