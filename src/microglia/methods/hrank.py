"""HRank (Lin et al. 2020): channels whose maps are of low rank go, one group after the other; the best filters may rest.

The algorithm (spec: survey 8.5):
    rank the maps of all layers once, in the dense network, over a few hundred images
    for each group of coupled channels, in the order of the network: set its lowest channels to zero, train the whole network
    what was set to zero stays zero after every step; filters of the highest ranks may be frozen, bit for bit
then remove them. As published each layer has epochs of its own: ``sparse_epochs`` are those of all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.registry import unknown_name
from microglia.graph.channels.widths import highest
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import SAMPLED, ChannelConfig, ChannelPruner, states_of
from microglia.methods.config import method
from microglia.methods.what import Takes
from microglia.methods.widths_observed import ranks_of
from microglia.scores.features import mean_ranks, ranks_by_batch
from microglia.scores.guard import untouched
from microglia.storage.run import Run
from microglia.tasks.task import Task

VARIANTS = ("hrank", "edge", "random", "reverse")


@dataclass(frozen=True)
class HrankConfig(ChannelConfig):
    """HRank.

    Attributes:
        scope: ``uniform``: the same fraction of every group; or ``global``.
        rates: Instead of a budget, the fraction that goes of each group, in the order of the network.
        variant: ``hrank``; or the paper's controls ``edge`` (from both ends), ``random``, ``reverse`` (the highest ranks go).
        order: ``layerwise``: groups lose channels one after the other, at even distances; ``all-at-once``: before training.
        frozen: Fraction of the channels, those of the highest ranks in each group, whose filters stay as they are.
    """

    takes: ClassVar[Takes] = SAMPLED
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]
    score_batches: int = 5
    rates: tuple[float, ...] = ()
    variant: Literal["hrank", "edge", "random", "reverse"] = "hrank"
    order: Literal["layerwise", "all-at-once"] = "layerwise"
    frozen: float = 0.0

    def check_values(self) -> None:
        """Raises for fractions out of range, unknown words, and rates beside a budget."""
        if self.variant not in VARIANTS:
            raise unknown_name("variant of HRank", self.variant, VARIANTS)
        if self.order not in ("layerwise", "all-at-once"):
            raise unknown_name("order of HRank", self.order, ("layerwise", "all-at-once"))
        if not 0 <= self.frozen <= 1 or not all(0 <= rate < 1 for rate in self.rates):
            raise BudgetError(f"frozen is in [0, 1] and each rate in [0, 1); got {self.frozen} and {list(self.rates)}.")
        if self.rates and self.budget is not None:
            raise BudgetError(
                "rates are the fractions that go of each group, in the place of density, params and flops: give one of both."
            )


class Hrank(ChannelPruner):
    """Removes the channels of low-rank maps, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = HrankConfig

    def begin(self) -> None:
        """Ranks the maps of the dense network, and sets the first channels to zero."""
        with untouched(self.model):
            found = ranks_by_batch(self.model, self.layers, self.evidence)
        values = self.of_filters(mean_ranks(self.layers, found)).cpu()
        self.ranks = ranks_of(found)
        self.values = self._ordered(values)
        self.target = self.choose(self.values)
        self.rests = self._best(values)
        self.held = [self.raw[p.name].detach().clone() if self.raw[p.name].ndim > 1 else None for p in self.units.made]
        self._clear_due()

    @property
    def own(self) -> HrankConfig:
        """The config."""
        return cast(HrankConfig, self.config)

    def choose(self, ranking: Tensor) -> Tensor:
        """Returns the channels that meet the budget, or those that the rates leave."""
        rates, lengths = self.own.rates, list(self.units.lengths)
        if not rates:
            return super().choose(ranking)
        if len(rates) != len(lengths):
            raise BudgetError(
                f"rates has {len(rates)} fractions, and the channels of {type(self.model).__name__} that can go are in "
                f"{len(lengths)} groups: give one for each, in the order {', '.join(self.units.names)}."
            )
        parts = zip(torch.split(ranking, lengths), rates, lengths, strict=True)
        return torch.cat([highest(part, size - int(rate * size)) for part, rate, size in parts])

    def ranking(self) -> Tensor:
        """Returns the ranks of the dense network's maps, in the order of the variant."""
        return self.values

    def final(self) -> Tensor:
        """Returns the channels that stay."""
        return self.target

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step: what is zero stays zero, frozen filters stay, and a next group may be due."""
        super().step(optimizer)
        self._restore(optimizer)
        self._clear_due(optimizer)

    def report(self) -> dict[str, Any]:
        """Returns the widths, frozen channels, and how far the ranks of the dense network's maps agree between batches."""
        frozen = {name: int(part.sum()) for name, part in zip(self.units.names, self._split(self.rests), strict=True)}
        return super().report() | {"ranks": self.ranks, "frozen": frozen}

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken, ranks and frozen filters."""
        own = {"values": self.values, "target": self.target, "rests": self.rests, "held": self.held, "ranks": self.ranks}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.values, self.target, self.rests = state["values"], state["target"], state["rests"]
        self.ranks = state.get("ranks", {})
        self.held = [None if value is None else value.clone() for value in state["held"]]

    def _ordered(self, values: Tensor) -> Tensor:
        """Returns values that rank channels as the variant has it."""
        if self.own.variant == "reverse":
            return -values
        if self.own.variant == "random":
            return torch.rand(len(values), generator=self.evidence.generator, dtype=values.dtype)
        if self.own.variant == "edge":
            places = [part.argsort(stable=True).argsort(stable=True).double() for part in self._split(values)]
            return torch.cat([-(place - (len(place) - 1) / 2).abs() / len(place) for place in places])
        return values

    def _best(self, values: Tensor) -> Tensor:
        """Returns the channels whose filters are frozen: of the highest ranks in each group, among those that stay."""
        parts = zip(self._split(values), self._split(self.target), strict=True)
        return torch.cat(
            [highest(part.masked_fill(~stay, -torch.inf), int(self.own.frozen * len(part))) & stay for part, stay in parts]
        )

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, list(self.units.lengths))

    def _clear_due(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Sets the channels to zero that go from groups whose turn has come."""
        count = len(self.units.lengths)
        due = count if self.own.order == "all-at-once" else min(count, self.steps * count // self.total_steps + 1)
        gone = [~part if number < due else torch.zeros_like(part) for number, part in enumerate(self._split(self.target))]
        self.clear(torch.cat(gone), optimizer, whole=True)

    @torch.no_grad()
    def _restore(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Gives frozen filters their bits again, whatever weight decay and momentum did; momentum starts from zero."""
        if not bool(self.rests.any()):
            return
        padded = torch.cat([self.rests, torch.zeros(1, dtype=torch.bool)])
        for place, held in zip(self.units.made, self.held, strict=True):
            if held is not None:
                raw = self.raw[place.name]
                entries = padded[place.units].nonzero().flatten().to(raw.device)
                raw.index_copy_(place.dim, entries, held.to(raw.device).index_select(place.dim, entries))
                for tensor in states_of(optimizer, raw):
                    tensor.index_fill_(place.dim, entries, 0.0)


@method(
    "hrank",
    HrankConfig,
    check=fits(Hrank),
    paper="Lin et al. 2020, arXiv 2002.10179",
    purpose="channels by the rank of their maps",
)
def hrank(task: Task, run: Run, config: HrankConfig) -> nn.Module:
    """HRank: channels with maps of low rank go, group after group, while the network trains; fine-tune."""
    return thinned(task, run, config, Hrank)
