"""Results become pages and pictures that need no network; results of other machines are let in."""

import json
import re
import subprocess

import pytest

import carry
import publish

GRID = [["'cpu'", "'cuda'"], list("1357"), list("12"), list("123"), ["'forward'", "'backward'"]]


def result(commit="a" * 40, date=1, machine="box-2", backend="cpu", scale=1.0, **changes):
    """A result file as asv writes it; the other backend's figures are missing."""
    count = 2 * 4 * 2 * 3 * 2
    first = count // 2 if backend == "cuda" else 0
    values = [float("nan")] * count
    for i in range(count // 2):
        values[first + i] = scale * 1e-3 * (1 + i)
    content = {
        "commit_hash": commit,
        "env_name": "virtualenv-py3.11",
        "date": date,
        "params": {"machine": machine, "python": "3.11"},
        "python": "3.11",
        "result_columns": ["result", "params", "version"],
        "results": {
            "grid.Time.time_call": [values, GRID, "1"],
            "grid.Memory.track_extra_bytes": [[v * 1e9 for v in values], GRID, "1"],
            "start.Import.timeraw_dcnlib": [[0.1], [], "1"],
            "failed.Benchmark.time_x": [None, [], "1"],
        },
    }
    return content | changes


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"

    def write(content, name=None):
        machine = folder / content["params"]["machine"]
        machine.mkdir(parents=True, exist_ok=True)
        (machine / "machine.json").write_text(json.dumps({"machine": machine.name}))
        path = machine / f"{content['commit_hash'][:8]}-{name or content['env_name']}.json"
        path.write_text(json.dumps(content))

    write.folder = folder
    return write


def test_load_orders_and_merges(results):
    results(result("b" * 40, date=2, scale=2.0))
    results(result("a" * 40, date=1))
    more = result("a" * 40, date=1)
    more["results"] = {"start.Size.track_wheel_bytes": [[5.0], [], "1"]}
    results(more, "virtualenv-py3.11-torch")
    first, second = publish.load(results.folder)
    assert [first.commit[0], second.commit[0]] == ["a", "b"]
    assert first.values["start.Size.track_wheel_bytes"] == {(): 5.0}
    assert first.values["grid.Time.time_call"]["cpu", "1", "1", "1", "forward"] == 1e-3
    assert second.values["grid.Time.time_call"]["cpu", "1", "1", "1", "backward"] == 4e-3
    assert not any(key[0] == "cuda" for key in first.values["grid.Time.time_call"])
    assert "failed.Benchmark.time_x" not in first.values


def test_report_needs_no_other_host(results, tmp_path):
    pytest.importorskip("matplotlib")
    for i, letter in enumerate("abc"):
        results(result(letter * 40, date=i))
    results(result("c" * 40, date=2, machine="gpu", backend="cuda", scale=0.1))
    page = publish.report(publish.load(results.folder), tmp_path / "html")
    text = page.read_text()
    assert publish.loads_from_elsewhere(text) == []
    pictures = re.findall(r'src="([^"]+)"', text)
    assert sorted(pictures) == [
        "asv_history_cpu.png",
        "asv_history_cuda.png",
        "asv_throughput_cpu.png",
        "asv_throughput_cuda.png",
    ]
    for name in pictures:
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    assert "box-2" in text
    assert "gpu" in text


def test_throughput_of_a_known_time():
    seconds = 9 * 128 * 128 * 28 * 28 * 2 / 100e9
    assert publish._gflops(seconds, "3", "1", "forward") == pytest.approx(100)
    assert publish._gflops(seconds, "3", "1", "backward") == pytest.approx(200)
    assert publish._gflops(seconds, "3", "2", "forward") == pytest.approx(25)


PAGE = """<html><head>
<script src="https://code.example/jquery-3.3.1.min.js" integrity="x" crossorigin="a"></script>
<link rel="stylesheet" href="https://cdn.example/css/bootstrap.min.css" integrity="y">
<script language="javascript" src="asv.js"></script>
{more}</head><body><a href="https://example.org/">a link is not loaded</a></body></html>
"""


@pytest.fixture
def pages(tmp_path, monkeypatch):
    vendor = tmp_path / "vendor"
    vendor.mkdir()
    monkeypatch.setattr(publish, "VENDOR", vendor)
    folder = tmp_path / "html"
    (folder / "graphs").mkdir(parents=True)
    (folder / "index.json").write_text('{"project": "dcnlib"}')
    (folder / "graphs/a.json").write_text('["</script>"]')
    return folder


def test_offline_page(pages):
    (pages / "index.html").write_text(PAGE.format(more=""))
    publish.offline(pages)
    page = (pages / "index.html").read_text()
    assert publish.loads_from_elsewhere(page) == []
    assert 'src="vendor/jquery-3.3.1.min.js"' in page
    assert 'href="vendor/bootstrap.min.css"' in page
    assert "integrity" not in page
    assert page.index("jquery") < page.index("data.js") < page.index("asv.js")
    data = (pages / "data.js").read_text()
    assert '"graphs/a.json":["<\\/script>"]' in data
    assert "</script>" not in data


def test_offline_page_refuses_an_unknown_library(pages):
    more = '<script src="//elsewhere.example/new.js"></script>\n'
    (pages / "index.html").write_text(PAGE.format(more=more))
    with pytest.raises(publish.Unavailable, match=r"loads //elsewhere.example/new.js"):
        publish.offline(pages)


def test_without_asv_there_is_the_report(results, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    results(result())
    monkeypatch.setattr(publish.importlib.util, "find_spec", lambda name: None)
    status = publish.main(["--results", str(results.folder), "--html", str(tmp_path / "html")])
    assert status == 0
    out = capsys.readouterr().out
    assert "asv's own pages are left out: asv is not installed" in out
    assert (tmp_path / "html/report.html").exists()


def test_without_results(tmp_path, capsys):
    assert publish.main(["--results", str(tmp_path)]) == 2
    assert "there are no results" in capsys.readouterr().err


class TestTake:
    """`carry.py take` lets in results that this repository can place."""

    @pytest.fixture
    def head(self):
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=carry.HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip("this is no git checkout")
        return done.stdout.strip()

    def test_taken(self, results, head, tmp_path):
        results(result(head, machine="gpu", backend="cuda"))
        taken = carry.take(results.folder / "gpu", tmp_path / "here")
        assert [path.name for path in taken] == [
            f"{head[:8]}-virtualenv-py3.11.json",
            "machine.json",
        ]
        assert publish.load(tmp_path / "here")[0].machine == "gpu"

    def test_unknown_commit(self, results, head, tmp_path):
        results(result("0" * 40, machine="gpu"))
        with pytest.raises(ValueError, match="git cat-file"):
            carry.take(results.folder / "gpu", tmp_path / "here")

    @pytest.mark.parametrize(
        "change", [{"python": "/usr/bin/python3"}, {"env_name": "existing-py_usr_bin_python3"}]
    )
    def test_path_of_the_other_machine(self, results, head, tmp_path, change):
        results(result(head, machine="gpu", **change), "x")
        with pytest.raises(ValueError, match="is a path of the other machine"):
            carry.take(results.folder / "gpu", tmp_path / "here")

    def test_not_a_machine(self, tmp_path, capsys):
        assert carry.main(["take", str(tmp_path)]) == 2
        assert "has no machine.json" in capsys.readouterr().err
