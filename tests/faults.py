"""What `test_memory.py` runs in processes of its own, which may run out of memory or threads.

Importing this file does not import torch. The functions take and return plain data for
`isolated.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import resource
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

import dcnlib
from dcnlib import testing
from dcnlib.backends import cpu

MIB = 1 << 20


def digest(results: dict) -> str:
    """A fingerprint of all bytes of a call's results."""
    total = hashlib.sha256()
    for name, array in results.items():
        total.update(name.encode())
        total.update(b"none" if array is None else array.tobytes())
    return total.hexdigest()


def status(field: str) -> int:
    """A line of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def address_space(extra: int) -> Iterator[None]:
    """As much address space as now and `extra` bytes, no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- how much memory a call takes --------------------------------------------------------------


def peak(case: tuple[str, dict, int]) -> dict[str, int]:
    """Bytes beyond arguments and results at the peak of the forward call and of both directions."""
    dtype, sizes, num_threads = case
    call = testing.real(_geometry(sizes), 0).astype(dtype)
    problem = call.problem()
    output = np.zeros(problem.output_shape, call.input.dtype)
    arrays = (call.input, call.offset, call.weight)
    shapes = (
        problem.input_shape,
        problem.offset_shape,
        problem.weight_shape,
        problem.bias_shape if problem.has_bias else None,
        problem.mask_shape if problem.has_mask else None,
    )
    grads = [None if s is None else np.zeros(s, call.input.dtype) for s in shapes]

    def forward() -> None:
        cpu.forward(problem, *arrays, call.bias, call.mask, output, num_threads=num_threads)

    def backward() -> None:
        cpu.backward(problem, call.grad_output, *arrays, call.mask, grads, num_threads=num_threads)

    cpu._core.keep_workspace(0)
    small = testing.real(testing.PROBLEMS["plain"], 0)
    small.run("cpu")
    for array in (output, *grads):
        if array is not None:
            array.fill(1)  # its pages exist
    peaks = {}
    for name, run in (("forward", forward), ("backward", backward)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before = status("VmRSS")
        run()
        peaks[name] = max(0, status("VmHWM") - before)
    return peaks


def peak_of_reference(sizes: dict) -> int:
    """The same of the reference backend's forward call."""
    call = testing.real(_geometry(sizes), 0).astype("float32")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call.forward("reference")
    return status("VmHWM") - before


def _geometry(sizes: dict) -> testing.Geometry:
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    return testing.Geometry(**lists)


def growth(calls: int) -> int:
    """How much larger the process is after many calls, good and bad, than after a tenth of them."""
    good = [testing.random_lattice(seed).astype("float32") for seed in range(12)]
    bad = good[0]._replace(stride=(0, 0))
    sizes = []
    for i in range(calls):
        good[i % len(good)].run("cpu")
        with suppress(ValueError):
            bad.forward("cpu")
        if i in (calls // 10, calls - 1):
            sizes.append(status("VmRSS"))
    return sizes[1] - sizes[0]


def kept(_: None) -> dict[str, list[int]]:
    """Of a usual and a large call: pages new to a later one, without and with memory kept; bytes kept."""
    large = testing.real(testing.Geometry(1, 2, 1200, 1200, 2, (1, 1)), 0).astype("float32")
    found = {}
    for name, call in (("usual", large_call()), ("large", large)):
        found[name] = []
        for keep in (0, 64 * MIB):
            cpu._core.keep_workspace(keep)
            call.backward("cpu")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            call.backward("cpu")
            found[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        before = status("VmRSS")
        cpu._core.keep_workspace(0)
        found[name].append(before - status("VmRSS"))
    return found


# ---- no memory, no threads ---------------------------------------------------------------------


def large_call() -> testing.Call:
    geometry = testing.Geometry(1, 96, 90, 90, 32, (3, 3), padding=(1, 1, 1, 1))
    return testing.real(geometry, 0).astype("float32")


def little_memory(num_threads: int) -> dict[str, int]:
    """Calls under ever less tight limits: how many fail and how many are right."""
    cpu._core.keep_workspace(0)
    dcnlib.set_num_threads(num_threads)
    call = large_call()
    expected = digest(call.run("cpu"))
    inputs = digest(dict(zip(testing.OUTPUTS, call[:6], strict=True)))
    counts = {"MemoryError": 0, "right": 0}
    for extra in range(0, 28 * MIB, MIB // 2):
        try:
            with address_space(extra):
                results = call.run("cpu")
            assert digest(results) == expected, extra
            counts["right"] += 1
        except MemoryError:
            counts["MemoryError"] += 1
        assert digest(dict(zip(testing.OUTPUTS, call[:6], strict=True))) == inputs, extra
        if extra % (4 * MIB) == 0:
            assert digest(call.run("cpu")) == expected, extra
    return counts


def few_threads(num_threads: int) -> dict[str, int]:
    """Calls from new threads, for which new teams must be made, under limits from none to enough.

    libgomp ends the process when it cannot create a thread.
    """
    dcnlib.set_num_threads(1)
    call = large_call()
    expected = digest(call.run("cpu"))
    dcnlib.set_num_threads(num_threads)
    counts = {"MemoryError": 0, "right": 0, "warnings": 0}

    def attempt(start: threading.Event, answers: list[str]) -> None:
        start.wait()
        try:
            answers.append(digest(call.run("cpu")))
        except MemoryError:
            answers.append("MemoryError")

    for extra in range(2 * MIB, 120 * MIB, 3 * MIB // 2):
        start, answers = threading.Event(), []
        thread = threading.Thread(target=attempt, args=(start, answers))
        thread.start()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with address_space(extra):
                start.set()
                thread.join()
        assert answers[0] in ("MemoryError", expected), extra
        counts["right" if answers[0] == expected else "MemoryError"] += 1
        counts["warnings"] += any(w.category is RuntimeWarning for w in caught)
    assert digest(call.run("cpu")) == expected
    return counts


def failing_allocation(case: tuple[str, int]) -> dict[str, int]:
    """Fail the first, second, ... allocation of a few calls, through the allocator in `library`."""
    library, threads = case
    allocator = ctypes.CDLL(library)
    cpu._core.keep_workspace(0)
    dcnlib.set_num_threads(threads)
    counts = {"MemoryError": 0, "right": 0}
    calls = [testing.random_lattice(seed).astype("float32") for seed in range(8)]
    calls += [large_call(), testing.real(testing.PROBLEMS["kernel_7"], 0).astype("float64")]
    for call in calls:
        for direction in ("forward", "backward"):
            run = getattr(call, direction)
            expected = _digest(run("cpu"))
            for nth in range(1, 1000):
                allocator.fail_nth(nth)
                try:
                    results = run("cpu")
                except MemoryError:
                    results = None
                failed = allocator.fail_nth(0)
                if results is None:
                    counts["MemoryError"] += 1
                    assert failed
                else:
                    counts["right"] += 1
                    assert _digest(results) == expected
                assert _digest(run("cpu")) == expected
                if not failed:
                    break
    return counts


def _digest(results) -> str:
    arrays = results if isinstance(results, tuple) else (results,)
    return digest({str(i): array for i, array in enumerate(arrays)})


def fingerprints(keep: int) -> str:
    """All named problems in all dtypes and directions: the same whatever memory holds."""
    cpu._core.keep_workspace(keep)
    total = hashlib.sha256()
    for name, geometry in testing.PROBLEMS.items():
        for dtype in ("float32", "float64", "float16"):
            call = testing.real(geometry, 0).astype(dtype)
            total.update(f"{name} {digest(call.run('cpu'))}".encode())
    return total.hexdigest()


# ---- guard pages -------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE


class Guarded:
    """Arrays that begin right behind a page nobody may touch, or end right before one."""

    def __init__(self, flush: str):
        self.flush = flush
        self.maps: list[mmap.mmap] = []

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        bytes_ = int(np.prod(shape)) * dtype.itemsize
        pages = max(1, -(-bytes_ // _PAGE))
        memory = mmap.mmap(-1, (pages + 2) * _PAGE)
        self.maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + (pages + 1) * _PAGE):
            if _LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        at = _PAGE if self.flush == "begin" else (pages + 1) * _PAGE - bytes_
        return np.frombuffer(memory, dtype, int(np.prod(shape)), at).reshape(shape)

    def copy(self, array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        guarded = self.array(array.shape, array.dtype)
        guarded[...] = array
        return guarded


def guard_pages(case: tuple[str, str, str, str]) -> str:
    """A named problem with every operand between guard pages, in both layouts and by address."""
    name, dtype, isa, flush = case
    call = testing.lattice(testing.PROBLEMS[name], 0, (2, 2, 1)).astype(dtype)
    expected = call.run("reference")
    with dcnlib.cpu_isa(isa):
        for channels_last in (False, True):
            testing.assert_equal(_guarded_run(call, flush, channels_last), expected)
    return "equal"


def _guarded_run(call: testing.Call, flush: str, channels_last: bool) -> dict:
    problem = call.problem()._replace(channels_last=channels_last)
    dtype = call.input.dtype
    guarded = Guarded(flush)

    def images(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[i] for i in (0, 2, 3, 1)) if channels_last else shape

    def back(array: np.ndarray) -> np.ndarray:
        return array.transpose(0, 3, 1, 2) if channels_last else array

    def address(array: np.ndarray | None) -> int | None:
        return None if array is None else array.ctypes.data

    def forth(array: np.ndarray) -> np.ndarray:
        return array.transpose(0, 2, 3, 1) if channels_last else array

    operands = call._replace(input=forth(call.input), grad_output=forth(call.grad_output))
    operands = operands.map(guarded.copy)
    output = guarded.array(images(problem.output_shape), dtype)
    grads = [
        guarded.array(images(problem.input_shape), dtype),
        guarded.array(problem.offset_shape, dtype),
        guarded.array(problem.weight_shape, dtype),
        guarded.array(problem.bias_shape, dtype) if problem.has_bias else None,
        guarded.array(problem.mask_shape, dtype) if problem.has_mask else None,
    ]
    input, offset, weight, bias, mask, grad_output = map(address, operands[:6])
    cpu.forward(problem, input, offset, weight, bias, mask, address(output))
    cpu.backward(problem, grad_output, input, offset, weight, mask, list(map(address, grads)))
    results = (back(output), back(grads[0]), *grads[1:])
    return {n: a if a is None else a.copy() for n, a in zip(testing.OUTPUTS, results, strict=True)}


def touch_a_guard(flush: str) -> None:
    """One element too far, which has to end the process."""
    array = Guarded(flush).array((4096,), np.dtype("float32"))
    at = array.ctypes.data + (-4 if flush == "begin" else array.nbytes)
    ctypes.c_float.from_address(at).value = 1.0
