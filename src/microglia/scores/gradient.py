"""Scores from the gradient of the loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.core.sharded import gathers_itself, whole, zeros_whole
from microglia.scores.base import Evidence, score
from microglia.scores.guard import in_training
from microglia.scores.reading import loss_of, outputs_of


@score("gradient", shards=True)
def gradient_magnitude(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns |w * dL/dw|, the first-order change of the loss when w is removed (Blalock et al. 2020, ShrinkBench).

    The gradient is that of the mean loss over all batches, summed with its sign before the absolute value. The model is in
    training mode as in the paper's code, but without dropout. On several ranks it is the gradient over all their batches
    together.
    """
    gradients = loss_gradient(in_training(model), layers, evidence)
    return {name: (layer.weight.detach() * gradients[name]).abs() for name, layer in layers.items()}


def loss_gradient(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns dL/dw of the mean loss over all batches of all ranks; ``.grad`` is not touched.

    Raises:
        ScoreError: There are no batches or no loss, or the loss is not finite.
    """
    if evidence.loss is None:
        raise ScoreError("This score differentiates the loss: give batches=[(inputs, targets), ...] and loss=function.")
    raw = [layer.raw.requires_grad_() for layer in layers.values()]
    if gathers_itself(model):
        return _gradient_of_shards(model, layers, evidence)
    total = [zeros_whole(p, torch.float32) for p in raw]
    count = torch.zeros((), device=raw[0].device)
    for inputs, targets in evidence.batches:
        if not (examples := evidence.count(targets)):  # a rank may have an empty batch at the end of an epoch
            continue
        loss = loss_of(evidence.loss, outputs_of(model, inputs, evidence.forward), targets)
        gradients = torch.autograd.grad(loss, raw, allow_unused=True)
        for mean, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                mean.add_(whole(gradient), alpha=examples)
        count += examples
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in [*total, count]:
            torch.distributed.all_reduce(tensor)
    if count == 0:
        raise ScoreError("This score needs at least one batch of (inputs, targets); it got none.")
    return {name: tensor / count for name, tensor in zip(layers, total, strict=True)}


def _gradient_of_shards(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the same for FSDP2, whose backward pass alone reaches the shards and averages over the ranks.

    Every rank takes part in every pass, so each needs as many batches as the others. `untouched` restores ``.grad``.
    """
    assert evidence.loss is not None
    batches = [(inputs, targets, n) for inputs, targets in evidence.batches if (n := evidence.count(targets))]
    device = next(iter(layers.values())).raw.device
    mine = torch.tensor([len(batches), sum(n for *_, n in batches)], device=device)
    ranks = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(ranks, mine)
    counts = [int(rank[0]) for rank in ranks]
    if min(counts) == 0 or min(counts) != max(counts):
        raise ScoreError(f"With sharded parameters each rank needs the same number of batches, at least one; got {counts}.")
    for parameter in model.parameters():
        parameter.grad = None
    for inputs, targets, examples in batches:
        (loss_of(evidence.loss, outputs_of(model, inputs, evidence.forward), targets) * examples).backward()  # type: ignore[no-untyped-call]
    count = sum(int(rank[1]) for rank in ranks) / len(ranks)
    found = {name: layer.raw.grad for name, layer in layers.items()}
    return {
        name: torch.zeros(layers[name].shape, device=device) if gradient is None else whole(gradient).float() / count
        for name, gradient in found.items()
    }
