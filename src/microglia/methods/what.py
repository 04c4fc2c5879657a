"""The fields and patterns that a method takes, and the one function that refuses the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from microglia.core.allocation import ScopeName
from microglia.core.errors import BudgetError, MicrogliaError, PatternError, ScoreError, SelectorError
from microglia.core.patterns import NM, Block, Channel, Pattern, Unstructured, parse_pattern
from microglia.core.registry import unknown_name

ScopeSetting = ScopeName | Annotated[str, Field(pattern=r"^[\w-]+(:.+)?$")] | dict[str, float]
"""A scope in a recipe; `microglia.core.allocation.check_scope` knows the names, which others may add to."""

Outcome = Literal["masked", "shrunk", "gated"]
"""Outcome of a method: weights under masks, a smaller model, or gates that choose channels for each input."""

BUDGET = ("density", "params", "flops", "ms")
LAYERS = ("layers", "exclude", "protect", "allow_empty", "scope")
SCORING = ("score", "reduction")
SAMPLING = ("score_batches", "score_batch_size")
GROUPS: tuple[tuple[tuple[str, ...], type[MicrogliaError], str], ...] = (
    (BUDGET, BudgetError, "or"),
    (LAYERS, SelectorError, "and"),
    (SCORING, ScoreError, "and"),
    (SAMPLING, ScoreError, "and"),
)
"""Common fields that a method may leave out, by topic: with the error of each, and the end of a list in its text."""
COMMON = (*BUDGET, *LAYERS, *SCORING, *SAMPLING)

FORMS: dict[type, str] = {Unstructured: "unstructured", Block: "block:OUTxIN", NM: "nm:N:M", Channel: "channel"}
NAMES: dict[type, str] = {}
"""Config class -> the first method that was registered with it."""
_named: ContextVar[str | None] = ContextVar("microglia_method", default=None)
NO_SUCH_BUDGET = (
    "flops and ms are budgets of removed channels: masks ({pattern}) save neither. Take the method 'channels' (pattern "
    "channel), or give density or params"
)


@dataclass(frozen=True)
class Takes:
    """A method's declaration about its config; its own fields and its trainings need no declaration.

    Attributes:
        fields: Fields of `COMMON` that the method reads. All others must have their default values.
        patterns: Pattern class -> outcome. The first class that matches the pattern counts; `object` matches every pattern.
        scopes: Allowed words of ``scope``; () allows all words of the selection.
        also: The method's own terms of a budget, named beside ``density`` in errors.
        needs: Kinds of layers that the method ranks, such as ``norm``; a model without them is refused.
        why: Field, or form of a pattern -> the reason of its refusal, which may quote fields, as in ``{pattern}``.
    """

    fields: tuple[str, ...]
    patterns: Mapping[type, Outcome]
    scopes: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def forms(self) -> str:
        """The admitted patterns in the user's notation."""
        return _listed([form for kind, form in FORMS.items() if any(issubclass(kind, known) for known in self.patterns)], "or")

    def outcome(self, pattern: str | Pattern) -> Outcome | None:
        """Returns the outcome of the method for a pattern; None if it does not admit the pattern."""
        parsed = parse_pattern(pattern)
        return next((outcome for kind, outcome in self.patterns.items() if isinstance(parsed, kind)), None)


MASKS = Takes(
    fields=("density", "params", *LAYERS, *SCORING, *SAMPLING),
    patterns={Unstructured: "masked", Block: "masked", NM: "masked", Channel: "masked", object: "masked"},
    why={"flops": NO_SUCH_BUDGET, "ms": NO_SUCH_BUDGET},
)
"""Fields of methods that score every weight and keep the best."""


