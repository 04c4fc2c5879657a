"""NISP: importance of the last hidden responses, propagated back to every filter (Yu et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import Example, tensors_of
from microglia.core.errors import ScoreError
from microglia.core.layers import GraphLayer, Layer
from microglia.scores.base import Evidence, per_filter, score
from microglia.scores.reading import fitting, outputs_of
from microglia.scores.synflow import example_of, passing

MIXED = 0.5
"""Weight of spread against independence in the graph of responses (Roffo et al. 2015, alpha)."""
SHARE = 0.9
"""The path factor of Inf-FS, as a fraction of the largest factor with a finite sum over all paths."""


@score("nisp", filters=True)
def nisp(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns the importance that reaches each filter from the last hidden responses: s_l = |W_(l+1)|^T s_(l+1).

    The responses that the last layer reads are ranked by Inf-FS over the batches. Their importance is propagated back through
    the network of absolute weights, including shortcuts and pooling, with norms as identity. A convolution's importance is
    summed over positions.

    Raises:
        ScoreError: There is no batch, the last layer is never called, or the importance is beyond float64.
    """
    if any(isinstance(layer.module, GraphLayer) for layer in layers.values()):
        raise ScoreError("NISP follows layers that are called, and this model came back from shrinking as a graph: take l2.")
    model.eval()
    found = propagated(model, layers, example_of(evidence), final_importance(model, layers, evidence))
    return {name: per_filter(layer, found[name]) for name, layer in layers.items()}


@torch.no_grad()
def final_importance(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> Tensor:
    """Returns the importance of each response that the last layer reads, float64 (responses,)."""
    read: list[tuple[str, Tensor]] = []

    def noted(name: str) -> Any:
        return lambda module, args: read.__setitem__(slice(None), [(name, args[0])])

    handles = [layer.module.register_forward_pre_hook(noted(name)) for name, layer in _called(layers).items()]
    rows = []
    try:
        for inputs, _ in evidence.batches:
            outputs_of(model, inputs, evidence.forward)
            rows += [found.movedim(layers[name].kind.inputs or 1, -1).flatten(0, -2) for name, found in read]
    finally:
        for handle in handles:
            handle.remove()
    if not rows:
        raise ScoreError("NISP starts from what the last layer reads, and no layer of this model is called by itself: take l2.")
    return infinite_selection(torch.cat(rows).double())


def infinite_selection(responses: Tensor) -> Tensor:
    """Returns Inf-FS scores of features (Roffo et al. 2015): the energy of all paths through the graph of features.

    Args:
        responses: (examples, features).
    """
    spread = responses.std(0, unbiased=False)
    spread = spread / spread.max().clamp_min(torch.finfo(spread.dtype).tiny)
    ranks = responses.argsort(dim=0, stable=True).argsort(dim=0, stable=True).double()
    ranks = ranks - ranks.mean(0)
    length = ranks.norm(dim=0).clamp_min(1e-12)
    alike = (ranks.T @ ranks) / (length[:, None] * length)
    graph = MIXED * torch.maximum(spread[:, None], spread) + (1 - MIXED) * (1 - alike.abs())
    factor = SHARE / torch.linalg.eigvalsh(graph).abs().max().clamp_min(1e-12)
    identity = torch.eye(len(graph), dtype=graph.dtype, device=graph.device)
    paths: Tensor = torch.linalg.inv(identity - factor * graph) - identity
    return paths.sum(1)


def propagated(model: nn.Module, layers: Mapping[str, Layer], example: Any, final: Tensor) -> dict[str, Tensor]:
    """Returns the importance of each filter by layer, float64 (out,).

    Args:
        model: A model in evaluation mode.
        layers: Layers by name.
        example: Inputs of one example.
        final: Importance of each response that the last called layer reads. Its own outputs have 1.
    """
    called = _called(layers)
    shifts = {
        name: torch.zeros(layer.sides[0], dtype=torch.float64, device=layer.raw.device, requires_grad=True)
        for name, layer in called.items()
    }
    read: list[tuple[str, Tensor]] = []

    def shifted(name: str) -> Any:
        dim = layers[name].kind.inputs or 1

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            read[:] = [(name, args[0])]
            shape = [1] * output.ndim
            shape[dim] = -1
            return output + shifts[name].view(shape)

        return hook

    state = {n: p.detach().double().abs() for n, p in model.named_parameters(remove_duplicate=False)}
    state |= {n: b.double() for n, b in model.named_buffers() if b.is_floating_point()}
    ones = Example.of(example).map(lambda x: torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x)
    handles = [layer.module.register_forward_hook(shifted(name)) for name, layer in called.items()]
    try:
        with torch.enable_grad(), passing(model), fitting(model, tensors_of(example)):
            torch.func.functional_call(model, state, ones.args, ones.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    name, responses = read[0]
    goal = (responses.movedim(layers[name].kind.inputs or 1, -1) * final).sum()
    found: dict[str, Tensor] = {}
    wanted = {n: shift for n, shift in shifts.items() if n != name}
    if wanted and goal.requires_grad:
        gradients = torch.autograd.grad(goal, list(wanted.values()), allow_unused=True, materialize_grads=True)
        found = dict(zip(wanted, gradients, strict=True))
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise ScoreError("The importance that NISP propagates is beyond float64: scale the network's weights down, or take l2.")
    ones_of = {n: torch.ones(layer.sides[0], dtype=torch.float64, device=layer.raw.device) for n, layer in layers.items()}
    return {**ones_of, **found}


def _called(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    return {name: layer for name, layer in layers.items() if layer.kind.inputs is not None}
