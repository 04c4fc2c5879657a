"""A model as a sequence of blocks: which they are, what enters each, and one block run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, map_tensors
from microglia.core.errors import MicrogliaError, SelectorError
from microglia.core.layers import prunable_attributes
from microglia.core.modes import without_cache
from microglia.core.running import first_line
from microglia.scores.reading import MISFITS, kind_of

ROOT = "."
"""Name of the model itself, where its own children are the blocks."""


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, list[nn.Module]]:
    """Returns the blocks of a model: the path of what holds them, and the modules in order.

    By default they are the longest `nn.ModuleList` or `nn.Sequential` of at least two modules of one class with weights to
    prune, such as ``model.layers`` of Llama. A list within a block of another list is no candidate. A model that is an
    `nn.Sequential` itself, without such a list, is a sequence of its children.

    Args:
        model: Any module.
        path: Path of the list, such as ``model.decoder.layers``; ``.`` for the model itself.

    Raises:
        SelectorError: There is no list of blocks, several are equally long, or ``path`` is none.
    """
    if path is not None:
        held = model if path == ROOT else dict(model.named_modules()).get(path)
        if not isinstance(held, nn.ModuleList | nn.Sequential) or not len(held):
            kind = "nothing" if held is None else f"a {type(held).__name__}"
            raise SelectorError(
                f"blocks is the path of an nn.ModuleList or nn.Sequential; got {path!r}, which is {kind} in "
                f"{type(model).__name__}; candidates: {', '.join(candidates(model)) or 'none'}."
            )
        return path, list(held)
    found = candidates(model)
    longest = max(map(len, found.values()), default=0)
    best = [name for name, blocks in found.items() if len(blocks) == longest]
    if len(best) == 1:
        return best[0], found[best[0]]
    if isinstance(model, nn.Sequential) and not best:
        return ROOT, list(model)
    if not best:
        raise SelectorError(
            f"{type(model).__name__} has no blocks to find, no nn.ModuleList or nn.Sequential of modules of one class; name a "
            "list whose modules run one after another by blocks=PATH."
        )
    raise SelectorError(
        f"{type(model).__name__} has several lists of {longest} blocks, {', '.join(best)}; name the one to prune by "
        "blocks=PATH."
    )


def candidates(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Returns the lists of at least two modules of one class with weights, by path, without those inside of another's."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        members = list(module)
        inside = any(path.startswith(f"{other}.") if other != ROOT else True for other in found)
        same = len({type(member) for member in members}) == 1
        if same and not inside and all(any(map(prunable_attributes, member.modules())) for member in members):
            found[path or ROOT] = members
    return found


@dataclass
class Passage:
    """Hidden state and further arguments of the blocks for one calibration batch.

    Attributes:
        hidden: The input of the next block.
        others: The further arguments of each block, (positional, by keyword); one entry where they are equal for all.
        counted: Which positions are no padding, boolean (batch, positions), or None.
        keyword: Name of the argument that ``hidden`` is given by; None if it is the first positional one.
    """

    hidden: Any
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    counted: Tensor | None = None
    keyword: str | None = None

    def run(self, block: nn.Module, index: int) -> Any:
        """Returns what a block makes of ``hidden``, which stays as it is."""
        args, kwargs = self.others[min(index, len(self.others) - 1)]
        hidden = map_tensors(torch.clone, self.hidden)
        if self.keyword is not None:
            return first_of(block(*args, **{self.keyword: hidden}, **kwargs))
        return first_of(block(hidden, *args, **kwargs))


class _Stop(Exception):
    """Ends a forward pass once the first block is reached."""


def first_of(output: Any) -> Any:
    """Returns the hidden state that a block returns; blocks of older transformers return a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def passages(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    inputs: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = call,
) -> list[Passage]:
    """Returns what enters the first block for every batch, by forward passes that stop there.

    The first batch runs through the whole model. It tells which further arguments each block gets, and proves that each block
    reads what the one before returned.

    Args:
        model: A model in evaluation mode.
        blocks: Its blocks, in order.
        inputs: Batches of inputs.
        forward: (model, inputs) -> outputs.

    Raises:
        SelectorError: The blocks are no sequence: one does not run, or reads something else.
    """
    found: list[Passage] = []
    whole = True
    with without_cache(model):
        for batch in inputs:
            seen = _watched(model, blocks, batch, forward, whole=whole or len(found[0].others) > 1)
            seen.counted = counted_positions(batch)
            found.append(seen)
            whole = False
    return found


@contextmanager
def calibrating(model: nn.Module, batch: Any) -> Iterator[None]:
    """Context in which a model's error about a calibration batch becomes one sentence that describes the batch."""
    try:
        yield
    except MISFITS as error:
        raise MicrogliaError(
            f"The {type(model).__name__} does not take a calibration batch, {kind_of(batch)}: {first_line(error).rstrip('.')}. "
            "Give batches of inputs alone, on the model's device."
        ) from error


def _watched(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Any, forward: Callable[[nn.Module, Any], Any], *, whole: bool
) -> Passage:
    """Runs one batch and returns what enters the blocks; not ``whole`` stops it at the first one."""
    seen: list[Passage] = []
    before: list[Any] = []

    def entering(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = None if args else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
            hidden = args[0] if args else kwargs.get(keyword or "")
            others = args[1:], {k: v for k, v in kwargs.items() if k != keyword}
            if index == 0 and not seen:
                seen.append(Passage(map_tensors(torch.clone, hidden), [others], keyword=keyword))
                if not whole:
                    raise _Stop
            elif len(seen[0].others) != index or not _same(hidden, before[-1]):
                raise SelectorError(
                    f"The blocks of {type(model).__name__} must run one after another, once each, but block {index} does not "
                    f"read what block {index - 1} returned; name a list of such blocks by blocks=PATH."
                )
            else:
                seen[0].others.append(others)

        return hook

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        before[:] = [map_tensors(torch.clone, first_of(output))]

    handles = [b.register_forward_pre_hook(entering(i), with_kwargs=True) for i, b in enumerate(blocks)]
    handles += [b.register_forward_hook(leaving) for b in blocks] if whole else []
    try:
        with calibrating(model, batch):
            forward(model, batch)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not seen or (whole and len(seen[0].others) != len(blocks)):
        ran = len(seen[0].others) if seen else 0
        raise SelectorError(
            f"Of the {len(blocks)} blocks of {type(model).__name__} {ran} ran in a forward pass; name a list of blocks that "
            "the model calls by blocks=PATH."
        )
    if all(_equal(seen[0].others[0], other) for other in seen[0].others[1:]):
        del seen[0].others[1:]
    return seen[0]


def _same(one: Any, other: Any) -> bool:
    """Tells whether two trees of tensors hold the same values."""
    first: list[Tensor] = []
    second: list[Tensor] = []
    map_tensors(lambda t: first.append(t) or t, one)  # type: ignore[func-returns-value]
    map_tensors(lambda t: second.append(t) or t, other)  # type: ignore[func-returns-value]
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _equal(one: Any, other: Any) -> bool:
    """Tells whether two trees hold the same tensor objects, or equal plain values."""
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return one is other or (type(one) is type(other) and bool(one == other))


def counted_positions(batch: Any) -> Tensor | None:
    """Returns which tokens of a batch are no padding, boolean (batch, positions), or None where all count."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


def check_finite(hidden: Any, name: str) -> None:
    """Raises `MicrogliaError` if a block returned numbers that are not finite."""

    def check(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise MicrogliaError(f"The block {name} returns numbers that are not finite on the calibration data.")
        return tensor

    map_tensors(check, hidden)
