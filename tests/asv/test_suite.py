"""Every benchmark of the suite runs, asv or not; asv itself finds nothing wrong with the suite."""

import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dcnlib
import run
from benchmarks import common, memory, rivals

ASV_BENCH = Path(run.__file__).parent
MODULES = (
    "grid",
    "layers",
    "threads",
    "isas",
    "overhead",
    "start",
    "torch_door",
    "rival",
    "family",
)


def benchmarks():
    """(class, method) of every benchmark, by asv's rule for names."""
    for name in MODULES:
        module = importlib.import_module(f"benchmarks.{name}")
        for kind in vars(module).values():
            public = inspect.isclass(kind) and not kind.__name__.startswith("_")
            if public and kind.__module__ == module.__name__:
                for method in dir(kind):
                    if re.match("(time|timeraw|track|peakmem)_", method):
                        yield pytest.param(kind, method, id=f"{name}.{kind.__name__}.{method}")


def cheapest(kind):
    """Parameters of a small run on the CPU."""
    wanted = {
        "backend": "cpu",
        "kernel": 1,
        "stride": 2,
        "threads": 1,
        "layer": "512@7x7",
        "isa": "baseline",
        "who": "dcnlib",
    }
    names, values = getattr(kind, "param_names", ()), getattr(kind, "params", ())
    return [
        wanted[name] if wanted.get(name) in choices else choices[0]
        for name, choices in zip(names, values, strict=True)
    ]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(common, "least_seconds", lambda call, *_: _timed(call))
    for name in MODULES:
        module = importlib.import_module(f"benchmarks.{name}")
        if hasattr(module, "least_seconds"):
            monkeypatch.setattr(module, "least_seconds", common.least_seconds)
    yield
    dcnlib.set_num_threads(2)


def _timed(call):
    call()
    return 1e-3


@pytest.mark.parametrize(("kind", "method"), list(benchmarks()))
def test_benchmark_runs(kind, method):
    benchmark, parameters = kind(), cheapest(kind)
    before = dcnlib.cpu_isa()
    try:
        getattr(benchmark, "setup", lambda *_: None)(*parameters)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    result = getattr(benchmark, method)(*parameters)
    if method.startswith("track_"):
        assert result >= 0
    if method.startswith("timeraw_"):
        compile(result, method, "exec")
    getattr(benchmark, "teardown", lambda *_: None)(*parameters)
    assert dcnlib.cpu_isa() == before


@pytest.mark.parametrize("name", MODULES)
def test_parameters_do_not_depend_on_the_machine(name):
    source = (ASV_BENCH / "benchmarks" / f"{name}.py").read_text()
    lists = re.findall(r"^    params = (.*)$", source, re.MULTILINE)
    assert all("if" not in line.split() and "cpu_count" not in line for line in lists)


def test_what_is_missing_is_skipped_in_words(capsys):
    if dcnlib.backends()["cuda"].available:
        pytest.skip("there is a CUDA device here")
    with pytest.raises(NotImplementedError, match="cuda: "):
        common.backend_call("cuda", common.TINY, "forward")
    assert "skipped: cuda: " in capsys.readouterr().out


def test_rivals_say_why_not(monkeypatch):
    def nothing(name):
        raise ImportError("not here")

    monkeypatch.setattr(rivals.importlib, "import_module", nothing)
    for name in rivals.NAMES:
        assert re.match(rf"{name}: .* cannot be imported \(not here\)", rivals.why_not(name))


@pytest.mark.parametrize("name", rivals.NAMES[1:])
def test_rivals_compute_the_same(name):
    if rivals.why_not(name):
        pytest.skip(rivals.why_not(name))
    case = common.Case(12, 8, 9, 11, 3, 2, 2, groups=2, offset_groups=3)
    call = rivals.forward(name, *common.arrays(case)[:5], **common.options(case))
    expected = common.numpy_call(case, "forward")()
    np.testing.assert_allclose(np.asarray(call()), expected, atol=1e-4)


@pytest.mark.parametrize("direction", common.DIRECTIONS)
def test_work_is_counted(direction):
    case = common.Case(4, 6, 8, 10, 3, stride=2, groups=2)
    forward = 4 * 5 * 6 * 9 * 2
    assert case.macs(direction) == {"forward": forward, "backward": 2 * forward}[direction]
    output = common.numpy_call(case, "forward")()
    assert output.shape == (1, 6, *case.out_size)


@pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))
@pytest.mark.parametrize("kilobytes", [256, 1024, 5000])
def test_memory_of_a_call_is_exact(kilobytes):
    """In a process of its own: the C library's settings are for the whole process."""
    code = f"""
import sys
sys.path.insert(0, {str(ASV_BENCH)!r})
from benchmarks import memory
memory.settle()
import numpy as np
print(memory.extra_bytes(lambda: np.ones({kilobytes} * 1024, np.uint8)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert abs(int(done.stdout) / 1024 - kilobytes) <= 20


def test_profiles_choose_benchmarks():
    names = []
    for parameter in benchmarks():
        kind, method = parameter.values
        for values in itertools.product(*getattr(kind, "params", [])):
            text = ", ".join(repr(value) for value in values)
            names.append(f"{kind.__module__.partition('.')[2]}.{kind.__name__}.{method}({text})")
    chosen = {
        profile: {n for n in names if any(re.search(p, n) for p in patterns)}
        for profile, patterns in run.PROFILES.items()
    }
    assert all(chosen.values())
    assert chosen["quick"] < chosen["full"]
    assert not [name for name in chosen["quick"] if "'cuda'" in name]
    assert all("'cuda'" in name or "Cuda" in name for name in chosen["cuda"])
    for profiles in (["smoke"], ["full", "torch", "cuda"]):
        found = set().union(*(chosen[profile] for profile in profiles))
        assert {name.partition("(")[0] for name in found} == {n.partition("(")[0] for n in names}
    assert set(names) == set().union(*chosen.values())


def test_machine_name_tells_the_processor(monkeypatch):
    monkeypatch.setattr(run, "cpu_model", lambda: "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz")
    monkeypatch.setattr(run.os, "cpu_count", lambda: 28)
    assert run.machine_name() == "intel-xeon-e5-2680-v4-28"


def test_paths_are_forgotten(tmp_path):
    name = sys.executable.replace("/", "_")
    content = {
        "env_name": f"existing-py{name}",
        "python": sys.executable,
        "params": {"python": sys.executable, "ram": "1 GiB"},
    }
    (tmp_path / f"12345678-existing-py{name}.json").write_text(json.dumps(content))
    run.forget_paths(tmp_path)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    (path,) = tmp_path.iterdir()
    assert path.name == f"12345678-existing-py{version}.json"
    assert json.loads(path.read_text())["params"] == {"python": version, "ram": "1 GiB"}
    assert sys.executable not in path.read_text()


def test_asv_finds_nothing_wrong():
    pytest.importorskip("asv.benchmark", reason="asv is not installed")  # tests/asv is an "asv" too
    command = [sys.executable, "-m", "asv", "check", "-E", f"existing:{sys.executable}"]
    done = subprocess.run(command, cwd=ASV_BENCH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No problems found" in done.stdout


def test_configurations_agree():
    """The torch configuration is the other one with torch."""
    configs = []
    for name in ("asv.conf.json", "asv.torch.conf.json"):
        text = re.sub(r"^\s*//.*$", "", (ASV_BENCH / name).read_text(), flags=re.MULTILINE)
        configs.append(json.loads(text))
    plain, torch = configs
    assert torch["matrix"]["req"].pop("torch")
    for config in configs:
        config.pop("env_dir")
        config.pop("install_timeout")
    assert plain == torch
