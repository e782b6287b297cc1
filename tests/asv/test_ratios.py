"""The table of ratios: what is measured, how it is summed up, and that goals are really judged."""

import hashlib
import importlib.util
import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ratios
import ratios_report
import ratios_stages
from benchmarks import memory
from dcnlib import _bench
from dcnlib._bench import PASSES, Layer
from dcnlib.testing import cpu_isas
from ratios_layers import CLASSES, ODD, PEER_LAYERS, SAMPLE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="ratios are to torch's conv2d"
)
KERNELS = Path(__file__).parents[2] / "csrc/cpu/kernels"
HEAD = {
    "date": "2026-01-01", "cpu": "Test CPU", "cores": 2, "isa": "avx2", "python": "3.11",
    "dcnlib": "0", "versions": {"torch": "2"}, "commit": "abc", "door": "torch",
}  # fmt: skip


def class_rows(ratio):
    """A row for each layer of each class; `ratio(class, layer, pass)`."""
    return [
        {"class": name, "layer": str(layer), "pass": which, "ms": 1.0, "conv2d_ms": 1.0,
         "ratio": ratio(name, layer, which), "turns": [1.0, 1.0]}
        for name, group in CLASSES.items() for layer in group.layers for which in PASSES
    ]  # fmt: skip


def peer_rows():
    rows = []
    for i, layer in enumerate(PEER_LAYERS):
        for which in PASSES:
            ratio = {"dcnlib": 1.0, "conv2d": 1.0, "torchvision": 10.0 + i}
            if which == "forward":
                ratio |= {"onnxruntime": 2.0, "openvino": 4.0}
            rows.append({"class": "peers", "layer": str(layer), "pass": which, "ratio": ratio,
                         "ms": ratio, "versions": {"torchvision": "0.29", "onnxruntime": "1.32",
                                                   "openvino": "2026.4"}})  # fmt: skip
    return rows


