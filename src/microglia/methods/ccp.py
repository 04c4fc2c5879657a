"""CCP (Peng et al. 2019), collaborative channel pruning: which channels go together, from pairs of their gates' gradients.

The algorithm (spec: corrections A), a_n the gradient of the loss of example n in a gate z = 1 on each channel of a group:
    removing a set T changes the loss by about   - sum_T mean_n a_n + 1/2 sum_(i, j in T) mean_n a_ni a_nj
        the Hessian of the gates approximated by the mean of outer products of gradients, of examples: with those of batches
        the pairs would be smaller by the size of a batch, beside the slope
    the channels go one by one, each the one that raises this least, the same fraction of every group
then fine-tune. The paper relaxes the choice to a quadratic program; the greedy choice here is exact for small groups in tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from microglia.core.errors import ScoreError
from microglia.core.modes import evaluating
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import SAMPLED, AtOnce, ChannelConfig
from microglia.methods.config import method
from microglia.methods.what import Takes
from microglia.scores.base import per_filter
from microglia.scores.curvature import pieces
from microglia.scores.features import gate_gradients
from microglia.scores.guard import untouched
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.engine import rank_and_world
from microglia.train.optim import FitConfig


@dataclass(frozen=True)
class CcpConfig(ChannelConfig):
    """CCP; it trains only to recover.

    Attributes:
        scope: Always ``uniform``: the same fraction of every group.
        score_batches: Batches whose examples' gradients form the pairs; each example takes a pass of its own.
        score_batch_size: Examples in each.
    """

    takes: ClassVar[Takes] = replace(SAMPLED, scopes=("uniform",))
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]
    score_batches: int = 32
    score_batch_size: int = 32

    @property
    def sparse(self) -> FitConfig:
        """The training before the cut: none."""
        return replace(self.train, epochs=0)


class Ccp(AtOnce):
    """Removes the channels whose joint removal should cost least, at once, when it is made; see `ChannelPruner`."""

    Config = CcpConfig

    def begin(self) -> None:
        """Chooses the channels.

        Raises:
            ScoreError: There are no batches.
        """
        gradients = self.gradients()
        counts = [int(part.sum()) for part in torch.split(self.choose(torch.zeros(self.units.count)), list(self.units.lengths))]
        parts = torch.split(gradients, list(self.units.lengths), dim=1)
        self.target = torch.cat([collaborative(part, count) for part, count in zip(parts, counts, strict=True)])
        self.clear(~self.target, whole=True)

    def gradients(self) -> Tensor:
        """Returns the gradients of the gates, float64 (examples, count)."""
        layers, rows = self.layers, []
        with untouched(self.model), evaluating(self.model):
            for example in pieces(self.evidence, 1):
                found = gate_gradients(self.model, layers, replace(self.evidence, batches=[example]))
                rows.append(self.of_filters({n: per_filter(layer, found[n]) for n, layer in layers.items()}).cpu())
        if not rows:
            raise ScoreError("Ccp needs batches: give evidence with batches, [(inputs, targets), ...], and a loss.")
        gradients, ranks = torch.stack(rows), rank_and_world()[1]
        if ranks == 1:
            return gradients
        mean = gradients.mean(0)  # each row is the mean of one example of every rank, which has less variance
        return mean + math.sqrt(ranks) * (gradients - mean)


def collaborative(gradients: Tensor, count: int) -> Tensor:
    """Returns the channels that stay, boolean (channels,), where the others go one by one.

    Args:
        gradients: Gradients of the gates, (examples, channels).
        count: Channels that stay.
    """
    pairs = gradients.T @ gradients / len(gradients)
    cost, kept = pairs.diagonal() / 2 - gradients.mean(0), torch.ones(gradients.shape[1], dtype=torch.bool)
    for _ in range(len(kept) - count):
        worst = int(torch.where(kept, cost, torch.inf).argmin())
        kept[worst] = False
        cost = cost + pairs[worst]
    return kept


@method("ccp", CcpConfig, check=fits(Ccp), paper="Peng et al. 2019", purpose="channels whose joint removal costs little")
def ccp(task: Task, run: Run, config: CcpConfig) -> nn.Module:
    """CCP: channels go whose joint removal should raise the loss least, from pairs of gate gradients; fine-tune."""
    return thinned(task, run, config, Ccp)
