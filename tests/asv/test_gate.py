"""The gate sees a planted slowdown and planted memory, and passes a version against itself."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

import dcnlib
import gate
from benchmarks import memory

PACKAGE = Path(dcnlib.__file__).resolve().parent
#: Appended to the CPU backend: every call takes 20 % more of the processor's time.
SLOWDOWN = """

import time as _time


def _slower(call):
    def wrapped(*arguments, **keywords):
        start = _time.process_time()
        call(*arguments, **keywords)
        end = start + 1.2 * (_time.process_time() - start)
        while _time.process_time() < end:
            pass

    return wrapped


forward, backward = _slower(forward), _slower(backward)
"""
#: The same with another megabyte in use.
BLOAT = """

def _larger(call):
    def wrapped(*arguments, **keywords):
        block = np.ones(1 << 20, np.uint8)
        call(*arguments, **keywords)
        del block

    return wrapped


forward, backward = _larger(forward), _larger(backward)
"""
needs_memory = pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))


@pytest.fixture
def sides(tmp_path):
    """Two folders with a copy of the package each; a function that plants code in the second."""
    base, head = tmp_path / "base", tmp_path / "head"
    for side in (base, head):
        shutil.copytree(PACKAGE, side / "dcnlib", ignore=shutil.ignore_patterns("__pycache__"))

    def plant(code):
        with (head / "dcnlib/backends/cpu/__init__.py").open("a") as file:
            file.write(code)

    return base, head, plant


def run(base, head, kinds, tmp_path, only="K1|8 x 16"):
    path = tmp_path / "rows.json"
    status = gate.main(
        [str(base), str(head), "--kinds", kinds, "--only", only, "--json", str(path)]
    )
    return status, [gate.Row(**row) for row in json.loads(path.read_text())]


@needs_memory
@pytest.mark.timing
def test_a_version_against_itself_passes(sides, tmp_path, capsys):
    base, head, _ = sides
    status, rows = run(base, head, "time,memory", tmp_path)
    assert status == 0, gate.table(rows)
    assert "no regression" in capsys.readouterr().out
    assert {row.kind for row in rows} == {"time", "memory"}
    assert len(rows) == 9  # two layers, both directions, both kinds; and the process at rest


@pytest.mark.timing
def test_a_slowdown_of_a_fifth_fails(sides, tmp_path, capsys):
    base, head, plant = sides
    plant(SLOWDOWN)
    status, rows = run(base, head, "time", tmp_path)
    assert status == 3, gate.table(rows)
    assert sum(row.fails for row in rows) >= len(rows) - 1
    assert all(row.retried for row in rows if row.fails)
    assert "REGRESSION" in capsys.readouterr().out


@needs_memory
@pytest.mark.timing
def test_a_megabyte_fails(sides, tmp_path):
    base, head, plant = sides
    plant(BLOAT)
    status, rows = run(base, head, "memory", tmp_path)
    assert status == 3, gate.table(rows)
    calls = [row for row in rows if row.name != gate.AT_REST]
    assert all(row.fails for row in calls)
    assert all(0.9 * 2**20 < row.head - row.base < 1.1 * 2**20 for row in calls)


@pytest.mark.skipif(gate.no_instructions() is not None, reason=str(gate.no_instructions()))
def test_instructions_of_a_version_are_counted_alike(sides, tmp_path):
    base, head, _ = sides
    status, rows = run(base, head, "instructions", tmp_path, only="K1 forward")
    assert status == 0, gate.table(rows)
    (row,) = rows
    assert row.base > 1e5  # 10 x 10 pixels, 256 x 128 multiply-adds, in vectors
    assert row.ratio == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "base", "head", "fails"),
    [
        ("time", 1.0, 1.09, False),
        ("time", 1.0, 1.11, True),
        ("time", 1.0, 0.5, False),
        ("memory", 1e7, 1.03e7 + 65000, False),
        ("memory", 1e7, 1.03e7 + 66000, True),
        ("memory", 0, 65536, False),
        ("instructions", 1e6, 1.019e6, False),
        ("instructions", 1e6, 1.021e6, True),
    ],
)
def test_limits(kind, base, head, fails):
    assert gate.Row(kind, "row", base, head, False).fails == fails


class TestRetry:
    """With readings made up: 1 ms for the base, and for the head what the test says."""

    @staticmethod
    def judge(monkeypatch, tmp_path, kind, readings):
        base, head = tmp_path / "base", tmp_path / "head"
        left = iter(readings)

        def measure(_kind, folder, wanted):
            return dict.fromkeys(wanted, 1.0 if folder == base else next(left))

        monkeypatch.setattr(gate, "measure", measure)
        (row,) = gate.judge(base, head, [kind], 3, ["row"])
        return row

    def test_one_disturbed_round_is_no_regression(self, monkeypatch, tmp_path):
        row = self.judge(monkeypatch, tmp_path, "time", [1.5, 1.5, 1.01])
        assert (row.head, row.fails, row.retried) == (1.01, False, False)

    def test_a_disturbed_measurement_is_repeated(self, monkeypatch, tmp_path):
        row = self.judge(monkeypatch, tmp_path, "time", [1.5] * 3 + [1.4, 1.3, 1.02, 1.3, 1.2, 1.1])
        assert (row.head, row.fails, row.retried) == (1.02, False, True)

    def test_a_slow_head_stays_slow(self, monkeypatch, tmp_path):
        row = self.judge(monkeypatch, tmp_path, "time", [1.2] * 9)
        assert (row.head, row.fails, row.retried) == (1.2, True, True)

    def test_memory_is_a_median(self, monkeypatch, tmp_path):
        row = self.judge(monkeypatch, tmp_path, "memory", [1e6, 1, 1, 1e6, 1, 1, 1e6])
        assert (row.head, row.fails, row.retried) == (1.0, False, True)


class TestWhatCannotBeMeasured:
    def test_no_such_commit(self, capsys):
        assert gate.main(["no-such-commit", "."]) == 2
        assert "'no-such-commit' is no commit" in capsys.readouterr().err

    def test_no_such_row(self, capsys):
        assert gate.main([str(PACKAGE.parent), str(PACKAGE.parent), "--only", "nothing"]) == 2
        assert "no row matches 'nothing'" in capsys.readouterr().err

    def test_no_such_kind(self, capsys):
        folder = str(PACKAGE.parent)
        assert gate.main([folder, folder, "--kinds", "time,colour"]) == 2
        assert "no colour" in capsys.readouterr().err

    def test_a_package_that_does_not_load(self, sides, capsys):
        base, head, plant = sides
        plant("\nraise RuntimeError('planted')\n")
        assert gate.main([str(base), str(head), "--kinds", "time", "--only", "K1"]) == 2
        assert "planted" in capsys.readouterr().err

    def test_callgrind_without_counts(self, tmp_path):
        with pytest.raises(gate.CannotMeasure, match="counted 0 of 1 rows"):
            gate.counted(tmp_path, ["row"])


def test_counts_are_read_from_callgrinds_dumps(tmp_path):
    for number, total in ((0, 1234), (1, 99)):
        text = (
            f"version: 1\ndesc: Trigger: Client Request: {number}\nevents: Ir\nsummary: {total}\n"
        )
        (tmp_path / f"counts.{number + 1}").write_text(text)
    (tmp_path / "counts").write_text("desc: Trigger: Program termination\nsummary: 5\n")
    assert gate.counted(tmp_path, ["a", "b"]) == {"a": 1234.0, "b": 99.0}


def test_a_wheel_is_a_side(tmp_path):
    path = tmp_path / "dcnlib-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dcnlib/__init__.py", "")
    folder = gate.package(str(path), tmp_path / "unpacked")
    assert (folder / "dcnlib/__init__.py").exists()
