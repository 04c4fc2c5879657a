"""Experts leave a model: the physical cut, and the change "experts" that stores and replays which ones stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from microglia.core.errors import FileError, MicrogliaError, SelectorError
from microglia.core.sharded import refuse_shards
from microglia.graph.cutting.hugging_face import buildable, set_fields
from microglia.graph.cutting.modules import apply_indices, cut_module
from microglia.graph.experts.forms import COUNTS
from microglia.graph.experts.layers import ExpertLayer, expert_layers
from microglia.storage.changes import Change, changes_of, register_change

EXPERTS = "_microglia_experts"
"""Attribute that holds the experts which stayed."""


@dataclass(frozen=True)
class Experts:
    """The experts of a model that stayed.

    Attributes:
        kept: Path of a layer of experts -> numbers of the experts that stayed, in rising order; equally many for every layer.
        of: Number of experts of a layer before.
    """

    kept: Mapping[str, tuple[int, ...]]
    of: int

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> Experts:
        """Returns the value that `asdict` wrote.

        Raises:
            FileError: It is malformed.
        """
        found = Experts({str(path): tuple(own) for path, own in written["kept"].items()}, written["of"])
        whole = type(found.of) is int and all(type(k) is int and 0 <= k < found.of for own in found.kept.values() for k in own)
        rising = all(own and sorted(set(own)) == list(own) for own in found.kept.values())
        if not whole or not rising or len({len(own) for own in found.kept.values()}) != 1:
            raise FileError("Experts that stay are rising numbers, equally many for every layer; the file holds others.")
        return found


def experts_of(model: nn.Module) -> Experts | None:
    """Returns which experts of a model stayed; None if none was removed."""
    found: Experts | None = getattr(model, EXPERTS, None)
    return found


def keep_experts(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Returns a copy of a model with some experts of each layer only; the removed ones are not copied.

    Rows leave the router, its biases and the experts; shared experts stay. The configuration of transformers follows, so that
    ``save_pretrained`` writes what ``from_pretrained`` reads. The outputs are those of the model whose router never
    chooses a removed expert; see `masked_experts`.

    Args:
        model: A model with layers of experts; see `expert_layers`.
        kept: Path of every such layer -> numbers of the experts that stay, in rising order, equally many for every layer.

    Raises:
        SelectorError: There are no such layers, ``kept`` does not fit them, or other changes came before.
        BudgetError: A layer keeps fewer experts than its router chooses.
    """
    refuse_shards(model, "keep_experts")
    layers = expert_layers(model)
    if named := [name for name in changes_of(model) if name not in ("depth", "experts")]:
        raise SelectorError(f"Experts leave first, then the rest; this model has the change {named[0]!r} already.")
    _check(layers, kept)
    own = {layer.path: tuple(kept[layer.path]) for layer in layers}
    value = Experts(own, layers[0].count)
    if (before := experts_of(model)) is not None:
        value = Experts({path: tuple(before.kept[path][k] for k in stay) for path, stay in own.items()}, before.of)
    return _settled(cut_module(model, _rows(model, layers, own), {}), layers, own, value)


def replay_experts(model: nn.Module, value: Experts) -> nn.Module:
    """Removes the same experts from a freshly built model, in place.

    Raises:
        FileError: The model has other layers, or another number of experts.
    """
    try:
        layers = expert_layers(model)
        if layers[0].count != value.of:
            raise SelectorError(f"The file is of a model with {value.of} experts in a layer; this one has {layers[0].count}.")
        _check(layers, value.kept)
        rows = _rows(model, layers, value.kept)
    except MicrogliaError as error:
        raise FileError(str(error)) from error
    apply_indices(model, rows, {})
    return _settled(model, layers, value.kept, value)


def _check(layers: Sequence[ExpertLayer], kept: Mapping[str, Sequence[int]]) -> None:
    if missing := {layer.path for layer in layers} ^ kept.keys():
        raise SelectorError(f"Experts are given for every layer that has them alone; {min(missing)} is one too many or few.")
    for layer in layers:
        layer.check(kept[layer.path])
    if len(numbers := {len(kept[layer.path]) for layer in layers}) > 1:
        raise SelectorError(
            f"Every layer keeps equally many experts, for a configuration has one number; got {sorted(numbers)}."
        )


def _rows(
    model: nn.Module, layers: Sequence[ExpertLayer], kept: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, list[Any]]]:
    return {name: by_dim for layer in layers for name, by_dim in layer.rows(model, kept[layer.path]).items()}


def _settled(small: nn.Module, layers: Sequence[ExpertLayer], kept: Mapping[str, Sequence[int]], value: Experts) -> nn.Module:
    """Removes modules, corrects every number of experts, and records the change; tensors are cut already."""
    before, after = layers[0].count, len(kept[layers[0].path])
    for layer in layers:
        layer.kind.remove(small.get_submodule(layer.within(layer.experts)), kept[layer.path])
    for module in small.modules():
        for name in COUNTS:
            if type(vars(module).get(name)) is int and vars(module)[name] == before:
                setattr(module, name, after)
    for config in _configs(small):
        for name in COUNTS:
            if type(getattr(config, name, None)) is int and getattr(config, name) == before:
                setattr(config, name, after)
    set_fields(small, {path: {} for path in buildable(small)})
    object.__setattr__(small, EXPERTS, value)
    return small


def _configs(model: nn.Module) -> list[Any]:
    """Returns the configurations of transformers in a model, with those inside of others."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "to_dict"):
            found[id(config)] = config
            waiting += vars(config).values()
    return [*found.values()]


register_change(
    "experts",
    Change(
        of=experts_of,
        encode=asdict,
        decode=lambda written, state: Experts.from_dict(written),
        replay=replay_experts,
        cuts=True,
    ),
)
