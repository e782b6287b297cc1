"""The settings of the CUDA backend: from the environment at import, later by `settings`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..._problem import integer, value_error

_MIB = 1 << 20


class Settings(NamedTuple):
    """What can be chosen; no choice but `samples` changes more than the last bits of a result.

    Attributes
    ----------
    workspace : int
        Bytes of temporary memory that a call tries to stay within (``DCNLIB_CUDA_WORKSPACE``, in
        MiB, default 64). Two things may exceed it: a single output pixel's columns, and the float32
        sum of a 16-bit input gradient of one image.
    kernels : {"auto", "planar", "rows"}
        ``DCNLIB_CUDA_KERNELS``: "planar" takes one value at a time, "rows" 16 bytes of channels
        where the call allows it; "auto" is "rows".
    samples : {"exact", "rounded"}
        ``DCNLIB_CUDA_SAMPLES``: how float16 and bfloat16 samples enter the matrix products. "exact"
        as the sum of two 16-bit numbers, which keeps the documented accuracy; "rounded" as one,
        which halves that work and adds the rounding of each sample to the error.
    blocks : int
        The most blocks of a launch; 0 is 16 for each multiprocessor.
    emulate : bool
        ``DCNLIB_CUDA_EMULATE=1``: run the kernels' emulation on CPU tensors (tests only).
    """

    workspace: int = 64 * _MIB
    kernels: str = "auto"
    samples: str = "exact"
    blocks: int = 0
    emulate: bool = False


def current() -> Settings:
    """The settings of calls that start now."""
    return _current


@contextmanager
def settings(**changes: object) -> Iterator[Settings]:
    """In a ``with`` block, for all threads: these attributes of `Settings` instead of the current ones.

    Examples
    --------
    >>> from dcnlib.backends import cuda
    >>> with cuda.settings(workspace=32 << 20) as changed:
    ...     changed.workspace
    33554432
    """
    global _current
    outer, _current = _current, _checked(_current._replace(**changes))
    try:
        yield _current
    finally:
        _current = outer


def _checked(chosen: Settings) -> Settings:
    integer("dcnlib.backends.cuda", "blocks", chosen.blocks, 0)
    if not isinstance(chosen.workspace, int) or chosen.workspace < 0:
        raise value_error(
            "dcnlib.backends.cuda", "workspace", "must be bytes", "0 or more", chosen.workspace
        )
    for name, known in (("kernels", ("auto", "planar", "rows")), ("samples", ("exact", "rounded"))):
        if getattr(chosen, name) not in known:
            raise value_error(
                "dcnlib.backends.cuda", name, "unknown", ", ".join(known), getattr(chosen, name)
            )
    return chosen


def _from_environment() -> Settings:
    def text(name: str, default: str) -> str:
        return os.environ.get(f"DCNLIB_CUDA_{name}", "").strip() or default

    workspace = text("WORKSPACE", "64")
    if not workspace.isdecimal():
        raise value_error(
            "dcnlib", "DCNLIB_CUDA_WORKSPACE", "must be a number of MiB", "0 or more", workspace
        )
    return _checked(
        Settings(
            int(workspace) * _MIB,
            text("KERNELS", "auto"),
            text("SAMPLES", "exact"),
            emulate=text("EMULATE", "0") == "1",
        )
    )


_current = _from_environment()
