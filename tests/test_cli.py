"""`python -m dcnlib info` and `bench`: reports for people and for programs."""

import json
import os
import subprocess
import sys

import pytest

import dcnlib
import isolated
from dcnlib import __main__, _bench, _config, _info, _markdown
from dcnlib.backends.cpu import _core

TINY = (_bench.Layer(4, 4, 8, 3), _bench.Layer(4, 4, 8, 3, groups=4))


@pytest.fixture
def report():
    return _info.collect()


@pytest.fixture(scope="module")
def timings():
    return _bench.bench(1, TINY)


def run(capsys, *arguments):
    status = __main__.main(list(arguments))
    return (status, *capsys.readouterr())


class TestInfo:
    def test_json_is_the_report(self, capsys, report):
        status, out, _ = run(capsys, "info", "--json")
        assert status == 0
        assert json.loads(out) == report

    def test_text_names_every_part(self, capsys, report):
        status, out, _ = run(capsys, "info")
        assert status == 0
        words = [dcnlib.__version__, report["cpu"], *report["backends"], *report["isa"]["built"]]
        for word in words:
            assert word in out
        for sentence in report["advice"]:
            assert sentence in out

    def test_show_config_prints_it(self, capsys, report):
        dcnlib.show_config()
        assert capsys.readouterr().out == _info.text(report) + "\n"

    def test_backends_have_reasons(self, report):
        assert report["backends"]["reference"]["available"]
        for name, status in report["backends"].items():
            assert status["reason"], name

    def test_isa(self, report):
        assert report["isa"]["used"] == dcnlib.cpu_isa()
        assert set(report["isa"]["usable"]) <= set(report["isa"]["built"])

    def test_whole_command_in_a_fresh_process(self):
        child = isolated.python(
            "import runpy, sys; sys.argv[1:] = ['info', '--json']; "
            "runpy.run_module('dcnlib', run_name='__main__')",
            DCNLIB_CPU_ISA="baseline",
            DCNLIB_NUM_THREADS="1",
        )
        assert child.returncode == 0, child.stderr
        report = json.loads(child.stdout)
        assert report["isa"] == {
            "used": "baseline",
            "usable": _core.usable(),
            "built": _core.built(),
            "limit": "baseline",
        }
        assert report["threads"]["used"] == 1
        decided_by = "DCNLIB_NUM_THREADS" if _core.openmp() else "built without OpenMP"
        assert report["threads"]["decided_by"] == decided_by
        if _core.usable()[0] != "baseline":
            assert any("DCNLIB_CPU_ISA=baseline" in sentence for sentence in report["advice"])

    @pytest.mark.skipif(not _core.openmp(), reason="built without OpenMP")
    @pytest.mark.parametrize(
        ("setting", "limit", "first"),
        [
            ("4", "", (4, "DCNLIB_NUM_THREADS")),
            ("4", "2", (2, "OMP_THREAD_LIMIT")),
            ("300", "", (256, "dcnlib's limit")),
        ],
        ids=["none", "openmp", "most"],
    )
    def test_fewer_threads_than_the_setting(self, setting, limit, first):
        """In a forked child and with the runtime's own limit, the settings are not what is used."""
        child = isolated.python(
            "import os, dcnlib; from dcnlib import _info; print(_info._threads(), flush=True); "
            "os.fork() or print(_info._threads(), flush=True)",
            DCNLIB_NUM_THREADS=setting,
            OMP_THREAD_LIMIT=limit,
        )
        assert child.stdout.splitlines() == [str(first), str((1, "a fork"))], child.stderr

    def test_advice_when_there_is_nothing_to_say(self, report):
        report["openmp"] = {"built": True, "runtimes": ["/lib/libgomp.so.1"]}
        report["threads"] = {"used": 4, "decided_by": "usable cores", "usable_cores": 4}
        report["isa"] = {"used": "avx2", "usable": ["avx2"], "built": ["avx2"], "limit": None}
        report["packages"] = dict.fromkeys(report["packages"], "1.0")
        assert _info._advice(report) == []

    @pytest.mark.parametrize(
        ("part", "change", "words"),
        [
            ("openmp", {"built": False}, "without OpenMP"),
            ("openmp", {"built": True, "runtimes": ["/lib/libgomp.so.1", "/lib/libomp.so"]},
             "more than one OpenMP runtime"),
            ("threads", {"used": 1, "usable_cores": 8, "decided_by": "OMP_NUM_THREADS"},
             "OMP_NUM_THREADS keeps dcnlib to 1 of 8 cores"),
            ("threads", {"used": 1, "usable_cores": 8, "decided_by": "a fork"}, "was forked"),
            ("threads", {"used": 2, "usable_cores": 8, "decided_by": "OMP_THREAD_LIMIT"},
             "OMP_THREAD_LIMIT allows no more threads than 2"),
            ("threads", {"used": 256, "usable_cores": 300, "decided_by": "dcnlib's limit"},
             "dcnlib's limit allows no more threads than 256"),
            ("isa", {"used": "avx2", "usable": ["avx512", "avx2"]}, "where avx512 would run"),
            ("isa", {"used": "avx512", "usable": ["amx", "avx512"]}, "where amx would run"),
            ("packages", {"torch": None}, "pip install torch"),
            ("packages", {"ml_dtypes": None}, "pip install ml_dtypes"),
        ],
        ids=["no_openmp", "two_runtimes", "few_threads", "forked", "thread_limit", "most",
             "isa_limit", "no_amx", "no_torch", "no_ml_dtypes"],
    )  # fmt: skip
    def test_advice(self, report, part, change, words):
        report["openmp"]["built"] = True
        report[part] |= change
        assert any(words in sentence for sentence in _info._advice(report))

    @pytest.mark.parametrize("there", [False, True])
    @pytest.mark.parametrize("usable", [["amx", "avx512"], ["avx512"], ["avx2"]], ids=" ".join)
    def test_a_matrix_unit_that_may_not_be_used(self, report, usable, there, monkeypatch):
        monkeypatch.setattr(_info, "_has_matrix_unit", lambda: there)
        report["isa"] |= {"used": usable[0], "usable": usable, "built": ["amx", "avx512", "avx2"]}
        told = any("amx does not run" in sentence for sentence in _info._advice(report))
        assert told == (there and usable == ["avx512"])

    def test_summary_is_one_line(self):
        line = _info.summary()
        assert "\n" not in line
        assert dcnlib.cpu_isa() in line
        assert dcnlib.__version__ in line


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0", True),
        ("/site-packages/torch/lib/libgomp.so.1", True),
        ("/site-packages/torch/lib/libgomp-a34b3233.so.1", True),
        ("/usr/lib/llvm-14/lib/libomp.so.5", True),
        ("/opt/homebrew/lib/libomp.dylib", True),
        ("/opt/intel/libiomp5.so", True),
        ("/usr/lib/libompl.so.1", False),
        ("/usr/lib/libm.so.6", False),
    ],
)
def test_openmp_runtime_names(path, found):
    assert bool(_info._RUNTIME.search(path)) == found


