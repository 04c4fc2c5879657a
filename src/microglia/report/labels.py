"""Labels: what a report calls a run, from its recipe; runs with the same labels differ in their seed alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from statistics import fmean
from typing import Any

from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import as_dict, resolve
from microglia.report.records import Record
from microglia.storage.run import flatten

SHOWN = {
    "model",
    "data",
    "method",
    "seed",
    "prune.pattern",
    *(f"prune.{term}" for term in ("density", "params", "flops", "ms", "r", "count", "mode", "rule")),
}
"""Recipe keys that a table shows anyway; the others are named where they differ between runs of one method."""
DENSE = ("checkpoint", "normalize", "image_size", "label_smoothing", "dense.")
"""Recipe keys, or beginnings of them, that the dense model depends on."""


USUAL_RULE = "prefix_le"
"""Rule of a dynamic method's targets that goes without saying in the name of its rows."""


def method_of(record: Record) -> str:
    """Returns a run's method, of a dynamic one with its mode, and with its rule where that is not the usual one."""
    method, prune = str(record.recipe["method"]), record.recipe["prune"]
    if not record.dynamic:
        return method
    rule = rule_of(record)
    return " ".join(filter(None, (method, str(prune.get("mode", "")), "" if rule == USUAL_RULE else rule)))


def rule_of(record: Record) -> str:
    """Returns the rule of a dynamic run's targets."""
    return str(record.recipe["prune"].get("rule", USUAL_RULE))


def named_elsewhere(key: str) -> bool:
    """Tells whether a table shows a recipe key in a column of its own."""
    return key in SHOWN or key.startswith(("prune.scope.", "prune.r.")) or key == "prune.scope"


def varying_of(records: Iterable[Record], wanted: Callable[[str], bool]) -> list[str]:
    """Returns the wanted recipe keys in which records differ."""
    flat = [_whole(record) for record in records]
    keys = sorted({key for recipe in flat for key in recipe if wanted(key)})
    return [key for key in keys if len({text_of(recipe.get(key)) for recipe in flat}) > 1]


def settings_of(record: Record, keys: Iterable[str]) -> str:
    """Returns ``key=value`` of recipe keys."""
    flat = _whole(record)
    return ", ".join(f"{key}={text_of(flat.get(key))}" for key in keys)


def _whole(record: Record) -> dict[str, Any]:
    """Returns a run's recipe, flat, and, if this version reads it, later fields at the defaults it ran with."""
    own = flatten(record.recipe)
    if own.get("device") == "auto":
        own["device"] = "cuda" if record.environment.gpu else "cpu"
    with suppress(MicrogliaError, ValueError, TypeError):
        return {**flatten(as_dict(resolve(record.recipe))), **own}
    return own


def text_of(value: Any) -> str:
    """Returns a recipe's value for people."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def pattern_of(record: Record) -> str:
    """Returns what a run keeps or removes together."""
    return str(record.recipe["prune"].get("pattern", "unstructured"))


def scope_of(record: Record) -> str:
    """Returns within what units compete in a run."""
    scope = record.recipe["prune"].get("scope", "global")
    return ", ".join(f"{k}={v:g}" for k, v in sorted(scope.items())) if isinstance(scope, dict) else str(scope)


def asked_of(record: Record) -> str:
    """Returns the budget of a run; of a dynamic one the operations, by which count, or r."""
    if record.dynamic:
        return _asked_of_gates(record.recipe["prune"])
    return ", ".join(f"{k} {v:g}" for k, v in sorted(record.asked.items()) if v is not None) or "the pattern's own"


def _asked_of_gates(prune: Mapping[str, Any]) -> str:
    flops, r = prune.get("flops"), prune.get("r")
    if flops is not None:
        return f"flops {flops:g}{' by the paper count' if prune.get('count') == 'paper' else ''}"
    if isinstance(r, dict):  # which of several such plans is meant shows in no number, so it gets a mark
        mark = hashlib.blake2b(json.dumps(r, sort_keys=True).encode(), digest_size=3).hexdigest()
        return f"r by layer, mean {fmean(r.values()):.4g} (plan {mark})"
    return f"r {r:g}"


def fraction_of(record: Record) -> float:
    """Returns what sorts budgets from weak to strong."""
    if record.dynamic:
        flops, r = record.recipe["prune"].get("flops"), record.recipe["prune"].get("r")
        return -float(flops if flops is not None else fmean(r.values()) if isinstance(r, dict) else r)
    given = {k: v for k, v in record.asked.items() if v is not None}
    return -min((v for k, v in given.items() if k != "ms" or len(given) == 1), default=1.0)
