"""Heads that start as the best affine maps for their targets, instead of at random.

One pass of the dense network gives each head's inputs and targets before any training: a logistic regression for each layer.
These heads follow the input from the first step on, so that even a short training can adapt the network. This method is ours,
not the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.batch import call, to_device
from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.dynamic.gates import Gate, Passage, gates_of, listening

RIDGE = 1e-3
"""Weight of the squared weights, added to the mean loss; every input has unit variance."""
ITERATIONS = 60  # steps of L-BFGS; the loss is convex


def fit_heads(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """Makes each head the logistic regression of its targets on its inputs, in place, without active masks.

    On several ranks with the same batches, all use the first rank's heads.

    Args:
        model: A model with gates that have their r.
        batches: A few batches of training inputs; the inputs of heads are kept in memory.

    Raises:
        MicrogliaError: The batches have no image, or the model has no gate.

    Returns:
        Layer -> fraction of these inputs and filters on which head and target agree.
    """
    device = next(model.parameters()).device
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hear(passage: Passage) -> None:
        seen.setdefault(passage.gate.site.layer, []).append((passage.embedded.detach(), passage.target()))

    with torch.no_grad(), evaluating(model), listening(model, hear, fade=0.0):
        for inputs, _ in batches:
            call(model, to_device(inputs, device))
    if not any(len(embedded) for parts in seen.values() for embedded, _ in parts):
        raise MicrogliaError(
            "Heads are fitted to images of the training data: give at least one batch, and a model with gates."
        )
    agreement = {}
    for layer, gate in gates_of(model).items():
        embedded, wanted = (torch.cat(parts) for parts in zip(*seen.pop(layer), strict=True))
        wide = torch.promote_types(embedded.dtype, torch.float32)  # half precision is too coarse for a line search
        _regress(gate, embedded.to(wide), wanted.to(wide))
        with torch.no_grad():
            agreement[layer] = float(((gate.logits(embedded) > 0) == wanted).double().mean())
    return agreement


@torch.enable_grad()
def _regress(gate: Gate, embedded: Tensor, wanted: Tensor) -> None:
    mean = embedded.mean(0)
    scale = (embedded - mean).square().mean(0).sqrt()
    scale = torch.where(scale > 1e-6 * (1e-6 + mean.abs()), scale, torch.inf)  # constant inputs carry no information
    inputs = (embedded - mean) / scale
    weight = torch.zeros_like(gate.weight, dtype=inputs.dtype, requires_grad=True)
    bias = torch.zeros_like(gate.bias, dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        said = functional.linear(inputs, weight, bias)
        entropy = functional.binary_cross_entropy_with_logits(said, wanted, reduction="sum") / len(inputs)
        value = entropy + RIDGE * (weight.square().sum() + bias.square().sum())  # the bias too: some filters never fire
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        gate.weight.copy_(weight / scale)
        gate.bias.copy_(bias - (weight / scale) @ mean)
        if torch.distributed.is_initialized():
            for parameter in gate.parameters():
                torch.distributed.broadcast(parameter, src=0)
