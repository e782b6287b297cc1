"""The CUDA backend on the CPU: its emulation, built once a session, and calls that run through it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dcnlib import testing  # noqa: E402
from dcnlib.backends import cuda  # noqa: E402
from dcnlib.testing import Call  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import emulate  # noqa: E402

#: What decides which emulated thread runs next, by the numbers of emulation.cpp.
SCHEDULES = {"round": 0, "up": 1, "down": 2, "random": 3, "preempt": 4}


class Emulation:
    """Runs calls through the emulated backend."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.dcn_emulation_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.schedule("round")

    def schedule(self, name: str, seed: int = 0) -> None:
        self.library.dcn_emulation_schedule(SCHEDULES[name], seed)

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
            name: None if t is None else t.double().numpy()
            for name, t in zip(testing.OUTPUTS, results, strict=True)
        }

    def _tensor(self, array: np.ndarray | None, dtype: str):
        return None if array is None else torch.from_numpy(array).to(getattr(torch, dtype))

    def _result(self, shape, like, channels_last: bool):
        result = torch.full(tuple(shape), float("nan"), dtype=like.dtype)
        return result.contiguous(memory_format=torch.channels_last) if channels_last else result


@pytest.fixture(scope="session")
def emulation_path() -> Path:
    """The compiled emulation, in its default place."""
    return emulate.module(emulate.default_target())


@pytest.fixture
def emulation(emulation_path: Path) -> Iterator[Emulation]:
    """The backend runs its emulation; every test begins with the plainest schedule."""
    with cuda.settings(emulate=True):
        assert cuda.why_not("cpu") is None
        yield Emulation(emulation_path)
