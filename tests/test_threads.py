"""Threads change no bit, and there are only as many as somebody allowed.

The same bytes for any number of threads, any company in the batch, any moment; and the number of
threads is counted in ``/proc/self/task``, not believed.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import dcnlib
import isolated
from dcnlib import testing
from dcnlib.backends import cpu
from dcnlib.testing import OUTPUTS, Geometry

ISAS = testing.cpu_isas()
OPENMP = cpu._core.openmp()  # without it there is one thread, whatever the settings
THREE, SAME = (3, 3), (1, 1, 1, 1)

#: Images enough to be summed up in series, few of which are in memory at once.
SERIES = {
    "series": Geometry(7, 64, 40, 41, 64, THREE, padding=SAME),
    "series_depthwise": Geometry(9, 128, 53, 41, 128, THREE, padding=SAME, groups=128),
    "series_groups": Geometry(11, 96, 37, 41, 72, (3, 2), padding=SAME, groups=3),
}
#: Enough work for a team of sixteen each, cut in every way that the kernels know.
LARGE = {
    "dense": Geometry(2, 32, 33, 47, 40, THREE, padding=SAME),
    "one_image": Geometry(1, 16, 75, 81, 33, THREE, padding=SAME),
    "many_images": Geometry(21, 24, 17, 15, 24, THREE, padding=SAME),
    "wide_slabs": Geometry(1, 200, 21, 23, 20, THREE, padding=SAME),
    "many_weights": Geometry(1, 130, 11, 13, 260, THREE, padding=SAME),
    "groups_across": Geometry(3, 72, 53, 51, 36, (3, 2), (1, 2), (2, 1, 0, 1), (1, 2), 3, 8),
    "offset_groups": Geometry(2, 48, 39, 37, 17, THREE, padding=SAME, offset_groups=4, mask=False),
    "depthwise": Geometry(4, 96, 69, 71, 96, THREE, padding=SAME, groups=96, bias=False),
    "kernel_7": Geometry(1, 8, 75, 71, 9, (7, 7), padding=(3, 3, 3, 3)),
    "pointwise": Geometry(2, 96, 51, 53, 64, (1, 1)),
    **SERIES,
}
LARGE_DTYPES = [(name, dtype) for name in LARGE for dtype in ("float32", "float64")] + [
    ("dense", "float16"),
    ("one_image", "bfloat16"),
    ("series", "float16"),
    ("series_depthwise", "float16"),
]


@cache
def problem_call(name, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return testing.real(LARGE[name], 0).astype(dtype)


def run_with(call, num_threads):
    """All results of a call through the backend's own door, in memory that was NaN before."""
    problem = call.problem()
    output = np.full(problem.output_shape, np.nan, call.input.dtype)
    arrays = (call.input, call.offset, call.weight)
    cpu.forward(problem, *arrays, call.bias, call.mask, output, num_threads=num_threads)
    shapes = (
        problem.input_shape,
        problem.offset_shape,
        problem.weight_shape,
        problem.bias_shape if problem.has_bias else None,
        problem.mask_shape if problem.has_mask else None,
    )
    grads = [None if s is None else np.full(s, np.nan, call.input.dtype) for s in shapes]
    cpu.backward(problem, call.grad_output, *arrays, call.mask, grads, num_threads=num_threads)
    return dict(zip(OUTPUTS, (output, *grads), strict=True))


def images_of(call, rows):
    """The call with some images of its batch."""
    arrays = ("input", "offset", "mask", "grad_output")
    return call._replace(**{name: getattr(call, name)[rows] for name in arrays})


def assert_same_bytes(actual, expected, note=""):
    for name, array in expected.items():
        if array is None:
            assert actual[name] is None
            continue
        different = np.count_nonzero(actual[name] != array)
        assert actual[name].tobytes() == array.tobytes(), f"{name}: {different} differ; {note}"


@pytest.mark.parametrize(("name", "dtype"), LARGE_DTYPES, ids=lambda value: value)
def test_any_number_of_threads(name, dtype):
    call = problem_call(name, dtype)
    outputs, per_output = call.grad_output.size, call.weight[0].size
    assert outputs * per_output >= 16 << 20, "too little work for a team"
    alone = run_with(call, 1)
    assert all(np.isfinite(a).all() for a in alone.values() if a is not None)
    for num_threads in (2, 3, 4, 7, 8, 16):
        assert_same_bytes(run_with(call, num_threads), alone, f"{num_threads} threads")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", SERIES)
