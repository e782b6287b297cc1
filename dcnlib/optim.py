"""Parameter groups: a learning rate of its own for whatever predicts offsets and masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ._problem import real, type_error, value_error

#: Names of modules that predict offsets or masks: ours and mmcv's, then those of other code.
PREDICTORS = (
    "conv_offset",
    "offset_fc",
    "mask_fc",
    "conv_offset_mask",
    "offset_conv",
    "mask_conv",
    "modulator_conv",
    "offset_generator",
    "mask_generator",
)

_OP = "optim.offset_param_groups"


def offset_param_groups(
    model: nn.Module, base_lr: float, mult: float = 0.1, *, predictors: Iterable[str] = PREDICTORS
) -> list[dict[str, Any]]:
    """The parameters of a model in two groups: all others at `base_lr`, predictors at a part of it.

    Zhu et al. 2019 train the predictors of offsets and masks at a tenth of the learning rate; Dai et
    al. 2017 those of RoI pooling at a hundredth, those of convolutions at the full one.

    Parameters
    ----------
    model : torch.nn.Module
    base_lr : float
    mult : float
        The predictors' learning rate over `base_lr`.
    predictors : iterable of str
        Names of modules, anywhere in the model, all of whose parameters count as predictors'. A module
        in several places has several names.

    Returns
    -------
    list of two dicts
        For any optimizer of torch: ``params`` and ``lr`` of the others, then of the predictors.

    Raises
    ------
    ValueError
        If a rate is negative or not finite, or the model has no module of any of the names: a group
        without effect would go unseen.
    TypeError
        For arguments of the wrong kind.

    Examples
    --------
    >>> import torch
    >>> from dcnlib import nn, optim
    >>> net = torch.nn.Sequential(nn.ModulatedDeformConv2dPack(3, 8, 3), torch.nn.Conv2d(8, 8, 1))
    >>> groups = optim.offset_param_groups(net, 0.01)
    >>> [(len(group["params"]), round(group["lr"], 6)) for group in groups]
    [(4, 0.01), (2, 0.001)]
    >>> optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    """
    if not isinstance(model, nn.Module):
        raise type_error(_OP, "model", "must be a module", "torch.nn.Module", type(model).__name__)
    rates = {"base_lr": real(_OP, "base_lr", base_lr), "mult": real(_OP, "mult", mult)}
    for name, rate in rates.items():
        if rate < 0:
            raise value_error(_OP, name, "must not be negative", "0 or more", rate)
    if isinstance(predictors, str) or not isinstance(predictors, Iterable):
        raise type_error(
            _OP, "predictors", "must be names", "a list of str", type(predictors).__name__
        )
    names, groups = frozenset(predictors), ([], [])
    if not all(isinstance(name, str) for name in names):
        raise type_error(_OP, "predictors", "must be names", "a list of str", predictors)
    predicting = {
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not names.isdisjoint(name.split(".")[:-1])
    }
    for parameter in model.parameters():
        groups[parameter in predicting].append(parameter)
    if not groups[1]:
        raise value_error(
            _OP, "model", "must have modules that predict offsets", ", ".join(sorted(names)), "none",
            "name yours with predictors=[...]",
        )  # fmt: skip
    lr = rates["base_lr"]
    return [{"params": groups[0], "lr": lr}, {"params": groups[1], "lr": lr * rates["mult"]}]
