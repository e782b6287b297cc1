"""The networks of the examples: small ones that find coins in a photograph and tell their sizes.

Each unit says whether it lies on a coin, and how large that coin is. In the middle of a coin this takes
a look at its rim, which is further away for larger coins: a task for taps that move. The training data
are turned, scaled and mirrored pieces of one photograph, so the networks know these 24 coins and no
others; that is enough to see how they look at them.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dcnlib
from common import photograph
from dcnlib.nn import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack

PIXEL = 4  # of the photograph, along the side of a unit
CHANNELS, PIECE, BATCH, RATE = 16, 48, 2, 8e-3

#: (row, column, radius) of every coin in pixels of the photograph, measured on it.
COINS = np.array(
    [
        (44, 335, 29), (51, 155, 23), (51, 215, 23), (52, 276, 20), (54, 44, 21), (56, 100, 19),
        (119, 271, 25), (124, 45, 20), (124, 205, 20), (125, 336, 19), (126, 102, 19), (127, 154, 19),
        (187, 347, 32), (193, 212, 24), (194, 274, 22), (196, 102, 22), (197, 44, 19), (198, 154, 19),
        (260, 46, 28), (261, 172, 27), (263, 244, 24), (263, 301, 25), (266, 114, 21), (268, 358, 22),
    ],
    float,
)  # fmt: skip


class Plain(DeformConv2d):
    """An ordinary convolution, written as a deformable one whose taps do not move.

    Its values are those of `torch.nn.Conv2d`; like this, the analysis sees its samples too.
    """

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[2:]
        return super().forward(input, input.new_zeros(len(input), 18, height, width))


LAYERS = {
    "plain": Plain,
    "deformable (v1)": DeformConv2dPack,
    "modulated (v2)": ModulatedDeformConv2dPack,
}


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """The photograph (300, 384) and the networks' view of it (75, 96)."""
    photo = photograph("coins")[:300]
    small = photo.reshape(75, PIXEL, 96, PIXEL).mean((1, 3))
    return photo, ((small - small.mean()) / small.std()).astype(np.float32)


def to_units(at: np.ndarray) -> np.ndarray:
    """Pixels of the photograph as units of the networks."""
    return (at + 0.5) / PIXEL - 0.5


def to_pixels(at: np.ndarray) -> np.ndarray:
    """Units of the networks as pixels of the photograph."""
    return (at + 0.5) * PIXEL - 0.5


def train(name: str, steps: int, seed: int) -> nn.Sequential:
    """A network with three layers of the kind `name`, trained with a bar of its progress."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    view = pictures()[1]
    network = build(LAYERS[name])
    optimiser = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    shown = {"ncols": 80, "mininterval": 0.2 if sys.stderr.isatty() else 10}
    for _ in tqdm(range(steps), desc=f"{name:<15}", **shown):
        pieces, *truth = (
            torch.from_numpy(np.stack(part))
            for part in zip(*(piece(view, rng) for _ in range(BATCH)), strict=True)
        )
        optimiser.zero_grad()
        loss(network(pieces), *truth).backward()
        optimiser.step()
        schedule.step()
    network.eval()
    found, size = errors(network, view)
    seconds = time.perf_counter() - start
    print(f"{name}: {found:.1f} % of the units right, sizes within {size:.1f} px, {seconds:.0f} s")
    return network


def build(layer: type[nn.Module]) -> nn.Sequential:
    """One plain layer, three of the kind that is looked at, and two numbers for each unit."""
    kinds = [(nn.Conv2d, 1), *[(layer, CHANNELS)] * 3]
    layers: list[nn.Module] = []
    for kind, channels in kinds:
        layers += [kind(channels, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(CHANNELS, 2, 1))


def piece(view: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """A random piece (1, 48, 48), its truth, and where it is inside of the photograph."""
    height, width = view.shape
    turn, scale = rng.uniform(-np.pi, np.pi), np.exp(rng.uniform(-0.25, 0.25))
    mirror = np.diag([1, rng.choice([-1, 1])])
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ mirror / scale
    middle = np.array([rng.uniform(16, height - 16), rng.uniform(16, width - 16)])
    grid = np.indices((PIECE, PIECE)).astype(float)
    centre = (PIECE - 1) / 2
    reads = np.tensordot(matrix, grid - centre, 1) + middle[:, None, None]

    # A picture is bent by a deformable convolution with one tap; only a corner of its map is used.
    offset = np.zeros((2, height, width), np.float32)
    offset[:, :PIECE, :PIECE] = reads - grid
    one = np.ones((1, 1, 1, 1), np.float32)
    image = dcnlib.deform_conv2d(view[None], offset, one)[:, :PIECE, :PIECE]
    inside = ((reads >= 0) & (reads <= np.array([height - 1, width - 1])[:, None, None])).all(0)
    return image * np.float32(rng.uniform(0.8, 1.2)), *truth_at(reads, scale), inside


def truth_at(reads: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Whether positions ({y, x}, H, W) lie on a coin, and the logarithm of its size."""
    pixels = to_pixels(reads)
    steps = pixels[:, None] - COINS.T[:2, :, None, None]
    distance = np.hypot(*steps) / COINS[:, 2, None, None]
    nearest = distance.argmin(0)
    return distance.min(0) < 1, np.log(scale * COINS[nearest, 2] / 24).astype(np.float32)


def loss(answer: Tensor, on_coin: Tensor, size: Tensor, inside: Tensor) -> Tensor:
    shares = [
        nn.functional.binary_cross_entropy_with_logits(
            answer[:, 0][inside], on_coin[inside].float()
        ),
        5 * (answer[:, 1] - size)[inside & on_coin].abs().sum() / (inside & on_coin).sum().clamp(1),
    ]
    return sum(shares)


@torch.no_grad()
def errors(network: nn.Module, view: np.ndarray) -> tuple[float, float]:
    """Units that are right about lying on a coin, in %, and the mean error of the radius in pixels."""
    answer = network(torch.from_numpy(view[None, None]))[0].numpy()
    on_coin, size = truth_at(np.indices(view.shape).astype(float))
    right = (answer[0] > 0) == on_coin
    off = 24 * np.abs(np.exp(answer[1]) - np.exp(size))[on_coin]
    return 100 * right.mean(), off.mean()
