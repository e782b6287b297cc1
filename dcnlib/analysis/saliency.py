"""Error-bounded saliency: the smallest part of the input that keeps a response; imports torch.

One nested family of masks is optimised, from nothing to the whole input: cells enter in the order of
scores that make the error fall as fast as possible. The mask for a bound is the first of the family
whose error is within it, so a tighter bound never gives a smaller mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._problem import integer, type_error, value_error
from .gradients import response_at, run_to
from .recording import as_inputs, watch

_OP = "error_bounded_saliency"
_CELLS = 32  # along the longer side, unless the caller decides
_BATCH = 16  # masks in one forward pass
_SOFTNESS = (0.5, 0.05)  # of the masks' edges, in standard deviations of the scores: first and last
_RATE = 0.1


@dataclass(frozen=True)
class Saliency:
    """The part of an input that keeps a response within an error bound.

    Attributes
    ----------
    mask : array of shape (H, W), bool
        True where the input is kept; elsewhere it is the baseline.
    error : float
        Distance between the responses to the masked and to the whole input, as a share of the
        distance between those to the baseline and to the whole input. At most `bound`.
    bound : float
    order : array of shape (H, W), int64
        When the pixel's cell enters the growing mask: 0 is first.
    errors : array of shape (cells + 1,), float64
        The error of each mask of the family: of nothing, of the first cell, of the first two, ...
    """

    mask: np.ndarray
    error: float
    bound: float
    order: np.ndarray = field(repr=False)
    errors: np.ndarray = field(repr=False)

    @property
    def area(self) -> float:
        """The share of the pixels that are kept."""
        return float(self.mask.mean())

    def within(self, bound: float) -> Saliency:
        """The smallest mask of the same family for another bound; nothing is computed again."""
        bound = _bound(bound)
        kept = int(np.argmax(self.errors <= bound))
        return Saliency(self.order < kept, float(self.errors[kept]), bound, self.order, self.errors)


def error_bounded_saliency(
    model: nn.Module,
    input: Tensor | tuple[Tensor, ...],
    position: tuple[int, int] | None = None,
    *,
    bound: float = 0.1,
    baseline: float | str | Tensor = "mean",
    channel: int | None = None,
    layer: str | None = None,
    cell: int | None = None,
    steps: int = 150,
    seed: int = 0,
    progress: bool | Callable[[int, int], None] = False,
) -> Saliency:
    r"""The smallest part of the input that keeps a response of a model within an error bound.

    With mask M, input I and baseline B, the error is

    .. math:: \frac{\lVert y(M I + (1 - M) B) - y(I) \rVert}{\lVert y(B) - y(I) \rVert},

    0 for the whole input and 1 for nothing of it.

    Parameters
    ----------
    model, position, channel, layer
        As for `effective_receptive_field`.
    input : tensor (1, C, H, W) or (C, H, W), or tuple of tensors
        One image, first. The model is called with batches of it; other inputs are passed as they are.
    bound : float
        Largest error, at least 0.
    baseline : float, "mean" or tensor that broadcasts to the image
        What stands where the input is masked; "mean" is the mean of each channel.
    cell : int, optional
        Side in pixels of the squares that masks are made of; None makes 32 along the longer side.
    steps : int
        Of the optimisation; 0 takes the order of gradient times difference from the baseline.
    seed : int
        Of the areas that the steps try.
    progress : bool or callable
        True shows a bar (needs tqdm); a callable is told (done, total).

    Returns
    -------
    Saliency

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; if the response is NaN or infinite.

    Notes
    -----
    Scores of the cells are optimised with Adam: each step draws areas and lowers the errors of the
    soft masks that keep as much of the input; cells that no error depends on come last. Then every
    mask of the family is evaluated, cells + 1 images in all. The result is small, not proven to be
    the smallest. It depends on seed and machine alone, and with one order of cells for all bounds,
    masks for tighter bounds contain those for looser ones.

    References
    ----------
    Zhu et al., Deformable ConvNets v2, 2019, https://arxiv.org/abs/1811.11168, section 3.1.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.analysis import error_bounded_saliency
    >>> model = torch.nn.Conv2d(1, 1, 3, padding=1)
    >>> image = torch.rand(1, 8, 8) + 1
    >>> found = error_bounded_saliency(model, image, (4, 3), bound=0.0, baseline=0.0, cell=1)
    >>> int(found.mask.sum())  # the window of the unit
    9
    """
    bound = _bound(bound)
    inputs = as_inputs(_OP, input, differentiable=True)
    image = inputs[0].detach()
    image = image[None] if image.ndim == 3 else image
    if len(image) != 1:
        raise value_error(_OP, "input", "must be one image", "(1, C, H, W)", tuple(image.shape))
    height, width = image.shape[2:]
    side = -(-max(height, width) // _CELLS) if cell is None else integer(_OP, "cell", cell, 1)
    steps = integer(_OP, "steps", steps, 0)
    base = _baseline(baseline, image)

    with torch.inference_mode(False), torch.enable_grad(), watch(_OP, model):

        def response(keep: Tensor) -> Tensor:
            """(B, O): to masks of cells (B, rows, columns)."""
            pixels = keep.repeat_interleave(side, 1).repeat_interleave(side, 2)
            mask = pixels[:, None, :height, :width].to(image)
            output = run_to(_OP, model, (base + mask * (image - base), *inputs[1:]), layer)
            return response_at(_OP, output, position, channel).double()

        shape = (-(-height // side), -(-width // side))
        # Scores and masks of cells are float32 for every model.
        ends = torch.stack([torch.zeros(shape), torch.ones(shape)]).to(image.device)
        with torch.no_grad():
            nothing, whole = response(ends)
        reach = (nothing - whole).norm()
        if not torch.isfinite(reach):
            raise value_error(
                _OP, "model", "its response must be finite", "numbers", whole.tolist()
            )

        def error(keep: Tensor) -> Tensor:
            if reach == 0:
                return keep.new_zeros(len(keep), dtype=torch.float64)
            return (response(keep) - whole).norm(dim=1) / reach

        cells = shape[0] * shape[1]
        scans = -(-(cells + 1) // _BATCH)
        with _Progress(progress, steps + scans) as advance:
            scores = _optimise(error, _first_scores(error, ends[1]), steps, seed, advance)
            order = torch.argsort(scores.flatten(), descending=True, stable=True).argsort()
            errors = _errors(error, order.reshape(shape), cells, advance)
    order = np.kron(order.reshape(shape).cpu().numpy(), np.ones((side, side), np.int64))
    errors[-1] = 0.0  # of the whole input, by definition
    everything = Saliency(np.ones((height, width), bool), 0.0, 0.0, order[:height, :width], errors)
    return everything.within(bound)


def _first_scores(error: Callable[[Tensor], Tensor], ones: Tensor) -> Tensor:
    """How strongly the error depends on each cell half way between baseline and input."""
    half = (0.5 * ones)[None].requires_grad_()
    loss = error(half).sum()
    if not loss.requires_grad:
        return torch.zeros_like(ones)
    (gradient,) = torch.autograd.grad(loss, half, allow_unused=True)
    strength = torch.zeros_like(ones) if gradient is None else gradient[0].abs()
    # Ranks: a few huge values would leave all others at one score.
    return strength.flatten().argsort(stable=True).argsort().reshape(ones.shape).to(ones)


def _optimise(
    error: Callable[[Tensor], Tensor], scores: Tensor, steps: int, seed: int,
    advance: Callable[[], None],
) -> Tensor:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    scores = _normalised(scores).requires_grad_()
    optimiser = torch.optim.Adam([scores], _RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.05, max(steps, 1))
    even = torch.arange(_BATCH) % 2 == 0
    matters = torch.zeros_like(scores, dtype=torch.bool)
    for step in range(steps):
        draws = torch.rand(_BATCH, generator=generator, dtype=torch.float64)
        # Half of the areas on a logarithmic scale: the small masks matter.
        areas = torch.where(even, draws, float(scores.numel()) ** (draws - 1))
        softness = _SOFTNESS[0] * (_SOFTNESS[1] / _SOFTNESS[0]) ** (step / steps)
        level = _normalised(scores)
        threshold = torch.quantile(level.detach().flatten(), (1 - areas).to(level))
        keep = torch.sigmoid((level - threshold[:, None, None]) / softness)
        loss = error(keep).mean()
        advance()
        if not loss.requires_grad:
            continue
        scores.grad, by_cell = torch.autograd.grad(loss, (scores, keep))
        matters |= (by_cell != 0).any(0)
        optimiser.step()
        schedule.step()
    # What no mask has shown to matter comes last; its score has moved with those of others.
    return torch.where(matters | ~matters.any(), scores, scores.min() - 1).detach()


def _normalised(scores: Tensor) -> Tensor:
    centred = scores - scores.mean()
    return centred / centred.square().mean().sqrt().clamp_min(1e-12)


@torch.no_grad()
def _errors(
    error: Callable[[Tensor], Tensor], order: Tensor, cells: int, advance: Callable[[], None]
) -> np.ndarray:
    """The error of each mask of the family, from nothing to everything."""
    errors = []
    for kept in torch.arange(cells + 1).split(_BATCH):
        keep = order < kept.to(order)[:, None, None]
        errors.append(error(keep.float()).cpu().numpy())
        advance()
    return np.concatenate(errors)


def _bound(bound: Any) -> float:
    try:
        number = float(bound)
    except (TypeError, ValueError):
        raise type_error(_OP, "bound", "must be a number", "at least 0", repr(bound)) from None
    if not number >= 0:
        raise value_error(_OP, "bound", "must be a number", "at least 0", number)
    return number


def _baseline(baseline: Any, image: Tensor) -> Tensor:
    if isinstance(baseline, str):
        if baseline != "mean":
            raise value_error(_OP, "baseline", "unknown name", '"mean"', repr(baseline))
        return image.mean((2, 3), keepdim=True)
    try:
        base = torch.as_tensor(baseline, dtype=image.dtype, device=image.device)
        return base.broadcast_to(image.shape)
    except (TypeError, ValueError, RuntimeError):
        raise value_error(
            _OP, "baseline", "must broadcast to the image",
            f'a float, "mean" or a tensor {tuple(image.shape)}',
            tuple(getattr(baseline, "shape", ())) or repr(baseline),
        ) from None  # fmt: skip


class _Progress:
    """Tells a bar or the caller's function of every step."""

    def __init__(self, progress: bool | Callable[[int, int], None], total: int) -> None:
        self.tell, self.total, self.done, self.bar = progress, total, 0, None
        if progress is True:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                raise value_error(
                    _OP, "progress", "a bar needs tqdm", "tqdm installed, a callable or False",
                    True, "install with: python -m pip install tqdm",
                ) from None  # fmt: skip
            self.bar = tqdm(total=total, desc="saliency")
            self.tell = lambda done, total: self.bar.update()

    def __enter__(self) -> Callable[[], None]:
        return self._advance

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _advance(self) -> None:
        self.done += 1
        if callable(self.tell):
            self.tell(self.done, self.total)
