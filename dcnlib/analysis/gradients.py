"""Effective receptive field, sampling locations and bins: what a response depends on.

All are gradients of output units, by autograd; parameters and their gradients are left alone.
Imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._problem import integer, value_error
from .locations import sampling_locations, to_numpy
from .recording import Call, as_inputs, watch

_PROJECTIONS = 16


@dataclass(frozen=True)
class EffectiveReceptiveField:
    """How strongly a response depends on each pixel.

    Attributes
    ----------
    magnitude : array of shape (N, H, W), float64, or (H, W) for an unbatched input
        Length of the gradient over the input's channels, root mean square over the nodes.
    """

    magnitude: np.ndarray

    def size(self, share: float = 0.9) -> np.ndarray:
        """The number of pixels that hold `share` of each image's magnitude, the strongest first."""
        return _holding(self.magnitude, share)


@dataclass(frozen=True)
class EffectiveLocations:
    """Where a deformable layer reads, and how strongly a response depends on it.

    Attributes
    ----------
    name : str
        The layer's name in the model.
    locations : array of shape (N, offset_groups, KH*KW, OH, OW, 2), float64
        (y, x) of every sample in pixels of the layer's input.
    magnitude : array of shape (N, offset_groups, KH*KW, OH, OW), float64
        Length of the gradient with respect to the sample's (y, x), root mean square over the nodes.
    in_size : (height, width)
        Of the layer's input.
    """

    name: str
    locations: np.ndarray
    magnitude: np.ndarray
    in_size: tuple[int, int]

    def on_image(self, size: tuple[int, int]) -> np.ndarray:
        """`locations` in pixels of an image, the layer's input stretched onto it."""
        return _stretched(self.locations, self.in_size, size)


@dataclass(frozen=True)
class EffectiveBins:
    """Where a deformable RoI pooling averages, and how strongly a response depends on it.

    Attributes
    ----------
    name : str
        The module's name in the model.
    locations : array of shape (R, classes, PH, PW, 2), float64
        (y, x) of the middle of every bin, moved by its offset, in pixels of the pooled map.
    magnitude : array of shape (R, classes, PH, PW), float64
        Length of the gradient with respect to the bin's (y, x), root mean square over the nodes.
    bin_size : array of shape (R, 2), float64
        Height and width of a bin in pixels of the pooled map.
    images : array of shape (R,), int64
        The image of each region.
    in_size : (height, width)
        Of the pooled map.
    """

    name: str
    locations: np.ndarray
    magnitude: np.ndarray
    bin_size: np.ndarray
    images: np.ndarray
    in_size: tuple[int, int]

    def on_image(self, size: tuple[int, int]) -> np.ndarray:
        """`locations` in pixels of an image, the pooled map stretched onto it."""
        return _stretched(self.locations, self.in_size, size)


def effective_receptive_field(
    model: nn.Module,
    input: Tensor | tuple[Tensor, ...],
    position: tuple[int, int] | None = None,
    *,
    channel: int | None = None,
    layer: str | None = None,
    projections: int = _PROJECTIONS,
    seed: int = 0,
) -> EffectiveReceptiveField:
    r"""How strongly a response of a model depends on each input pixel.

    .. math:: \sqrt{\tfrac{1}{O} \sum_o \sum_c (\partial y_{o,p_0} / \partial x_{c,p})^2}

    over the output channels o of the unit at `position` and the input channels c.

    Parameters
    ----------
    model : torch.nn.Module
        Runs in evaluation mode; afterwards it is as before.
    input : tensor (N, C, H, W) or (C, H, W), or tuple of tensors
        What it is called with, the images first.
    position : (row, column), optional
        The unit of a response with height and width; None for one without, as that of a classifier.
    channel : int, optional
        One channel (or class) of the response; None takes all of them.
    layer : str, optional
        Name of the module whose output is the response; None for the model's.
    projections : int
        With more channels than this, their mean is estimated from as many random combinations
        (signs of +1 and -1, drawn from `seed`), which have the same expectation.
    seed : int

    Returns
    -------
    EffectiveReceptiveField

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    References
    ----------
    Luo et al., Understanding the effective receptive field in deep convolutional neural networks,
    2016, https://arxiv.org/abs/1701.04128. Zhu et al., 2019, section 3.1.

    Examples
    --------
    >>> import torch
    >>> from dcnlib.analysis import effective_receptive_field
    >>> model = torch.nn.Conv2d(1, 1, 3, padding=1)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> effective_receptive_field(model, torch.zeros(1, 4, 4), (1, 1)).magnitude
    array([[1., 1., 1., 0.],
           [1., 1., 1., 0.],
           [1., 1., 1., 0.],
           [0., 0., 0., 0.]])
    """
    op = "effective_receptive_field"
    inputs = as_inputs(op, input, differentiable=True)
    with torch.inference_mode(False), torch.enable_grad():
        image, response, _ = _run(op, model, inputs, position, channel, layer)
        (total,) = _mean_squares(op, response, [image], projections, seed)
    magnitude = total.sum(1).sqrt().cpu().numpy()
    return EffectiveReceptiveField(magnitude if inputs[0].ndim == 4 else magnitude[0])


