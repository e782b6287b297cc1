"""Calls through the CUDA backend: on the CPU by its emulation, built once a session, or on a GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dcnlib import testing
from dcnlib.backends import cuda
from dcnlib.testing import Call

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import emulate

#: What decides which emulated thread runs next, by the numbers of emulation.cpp.
SCHEDULES = {"round": 0, "up": 1, "down": 2, "random": 3, "preempt": 4}


class Runner:
    """Runs calls through the backend, with tensors on one device."""

    def __init__(self, device: str) -> None:
        self.torch = pytest.importorskip("torch")
        self.device = device

    def run(
        self,
        call: Call,
        dtype: str,
        *,
        channels_last: bool = False,
        deterministic: bool = False,
        wanted: tuple[bool, ...] = (True,) * 5,
        **settings: object,
    ) -> dict[str, np.ndarray | None]:
        """What `Call.run` gives, rounded to `dtype` and widened to float64.

        Results start as NaN and are all written, operands stay as they are; both are checked.
        """
        torch = self.torch
        operands = [self._tensor(array, dtype) for array in call[:6]]
        problem = call.astype(dtype).problem()._replace(channels_last=channels_last)
        if channels_last:
            for index in (0, 5):
                operands[index] = operands[index].contiguous(memory_format=torch.channels_last)
        before = [None if t is None else t.clone() for t in operands]
        input, offset, weight, bias, mask, grad_output = operands
        output = self._result(problem.output_shape, input, channels_last)
        wanted = (*wanted[:3], wanted[3] and bias is not None, wanted[4] and mask is not None)
        like = (input, offset, weight, bias, mask)
        grads = [
            self._result(t.shape, t, channels_last and index == 0) if is_wanted else None
            for index, (t, is_wanted) in enumerate(zip(like, wanted, strict=True))
        ]
        before_mode = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(deterministic)
        try:
            with cuda.settings(**settings):
                cuda.forward(problem, input, offset, weight, bias, mask, output)
                cuda.backward(problem, grad_output, input, offset, weight, mask, grads)
        finally:
            torch.use_deterministic_algorithms(before_mode)
        for tensor, old in zip(operands, before, strict=True):
            assert tensor is None or torch.allclose(tensor, old, 0, 0, equal_nan=True), "changed"
        results = (output, *grads)
        return {
            name: None if t is None else t.double().cpu().numpy()
            for name, t in zip(testing.OUTPUTS, results, strict=True)
        }

    def _tensor(self, array: np.ndarray | None, dtype: str):
        if array is None:
            return None
        return self.torch.from_numpy(array).to(self.device, getattr(self.torch, dtype))

    def _result(self, shape, like, channels_last: bool):
        result = like.new_full(tuple(shape), float("nan"))
        layout = self.torch.channels_last if channels_last else self.torch.contiguous_format
        return result.contiguous(memory_format=layout)


class Emulation(Runner):
    """The emulated backend, and which of its threads go first."""

    def __init__(self, path: Path) -> None:
        super().__init__("cpu")
        self.library = ctypes.CDLL(str(path))
        self.library.dcn_emulation_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.library.dcn_emulation_launches.restype = ctypes.c_char_p
        self.schedule("round")

    def schedule(self, name: str, seed: int = 0) -> None:
        self.library.dcn_emulation_schedule(SCHEDULES[name], seed)

    def launches(self) -> str:
        """The kernels since this was last asked, devices and streams, and the current device."""
        return self.library.dcn_emulation_launches().decode()


@pytest.fixture(scope="session")
def emulation_path() -> Path:
    """The compiled emulation, in its default place."""
    pytest.importorskip("Cython", reason="building the emulation's module needs Cython")
    return emulate.module(emulate.default_target())


@pytest.fixture
def emulation(emulation_path: Path) -> Iterator[Emulation]:
    """The backend runs its emulation; every test begins with the plainest schedule."""
    with cuda.settings(emulate=True):
        assert cuda.why_not("cpu") is None
        yield Emulation(emulation_path)


@pytest.fixture
def on_gpu() -> Runner:
    """Calls on the first GPU; only for tests that are skipped where there is none."""
    return Runner("cuda")
