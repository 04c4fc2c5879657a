"""The gauge: the metrics of a network at a place in weight space, with batch-norm statistics made for that place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from microglia.tasks.task import Split, Task
from microglia.train.evaluate import evaluate
from microglia.train.recover import recalibrate_on


@dataclass(frozen=True)
class Gauge:
    """How a place is measured.

    Attributes:
        task: Data and metrics.
        splits: Where to measure.
        recalibrate: Training batches, augmented as in training, over which batch-norm statistics are made anew at every
            place; 0 keeps those stored. Statistics of another place hide barriers or exaggerate them (survey 0.7, 2.1).
        batch_size: Examples in each batch.
        limit: Batches of each split to look at, the same drawn ones at every place; None for all.
        seed: Root of the draws.
    """

    task: Task
    splits: tuple[Split, ...] = ("train", "test")
    recalibrate: int = 100
    batch_size: int = 256
    limit: int | None = None
    seed: int = 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Returns the task's metrics as ``train_loss``, ``test_accuracy`` and so on; only batch-norm statistics change."""
        recalibrate_on(model, self.task, batch_size=self.batch_size, count=self.recalibrate, seed=self.seed)
        found: dict[str, float] = {}
        for split in self.splits:
            metrics = evaluate(model, self.task, split, batch_size=self.batch_size, limit=self.limit, seed=self.seed)
            found |= {f"{split}_{name}": value for name, value in metrics.items()}
        return found
