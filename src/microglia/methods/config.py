"""Methods by name: a method is a function (task, run, config) -> model with a frozen config.

A config is composed of parts: `PruneConfig` selects what is pruned, `Trainings` holds the trainings, `Sampling` the data for
scores. `Permuting`, `UnitConfig` and `SearchConfig` are further parts; the other fields are the method's own. In YAML and by
keyword all fields are on one level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import nn

from microglia.core.errors import BudgetError
from microglia.core.layers import prunable_layers
from microglia.core.patterns import Channel, Pattern, parse_pattern
from microglia.core.registry import Registry
from microglia.graph.order.permute import check_permutable
from microglia.methods.pruner import Pruner
from microglia.methods.units import Cost
from microglia.methods.what import NAMES, Outcome, PruneConfig, Takes
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import RECOVERY, FitConfig
from microglia.train.recover import RECALIBRATION


@dataclass(frozen=True)
class Trainings:
    """The trainings of the model.

    Attributes:
        dense: Training of the dense model, if the task has no trained weights.
        train: Training after (or while) pruning.
    """

    dense: FitConfig = field(default_factory=FitConfig)
    train: FitConfig = RECOVERY


@dataclass(frozen=True)
class Sampling:
    """The data for a score.

    Attributes:
        score_batches: Number of training batches for the score.
        score_batch_size: Examples in each.
    """

    score_batches: int = 1
    score_batch_size: int = 128


@dataclass(frozen=True)
class MethodConfig(Sampling, Trainings, PruneConfig):
    """The budget, the score and the trainings: common to all whole procedures.

    A field that joins a method later is named in ``later``: at its default it is no part of a recipe's identity, so that runs
    of earlier versions resume.
    """

    later: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def identity(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns settings of the method without the later ones that have their defaults."""
        usual = {f.name: f.default for f in fields(cls) if f.name in cls.later}
        usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}  # as JSON has it
        return {key: value for key, value in settings.items() if key not in usual or value != usual[key]}

    def asked_besides(self) -> dict[str, float]:
        """Returns what a budget of the method's own asks for, by name, beside `microglia.core.budget.Budget`."""
        return {}

    def own_bytes(self, model: nn.Module) -> int:
        """Returns the bytes that the method holds while it chooses, beside the model and its training.

        By default a score for each weight; for a method that removes channels also the model's copies, one of them in float64.
        """
        weights = prunable_weights(model)
        return 4 * weights + (12 * weights if self.takes.outcome(self.pattern) == "shrunk" else 0)


def prunable_weights(model: nn.Module) -> int:
    """Returns the number of weights in the prunable layers of a model."""
    return sum(layer.raw.numel() for layer in prunable_layers(model).values())


@dataclass(frozen=True)
class Permuting:
    """A part of methods that mask a trained network.

    Attributes:
        permute: Whether to reorder the channels of the dense network so that blocks of several outputs (or inputs) keep more
            magnitude. The network's function stays the same; see `microglia.permute_channels`.
    """

    permute: bool = False


UNITS = Takes(
    fields=("density", "params", "flops", "layers", "exclude", "allow_empty"),
    patterns={Channel: "shrunk", object: "masked"},
    why={
        "scope": "it finds the share of each layer itself, so that its scope is global",
        "protect": "it takes exclude, which leaves layers dense and uncounted",
        "score": "it ranks units by values of its own",
        "reduction": "it ranks units by values of its own",
    },
)
"""Fields of methods that choose among all units by their own values: channels are removed, other units masked."""


