"""Pruning at initialization, before any training: SNIP, GraSP, SynFlow, their controls, and the ablations of such masks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from microglia.core.batch import to_device
from microglia.core.errors import BudgetError, MicrogliaError
from microglia.core.iterative import Alive
from microglia.core.masks import MaskSet, enforce, mask, masks_of
from microglia.core.patterns import Unstructured
from microglia.core.schedules import schedules
from microglia.core.shuffle import shuffled
from microglia.methods.config import MethodConfig, fits, method, preset
from microglia.methods.procedure import change, dense_model, evidence, observe, train
from microglia.methods.pruner import Pruner
from microglia.methods.what import PruneConfig
from microglia.scores import Evidence, PositiveFlow, effective_masks, example_of
from microglia.scores.guard import in_training, untouched
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig

SEPARATE = ("magnitude", "random", "snip", "snip-inference", "gradient", "accumulated-gradient", "synflow")
"""Scores that do not depend on gradients of other weights, so that removing a weight equals setting it to 0."""
EXPLODED = 100.0
"""A mask that raises the loss by this factor gives a warning."""
OTHER = 1_000_003
"""Difference between the seed of the initial weights and the seed of their replacements."""
Ablation = Literal["none", "shuffle", "reinit", "invert"]


@dataclass(frozen=True)
class AtInitConfig(MethodConfig):
    """Pruning at initialization.

    Attributes:
        rounds: Number of rounds of scoring and removal on the way to the density; removed weights never return.
        schedule: Schedule of the densities over the rounds, such as ``geometric`` or ``linear``.
        per_class: Examples of each class to score with, in batches of ``score_batch_size``; None takes ``score_batches``
            batches in their order.
        halves: Whether the examples are sorted by class and scored in two halves, as in GraSP's code: batch norm in train mode
            then sees half of the classes at a time. This needs ``per_class``.
        ablation: Ablation of the mask or the scores (Frankle et al. 2021): ``shuffle`` permutes the mask within each layer,
            ``reinit`` trains other initial weights of the same distribution under it, ``invert`` removes the highest scores
            instead of the lowest.
    """

    train: FitConfig = field(default_factory=FitConfig)
    allow_empty: bool = True
    rounds: int = 1
    schedule: str = "geometric"
    per_class: int | None = None
    halves: bool = False
    ablation: Ablation = "none"

    def check_values(self) -> None:
        """Raises `BudgetError` for invalid combinations of rounds or examples."""
        schedules[self.schedule]
        if self.rounds < 1 or (self.per_class is not None and self.per_class < 1):
            raise BudgetError(f"rounds and per_class are at least 1; got {self.rounds} and {self.per_class}.")
        if self.halves and self.per_class is None:
            raise BudgetError("halves needs per_class, the number of examples of each class: give one, such as 10.")
        if self.rounds > 1 and isinstance(self.scope, Mapping):
            raise BudgetError("Rounds lead from dense to one budget; with densities by layer leave rounds at 1.")


class AtInit(Pruner):
    """Prunes an untrained network in rounds, at construction; afterwards the network only has to be trained.

    Args:
        model: The model to prune, in place.
        config: See `AtInitConfig`; its training fields are not used here.
        evidence: The data for the score.
        **settings: The fields of the config by keyword instead.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> data = Evidence([(torch.randn(2, 8), torch.tensor([0, 1]))])
        >>> AtInit(model, density=0.25, score="synflow", rounds=100, evidence=data).masks.kept
        24
    """

    Config = AtInitConfig

    def __init__(
        self, model: nn.Module, config: PruneConfig | None = None, *, evidence: Evidence | None = None, **settings: Any
    ) -> None:
        super().__init__(model, config, evidence=evidence, **settings)
        own = self.config
        assert isinstance(own, AtInitConfig)
        if own.ablation == "invert":
            score = self.score
            self.score = lambda *given: {name: -value for name, value in score(*given).items()}
        counts = counts_of(own.schedule, own.rounds, self.weights, self.target)
        if self.budget is not None and self.pattern.fixed_density is None and not self.target:
            raise BudgetError(f"Nothing would be left: the budget rounds to none of {self.weights:,} weights. Keep more.")
        single = isinstance(self.pattern, Unstructured) and own.scope == "global" and own.allow_empty
        if own.rounds > 1 and single and own.score in SEPARATE and not self.protected and not masks_of(model):
            mask(model, self._narrowed(counts))
            enforce(model)
        else:
            for count in counts:  # with whole units an earlier round may already be below this count
                self.prune_to(min(count, self.masks.kept))

    def _narrowed(self, counts: list[int]) -> MaskSet:
        """Returns the masks of rounds over single weights: equal to those of prune_to, at the cost of the remaining weights."""
        layers, own = self.layers, self.config
        assert isinstance(own, AtInitConfig)
        if own.score == "synflow" and own.ablation != "invert":
            flow = PositiveFlow(self.model, layers, example_of(self.evidence))
            left = Alive(flow.weights)
            for count in counts:
                left.keep(left.of(*flow.slopes()), count)
        else:
            left = Alive({name: layer.raw for name, layer in layers.items()})
            for count in counts:
                left.keep(left.of(self.score(self.model, layers, self.evidence)), count)
        return left.masks()


def counts_of(schedule: str, rounds: int, weights: int, target: int) -> list[int]:
    """Returns the number of weights after each round, N - int((1 - density) N): the removed number is rounded down.

    The last count is the target itself. Source: Tanaka et al. 2020, their code (``Pruners/pruners.py``, ``_global_mask``);
    with rounding to nearest, a mask of 100 rounds drifts from theirs (survey, correction C4).

    Args:
        schedule: Name of the schedule of the densities.
        rounds: Number of rounds.
        weights: N, the number before the first round.
        target: Number after the last round.
    """
    density = schedules[schedule]
    left = [density(number / rounds, 1.0, target / weights) for number in range(1, rounds)]
    return [*(weights - int((1 - share) * weights) for share in left), target]


def refuse_trained(task: Task, config: MethodConfig) -> None:
    """Raises unless a task's network is untrained, its layers fit, and a requested teacher exists."""
    if task.pretrained:
        raise MicrogliaError(
            "This method starts from initial weights, but the task brings trained weights; leave the checkpoint out."
        )
    if config.train.distill and not config.dense.epochs:
        raise MicrogliaError(
            "There is no dense model to distil from (dense.epochs=0); set train.distill to 0, or dense.epochs above 0."
        )
    fits(task, config)


