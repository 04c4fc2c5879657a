"""Base of methods that learn or move masks: dense training, a search with soft masks, exact masks, fine-tuning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import PatternError
from microglia.core.layers import Layer, prunable_layers
from microglia.core.masks import MaskSet, enforce, mask, masks_of
from microglia.core.patterns import Channel
from microglia.core.sharded import has_shards, refuse_shards, whole
from microglia.graph.order.permute import check_permutable
from microglia.methods.arguments import check_steps, check_unwrapped
from microglia.methods.config import SearchConfig, UnitConfig
from microglia.methods.limits import Limit, limit_of
from microglia.methods.pruner import Pruner
from microglia.methods.soft import SoftMasks
from microglia.methods.units import Units, make_units, split
from microglia.scores import Evidence
from microglia.tasks.task import Task

__all__ = ["SearchConfig", "UnitConfig", "UnitPruner", "fits"]

SNAPSHOTS = 24
"""Number of times that a search records the distribution of its masks."""
BINS = 20
UNDECIDED = (0.01, 0.99)
"""A factor between these is neither kept nor removed (spec: SMART 2.5)."""

Report = dict[str, Any]
Moment = Callable[[str], Report]
"""Called with ``soft`` and ``hard`` around the freeze; returns measurements of the model at that moment."""


def fits(task: Task, config: UnitConfig) -> None:
    """Raises unless layers, pattern, budget and, for channels, the trace fit the task's model."""
    model = task.build()
    pruner = Pruner(model, config)
    if isinstance(pruner.pattern, Channel) or config.flops is not None:
        _units_and_limit(pruner, config, task.example)
    if config.permute:
        check_permutable(pruner.pattern, model, task.example)


def _units_and_limit(pruner: Pruner, config: UnitConfig, example_inputs: Any) -> tuple[Units, Limit]:
    """Returns all units of a pruner's model, and the limit on those that stay."""
    cost = config.cost if config.flops is None else "macs"
    units = make_units(
        pruner.model, pruner.pattern, pruner.layers, cost=cost, example_inputs=example_inputs, exclude=config.exclude
    )
    return units, limit_of(units, pruner, config)


