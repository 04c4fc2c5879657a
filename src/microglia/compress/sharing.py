"""Shared weights in a model: a parametrization whose weight is a codebook read by fixed codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.compress.codebook import Initial, check_bits, looked_up, share_groups
from microglia.core.errors import MicrogliaError
from microglia.core.layers import Layer, check_selectors, matches
from microglia.core.masks import Masked, Unfinished
from microglia.core.parametrizations import attach_parametrization, detach, steps_of
from microglia.core.recurrent import read_anew

BitsSetting = int | dict[str, int]
"""Bits of a code for all layers, or by selector; the first selector that matches a layer counts, and others stay unshared."""


class Shared(Unfinished):
    """The parametrization: weight = codebook[codes], with fixed codes; entry 0 of the codebook is zero and not trained.

    The gradient of a centroid is the sum of the gradients of its weights (section 3.3 of Deep Compression).

    Args:
        codes: Codes, uint8, shaped like the weight; 0 for a pruned weight.
        table: Codebook with its zero, (k,), or one for each group of rows, (groups, k).
    """

    codes: Tensor

    def __init__(self, codes: Tensor, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.centroids = nn.Parameter(table[..., 1:].detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the shared weight; only the shape of the given one matters."""
        return looked_up(self.codes, self.table)

    @property
    def table(self) -> Tensor:
        """The codebook, or codebooks, with zeros first."""
        zeros = self.centroids.new_zeros(*self.centroids.shape[:-1], 1)
        return torch.cat([zeros, self.centroids], dim=-1)


def bits_by_layer(layers: Mapping[str, Layer], bits: int | Mapping[str, int]) -> dict[str, int]:
    """Returns the bits of every layer that shares its weights.

    Args:
        layers: Layers by name.
        bits: See `BitsSetting`.

    Raises:
        MicrogliaError: Bits are out of range, or a selector matches no layer.
    """
    if not isinstance(bits, Mapping):
        return dict.fromkeys(layers, check_bits(bits))
    for selector, number in bits.items():
        check_bits(number)
        if not selector.startswith("type:"):  # a network may have no layer of a class
            check_selectors(dict(layers), [selector])
    chosen = {name: [n for s, n in bits.items() if matches(name, layer.module, [s])] for name, layer in layers.items()}
    return {name: numbers[0] for name, numbers in chosen.items() if numbers}


def attach_shared(layer: Layer, codes: Tensor, table: Tensor) -> Shared:
    """Attaches shared weights to a layer after its mask; the trainable weight below is not used until `settle_shared`.

    Raises:
        MicrogliaError: The layer has another parametrization than a mask.
    """
    for module, attribute in layer.holders:
        steps = steps_of(module, attribute) if parametrize.is_parametrized(module, attribute) else ()
        if not all(isinstance(step, Masked) for step in steps):
            raise MicrogliaError(
                f"{layer.name} has a parametrization ({', '.join(type(step).__name__ for step in steps)}), and shared values "
                "would replace it: remove it first, or leave the layer out."
            )
    shared = Shared(codes, table)
    for module, attribute in layer.holders:
        if parametrize.is_parametrized(module, attribute):
            steps_of(module, attribute).append(shared)
            read_anew(module)
        else:
            attach_parametrization(module, attribute, shared)
    return shared


def shared_on(layer: Layer) -> Shared | None:
    """Returns the shared weights of a layer, or None."""
    module, attribute = layer.holders[0]
    if not parametrize.is_parametrized(module, attribute):
        return None
    return next((step for step in steps_of(module, attribute) if isinstance(step, Shared)), None)


@torch.no_grad()
def settle_shared(layer: Layer) -> None:
    """Writes the shared values into a layer's weight and removes the parametrization; the mask stays."""
    shared = shared_on(layer)
    if shared is None:
        return
    layer.raw.copy_(shared(layer.raw))
    for module, attribute in layer.holders:
        steps = steps_of(module, attribute)
        if len(steps) == 1:
            detach(module, attribute)
        else:
            del steps[next(i for i, step in enumerate(steps) if step is shared)]
            read_anew(module)


def shared_values(
    layers: Mapping[str, Layer],
    bits: int | Mapping[str, int],
    *,
    initial: Initial = "linear",
    exact: bool = False,
    seed: int = 0,
    groups: int = 1,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns codes and codebooks of each layer that shares its weights; see `microglia.compress.codebook.share_groups`."""
    chosen = bits_by_layer(layers, bits)
    return {
        name: share_groups(layers[name].weight, number, groups, initial=initial, exact=exact, seed=seed)
        for name, number in chosen.items()
    }
