"""Training and evaluation modes of a model's modules: set for a while, and put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module, *, through_train: bool = False) -> Iterator[None]:
    """Puts every module back into its own mode at the end, also after an error.

    Args:
        model: Any module; its modules may be in different modes.
        through_train: Whether its ``train()`` is called too, before the flags are set one by one. A class may write ``train``
            anew to make or forget what it needs in one mode alone, such as merged weights.
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
    """Within it a model is in evaluation mode, to be run; afterwards every module is in its own mode again.

    Both ways lead through the model's own ``eval()`` and ``train()``, as in a loop of the user's.
    """
    with modes_kept(model, through_train=True):
        model.eval()
        yield


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Within it tensors of a model are read as in evaluation mode, without gradients; nothing of the model runs or changes.

    The flags alone are set, for ``eval()`` may be rewritten to change weights. A parametrization with a state of its own
    (spectral norm) gives its tensor this way without being moved on.
    """
    with modes_kept(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        yield
