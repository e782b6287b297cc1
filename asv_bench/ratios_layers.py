"""The layers that ratios.py measures, by class, with the ratios to a plain convolution to reach."""

from __future__ import annotations

from typing import NamedTuple

from dcnlib._bench import Layer


class Class(NamedTuple):
    """Layers of one kind with the ratios to conv2d to reach, (forward, forward + backward)."""

    layers: tuple[Layer, ...]
    goal: tuple[float, float]
    aim: tuple[float, float]


CLASSES = {
    "O >= 128, K3": Class(
        (
            Layer(128, 128, 56, 3),
            Layer(256, 256, 56, 3),
            Layer(128, 128, (100, 152), 3),
            Layer(128, 256, 112, 3, stride=2),
            Layer(256, 256, 38, 3, dilation=2),
            Layer(144, 144, 40, 3),
            Layer(320, 320, 28, 3),
        ),
        (1.10, 1.10),
        (1.0, 1.0),
    ),
    "O = 64..127, K3": Class(
        (
            Layer(64, 64, 56, 3),
            Layer(64, 64, 112, 3),
            Layer(64, 64, 56, 3, stride=2),
            Layer(72, 72, 56, 3),
            Layer(96, 96, 40, 3),
        ),
        (1.15, 1.25),
        (1.0, 1.1),
    ),
    "O = 32..63, K3": Class(
        (
            Layer(32, 32, 80, 3),
            Layer(48, 48, 64, 3),
            Layer(32, 32, 56, 3, dilation=2),
            Layer(32, 48, 112, 3, stride=2),
        ),
        (1.35, 1.5),
        (1.2, 1.3),
    ),
    "O >= 64, K5 and K7": Class(
        (
            Layer(64, 64, 64, 5),
            Layer(128, 128, 28, 5),
            Layer(64, 64, 40, 7),
            Layer(128, 128, 28, 7),
        ),
        (1.25, 1.40),
        (1.1, 1.2),
    ),
    "1x1, O >= 128": Class(
        (Layer(128, 128, 56, 1), Layer(256, 256, 28, 1), Layer(256, 128, 56, 1)),
        (1.25, 1.40),
        (1.1, 1.2),
    ),
    "small maps, wide": Class(
        (Layer(256, 256, 14, 3), Layer(512, 512, 14, 3), Layer(512, 512, 7, 3)),
        (1.15, 1.25),
        (0.9, 1.1),
    ),
    "groups, offset groups": Class(
        (
            Layer(128, 128, 56, 3, groups=4, offset_groups=4),
            Layer(256, 256, 28, 3, groups=8, offset_groups=8),
            Layer(256, 256, 28, 3, offset_groups=8),
            Layer(256, 256, 28, 3, groups=4),
        ),
        (1.6, 1.8),
        (1.3, 1.5),
    ),
    "depthwise": Class(
        (
            Layer(256, 256, 56, 3, groups=256),
            Layer(64, 64, 112, 3, groups=64),
            Layer(512, 512, 14, 3, groups=512),
            Layer(128, 128, 56, 3, stride=2, groups=128),
        ),
        (1.6, 2.0),
        (1.2, 1.6),
    ),
    "tiny, small batches": Class(
        (
            Layer(16, 16, 28, 3),
            Layer(16, 16, 28, 3, batch=32),
            Layer(32, 32, 14, 3, batch=16),
        ),
        (1.1, 1.2),
        (0.8, 0.8),
    ),
}
#: Channel counts that fill no vector, and the layer that does the same work once padded to 16.
ODD = (
    (Layer(3, 64, 112, 3, stride=2), Layer(16, 64, 112, 3, stride=2)),
    (Layer(17, 17, 56, 3), Layer(32, 32, 56, 3)),
    (Layer(33, 33, 56, 3), Layer(48, 48, 56, 3)),
    (Layer(72, 72, 56, 3), Layer(80, 80, 56, 3)),
)
#: One of each class, of a few milliseconds: where dtypes, layouts, ISAs and threads are compared.
SAMPLE = (
    Layer(128, 128, 56, 3),
    Layer(128, 128, 56, 3, stride=2),
    Layer(64, 64, 56, 3),
    Layer(32, 32, 80, 3),
    Layer(64, 64, 40, 5),
    Layer(256, 256, 28, 1),
    Layer(512, 512, 14, 3),
    Layer(128, 128, 56, 3, groups=4, offset_groups=4),
    Layer(256, 256, 56, 3, groups=256),
    Layer(16, 16, 28, 3, batch=32),
)
#: Where the peers are met: every class, at least 16 layers.
PEER_LAYERS = (
    Layer(128, 128, 56, 3),
    Layer(256, 256, 28, 3),
    Layer(128, 256, 56, 3, stride=2),
    Layer(256, 256, 38, 3, dilation=2),
    Layer(64, 64, 56, 3),
    Layer(64, 64, 112, 3, stride=2),
    Layer(96, 96, 40, 3),
    Layer(32, 32, 80, 3),
    Layer(48, 48, 64, 3),
    Layer(64, 64, 40, 5),
    Layer(64, 64, 28, 7),
    Layer(256, 256, 28, 1),
    Layer(128, 128, 56, 1),
    Layer(512, 512, 14, 3),
    Layer(512, 512, 7, 3),
    Layer(128, 128, 56, 3, groups=4, offset_groups=4),
    Layer(256, 256, 28, 3, offset_groups=8),
    Layer(256, 256, 56, 3, groups=256),
    Layer(64, 64, 56, 3, groups=64),
    Layer(16, 16, 28, 3),
    Layer(16, 16, 28, 3, batch=32),
)
PEERS = ("onnxruntime", "openvino", "torchvision")
#: What is asked of dcnlib elsewhere: against float32 and against another instruction set (forward,
#: forward + backward), two threads against one, microseconds a call.
GOALS = {
    "float16": (1.0, 1.0),
    "bfloat16": (1.0, 1.0),
    "float64": (2.3, 2.3),
    "avx2/avx512": (2.0, 2.0),
    "threads": 1.85,
    "inference": 20.0,
    "gradients": 70.0,
}
#: A single layer may be this far above the goal of its class.
SLACK = 1.2
