"""What is installed, what runs, on what, and why not: `show_config`, `python -m dcnlib info`.

`collect` gathers it into a dict that JSON can hold, `text` lays it out; neither imports torch.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from . import _config
from ._dispatch import backends
from ._version import __version__
from .backends.cpu import _core

_PACKAGES = ("numpy", "torch", "ml_dtypes")
#: What decides the number of threads where no setting does: a parent that had imported dcnlib, and
#: the core's own limit.
_FORKED, _MOST = "a fork", "dcnlib's limit"
#: File names of the OpenMP runtimes of GCC, LLVM and Intel, as they appear among mapped libraries.
_RUNTIME = re.compile(r"/lib(?:gomp|omp|iomp5)(?:-\w+)?\.(?:so[.\d]*|dylib)$")


def show_config() -> None:
    """Print versions, backends and what keeps them from running, instruction sets and threads.

    The same as ``python -m dcnlib info``.

    Examples
    --------
    >>> import dcnlib
    >>> dcnlib.show_config()  # doctest: +ELLIPSIS
    dcnlib ...
    """
    print(text(collect()))


def collect() -> dict[str, Any]:
    """Everything that `text` shows, with the advice as a list of sentences."""
    threads, decided_by = _threads()
    report: dict[str, Any] = {
        "dcnlib": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "backends": {name: status._asdict() for name, status in backends().items()},
        "isa": {
            "used": _core.isa(),
            "usable": _core.usable(),
            "built": _core.built(),
            "limit": os.environ.get("DCNLIB_CPU_ISA") or None,
        },
        "threads": {
            "used": threads,
            "decided_by": decided_by,
            "usable_cores": _config.usable_cores(),
        },
        "openmp": {"built": _core.openmp(), "runtimes": openmp_runtimes()},
        "cuda": _cuda(),
    }
    report["advice"] = _advice(report)
    return report


def text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    isa, threads, openmp = report["isa"], report["threads"], report["openmp"]
    cuda = report["cuda"]
    versions = [f"{name} {version or '-'}" for name, version in report["packages"].items()]
    lines = [
        f"dcnlib {report['dcnlib']}, Python {report['python']}, {', '.join(versions)}",
        f"{report['system']}, {report['cpu']}",
        "",
        "backends",
        *(
            f"  {name:<10} {'runs' if status['available'] else 'does not run: ' + status['reason']}"
            for name, status in report["backends"].items()
        ),
        "",
        "CPU instruction sets",
        f"  {'used':<10} {isa['used']}",
        f"  {'usable':<10} {', '.join(isa['usable'])}",
        f"  {'built':<10} {', '.join(isa['built'])}"
        + ("" if "scalar" in isa["built"] else " (a release: scalar is left out)"),
        "",
        "threads",
        f"  {'used':<10} {threads['used']} ({threads['decided_by']})",
        f"  {'cores':<10} {threads['usable_cores']} usable",
        f"  {'OpenMP':<10} {', '.join(openmp['runtimes']) or 'none loaded'}",
        "",
        "CUDA",
        f"  {'built for':<10} {cuda['architectures'] or '-'}",
        f"  {'devices':<10} {cuda['devices'] or 'none'}",
    ]
    if report["advice"]:
        lines += ["", "advice", *(f"  - {sentence}" for sentence in report["advice"])]
    return "\n".join(lines)


def summary() -> str:
    """One line for logs: version, instruction set, threads and processor."""
    threads, decided_by = _threads()
    team = f"{threads} {'thread' if threads == 1 else 'threads'} ({decided_by})"
    return f"dcnlib {__version__}: cpu backend, {_core.isa()}, {team}, {cpu_model()}"


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", name.replace("(R)", "").replace("(TM)", "")).strip()


def _has_matrix_unit() -> bool:
    """Whether the processor has AMX for bfloat16, as far as the system tells it."""
    try:
        found = re.search(r"^flags\s*:.*", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found is not None and {"amx_tile", "amx_bf16"} <= set(found[0].split())


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process; unknown, so none, where there is no /proc."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1].removesuffix(" (deleted)") for line in maps.splitlines()}
    return sorted(path for path in paths if _RUNTIME.search(path))


def _advice(report: dict[str, Any]) -> list[str]:
    """What to do about what is slow or missing, the most useful first."""
    isa, threads, openmp = report["isa"], report["threads"], report["openmp"]
    advice = []
    if not openmp["built"]:
        advice.append(
            "dcnlib was built without OpenMP and runs on one thread; "
            "install a compiler with OpenMP (GCC has it) and dcnlib again"
        )
    elif threads["decided_by"] == _FORKED:
        advice.append(
            "this process was forked from one that had imported dcnlib, and runs on one thread; "
            'start it in another way, such as multiprocessing\'s "spawn"'
        )
    elif threads["decided_by"] in ("OMP_THREAD_LIMIT", _MOST):
        advice.append(f"{threads['decided_by']} allows no more threads than {threads['used']}")
    elif threads["used"] < threads["usable_cores"]:
        advice.append(
            f"{threads['decided_by']} keeps dcnlib to {threads['used']} of "
            f"{threads['usable_cores']} cores; dcnlib.set_num_threads(n) overrides it"
        )
    if isa["used"] != isa["usable"][0]:
        advice.append(
            f"{isa['used']} is used where {isa['usable'][0]} would run"
            + (f" (DCNLIB_CPU_ISA={isa['limit']})" if isa["limit"] else "")
        )
    if isa["usable"][0] == "avx512" and "amx" in isa["built"] and _has_matrix_unit():
        advice.append(
            "amx does not run: the processor has the matrix unit, but the system keeps it from this "
            "process; Linux gives it from 5.16 on, unless a sandbox forbids arch_prctl"
        )
    if len(openmp["runtimes"]) > 1:
        advice.append(
            "more than one OpenMP runtime is loaded; their threads compete for the cores: "
            "install the packages that bring them from source, or set GOMP_SPINCOUNT=0"
        )
    if report["packages"]["torch"] is None:
        advice.append("for torch tensors: python -m pip install torch")
    if report["packages"]["ml_dtypes"] is None:
        advice.append("for bfloat16 in NumPy arrays: python -m pip install ml_dtypes")
    return advice


def _cuda() -> dict[str, str | None]:
    """Architectures that the CUDA part was compiled for, devices that it can use."""
    from .backends.cuda import _status

    core = _status.core(False)
    archs = None if isinstance(core, str) else core.archs()
    return {"architectures": archs, "devices": _status.describe() or None}


def _threads() -> tuple[int, str]:
    """The number of threads and what decided it; with torch imported, that of calls through it."""
    if not _core.openmp():
        return 1, "built without OpenMP"
    torch = sys.modules.get("torch")
    setting, by = _config.thread_setting(None if torch is None else torch.get_num_threads())
    used = _core.allowed(setting)
    if used == setting:
        return setting, by
    if _core.forked():
        return used, _FORKED
    return used, "OMP_THREAD_LIMIT" if os.environ.get("OMP_THREAD_LIMIT") else _MOST


def version_of(package: str) -> str | None:
    """The installed version, None without one; the package is not imported."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
