"""The interface of scores: a pure function from a model and evidence to one value per weight; higher = keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, count_examples
from microglia.core.errors import ScoreError
from microglia.core.layers import Layer
from microglia.core.registry import Registry
from microglia.core.sharded import GATHER, has_shards, whole
from microglia.scores.guard import untouched

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Evidence:
    """The data that a score may use besides the weights.

    Attributes:
        batches: (input, target) batches on the model's device. On several ranks each rank has its own slice.
        loss: Mean loss of (output, target).
        generator: The source of every random number a score draws, with the same seed on all ranks.
        forward: (model, inputs) -> outputs.
        count: Targets -> number of examples in the batch.
    """

    batches: Iterable[Batch] = ()
    loss: Callable[[Any, Any], Tensor] | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    forward: Callable[[nn.Module, Any], Any] = call
    count: Callable[[Any], int] = count_examples


Score = Callable[[nn.Module, Mapping[str, Layer], Evidence], dict[str, Tensor]]
"""(model, layers to score by name, evidence) -> one tensor per layer, shaped like its weight, higher = keep."""

scores: Registry[Score] = Registry("score")


_FILTER_SCORES: set[str] = set()
_SHARD_SCORES: set[str] = set()


def score(name: str, *, filters: bool = False, shards: bool = False) -> Callable[[Score], Score]:
    """Returns a decorator that registers a score by name and holds it to the contract.

    The wrapped score leaves the model untouched (see `untouched`) and returns finite values of the weights' shapes.

    Args:
        name: As in recipes.
        filters: Whether its values are those of whole filters, each weight of a filter holding the filter's one value. Where
            channels are coupled, each filter that makes a channel then counts once, and weights that read it do not count.
        shards: Whether it also scores sharded parameters. Then it reads weights by `Layer.weight`, and their gradients by
            `microglia.scores.gradient.loss_gradient`; the raw parameters are shards.
    """
    if filters:
        _FILTER_SCORES.add(name)
    if shards:
        _SHARD_SCORES.add(name)

    def register(function: Score) -> Score:
        @functools.wraps(function)
        def guarded(model: nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
            if not shards and has_shards(model):
                ready = ", ".join(sorted(_SHARD_SCORES))
                raise ScoreError(
                    f"The score {name!r} needs whole parameters, but these are sharded: take {ready}, or {GATHER}."
                )
            with untouched(model):
                values = {n: whole(v.detach()) for n, v in function(model, layers, evidence).items()}
            for layer_name, layer in layers.items():
                if layer_name not in values or values[layer_name].shape != layer.shape:
                    raise ScoreError(f"The score {name!r} returned no value, or a wrong shape, for the layer {layer_name!r}.")
            return values

        return scores.add(name)(guarded)

    return register


def values_filters(name: str) -> bool:
    """Tells whether the values of a registered score are those of whole filters; see `score`."""
    return name in _FILTER_SCORES


def per_filter(layer: Layer, values: Tensor) -> Tensor:
    """Returns one value per filter of a layer, (out,), in the weight's shape: each weight holds that of its filter."""
    shape = [1] * len(layer.shape)
    shape[1 if layer.swapped else 0] = -1
    return values.reshape(shape).expand(layer.shape)


def compact(layer: Layer, values: Tensor) -> Tensor:
    """Returns what `per_filter` spread, (out, 1, ...) in the weight's layout: one value per filter again."""
    kept = 1 if layer.swapped else 0
    return values.mean([dim for dim in range(values.ndim) if dim != kept], keepdim=True)


def rows(layer: Layer) -> Tensor:
    """Returns the weights of a layer as the forward pass sees them, float64 (out, weights of a filter)."""
    weight = layer.weight.detach().double()
    return (weight.transpose(0, 1) if layer.swapped else weight).flatten(1)
