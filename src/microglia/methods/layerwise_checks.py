"""Layers and counts of layer-wise pruning, with one sentence for a misfit, and its warnings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from microglia.core.allocation import layer_counts
from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, PatternError, SelectorError
from microglia.core.layers import Layer
from microglia.core.left_out import chosen_layers
from microglia.core.patterns import NM, Pattern
from microglia.methods.config import MethodConfig


def block_layers(model: nn.Module, blocks: Sequence[nn.Module], config: MethodConfig) -> list[dict[str, Layer]]:
    """Returns the layers to prune of each block, by their names in the model; a weight with a holder outside is left out.

    Raises:
        SelectorError: No layer is left.
    """
    chosen = chosen_layers(model, config.layers, config.exclude)
    owner = {id(module): index for index, block in reversed(list(enumerate(blocks))) for module in block.modules()}
    found: list[dict[str, Layer]] = [{} for _ in blocks]
    for name, layer in chosen.items():
        places = [owner.get(id(module)) for module, _ in layer.holders]
        if places[0] is not None and None not in places:
            found[places[0]][name] = layer
    if not any(found):
        raise SelectorError(
            f"No layer of the {len(blocks)} blocks of {type(model).__name__} is left to prune by layers={list(config.layers)}, "
            f"exclude={list(config.exclude)}."
        )
    return found


def check_pattern(pattern: Pattern, layers: Mapping[str, Layer]) -> None:
    """Raises `PatternError` for N:M whose runs do not divide the inputs of a layer."""
    if not isinstance(pattern, NM):
        return
    for name, layer in layers.items():
        if layer.sides[1] % pattern.m:
            raise PatternError(
                f"{pattern} needs a multiple of {pattern.m} inputs, and {name} has {layer.sides[1]}: exclude this layer."
            )


def weights_to_keep(layers: Mapping[str, Layer], pattern: Pattern, config: MethodConfig) -> dict[str, int]:
    """Returns how many weights each layer keeps: the same density, and the budget's count in all."""
    if pattern.fixed_density is not None:
        if config.density not in (None, pattern.fixed_density):
            raise BudgetError(f"{pattern} keeps {pattern.fixed_density:g} of the weights by itself; leave density out.")
        return {}
    sizes = {name: layer.raw.numel() for name, layer in layers.items()}
    keep = Budget(density=config.density).kept_weights(sum(sizes.values()), sum(sizes.values()))
    shapes = {name: layer.sides for name, layer in layers.items()}
    return layer_counts(shapes, keep, "layer", low=dict.fromkeys(layers, 1), high=sizes)


def warn(rows: Sequence[Mapping[str, Any]]) -> None:
    """Warns, in one sentence each, of layers whose Hessian has too low a rank, needed more dampening, or read nothing."""
    short = [row for row in rows if row["dampening"] is not None and row["rows"] < row["inputs"]]
    if short:
        worst = min(short, key=lambda row: row["rows"] / row["inputs"])
        warnings.warn(
            f"{len(short)} layers were calibrated on fewer rows than they have inputs, {worst['layer']} on {worst['rows']:,} "
            f"for {worst['inputs']:,}, so that dampening decides: give more batches or longer sequences.",
            stacklevel=3,
        )
    raised = [row for row in rows if row["dampening"] is not None and row["dampening"] > 1]
    if raised:
        warnings.warn(
            f"The Hessian of {raised[0]['layer']} and {len(raised) - 1} others has no factor at any dampening up to 1; "
            "their weights compensate nothing.",
            stacklevel=3,
        )
    unread = [row["layer"] for row in rows if row["rows"] is None and row["rule"] != rows[0]["rule"]]
    if unread:
        warnings.warn(
            f"{len(unread)} layers read nothing of the calibration data and were pruned by magnitude, {unread[0]} first.",
            stacklevel=3,
        )
