"""One-shot pruning, and the five baselines of ShrinkBench (Blalock et al. 2020) as names for it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from microglia.methods.config import MethodConfig, Permuting, method, preset
from microglia.methods.procedure import change, dense_in_order, evidence, observe, train
from microglia.methods.pruner import Pruner
from microglia.methods.what import PruneConfig
from microglia.scores import Evidence
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.recover import RECALIBRATION, recalibrate_on


class OneShot(Pruner):
    """Prunes at once, at construction; afterwards the network only has to be trained.

    Example:
        >>> model = nn.Linear(10, 10)
        >>> OneShot(model, density=0.2).masks.kept
        20
    """

    shards: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, config: PruneConfig | None = None, *, evidence: Evidence | None = None, **settings: Any
    ) -> None:
        super().__init__(model, config, evidence=evidence, **settings)
        self.prune_to(self.target)


@dataclass(frozen=True)
class OneShotConfig(Permuting, MethodConfig):
    """One-shot pruning.

    Attributes:
        recalibrate: Training batches over which batch-norm statistics are estimated again after pruning; 0 for none.
    """

    recalibrate: int = RECALIBRATION


@method("oneshot", OneShotConfig, purpose="one cut by any score, then recovery; the baseline to beat")
def oneshot(task: Task, run: Run, config: OneShotConfig) -> nn.Module:
    """Score the dense model once, keep the best, recover by training."""
    model = dense_in_order(task, run, config)
    teacher = deepcopy(model) if config.train.distill else None

    def prune(progress: object) -> None:
        OneShot(model, config, evidence=evidence(task, run, config))
        recalibrate_on(model, task, batch_size=config.train.batch_size, count=config.recalibrate, seed=run.seed)

    change(run, "prune", model, prune)
    observe(task, run, "before", model)
    train(task, run, "train", model, config.train, teacher=teacher)
    return model


preset(
    "magnitude",
    "oneshot",
    "One-shot by |w|.",
    score="magnitude",
    paper="Han et al. 2015, arXiv 1506.02626",
    purpose="the strong simple baseline; needs no data",
)
preset(
    "gradient",
    "oneshot",
    "One-shot by |w * gradient| on one batch.",
    score="gradient",
    paper="Blalock et al. 2020, arXiv 2003.03033",
    purpose="single weights where one batch of data is at hand",
)
SHRINKBENCH = {"exclude": ("role:classifier",)}
"""The protocol never prunes the layers that make the output (Blalock et al. 2020)."""

preset(
    "random",
    "oneshot",
    "ShrinkBench: at random, one ordering: the control.",
    score="random",
    **SHRINKBENCH,
    paper="Blalock et al. 2020, arXiv 2003.03033",
    purpose="a control",
)
preset(
    "global-magnitude",
    "oneshot",
    "ShrinkBench: |w|, one ordering.",
    score="magnitude",
    scope="global",
    **SHRINKBENCH,
    paper="Blalock et al. 2020, arXiv 2003.03033",
    purpose="ShrinkBench's comparison",
)
preset(
    "layer-magnitude",
    "oneshot",
    "ShrinkBench: |w|, the same density in each layer.",
    score="magnitude",
    scope="layer",
    **SHRINKBENCH,
    paper="Blalock et al. 2020, arXiv 2003.03033",
    purpose="ShrinkBench's comparison",
)
preset(
    "global-gradient",
    "oneshot",
    "ShrinkBench: |w * gradient|, one ordering.",
    score="gradient",
    scope="global",
    **SHRINKBENCH,
    paper="Blalock et al. 2020, arXiv 2003.03033",
    purpose="ShrinkBench's comparison",
)
preset(
    "layer-gradient",
    "oneshot",
    "ShrinkBench: |w * gradient|, the same density in each layer.",
    score="gradient",
    scope="layer",
    **SHRINKBENCH,
    paper="Blalock et al. 2020, arXiv 2003.03033",
    purpose="ShrinkBench's comparison",
)