class UnitPruner(Pruner):
    """A pruner over all units of a model, whose masks may be soft, exact or open from one step to the next.

    Args:
        model: The model to prune, in place.
        config: See `UnitConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training; fractions refer to these.
        example_inputs: One batch of inputs; needed for the pattern channel and for a cost in MACs.
        evidence: The data for the score.
        at_freeze: Called with ``soft`` and ``hard`` right before and after the masks become exact.
        **settings: The fields of the config by keyword instead.
    """

    Config = UnitConfig
    couples: ClassVar[bool] = True
    softens: ClassVar[bool] = True
    """Whether its masks are ever soft, so that the change at the freeze is meaningful."""

    def __init__(
        self,
        model: nn.Module,
        config: UnitConfig | None = None,
        *,
        total_steps: int,
        example_inputs: Any = None,
        evidence: Evidence | None = None,
        at_freeze: Moment | None = None,
        **settings: Any,
    ) -> None:
        total_steps = check_steps(total_steps, type(self).__name__)
        super().__init__(model, config, evidence=evidence, **settings)
        check_unwrapped(model, type(self).__name__)
        if masks_of(model):
            raise PatternError(
                f"{type(self).__name__} starts from a model without masks: fold them into the weights with microglia.fold."
            )
        own = self.own
        self.total_steps, self.at_freeze = total_steps, at_freeze
        self.units, self.limit = _units_and_limit(self, own, example_inputs)
        self.units.costs = self.units.costs.to(next(iter(self.layers.values())).raw.device)
        first, last = own.span
        self.begin = round(first * self.total_steps)
        self.end = max(self.begin + 1, round(last * self.total_steps))
        self.steps = 0
        self.threshold: Tensor | None = None
        self.history: list[Report] = []
        self.freeze_report: Report = {}
        self.kept: Tensor | None = None
        self.soft: SoftMasks | None = None
        self.soft = SoftMasks(model, self.units, self._factors, self.initial_scores())
        scores = self.soft.scores
        self._first = None if scores is None else scores.detach().clone()

    @property
    def own(self) -> UnitConfig:
        """The config."""
        return cast(UnitConfig, self.config)

    @property
    def keep(self) -> int:
        """The cost that stays in the end; 0 if the pattern chooses within its own rows."""
        return self.limit.keep

    @property
    def searching(self) -> bool:
        """Whether the masks are soft now."""
        return self.begin <= self.steps < self.end

    @property
    def progress(self) -> float:
        """Progress of the search, from 0 at its first step to 1 at its last."""
        return min(1.0, max(0.0, (self.steps - self.begin) / max(1, self.end - self.begin - 1)))

    # ------------------------------------------------------------------------------------------ what a method says
    def initial_scores(self) -> Tensor | None:
        """Returns the initial parameter of the search, (count,), or None."""
        return None

    def factors(self) -> Tensor:
        """Returns the soft mask of every unit, (count,), differentiable."""
        raise NotImplementedError

    def ranking(self) -> Tensor:
        """Returns the scores whose exact top the freeze keeps, (count,)."""
        raise NotImplementedError

    @property
    def weight_layers(self) -> dict[str, Layer]:
        """The layers whose weights units hold; channels are coupled over all of them."""
        return prunable_layers(self.model) if isinstance(self.pattern, Channel) else self.layers

    @property
    def raw_weights(self) -> dict[str, Tensor]:
        """The trainable weights below the factors, by name."""
        return {name: whole(layer.raw) for name, layer in self.weight_layers.items()}

    # ----------------------------------------------------------------------------------------------------- the phases
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step; the last step of the search makes the masks exact."""
        if self.searching and (self.steps - self.begin) % max(1, (self.end - self.begin) // SNAPSHOTS) == 0:
            self.history.append(self._snapshot())
        self.steps += 1
        if self.steps == self.end:
            self.freeze(optimizer)

    @torch.no_grad()
    def freeze(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Keeps the exact top of the ranking from here on, and records the change."""
        self.steps = self.end - 1  # with the soft masks of the last step
        soft = self.factors()
        kept = self.choose(self.ranking())
        difference = (soft - kept.to(soft.dtype)).abs()
        undecided = (soft > UNDECIDED[0]) & (soft < UNDECIDED[1])
        before = self.at_freeze("soft") if self.at_freeze is not None else {}
        self.steps = self.end
        self.harden(kept, optimizer)
        after = self.at_freeze("hard") if self.at_freeze is not None else {}
        self.freeze_report = {
            "step": self.steps,
            "softens": self.softens,
            "units": int((self.units.costs > 0).sum()),
            "kept": int(kept.sum()),
            "undecided": int(undecided.sum()),
            "largest": float(difference.max()),
            "mean": float(difference.mean()),
            "soft": before,
            "hard": after,
        }

    def finish(self) -> MaskSet:
        """Ends the search if needed, writes removed units as zeros and detaches from the model; returns the masks."""
        if self.soft is not None:
            if self.soft.kept is None:
                self.freeze()
            self._warn_unlearned()
            self.soft.detach_companions(self.model)
            self.soft.leave(self.model)
            self.soft = None
        return self.masks

    def choose(self, scores: Tensor) -> Tensor:
        """Returns the units that an exact selection by these scores keeps, boolean (count,)."""
        return self.limit.choose(scores)

    def harden(self, kept: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Makes ``kept`` the exact masks of the model."""
        assert self.soft is not None
        masks = self.units.masks(kept)
        self.soft.harden(self.model, masks)
        self.soft.kept = self.kept = kept
        mask(self.model, masks)
        enforce(self.model, optimizer)

    def open(self) -> None:
        """Makes all units trainable again; removed units start from zero."""
        assert self.soft is not None
        self.soft.kept = None
        mask(self.model, self.units.masks(self.units.costs >= 0))

    # -------------------------------------------------------------------------------------------- what the loop asks
    def penalty(self) -> Tensor | float:
        """Returns the term that the training adds to the loss; on several ranks every parameter must have a gradient."""
        scores = self.soft.scores if self.soft is not None else None
        if scores is None or self.searching or not torch.distributed.is_initialized() or has_shards(self.model):
            return 0.0
        return 0.0 * scores.sum()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the search; its scores are in the model's state."""
        state = {
            "steps": self.steps,
            "threshold": self.threshold,
            "history": self.history,
            "freeze": self.freeze_report,
            "generator": self.evidence.generator.get_state(),
        }
        if self.soft is not None and not self.soft.attached:
            state["kept"] = self.soft.kept
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state; afterwards the model has the names of its state."""
        self.steps, self.threshold = state["steps"], state["threshold"]
        self.history, self.freeze_report = list(state["history"]), dict(state["freeze"])
        self.evidence.generator.set_state(state["generator"])
        if "kept" in state:
            kept = state["kept"]
            self.harden(self.units.costs >= 0 if kept is None else kept.to(self.units.costs.device))
            if kept is None:
                self.open()

    def report(self) -> Report:
        """Returns the report of the search: the freeze, the masks' distribution over time, the density of each layer."""
        layers = {}
        if self.kept is not None:
            parts, costs = split(self.units, self.kept), split(self.units, self.units.costs)
            layers = {name: float(costs[name][part].sum() / costs[name].sum()) for name, part in parts.items()}
        told = self.limit.told(self.kept) if self.kept is not None else {}
        return {"freeze": self.freeze_report, "history": self.history, "densities": layers, **told}

    # --------------------------------------------------------------------------------------------------------- within
    def _warn_unlearned(self) -> None:
        """Warns if the search took steps but no optimizer moved a score: the masks are the initial ones."""
        assert self.soft is not None
        first, scores = self._first, self.soft.scores
        if first is not None and scores is not None and self.steps > 0 and torch.equal(first, whole(scores.detach()).to(first)):
            warnings.warn(
                f"No optimizer moved the scores of {type(self).__name__}, so its masks learned nothing: give the optimizer "
                "pruner.param_groups() too, or step pruner.optimizers().",
                stacklevel=3,
            )

    def _factors(self) -> Tensor | None:
        if not self.shards:
            refuse_shards(self.model, type(self).__name__)
        return self.factors() if self.searching else None

    @torch.no_grad()
    def _snapshot(self) -> Report:
        factors = self.factors().detach()[self.units.costs > 0].float()
        histogram = torch.histc(factors, BINS, 0, 1).long().tolist()
        undecided = int(((factors > UNDECIDED[0]) & (factors < UNDECIDED[1])).sum())
        return {"step": self.steps, "histogram": histogram, "undecided": undecided}