def effective_sampling_locations(
    model: nn.Module,
    input: Tensor | tuple[Tensor, ...],
    position: tuple[int, int] | None = None,
    *,
    channel: int | None = None,
    layer: str | None = None,
    projections: int = _PROJECTIONS,
    seed: int = 0,
) -> list[EffectiveLocations]:
    """How strongly a response of a model depends on where its deformable layers read.

    The gradient with respect to the position of every sample of every deformable layer, through all
    layers above it: samples that nothing depends on have magnitude 0, however far they moved.

    Parameters
    ----------
    model, input, position, channel, layer, projections, seed
        As for `effective_receptive_field`.

    Returns
    -------
    list of EffectiveLocations
        One for each deformable layer, in the order of the forward pass.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; for a model without a deformable layer.

    References
    ----------
    Zhu et al., 2019, section 3.1.

    Examples
    --------
    >>> import torch
    >>> from dcnlib import analysis, nn
    >>> layer = nn.DeformConv2dPack(2, 4, 3, padding=1)
    >>> (seen,) = analysis.effective_sampling_locations(layer, torch.randn(1, 2, 6, 6), (2, 3))
    >>> seen.locations[0, 0, :3, 2, 3].tolist()
    [[1.0, 2.0], [1.0, 3.0], [1.0, 4.0]]
    >>> int((seen.magnitude > 0).sum())  # the nine taps of one unit
    9
    """
    op = "effective_sampling_locations"
    inputs = as_inputs(op, input, differentiable=True)
    with torch.inference_mode(False), torch.enable_grad():
        _, response, calls = _run(op, model, inputs, position, channel, layer)
        calls = _of_kind(op, calls, "conv", "layer", "deform_conv2d")
        offsets = [call.offset for call in calls]
        totals = _mean_squares(op, response, offsets, projections, seed)
    return [_located(call, total) for call, total in zip(calls, totals, strict=True)]


