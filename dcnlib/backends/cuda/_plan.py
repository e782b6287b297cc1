"""How a call is cut: which kernels, waves of images, chunks of output pixels. Integers only.

A chunk's columns and products live in the workspace; chunks are as large as it allows. What belongs to
whole images there, a channels-last copy of the input or the float32 sum of a 16-bit input gradient,
exists for a wave of images at a time. Everything depends on the call and the settings alone: so do the
order of sums and, with the sorted input gradient, every bit.
"""

from __future__ import annotations

from typing import NamedTuple

from ..._problem import DeformConv2dProblem
from ._settings import Settings

_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
_VECTOR = 16  # bytes that a thread of the rows kernels takes at once
_INT32 = 2**31 - 1


class Plan(NamedTuple):
    """The cut of one call."""

    rows: bool
    """The kernels for channels-last inputs, DCN_ROWS, instead of DCN_PLANAR."""
    staged: bool
    """They read a channels-last copy of the input."""
    direct: bool
    """They add into `grad_input` itself instead of sums of the wave."""
    pieces: int
    """16-bit numbers that make up a sample in the columns."""
    wave: int
    """Images at a time."""
    chunk: int
    """Output pixels at a time, of those images."""
    wide: bool
    """The sort's keys need 64 bits."""


def plan(
    problem: DeformConv2dProblem,
    settings: Settings,
    *,
    aligned: bool = True,
    columns: bool = True,
    grad_columns: bool = False,
    grad_input: bool = False,
    sort: bool = False,
) -> Plan:
    """Cut a call; `aligned` is whether the input starts at a multiple of 16 bytes.

    `columns`: a forward call, or a backward one that wants the weight's gradient; `grad_columns`:
    one that wants those of input, offset or mask; `sort`: the input's in a fixed order.
    """
    size = _BYTES[problem.dtype]
    arithmetic = max(size, 4)
    pieces = 2 if size == 2 and settings.samples == "exact" else 1
    room = settings.workspace
    image = problem.in_channels * problem.in_h * problem.in_w

    rows = settings.kernels != "planar" and _rows_fit(problem, size)
    staged = rows and not (problem.channels_last and aligned)
    per_image = _image_bytes(image, size, arithmetic, staged, grad_input)
    if staged and per_image > room // 2:
        rows = staged = False
        per_image = _image_bytes(image, size, arithmetic, staged, grad_input)
    direct = grad_input and not staged and size == arithmetic

    wave = problem.batch
    if per_image:
        wave = min(wave, max(1, room // 2 // per_image))
    samples = problem.in_channels * problem.taps
    per_pixel = problem.out_channels * arithmetic  # the product, or grad_output packed
    per_pixel += samples * size * pieces if columns else 0
    per_pixel += samples * arithmetic if grad_columns else 0
    wide = wave * problem.in_h * problem.in_w * problem.offset_groups > _INT32
    if sort and grad_input:
        # keys before, sorted and in the sort's own memory; places twice; weights
        key = 8 if wide else 4
        per_pixel += 4 * problem.offset_groups * problem.taps * (3 * key + 2 * 8 + arithmetic)
    chunk = max(1, (room - per_image * wave) // per_pixel)
    chunk = _balanced(chunk, wave * problem.out_h * problem.out_w, problem.out_w)
    return Plan(rows, staged, direct, pieces, wave, chunk, wide)


def chunks(plan: Plan, problem: DeformConv2dProblem):
    """The waves as (first image, images, their chunks); a chunk as (first pixel of the batch, pixels)."""
    pixels = problem.out_h * problem.out_w
    for image in range(0, problem.batch, plan.wave):
        images = min(plan.wave, problem.batch - image)
        first, end = image * pixels, (image + images) * pixels
        yield (
            image,
            images,
            [(at, min(plan.chunk, end - at)) for at in range(first, end, plan.chunk)],
        )


def _rows_fit(problem: DeformConv2dProblem, size: int) -> bool:
    vector = _VECTOR // size
    return (
        problem.in_channels // problem.groups % vector == 0
        and problem.in_channels // problem.offset_groups % vector == 0
    )


def _image_bytes(image: int, size: int, arithmetic: int, staged: bool, grad_input: bool) -> int:
    """What an image of a wave keeps in the workspace: its copy, and its gradient's sums."""
    total = image * size if staged else 0
    if grad_input and (staged or size != arithmetic):
        total += image * arithmetic
    return total


def _balanced(most: int, pixels: int, width: int) -> int:
    """Chunks of at most `most` pixels: no more than needed, equally long, whole rows if possible."""
    if pixels <= most:
        return max(1, pixels)
    count = -(-pixels // most)
    even = -(-pixels // count)
    whole = -(-even // width) * width
    return whole if whole <= most else even
