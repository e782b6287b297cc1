"""Exact memory of one call: how far the process grows above what it held before (Linux only).

`ru_maxrss`, which asv's peakmem_ reads, counts interpreter, imports and set-up, tens of megabytes
that hide a megabyte. Here the kernel's high-water mark is reset just before the call.

Linux counts pages per core and adds them up 32 at a time, so that a reading of the mark is off by
some 100 kB. Therefore the call stays on one core and is read several times with a few pages more
in use, of which the largest reading counts; and a block of known size, read in the same way, tells
what is missing still. What is left is an error of 16 kB; less than 128 kB reads as up to 128 kB.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

#: The C library maps every block of a page or more by itself and gives it back at once: each call
#: shows its workspace, whatever ran before.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": (-3, 4096), "MALLOC_TRIM_THRESHOLD_": (-1, 4096)}
_PAGE = 4096
_BATCH = 32
_KNOWN = 256 * _PAGE


@cache
def why_not() -> str | None:
    """The reason why memory cannot be measured here, None if it can."""
    if not Path("/proc/self/clear_refs").exists():
        return "memory: needs /proc/self/clear_refs of Linux"
    return None


@cache
def settle() -> None:
    """Once in a process, early: small pages only, the C library's allocator as above, and no
    workspace that dcnlib keeps between calls."""
    libc = ctypes.CDLL(None)
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page counts 2 MB for one byte
    if hasattr(libc, "mallopt"):
        for option, value in _ALLOCATOR.values():
            libc.mallopt(option, value)
    core = importlib.import_module("dcnlib.backends.cpu")._core
    if hasattr(core, "keep_workspace"):  # not in older commits
        core.keep_workspace(0)


def extra_bytes(call: Callable[[], object], readings: int = 8) -> int:
    """Bytes that `call` adds to the resident memory at its peak, its result included."""
    settle()
    with _one_core():
        missing = _KNOWN - _largest(lambda: np.ones(_KNOWN, np.uint8), readings)
        return max(0, _largest(call, readings) + missing)


def _largest(call: Callable[[], object], readings: int) -> int:
    largest = 0
    for reading in range(readings):
        shift = np.ones(max(1, reading * _BATCH // readings) * _PAGE, np.uint8)
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to the present
        before = resident()
        call()
        del shift  # with the result gone too, the mark is above what is in use, and is what is read
        largest = max(largest, _status("VmHWM") - before)
    return largest


def resident() -> int:
    """Bytes of this process that are in memory."""
    return _status("VmRSS")


@contextmanager
def _one_core() -> Iterator[None]:
    """The calling thread stays where it is: the pages of other cores would be counted late."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"memory: /proc/self/status has no {field}")
