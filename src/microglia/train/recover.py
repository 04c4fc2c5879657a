"""Recovery: batch-norm recalibration and distillation from the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.train.engine import device_of


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[tuple[Any, Any]], *, count: int = 100) -> nn.Module:
    """Estimates batch-norm statistics anew, in place, by their average over up to ``count`` batches.

    Weights that change without training leave the running statistics stale. The average is cumulative: batch i enters with
    momentum n_i / (n_1 + ... + n_i), where the usual 0.1 would not converge in few batches (survey 0.7; Garipov et al. 2018).
    Only batch-norm modules are in train mode meanwhile. On several ranks each averages its own batches, then the ranks'
    statistics are averaged.

    Returns:
        The model; its modes are as before.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen, device = 0, device_of(model)
    for inputs, _ in islice(batches, count):
        if not len(inputs):
            continue
        seen += len(inputs)
        for norm in norms:
            norm.momentum = len(inputs) / seen
        model(inputs.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes.items():
        module.training = training
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _average([b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None])
    return model


def _average(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
        tensor.div_(torch.distributed.get_world_size())


def distillation(
    loss: Callable[[Any, Any], Tensor], teacher: nn.Module, *, weight: float, temperature: float
) -> Callable[[Any, Any, Any], Tensor]:
    """Returns the loss (outputs, targets, inputs) that mixes in the teacher's softened predictions.

    (1 - weight) loss + weight T^2 KL(teacher / T || student / T) (Hinton et al. 2015); the teacher is in eval mode.
    """
    teacher.eval()

    def mixed(outputs: Tensor, targets: Any, inputs: Any) -> Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(inputs) / temperature, dim=1)
        given = functional.log_softmax(outputs / temperature, dim=1)
        divergence = functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return (1 - weight) * loss(outputs, targets) + weight * temperature**2 * divergence

    return mixed
