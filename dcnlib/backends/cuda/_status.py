"""Finds the compiled part and says what there is to run on, or why nothing runs.

The module holds machine code for several architectures and the CUDA runtime; it loads without a
driver. The driver is asked when somebody asks here, never at import.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

_NOTE = Path(__file__).with_name("not_built.txt")
_CPU = "move the tensors to the CPU with .cpu() and dcnlib runs there"
#: cudaErrorInsufficientDriver and cudaErrorNoDevice, as counting the devices reports them.
_INSUFFICIENT_DRIVER, _NO_DEVICE = 35, 100


@cache
def core(emulate: bool) -> ModuleType | str:
    """The compiled module, or the reason why there is none."""
    if emulate:
        path = Path(__file__).with_name("_emulated.so")
        if not path.exists():
            return "DCNLIB_CUDA_EMULATE=1, but there is no emulation; run tests/cuda/emulation/emulate.py"
        loader = importlib.machinery.ExtensionFileLoader(f"{__package__}._core", str(path))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module
    try:
        from . import _core
    except ImportError as error:
        if importlib.util.find_spec(f"{__package__}._core") is None:
            return _not_built()
        return f"the CUDA part does not load: {error}"
    return _core


@cache
def why_no_device() -> str | None:
    """Why the compiled module finds no GPU that it can use, None if it does."""
    module = core(False)
    if isinstance(module, str):
        return f"{module}; {_CPU}"
    reason = explain(*module.state(), module.error_text)
    if reason is None:
        archs = module.archs()
        devices = [module.device(index) for index in range(module.state()[3])]
        if any(has_code(archs, major, minor) for _, major, minor, _, _ in devices):
            return None
        reason = no_code(archs, devices)
    return f"{reason}; {_CPU}"


def explain(error: int, driver: int, runtime: int, devices: int, text) -> str | None:
    """What `state` of the compiled module means, None if there are devices."""
    if error == _INSUFFICIENT_DRIVER and driver == 0:
        return "there is no NVIDIA driver on this machine"
    if error == _INSUFFICIENT_DRIVER:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)} and dcnlib was "
            f"built with CUDA {_version(runtime)}; update the driver, or build dcnlib with an older toolkit"
        )
    if error == _NO_DEVICE or (error == 0 and devices == 0):
        return "there is an NVIDIA driver, but no device that this process may use (CUDA_VISIBLE_DEVICES?)"
    if error:
        return f"the NVIDIA driver does not start: {text(error)} (error {error})"
    return None


def has_code(archs: str, major: int, minor: int) -> bool:
    """Whether a build for `archs` ("75 80 90+ptx") has code for a device of this capability.

    Machine code runs on its own major version from its own minor version on, PTX on everything that is
    not older.
    """
    for arch in archs.split():
        number, _, ptx = arch.partition("+")
        built = (int(number[:-1]), int(number[-1]))
        if ptx and (major, minor) >= built:
            return True
        if not ptx and major == built[0] and minor >= built[1]:
            return True
    return False


def no_code(archs: str, devices: list) -> str:
    """The reason when no device can run what was built."""
    found = ", ".join(
        f"{name} (capability {major}.{minor})" for name, major, minor, _, _ in devices
    )
    wanted = " ".join(f"{major}{minor}" for _, major, minor, _, _ in devices)
    return (
        f"there is no kernel image for {found}: this build has {archs}; "
        f'build dcnlib with DCNLIB_CUDA_ARCHS="{wanted}"'
    )


def describe() -> str:
    """The devices, for people."""
    module = core(False)
    if isinstance(module, str) or why_no_device():
        return ""
    lines = []
    for index in range(module.state()[3]):
        name, major, minor, processors, memory = module.device(index)
        lines.append(
            f"{name}, capability {major}.{minor}, {processors} multiprocessors, "
            f"{memory / 2**30:.0f} GiB"
        )
    return "; ".join(lines)


def _not_built() -> str:
    """Why setup.py left the compiled part out, as it noted then."""
    try:
        reason = _NOTE.read_text().strip()
    except OSError:
        reason = "no reason was noted"
    return f"this dcnlib was built without its CUDA part: {reason}"


def _version(number: int) -> str:
    return re.sub(r"^(\d+?)0?(\d)0$", r"\1.\2", str(number)) if number else "none"
