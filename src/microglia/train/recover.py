"""Recovery: batch-norm recalibration and distillation from the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import Example, call, to_device
from microglia.core.devices import device_of
from microglia.core.errors import TrainingError
from microglia.core.modes import evaluating
from microglia.tasks.task import DistanceOnTargets, Task, softened_divergence
from microglia.train.engine import rank_and_world

Norm = nn.modules.batchnorm._BatchNorm


RECALIBRATION = 20
"""Default number of training batches to estimate the statistics of a pruned network."""


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    *,
    count: int = 100,
    forward: Callable[[nn.Module, Any], Any] = call,
) -> nn.Module:
    """Estimates batch-norm statistics again, in place, by their average over up to ``count`` batches.

    After a change of weights without training the running statistics are stale. The average is cumulative: batch i enters with
    momentum n_i / (n_1 + ... + n_i), because the usual 0.1 does not converge in few batches (survey 0.7; Garipov et al. 2018).
    A single example after larger batches is left out. Only batch-norm modules are in train mode during this. On several ranks
    each rank averages its own batches; then the ranks' statistics are averaged, weighted by their numbers of examples.

    Args:
        model: Any module; without batch-norm statistics it stays unchanged and no batch is drawn.
        batches: (inputs, targets), **augmented as in training**: statistics of images that were not augmented cost a trained
            ResNet-20 three points (see `recalibrate_on`). Inputs are a tensor, a tuple of arguments or a mapping of keywords.
        count: Maximum number of batches.
        forward: (model, inputs) -> outputs.

    Returns:
        The model; its modes and momenta are unchanged.

    Raises:
        TrainingError: There is no example in the batches. After this and every other error the model is unchanged.
    """
    norms = [m for m in model.modules() if isinstance(m, Norm) and m.track_running_stats]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        with evaluating(model):
            seen = _estimate(model, norms, islice(batches, count), forward)
            if not _averaged(norms, seen):
                raise TrainingError(
                    "recalibrate was given no example, so there is nothing to estimate batch-norm statistics from: pass "
                    "batches that are not used up."
                )
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model


def recalibrate_on(model: nn.Module, task: Task, *, batch_size: int, count: int = RECALIBRATION, seed: int = 0) -> nn.Module:
    """Estimates batch-norm statistics again on batches as in training: shuffled by ``seed``, augmented; see `recalibrate`.

    Args:
        model: Changed in place.
        task: The task whose training images are used.
        batch_size: Examples in a batch, over all ranks.
        count: Maximum number of batches; 0 leaves the model unchanged.
        seed: Seed of order and augmentation.
    """
    if not count:
        return model
    rank, world = rank_and_world()
    batches = task.data.batches("train", batch_size, seed=seed, shuffle=True, augment=True, rank=rank, world=world)
    return recalibrate(model, batches.epoch(0), count=count, forward=task.forward)


def _estimate(
    model: nn.Module,
    norms: Sequence[Norm],
    batches: Iterable[tuple[Any, Any]],
    forward: Callable[[nn.Module, Any], Any],
) -> int:
    """Lets norms average the statistics of batches; returns the number of examples seen."""
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen, largest, device = 0, 0, device_of(model)
    for inputs, _ in batches:
        example = to_device(inputs, device)
        examples = Example.of(example).batch
        if not examples or examples == 1 < largest:  # a last batch of one has no variance in maps of one place
            continue
        seen, largest = seen + examples, max(largest, examples)
        for norm in norms:
            norm.momentum = examples / seen
        forward(model, example)
    return seen


def _averaged(norms: Sequence[Norm], seen: int) -> int:
    """Averages statistics over the ranks, weighted by their examples; returns the examples of all ranks."""
    if rank_and_world()[1] == 1:
        return seen
    weight = torch.tensor(float(seen), device=device_of(norms[0]))
    total = weight.clone()
    torch.distributed.all_reduce(total)
    for tensor in (b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None):
        tensor.mul_(weight)
        torch.distributed.all_reduce(tensor)
        tensor.div_(total.clamp(min=1))
    return int(total)


def distillation(
    loss: Callable[[Any, Any], Tensor],
    teacher: nn.Module,
    *,
    weight: float,
    temperature: float,
    forward: Callable[[nn.Module, Any], Any] = call,
    distance: Callable[[Any, Any, float], Tensor] = softened_divergence,
) -> Callable[[Any, Any, Any], Tensor]:
    """Returns a loss of (outputs, targets, inputs) that adds the teacher's softened predictions.

    (1 - weight) loss + weight T^2 KL(teacher / T || student / T) (Hinton et al. 2015); the teacher is in eval mode.

    Args:
        loss: Mean loss of (outputs, targets).
        teacher: Dense model.
        weight: Share of the distillation, in [0, 1).
        temperature: T > 0.
        forward: (teacher, inputs) -> outputs.
        distance: (student's outputs, teacher's outputs, T) -> mean divergence.
    """
    teacher.eval()
    on_targets = distance.on_targets if isinstance(distance, DistanceOnTargets) else None

    def mixed(outputs: Any, targets: Any, inputs: Any) -> Tensor:
        with torch.no_grad():
            wanted = forward(teacher, inputs)
        divergence = (
            distance(outputs, wanted, temperature) if on_targets is None else on_targets(outputs, wanted, targets, temperature)
        )
        return (1 - weight) * loss(outputs, targets) + weight * temperature**2 * divergence

    return mixed
