"""A registry where a *name* must cross YAML or the command line; plain functions everywhere else."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any, Generic, TypeVar

from microglia.core.errors import UnknownNameError

T = TypeVar("T")
C = TypeVar("C")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Returns the error for a name nobody registered, with the nearest known names."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UnknownNameError(f"There is no {kind} named {name!r}.{hint} Known: {', '.join(names)}.")


def known_fields(config: type[C]) -> type[C]:
    """Makes a dataclass answer an unknown keyword with the nearest known one.

    Raises:
        UnknownNameError: When the class is called with such a keyword.
    """
    made = config.__init__

    @functools.wraps(made)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        known = [f.name for f in fields(self)]
        for name in settings:
            if name not in known:
                raise unknown_name(f"field of {config.__name__}", name, known)
        made(self, *args, **settings)

    config.__init__ = init  # type: ignore[method-assign]
    return config


class Registry(Generic[T]):
    """Names of one kind of thing.

    Example:
        >>> scores = Registry[int]("score")
        >>> scores.add("one")(1)
        1
        >>> scores["one"]
        1
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._refused: dict[str, str] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Returns a decorator that registers its argument under ``name`` (an error when the name is taken)."""

        def register(item: T) -> T:
            if name in self._items:
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return register

    def refuse(self, name: str, why: str) -> None:
        """Lets a name that the field knows, and that is not built here, be answered by the reason, one sentence."""
        self._refused[name] = why

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            if name in self._refused:
                raise UnknownNameError(f"The {self.kind} {name!r} is known and not built: {self._refused[name]}") from None
            raise unknown_name(self.kind, name, self._items) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def items(self) -> Iterable[tuple[str, T]]:
        """Returns the registered (name, thing) pairs in order of registration."""
        return self._items.items()
