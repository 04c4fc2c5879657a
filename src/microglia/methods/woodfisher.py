"""WoodFisher (Singh, Alistarh 2020), oBERT (Kurtic et al. 2022), WoodTaylor: inverse Fisher in blocks, gradually, compensated.

The algorithm (spec: survey 10.2, 10.3), at each step of the schedule:
    g_1 .. g_m = gradients of the loss on m groups of examples, in evaluation mode
    in each block of weights:  F = alpha I + sum g g^T / m
    value of a unit Q:  w_Q^T ([F^-1]_QQ)^-1 w_Q / 2;  the best of all layers stay
    in each block:  the kept weights change by (F_KK)^-1 F_KQ w_Q, all removals of the block solved together
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.layers import oriented
from microglia.core.masks import MaskSet, enforce, mask, masks_of
from microglia.core.patterns import NM, Block, Unstructured
from microglia.methods.config import method, preset, prunable_weights
from microglia.methods.gradual import Gradual, GradualConfig
from microglia.methods.procedure import change, dense_in_order, evidence, train
from microglia.methods.quadratic import Quadratic, blocks_of, diagonal_blocks, group_losses, groups_of, run_values
from microglia.methods.quadratic import taken as taken_at
from microglia.methods.what import LAYERS, SAMPLING, Takes
from microglia.scores.curvature import Rows, curvature_rows
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import epoch_length
from microglia.train.recover import RECALIBRATION, recalibrate_on

PIECE = 2**22
"""Numbers of the rows and matrices of the blocks that are computed at once."""


@dataclass(frozen=True)
class WoodFisherConfig(GradualConfig):
    """Pruning by the inverse Fisher information in blocks, along a schedule.

    Attributes:
        block: Weights of one block of the Fisher information, at least those of one unit.
        alpha: Dampening, added to the diagonal.
        examples: Examples of one gradient; ``score_batches * score_batch_size / examples`` gradients make the information.
        recomputations: Times that gradients are collected within one step of the schedule, at densities on the line to its own.
        taylor: Whether the model of the loss has its gradient term, as in WoodTaylor.
        recalibrate: Training batches over which batch-norm statistics are estimated again if no training follows; 0 for none.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("density", "params", *LAYERS, *SAMPLING),
        patterns={Unstructured: "masked", Block: "masked", NM: "masked"},
        why={
            "score": "the inverse Fisher information ranks the units",
            "reduction": "the inverse Fisher information ranks whole units",
            "channel": "it compensates within layers, and the weights of whole channels are too many for one block",
        },
    )
    score_batches: int = 8
    score_batch_size: int = 128
    block: int = 200
    alpha: float = 1e-5
    examples: int = 4
    recomputations: int = 1
    taylor: bool = False
    recalibrate: int = RECALIBRATION

    def check_values(self) -> None:
        """Raises `BudgetError` unless its numbers are positive."""
        numbers = {n: getattr(self, n) for n in ("block", "alpha", "examples", "recomputations")}
        if wrong := [name for name, value in numbers.items() if value <= 0]:
            raise BudgetError(f"{wrong[0]} is a positive number; got {numbers[wrong[0]]}.")

    def own_bytes(self, model: nn.Module) -> int:
        """Returns the bytes of all gradients, twice while they are joined, of values in float64, and of the blocks at work."""
        weights, gradients = prunable_weights(model), self.score_batches * self.score_batch_size // self.examples
        piece = min(PIECE, weights * max(self.block, gradients))
        return 8 * gradients * weights + 8 * weights + 3 * 8 * piece