@dataclass(frozen=True)
class PruneConfig:
    """The budget and the selection, common to all methods.

    Attributes:
        density: Kept fraction of the prunable weights, in (0, 1].
        params: Kept fraction of all parameters, in (0, 1]; with ``density`` the tighter one binds.
        flops: Kept fraction of the multiply-accumulates; for methods that remove channels or choose units while they train.
        ms: Measured milliseconds that one example may take on this machine; only for the removal of channels.
        pattern: ``unstructured``, ``block:OUTxIN``, ``nm:N:M`` or ``channel``.
        scope: ``global``, ``layer``, ``row``, ``erk``, ``sensitivity:FILE`` (of ``microglia sensitivity``), or densities by
            layer name.
        score: Name of a score; see ``microglia methods``.
        reduction: Function that combines the scores of a unit's weights: ``mean``, ``sum``, ``max``, ``l2``.
        layers: Selectors of the layers to prune.
        exclude: Selectors of layers to leave out: neither pruned nor counted.
        protect: Selectors of layers that stay dense but count as kept.
        allow_empty: Whether a layer may lose all its weights.

    A method takes some of these fields (``takes``). The others stay at their defaults; another value is refused. A config is
    composed of parts: this one, and dataclasses with further fields. A part may have a ``check_values``, which raises for
    invalid values. All of them are called, so that no part calls another's.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    takes: ClassVar[Takes] = MASKS

    density: float | None = None
    params: float | None = None
    flops: float | None = None
    ms: float | None = None
    pattern: str = "unstructured"
    scope: ScopeSetting = "global"
    score: str = "magnitude"
    reduction: Literal["mean", "sum", "max", "l2"] = "mean"
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    allow_empty: bool = False

    def __post_init__(self) -> None:  # here, so that an error appears before a dense model is trained
        refuse(self)
        for part in reversed(type(self).__mro__):
            if (check := vars(part).get("check_values")) is not None:
                check(self)


def is_taken(config: type[PruneConfig], name: str) -> bool:
    """Tells whether a method with this config reads a field."""
    return name not in COMMON or name in config.takes.fields


def taken(config: type[PruneConfig]) -> tuple[str, ...]:
    """Returns the fields of a config that its method reads, in order."""
    return tuple(f.name for f in fields(config) if is_taken(config, f.name))


def left_out(config: type[PruneConfig]) -> dict[str, Any]:
    """Returns the fields of a config that its method does not read, with their defaults, the only allowed values."""
    return {f.name: f.default for f in fields(config) if not is_taken(config, f.name)}


@contextmanager
def named(method: str) -> Iterator[None]:
    """Lets refusals within it name the method that was asked for, such as a preset, and not the one it is of."""
    token = _named.set(method)
    try:
        yield
    finally:
        _named.reset(token)


def refuse(config: PruneConfig) -> None:
    """Raises for the first field or pattern that a method does not take.

    A field that is not taken may hold its default: version 0.1 wrote every field out.

    Raises:
        BudgetError: A term of the budget is not taken.
        SelectorError: A field of layers is not taken.
        ScoreError: A field of scores is not taken.
        PatternError: The pattern cannot be read, or the method does not admit it.
        UnknownNameError: The method does not have the scope.
    """
    kind, takes = type(config), config.takes
    method = _named.get() or NAMES.get(kind)
    who = kind.__name__ if method is None else f"The method {method!r}"
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    for name, usual in left_out(kind).items():
        given = tuple(values[name]) if isinstance(values[name], list) else values[name]
        if given == usual:
            continue
        group, error, word = next(row for row in GROUPS if name in row[0])
        listed = [*(n for n in group if n in takes.fields), *(takes.also if group is BUDGET else ())]
        said = f"takes {_listed(listed, word)}, and not {name}" if listed else f"does not take {name}"
        raise error(f"{who} {said}{_reason(takes.why.get(name), values)}.")
    pattern = parse_pattern(config.pattern)
    if takes.outcome(pattern) is None:
        reason = _reason(takes.why.get(FORMS.get(type(pattern), "")) or takes.why.get("pattern"), values)
        raise PatternError(f"{who} does not take this pattern: its pattern is {takes.forms}, not {pattern}{reason}.")
    if takes.scopes and config.scope not in takes.scopes:
        raise unknown_name(f"scope of {who.replace('The', 'the', 1)}", config.scope, takes.scopes)


def _listed(names: Iterable[str], word: str) -> str:
    """Returns 'a', 'a or b', 'a, b or c'."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def _reason(template: str | None, values: Mapping[str, Any]) -> str:
    return "" if template is None else f": {template.format(**values)}"
