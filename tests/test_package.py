"""What is promised about the package as a whole: contents, metadata, flags, portability."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import dcnlib
import isolated
from dcnlib.backends.cpu import _core

ROOT = Path(__file__).parent.parent
PACKAGE = Path(dcnlib.__file__).parent
TEXT = {
    ".py",
    ".pyx",
    ".pxd",
    ".h",
    ".inc",
    ".cpp",
    ".cu",
    ".cuh",
    ".md",
    ".toml",
    ".cff",
    ".in",
    "",
}


@pytest.fixture(scope="session")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def tracked():
    """The repository's files; an sdist has none to ask for."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listing.stdout.decode().split("\0") if name]


class TestMetadata:
    def test_numpy_is_the_only_dependency(self):
        always = [r for r in metadata.requires("dcnlib") if "extra ==" not in r]
        assert [re.match(r"\w+", r)[0] for r in always] == ["numpy"]

    def test_extras(self, project):
        assert {"torch", "demo", "test", "bench", "dev"} <= set(project["optional-dependencies"])

    def test_installed_version(self):
        assert metadata.version("dcnlib") == dcnlib.__version__

    def test_version_stands_in_one_place(self, project, tracked):
        assert project["dynamic"] == ["version"]
        number = re.compile(rf"(?i)(dcnlib|version).*(?<![\w.]){dcnlib.__version__}(?![\w.])")
        dated = ("CHANGELOG.md", "README.md")  # history, and figures that name what was measured
        holders = [
            path.relative_to(ROOT).as_posix()
            for path in tracked
            if path.suffix in TEXT and path.name not in dated
            if number.search(path.read_text(encoding="utf-8"))
        ]
        assert holders == ["dcnlib/_version.py"]

    def test_typed(self):
        assert (PACKAGE / "py.typed").exists()

    def test_licence(self):
        """A release wheel names that of its copy of the OpenMP runtime, too."""
        copy = Path(dcnlib.__file__).parent / "_libs" / "libgomp.so.1"
        runtime = " AND GPL-3.0-or-later WITH GCC-exception-3.1" if copy.exists() else ""
        assert metadata.metadata("dcnlib")["License-Expression"] == f"BSD-3-Clause{runtime}"
        assert "THIS SOFTWARE IS PROVIDED" in (ROOT / "LICENSE").read_text()

    def test_citation_names_both_papers(self):
        citation = (ROOT / "CITATION.cff").read_text()
        assert "arxiv.org/abs/1703.06211" in citation
        assert "arxiv.org/abs/1811.11168" in citation


class TestFlags:
    """NaN, infinities, signed zeros and subnormals are values; no switch may change that."""

    def strings(self):
        tree = ast.parse((ROOT / "setup.py").read_text())
        return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]

    @pytest.mark.parametrize(
        "flag",
        ["-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only",
         "-fassociative-math", "-freciprocal-math", "-march=native"],
    )  # fmt: skip
    def test_no_flag_that_takes_liberties(self, flag):
        assert flag not in self.strings()

    def test_flags_are_read(self):
        assert "-ffp-contract=fast" in self.strings()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_subnormals_survive(self, threads):
        """A library linked with fast-math sets flush-to-zero for the thread that loads it."""
        child = isolated.python(
            f"""
import numpy as np
import dcnlib
dcnlib.set_num_threads({threads})
tiny = np.float32(1e-41)
x, offset = np.full((4, 8, 64, 64), tiny), np.zeros((4, 2, 64, 64), np.float32)
y = dcnlib.deform_conv2d(x, offset, np.ones((64, 8, 1, 1), np.float32))
assert (y == 8 * tiny).all(), y.ravel()[:4]
assert tiny * np.float32(0.5) > 0
"""
        )
        assert child.returncode == 0, child.stderr


class TestNoTraceOfAMachine:
    def test_no_paths_in_the_compiled_part(self):
        binary = Path(_core.__file__).read_bytes()
        for path in {str(ROOT), os.path.expanduser("~"), sys.prefix} - {"/", "/root", "/usr"}:
            assert path.encode() not in binary, path

    def test_no_paths_or_hosts_in_the_sources(self, tracked):
        pattern = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|opt/pypi)/\w|pypi\.org")
        for path in tracked:
            if path.suffix in TEXT and path != Path(__file__):
                found = pattern.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"


def test_sdist_is_complete(tracked, tmp_path):
    """All that is tracked, but for what only a checkout needs, and nothing else but metadata."""
    pytest.importorskip("Cython", reason="an sdist needs Cython")
    pytest.importorskip("setuptools", reason="an sdist needs setuptools")
    tree = tmp_path / "tree"
    for path in tracked:
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    # Left over from earlier work, as in any checkout; must not come along.
    (tree / "dcnlib/backends/cpu/_core.stale.so").write_bytes(b"")
    (tree / "tests/__pycache__").mkdir()
    (tree / "tests/__pycache__/stale.pyc").write_bytes(b"")
    code = "import setuptools.build_meta as b; b.build_sdist('out')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "out").iterdir()
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames() if tar.getmember(name).isfile()}
    generated = {
        name for name in packed if re.match(r"PKG-INFO|setup\.cfg|dcnlib\.egg-info/", name)
    }
    expected = {path.relative_to(ROOT).as_posix() for path in tracked}
    checkout_only = {name for name in expected if re.match(r"\.gitignore|asv_bench/results/", name)}
    assert packed - generated == expected - checkout_only


def test_numpy_api_is_not_compiled_in():
    """The core reads buffers and addresses: one build serves NumPy 1.26 and all later ones."""
    assert b"numpy.core.multiarray" not in Path(_core.__file__).read_bytes()
    assert np.lib.NumpyVersion(np.__version__) >= "1.26.0"
