"""Scores from a quadratic model of the loss: Wanda, OBS, the empirical Fisher, OBD. They rank; none changes a weight.

OBD's diagonal has three estimators, the values of `estimators`: Gauss-Newton, Hutchinson's, the empirical Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import take_examples
from microglia.core.errors import ScoreError
from microglia.core.layers import GraphLayer, Layer, oriented
from microglia.core.registry import Registry
from microglia.scores.base import Evidence, Score, score, scores
from microglia.scores.curvature import pieces
from microglia.scores.reading import loss_of, outputs_of
from microglia.scores.second_moments import Moments, matrix_of, weight_of

DRAWS = 100
"""Random vectors of Hutchinson's estimator."""
DAMPENING = 0.01
"""Fraction of the mean of a Hessian's diagonal that is added to it, as in SparseGPT."""


@score("wanda")
def wanda(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns abs(W_ij) times the root mean square of input j (Sun et al. 2023); compare it within rows, scope ``row``.

    A layer that is never called itself gets its magnitude.

    Raises:
        ScoreError: There are no batches, or the model is a traced graph.
    """
    found = input_moments(model, layers, evidence, whole=False)
    return _by_layer(layers, found, wanda_values, torch.abs)


@score("obs")
def obs(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns W_ij^2 / (2 [H^-1]_jj), the OBS saliency of each layer's own squared error, H = 2 E[x x^T] + lambda I.

    It is the rise of the layer's squared error if the weight goes and the others of its row compensate (Hassibi, Stork 1992).
    A layer that is never called itself gets half its squared magnitude.

    Raises:
        ScoreError: There are no batches, or the model is a traced graph.
    """

    def saliency(weight: Tensor, moments: Tensor) -> Tensor:
        hessian = 2 * moments
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        diagonal += (DAMPENING * diagonal.mean(1, keepdim=True)).clamp_min(torch.finfo(hessian.dtype).tiny ** 0.5)
        inverse = torch.linalg.inv(hessian).diagonal(dim1=-2, dim2=-1)
        matrix = matrix_of(weight)
        rows = (2 * inverse).repeat_interleave(len(matrix) // len(inverse), 0)
        return weight_of(matrix.to(rows.dtype).square() / rows, tuple(weight.shape))

    found = input_moments(model, layers, evidence, whole=True)
    return _by_layer(layers, found, saliency, lambda weight: weight.square() / 2)


@score("fisher")
def fisher(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns w^2 E[g^2] / 2, g the gradient of one example's loss: the loss change by the empirical Fisher diagonal.

    Raises:
        ScoreError: There are no batches, or no loss.
    """
    if evidence.loss is None:
        raise ScoreError("This score differentiates the loss: give batches=[(inputs, targets), ...] and loss=function.")
    model.eval()
    found, count = _sums(layers), 0
    for inputs, targets in pieces(evidence, 1):
        loss = loss_of(evidence.loss, outputs_of(model, inputs, evidence.forward), targets)
        _add_squares(found, layers, loss[None], torch.ones_like(loss[None])[None])
        count += 1
    return _halved(layers, found, count)


@score("obd")
def obd(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns w^2 h / 2, h the Gauss-Newton diagonal of the mean softmax cross-entropy (LeCun et al. 1989).

    With logits z and probabilities p, diag(p) - p p^T = sum_c R_c R_c^T, R_c = sqrt(p_c) (e_c - p). So h is the mean over
    examples of the squared gradients of R_c^T z, summed over the classes: one backward pass for each class.

    Raises:
        ScoreError: There are no batches, or the outputs are no logits (batch, classes).
    """
    model.eval()
    found, count = _sums(layers), 0
    for inputs, targets in evidence.batches:
        for index in range(evidence.count(targets)):
            logits = outputs_of(model, take_examples(inputs, torch.tensor([index])), evidence.forward)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ScoreError("OBD needs logits of shape (batch, classes), for softmax cross-entropy: take fisher.")
            chances = logits.detach().softmax(1)[0]
            roots = chances.sqrt()[:, None] * (torch.eye(len(chances), device=chances.device).to(chances) - chances)
            _add_squares(found, layers, logits[0], roots)
            count += 1
    return _halved(layers, found, count)


@score("hutchinson")
def hutchinson(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns w^2 h / 2, h = E[v * (H v)] the diagonal of the loss's Hessian, v random signs; h may be negative.

    Each batch takes its share of the `DRAWS` random vectors, so that the mean is over both. The network must be differentiable
    twice.

    Raises:
        ScoreError: There are no batches, or no loss.
    """
    if evidence.loss is None:
        raise ScoreError("This score differentiates the loss: give batches=[(inputs, targets), ...] and loss=function.")
    model.eval()
    found, count, batches = _sums(layers), 0, list(evidence.batches)
    draws = -(-DRAWS // max(1, len(batches)))
    for inputs, targets in batches:
        loss = loss_of(evidence.loss, outputs_of(model, inputs, evidence.forward), targets)
        examples = evidence.count(targets)
        _add_curvature(found, layers, examples * loss, draws, evidence.generator)
        count += examples
    return _halved(layers, found, count)


estimators: Registry[Score] = Registry("estimator")
"""Estimators of OBD's saliency w^2 h / 2, by name."""
estimators.add("gauss-newton")(scores["obd"])
estimators.add("hutchinson")(scores["hutchinson"])
estimators.add("fisher")(scores["fisher"])


def wanda_values(weight: Tensor, moments: Tensor) -> Tensor:
    """Returns abs(W) times the root mean square of its inputs, in the precision of the moments.

    Args:
        weight: (out, in, *kernel).
        moments: E[x^2], (groups, columns) as `microglia.scores.second_moments` orders them.
    """
    matrix, groups = matrix_of(weight.abs()), len(moments)
    values = matrix.view(groups, -1, matrix.shape[1]) * moments.sqrt()[:, None]
    return weight_of(values.view_as(matrix), tuple(weight.shape))


@torch.no_grad()
def input_moments(
    model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence, *, whole: bool
) -> dict[str, Tensor | None]:
    """Returns the second moments of each layer's inputs over the batches; None for a layer that is never called itself.

    Raises:
        ScoreError: There are no batches, or the model is a traced graph.
    """
    if any(isinstance(layer.module, GraphLayer) for layer in layers.values()):
        raise ScoreError(
            "Moments are measured where a layer is called, and this model came back from shrinking as a graph, whose layers "
            "are operators: take a score of weights or gradients."
        )
    sums = {name: Moments(layer, whole=whole) for name, layer in layers.items() if layer.kind.inputs is not None}

    def hook(name: str) -> Any:
        return lambda module, args, output: sums[name].add(module, args[0])

    handles = [module.register_forward_hook(hook(name)) for name in sums for module in _modules(layers[name])]
    read = False
    try:
        model.eval()
        for inputs, _ in evidence.batches:
            outputs_of(model, inputs, evidence.forward)
            read = True
    finally:
        for handle in handles:
            handle.remove()
    if not read:
        raise ScoreError("Second moments of inputs are measured on batches: give batches=[(inputs, targets), ...].")
    return {name: sums[name].mean() if name in sums and sums[name].count else None for name in layers}


def _modules(layer: Layer) -> list[nn.Module]:
    """Returns the modules that multiply a weight: all holders of its kind."""
    return [module for module, _ in layer.holders if type(module) is type(layer.module)]


def _by_layer(
    layers: Mapping[str, Layer],
    moments: Mapping[str, Tensor | None],
    values: Callable[[Tensor, Tensor], Tensor],
    unread: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Returns the values of each layer in the layout of its weight; ``unread`` gives those of a layer without moments."""
    weights = oriented(layers, {name: layer.weight.detach() for name, layer in layers.items()})
    found = {}
    for name, weight in weights.items():
        own = moments[name]
        found[name] = (unread(weight) if own is None else values(weight, own)).to(weight.dtype)
    return oriented(layers, found)


def _sums(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Returns zeros for the squared gradients of each layer, whose weights then get gradients."""
    for layer in layers.values():
        layer.raw.requires_grad_()
    return {name: torch.zeros(layer.shape, dtype=torch.float64, device=layer.raw.device) for name, layer in layers.items()}


def _add_squares(found: dict[str, Tensor], layers: Mapping[str, Layer], outputs: Tensor, directions: Tensor) -> None:
    """Adds the squared gradients of ``direction . outputs`` for each direction, (directions, outputs)."""
    weights = [layer.raw for layer in layers.values()]
    for index, direction in enumerate(directions):
        last = index + 1 == len(directions)
        gradients = torch.autograd.grad(outputs, weights, direction, retain_graph=not last, allow_unused=True)
        for name, gradient in zip(layers, gradients, strict=True):
            if gradient is not None:
                found[name] += gradient.double().square()


def _add_curvature(
    found: dict[str, Tensor],
    layers: Mapping[str, Layer],
    loss: Tensor,
    draws: int,
    generator: torch.Generator,
) -> None:
    """Adds the mean of ``v * (H v)`` over random signs v, the same on every rank."""
    weights = [layer.raw for layer in layers.values()]
    first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    used = [(name, w, g) for name, w, g in zip(layers, weights, first, strict=True) if g is not None and g.requires_grad]
    for _ in range(draws if used else 0):
        signs = [(2 * torch.randint(2, w.shape, generator=generator) - 1).to(w) for _, w, _ in used]
        first_ones, own = [g for _, _, g in used], [w for _, w, _ in used]
        second = torch.autograd.grad(first_ones, own, signs, retain_graph=True, allow_unused=True)
        for (name, _, _), sign, product in zip(used, signs, second, strict=True):
            if product is not None:
                found[name] += (sign * product).double() / draws


def _halved(layers: Mapping[str, Layer], found: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    if not count:
        raise ScoreError("The curvature of the loss is measured on batches: give batches=[(inputs, targets), ...].")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for value in found.values():
            torch.distributed.all_reduce(value)
        total = torch.tensor(float(count), device=next(iter(found.values())).device)
        torch.distributed.all_reduce(total)
        count = int(total)
    return {
        name: (layer.weight.detach().double().square() * found[name] / (2 * count)).to(layer.raw.dtype)
        for name, layer in layers.items()
    }
