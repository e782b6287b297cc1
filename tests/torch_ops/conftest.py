"""Under all tests of the torch door: memory for results comes filled with NaN."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def poisoned_tensors():
    """Kernels have to write all of their output."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    from dcnlib.torch_ops import schemas

    new_like = schemas.new_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            schemas, "new_like", lambda *args, **kw: new_like(*args, **kw).fill_(float("nan"))
        )
        yield