def effective_bin_locations(
    model: nn.Module,
    input: tuple[Tensor, ...],
    position: tuple[int, int] | None = None,
    *,
    channel: int | None = None,
    layer: str | None = None,
    projections: int = _PROJECTIONS,
    seed: int = 0,
) -> list[EffectiveBins]:
    """How strongly a response to each region depends on where its bins lie.

    The gradient with respect to the position of every bin of every deformable RoI pooling, through
    all layers above it. The response has a row for each region, as that of a pooling or of a head.

    Parameters
    ----------
    model, position, channel, layer, projections, seed
        As for `effective_receptive_field`.
    input : tuple of tensors
        What the model is called with: images, regions, ...

    Returns
    -------
    list of EffectiveBins
        One for each call of ``deform_roi_pool`` or ``deform_psroi_pool``, without an offset too, in the
        order of the forward pass. The Packs of `dcnlib.nn` pool twice: to predict, then moved.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; for a model without such a pooling.

    References
    ----------
    Zhu et al., 2019, section 3.1.

    Examples
    --------
    >>> import torch
    >>> from dcnlib import analysis, nn
    >>> pool, rois = nn.DeformRoIPool(2), torch.tensor([[0.0, 2, 2, 6, 6]])
    >>> (bins,) = analysis.effective_bin_locations(pool, (torch.randn(1, 3, 8, 8), rois), (1, 0))
    >>> bins.locations[0, 0, 1, 0].tolist(), bins.bin_size.tolist()
    ([4.5, 2.5], [[2.0, 2.0]])
    >>> (bins.magnitude > 0).tolist()
    [[[[False, False], [True, False]]]]
    """
    op = "effective_bin_locations"
    inputs = as_inputs(op, input, differentiable=True)
    with torch.inference_mode(False), torch.enable_grad():
        _, response, calls = _run(op, model, inputs, position, channel, layer)
        calls = _of_kind(op, calls, "roi", "RoI pooling", "deform_roi_pool or deform_psroi_pool")
        offsets = [call.offset for call in calls]
        totals = _mean_squares(op, response, offsets, projections, seed)
    return [_binned(call, total) for call, total in zip(calls, totals, strict=True)]


