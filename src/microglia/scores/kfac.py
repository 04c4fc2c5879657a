"""MLPrune (Zeng, Urtasun 2019): OBS's saliency over all layers, by the Kronecker-factored inverse Fisher information.

In a layer F = A (x) G: A the second moments of its inputs, summed over the positions of an example, G those of the gradients
of its outputs, their mean over positions. Both are inverted in their eigenbases, so that [F^-1] of weight (i, j) is
[G^-1]_ii [A^-1]_jj.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.layers import Layer, oriented
from microglia.scores.base import Evidence, score
from microglia.scores.reading import loss_of, outputs_of
from microglia.scores.second_moments import Moments, matrix_of, weight_of
from microglia.scores.second_order import DAMPENING


@dataclass
class _Factors:
    """The sums of one layer: of its inputs, and of the gradients of its outputs."""

    inputs: Moments
    gradients: list[Tensor] = field(default_factory=list)
    rows: int = 0

    def attach(self, module: nn.Module) -> Any:
        """Attaches a hook that adds what one forward and one backward pass show."""
        groups = int(getattr(module, "groups", 1))

        def backward(gradient: Tensor) -> None:
            rows = gradient.movedim(1, -1) if hasattr(module, "kernel_size") else gradient
            rows = rows.reshape(-1, groups, rows.shape[-1] // groups).transpose(0, 1).double()
            added = rows.transpose(1, 2) @ rows
            self.gradients = [self.gradients[0] + added] if self.gradients else [added]
            self.rows += rows.shape[1]

        def forward(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                self.inputs.add(module, args[0])
                output.register_hook(backward)  # type: ignore[no-untyped-call]

        return module.register_forward_hook(forward)


@score("mlprune")
def mlprune(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns w^2 / (2 [A^-1]_jj [G^-1]_ii), comparable over layers; the factors are dampened by a hundredth of their means.

    The gradients are those of the true labels. A layer that is never called itself gets half its squared magnitude.

    Raises:
        ScoreError: There are no batches, or no loss.
    """
    if evidence.loss is None:
        raise ScoreError("This score differentiates the loss: give batches=[(inputs, targets), ...] and loss=function.")
    model.eval()
    found = {n: _Factors(Moments(layer, whole=True)) for n, layer in layers.items() if layer.kind.inputs is not None}
    for layer in layers.values():
        layer.raw.requires_grad_()
    handles = [f.attach(module) for n, f in found.items() for module in {id(m): m for m, _ in layers[n].holders}.values()]
    examples = 0
    try:
        for inputs, targets in evidence.batches:
            count = evidence.count(targets)
            loss = count * loss_of(evidence.loss, outputs_of(model, inputs, evidence.forward), targets)
            torch.autograd.grad(loss, [layer.raw for layer in layers.values()], allow_unused=True)
            examples += count
    finally:
        for handle in handles:
            handle.remove()
    if not examples:
        raise ScoreError("The curvature of the loss is measured on batches: give batches=[(inputs, targets), ...].")
    values = {}
    for name, weight in oriented(layers, {n: layer.weight.detach() for n, layer in layers.items()}).items():
        factors = found.get(name)
        if factors is None or not factors.rows:
            values[name] = weight.square() / 2
            continue
        positions = factors.rows / examples
        a = _inverse_diagonal(factors.inputs.mean().double() * positions)
        g = _inverse_diagonal(_over_ranks(factors.gradients[0]) / _over_ranks(torch.tensor(float(factors.rows))))
        matrix = matrix_of(weight).double()
        inverse = g[:, :, None] * a[:, None]
        values[name] = weight_of(matrix.square() / (2 * inverse.reshape(matrix.shape)), tuple(weight.shape)).to(weight.dtype)
    return oriented(layers, values)


def _inverse_diagonal(matrices: Tensor) -> Tensor:
    """Returns the diagonals of dampened inverses, (groups, size), by their eigenbases."""
    added = (DAMPENING * matrices.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(torch.finfo(matrices.dtype).tiny ** 0.5)
    values, vectors = torch.linalg.eigh(matrices)
    inverse: Tensor = (vectors.square() / (values.clamp_min(0) + added[:, None])[:, None]).sum(-1)
    return inverse


def _over_ranks(total: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total
