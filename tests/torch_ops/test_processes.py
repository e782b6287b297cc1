"""Several processes and threads: DDP over gloo, DataLoader workers, the number of threads."""

import importlib

import pytest

torch = pytest.importorskip("torch")

import dcnlib  # noqa: E402
import isolated  # noqa: E402
from dcnlib import _config, testing  # noqa: E402
from dcnlib.testing import Geometry  # noqa: E402

TRAIN = """
import sys, torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from dcnlib.nn import DeformConv2dPack, ModulatedDeformConv2dPack

def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        ModulatedDeformConv2dPack(2, 4, 3, padding=1, deform_groups=2),
        nn.ReLU(),
        DeformConv2dPack(4, 3, 3, padding=1),
    ).double()
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.conv_offset.weight, std=0.3)
    return net

def train(net, x, y):
    optimiser = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(3):
        optimiser.zero_grad()
        (net(x) - y).square().mean().backward()
        optimiser.step()

torch.manual_seed(1)
x, y = torch.randn(4, 2, 6, 7).double(), torch.randn(4, 3, 6, 7).double()
rank, path = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
net = network()
train(DistributedDataParallel(net), x[rank::2], y[rank::2])
expected = network()
train(expected, x, y)
for mine, theirs in zip(net.parameters(), expected.parameters()):
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
distributed.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path):
    """Two processes with half of the batch each end where one process with all of it does."""
    from concurrent.futures import ThreadPoolExecutor

    def process(rank):
        return isolated.python(
            TRAIN, str(rank), str(tmp_path / "store"), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"
        )

    with ThreadPoolExecutor(2) as pool:
        for child in pool.map(process, range(2)):
            assert child.returncode == 0, child.stderr


WORKERS = """
import sys, torch, dcnlib
from torch.utils.data import DataLoader, Dataset

class Warped(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        offset = torch.full((1, 2, 64, 64), index / 8, requires_grad=True)
        x = torch.arange(4096.0).reshape(1, 1, 64, 64)
        y = dcnlib.deform_conv2d(x, offset, torch.ones(1, 1, 1, 1))
        y.sum().backward()
        return y.detach(), offset.grad

if __name__ == "__main__":
    dcnlib.set_num_threads(2)
    torch.set_num_threads(2)
    big = torch.ones(1, 16, 64, 64)
    dcnlib.deform_conv2d(big, torch.zeros(1, 18, 64, 64), torch.ones(16, 16, 3, 3), padding=1)
    expected = [Warped()[i] for i in range(8)]
    loader = DataLoader(
        Warped(), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1], timeout=60
    )
    for found, want in zip(loader, expected, strict=True):
        assert all(map(torch.equal, found, want))
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_data_loader_workers(method, tmp_path):
    """Workers of a process that has used a team of threads, started in every way."""
    import subprocess
    import sys

    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    child = subprocess.run(
        [sys.executable, str(script), method],
        env=isolated.environment(PYTHONWARNINGS="ignore::DeprecationWarning"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0 and child.stdout.strip() == "done", child.stderr


@pytest.fixture
def asked(monkeypatch):
    """The numbers of threads that the CPU backend is called with."""
    cpu = importlib.import_module("dcnlib.backends.cpu")
    numbers = []
    for name in ("forward", "backward"):
        function = getattr(cpu, name)

        def spy(*operands, function=function, num_threads=None):
            numbers.append(num_threads)
            return function(*operands, num_threads=num_threads)

        monkeypatch.setattr(cpu, name, spy)
    monkeypatch.setattr(_config, "_explicit_threads", None)
    monkeypatch.setattr(_config, "_ENVIRONMENT_THREADS", None)
    before = torch.get_num_threads()
    yield numbers
    torch.set_num_threads(before)


def test_number_of_threads(asked):
    """dcnlib's setting, else the environment's, else torch's own, at the time of the call."""
    call = testing.real(Geometry(1, 2, 5, 6, 3, (2, 2)), 0).to_torch()
    for setting in (1, 3, 2):
        torch.set_num_threads(setting)
        asked.clear()
        call.run()
        assert asked == [setting, setting]
    dcnlib.set_num_threads(5)
    asked.clear()
    call.run()
    assert asked == [5, 5]
    asked.clear()
    output = call.map(lambda t: t.requires_grad_()).forward()
    torch.set_num_threads(1)
    output.sum().backward()
    assert asked == [5, 5]


def test_number_of_threads_from_the_environment(asked, monkeypatch):
    monkeypatch.setattr(_config, "_ENVIRONMENT_THREADS", 4)
    torch.set_num_threads(1)
    testing.real(Geometry(1, 2, 5, 6, 3, (2, 2)), 0).to_torch().run()
    assert asked == [4, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_depends_on_the_threads(dtype):
    call = testing.real(Geometry(3, 24, 40, 41, 16, (3, 3), (1, 1), (1,) * 4), 0).to_torch()
    call = call.map(lambda t: t.to(getattr(torch, dtype)))
    before, results = torch.get_num_threads(), []
    try:
        for setting in (1, 2, 3, 8):
            torch.set_num_threads(setting)
            results.append(call.run())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result.values(), results[0].values()))
