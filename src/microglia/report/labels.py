"""Labels of a run in a report, from its recipe; runs with the same labels differ only in their seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import as_dict, completed, resolve
from microglia.report.families import family_of
from microglia.report.records import Record
from microglia.storage.run import flatten

BUDGET = tuple(f"prune.{term}" for term in ("density", "params", "flops", "ms", "bytes", "within"))
SHOWN = ("model", "data", "method", "seed", "prune.pattern", "prune.scope", *BUDGET)
"""Recipe keys that a table always shows; other keys are named if they differ between runs of one method."""
DENSE = ("model_options.", "checkpoint", "normalize", "image_size", "label_smoothing", "dense.")
"""Recipe keys, or their prefixes, that the dense model depends on."""


def method_of(record: Record) -> str:
    """Returns the method's name of a run, according to its family."""
    family = family_of(record)
    return family.method(record) if family is not None else str(record.recipe["method"])


def named_elsewhere(key: str, more: Iterable[str] = ()) -> bool:
    """Tells whether a table shows a recipe key in its own column; ``more`` are keys that a family shows."""
    return any(key == shown or key.startswith(f"{shown}.") for shown in (*SHOWN, *more))


def varying_of(records: Iterable[Record], wanted: Callable[[str], bool]) -> list[str]:
    """Returns the recipe keys, among the wanted ones, in which records differ."""
    flat = [_whole(record) for record in records]
    keys = sorted({key for recipe in flat for key in recipe if wanted(key)})
    return [key for key in keys if len({text_of(recipe.get(key)) for recipe in flat}) > 1]


def settings_of(record: Record, keys: Iterable[str]) -> str:
    """Returns ``key=value`` of recipe keys."""
    flat = _whole(record)
    return ", ".join(f"{key}={text_of(flat.get(key))}" for key in keys)


def _whole(record: Record) -> dict[str, Any]:
    """Returns a run's flat recipe; if this version reads it, later fields are added with the defaults of the run."""
    own = flatten(completed(record.recipe))
    if own.get("device") == "auto":
        own["device"] = "cuda" if record.environment.gpu else "cpu"
    with suppress(MicrogliaError, ValueError, TypeError):
        return {**flatten(completed(as_dict(resolve(record.recipe)))), **own}
    return own


def text_of(value: Any) -> str:
    """Returns a recipe's value as readable text."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def pattern_of(record: Record) -> str:
    """Returns the pattern of a run."""
    return str(record.recipe["prune"].get("pattern", "unstructured"))


def scope_of(record: Record) -> str:
    """Returns the scope of a run, within which units compete."""
    scope = record.recipe["prune"].get("scope", "global")
    return ", ".join(f"{k}={v:g}" for k, v in sorted(scope.items())) if isinstance(scope, dict) else str(scope)


def asked_of(record: Record) -> str:
    """Returns the budget of a run in words."""
    if (family := family_of(record)) is not None:
        return family.asked(record)
    return ", ".join(f"{k} {v:g}" for k, v in sorted(record.asked.items()) if v is not None) or "the pattern's own"


def fraction_of(record: Record) -> float:
    """Returns the sort key of budgets, from weak to strong."""
    if (family := family_of(record)) is not None:
        return family.strength(record)
    given = {k: v for k, v in record.asked.items() if v is not None}
    return -min((v for k, v in given.items() if k != "ms" or len(given) == 1), default=1.0)
