"""Methods by name: a method is a function (task, run, config) -> model with a frozen config.

A config is composed, not inherited from a tower: `PruneConfig` says what is pruned, `Trainings` how the model is trained,
`Sampling` what scores look at, `Permuting`, `UnitConfig` and `SearchConfig` are further parts, and the rest are the method's
own fields. In YAML and by keyword all of them stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from microglia.core.errors import BudgetError
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
    """How the model is trained.

    Attributes:
        dense: Training of the dense model, where the task brings no trained weights.
        train: Training after (or while) pruning.
    """

    dense: FitConfig = field(default_factory=FitConfig)
    train: FitConfig = RECOVERY


@dataclass(frozen=True)
class Sampling:
    """What a score looks at.

    Attributes:
        score_batches: Training batches a score looks at.
        score_batch_size: Examples in each.
    """

    score_batches: int = 1
    score_batch_size: int = 128


@dataclass(frozen=True)
class MethodConfig(Sampling, Trainings, PruneConfig):
    """What to keep, what to score with and how to train, common to all whole procedures."""


@dataclass(frozen=True)
class Permuting:
    """A part of methods that mask a trained network.

    Attributes:
        permute: Whether to put the channels of the dense network, whose function stays, in an order in which blocks of
            several outputs (or inputs) keep more of its magnitude; see `microglia.permute_channels`.
    """

    permute: bool = False


UNITS = Takes(
    fields=("density", "params", "layers", "exclude", "allow_empty"),
    patterns={Channel: "shrunk", object: "masked"},
    why={
        "scope": "it finds the share of each layer itself, so that its scope is global",
        "protect": "it takes exclude, which leaves layers dense and uncounted",
        "score": "it ranks units by values of its own",
        "reduction": "it ranks units by values of its own",
    },
)
"""What methods take that choose among all units by values of their own: channels go, other units are masked."""


@dataclass(frozen=True)
class UnitConfig(Permuting, MethodConfig):
    """Methods that choose among all units of a model while it trains.

    Attributes:
        cost: What the budget counts: ``units``, the ``weights`` they hold, or their ``macs``. ``auto`` is weights, and for the
            pattern channel the number of channels, coupled across layers.
        max_sparsity: Largest fraction of a layer's units that may go.
        recalibrate: Training batches over which batch-norm statistics are estimated anew when the masks are final; 0 for none.
    """

    takes: ClassVar[Takes] = UNITS
    pattern: str = "block:16x8"
    cost: Cost = "auto"
    max_sparsity: float = 1.0
    recalibrate: int = RECALIBRATION

    def check_values(self) -> None:
        """Raises `BudgetError` unless max_sparsity is a fraction."""
        if not 0 < self.max_sparsity <= 1:
            raise BudgetError(f"max_sparsity is the largest fraction of a layer that goes, in (0, 1]; got {self.max_sparsity}.")

    @property
    def span(self) -> tuple[float, float]:
        """Fractions of the training between which the masks move."""
        return 0.0, 1.0


@dataclass(frozen=True)
class SearchConfig:
    """A part of methods with one search inside a training.

    Attributes:
        begin: Fraction of the training at which the search begins; dense until then.
        search: Fraction of the training that the search takes; then the masks are exact and fixed.
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
"""(task, config): raises what is wrong with them, before anything is trained."""


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
        name: As in recipes and on the command line.
        procedure: Trains, prunes and recovers; returns the masked or the shrunk model.
        config: Its frozen config dataclass.
        description: One line.
        defaults: Config fields this name sets, which a recipe may override.
        check: Raises, before anything is trained, what is wrong with a config for a task.
        training: The training after (or while) pruning where a recipe says nothing of it.
        original: The method that this name is a preset of; its own name where it is none.
    """

    name: str
    procedure: Procedure
    config: type[MethodConfig]
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Check = fits
    training: FitConfig = RECOVERY
    original: str = ""

    def outcome(self, pattern: str | Pattern) -> Outcome | None:
        """Returns what the method makes of a model with a pattern; None where it does not admit the pattern."""
        return self.config.takes.outcome(pattern)


methods: Registry[Method] = Registry("method")


def method(
    name: str, config: type[MethodConfig], check: Check = fits, training: FitConfig = RECOVERY
) -> Callable[[Procedure], Procedure]:
    """Returns a decorator that registers a procedure; its docstring's first line describes it."""

    def register(procedure: Procedure) -> Procedure:
        description = (procedure.__doc__ or "").strip().split("\n")[0]
        made = Method(name, procedure, config, description, check=check, training=training, original=name)
        methods.add(name)(made)
        NAMES.setdefault(config, name)
        return procedure

    return register


def preset(name: str, of: str, description: str, **defaults: Any) -> None:
    """Registers a name for a method with other defaults."""
    original = methods[of]
    methods.add(name)(replace(original, name=name, description=description, defaults={**original.defaults, **defaults}))