def test_layers_cover_what_is_promised():
    assert len(PEER_LAYERS) >= 16
    layers = [layer for group in CLASSES.values() for layer in group.layers]
    assert len(set(layers)) == len(layers)
    counts = {layer.channels for layer in layers} | {layer.channels for layer, _ in ODD}
    assert {3, 17, 33, 48, 72, 96, 144, 320} <= counts
    for layer, full in ODD:
        assert full.channels == -(-layer.channels // 16) * 16
    for layer in (*layers, *SAMPLE, *PEER_LAYERS):
        assert layer.channels % layer.groups == 0


class TestSummary:
    def test_reached(self):
        rows = class_rows(lambda name, layer, which: CLASSES[name].goal[PASSES.index(which)])
        lines = ratios_report.summary(rows)
        assert [line.name for line in lines] == list(CLASSES)
        assert all(line.reached for line in lines)
        assert "not reached" not in "\n".join(ratios_report._classes_text(rows))

    def test_a_mean_above_its_goal(self):
        rows = class_rows(lambda name, layer, which: 1.01 * CLASSES[name].goal[PASSES.index(which)])
        assert not any(line.reached for line in ratios_report.summary(rows))

    def test_a_single_layer_far_above(self):
        def ratio(name, layer, which):
            return 1.25 * CLASSES[name].goal[0] if layer == CLASSES[name].layers[0] else 0.5

        lines = ratios_report.summary(class_rows(ratio))
        assert all(line.means[0] < line.goal[0] for line in lines)
        assert not any(line.reached for line in lines)

    def test_means_are_geometric(self):
        assert ratios_report.mean([1.0, 4.0]) == pytest.approx(2.0)

    def test_a_class_without_rows_is_left_out(self):
        rows = [r for r in class_rows(lambda *_: 1.0) if r["class"] == "depthwise"]
        assert [line.name for line in ratios_report.summary(rows)] == ["depthwise"]


class TestFile:
    def test_parts_and_rows_are_merged(self, tmp_path):
        path = tmp_path / "folder/ratios.json"
        rows = [{"class": "c", "layer": name, "pass": "forward", "ratio": 1.0} for name in "ab"]
        ratios.merge(path, "classes", HEAD, rows)
        again = [{"class": "c", "layer": "a", "pass": "forward", "ratio": 2.0}]
        ratios.merge(path, "classes", HEAD | {"date": "2026-01-02"}, again)
        ratios.merge(path, "isas", HEAD, rows[:1])
        report = json.loads(path.read_text())
        assert list(report) == ["classes", "isas"]
        assert [(r["layer"], r["ratio"]) for r in report["classes"]["rows"]] == [("a", 2), ("b", 1)]
        assert report["classes"]["date"] == "2026-01-02"

    def test_figures_have_four_digits(self):
        assert ratios.rounded({"a": [1.23456789, "b", 7]}) == {"a": [1.235, "b", 7]}


@pytest.fixture
def small(monkeypatch):
    """One tiny layer everywhere."""
    layer = Layer(4, 4, 6, 3)
    group = CLASSES["depthwise"]._replace(layers=(layer,))
    monkeypatch.setattr(ratios, "CLASSES", {"depthwise": group})
    monkeypatch.setattr(ratios, "ODD", ((Layer(3, 4, 6, 3), Layer(16, 4, 6, 3)),))
    monkeypatch.setattr(ratios, "SAMPLE", (layer,) * 3)
    monkeypatch.setattr(ratios, "PEER_LAYERS", (layer,))
    monkeypatch.setattr(_bench, "_ROUND", 1e-4)


@pytest.mark.parametrize("door", ["torch", "core"])
@pytest.mark.parametrize("part", ["classes", "dtypes", "layout", "isas", "overhead", "threads"])
def test_part_runs(small, part, door, tmp_path, capsys):
    path = tmp_path / "ratios.json"
    arguments = ["--part", part, "--door", door, "--rounds", "1", "--seconds", "0.2"]
    assert ratios.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    if not path.exists():
        pytest.skip(printed.strip())
    content = json.loads(path.read_text())[part]
    assert content["rows"]
    assert content["cpu"] in printed
    for row in content["rows"]:
        assert row.get("ratio", 1) > 0
        assert row["layer"] in printed
    assert ratios.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_instruction_sets_are_compared_with_the_best(small, tmp_path):
    """And AVX2 with AVX-512, whatever is best."""
    path = tmp_path / "ratios.json"
    arguments = ["--part", "isas", "--door", "core", "--rounds", "1", "--json", str(path)]
    assert ratios.main(arguments) == 0
    *others, best = cpu_isas()
    wanted = {f"{isa}/{best}" for isa in others}
    if {"avx2", "avx512"} <= {*others, best}:
        wanted.add("avx2/avx512")
    assert {row["class"] for row in json.loads(path.read_text())["isas"]["rows"]} == wanted


def test_the_busiest_thread_counts():
    """The clock for two threads where other programs take cores away."""
    data = bytes(2**20)

    def burn(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            hashlib.sha256(data)  # without the interpreter's lock
        return seconds

    with ThreadPoolExecutor(1) as pool:
        pool.submit(burn, 0.01).result()

        def call():
            other = pool.submit(burn, 0.2)
            burn(0.05)
            other.result()

        _, wall, busiest = ratios.watched(call)
    assert 0.2 <= busiest < 0.24
    assert busiest <= wall


@pytest.mark.parametrize(
    ("ms", "clock", "busiest", "reached"),
    [(2.5, 1.9, 1.2, True), (2.5, 1.2, 1.9, True), (2.5, 1.8, 1.8, False), (1.9, 1.0, 1.0, True)],
)
def test_two_threads_are_judged_by_either_clock(ms, clock, busiest, reached):
    row = {"layer": "l", "pass": "forward", "clock": "wall", "undisturbed": 9, "conv2d_speedup": 1,
           "conv2d_busiest": 1, "dcnlib_ms": [ms, 1.0], "dcnlib_speedup": clock,
           "dcnlib_busiest": busiest}  # fmt: skip
    assert ("not reached" in "\n".join(ratios_report._threads_text([row]))) != reached


def test_core_computes_the_layer():
    layer = Layer(8, 12, 9, 3, stride=2, groups=4, dilation=2, offset_groups=2)
    for core, door in zip(ratios.core_calls(layer), _bench.torch_calls(layer, []), strict=True):
        got, want = core(), door["dcnlib"]()
        got, want = ([x] if hasattr(x, "numpy") else x for x in (got, want))
        assert all((a == b).all() for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))
def test_memory_is_of_the_call_alone(monkeypatch, capsys):
    monkeypatch.setattr(ratios, "SAMPLE", (Layer(16, 16, 28, 3),) * 3)
    assert ratios.main(["--part", "memory", "--only", "^: 16"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if " forward " in line)
    assert 0 < int(row.split()[-3]) < 4096


def test_peers_are_left_out_in_words(small, monkeypatch, capsys):
    monkeypatch.setattr(ratios.rivals, "why_not", lambda name: f"{name}: not here")
    monkeypatch.delenv("DCNLIB_PEERS_PYTHON", raising=False)
    assert ratios.main(["--part", "peers", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("onnxruntime", "openvino", "torchvision"):
        assert f"peers: left out: {name}: not here" in printed
    assert "DCNLIB_PEERS_PYTHON may name a Python" in printed


def test_a_peer_that_computes_something_else_is_refused():
    layer = Layer(4, 4, 6, 3)
    calls = {"dcnlib": lambda: [1.0, 2.0], "other": lambda: [1.0, 2.1]}
    with pytest.raises(RuntimeError, match="other computes something else"):
        ratios.agree(layer, calls)
    ratios.agree(layer, calls | {"other": lambda: [1.0, 2.00001]})


class TestReports:
    @pytest.fixture
    def report(self):
        return {
            "classes": HEAD | {"rows": class_rows(lambda *_: 1.25)},
            "peers": HEAD | {"rows": peer_rows()},
        }

    def test_text_tells_how_far_behind(self, report):
        text = ratios_report.text(report)
        assert "onnxruntime" in text
        least = [line for line in text.splitlines() if line.startswith("least")]
        assert least[0].split()[1:] == ["1.00", "10.00", "2.00", "4.00"]
        assert least[1].split()[1:] == ["1.00", "10.00"]

    def test_markdown(self, report, tmp_path):
        page = tmp_path / "page.md"
        page.write_text(f"<!-- {_bench.BLOCK}: begin -->\nold\n<!-- {_bench.BLOCK}: end -->\n")
        path = tmp_path / "ratios.json"
        path.write_text(json.dumps(report))
        assert ratios.main(["--show", str(path), "--markdown", str(page)]) == 0
        text = page.read_text()
        assert text.count("| 1.25 | 1.25 |") == len(CLASSES)
        assert "| onnxruntime 1.32 | 2.0 (2.0 – 2) | has none |" in text
        mean = math.exp(sum(math.log(10 + i) for i in range(len(PEER_LAYERS))) / len(PEER_LAYERS))
        assert f"| torchvision 0.29 | {mean:.1f} (10.0" in text
        assert "old" not in text

    def test_figure(self, report, tmp_path):
        pytest.importorskip("matplotlib")
        ratios_report.figure(report, tmp_path / "speed.png")
        assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")

    def test_stages(self, tmp_path):
        pytest.importorskip("matplotlib")
        shares = dict.fromkeys(ratios_stages.STAGES, 0.0) | {"product": 0.75, "call": 0.25}
        rows = [
            {"layer": "a", "pass": which, "ms": 1.0, "ratio": 1.2, "shares": shares}
            for which in PASSES
        ]
        path = tmp_path / "ratios.json"
        path.write_text(json.dumps({"stages": HEAD | {"rows": rows}}))
        assert ratios.main(["--show", str(path), "--stages", str(tmp_path / "stages.png")]) == 0
        assert (tmp_path / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_stages_by_names_of_functions():
    """As perf prints them: an address, then the symbol."""
    names = {
        "7f01 avx512::gemm_registers<float, 14, 2>": "product",
        "7f01 avx512::multiply_tiles<2, 1>": "product",
        "7f01 void avx512::multiply_hard<avx512::gemm_split(long)::{lambda(long)#2}>": "product",
        "7f01 avx512::gemm_split": "splitting",
        "7f01 avx512::split_block": "splitting",
        "7f01 void avx512::sample_pixels<(avx512::Sampling)0, true>": "sampling",
        "7f01 avx512::pack_whole_panel<float>": "weights",
        "7f01 avx2::sample_pieces<float>": "sampling",
        "7f01 bool avx512::chunk_corners<float, false>": "corners",
        "7f01 void baseline::write_walked<float, ...>": "layout",
        "7f01 avx512::forward_run<float>": "call",
        "7f01 _PyEval_EvalFrameDefault": "call",
        "7f01 [unknown]": "call",
    }
    for name, stage in names.items():
        assert ratios_stages.stage_of(name) == stage
    kernels = "".join(path.read_text() for path in KERNELS.glob("*.h"))
    for stage, beginnings in ratios_stages.STAGES.items():
        for beginning in beginnings:
            assert re.search(rf"\b{beginning}\w*\(", kernels), f"{stage}: no {beginning}..."
