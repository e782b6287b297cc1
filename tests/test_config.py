"""Settings: number of threads, instruction set, the environment variables, and who wins."""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import dcnlib
import isolated
from dcnlib import _config, testing
from dcnlib.testing import PROBLEMS

LARGEST = 2**31 - 1
ISAS = testing.cpu_isas()


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Every test begins and ends with the settings of its process."""
    monkeypatch.setattr(_config, "_explicit_threads", None)


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 17, LARGEST, np.int64(3), np.uint8(4), np.array(5)], ids=repr)
def test_number_of_threads(n):
    assert dcnlib.set_num_threads(n) is None
    assert dcnlib.get_num_threads() == int(n) and type(dcnlib.get_num_threads()) is int


@pytest.mark.parametrize("n", [0, -1, -(2**63), 2**31, 2**32 + 1, 2**63, 10**30], ids=str)
def test_numbers_out_of_range(n):
    dcnlib.set_num_threads(3)
    text = (
        f"set_num_threads: n: must be in [1, {LARGEST}]; expected an int in [1, {LARGEST}], got {n}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        dcnlib.set_num_threads(n)
    assert dcnlib.get_num_threads() == 3


@pytest.mark.parametrize(
    "n",
    [
        1.0,
        1.5,
        float("nan"),
        True,
        False,
        "2",
        None,
        b"2",
        [2],
        (2,),
        np.float32(2),
        np.bool_(True),
    ],
    ids=repr,
)
def test_no_numbers(n):
    dcnlib.set_num_threads(3)
    with pytest.raises(
        TypeError, match=r"^set_num_threads: n: must be an integer; expected .*, got"
    ):
        dcnlib.set_num_threads(n)
    assert dcnlib.get_num_threads() == 3


def test_the_setting_is_for_all_threads():
    dcnlib.set_num_threads(3)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(dcnlib.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [3]


def test_more_threads_than_sense():
    """A number of threads that nobody can have is an upper limit, not a wish."""
    call = testing.real(testing.Geometry(1, 32, 40, 40, 32, (3, 3), padding=(1, 1, 1, 1)), 0)
    dcnlib.set_num_threads(1)
    expected = call.forward("cpu")
    dcnlib.set_num_threads(LARGEST)
    np.testing.assert_array_equal(call.forward("cpu"), expected)


@pytest.mark.parametrize(
    ("explicit", "dcnlib_", "torch", "omp", "expected"),
    [
        (5, 4, 3, 2, (5, "dcnlib.set_num_threads")),
        (None, 4, 3, 2, (4, "DCNLIB_NUM_THREADS")),
        (None, None, 3, 2, (3, "torch.set_num_threads")),
        (None, None, None, 2, (2, "OMP_NUM_THREADS")),
        (None, None, 3, None, (3, "torch.set_num_threads")),
    ],
    ids=["explicit", "dcnlib", "torch", "omp", "torch_without_omp"],
)
def test_who_wins(monkeypatch, explicit, dcnlib_, torch, omp, expected):
    monkeypatch.setattr(_config, "_explicit_threads", explicit)
    monkeypatch.setattr(_config, "_ENVIRONMENT_THREADS", dcnlib_)
    monkeypatch.setattr(_config, "_OMP_THREADS", omp)
    assert _config.thread_setting(torch) == expected
    assert _config.num_threads(torch) == expected[0]


def test_otherwise_usable_cores(monkeypatch):
    monkeypatch.setattr(_config, "_ENVIRONMENT_THREADS", None)
    monkeypatch.setattr(_config, "_OMP_THREADS", None)
    assert _config.thread_setting() == (_config.usable_cores(), "usable cores")


ASK = "import dcnlib; print(dcnlib.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DCNLIB_NUM_THREADS": "3"}, 3),
        ({"DCNLIB_NUM_THREADS": " 3 "}, 3),
        ({"DCNLIB_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"}, 3),
        ({"DCNLIB_NUM_THREADS": "", "OMP_NUM_THREADS": "2"}, 2),
        ({"DCNLIB_NUM_THREADS": "", "OMP_NUM_THREADS": "5,2,1"}, 5),
    ],
    ids=["dcnlib", "spaces", "both", "omp", "omp_list"],
)
def test_threads_of_the_environment(environment, expected):
    assert isolated.python(ASK, **environment).stdout.split() == [str(expected)]


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "many", "2147483648", "1e3", "0x4"])
def test_nonsense_in_the_environment(text):
    """An error that names the variable, not a guess."""
    done = isolated.python(ASK, DCNLIB_NUM_THREADS=text)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"ValueError: dcnlib: DCNLIB_NUM_THREADS: [^;]+; expected [^;]+, got ", last)
    assert text in last


@pytest.mark.parametrize("text", ["0", "-3", "x", ",2", "2 4", "2147483648", "9223372036854775808"])
def test_nonsense_for_openmp(text):
    """OMP_NUM_THREADS is the runtime's: what it does not understand counts for nothing."""
    done = isolated.python(ASK, OMP_NUM_THREADS=text, DCNLIB_NUM_THREADS="")
    assert done.returncode == 0 and int(done.stdout) == _config.usable_cores()


