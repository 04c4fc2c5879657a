"""The registry of executions: every way to run a dense model, those of PyTorch and those of other engines."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.house import EXECUTIONS
from microglia.core.registry import Registry, unknown_name

Runner = Callable[..., Any]
"""A model in one execution, called like the model itself."""

TORCH = ("eager", "eager-channels-last", "packed", "compiled")
"""The executions that need nothing beside PyTorch."""


@dataclass(frozen=True)
class ExecutionKind:
    """One way to run a dense model.

    Attributes:
        build: Returns the runner of a folded model in evaluation mode, prepared for the shapes of an example. It raises
            where the model cannot be run this way; the text is for the reader.
        tolerance: How far its outputs may be from the model's, as a fraction of the largest; None for the usual tolerance
            of the precision (see `microglia.measure.executions`).
        exact: Whether it computes with the weights as they are. One that rounds them is timed beside the others and never
            returned in their place.
        packages: Modules to import that it needs beside PyTorch.
        extra: The extra of this library that installs them.
    """

    build: Callable[[nn.Module, Example], Runner]
    tolerance: float | None = None
    exact: bool = True
    packages: tuple[str, ...] = ()
    extra: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(name for name in self.packages if find_spec(name) is None)


_KINDS: Registry[ExecutionKind] = Registry("execution")


def register_execution(name: str, kind: ExecutionKind) -> ExecutionKind:
    """Registers an execution by its name.

    Example:
        >>> from microglia.runtime.dense.kinds import ExecutionKind, register_execution  # in a module of your own
        >>> register_execution("mine", ExecutionKind(build=...))  # doctest: +SKIP

    Raises:
        ValueError: The name is taken.
    """
    return _KINDS.add(name)(kind)


def execution_kind(name: str) -> ExecutionKind:
    """Returns an execution by its name; a module of the house that registers it is imported where it was not yet.

    Raises:
        UnknownNameError: No execution has this name.
    """
    if name in EXECUTIONS and name not in _KINDS:
        importlib.import_module(EXECUTIONS[name])
    if name not in _KINDS:
        raise unknown_name("execution", name, {*_KINDS, *EXECUTIONS, *GROUPS})
    return _KINDS[name]


def is_exact(name: str) -> bool:
    """Tells whether an execution computes with the weights as they are; one that nobody registered does."""
    return execution_kind(name).exact if name in _KINDS or name in EXECUTIONS else True


def _every() -> tuple[str, ...]:
    """Returns every exact execution whose packages are installed, those of PyTorch first."""
    names = dict.fromkeys((*EXECUTIONS, *_KINDS))
    return tuple(name for name in names if (kind := execution_kind(name)).exact and not kind.missing)


GROUPS: dict[str, Callable[[], tuple[str, ...]]] = {"torch": lambda: TORCH, "all": _every}
"""Words for several executions: ``torch`` for PyTorch's own, ``all`` for every exact one that is installed."""


def execution_names(kinds: str | Sequence[str]) -> tuple[str, ...]:
    """Returns names of executions, each once, with the words of `GROUPS` replaced by what they stand for.

    Example:
        >>> execution_names("torch")
        ('eager', 'eager-channels-last', 'packed', 'compiled')

    Raises:
        UnknownNameError: A name is neither an execution nor a group.
    """
    words = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    names = [name for word in words for name in (GROUPS[word]() if word in GROUPS else (word,))]
    for name in names:
        execution_kind(name)
    return tuple(dict.fromkeys(names))


def built(name: str, model: nn.Module, example: Example) -> Runner:
    """Returns a model in the execution of a name.

    Raises:
        MicrogliaError: A package is not installed, or the model cannot be run this way.
    """
    kind = execution_kind(name)
    if kind.missing:
        how = f"pip install 'microglia[{kind.extra}]'" if kind.extra else f"pip install {' '.join(kind.missing)}"
        raise MicrogliaError(f"not installed here: {', '.join(kind.missing)}; {how} installs what it needs.")
    return kind.build(model, example)
