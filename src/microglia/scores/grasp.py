"""GraSP: keep the weights whose removal would reduce the flow of gradients (Wang, Zhang and Grosse 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import map_tensors
from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.scores.base import Evidence, score
from microglia.scores.guard import in_training
from microglia.scores.reading import loss_of, outputs_of

TEMPERATURE = 200.0
"""Divides the logits, which suppresses the curvature of the softmax relative to that of the network (survey 7.2, traps)."""


@score("grasp")
def grasp(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns w * Hg: removing w changes |g|^2 by -2 w (Hg) to first order; weights whose removal raises it go first.

    This is minus the score S of the paper (algorithm 1), because here higher = keep. A batch is a chunk: gradients and
    Hessian-gradient products are summed over chunks, so the memory is that of one chunk. The model is in training mode, as in
    the authors' code, but without dropout.

    Raises:
        ScoreError: There are no batches or no loss, the loss is not finite, or a layer has no second derivative.
    """
    product = hessian_gradient(in_training(model), layers, evidence)
    return {name: layer.weight.detach() * product[name] for name, layer in layers.items()}


@score("grasp-magnitude")
def grasp_magnitude(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns |w * Hg|, the variant that Frankle et al. 2021 found better than GraSP's own sign."""
    return {name: value.abs() for name, value in grasp(model, layers, evidence).items()}


def hessian_gradient(
    model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence, *, temperature: float = TEMPERATURE
) -> dict[str, Tensor]:
    """Returns Hg of the mean loss over all batches of all ranks, for the weights of the layers; ``.grad`` is not touched.

    g = sum_c n_c / n grad L_c and Hg = sum_c n_c / n H_c g over chunks c of n_c examples: the product uses the sum of the
    gradients, not the gradient of each chunk.

    Args:
        model: Any module, in the mode to score in.
        layers: The block of weights; H is the Hessian with respect to them alone.
        evidence: Chunks of (inputs, targets), and a loss of (logits, targets).
        temperature: Divides the logits, > 0.

    Raises:
        ScoreError: As `grasp`.
    """
    if evidence.loss is None:
        raise ScoreError("GraSP differentiates the loss twice: give batches=[(inputs, targets), ...] and loss=function.")
    batches = [(x, y) for x, y in evidence.batches if evidence.count(y)]
    raw: list[Tensor] = [layer.raw.requires_grad_() for layer in layers.values()]
    count = float(_over_ranks([torch.tensor(float(sum(evidence.count(y) for _, y in batches)), device=raw[0].device)])[0])
    if count == 0:
        raise ScoreError("This score needs at least one batch of (inputs, targets); it got none.")

    def gradient(inputs: Any, targets: Any, *, again: bool) -> tuple[Tensor, ...]:
        assert evidence.loss is not None
        loss = loss_of(evidence.loss, softened(outputs_of(model, inputs, evidence.forward), temperature), targets)
        scaled = loss * (evidence.count(targets) / count)
        return torch.autograd.grad(scaled, raw, create_graph=again, allow_unused=True, materialize_grads=True)

    flow = _over_ranks(_total(raw, (gradient(x, y, again=False) for x, y in batches)))
    product = _over_ranks(_total(raw, (_twice(gradient(x, y, again=True), flow, raw) for x, y in batches)))
    return dict(zip(layers, product, strict=True))


def softened(outputs: Any, temperature: float) -> Any:
    """Returns the outputs with every floating-point tensor among them divided by a temperature."""
    return map_tensors(lambda tensor: tensor / temperature if tensor.is_floating_point() else tensor, outputs)


def _twice(gradients: tuple[Tensor, ...], flow: list[Tensor], raw: list[Tensor]) -> tuple[Tensor, ...]:
    """Returns the derivative of <stop(g), gradients>: the Hessian of one chunk times g."""
    along = sum(((own * whole).sum() for own, whole in zip(gradients, flow, strict=True)), torch.zeros(()).to(flow[0]))
    try:
        return torch.autograd.grad(along, raw, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        raise ScoreError(
            f"GraSP needs second derivatives, and this model has none ({error}). A fused or custom layer without a double "
            "backward pass is the usual reason; score by snip or synflow instead."
        ) from error


def _total(like: list[Tensor], parts: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in like]
    for part in parts:
        for mean, own in zip(total, part, strict=True):
            mean.add_(own.detach())
    return total


def _over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
    return tensors
