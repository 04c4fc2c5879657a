"""What a method prunes, which fields and patterns a method takes, and the one function that refuses the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from microglia.core.errors import BudgetError, MicrogliaError, PatternError, ScoreError, SelectorError
from microglia.core.patterns import NM, Block, Channel, Pattern, Unstructured, parse_pattern
from microglia.core.registry import unknown_name

Outcome = Literal["masked", "shrunk", "gated"]
"""What a method makes of a model: weights under masks, a smaller model, or gates that choose channels for each input."""

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
"""Fields that every config has and a method may leave out, by what they say: with the error of each, and how a list ends."""
COMMON = (*BUDGET, *LAYERS, *SCORING, *SAMPLING)

FORMS: dict[type, str] = {Unstructured: "unstructured", Block: "block:OUTxIN", NM: "nm:N:M", Channel: "channel"}
NAMES: dict[type, str] = {}
"""Config class -> the first method that was registered with it."""
NO_SUCH_BUDGET = (
    "flops and ms are budgets of removed channels: masks ({pattern}) save neither. Take the method 'channels' (pattern "
    "channel), or give density or params"
)


@dataclass(frozen=True)
class Takes:
    """What a method declares of its config; its own fields and its trainings need no word.

    Attributes:
        fields: Those of `COMMON` that the method reads. Another value than the default is refused for all others.
        patterns: Pattern class -> what becomes of the model; the first class that a pattern is an instance of counts, and
            `object` stands for every pattern.
        scopes: Words that ``scope`` may be; () leaves them to the selection.
        also: The method's own terms of a budget, named beside ``density`` and the like in errors.
        needs: Kinds of layers without which the method has nothing to rank, such as ``norm``.
        why: Field, or form of a pattern -> the reason to refuse it; it may quote fields, as in ``{pattern}``.
    """

    fields: tuple[str, ...]
    patterns: Mapping[type, Outcome]
    scopes: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def forms(self) -> str:
        """The patterns it admits, as a user writes them."""
        return _listed([form for kind, form in FORMS.items() if any(issubclass(kind, known) for known in self.patterns)], "or")

    def outcome(self, pattern: str | Pattern) -> Outcome | None:
        """Returns what the method makes of a model with a pattern; None where it does not admit the pattern."""
        parsed = parse_pattern(pattern)
        return next((outcome for kind, outcome in self.patterns.items() if isinstance(parsed, kind)), None)


MASKS = Takes(
    fields=("density", "params", *LAYERS, *SCORING, *SAMPLING),
    patterns={Unstructured: "masked", Block: "masked", NM: "masked", Channel: "masked", object: "masked"},
    why={"flops": NO_SUCH_BUDGET, "ms": NO_SUCH_BUDGET},
)
"""What methods take that score every weight and keep the best."""


@dataclass(frozen=True)
class PruneConfig:
    """What to keep, common to all methods.

    Attributes:
        density: Kept fraction of the prunable weights, in (0, 1].
        params: Kept fraction of all parameters, in (0, 1]; with ``density`` the tighter one binds.
        flops: Kept fraction of the multiply-accumulates; only where channels are removed (the method ``channels``).
        ms: Milliseconds that one example may take on this machine, by measurement; only there too.
        pattern: ``unstructured``, ``block:OUTxIN``, ``nm:N:M`` or ``channel``.
        scope: ``global``, ``layer``, ``row``, ``erk``, or densities by layer name.
        score: Name of a score; see ``microglia methods``.
        reduction: How the scores of a unit's weights become one: ``mean``, ``sum``, ``max``, ``l2``.
        layers: Selectors of the layers to prune.
        exclude: Selectors of layers to leave out: neither pruned nor counted.
        protect: Selectors of layers to keep dense but count as kept.
        allow_empty: Whether a layer may lose all its weights.

    A method takes some of these fields (``takes``). The others stay at their defaults; another value is refused. A config
    is composed of parts: this one, and dataclasses with fields of their own, each with a ``check_values`` where it needs one,
    which raises for values that mean nothing. All are called, so that no part calls another's.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    takes: ClassVar[Takes] = MASKS

    density: float | None = None
    params: float | None = None
    flops: float | None = None
    ms: float | None = None
    pattern: str = "unstructured"
    scope: Literal["global", "layer", "row", "erk"] | dict[str, float] = "global"
    score: str = "magnitude"
    reduction: Literal["mean", "sum", "max", "l2"] = "mean"
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    allow_empty: bool = False

    def __post_init__(self) -> None:  # here, so that it shows before a dense model is trained
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
    """Returns the fields of a config that its method does not read, with their defaults: all that they may be."""
    return {f.name: f.default for f in fields(config) if not is_taken(config, f.name)}


def refuse(config: PruneConfig) -> None:
    """Raises for the first field or pattern that a method does not take.

    A field that is not taken may hold its default: version 0.1 wrote every field out.

    Raises:
        BudgetError: A term of the budget is not taken.
        SelectorError: A field of layers is not taken.
        ScoreError: A field of scores is not taken.
        PatternError: The pattern cannot be read, or the method does not admit it.
        UnknownNameError: The method has no such scope.
    """
    kind, takes = type(config), config.takes
    who = f"The method {NAMES[kind]!r}" if kind in NAMES else kind.__name__
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
