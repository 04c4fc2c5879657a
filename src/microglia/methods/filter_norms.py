"""Filter norms (Li et al. 2017): the filters of the smallest L1 norm go, by the independent or the greedy rule.

The algorithm (spec: survey 8.1), for each group of coupled channels in the order of the network:
    rank by sum |w| over the filters that make a channel (or their L2 norm), the mean over its layers
        independent: all weights count;  greedy: those that read channels removed before do not
    the lowest go, the same fraction of every group
then fine-tune. The paper finds greedy networks better at high rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from microglia.core.registry import unknown_name
from microglia.graph.channels.widths import highest
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import CHANNELS, ChannelConfig, ChannelPruner
from microglia.methods.config import method
from microglia.methods.what import Takes
from microglia.scores import scores
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig

NORMS, RULES = ("l1", "l2"), ("independent", "greedy")


@dataclass(frozen=True)
class FilterNormsConfig(ChannelConfig):
    """Filter norms; it trains only to recover.

    Attributes:
        scope: Always ``uniform``: the same fraction of every group.
        norm: ``l1`` or ``l2``.
        rule: ``independent``: all weights of a filter count; ``greedy``: only those of channels that stay.
    """

    takes: ClassVar[Takes] = replace(CHANNELS, scopes=("uniform",))
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]
    norm: Literal["l1", "l2"] = "l1"
    rule: Literal["independent", "greedy"] = "independent"

    def check_values(self) -> None:
        """Raises for unknown words."""
        if self.norm not in NORMS:
            raise unknown_name("norm of filters", self.norm, NORMS)
        if self.rule not in RULES:
            raise unknown_name("rule of filter norms", self.rule, RULES)

    @property
    def sparse(self) -> FitConfig:
        """The training before the cut: none."""
        return replace(self.train, epochs=0)


class FilterNorms(ChannelPruner):
    """Removes the channels of the smallest filters when it ends; see `ChannelPruner`."""

    Config = FilterNormsConfig

    @property
    def own(self) -> FilterNormsConfig:
        """The config."""
        return cast(FilterNormsConfig, self.config)

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns the norm of the filters that make each channel, as the weights are now."""
        return self.of_filters(scores[self.own.norm](self.model, self.layers, self.evidence)).cpu()

    @torch.no_grad()
    def final(self) -> Tensor:
        """Returns the channels that stay, chosen group by group; the greedy rule clears what read the others."""
        counts = [int(part.sum()) for part in torch.split(self.choose(self.ranking()), list(self.units.lengths))]
        kept, ranks = torch.ones(self.units.count, dtype=torch.bool), self.ranking()
        for own, count in zip(self.spans(), counts, strict=True):
            kept[own] = highest(ranks[own], count)
            if self.own.rule == "greedy" and not bool(kept[own].all()):
                for name in self.readers(own):
                    raw = self.raw[name]
                    raw.copy_(self.units.scale(name, raw, kept.to(raw.device)))  # these columns go with the channels
                ranks = self.ranking()
        return kept


@method(
    "l1",
    FilterNormsConfig,
    check=fits(FilterNorms),
    paper="Li et al. 2017, arXiv 1608.08710",
    purpose="the simplest filter pruning",
)
def l1(task: Task, run: Run, config: FilterNormsConfig) -> nn.Module:
    """Filter norms: the filters of the smallest L1 norm go at once, by the independent or the greedy rule; fine-tune."""
    return thinned(task, run, config, FilterNorms)
