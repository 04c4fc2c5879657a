"""Scores of whole filters from their maps: the rank, and the sensitivity of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.scores.base import Evidence, per_filter, rows, score
from microglia.scores.behind import NORMS, Norm, follow, norms_behind
from microglia.scores.gradient import loss_gradient
from microglia.scores.guard import in_training
from microglia.scores.reading import loss_of, outputs_of


@score("hrank", filters=True)
@torch.no_grad()
def hrank(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the mean rank of each filter's map after its activation, over all images (Lin et al. 2020, equation 5).

    Equal ranks are ordered by the mean norm of the maps, which adds less than one image's rank. The model runs in evaluation
    mode. The last layer of a residual block is ranked after the sum with the shortcut, as in the authors' code.

    Raises:
        ScoreError: There is no batch, or the model is a traced graph.
    """
    return mean_ranks(layers, ranks_by_batch(model, layers, evidence))


@torch.no_grad()
def ranks_by_batch(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, list[Tensor]]:
    """Returns for each layer one tensor for each batch, float64 (3, out): sums of ranks and of norms of maps, images.

    Raises:
        ScoreError: There is no batch, or the model is a traced graph.
    """
    sums: dict[str, list[Tensor]] = {}

    def note(name: str, found: Tensor) -> None:
        new = [map_ranks(found).sum(0), map_norms(found).sum(0), found.new_full((found.shape[1],), len(found)).double()]
        sums.setdefault(name, []).append(torch.stack(new))

    follow(model.eval(), layers, evidence, note)
    return sums


def mean_ranks(layers: Mapping[str, Layer], found: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Returns the score `hrank` of every layer from the sums of `ranks_by_batch`."""
    sums = {name: sum(batches[1:], batches[0]) for name, batches in found.items()}
    return {name: per_filter(layer, _ordered(layer, sums.get(name))) for name, layer in layers.items()}


def map_ranks(maps: Tensor) -> Tensor:
    """Returns the rank of each map, float64 (batch, channels): singular values above max(H, W) eps times the largest.

    Args:
        maps: (batch, channels, *positions): the last position is the width, those before it the height.
    """
    width = maps.shape[-1] if maps.ndim > 2 else 1
    found: Tensor = torch.linalg.matrix_rank(maps.float().reshape(*maps.shape[:2], -1, width))
    return found.double()


def map_norms(maps: Tensor) -> Tensor:
    """Returns the Euclidean norm of each map, float64 (batch, channels)."""
    return maps.double().flatten(2).norm(dim=-1) if maps.ndim > 2 else maps.double().abs()


def _ordered(layer: Layer, sums: Tensor | None) -> Tensor:
    """Returns the mean rank plus less than one image's rank for the norm, (out,); ones for a layer that is never called."""
    if sums is None:
        return torch.ones(layer.sides[0], dtype=torch.float64, device=layer.raw.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    ranks, norms, images = sums.unbind()
    return (ranks + norms / (norms.max() * 2).clamp_min(torch.finfo(norms.dtype).tiny)) / images


@score("taylor", filters=True)
def taylor(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns (dL/dz)^2 of a gate z = 1 on each filter after its norm (Molchanov et al. 2019, section 3).

    dL/dz is that of the mean loss over all batches of all ranks, squared after averaging. It equals gamma dL/dgamma + beta
    dL/dbeta of the norm, not the sum of w dL/dw of the filter, which is 0 under batch norm. The model is in training mode,
    without dropout.

    Raises:
        ScoreError: There are no batches or no loss, the loss is not finite, or the model is a traced graph.
    """
    gradients = gate_gradients(in_training(model), layers, evidence)
    return {name: per_filter(layer, gradients[name].square()) for name, layer in layers.items()}


@score("taylor-weights", filters=True)
def taylor_weights(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the sum over each filter of (w dL/dw)^2, the weight variant of Molchanov et al. 2019; in train mode.

    Raises:
        ScoreError: There are no batches or no loss, or the loss is not finite.
    """
    gradients = loss_gradient(in_training(model), layers, evidence)
    found = {}
    for name, layer in layers.items():
        gradient = gradients[name].transpose(0, 1) if layer.swapped else gradients[name]
        found[name] = per_filter(layer, (rows(layer) * gradient.flatten(1)).square().sum(1))
    return found


def gate_gradients(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns dL/dz by layer, float64 (out,), for gates z = 1 on the outputs after each layer's norm; see `taylor`.

    Args:
        model: Any module, in the mode to run in. A layer that is not called itself, as inside attention, gets zeros.
        layers: Layers by name.
        evidence: Batches and loss.
    """
    if evidence.loss is None:
        raise ScoreError("This score differentiates the loss: give batches=[(inputs, targets), ...] and loss=function.")
    norms = norms_behind(model, layers, evidence)
    called = {name: layer for name, layer in layers.items() if layer.kind.inputs is not None}
    sites = {name: norms.get(name, Norm(layer.module, slice(0, layer.sides[0]))) for name, layer in called.items()}
    dims = {site.module: called[name].kind.inputs or 1 for name, site in sites.items()}
    device = next(iter(layers.values())).raw.device
    sizes = {m: len(cast(Tensor, m.weight)) if isinstance(m, NORMS) else _outputs(layers, m) for m in dims}
    gates = {m: torch.ones(sizes[m], device=device, requires_grad=True) for m in dims}
    total = {m: torch.zeros(sizes[m], dtype=torch.float64, device=device) for m in dims}

    def gated(module: nn.Module, args: Any, output: Any) -> Any:
        shape = [1] * output.ndim
        shape[dims[module]] = -1
        return output * gates[module].to(output.dtype).view(shape)

    handles = [module.register_forward_hook(gated) for module in dims]
    count = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for inputs, targets in evidence.batches:
            if not (examples := evidence.count(targets)):
                continue
            loss = loss_of(evidence.loss, outputs_of(model, inputs, evidence.forward), targets)
            found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
            for module, gradient in zip(gates, found, strict=True):
                total[module].add_(gradient.double(), alpha=examples)
            count += examples
    finally:
        for handle in handles:
            handle.remove()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in [*total.values(), count]:
            torch.distributed.all_reduce(tensor)
    if count == 0:
        raise ScoreError("This score needs at least one batch of (inputs, targets); it got none.")
    zeros = {name: torch.zeros(layer.sides[0], dtype=torch.float64, device=device) for name, layer in layers.items()}
    return {**zeros, **{name: total[site.module][site.channels] / count for name, site in sites.items()}}


def _outputs(layers: Mapping[str, Layer], module: nn.Module) -> int:
    """Returns the number of outputs of a layer's module."""
    return next(layer.sides[0] for layer in layers.values() if layer.module is module)