class WoodFisher(Gradual):
    """Prunes further at several steps, by the inverse Fisher information; the kept weights compensate.

    Its evidence needs batches and the loss. With N prunable weights and m gradients it holds N * m numbers while it prunes.

    Args:
        model: The model to prune, in place.
        config: See `WoodFisherConfig`.
        total_steps: Optimizer steps of the training.
        evidence: The data for the gradients.
        **settings: The fields of the config by keyword instead.
    """

    Config = WoodFisherConfig
    shards: ClassVar[bool] = False

    def prune_to(self, keep: int, optimizer: torch.optim.Optimizer | None = None) -> MaskSet:
        """Keeps the best units with ``keep`` weights, and changes the weights that stay.

        Raises:
            ScoreError: There are no batches, or no loss.
        """
        config, held = cast(WoodFisherConfig, self.config), self.masks.kept
        chosen = self.masks
        for step in range(1, config.recomputations + 1):
            count = held + round((keep - held) * step / config.recomputations)
            layers = self.layers
            rows = curvature_rows("fisher", self.model, layers, self.evidence, examples=config.examples)
            weights = oriented(layers, {name: layer.weight.detach() for name, layer in layers.items()})
            values = {name: self._values(name, weights[name], rows) for name in layers}
            chosen = self.select(oriented(layers, values), count, masks_of(self.model))
            kept = oriented(layers, {name: chosen[name] for name in layers})
            for name, layer in layers.items():
                if name not in self.protected:
                    new = {name: self._compensated(name, weights[name], rows, kept[name])}
                    with torch.no_grad():
                        layer.raw.copy_(oriented({name: layer}, new)[name])
            mask(self.model, chosen)
            enforce(self.model, optimizer)
        return chosen

    def _values(self, name: str, weight: Tensor, rows: Rows) -> Tensor:
        """Returns the value of each weight's unit for one weight of it, shaped like the weight."""
        found = torch.zeros(weight.numel() + 1, dtype=torch.float64, device=weight.device)
        for positions, own, quadratic in self._pieces(name, weight, rows):
            if cast(WoodFisherConfig, self.config).taylor:
                units = torch.where(own != 0, quadratic.unconstrained(own), 0.0).view(positions.shape)
            else:
                units = own.view(positions.shape)
            inverse = diagonal_blocks(quadratic.inverse(), positions.shape[2])
            if isinstance(self.pattern, NM):
                values = run_values(units, inverse, self.pattern.n)
            else:
                sizes = (positions >= 0).sum(2).clamp_min(1).to(units)
                values = (group_losses(units, inverse) / sizes)[..., None].expand_as(units)
            found[positions] = values  # padding writes to the last place
        return found[:-1].view(weight.shape)

    def _compensated(self, name: str, weight: Tensor, rows: Rows, kept: Tensor) -> Tensor:
        found = torch.zeros(weight.numel() + 1, dtype=torch.float64, device=weight.device)
        for positions, own, quadratic in self._pieces(name, weight, rows):
            stays = taken_at(kept.flatten().to(own), positions).flatten(1) > 0
            changed = quadratic.compensated(own, stays, gradient=cast(WoodFisherConfig, self.config).taylor)
            found[positions] = changed.view(positions.shape)
        return found[:-1].view(weight.shape).to(weight.dtype)

    def _pieces(self, name: str, weight: Tensor, rows: Rows) -> Iterator[tuple[Tensor, Tensor, Quadratic]]:
        """Yields some blocks at a time: positions (blocks, groups, width), weights (blocks, size), their curvature."""
        config = cast(WoodFisherConfig, self.config)
        blocks = blocks_of(groups_of(self.pattern, tuple(weight.shape)), config.block).to(weight.device)
        size, flat = blocks.shape[1] * blocks.shape[2], rows.values[name].flatten(1)
        each = max(1, PIECE // (size * max(size, len(flat))))
        for positions in torch.split(blocks, each):
            own = taken_at(weight.flatten(), positions).flatten(1).double()
            columns = taken_at(flat, positions.flatten(1)).movedim(0, 1).double()
            yield positions, own, Quadratic(columns, rows.count, config.alpha)


@method(
    "woodfisher", WoodFisherConfig, paper="Singh, Alistarh 2020, arXiv 2004.14340", purpose="single weights with compensation"
)
def woodfisher(task: Task, run: Run, config: WoodFisherConfig) -> nn.Module:
    """WoodFisher: inverse Fisher information in blocks ranks the units along a schedule, the other weights compensate."""
    model = dense_in_order(task, run, config)
    teacher = deepcopy(model) if config.train.distill else None
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))

    def pruner() -> WoodFisher:
        return WoodFisher(model, config, total_steps=max(1, steps), evidence=evidence(task, run, config))

    train(task, run, "train", model, config.train, pruner=pruner, teacher=teacher)
    if not config.train.epochs and config.recalibrate:

        def anew(progress: object) -> None:
            recalibrate_on(model, task, batch_size=config.train.batch_size, count=config.recalibrate, seed=run.seed)

        change(run, "recalibrate", model, anew)
    return model


preset(
    "obert",
    "woodfisher",
    "oBERT: blocks of 50 weights, more gradients, little dampening; made for groups such as block:4x1 and 2:4.",
    block=50,
    alpha=1e-7,
    examples=1,
    paper="Kurtic et al. 2022, arXiv 2203.07259",
    purpose="transformers, groups and 2:4",
)
preset(
    "wood-taylor",
    "woodfisher",
    "WoodTaylor: WoodFisher with the gradient of the loss; compare it with woodfisher, which did better on digits.",
    # alpha of 1e-5, 1e-3 and 0.1 were tried there, all worse; the largest came nearest, since it keeps the Newton step short.
    taylor=True,
    alpha=1.0,
    paper="Singh, Alistarh 2020, arXiv 2004.14340",
    purpose="models that are not fully trained",
)