class TestBench:
    def test_rows(self, timings):
        names = [(row["layer"], row["pass"]) for row in timings["rows"]]
        assert names == [(str(layer), p) for layer in TINY for p in _bench.PASSES]
        for row in timings["rows"]:
            assert row["ms"] > 0
            assert row["gflops"] > 0
            assert all(row[f"ratio_{rival}"] > 0 for rival in timings["against"])

    @pytest.mark.parametrize("setting", [None, 3])
    def test_leaves_the_threads_as_they_were(self, monkeypatch, setting):
        """Not set where nobody had: the environment and torch still decide then."""
        monkeypatch.setattr(_config, "_explicit_threads", setting)
        assert _bench.bench(1, TINY[:1])["threads"] == 1
        assert _config._explicit_threads == setting

    def test_json_holds_it(self, timings):
        assert json.loads(json.dumps(timings)) == timings

    def test_text_has_a_line_for_each_row(self, timings):
        assert len(_bench.text(timings).splitlines()) >= 3 + len(timings["rows"])

    def test_write_replaces_only_the_block(self, timings, tmp_path):
        page = tmp_path / "page.md"
        begin, end = "<!-- speed table: begin", "<!-- speed table: end -->"
        page.write_text(f"before\n{begin} (a remark) -->\nold\n{end}\nafter\n")
        for _ in range(2):
            _markdown.write_block(page, _bench.BLOCK, _bench.markdown(timings))
        text = page.read_text()
        assert text.startswith(f"before\n{begin} (a remark) -->\n\n| layer")
        assert text.endswith(f"\n\n{end}\nafter\n")
        assert "old" not in text
        assert text.count("depthwise") == 1

    def test_write_is_checked_before_anything_is_measured(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr(_bench, "bench", lambda rounds: pytest.fail("measured"))
        status, out, err = run(capsys, "bench", "--write", str(tmp_path / "none.md"))
        assert (status, out) == (1, "")
        assert "none.md" in err

    def test_write_needs_one_block(self, tmp_path):
        page = tmp_path / "page.md"
        block = "<!-- speed table: begin -->\n<!-- speed table: end -->\n"
        for content in ("nothing\n", 2 * block):
            page.write_text(content)
            with pytest.raises(ValueError, match="needs one block"):
                _markdown.write_block(page, _bench.BLOCK, "table")
            assert page.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--rounds", "0"], "bench: rounds: must be positive; expected 1 or more, got 0"),
        (["bench", "--rounds", "-3"], "got -3"),
    ],
)
def test_errors_are_one_line(capsys, arguments, words):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("dcnlib: ")
    assert words in err
    assert err.count("\n") == 1


def test_interrupted(capsys, monkeypatch):
    def interrupt(rounds):
        raise KeyboardInterrupt

    monkeypatch.setattr(_bench, "bench", interrupt)
    assert run(capsys, "bench") == (130, "", "\ndcnlib: interrupted\n")


class TestOutput:
    """In a process of its own, whose stdout is what users have."""

    CODE = (
        "import sys, dcnlib._info; from dcnlib.__main__ import main; "
        "dcnlib._info.cpu_model = lambda: 'Prozessor für Züge' + sys.argv[1]; "
        "raise SystemExit(main(['info']))"
    )

    def test_letters_that_the_terminal_has_not(self):
        child = isolated.python(self.CODE, "", PYTHONIOENCODING="ascii")
        assert (child.returncode, child.stderr) == (0, "")
        assert "Prozessor f?r Z?ge" in child.stdout

    @pytest.mark.parametrize("size", [0, 100_000], ids=["buffered", "long"])
    def test_a_reader_that_has_left(self, size):
        """As of `| head -1`: it ends, quietly."""
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as stdout:
            child = subprocess.run(
                [sys.executable, "-c", self.CODE, size * "!"], env=isolated.environment(),
                stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
        assert (child.returncode, child.stderr) == (1, "")


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["info", "--yaml"], ["demo", "--size", "9"]]
)
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m dcnlib" in capsys.readouterr().err