def test_a_change_of_the_environment_comes_too_late(monkeypatch):
    """It is read once, at import."""
    before = dcnlib.get_num_threads()
    monkeypatch.setenv("DCNLIB_NUM_THREADS", str(before + 7))
    assert dcnlib.get_num_threads() == before


# ---- cores -------------------------------------------------------------------------------------


V1_QUOTA, V1_PERIOD = "cpu/{}cpu.cfs_quota_us", "cpu/{}cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (None, {"cpu.max": "max 100000\n"}, None),
        (None, {"cpu.max": "150000 100000\n"}, 1.5),
        (None, {"cpu.max": "400000 100000\n"}, 4.0),
        (None, {"cpu.max": "50000 100000\n"}, 0.5),
        (None, {V1_QUOTA.format(""): "300000\n", V1_PERIOD.format(""): "100000\n"}, 3.0),
        (None, {V1_QUOTA.format(""): "-1\n", V1_PERIOD.format(""): "100000\n"}, None),
        (None, {"cpu.max": "nonsense"}, None),
        (None, {"cpu.max": "100000 0\n"}, None),
        (None, {}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n"}, 2.0),
        (
            "0::/a/b\n",
            {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "200000 100000\n", "c/cpu.max": "1 1"},
            1.0,
        ),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3.0),
        ("0::/not/seen\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/../x\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("nonsense\n", {}, None),
        (b"0::/\xff\n", {"cpu.max": "250000 100000\n"}, 2.5),
        (
            "5:memory:/m\n3:cpu,cpuacct:/d\n0::/\n",
            {V1_QUOTA.format("d/"): "70000\n", V1_PERIOD.format("d/"): "100000\n"},
            0.7,
        ),
    ],
    ids=[
        "max", "1.5", "4", "half", "v1", "v1_none", "nonsense", "no_period", "no_files", "root",
        "nested", "outer_is_less", "outer_alone", "container", "outside", "no_group",
        "no_text", "v1_nested",
    ],
)  # fmt: skip
def test_quota_of_the_control_group(tmp_path, group, files, expected):
    """Of the process's own group and of those around it."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (files | ({"proc/self/cgroup": group} if group else {})).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert _config._quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [(8, None, 8), (8, 3.0, 3), (8, 2.9, 2), (8, 0.5, 1), (2, 16.0, 2), (1, None, 1)],
    ids=["no_quota", "3", "2.9", "half", "generous", "one"],
)
def test_usable_cores(monkeypatch, cores, quota, expected):
    """The affinity, no more than whole cores of the quota, at least one."""
    monkeypatch.setattr(_config.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(_config._core, "cores", lambda: 1)
    monkeypatch.setattr(_config, "_quota", lambda: quota)
    assert _config.usable_cores.__wrapped__() == expected


@pytest.mark.skipif(not _config._core.openmp(), reason="built without OpenMP")
def test_a_bound_thread_is_not_all_there_is():
    """OpenMP binds the thread that loads it, dcnlib's import or torch's, to one core."""
    ask = "from dcnlib._config import usable_cores; print(usable_cores())"
    usual, bound = (isolated.python(ask, OMP_PROC_BIND=bind) for bind in ("false", "true"))
    assert usual.stdout == bound.stdout != "", bound.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux has affinities")
def test_a_pinned_thread_speaks_for_nobody_else():
    ask = """
