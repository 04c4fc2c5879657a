"""What was done to a model: one registry of changes, asked by everything that saves, loads or tells of a model.

A family registers one `Change` where its code lives. `changes_of` tells what a model at hand has been through; `decode` and
`replay` do it again to a freshly built one. Nothing else looks for attributes or parametrizations of a family.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from microglia.core.errors import FileError, MicrogliaError
from microglia.core.house import CHANGES
from microglia.core.registry import Registry

SOURCE = "microglia_source"
"""Attribute under which `microglia.tasks.build` notes on a model how it was built; a replayed model keeps it."""

Batches = Callable[[], Sequence[Tensor]]
"""Returns test inputs, batch by batch, on the model's device; called only where they are needed."""
Execution = Callable[[], object]
"""Runs a model once, to be timed."""


def _nothing(*given: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Change:
    """One kind of thing that can be done to a model.

    Attributes:
        of: Returns what was done to a model of this kind, a value of the family's own; None where nothing was.
        encode: Returns the value as JSON.
        decode: Returns the value that ``encode`` wrote. It gets the JSON and the saved tensors, builds nothing, and raises
            `FileError` where the JSON has not the form of one or does not fit the tensors.
        replay: Does it again to a freshly built model, whose weights are then loaded; returns the model, or another.
        binds: Whether the file of the weights holds a digest of the JSON, so that no other is replayed under them. True for
            everything that the names, shapes or meaning of the weights depend on.
        alone: Whether that digest is of the JSON without its key if nothing else binds, as files of version 1 have it.
        cuts: Whether tensors have other shapes afterwards.
        chooses: Name of the parts by which the model chooses for every input what it computes, such as "gates".
        result: Returns fields of a run's result, from the value, the model, and a function that makes the dense one.
        was: Returns the class that the model had before, from the value; empty where it still has it.
        measured: Returns what ``microglia measure`` adds to its own numbers, from the value.
        executions: Returns own ways to run the model, by name, from the model, an example input and a `Batches`.
    """

    of: Callable[[nn.Module], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any, Mapping[str, Tensor]], Any]
    replay: Callable[[nn.Module, Any], nn.Module]
    binds: bool = True
    alone: bool = False
    cuts: bool = False
    chooses: str = ""
    result: Callable[[Any, nn.Module, Callable[[], nn.Module]], Mapping[str, Any]] = field(default=_nothing)
    was: Callable[[Any], str] = lambda value: ""
    measured: Callable[[Any], Mapping[str, Any]] = field(default=_nothing)
    executions: Callable[[nn.Module, Tensor, Batches], Mapping[str, Execution]] = field(default=_nothing)


@dataclass(frozen=True)
class Done:
    """What was done to one model.

    Attributes:
        kind: The registered change.
        value: What was done, in the family's own type: masks, a plan.
    """

    kind: Change
    value: Any


changes: Registry[Change] = Registry("change")
"""Changes by their field of ``plan.json``; `Registry.add` registers one, in its family's module or outside the package."""


def register_change(key: str, change: Change) -> Change:
    """Registers a change under its field of ``plan.json``.

    Example:
        >>> from microglia.storage.changes import Change, register_change  # in a module of your own
        >>> register_change("scaled", Change(of=..., encode=..., decode=..., replay=...))  # doctest: +SKIP

    Raises:
        ValueError: The field is taken.
    """
    if key in RESERVED:
        raise ValueError(f"the field {key!r} of plan.json is the header's own")
    return changes.add(key)(change)


RESERVED = frozenset({"format", "version", "source", "class", "digest"})
"""Fields of ``plan.json`` that are no changes."""


def changes_of(model: nn.Module) -> dict[str, Done]:
    """Returns what was done to a model, by field of ``plan.json``, in the order in which it is replayed.

    Example:
        >>> changes_of(nn.Linear(2, 2))
        {}
    """
    found = {key: Done(kind, kind.of(model)) for key, kind in changes.items()}
    return {key: found[key] for key in _ordered(found) if found[key].value is not None}


def changes_digest(model: nn.Module) -> str:
    """Returns a BLAKE2 digest of what was done to a model, as JSON by field of ``plan.json``; empty where nothing was."""
    written = {key: done.kind.encode(done.value) for key, done in changes_of(model).items()}
    return hashlib.blake2b(json.dumps(written, sort_keys=True).encode(), digest_size=16).hexdigest() if written else ""


def written_changes(plan: Mapping[str, Any]) -> dict[str, tuple[Change, Any]]:
    """Returns the changes that a ``plan.json`` tells of, each with its JSON, in the order in which they are replayed.

    Modules of the house that the file needs are imported by `CHANGES`, a fixed table.

    Raises:
        FileError: A field is of a change that nobody registered.
    """
    keys = _ordered(key for key, value in plan.items() if key not in RESERVED and value is not None)
    return {key: (_known(key), plan[key]) for key in keys}


def decode(plan: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Done]:
    """Returns the changes that a ``plan.json`` tells of, read and checked; nothing is built.

    Args:
        plan: Fields of the file: changes as JSON, and the header's own.
        state: The saved tensors.

    Raises:
        FileError: A field is damaged, or of a change that nobody registered.
    """
    found: dict[str, Done] = {}
    for key, (kind, written) in written_changes(plan).items():
        try:
            value = kind.decode(written, state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"The field {key!r} is damaged: it does not hold what was done to a model ({error}).") from error
        if value is not None:
            found[key] = Done(kind, value)
    return found


def replay(model: nn.Module, done: Mapping[str, Done]) -> nn.Module:
    """Returns a freshly built model with changes done again, in place or as another object.

    Raises:
        FileError: A change does not fit the model.
    """
    source = getattr(model, SOURCE, None)
    for key, change in done.items():
        try:
            model = change.kind.replay(model, change.value)
        except FileError:
            raise
        except MicrogliaError as error:  # such as the trace of a model that a plan's inputs do not fit
            raise FileError(f"The change {key!r} of the file does not fit {type(model).__name__}: {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise FileError(f"The change {key!r} of the file is damaged, or of another model: {error}.") from error
    if source:  # a model that comes back as a graph is an object of its own
        object.__setattr__(model, SOURCE, source)
    return model


def _ordered(keys: Iterable[str]) -> list[str]:
    """Returns the house's own changes first, in the order of its table."""
    given, table = list(keys), list(CHANGES)
    return sorted(given, key=lambda key: table.index(key) if key in CHANGES else len(table))


def _known(key: str) -> Change:
    """Returns a registered change; one of the house is imported where it was not yet."""
    if key not in changes and key in CHANGES:
        importlib.import_module(CHANGES[key])
    if key not in changes:
        raise FileError(
            f"The file tells of {key[:80]!r}, a change that nothing here has registered: import the module that registers it "
            "(see microglia.storage.changes.register_change), or upgrade microglia."
        )
    return changes[key]