@dataclass(frozen=True)
class UnitConfig(Permuting, MethodConfig):
    """Methods that choose among all units of a model while it trains; ``flops`` needs no ``cost``.

    Attributes:
        cost: Cost that ``density`` counts: ``units``, their ``weights``, or their ``macs``. ``auto`` is weights; for the
            pattern channel it is the number of channels, coupled across layers. Their ``macs`` are those of the whole model.
        max_sparsity: Maximum fraction of a layer's units that may be removed.
        recalibrate: Training batches over which batch-norm statistics are estimated again when the masks are final; 0 for none.
    """

    takes: ClassVar[Takes] = UNITS
    pattern: str = "block:16x8"
    cost: Cost = "auto"
    max_sparsity: float = 1.0
    recalibrate: int = RECALIBRATION

    def check_values(self) -> None:
        """Raises `BudgetError` unless max_sparsity is a fraction, and where ``flops`` has no clear meaning."""
        if not 0 < self.max_sparsity <= 1:
            raise BudgetError(f"max_sparsity is the largest fraction of a layer that goes, in (0, 1]; got {self.max_sparsity}.")
        if self.flops is None:
            return
        if self.density is not None or self.params is not None:
            raise BudgetError("flops is a budget of its own: give one of density, params and flops.")
        if self.cost not in ("auto", "macs"):
            raise BudgetError(f"flops counts multiply-accumulates, and cost={self.cost!r} something else: leave cost out.")
        if self.permute:
            raise BudgetError("permute orders channels for densities of layers: give density or params, and not flops.")

    def own_bytes(self, model: nn.Module) -> int:
        """Returns the bytes of a soft mask with its gradient for each weight, and of a score with its states for each unit."""
        weights, unit = prunable_weights(model), math.prod(parse_pattern(self.pattern).footprint)
        return max(super().own_bytes(model), 8 * weights + 16 * weights // unit)

    @property
    def span(self) -> tuple[float, float]:
        """Fractions of the training between which the masks move."""
        return 0.0, 1.0


@dataclass(frozen=True)
class SearchConfig:
    """A part of methods with one search inside a training.

    Attributes:
        begin: Fraction of the training at which the search begins; dense until then.
        search: Fraction of the training for the search; afterwards the masks are exact and fixed.
    """

    begin: float = 0.0
    search: float = 0.2

    def check_values(self) -> None:
        """Raises `BudgetError` unless the search lies within the training."""
        if not (self.begin >= 0 and self.search > 0 and self.begin + self.search <= 1 + 1e-9):
            raise BudgetError(
                f"begin and search are fractions of the training, together at most 1; got {self.begin} and {self.search}."
            )

    @property
    def span(self) -> tuple[float, float]:
        """Fractions of the training between which the masks move."""
        return self.begin, self.begin + self.search


Procedure = Callable[[Task, Run, Any], nn.Module]
Check = Callable[[Task, Any], object]
"""Check of (task, config): raises an error before anything is trained."""


def fits(task: Task, config: PruneConfig) -> None:
    """Raises unless layers, pattern and budget of masks fit the task's model."""
    model = task.build()
    Pruner(model, config)
    if isinstance(config, Permuting) and config.permute:
        check_permutable(parse_pattern(config.pattern), model, task.example)


@dataclass(frozen=True)
class Method:
    """A named procedure.

    Attributes:
        name: Name in recipes and on the command line.
        procedure: Trains, prunes and recovers; returns the masked or shrunk model.
        config: Its frozen config dataclass.
        description: One line.
        defaults: Config fields that this name sets; a recipe may override them.
        check: Raises an error about a config for a task before anything is trained.
        training: The default training after (or while) pruning.
        original: The method of which this name is a preset; its own name if it is not a preset.
        paper: Its source: authors, year, and the number at arXiv where it has one; empty if it has no single source.
        purpose: Uses for which it is good, in a few words.
    """

    name: str
    procedure: Procedure
    config: type[MethodConfig]
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Check = fits
    training: FitConfig = RECOVERY
    original: str = ""
    paper: str = ""
    purpose: str = ""

    @property
    def about(self) -> dict[str, str]:
        """Its description, its purpose (``for``) and its paper."""
        return {"description": self.description, "for": self.purpose, "paper": self.paper}

    def outcome(self, pattern: str | Pattern) -> Outcome | None:
        """Returns the outcome of the method for a pattern; None if it does not admit the pattern."""
        return self.config.takes.outcome(pattern)


methods: Registry[Method] = Registry("method")


def method(
    name: str,
    config: type[MethodConfig],
    check: Check = fits,
    training: FitConfig = RECOVERY,
    *,
    paper: str = "",
    purpose: str = "",
) -> Callable[[Procedure], Procedure]:
    """Returns a decorator that registers a procedure; its docstring's first line describes it, the rest is as in `Method`."""

    def register(procedure: Procedure) -> Procedure:
        description = (procedure.__doc__ or "").strip().split("\n")[0]
        made = Method(
            name, procedure, config, description, check=check, training=training, original=name, paper=paper, purpose=purpose
        )
        methods.add(name)(made)
        NAMES.setdefault(config, name)
        return procedure

    return register


def preset(name: str, of: str, description: str, *, paper: str = "", purpose: str = "", **defaults: Any) -> None:
    """Registers a name for a method with other defaults; without a paper of its own it has that of the method."""
    original = methods[of]
    own = {**original.defaults, **defaults}
    made = replace(original, name=name, description=description, defaults=own, paper=paper or original.paper, purpose=purpose)
    methods.add(name)(made)
