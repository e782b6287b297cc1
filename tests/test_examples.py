"""The examples: each one in its reduced form, from the command line to the picture."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import isolated

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = {"moving_taps": (), "three_layers": ("torch", "tqdm"), "instruments": ("torch", "tqdm")}


def photographs():
    try:
        return metadata.version("scikit-image")
    except metadata.PackageNotFoundError:
        return None


def run(name, *options):
    return subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *options],
        env=isolated.environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_every_script_is_tested():
    helpers = {"common", "coins"}
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SCRIPTS, *helpers}


@pytest.mark.parametrize("name", SCRIPTS)
def test_draws_its_picture(name, tmp_path):
    needed = ("matplotlib", *SCRIPTS[name])
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing or photographs() is None:
        pytest.skip(f"not installed: {', '.join([*missing, 'scikit-image'])}")
    child = run(name, "--quick", "--output", str(tmp_path / "new"))
    assert child.returncode == 0, child.stderr
    picture = tmp_path / "new" / f"{name}.png"
    assert str(picture) in child.stdout
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert 20_000 < picture.stat().st_size < 300_000
    assert os.listdir(picture.parent) == [picture.name]


def test_help_and_missing_photographs(tmp_path):
    """Messages of what all scripts share."""
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no matplotlib")
    child = run("moving_taps", "--help")
    assert child.returncode == 0
    for option in ("--output DIR", "--quick", "--seed N"):
        assert option in child.stdout
    code = f"""
import sys
from importlib import metadata
sys.path.insert(0, {str(FOLDER)!r})
def nothing(name):
    raise metadata.PackageNotFoundError(name)
metadata.distribution = nothing
import common
common.photograph("coins")
"""
    child = isolated.python(code)
    assert child.returncode == 1
    assert child.stderr.startswith("the photographs are missing; install the package that carries")
    assert child.stderr.endswith("pip install --no-deps scikit-image==0.26.0\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_picture_of_the_docs(name):
    """Committed, and small enough to be."""
    picture = FOLDER.parent / "docs" / "figures" / f"{name}.png"
    assert picture.stat().st_size < 150_000
