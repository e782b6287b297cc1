"""The demo's three networks and the one schedule that trains them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..nn import ModulatedDeformConv2dPack
from .digits import Digits

PLAIN, DEEPER, DEFORMABLE = "plain, 3 layers", "plain, 4 layers", "deformable, 3 layers"
NAMES = (PLAIN, DEEPER, DEFORMABLE)
LEARNING_RATE = 5e-3
BATCH = 50


class Result(NamedTuple):
    """What one training run gave."""

    name: str
    seed: int
    accuracy: list[float]  # per epoch, on the test digits, in %
    parameters: int
    step_ms: float  # median over the steps, wall clock
    seconds: float  # the whole run with its tests
    network: nn.Module


def build(name: str) -> nn.Sequential:
    """3x3 layers on 32 x 32, 16 x 16 and 8 x 8 maps; `DEEPER` has one more of the last kind.

    The offset predictor of a deformable layer looks at its input once more, so that network sees a
    wider part of the digit than `PLAIN` does; `DEEPER` has a similar reach and size.
    """
    inner = ModulatedDeformConv2dPack if name == DEFORMABLE else nn.Conv2d
    layers = [
        *_block(nn.Conv2d, 1, 16),
        nn.MaxPool2d(2),
        *_block(inner, 16, 32),
        nn.MaxPool2d(2),
        *_block(inner, 32, 32),
    ]
    if name == DEEPER:
        layers += _block(nn.Conv2d, 32, 32)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def train(
    name: str,
    data: tuple[Digits, Digits],
    epochs: int,
    seed: int,
    advance: Callable[[float | None], None],
) -> Result:
    """Train one network; `advance` hears of every step, and of the accuracy after each epoch."""
    torch.manual_seed(seed)
    (images, labels), (test_images, test_labels) = [
        (torch.from_numpy(part.images), torch.from_numpy(part.labels)) for part in data
    ]
    network = build(name)
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=steps * epochs
    )
    accuracy, step_seconds = [], []
    begin = time.perf_counter()
    for _ in range(epochs):
        network.train()
        for chosen in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
            start = time.perf_counter()
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            step_seconds.append(time.perf_counter() - start)
            advance(None)
        accuracy.append(_accuracy(network, test_images, test_labels))
        advance(accuracy[-1])
    return Result(
        name,
        seed,
        accuracy,
        sum(p.numel() for p in network.parameters()),
        1e3 * statistics.median(step_seconds),
        time.perf_counter() - begin,
        network,
    )


def _block(convolution: type[nn.Module], in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        convolution(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


@torch.no_grad()
def _accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    right = sum(
        (network(some).argmax(1) == truth).sum().item()
        for some, truth in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(labels)