import os, threading
from dcnlib import _config
ask = lambda: (os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}), _config.usable_cores())
thread = threading.Thread(target=ask)
thread.start()
thread.join()
print(_config.usable_cores() == max(1, min(len(os.sched_getaffinity(0)), _config._quota() or 1e9) // 1))
"""
    done = isolated.python(ask)
    assert done.stdout == "True\n", done.stderr


# ---- instruction sets --------------------------------------------------------------------------


def test_isa_in_use():
    isa = dcnlib.cpu_isa()
    assert isinstance(isa, str) and isa == ISAS[-1]
    assert repr(isa) == repr(str(isa)) and f"{isa}" == str(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_limit(isa):
    before = dcnlib.cpu_isa()
    with dcnlib.cpu_isa(isa) as entered:
        assert entered == isa == dcnlib.cpu_isa()
    assert dcnlib.cpu_isa() == before


def test_limit_is_an_upper_one(monkeypatch):
    """An instruction set that this processor lacks means its best below that one."""
    monkeypatch.setattr(_config._core, "usable", lambda: ["baseline", "scalar"])
    assert [_config._best(limit) for limit in ("avx512", "avx2", "baseline", "scalar")] == [
        "baseline", "baseline", "baseline", "scalar",
    ]  # fmt: skip
    monkeypatch.setattr(_config._core, "usable", lambda: ["avx2", "baseline"])  # of a release
    assert _config._best("scalar") == "baseline"


def test_limits_nest():
    """The same object within itself, too."""
    before = dcnlib.cpu_isa()
    least, baseline = dcnlib.cpu_isa(ISAS[0]), dcnlib.cpu_isa("baseline")
    with baseline:
        with least, least:
            assert dcnlib.cpu_isa() == ISAS[0]
        assert dcnlib.cpu_isa() == "baseline"
    with pytest.raises(ZeroDivisionError), least:
        1 / 0  # noqa: B018
    assert dcnlib.cpu_isa() == before


def test_limits_of_several_threads():
    """Blocks that overlap: the last one that is open counts, and nothing stays behind."""
    before = dcnlib.cpu_isa()
    first, second = dcnlib.cpu_isa(ISAS[0]), dcnlib.cpu_isa("baseline")
    with ThreadPoolExecutor(1) as pool:
        first.__enter__()
        pool.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert dcnlib.cpu_isa() == "baseline"
        pool.submit(second.__exit__, None, None, None).result()
    assert dcnlib.cpu_isa() == before


def test_naming_is_not_limiting():
    before = dcnlib.cpu_isa()
    dcnlib.cpu_isa("baseline")
    assert dcnlib.cpu_isa() == before


@pytest.mark.parametrize("name", ["sse", "AVX2", "", "neon", "avx", 2, b"avx2"], ids=repr)
def test_unknown_isa(name):
    text = (
        "cpu_isa: limit: unknown instruction set; expected scalar, baseline, avx2, avx512, amx, got"
    )
    with pytest.raises(ValueError, match=f"^{text} {re.escape(repr(name))}$"):
        dcnlib.cpu_isa(name)


def test_the_limit_is_real():
    """Instruction sets sum over channels in another order: the last bits tell them apart."""
    call = testing.real(PROBLEMS["channels_72"], 0).astype("float32")
    results = set()
    for isa in ISAS:
        with dcnlib.cpu_isa(isa):
            results.add(call.run("cpu")["grad_offset"].tobytes())
    assert len(results) == len(ISAS)


@pytest.mark.parametrize("isa", ISAS)
def test_isa_of_the_environment(isa):
    for text in (isa, isa.upper(), f" {isa} "):
        done = isolated.python("import dcnlib; print(dcnlib.cpu_isa())", DCNLIB_CPU_ISA=text)
        assert done.stdout.split() == [isa], done.stderr


def test_unknown_isa_of_the_environment():
    done = isolated.python("import dcnlib", DCNLIB_CPU_ISA="sse9")
    assert done.returncode == 1
    text = "ValueError: dcnlib: DCNLIB_CPU_ISA: unknown instruction set; expected scalar, baseline"
    assert done.stderr.strip().splitlines()[-1].startswith(text)
