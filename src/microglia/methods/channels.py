"""Removal of channels: dense model, a score per coupled channel, widths for a budget, a cut, recovery."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from microglia.core.batch import to_device
from microglia.core.budget import Budget
from microglia.core.errors import BudgetError
from microglia.core.patterns import Channel
from microglia.graph import ShrinkError, plan_of, prune_channels
from microglia.graph.channels.latency_table import TIMED_BY
from microglia.graph.cutting.plan import attach
from microglia.methods.config import MethodConfig, method, preset
from microglia.methods.procedure import change, cut, dense_model, evidence, observe, train
from microglia.methods.what import BUDGET, SAMPLING, SCORING, Takes
from microglia.storage.changes import changes_of
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.recover import RECALIBRATION, recalibrate_on

TERMS = ("density", "params", "flops")
"""Terms of the budget that are fractions of the dense model."""


@dataclass(frozen=True)
class ChannelsConfig(MethodConfig):
    """Physical removal of channels; ``density`` is the kept fraction of the prunable channels.

    Attributes:
        pattern: Always ``channel``.
        scope: ``uniform``: the same fraction of every group of coupled channels; ``global``: by normalized score across groups.
        reduction: Function that combines the scores of all weights of a channel, in every layer of its group.
        exclude: Selectors of layers that keep their shape; channels coupled to their inputs and outputs stay too.
        round_to: Widths are kept at multiples of this if the budget allows; 1 for none.
        within_groups: Remove channels within each group of a grouped convolution or norm, rather than whole groups.
        keep_class: Remove only channels that the model's own classes can lose, so that the model never becomes a traced graph.
        batch: Examples in the batch whose time is ``ms``.
        executions: Ways to run the candidates of a budget in ``ms``, such as ``[openvino]``; the fastest counts.
        recalibrate: Training batches over which batch-norm statistics are estimated again after the cut; 0 for none.
        rounds: Number of rounds of scoring, removal and training; each round removes the same fraction.
    """

    takes: ClassVar[Takes] = Takes(
        fields=(*BUDGET, *SCORING, *SAMPLING, "exclude", "scope"),
        patterns={Channel: "shrunk"},
        scopes=("uniform", "global"),
        why={
            "layers": "channels are coupled across layers, and exclude keeps layers whole",
            "protect": "channels are coupled across layers, and exclude keeps layers whole",
            "allow_empty": "no layer is ever emptied of channels",
        },
    )
    later: ClassVar[tuple[str, ...]] = ("executions",)
    pattern: str = "channel"
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]  # masks compete elsewhere
    reduction: Literal["mean", "sum", "max", "l2"] = "l2"
    round_to: int = 16
    within_groups: bool = False
    keep_class: bool = False
    batch: int = 1
    executions: tuple[str, ...] = TIMED_BY
    recalibrate: int = RECALIBRATION
    rounds: int = 1

    def check_values(self) -> None:
        """Raises `BudgetError` for counts below 1, and for several rounds with a budget of time."""
        if min(self.round_to, self.batch, self.rounds) < 1:
            raise BudgetError(
                f"round_to, batch and rounds are at least 1; got {self.round_to}, {self.batch} and {self.rounds}."
            )
        if self.ms is not None and self.rounds > 1:
            raise BudgetError("Rounds go by fractions of density, params or flops; leave ms out, or take one round.")

    @property
    def budget(self) -> Budget:
        """The budget."""
        return Budget(density=self.density, params=self.params, flops=self.flops, ms=self.ms)


def fits(task: Task, config: ChannelsConfig) -> None:
    """Raises unless the channels of the task's model can be removed down to the budget."""
    model = task.build()
    small = prune_channels(model, _batch(task, config), config.budget, verified=False, **_settings(config))
    if config.rounds > 1 and plan_of(small).kind == "graph":
        raise ShrinkError(
            f"{type(model).__name__} comes back from a cut as a graph, which cannot be cut again: take rounds=1, or "
            "keep_class=true for what its own classes can follow."
        )


@method("channels", ChannelsConfig, check=fits, purpose="speed in any engine: the road to begin with")
def channels(task: Task, run: Run, config: ChannelsConfig) -> nn.Module:
    """Score coupled channels by group, remove the least to the budget, recover by training."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None

    for number in range(1, config.rounds + 1):
        mark = "" if number == config.rounds else f"-{number}"
        model = cut(task, run, f"prune{mark}", model, partial(_prune, task, run, config, number))
        if config.recalibrate:
            change(run, f"recalibrate{mark}", model, partial(_recalibrate, task, run, config, model))
        if number == config.rounds:
            observe(task, run, "before", model)
        train(task, run, f"train{mark}", model, config.train, teacher=teacher)
    return model


def _prune(task: Task, run: Run, config: ChannelsConfig, number: int, model: nn.Module) -> nn.Module:
    """Returns the model of a round: after round i of n the fraction of the dense model is the budget's to the power i / n."""
    reached = plan_of(model).got if any(done.kind.cuts for done in changes_of(model).values()) else {}
    asked = {term: value for term in TERMS if (value := getattr(config, term)) is not None}
    left = {term: min(1.0, value ** (number / config.rounds) / reached.get(term, 1.0)) for term, value in asked.items()}
    small = prune_channels(
        model,
        to_device(_batch(task, config), run.device),
        Budget(**left, ms=config.ms),
        score=config.score,
        evidence=evidence(task, run, config),
        **_settings(config),
    )
    plan = plan_of(small)
    got = {term: value * reached.get(term, 1.0) if term in TERMS else value for term, value in plan.got.items()}
    return attach(small, replace(plan, asked=plan.asked | asked, got=got))


def _recalibrate(task: Task, run: Run, config: ChannelsConfig, model: nn.Module, progress: Progress) -> None:
    recalibrate_on(model, task, batch_size=config.train.batch_size, count=config.recalibrate, seed=run.seed)


def _batch(task: Task, config: ChannelsConfig) -> Any:
    return task.example_batch(config.batch)


def _settings(config: ChannelsConfig) -> dict[str, Any]:
    """Returns the common arguments of the cut and its trial."""
    return {
        "reduction": config.reduction,
        "scope": config.scope,
        "round_to": config.round_to,
        "exclude": config.exclude,
        "within_groups": config.within_groups,
        "keep_class": config.keep_class,
        "executions": config.executions,
    }


preset(
    "channels-global",
    "channels",
    "Channels compete across groups by normalized score.",
    scope="global",
    purpose="as channels; layers share one budget",
)
