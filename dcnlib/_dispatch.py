"""Which backend runs a call, and why the others do not: the only place that decides it."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import NamedTuple

from . import backends as _package  # noqa: F401  (bound before the function of that name)
from ._problem import type_error, value_error

_NAMES = ("cpu", "cuda", "reference")
_FOR_DEVICE = {"cpu": "cpu", "cuda": "cuda"}
#: What each backend computes on when it can choose.
_HOME = {"cpu": "cpu", "cuda": "cuda", "reference": "cpu"}


class BackendStatus(NamedTuple):
    """Whether a backend can run, and if not why not and what to do."""

    available: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Every backend's name with its status on this machine.

    Returns
    -------
    dict of str to BackendStatus
        ``(available, reason)``; the reason of an available backend says what it runs on.

    Examples
    --------
    >>> import dcnlib
    >>> dcnlib.backends()["reference"].available
    True
    """
    status = {}
    for name in _NAMES:
        reason = _load(name).why_not(_HOME[name])
        status[name] = BackendStatus(reason is None, reason or "ready")
    return status


def choose(op: str, backend: str | None, device: str) -> ModuleType:
    """The backend module for tensors on `device` ("cpu", "cuda"); `backend` forces one by name.

    An explicit request never falls back: if it declines, the error carries its reason.
    """
    check_name(op, backend)
    if backend is None:
        backend = _FOR_DEVICE.get(device)
        if backend is None:
            raise value_error(op, "input", "no backend for this device", "cpu or cuda", device)
    module = _load(backend)
    reason = module.why_not(device)
    if reason is not None:
        raise RuntimeError(f"{op}: backend: {backend!r} cannot run on {device}: {reason}")
    return module


def check_name(op: str, backend: str | None) -> None:
    """`backend` is None or a backend's name, whether that can run or not."""
    if backend is None or (isinstance(backend, str) and backend in _NAMES):
        return
    if not isinstance(backend, str):
        raise type_error(
            op, "backend", "must be a name or None", ", ".join(_NAMES), type(backend).__name__
        )
    raise value_error(op, "backend", "unknown name", ", ".join(_NAMES), repr(backend))


@cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f".backends.{name}", __package__)