def test_a_batch_is_the_sum_of_its_images(name, dtype):
    """Gradients of weight and bias, to the last bit where the sums are exact."""
    call = testing.lattice(SERIES[name], 5, (1, 1, 1)).astype("float64")
    alone = [images_of(call, slice(n, n + 1)).run("cpu") for n in range(call.input.shape[0])]
    for num_threads in (1, 5, 16):
        batch = run_with(call.astype(dtype), num_threads)
        for of in ("grad_weight", "grad_bias"):
            total = sum(grads[of] for grads in alone).astype(dtype)
            assert np.count_nonzero(total) and np.abs(total).max() < np.inf
            np.testing.assert_array_equal(batch[of], total, f"{of}, {num_threads} threads")


@pytest.mark.parametrize("batch", [15, 33, 57, 65, 100])
def test_series_of_any_length(batch):
    """Series that differ by an image, in rounds the last of which may have fewer of them."""
    call = testing.lattice(Geometry(batch, 16, 63, 65, 3, (1, 1)), 6, (1, 1, 1))
    exact = call.astype("float64")
    alone = [images_of(exact, slice(n, n + 1)).run("cpu") for n in range(batch)]
    first = run_with(call, 1)
    for of in ("grad_weight", "grad_bias"):
        np.testing.assert_array_equal(first[of], sum(grads[of] for grads in alone))
    for num_threads in (2, 5, 7, 16):
        assert_same_bytes(run_with(call, num_threads), first, f"{num_threads} threads")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(2, 21, 23, 29, 34, THREE, padding=SAME, offset_groups=3),
        Geometry(2, 9, 19, 26, 16, (8, 8)),  # a few more pixels than the largest tile
    ],
    ids=["offset_groups", "kernel_8"],
)
def test_any_number_of_threads_on_every_isa(geometry, isa):
    call = testing.real(geometry, 1).astype("float32")
    with dcnlib.cpu_isa(isa):
        alone = run_with(call, 1)
        for num_threads in (2, 3, 5):
            assert_same_bytes(run_with(call, num_threads), alone, f"{num_threads} threads")


@pytest.mark.parametrize("name", ["dense", "one_image", "many_images", "depthwise"])
def test_again_and_again(name):
    call = problem_call(name, "float32")
    first = run_with(call, 4)
    for _ in range(10):
        assert_same_bytes(run_with(call, 4), first)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(37, 6, 9, 11, 4, THREE, padding=SAME, groups=2, offset_groups=3),
        Geometry(37, 5, 7, 6, 5, THREE, padding=SAME, groups=5),
        Geometry(37, 66, 8, 9, 17, THREE, padding=SAME),
        Geometry(37, 3, 40, 41, 2, (3, 2), (2, 1), (1, 0, 2, 1)),
    ],
    ids=["groups", "depthwise", "slabs", "bands"],
)
def test_an_image_does_not_mind_its_batch(geometry, dtype, isa):
    """Output and the gradients of input, offset and mask: row i of any batch is the row alone."""
    call = testing.real(geometry, 3).astype(dtype)
    ours = ("output", "grad_input", "grad_offset", "grad_mask")

    with dcnlib.cpu_isa(isa):
        alone = [images_of(call, slice(n, n + 1)).run("cpu") for n in range(37)]
        for batch in (2, 31, 32, 33, 37):
            rows = np.random.default_rng(batch).permutation(37)[:batch]
            together = images_of(call, rows).run("cpu")
            for i, n in enumerate(rows):
                assert_same_bytes(
                    {name: together[name][i] for name in ours},
                    {name: alone[n][name][0] for name in ours},
                    f"row {i} of {batch}",
                )


