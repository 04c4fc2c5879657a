"""Curvature of the loss as a sum of outer products: rows X with H = X^T X / count, one or several for each example.

A kind of curvature registers itself in `curvatures`: the empirical Fisher information, or the Gauss-Newton matrix of any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import take_examples, tensors_of
from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.core.registry import Registry
from microglia.scores.base import Evidence
from microglia.scores.guard import untouched
from microglia.scores.reading import loss_of, outputs_of

LARGEST = 4096
"""Outputs of one example for which Gauss-Newton is measured, at most."""
SMALL = 1e-7
"""Eigenvalues of a loss's Hessian in its outputs below this share of the largest one count as zero."""


@dataclass(frozen=True)
class Rows:
    """Rows X of a curvature H = X^T X / count over the weights of some layers.

    Attributes:
        values: By layer (rows, out, in, *kernel).
        count: Number of examples, or of groups of examples, that the rows are a mean over.
    """

    values: dict[str, Tensor]
    count: int


Curvature = Callable[[nn.Module, Mapping[str, Layer], Evidence, int], Iterator[list[Tensor]]]
"""(model, layers, evidence, examples of a group) -> for each group the rows of each layer, (rows, *weight) as stored."""

curvatures: Registry[Curvature] = Registry("curvature")


def curvature_rows(kind: str, model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence, *, examples: int = 1) -> Rows:
    """Returns the rows of a curvature on all batches, those of all ranks; the model stays as it is.

    The model is in evaluation mode. Weights under a mask have zeros.

    Args:
        kind: Name in `curvatures`.
        model: The model.
        layers: The layers whose weights count, by name.
        evidence: Batches, loss and forward.
        examples: Examples of one group, whose mean loss is differentiated; every kind may ignore it.

    Raises:
        ScoreError: There are no batches, or no loss.
    """
    if evidence.loss is None:
        raise ScoreError("Curvature is that of the loss: give batches=[(inputs, targets), ...] and loss=function.")
    found: list[list[Tensor]] = []
    with untouched(model):
        model.eval()
        for layer in layers.values():
            layer.raw.requires_grad_()
        found = list(curvatures[kind](model, layers, evidence, examples))
    if not found:
        raise ScoreError("The curvature of the loss is measured on batches: give batches=[(inputs, targets), ...].")
    values, count = [torch.cat(parts) for parts in zip(*found, strict=True)], len(found)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values, count = _gathered(values, count)
    turned = {n: v.transpose(1, 2).contiguous() if layers[n].swapped else v for n, v in zip(layers, values, strict=True)}
    return Rows(turned, count)


@curvatures.add("fisher")
def fisher_rows(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence, examples: int) -> Iterator[list[Tensor]]:
    """Yields the gradient of each group's mean loss: the empirical Fisher information."""
    for inputs, targets in pieces(evidence, examples):
        loss = loss_of(evidence.loss, outputs_of(model, inputs, evidence.forward), targets)
        yield _gradients(loss, layers, None, more=False)


@curvatures.add("gauss-newton")
def gauss_newton_rows(
    model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence, examples: int
) -> Iterator[list[Tensor]]:
    """Yields J^T R for each example, R R^T the Hessian of its loss in the outputs, J their derivative by the weights."""
    for inputs, targets in pieces(evidence, 1):
        outputs = outputs_of(model, inputs, evidence.forward)
        roots = _roots(outputs, evidence, targets)
        rows = [_gradients(outputs, layers, root, more=i + 1 < len(roots)) for i, root in enumerate(roots)]
        yield [torch.cat(parts) for parts in zip(*rows, strict=True)]


def pieces(evidence: Evidence, examples: int) -> Iterator[tuple[Any, Any]]:
    """Yields the batches in pieces of at most ``examples``.

    Raises:
        ScoreError: A batch is to be cut, and its targets are not one row for each example, such as lists of boxes.
    """
    for inputs, targets in evidence.batches:
        total = evidence.count(targets)
        if total <= examples:
            yield inputs, targets
            continue
        if any(tensor.ndim and len(tensor) != total for tensor in tensors_of(targets)):
            raise ScoreError(
                f"A score takes {examples} of {total} examples at a time, and the targets of this task have no row for each: "
                f"give batches of {examples}, such as score_batch_size={examples}."
            )
        for first in range(0, total, examples):
            some = torch.arange(first, min(first + examples, total))
            yield take_examples(inputs, some), take_examples(targets, some)


def _roots(outputs: Any, evidence: Evidence, targets: Any) -> Sequence[Tensor]:
    """Returns directions in the space of the outputs whose outer products sum up to the loss's Hessian there; at least one."""
    if not isinstance(outputs, Tensor):
        raise ScoreError(f"Gauss-Newton needs one tensor of outputs; got {type(outputs).__name__}: take fisher.")
    plain = outputs.detach()
    if plain.numel() > LARGEST:
        raise ScoreError(
            f"Gauss-Newton takes a backward pass for each output of an example, at most {LARGEST:,}, and here are "
            f"{plain.numel():,}: take fisher."
        )
    hessian = torch.autograd.functional.hessian(lambda o: loss_of(evidence.loss, o, targets), plain)  # type: ignore[no-untyped-call]
    values, vectors = torch.linalg.eigh(hessian.reshape(plain.numel(), plain.numel()).double())  # type: ignore[attr-defined]
    large = values > SMALL * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    if not bool(large.any()):
        return [torch.zeros_like(plain)]
    return [row.to(plain.dtype).view_as(plain) for row in (vectors * values.clamp_min(0).sqrt()).T[large]]


def _gradients(outputs: Tensor, layers: Mapping[str, Layer], direction: Tensor | None, *, more: bool) -> list[Tensor]:
    """Returns the gradients of each layer's weight, (1, *weight); zeros where the outputs do not depend on it."""
    weights = [layer.raw for layer in layers.values()]
    found = torch.autograd.grad(outputs, weights, direction, retain_graph=more, allow_unused=True)
    return [torch.zeros_like(w)[None] if g is None else g.detach()[None] for w, g in zip(weights, found, strict=True)]


def _gathered(values: Sequence[Tensor], count: int) -> tuple[list[Tensor], int]:
    """Returns the rows of all ranks, in the order of the ranks."""
    world = torch.distributed.get_world_size()
    sizes: list[Any] = [None] * world
    torch.distributed.all_gather_object(sizes, (len(values[0]), count))
    most = max(rows for rows, _ in sizes)
    joined = []
    for value in values:
        padded = value.new_zeros(most, *value.shape[1:])
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded)
        joined.append(torch.cat([part[:rows] for part, (rows, _) in zip(parts, sizes, strict=True)]))
    return joined, sum(number for _, number in sizes)
