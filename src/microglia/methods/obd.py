"""Optimal Brain Damage (LeCun, Denker, Solla 1989): rounds of deletion by w^2 h / 2 and of retraining.

The algorithm (spec: survey 3.1), on a trained network:
    until the density is reached:
        h = the diagonal of the loss's Hessian, by one of three estimators
        delete the lowest fraction of the remaining weights by w^2 h / 2
        retrain
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn

from microglia.core.errors import BudgetError
from microglia.core.patterns import Block, Channel, Unstructured
from microglia.methods.config import MethodConfig, method
from microglia.methods.procedure import dense_model, evidence
from microglia.methods.pruner import Pruner
from microglia.methods.rounds import rounds
from microglia.methods.what import LAYERS, SAMPLING, PruneConfig, Takes
from microglia.scores import Evidence, estimators
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class ObdConfig(MethodConfig):
    """Optimal Brain Damage; ``train`` is the training after each round.

    Attributes:
        estimator: ``gauss-newton`` (one backward pass for each class), ``hutchinson``, or ``fisher`` (the empirical Fisher
            information, which vanishes where the model fits the data).
        fraction: Fraction of the remaining weights that a round deletes.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("density", "params", *LAYERS, "reduction", *SAMPLING),
        patterns={Unstructured: "masked", Block: "masked", Channel: "masked"},
        why={"score": "its estimator ranks the weights", "nm:N:M": "it deletes fraction after fraction"},
    )
    score_batches: int = 4
    estimator: str = "gauss-newton"
    fraction: float = 0.2

    def check_values(self) -> None:
        """Raises unless the estimator exists and the fraction is in (0, 1)."""
        estimators[self.estimator]
        if not 0 < self.fraction < 1:
            raise BudgetError(
                f"fraction is that of the remaining weights which a round deletes, in (0, 1); got {self.fraction}."
            )
        if isinstance(self.scope, dict):
            raise BudgetError("OBD leads round by round to one budget; densities by layer are not supported.")


class Obd(Pruner):
    """Deletes weights by OBD's saliency, at once when it is made unless ``start`` is false; see `Pruner`."""

    Config = ObdConfig

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        *,
        evidence: Evidence | None = None,
        start: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(model, config, evidence=evidence, **settings)
        self.score = estimators[cast(ObdConfig, self.config).estimator]
        if start:
            self.prune_to(self.target)

    def next_count(self) -> int:
        """Returns the weights that the next round keeps."""
        return max(self.target, int(self.masks.kept * (1 - cast(ObdConfig, self.config).fraction)))


@method("obd", ObdConfig, paper="LeCun et al. 1990", purpose="small networks, diagonal second order")
def obd(task: Task, run: Run, config: ObdConfig) -> nn.Module:
    """OBD: rounds that delete the lowest fraction by half the curvature times the squared weight, and retrain."""
    model = dense_model(task, run, config.dense)

    def work() -> dict[str, Any]:
        pruner = Obd(model, config, evidence=evidence(task, run, config), start=False)
        before, count = pruner.masks.kept, pruner.next_count()
        if pruner.prune_to(count).kept == before:  # a fraction is less than a unit
            count = pruner.target
            pruner.prune_to(count)
        return {"kept": pruner.masks.kept, "done": count == pruner.target}

    run.observations["rounds"] = rounds(task, run, model, config, work)
    return model
