"""Depth: whole blocks of a sequence leave a model; the change "depth" stores and replays which ones stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from microglia.core.errors import FileError, SelectorError
from microglia.storage.changes import Change, changes_of, register_change

DEPTH = "_microglia_depth"
"""Attribute that holds the blocks which stayed."""
NUMBER = "layer_idx"
"""Attribute of a block's modules that holds its number; the cache of keys and values is indexed by it."""
LAYERS = "num_hidden_layers"
"""Field of a configuration of transformers that holds the number of blocks."""
STATES = {"experts": "without some of its experts", "gates": "gated"}
"""Words for a model with a change, where the change's own name is none."""


@dataclass(frozen=True)
class Depth:
    """The blocks of a model that stayed.

    Attributes:
        blocks: Path of the list of blocks; ``.`` for the model itself.
        kept: Numbers of the blocks that stayed, in order.
        of: Number of blocks before.
    """

    blocks: str
    kept: tuple[int, ...]
    of: int

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> Depth:
        """Returns the value that `asdict` wrote.

        Raises:
            FileError: It is malformed.
        """
        found = Depth(str(written["blocks"]), tuple(written["kept"]), int(written["of"]))
        numbers = all(type(k) is int and 0 <= k < found.of for k in found.kept)
        if not found.kept or not numbers or sorted(set(found.kept)) != list(found.kept):
            raise FileError(f"Blocks that stay are rising numbers below {found.of}; the file has {list(found.kept)[:8]}.")
        return found


def depth_of(model: nn.Module) -> Depth | None:
    """Returns which blocks of a model stayed; None if none was removed."""
    found: Depth | None = getattr(model, DEPTH, None)
    return found


def keep_blocks(model: nn.Module, blocks: str, kept: Sequence[int]) -> nn.Module:
    """Returns a copy of a model with some blocks of a list only; the weights of the others are those of the model.

    In a model of transformers the blocks are numbered anew, so that its cache works. The configuration follows: the number of
    layers, and each list with one entry for every block.

    Args:
        model: A model whose blocks run one after another and whose shapes fit each other.
        blocks: Path of the `nn.ModuleList` or `nn.Sequential`, such as ``model.layers``; ``.`` for the model itself.
        kept: Numbers of the blocks that stay, in rising order.

    Raises:
        SelectorError: There is no such list, ``kept`` does not fit it, or other changes named its blocks before.
    """
    held = _list_of(model, blocks)
    value = Depth(blocks, tuple(kept), len(held))
    rising = sorted(set(value.kept)) == list(value.kept)
    if not value.kept or not rising or not 0 <= value.kept[0] <= value.kept[-1] < value.of:
        raise SelectorError(
            f"The blocks that stay are ascending numbers from 0 to {value.of - 1}, at least one; got {list(kept)}."
        )
    if named := [name for name in changes_of(model) if name not in ("masks", "depth")]:
        raise SelectorError(
            f"This model is {STATES.get(named[0], named[0])} already, and its file names the blocks: remove blocks first, then "
            "do the rest."
        )
    if (before := depth_of(model)) is not None:
        if before.blocks != blocks:
            raise SelectorError(
                f"Blocks of {before.blocks} were removed before: remove blocks of one list only, not of {blocks} too."
            )
        value = Depth(blocks, tuple(before.kept[k] for k in value.kept), before.of)
    return _cut(deepcopy(model), value, kept)


def replay_depth(model: nn.Module, value: Depth) -> nn.Module:
    """Removes the same blocks from a freshly built model, in place.

    Raises:
        FileError: The model has another number of blocks.
    """
    try:
        count = len(_list_of(model, value.blocks))
    except SelectorError as error:
        raise FileError(str(error)) from error
    if count != value.of:
        raise FileError(f"The file is of a model with {value.of} blocks in {value.blocks}; this one has {count}.")
    return _cut(model, value, value.kept)


def _list_of(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    held = model if path == "." else dict(model.named_modules()).get(path)
    if not isinstance(held, nn.ModuleList | nn.Sequential):
        raise SelectorError(f"{path!r} is no nn.ModuleList or nn.Sequential of {type(model).__name__}.")
    return held


def _cut(model: nn.Module, value: Depth, kept: Sequence[int]) -> nn.Module:
    """Removes blocks in place; ``kept`` counts the blocks that the model has now."""
    held: Any = _list_of(model, value.blocks)
    before, stay = len(held), [held[k] for k in kept]
    held._modules.clear()
    for number, block in enumerate(stay):
        held.add_module(str(number), block)
        for part in block.modules():
            if isinstance(getattr(part, NUMBER, None), int):
                setattr(part, NUMBER, number)
    configs = [m.config for m in model.modules() if getattr(getattr(m, "config", None), LAYERS, None) == before]
    for config in {id(config): config for config in configs}.values():
        setattr(config, LAYERS, len(stay))
        for name, entry in list(vars(config).items()):
            if isinstance(entry, list | tuple) and len(entry) == before:
                setattr(config, name, type(entry)(entry[k] for k in kept))
    object.__setattr__(model, DEPTH, value)
    return model


register_change(
    "depth",
    Change(of=depth_of, encode=asdict, decode=lambda written, state: Depth.from_dict(written), replay=replay_depth, cuts=True),
)
