"""Make the golden files of this folder: `python make_golden.py torchvision|paddle|onnx`.

Run once for each, in an environment that has that package; dcnlib is not needed. The files hold the
arguments of small calls and what the package answered. torchvision.npz was made by torchvision
0.29.1 with torch 2.14.1, paddle.npz by paddlepaddle 3.3.1, onnx.npz by the node tests of onnx
1.23.2.

`numbers` gives the arguments of the larger Paddle calls, which are not stored.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent

#: (input, weight, offset groups, mask, bias), then stride, padding, dilation
SMALL = {
    "v1": ((2, 2, 6, 5), (3, 2, 3, 3), 1, False, False, (1, 1), (1, 1), (1, 1)),
    "v2": ((1, 2, 5, 6), (2, 2, 3, 3), 1, True, True, (1, 1), (1, 1), (1, 1)),
    "strided": ((1, 3, 9, 8), (2, 3, 3, 2), 1, True, True, (2, 1), (1, 2), (1, 2)),
    "grouped": ((2, 4, 5, 4), (4, 2, 2, 3), 1, True, True, (1, 2), (0, 1), (1, 1)),
    "groups_across": ((1, 6, 5, 5), (6, 2, 2, 2), 2, True, False, (1, 1), (1, 0), (2, 1)),
    "integer": ((1, 2, 6, 6), (2, 2, 3, 3), 1, True, True, (1, 1), (1, 1), (1, 1)),
}

#: The two examples of Paddle's documentation: 3x3, 1 to 16 channels, 8 images of 28 x 28.
PADDLE_EXAMPLE = {
    "input": (8, 1, 28, 28),
    "offset": (8, 18, 26, 26),
    "weight": (16, 1, 3, 3),
    "bias": (16,),
    "mask": (8, 9, 26, 26),
}
#: The part of an example's output that is stored.
PART = np.s_[::3, ::5, ::4, ::3]


def numbers(shape: tuple[int, ...], seed: int, largest: int, unit: float) -> np.ndarray:
    """Scattered float32 multiples of `unit`, from -largest to largest, by integer arithmetic."""
    i = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed * 7919)
    i = (i * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(2**32)
    i = (i ^ (i >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)
    steps = 2 * round(largest / unit) + 1
    whole = ((i >> np.uint64(8)) % np.uint64(steps)).astype(np.int64) - steps // 2
    return (whole * unit).astype(np.float32).reshape(shape)


def paddle_example(seed: int = 0, unit: float = 0.125) -> dict[str, np.ndarray]:
    """Arguments of the documentation's examples; with `unit` 1/8 every sum is exact in float32."""
    largest = {"input": 8, "offset": 3, "weight": 4, "bias": 4, "mask": 1}
    return {
        name: numbers(shape, seed + index, largest[name], unit if name == "offset" else 0.125)
        for index, (name, shape) in enumerate(PADDLE_EXAMPLE.items())
    }


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the values; the sign of a zero does not count."""
    return hashlib.sha256(np.ascontiguousarray(array + np.float32(0)).tobytes()).hexdigest()


def small(case: str) -> dict[str, np.ndarray | None]:
    """Float64 arguments of a small call; offsets off the integers, except in "integer"."""
    shape, weight, offset_groups, has_mask, has_bias, stride, padding, dilation = SMALL[case]
    size = [
        (shape[2 + a] + 2 * padding[a] - dilation[a] * (weight[2 + a] - 1) - 1) // stride[a] + 1
        for a in range(2)
    ]
    taps = offset_groups * weight[2] * weight[3]
    rng = np.random.default_rng(list(SMALL).index(case))

    def draw(*shape):
        return np.rint(rng.standard_normal(shape) * 64) / 64

    offset = draw(shape[0], 2 * taps, *size) * 1.5
    offset = np.rint(offset) if case == "integer" else np.floor(offset * 64) / 64 + 1 / 128
    return {
        "input": draw(*shape),
        "offset": offset,
        "weight": draw(*weight),
        "bias": draw(weight[0]) if has_bias else None,
        "mask": np.abs(draw(shape[0], taps, *size)) if has_mask else None,
        "grad_output": draw(shape[0], weight[0], *size),
    }


def differentiated(case: str, tensor, operator) -> dict[str, np.ndarray]:
    """Arguments, output and gradients of one small call by a package with autograd."""
    arrays = small(case)
    shape, weight, offset_groups, _, _, stride, padding, dilation = SMALL[case]
    arguments = {name: tensor(a) for name, a in arrays.items() if a is not None}
    grad_output = arguments.pop("grad_output")
    output = operator(arguments, stride, padding, dilation, shape[1] // weight[1], offset_groups)
    (output * grad_output).sum().backward()
    stored = {name: a for name, a in arrays.items() if a is not None}
    stored["output"] = output.detach().numpy()
    stored |= {f"grad_{name}": np.asarray(t.grad) for name, t in arguments.items()}
    sizes = (*stride, *padding, *dilation, shape[1] // weight[1], offset_groups)
    stored["sizes"] = np.array(sizes, np.int16)
    for name in arguments.keys() | {"grad_output"}:
        assert np.array_equal(stored[name], stored[name].astype(np.float32))
        stored[name] = stored[name].astype(np.float32)
    return {f"{case}/{name}": a for name, a in stored.items()}


def make_torchvision() -> dict[str, np.ndarray]:
    import torch
    from torchvision.ops import deform_conv2d

    def operator(t, stride, padding, dilation, groups, offset_groups):
        return deform_conv2d(
            t["input"], t["offset"], t["weight"], t.get("bias"), stride, padding, dilation,
            t.get("mask"),
        )  # fmt: skip

    def tensor(array):
        return torch.from_numpy(array).requires_grad_()

    return {k: a for case in SMALL for k, a in differentiated(case, tensor, operator).items()}


def make_paddle() -> dict[str, np.ndarray]:
    import paddle
    from paddle.vision.ops import DeformConv2D, deform_conv2d

    paddle.set_device("cpu")
    stored = {}
    for unit, kind in ((0.125, "exact"), (0.001, "real")):
        arrays = paddle_example(unit=unit)
        layer = DeformConv2D(in_channels=1, out_channels=16, kernel_size=[3, 3])
        layer.weight.set_value(arrays["weight"])
        layer.bias.set_value(arrays["bias"])
        x, offset, mask = (paddle.to_tensor(arrays[n]) for n in ("input", "offset", "mask"))
        for version, arguments in (("v1", (x, offset)), ("v2", (x, offset, mask))):
            output = layer(*arguments).numpy()
            assert output.shape == (8, 16, 26, 26)
            stored[f"example/{kind}/{version}/part"] = output[PART]
            if kind == "exact":
                stored[f"example/{kind}/{version}/sha256"] = np.array(checksum(output))

    def operator(t, stride, padding, dilation, groups, offset_groups):
        return deform_conv2d(
            t["input"], t["offset"], t["weight"], t.get("bias"), stride, padding, dilation,
            offset_groups, groups, t.get("mask"),
        )  # fmt: skip

    def tensor(array):
        return paddle.to_tensor(array, stop_gradient=False)

    # At exactly -1 Paddle has no offset gradient where the right-hand derivative is not 0.
    for case in SMALL:
        stored |= differentiated(case, tensor, operator)
        if case == "integer":
            del stored["integer/grad_offset"]
    return stored


def make_onnx() -> dict[str, np.ndarray]:
    from onnx.backend.test.case.node import collect_testcases

    stored = {}
    for case in collect_testcases("DeformConv"):
        node = case.model.graph.node[0]
        attributes = {a.name: a.i or list(a.ints) for a in node.attribute}
        (arrays, (output,)) = case.data_sets[0]
        name = case.name.removeprefix("test_")
        for argument, array in zip(
            ("input", "weight", "offset", "bias", "mask"), arrays, strict=False
        ):
            stored[f"{name}/{argument}"] = array
        stored[f"{name}/output"] = output
        pads = attributes["pads"]  # top, left, bottom, right
        padding = (pads[0], pads[2], pads[1], pads[3])
        stored[f"{name}/padding"] = np.array(padding)
        stored[f"{name}/offset_groups"] = np.array(attributes.get("offset_group", 1))
    return stored


if __name__ == "__main__":
    package = sys.argv[1]
    arrays = {"torchvision": make_torchvision, "paddle": make_paddle, "onnx": make_onnx}[package]()
    np.savez_compressed(FOLDER / f"{package}.npz", **arrays)