@method(
    "at-init",
    AtInitConfig,
    check=refuse_trained,
    training=FitConfig(),
    paper="Frankle et al. 2021, arXiv 2009.08576",
    purpose="pruning before training by any score",
)
def at_init(task: Task, run: Run, config: AtInitConfig) -> nn.Module:
    """Score an untrained network, keep the best, train what is left from its initial weights."""
    dense = dense_model(task, run, config.dense)  # for comparison; the rest depends on it only as a teacher
    model = task.build().to(run.device)

    def prune(progress: object) -> dict[str, Any]:
        seen = evidence(task, run, config, per_class=config.per_class, halves=config.halves)
        pruner = AtInit(deepcopy(model), config, evidence=seen)
        masks = shuffled(pruner.masks, pruner.pattern, run.seed) if config.ablation == "shuffle" else pruner.masks
        if config.ablation == "reinit":
            model.load_state_dict(other_weights(task, run.seed).state_dict())
        whole = loss_of(model, seen)
        mask(model, masks)
        enforce(model)
        left = loss_of(model, seen)
        warn_of_explosion(whole, left)
        found = paths(masks, effective_masks(model, to_device(task.example, run.device)))
        return {**found, "loss": {"dense": whole, "masked": left}}

    run.observations["initialization"] = change(run, "prune", model, prune)
    observe(task, run, "before", model)
    train(task, run, "train", model, config.train, teacher=dense if config.train.distill else None)
    return model