def test_concurrent_calls():
    """Eight threads at once, shared inputs, mixed sizes, errors: everyone gets the right bytes."""
    calls = [problem_call(name, "float32") for name in ("dense", "one_image", "many_images")]
    calls += [testing.random_lattice(seed).astype("float64") for seed in range(20)]
    expected = [call.run("cpu") for call in calls]
    broken = calls[0]._replace(stride=(0, 1))
    start = threading.Barrier(8)

    def work(seed):
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(30):
            i = int(rng.integers(len(calls)))
            assert_same_bytes(calls[i].run("cpu"), expected[i], str(i))
            with pytest.raises(ValueError, match="stride"):
                broken.forward("cpu")
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_small_stacks():
    """A thread with as little stack as there can be, or 64 KiB, makes calls, alone and with a team."""
    call = problem_call("dense", "float32")
    expected = run_with(call, 1)
    results = []
    least = {"aarch64": 128 * 1024}.get(platform.machine(), 0)
    size = threading.stack_size(max(64 * 1024, least))
    try:
        thread = threading.Thread(target=lambda: results.append(run_with(call, 3)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    assert_same_bytes(results[0], expected)


MEANWHILE = """
import sys, threading, time
import numpy as np
import dcnlib
from dcnlib import testing

dcnlib.set_num_threads(2)
call = testing.real(testing.Geometry(1, 16, 40, 41, 16, (3, 3), padding=(1, 1, 1, 1)), 0)
call = call.astype("float32")
stop = threading.Event()

def change():
    values = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -2.0**31, 0, 5, -60], np.float32)
    rng = np.random.default_rng(0)
    while not stop.is_set():
        at = rng.integers(0, call.offset.size, 1000)
        call.offset.reshape(-1)[at] = rng.choice(values, 1000)

thread = threading.Thread(target=change)
thread.start()
end = time.monotonic() + 3
calls = 0
while time.monotonic() < end or calls <= 20:
    call.run("cpu")
    calls += 1
stop.set()
thread.join()
print(calls)
"""


def test_offsets_that_change_meanwhile():
    """Each is read once: whatever another thread writes, nothing outside the image is touched."""
    done = isolated.python(MEANWHILE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


AT_EXIT = """
import threading, time
from dcnlib import testing

call = testing.real(testing.Geometry(8, 64, 60, 60, 64, (3, 3), padding=(1, 1, 1, 1)), 0)
call.forward("cpu")
threading.Thread(target=lambda: [call.run("cpu") for _ in range(1000)], daemon=True).start()
time.sleep(0.05)
"""


def test_exit_during_a_call():
    """A daemon thread in the middle of one does not disturb the end of the process."""
    for _ in range(4):
        done = isolated.python(AT_EXIT)
        assert (done.returncode, done.stderr) == (0, "")


# ---- how many threads there are ----------------------------------------------------------------

COUNT = """
import os
import numpy as np
import dcnlib
from dcnlib import testing

def threads():
    return len(os.listdir("/proc/self/task"))

call = testing.real(testing.Geometry(1, 32, 40, 40, 32, (3, 3), padding=(1, 1, 1, 1)), 0)
before = threads()
{setup}
output = {call}
# The runtime keeps the threads of its largest team.
print(threads() - before + 1, dcnlib.get_num_threads(), output.tobytes().hex()[:64])
"""
DIRECT = "call.forward('cpu')"


def count(setup="", call=DIRECT, prefix=(), **environment):
    """(threads in the team, get_num_threads(), some bytes of the result) of a fresh process."""
    settings = dict.fromkeys(("OMP_NUM_THREADS", "DCNLIB_NUM_THREADS"), "") | environment
    code = COUNT.format(setup=setup, call=call)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        env=isolated.environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    team, number, digest = done.stdout.split()
    return int(team), int(number), digest


@pytest.mark.parametrize(
    ("setup", "environment", "expected"),
    [
        ("", {"OMP_NUM_THREADS": "3"}, 3),
        ("", {"OMP_NUM_THREADS": "4,2"}, 4),
        ("", {"DCNLIB_NUM_THREADS": "5", "OMP_NUM_THREADS": "2"}, 5),
        ("dcnlib.set_num_threads(3)", {"DCNLIB_NUM_THREADS": "5", "OMP_NUM_THREADS": "2"}, 3),
        ("dcnlib.set_num_threads(1)", {"OMP_NUM_THREADS": "4"}, 1),
        ("dcnlib.set_num_threads(7); dcnlib.set_num_threads(2)", {}, 2),
    ],
    ids=["OMP", "OMP_list", "DCNLIB", "explicit", "explicit_1", "explicit_last"],
)
def test_settings_are_obeyed(setup, environment, expected):
    """Explicit before DCNLIB_NUM_THREADS before OMP_NUM_THREADS, and so many threads there are."""
    team, number, _ = count(setup, **environment)
    assert (team, number) == (expected if OPENMP else 1, expected)


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_affinity_is_obeyed():
    """Without a setting there is one thread for each usable core."""
    assert count(prefix=("taskset", "-c", "0"))[:2] == (1, 1)
    every = len(os.sched_getaffinity(0))
    team, number, _ = count()
    assert team == (number if OPENMP else 1) and number <= every


def test_settings_change_no_bit():
    """Schedules, placement, dynamic teams, limits and stacks of the OpenMP runtime."""
    usual = count(OMP_NUM_THREADS="4")
    for environment in (
        {"OMP_SCHEDULE": "static,3"},
        {"OMP_PROC_BIND": "true"},
        {"OMP_DYNAMIC": "true"},
        {"OMP_STACKSIZE": "64k"},
        {"OMP_WAIT_POLICY": "passive"},
    ):
        assert count(**environment | {"OMP_NUM_THREADS": "4"})[2] == usual[2], environment
    team, _, digest = count(OMP_NUM_THREADS="4", OMP_THREAD_LIMIT="2")
    assert team <= 2 and digest == usual[2]


def test_small_problems_run_alone():
    """Waking a team costs more than a small call."""
    small = "testing.random_lattice(0).forward('cpu')"
    assert count("dcnlib.set_num_threads(8)", small)[0] == 1


TEAMS = """
import json, os, resource, warnings
import dcnlib
from dcnlib import testing

def layer(size):
    return testing.real(testing.Geometry(1, 32, size, size, 32, (3, 3), padding=(1, 1, 1, 1)), 0)

large, small = layer(40), layer(20)
before = len(os.listdir("/proc/self/task"))
counts = []

def run(call):
    output = call.forward("cpu")
    counts.append(len(os.listdir("/proc/self/task")) - before + 1)
    return output.tobytes()

dcnlib.set_num_threads(7)
for call in (large, small, large):
    run(call)
dcnlib.set_num_threads(2)
expected = run(large)
used = 1024 * int(next(s for s in open("/proc/self/status") if s.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), -1))
dcnlib.set_num_threads(7)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    same = run(large) == expected
print(json.dumps([counts, same, [str(w.message) for w in seen]]))
"""


@pytest.mark.skipif(not OPENMP, reason="built without OpenMP")
def test_a_team_keeps_its_threads():
    """A small layer ends none, and it is noticed when there is no room to create them again."""
    done = isolated.python(TEAMS)
    assert done.returncode == 0, done.stderr
    counts, same, warned = json.loads(done.stdout)
    assert counts[:3] == [7, 7, 7] and counts[4] < 7 and same
    assert warned[0].startswith("dcnlib: 7 threads cannot be created")


REGION = """
#include <omp.h>
/* Calls back from a region of two threads, and from its second thread if `second`. */
int in_region(void (*call)(void), int second) {
  int threads = 0;
#pragma omp parallel num_threads(2)
  {
    if (omp_get_thread_num() == second) call();
#pragma omp single
    threads = omp_get_num_threads();
  }
  return threads;
}
"""

IN_REGION = """
import ctypes, json, os, sys
import dcnlib
from dcnlib import testing

before = len(os.listdir("/proc/self/task"))
library = ctypes.CDLL(sys.argv[1])
call = testing.real(testing.Geometry(1, 32, 40, 40, 32, (3, 3), padding=(1, 1, 1, 1)), 0)
dcnlib.set_num_threads(1)
expected = call.run("cpu")
dcnlib.set_num_threads(6)
same = []

@ctypes.CFUNCTYPE(None)
def inside():
    results = call.run("cpu")
    same.append(all((results[k] == v).all() for k, v in expected.items()))

teams = [library.in_region(inside, second) for second in (0, 1)]
inner = len(os.listdir("/proc/self/task"))
call.run("cpu")
outer = len(os.listdir("/proc/self/task"))
print(json.dumps([teams, same, inner - before + 1, outer - before + 1]))
"""


@pytest.mark.skipif(not OPENMP, reason="built without OpenMP")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_alone_inside_a_parallel_region(tmp_path):
    """Whoever opened the region has shared the cores already."""
    source, library = tmp_path / "region.c", tmp_path / "region.so"
    source.write_text(REGION)
    emulated = "DCNLIB_EMULATED_PYTHON" in os.environ  # the machine's own compiler is another's
    compiler = f"{platform.machine()}-linux-gnu-gcc" if emulated else "cc"
    command = [compiler, "-shared", "-fPIC", "-fopenmp", source, "-o", library]
    subprocess.run(command, check=True, capture_output=True)
    done = isolated.python(IN_REGION, str(library))
    assert done.returncode == 0, done.stderr
    teams, same, inside, outside = json.loads(done.stdout)
    assert teams == [2, 2] and same == [True, True]
    assert inside == 2 and outside == 6


TEAM = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include "threads.h"
#include <omp.h>

enum { TASKS = 40, WAVES = 3, THREADS = 4 };
static int sleeper, finished, early, runs[WAVES][DCN_PHASES][TASKS], own[WAVES][DCN_PHASES][TASKS];

/* Notes who ran what; `sleeper` loses its core in its first task of each phase. */
static void run(const dcn_cpu_call *call, int64_t wave, int64_t phase, int64_t task, void *scratch) {
  const int me = omp_get_thread_num();
  const int ahead = (wave * 3 + (phase > 1 ? phase - 1 : phase)) * TASKS;
  if (__atomic_load_n(&finished, __ATOMIC_SEQ_CST) < ahead) early++;
  if (scratch != (char *)call->shared + me * call->plan->scratch_bytes) early++;
  if (me == sleeper) usleep(200 * 1000);
  else usleep(1000);
  __atomic_fetch_add(&runs[wave][phase][task], 1, __ATOMIC_RELAXED);
  own[wave][phase][task] = task * THREADS / TASKS == me;
  __atomic_fetch_add(&finished, 1, __ATOMIC_SEQ_CST);
}

int main(int, char **argv) {
  sleeper = atoi(argv[1]);
  const dcn_cpu_plan plan = {WAVES, 4, {TASKS, 0, TASKS, TASKS}, 0, 64, 0, 0, 0, 0};
  char scratch[THREADS * 64];
  const dcn_cpu_call call = {nullptr, nullptr, &plan, 0, scratch, nullptr};
  const dcn_cpu_operator kernel = {"", nullptr, run};
  dcn_threads_run(&kernel, &call, scratch, THREADS, atoi(argv[2]));
  int once = 1, shares = 0;
  for (int wave = 0; wave < WAVES; wave++)
    for (int phase = 0; phase < 4; phase++)
      for (int task = 0; task < TASKS; task++) {
        once &= runs[wave][phase][task] == (phase != 1);
        shares += own[wave][phase][task];
      }
  printf("[%d, %d, %d]", once, early, shares);
}
"""


@pytest.fixture(scope="module")
def core_program(tmp_path_factory):
    """Compiles a program with parts of csrc/cpu; where it lies."""
    csrc = Path(__file__).parents[1] / "csrc" / "cpu"
    if shutil.which("c++") is None or not csrc.exists():
        pytest.skip("needs a C++ compiler and the sources")

    def compiled(text, *sources_and_options):
        folder = tmp_path_factory.mktemp("core_program")
        (folder / "program.cpp").write_text(text)
        command = ["c++", "-std=c++17", "-w", "-I", csrc, folder / "program.cpp"]
        command += [csrc / name if name.endswith(".cpp") else name for name in sources_and_options]
        subprocess.run([*command, "-o", folder / "program"], check=True)
        return folder / "program"

    return compiled


@pytest.fixture(scope="module")
def team(core_program):
    """A team of csrc/cpu/threads.cpp with four workers and tasks that tell who ran them."""
    program = core_program(TEAM, "threads.cpp", "-fopenmp")

    def run(sleeper, team=4):
        environment = os.environ | {"OMP_THREAD_LIMIT": "7", "OMP_DYNAMIC": "false"}
        command = [program, str(sleeper), str(team)]
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("members", [4, 7])
def test_every_task_runs_once_behind_the_phase_before(team, members):
    """And by the workers alone, however large the team is."""
    once, early, shares = team(-1, members)
    assert once and not early
    assert shares > 0.6 * 3 * 3 * 40  # a thread meets in each phase what it left in its cache


@pytest.mark.parametrize("sleeper", [0, 3])
def test_nobody_waits_for_a_thread_without_a_core(team, sleeper):
    once, early, shares = team(sleeper)
    assert once and not early
    assert shares < 3 * 3 * (3 * 10 + 2)  # others took all but one or two tasks of its share


PLANS = """
#include <stdio.h>
#define DCN_ISA plans
#define DCN_VECTOR_BYTES 0
#include "kernels/backward.h"

/* Nine sizes and a number of threads: tasks of the main phase, forward, backward, and of the last wave of
 * the forward direction. */
int main() {
  dcn_params p = {};
  int threads;
  scanf("%ld %ld %ld %ld %ld %ld %ld %ld %ld %d", &p.batch, &p.in_channels, &p.out_channels, &p.in_h,
        &p.in_w, &p.kernel_h, &p.stride_h, &p.groups, &p.offset_groups, &threads);
  p.kernel_w = p.kernel_h, p.stride_w = p.stride_h, p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_left = p.kernel_h / 2;
  p.out_h = (p.in_h - 1) / p.stride_h + 1, p.out_w = (p.in_w - 1) / p.stride_w + 1;
  dcn_cpu_plan plan = {};
  plans::forward_plan<float>(p, threads, false, &plan);
  const plans::Forward<float> whole(p, threads, false);
  const plans::Forward<float> last(p, threads, false, plan.internal >> 17 & 0xffff);
  const long last_tasks = (p.batch - (plan.waves - 1) * whole.wave) * last.tiles;
  printf("%ld ", plan.tasks[1]);
  plans::backward_plan<float>(p, 31, threads, false, &plan);
  printf("%ld %ld", plan.tasks[1], last_tasks);
}
"""


@pytest.fixture(scope="module")
def plans(core_program):
    """Tasks of both directions' main phase, and of the last forward wave, for a number of threads."""
    program = core_program(PLANS)

    def run(*numbers):
        text = " ".join(map(str, numbers))
        done = subprocess.run([program], input=text, check=True, capture_output=True, text=True)
        return [int(tasks) for tasks in done.stdout.split()]

    return run


@pytest.mark.parametrize("threads", [2, 4, 8, 16])
@pytest.mark.parametrize(
    "layer",
    [
        (8, 64, 64, 56, 56, 3, 1, 1, 1),
        (10, 64, 64, 56, 56, 3, 1, 1, 1),
        (33, 64, 64, 56, 56, 3, 1, 1, 1),
        (8, 128, 128, 56, 56, 3, 1, 1, 1),
        (8, 256, 256, 28, 28, 3, 1, 1, 1),
        (15, 256, 256, 28, 28, 3, 1, 1, 1),
        (16, 256, 256, 56, 56, 3, 1, 1, 1),
        (32, 512, 512, 14, 14, 3, 1, 1, 1),
        (2, 256, 256, 100, 152, 3, 1, 1, 1),
        (8, 128, 256, 112, 112, 3, 2, 1, 1),
        (16, 128, 128, 56, 56, 3, 1, 4, 4),
        (16, 256, 256, 56, 56, 3, 1, 256, 1),
        (32, 16, 16, 28, 28, 3, 1, 1, 1),
    ],
    ids=str,
)
def test_batches_occupy_many_threads(plans, layer, threads):
    """What is in memory at once has tasks for all threads, and about as many for each."""
    for tasks in plans(*layer, threads)[:2]:
        assert tasks >= threads
        assert tasks / (threads * -(-tasks // threads)) >= 0.75, tasks


@pytest.mark.parametrize("threads", [4, 8, 14])
def test_the_rest_of_a_batch_occupies_many_threads(plans, threads):
    """Behind the last whole wave there is one image."""
    _, _, last = plans(threads + 1, 512, 512, 14, 14, 3, 1, 1, 1, threads)
    assert last >= 0.75 * threads
