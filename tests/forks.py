"""What `test_fork.py` runs in processes of its own: a parent with a past forks, the child computes.

`isolated.py` calls the functions here. Importing this file does not import dcnlib: a child may be
the first to do so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from functools import cache

import numpy as np

SECONDS = 5
FORKS = 20


@cache
def call():
    """Enough work for a team, and quick."""
    from dcnlib import testing

    geometry = testing.Geometry(1, 32, 40, 40, 32, (3, 3), padding=(1, 1, 1, 1))
    return testing.real(geometry, 0).astype("float32")


def results() -> bytes:
    """The bytes of all results of `call` from the CPU backend."""
    return b"".join(array.tobytes() for array in call().run("cpu").values())


@cache
def expected() -> bytes:
    """The same bytes, by one thread: this process has opened no team for them."""
    import dcnlib

    before = dcnlib.get_num_threads()
    dcnlib.set_num_threads(1)
    try:
        return results()
    finally:
        dcnlib.set_num_threads(before)


def use_dcnlib() -> None:
    assert results() == expected()


def use_torch() -> None:
    import torch

    torch.set_num_threads(4)
    image = torch.ones(1, 16, 128, 128)
    torch.nn.functional.conv2d(image, torch.ones(16, 16, 3, 3))
    torch.ones(4_000_000).add_(1).sum()


def use_both() -> None:
    use_torch()
    use_dcnlib()


PASTS = {"none": lambda: None, "dcnlib": use_dcnlib, "torch": use_torch, "both": use_both}


def scenario(case: tuple[str, str]) -> list[str]:
    """Fork behind that past, in the main thread or another: how each of the children ended."""
    import dcnlib

    past, where = case
    dcnlib.set_num_threads(4)
    expected()
    endings: list[str] = []

    def work() -> None:
        PASTS[past]()
        endings.extend(_fork() for _ in range(FORKS))
        PASTS[past]()  # and the parent goes on as before

    if where == "main":
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    return endings


def _fork() -> str:
    """Fork a child that computes twice and forks a grandchild that does; how it ended."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        right = results() == expected() and results() == expected()
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if results() == expected() else 1)
        _, status = os.waitpid(grandchild, 0)
        os._exit(0 if right and status == 0 else 1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        ended = signal.Signals(os.WTERMSIG(status))
        return "hangs" if ended == signal.SIGALRM else ended.name
    return "right" if os.WEXITSTATUS(status) == 0 else "wrong"


def imported_in_the_child(past: str) -> list[str]:
    """Fork children that import dcnlib themselves, which this process must not have done."""
    if past == "torch":
        use_torch()
    return [_fork_and_import() for _ in range(FORKS // 2)]


def _fork_and_import() -> str:
    child = os.fork()
    if child == 0:
        signal.alarm(4 * SECONDS)  # imports take their time
        import dcnlib

        dcnlib.set_num_threads(4)
        os._exit(0 if results() == expected() else 1)
    _, status = os.waitpid(child, 0)
    return "right" if status == 0 else f"status {status}"


def _work(seed: int) -> bytes:
    return results() if seed >= 0 else b""


def pool(method: str) -> str:
    """A pool of two workers, in a process that has used dcnlib."""
    import dcnlib

    dcnlib.set_num_threads(4)
    use_dcnlib()
    context = multiprocessing.get_context(method)
    with context.Pool(2) as workers:
        answers = workers.map_async(_work, range(8)).get(60)
    return "right" if set(answers) == {expected()} else "wrong"


class Images:
    """A dataset whose items are made by dcnlib, through NumPy and through torch."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        import torch

        arrays = call()._replace(grad_output=None)
        by_numpy = arrays.forward()
        by_torch = arrays.map(torch.from_numpy).forward()
        assert np.array_equal(by_torch.numpy(), by_numpy)
        return by_torch[0]


def loader(case: tuple[str, int]) -> str:
    """A DataLoader behind a past of both."""
    import torch

    import dcnlib

    method, workers = case
    dcnlib.set_num_threads(4)
    use_both()
    started = time.monotonic()
    batches = torch.utils.data.DataLoader(
        Images(), batch_size=3, num_workers=workers, multiprocessing_context=method, timeout=60
    )
    want = torch.from_numpy(call().forward("cpu"))[0]
    right = [bool((image == want).all()) for batch in batches for image in batch]
    assert time.monotonic() - started < 60
    return "right" if right == [True] * 12 else "wrong"
