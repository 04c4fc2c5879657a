"""Training and evaluation modes of a model's modules: set for a while, then restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module, *, through_train: bool = False) -> Iterator[None]:
    """Restores the mode of every module at the end, also after an error.

    Args:
        model: Any module; its modules may be in different modes.
        through_train: Whether the model's ``train()`` is called before the flags are set one by one. A class may override
            ``train`` to make or discard tensors of one mode, such as merged weights.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        if through_train:
            model.train(modes[model])
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode and can be run; afterwards every module has its own mode again.

    Both changes call the model's own ``eval()`` and ``train()``, as a user's loop does.
    """
    with modes_kept(model, through_train=True):
        model.eval()
        yield


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Context to read tensors of a model as in evaluation mode, without gradients; the model neither runs nor changes.

    Only the flags are set, because a class may override ``eval()`` to change weights. A parametrization with a state of its own
    (spectral norm) thus returns its tensor without an update of that state.
    """
    with modes_kept(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Context in which passes in training mode leave the running statistics of batch norms as they are."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Context in which the models of transformers keep no keys and values of earlier calls."""
    configs: list[Any] = [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")]
    configs = list({id(config): config for config in configs}.values())
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.use_cache = value
