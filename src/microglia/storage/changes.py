"""Changes of a model: one registry, used by all code that saves, loads or describes a model.

A family registers one `Change` where its code lives. `changes_of` returns the changes of a model; `decode` and `replay` apply
them again to a freshly built one. No other code looks for attributes or parametrizations of a family.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from microglia.core.errors import FileError, MicrogliaError
from microglia.core.house import CHANGES
from microglia.core.registry import Registry

SOURCE = "microglia_source"
"""Attribute in which `microglia.tasks.build` records how a model was built; a replayed model keeps it."""

Batches = Callable[[], Sequence[Tensor]]
"""Returns test inputs, batch by batch, on the model's device; called only if they are needed."""
Execution = Callable[[], object]
"""Runs a model once, to be timed."""


def _nothing(*given: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Change:
    """One kind of change of a model.

    Attributes:
        of: Returns the change of this kind in a model, a value of the family's own type, or None.
        encode: Returns the value as JSON.
        decode: Returns the value that ``encode`` wrote. It gets the JSON and the saved tensors, builds nothing, and raises
            `FileError` if the JSON is malformed or does not fit the tensors.
        replay: Applies the change to a freshly built model, whose weights are then loaded; returns this model or a new one.
        binds: Whether the file of the weights holds a digest of the JSON, so that no other change is replayed for these
            weights. True if the names, shapes or meaning of the weights depend on the change.
        alone: Whether this digest omits the key of the JSON if nothing else binds, as in files of version 1.
        cuts: Whether the change alters shapes of tensors.
        forms: Whether the change gives modules another form; it is replayed before all others, and before a cut of channels.
        zeroes: Whether `microglia.shrink` can remove what the change set to zero.
        chooses: Name of the parts that choose the computation for every input.
        result: Returns fields of a run's result, from the value, the model, and a function that makes the dense model.
        was: Returns the model's former class, from the value; empty if the class is unchanged.
        measured: Returns additional numbers for ``microglia measure``, from the value.
        executions: Returns further ways to run the model, by name, from the model, an example input and a `Batches`.
    """

    of: Callable[[nn.Module], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any, Mapping[str, Tensor]], Any]
    replay: Callable[[nn.Module, Any], nn.Module]
    binds: bool = True
    alone: bool = False
    cuts: bool = False
    forms: bool = False
    zeroes: bool = False
    chooses: str = ""
    result: Callable[[Any, nn.Module, Callable[[], nn.Module]], Mapping[str, Any]] = field(default=_nothing)
    was: Callable[[Any], str] = lambda value: ""
    measured: Callable[[Any], Mapping[str, Any]] = field(default=_nothing)
    executions: Callable[[nn.Module, Tensor, Batches], Mapping[str, Execution]] = field(default=_nothing)


@dataclass(frozen=True)
class Done:
    """One change of one model.

    Attributes:
        kind: The registered change.
        value: The change in the family's own type: masks, a plan.
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
"""Fields of ``plan.json`` that are not changes."""


def changes_of(model: nn.Module) -> dict[str, Done]:
    """Returns the changes of a model, by field of ``plan.json``, in the order of replay.

    Example:
        >>> changes_of(nn.Linear(2, 2))
        {}
    """
    found = {key: Done(kind, kind.of(model)) for key, kind in changes.items()}
    order = _ordered({key: done.kind for key, done in found.items()})
    return {key: found[key] for key in order if found[key].value is not None}


def changes_digest(model: nn.Module) -> str:
    """Returns a BLAKE2 digest of what was done to a model, as JSON by field of ``plan.json``; empty where nothing was."""
    written = {key: done.kind.encode(done.value) for key, done in changes_of(model).items()}
    return hashlib.blake2b(json.dumps(written, sort_keys=True).encode(), digest_size=16).hexdigest() if written else ""


def written_changes(plan: Mapping[str, Any]) -> dict[str, tuple[Change, Any]]:
    """Returns the changes in a ``plan.json``, each with its JSON, in the order of replay.

    The library's own modules that the file needs are imported by `CHANGES`, a fixed table.

    Raises:
        FileError: A field names an unregistered change.
    """
    kinds = {key: _known(key) for key, value in plan.items() if key not in RESERVED and value is not None}
    return {key: (kinds[key], plan[key]) for key in _ordered(kinds)}


def decode(plan: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Done]:
    """Returns the changes in a ``plan.json``, read and checked; builds nothing.

    Args:
        plan: Fields of the file: changes as JSON, and the header's own.
        state: The saved tensors.

    Raises:
        FileError: A field is damaged or names an unregistered change.
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
    """Returns a freshly built model with changes applied again, in place or as another object.

    Raises:
        FileError: A change does not fit the model.
    """
    source = getattr(model, SOURCE, None)
    for key, change in done.items():
        try:
            model = change.kind.replay(model, change.value)
        except FileError:
            raise
        except MicrogliaError as error:  # for example, a plan's inputs do not fit the model in a trace
            raise FileError(f"The change {key!r} of the file does not fit {type(model).__name__}: {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise FileError(f"The change {key!r} of the file is damaged, or of another model: {error}.") from error
    if source:  # a model that becomes a graph is a new object
        object.__setattr__(model, SOURCE, source)
    return model


def _ordered(kinds: Mapping[str, Change]) -> list[str]:
    """Returns changes in the order of replay: other forms of modules, the library's own in the order of its table, others."""
    table = list(CHANGES)
    return sorted(kinds, key=lambda key: (not kinds[key].forms, table.index(key) if key in CHANGES else len(table)))


def _known(key: str) -> Change:
    """Returns a registered change; imports the module of one of the library's own if needed."""
    if key not in changes and key in CHANGES:
        importlib.import_module(CHANGES[key])
    if key not in changes:
        raise FileError(
            f"The file holds the change {key[:80]!r}, which is not registered here: import the module that registers it "
            "(see microglia.storage.changes.register_change), or upgrade microglia."
        )
    return changes[key]
