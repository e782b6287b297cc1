"""What every test runs under: uninitialised memory of dcnlib comes filled with NaN."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest


class Poisoned(ModuleType):
    """NumPy as dcnlib sees it in tests: `empty` is never zero by luck."""

    def __init__(self):
        super().__init__("numpy")

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(*arguments, **keywords):
        array = np.empty(*arguments, **keywords)
        array.view(np.uint8).fill(0xFF)  # a NaN in every float, -1 in every integer
        return array

    @staticmethod
    def empty_like(*arguments, **keywords):
        array = np.empty_like(*arguments, **keywords)
        array.view(np.uint8).fill(0xFF)
        return array


@pytest.fixture(scope="session", autouse=True)
def poison():
    """Kernels have to write all of their output."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("functional", "pooling", "resample", "backends.cpu"):
            module = importlib.import_module(f"dcnlib.{name}")
            if getattr(module, "np", None) is np:
                patch.setattr(module, "np", Poisoned())
        yield
