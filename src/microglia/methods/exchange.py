"""Exchange of weights under a mask: gradients of removed weights, and equal numbers of grown and dropped weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from microglia.core.errors import TrainingError
from microglia.core.layers import Layer
from microglia.core.masks import Masked
from microglia.core.selection import keep_best


class DenseGradients:
    """Reads dL / d(m w) in backward passes: the gradient that each weight would get without a mask.

    The mask's own backward pass zeroes it at removed weights, so it is read at the mask's output. It is read only between
    `listen` and `rest`, so other steps have no cost. Several uses of a weight, and micro-batches of one step, are summed as in
    ``.grad``.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def listen(self, masked: Iterable[Masked]) -> None:
        """Starts to read backward passes, from zero."""
        self.rest()
        sums, known = self._sums, set(masked)

        def add(module: nn.Module, gradient: Tensor) -> None:
            sums[module] = sums[module] + gradient if module in sums else gradient.detach()

        def after_forward(module: nn.Module, inputs: Any, weight: Tensor) -> None:
            if weight.requires_grad and module in known:  # not while evaluating, and not in a copy of the model
                weight.register_hook(partial(add, module))  # type: ignore[no-untyped-call]

        self._handles = [module.register_forward_hook(after_forward) for module in known]

    def rest(self) -> None:
        """Clears the gradients and stops reading."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], {}

    def of(self, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        """Returns the gradients by layer, summed over all ranks; 0 for a layer that the loss did not reach.

        Raises:
            TrainingError: No backward pass was read.
        """
        if not self._sums:
            raise TrainingError(
                "Weights grow where the gradient is large, but this step had none: call loss.backward() before pruner.step()."
            )
        found = {}
        for name, layer in layers.items():
            gradient = self._sums.get(mask_of(layer))
            gradient = torch.zeros_like(layer.raw) if gradient is None else gradient
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            found[name] = gradient.clone(memory_format=torch.contiguous_format)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(found[name])
        return found


def mask_of(layer: Layer) -> Masked:
    """Returns the parametrization that masks a layer."""
    module, attribute = layer.holders[0]  # the others share it
    return next(p for p in module.parametrizations[attribute] if isinstance(p, Masked))  # type: ignore[union-attr,index]


def exchange(
    kept: Tensor, weight: Tensor, growth: Tensor, *, count: int, generator: torch.Generator, name: str = "weight"
) -> Tensor:
    """Returns the mask after the ``count`` smallest weights are exchanged for other weights.

    Args:
        kept: The mask, of the weight's shape.
        weight: The weights; |w| is the criterion.
        growth: Score of growth, higher first, for all weights not kept after the drop.
        count: Weights to exchange, 0 <= count <= those kept.
        generator: Breaks ties. The paper's code adds noise of 1e-5 to |w| for this; here it is exact.
        name: The layer's name, for errors.

    Raises:
        ScoreError: A weight or a gradient is NaN.
    """
    renewed, size, growth = kept.flatten(), weight.flatten().abs(), growth.flatten()
    active = renewed.nonzero().squeeze(1)
    staying = active[_best(name, size[active], len(active) - count, generator)]
    renewed = torch.zeros_like(renewed).index_fill_(0, staying, True)
    free = (~renewed).nonzero().squeeze(1)
    growing = free[_best(name, growth[free], count, generator)]
    return renewed.index_fill_(0, growing, True).view(kept.shape)


def _best(name: str, values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns the positions of the ``count`` largest values; ties are broken at random."""
    order = torch.randperm(len(values), generator=generator).to(values.device)
    return order[keep_best({name: values[order]}, count)[name]]
