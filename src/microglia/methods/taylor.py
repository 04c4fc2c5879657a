"""Taylor pruning while training (Molchanov et al. 2019), and GDP (Lin et al. 2018): the channels whose gate matters least go.

The algorithm (spec: survey 8.6), z = 1 a gate on each coupled channel:
    at every step I <- mean over minibatches of (dL/dz)^2, read from the training's own backward pass
    every 30 steps, a round:  score <- momentum score + (1 - momentum) I; the lowest go, so many that after the last
        round the budget is met; momentum 0.9 between rounds
    taylor: what went is zero and stays zero; dynamic (GDP): its gate is 0 and its filters keep learning, so that it may
        come back, since dL/dz is known for a closed gate too
and fine-tuning goes on in the same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError
from microglia.core.masks import MaskSet
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import ChannelConfig, ChannelPruner
from microglia.methods.config import method, preset
from microglia.methods.proximal import FactorPruner
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class TaylorConfig(ChannelConfig):
    """Taylor pruning.

    Attributes:
        every: Steps between rounds, 30 in the paper.
        momentum: Weight of the earlier rounds' score.
        until: Fraction of the training by which the budget is met.
        dynamic: Whether channels that went may come back, as in GDP.
    """

    every: int = 30
    momentum: float = 0.9
    until: float = 0.75
    dynamic: bool = False

    def check_values(self) -> None:
        """Raises `BudgetError` for numbers out of range."""
        if self.every < 1 or not 0 <= self.momentum < 1 or not 0 < self.until <= 1:
            raise BudgetError(
                "every is at least 1, momentum in [0, 1) and until in (0, 1]; got "
                f"{self.every}, {self.momentum} and {self.until}."
            )


class Taylor(FactorPruner):
    """Removes channels in rounds by the gradients of their gates, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = TaylorConfig

    @property
    def own(self) -> TaylorConfig:
        """The config."""
        return cast(TaylorConfig, self.config)

    def begin(self) -> None:
        """Attaches the gates, ones, which are read and never trained."""
        super().begin()
        self.rounds = max(1, int(self.own.until * self.total_steps) // self.own.every)
        self.alive = torch.ones(self.units.count, dtype=torch.bool)
        self.sums, self.batches = torch.zeros(self.units.count, dtype=torch.float64), 0
        self.score: Tensor | None = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step: reads the gates' gradients, and removes channels when a round is over."""
        ChannelPruner.step(self, optimizer)
        if self.soft is None:
            return
        if self.factors.grad is not None:
            self.sums += self.factors.grad.double().square().cpu()
            self.batches, self.factors.grad = self.batches + 1, None
        number, rest = divmod(self.steps, self.own.every)
        if rest == 0 and number <= self.rounds:
            self._round(number / self.rounds)
        if not self.own.dynamic:
            self.clear(~self.alive, optimizer, whole=True)
        self.factors.copy_(self.alive if self.own.dynamic else torch.ones(()))  # whatever an optimizer did to them

    def choose(self, ranking: Tensor) -> Tensor:
        """Returns the channels that meet the budget."""
        return ChannelPruner.choose(self, ranking)

    def ranking(self) -> Tensor:
        """Returns the score of each channel, with the batches since the last round."""
        new = self.sums / max(1, self.batches)
        if self.score is None:
            return new
        return self.score if not self.batches else self.own.momentum * self.score + (1 - self.own.momentum) * new

    def _round(self, progress: float) -> None:
        """Ends a round: removes channels to a part of the way from the dense network to the budget."""
        self.score = self.ranking()
        self.sums, self.batches = torch.zeros_like(self.sums), 0
        ranks = self.score if self.own.dynamic else self.score.masked_fill(~self.alive, -1.0)
        asked = {t: 1 - (1 - v) * progress for t, v in asdict(cast(Budget, self.own.budget)).items() if v is not None}
        kept, _ = self.units.choose(ranks, Budget(**asked), scope=self.own.scope, round_to=self.own.round_to)
        self.alive = kept if self.own.dynamic else kept & self.alive

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Ends the last round, if it did not come, and masks the channels that went; returns the masks.

        After the last round nothing is chosen anew, where few batches are left: the network has adapted to this choice.
        """
        if self.soft is not None:
            if self.steps < self.rounds * self.own.every:
                self._round(1.0)
            self.factors.copy_(self.alive)
        return super().finish()

    def final(self) -> Tensor:
        """Returns the channels that stay."""
        return self.alive

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the group of the gates, of rate 0: no optimizer moves them."""
        return [] if self.soft is None else [{"params": [self.factors], "lr": 0.0, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns an optimizer that leaves the gates as they are."""
        return [torch.optim.SGD(groups)] if (groups := self.param_groups()) else []

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken, the scores and the channels that went."""
        own = {"sums": self.sums, "batches": self.batches, "score": self.score, "alive": self.alive}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.sums, self.batches, self.alive = state["sums"].clone(), int(state["batches"]), state["alive"]
        self.score = state["score"]


@method(
    "taylor",
    TaylorConfig,
    check=fits(Taylor),
    paper="Molchanov et al. 2019, arXiv 1906.10771",
    purpose="channels by gradients while training goes on",
)
def taylor(task: Task, run: Run, config: TaylorConfig) -> nn.Module:
    """Taylor: while it trains, in rounds, the channels go whose gates have the smallest gradients; momentum between rounds."""
    return thinned(task, run, config, Taylor)


preset(
    "gdp", "taylor", "GDP: channels are closed by the gradients of their gates over the whole network, and may come back.",
    dynamic=True,
    paper="Lin et al. 2018", purpose="channels over the whole network, dynamic",
)  # fmt: skip
