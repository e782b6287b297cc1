"""Forked children work: at once, with the right bytes, whatever the parent has done before.

libgomp's threads do not survive a fork, and a child that opens a team waits for ever; dcnlib's
children run alone. `forks.py` has the scenarios.
"""

import importlib.util
import sys

import pytest

import forks
import isolated

TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not TORCH, reason="needs torch")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork here")


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize(
    "past",
    [
        "none",
        "dcnlib",
        pytest.param("torch", marks=needs_torch),
        pytest.param("both", marks=needs_torch),
    ],
)
def test_fork(past, where):
    """Twenty children and as many grandchildren of each past, forked in either kind of thread."""
    (answer,) = isolated.outcomes("forks", "scenario", [(past, where)], OMP_NUM_THREADS="4")
    assert answer == {"result": ["right"] * forks.FORKS}


@pytest.mark.parametrize("past", ["none", pytest.param("torch", marks=needs_torch)])
def test_import_in_the_child(past):
    """torch's threads do not survive the fork either, and the runtime is the same."""
    (answer,) = isolated.outcomes("forks", "imported_in_the_child", [past], OMP_NUM_THREADS="4")
    assert answer == {"result": ["right"] * (forks.FORKS // 2)}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pool(method):
    (answer,) = isolated.outcomes("forks", "pool", [method], OMP_NUM_THREADS="4")
    assert answer == {"result": "right"}


@needs_torch
def test_data_loader():
    """Workers of every kind, after the parent has used both libraries."""
    cases = [("fork", 1), ("fork", 2), ("fork", 4), ("forkserver", 2), ("spawn", 2)]
    answers = isolated.outcomes("forks", "loader", cases, 240, OMP_NUM_THREADS="4")
    assert answers == [{"result": "right"}] * len(cases)


def test_the_watcher_sees_a_hang(monkeypatch):
    """The alarm that would tell of a child that waits for ever."""
    monkeypatch.setattr(forks, "SECONDS", 1)
    monkeypatch.setattr(forks, "results", lambda: forks.time.sleep(60))
    monkeypatch.setattr(forks, "expected", lambda: b"")
    assert forks._fork() == "hangs"
