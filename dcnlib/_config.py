"""Threads and instruction set: the settings, the environment variables, and who wins.

The environment variables of the CPU are read here, once, at import.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from types import TracebackType

from ._problem import LARGEST, integer, value_error
from .backends.cpu import _core

#: Every instruction set that some build has, weakest first.
_ISAS = ("scalar", "baseline", "avx2", "avx512", "amx")

_explicit_threads: int | None = None


def set_num_threads(n: int) -> None:
    """Use at most `n` threads on the CPU from now on, whatever the environment says.

    Parameters
    ----------
    n : int
        At least 1. Small problems use fewer. No result depends on it.

    Raises
    ------
    TypeError
        If `n` is no integer.
    ValueError
        If it is below 1 or above 2147483647.

    Examples
    --------
    >>> import dcnlib
    >>> dcnlib.set_num_threads(2)
    >>> dcnlib.get_num_threads()
    2
    """
    global _explicit_threads
    _explicit_threads = integer("set_num_threads", "n", n, 1)


def get_num_threads() -> int:
    """How many threads a large NumPy call uses on the CPU.

    The first that is set of: `set_num_threads`, the environment variable ``DCNLIB_NUM_THREADS``,
    for calls through torch ``torch.set_num_threads``, ``OMP_NUM_THREADS``, the usable cores
    (affinity, limited by the quota of the control group).

    Examples
    --------
    >>> import dcnlib
    >>> dcnlib.get_num_threads() >= 1
    True
    """
    return num_threads()


def num_threads(torch_threads: int | None = None) -> int:
    """The number for one call; `torch_threads` is torch's setting if the call comes through it."""
    return thread_setting(torch_threads)[0]


def thread_setting(torch_threads: int | None = None) -> tuple[int, str]:
    """The number of threads and what decided it, for `dcnlib.show_config`."""
    if _explicit_threads is not None:
        return _explicit_threads, "dcnlib.set_num_threads"
    if _ENVIRONMENT_THREADS is not None:
        return _ENVIRONMENT_THREADS, "DCNLIB_NUM_THREADS"
    if torch_threads is not None:
        return torch_threads, "torch.set_num_threads"
    if _OMP_THREADS is not None:
        return _OMP_THREADS, "OMP_NUM_THREADS"
    return usable_cores(), "usable cores"


#: What was used before the first ``with cpu_isa(limit):`` block that is open, and the limits of all of
#: them, which several threads may enter and leave in any order: the last one counts.
_limits: list[str] = []
_limits_lock = threading.Lock()


class CpuIsa(str):
    """The name of an instruction set; as a context manager it limits the CPU kernels to it."""

    def __enter__(self) -> CpuIsa:
        with _limits_lock:
            if not _limits:
                _limits.append(_core.isa())
            _limits.append(self)
            _core.use(_best(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _limits_lock:
            del _limits[max(i for i, limit in enumerate(_limits) if limit is self)]
            _core.use(_best(_limits[-1]))
            if len(_limits) == 1:
                _limits.clear()


def cpu_isa(limit: str | None = None) -> CpuIsa:
    """The instruction set of the CPU kernels; ``with cpu_isa(limit):`` keeps them to `limit`.

    Parameters
    ----------
    limit : {"amx", "avx512", "avx2", "baseline", "scalar"}, optional
        In a ``with`` block, for all threads: the best one to use; this processor's best if that
        is less. "amx" is "avx512" with the products of float32 and the 16-bit types on the
        processor's matrix unit, at float32's accuracy. "baseline" is SSE2 on x86-64 and NEON on
        AArch64. "scalar" takes one number at a time; release wheels come without it and take
        "baseline". The environment variable ``DCNLIB_CPU_ISA`` does the same for a whole process.

    Returns
    -------
    CpuIsa
        A str: the instruction set in use, or `limit`, to be entered.

    Raises
    ------
    ValueError
        If there is no instruction set of that name.

    Notes
    -----
    Results of different instruction sets agree within the documented accuracy, not to the last bit.

    Examples
    --------
    >>> import dcnlib
    >>> with dcnlib.cpu_isa("baseline"):
    ...     dcnlib.cpu_isa()
    'baseline'
    """
    if limit is None:
        return CpuIsa(_core.isa())
    if limit not in _ISAS:
        raise value_error(
            "cpu_isa", "limit", "unknown instruction set", ", ".join(_ISAS), repr(limit)
        )
    return CpuIsa(limit)


def _best(limit: str) -> str:
    """The best usable instruction set that is not above `limit`; the least if all are."""
    highest = _ISAS.index(limit)
    usable = _core.usable()
    return next((isa for isa in usable if _ISAS.index(isa) <= highest), usable[-1])


@cache
def usable_cores() -> int:
    """Cores that this process may use: its affinity, and no more than its quota of time."""
    try:
        # The process's, whichever of its threads asks; OpenMP may have bound that one to a core.
        cores = max(len(os.sched_getaffinity(os.getpid())), _core.cores())
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _quota(system: Path = Path("/")) -> float | None:
    """The least limit in cores of the process's control groups, None where there is none."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):  # no such file; no text
        lines = []
    limits = []
    for line in lines or ["0::/", "1:cpu:/"]:
        controllers, _, group = line.partition(":")[2].partition(":")
        if not controllers:  # version 2
            root, files = system / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, files = system / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        # In a container it may be the root itself that is there.
        innermost = root / group.lstrip("/")
        for folder in (innermost, *innermost.parents[: len(innermost.parts) - len(root.parts)]):
            try:
                quota, period = " ".join((folder / name).read_text() for name in files).split()
                limits.append(int(quota) / int(period))
            except (OSError, ValueError, ZeroDivisionError):  # no such group; "max"
                continue
    return min((limit for limit in limits if limit > 0), default=None)


def _environment_threads() -> int | None:
    text = os.environ.get("DCNLIB_NUM_THREADS", "").strip()
    if not text:
        return None
    try:
        return integer("dcnlib", "DCNLIB_NUM_THREADS", int(text), 1)
    except ValueError:
        raise value_error(
            "dcnlib", "DCNLIB_NUM_THREADS", "must be a number of threads", "1 or more", repr(text)
        ) from None


def _omp_threads() -> int | None:
    """OMP_NUM_THREADS may be a list, a number for each nesting level; OpenMP reports errors."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and 0 < int(first) <= LARGEST else None


_ENVIRONMENT_THREADS = _environment_threads()
_OMP_THREADS = _omp_threads()

if _limit := os.environ.get("DCNLIB_CPU_ISA", "").strip().lower():
    if _limit not in _ISAS:
        raise value_error(
            "dcnlib", "DCNLIB_CPU_ISA", "unknown instruction set", ", ".join(_ISAS), repr(_limit)
        )
    _core.use(_best(_limit))