@torch.no_grad()
def loss_of(model: nn.Module, seen: Evidence) -> float:
    """Returns the loss on the first batch of the score, with batch norm on batch statistics; the model stays unchanged."""
    batch = next(iter(seen.batches), None)
    if batch is None or seen.loss is None:
        return math.nan
    with untouched(model):
        return float(seen.loss(in_training(model)(batch[0]), batch[1]))


def warn_of_explosion(whole: float, left: float) -> None:
    """Warns if a mask raises the loss by orders of magnitude, as GraSP's mask does without batch norm."""
    if math.isfinite(whole) and not left <= EXPLODED * whole:
        warnings.warn(
            f"The mask raises the loss of the untrained network from {whole:.3g} to {left:.3g}: its signals explode, and "
            "training may diverge. GraSP does so without batch norm. Use a network with batch norm, or another score.",
            stacklevel=2,
        )


def other_weights(task: Task, seed: int) -> nn.Module:
    """Returns the task's network with other initial weights of the same distribution.

    Raises:
        MicrogliaError: The task has no function to draw them.
    """
    if task.fresh is None:
        raise MicrogliaError(
            "This control trains other initial weights, and the task does not say how to draw them: give Task(fresh=...), "
            "which maps a seed to a new model."
        )
    return task.fresh(seed + OTHER)


def paths(masks: MaskSet, effective: MaskSet) -> dict[str, Any]:
    """Returns the number of weights that masks keep, and of those on a path from input to output, in all and by layer."""
    alive = {name: effective[name] & kept.to(effective[name].device) for name, kept in masks.items()}
    layers = {n: {"total": m.numel(), "kept": int(m.sum()), "effective": int(alive[n].sum())} for n, m in masks.items()}
    return {
        "total": masks.total,
        "kept": masks.kept,
        "effective": sum(row["effective"] for row in layers.values()),
        "emptied": [name for name, row in layers.items() if not row["kept"]],
        "layers": layers,
    }


preset(
    "snip",
    "at-init",
    "SNIP: connection sensitivity on one batch (Lee et al. 2019).",
    score="snip",
    paper="Lee et al. 2019, arXiv 1810.02340",
    purpose="before training, moderate sparsity",
)
preset(
    "snip-inference",
    "at-init",
    "SNIP in inference mode, as in its authors' code.",
    score="snip-inference",
    paper="Lee et al. 2019, arXiv 1810.02340",
    purpose="the authors' own variant",
)
preset(
    "snip-iterative",
    "at-init",
    "SNIP in 100 rounds (de Jorge et al. 2021).",
    score="snip",
    rounds=100,
    paper="de Jorge et al. 2021, arXiv 2006.09081",
    purpose="before training, high sparsity",
)
preset(
    "grasp",
    "at-init",
    "GraSP: keep what carries gradient flow (Wang et al. 2020).",
    score="grasp",
    per_class=10,
    paper="Wang et al. 2020, arXiv 2002.07376",
    purpose="before training, high sparsity",
)
preset(
    "synflow",
    "at-init",
    "SynFlow: 100 rounds without data (Tanaka et al. 2020).",
    score="synflow",
    rounds=100,
    paper="Tanaka et al. 2020, arXiv 2006.05467",
    purpose="before training, without data, extreme sparsity",
)
preset(
    "magnitude-at-init",
    "at-init",
    "Initial |w|: a control.",
    score="magnitude",
    paper="Frankle et al. 2021, arXiv 2009.08576",
    purpose="a control",
)
preset(
    "random-at-init",
    "at-init",
    "Random weights of a network at initialization: the control.",
    score="random",
    paper="Frankle et al. 2021, arXiv 2009.08576",
    purpose="a control",
)