def _binned(call: Call, squares: Tensor) -> EffectiveBins:
    given = call.arguments
    rois = given["rois"].detach().double().cpu().numpy()
    low, high = rois[:, 2:0:-1], rois[:, 4:2:-1]  # (y, x)
    scale = given["spatial_scale"]
    if "gamma" in given:
        factor, start, size = given["gamma"], low * scale - 0.5, (high - low) * scale
    else:
        whole = [np.trunc(a + np.copysign(0.5, a)) for a in (low, high)]
        factor, start = given["offset_std"], whole[0] * scale - 0.5
        size = np.maximum((whole[1] + 1 - whole[0]) * scale, 0.1)
    offset = to_numpy(call.offset)
    count, planes, *bins = offset.shape

    def by_axis(array: np.ndarray) -> np.ndarray:
        """(R, classes, PH, PW, {y, x}): the planes are x before y."""
        array = array.reshape(count, planes // 2, 2, *bins)[:, :, ::-1]
        return np.moveaxis(array, 2, -1)

    region = (slice(None), None, None, None)
    reach = factor * size[region]
    middle = np.stack(np.indices(bins), -1) + 0.5
    locations = start[region] + middle * size[region] / bins + reach * by_axis(offset)
    # The offset's gradient is that of the position times the reach.
    squares = by_axis(squares.cpu().numpy())
    per_pixel = np.divide(squares, reach**2, out=np.zeros_like(squares), where=reach != 0)
    return EffectiveBins(
        call.name,
        locations,
        np.sqrt(per_pixel.sum(-1)),
        size / bins,
        rois[:, 0].astype(np.int64),
        tuple(given["input"].shape[-2:]),
    )


def _of_kind(op: str, calls: list[Call], kind: str, what: str, operators: str) -> list[Call]:
    found = [call for call in calls if call.kind == kind]
    if not found:
        rule = f"needs a deformable {what}"
        raise value_error(op, "model", rule, f"one that calls {operators}", "none")
    return found


def _stretched(at: np.ndarray, size: tuple[int, int], image: tuple[int, int]) -> np.ndarray:
    scale = np.array(image) / np.array(size)
    return (at + 0.5) * scale - 0.5


def _located(call: Call, squares: Tensor) -> EffectiveLocations:
    layer = call.layer()
    assert layer.offset is not None
    n, groups, taps, _, *out = layer.offset.shape
    locations = sampling_locations(layer).locations.reshape(n, *out, groups, taps, 2)
    magnitude = squares.reshape(n, groups, taps, 2, *out).sum(3).sqrt().cpu().numpy()
    locations = np.moveaxis(locations, (1, 2), (3, 4))
    return EffectiveLocations(layer.name, locations, magnitude, layer.in_size)


def _run(
    op: str, model: nn.Module, inputs: tuple[Tensor, ...], position: Any, channel: Any,
    layer: str | None,
) -> tuple[Tensor, Tensor, list[Call]]:  # fmt: skip
    """The image (N, C, H, W) in the graph, the response (N, O) to it, and the calls in between."""
    image = inputs[0].detach()
    image = (image if image.ndim == 4 else image[None]).clone().requires_grad_()
    with watch(op, model) as calls:
        output = run_to(op, model, (image, *inputs[1:]), layer)
    return image, response_at(op, output, position, channel), calls


def run_to(op: str, model: nn.Module, inputs: tuple[Tensor, ...], layer: str | None) -> Tensor:
    """The output of the model, or of the module that is named `layer`."""
    kept: list[Any] = []
    if layer is None:
        kept.append(model(*inputs))
    else:
        modules = dict(model.named_modules())
        if layer not in modules:
            names = ", ".join(repr(name) for name in list(modules)[:20] if name)
            raise value_error(op, "layer", "no such module", f"one of {names}", repr(layer))
        handle = modules[layer].register_forward_hook(lambda _m, _i, output: kept.append(output))
        try:
            model(*inputs)
        finally:
            handle.remove()
    if len(kept) != 1 or not isinstance(kept[0], Tensor) or kept[0].ndim < 2:
        got = [tuple(getattr(out, "shape", ())) or type(out).__name__ for out in kept]
        raise value_error(
            op, "layer", "must give one tensor", "(N, O) or (N, O, OH, OW)", got,
            "name another module",
        )  # fmt: skip
    return kept[0]


def response_at(op: str, output: Tensor, position: Any, channel: Any) -> Tensor:
    """(N, O): the response of each image at one unit, of all channels or of one."""
    if output.ndim == 2:
        if position is not None:
            raise value_error(
                op, "position", "the response has no height and width", None, position,
                "name the module of a map with layer=",
            )  # fmt: skip
        response = output
    else:
        if output.ndim != 4:
            raise value_error(
                op, "layer", "must give a map or a vector", "(N, O) or (N, O, OH, OW)",
                tuple(output.shape),
            )  # fmt: skip
        if isinstance(position, np.ndarray | Tensor):
            position = position.tolist()
        if not isinstance(position, tuple | list) or len(position) != 2:
            raise value_error(op, "position", "needed for a map", "(row, column)", repr(position))
        place = [integer(op, "position", index, 0) for index in position]
        if place[0] >= output.shape[2] or place[1] >= output.shape[3]:
            raise value_error(
                op, "position", "must lie on the map",
                f"less than {tuple(output.shape[2:])}", tuple(place),
            )  # fmt: skip
        response = output[:, :, place[0], place[1]]
    if channel is None:
        return response
    channel = integer(op, "channel", channel, 0)
    if channel >= response.shape[1]:
        raise value_error(
            op, "channel", "no such channel", f"less than {response.shape[1]}", channel
        )
    return response[:, channel, None]


def _mean_squares(
    op: str, response: Tensor, sources: list[Tensor], projections: Any, seed: int
) -> list[Tensor]:
    """Squares of the gradients of the response (N, O) with respect to each source: mean over O.

    Images do not see each other, so one backward pass serves all of them.
    """
    projections = integer(op, "projections", projections, 1)
    totals = [torch.zeros_like(source, dtype=torch.float64) for source in sources]
    channels = response.shape[1]
    if channels <= projections:
        nodes = torch.eye(channels)
    else:
        generator = torch.Generator().manual_seed(seed)
        nodes = 2.0 * torch.randint(2, (projections, channels), generator=generator) - 1
    if response.requires_grad:  # else it depends on nothing
        for node in nodes.to(response):
            gradients = torch.autograd.grad(
                response @ node, sources, torch.ones_like(response[:, 0]),
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient.double().square()
    # A random combination has the sum over the channels as expectation.
    divisor = channels if channels <= projections else channels * projections
    return [total / divisor for total in totals]


def _holding(magnitude: np.ndarray, share: float) -> np.ndarray:
    flat = -np.sort(-magnitude.reshape(*magnitude.shape[:-2], -1), axis=-1)
    held = np.cumsum(flat, -1)
    return (held < share * held[..., -1:]).sum(-1) + 1
