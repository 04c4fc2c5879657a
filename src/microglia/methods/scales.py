"""Channels ranked by the scales of their norms: what slimming and polarization share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from microglia.core.batch import Example
from microglia.core.errors import BudgetError
from microglia.core.modes import evaluating
from microglia.core.running import run, undisturbed
from microglia.graph import ShrinkError
from microglia.graph.channels.coupled import Place
from microglia.graph.selection import select_channels, selected_norms
from microglia.methods.channel_pruner import CHANNELS, ChannelConfig, ChannelPruner
from microglia.methods.what import Takes
from microglia.methods.widths_observed import scales_of
from microglia.scores.behind import NORMS

INSTEAD = "take group-lasso, polarization with gates, or the method channels with a score of weights"


@dataclass(frozen=True)
class ScaleConfig(ChannelConfig):
    """Methods with a penalty on the scales of norms.

    Attributes:
        strength: lambda, of the penalty.
        initial_scale: Initial value of every scale (0.5 in trainings from scratch); None for the trained values.
        selection: Whether norms that read a residual or concatenated stream choose channels of it, each for itself, while the
            stream stays whole (see `microglia.graph.selection`): the form for pre-activation networks.
    """

    takes: ClassVar[Takes] = replace(CHANNELS, needs=("norm",))
    strength: float = 1e-4
    initial_scale: float | None = None
    selection: bool = False

    def check_values(self) -> None:
        """Raises `BudgetError` for a negative strength and a scale that is not above 0."""
        if self.strength < 0 or (self.initial_scale is not None and self.initial_scale <= 0):
            raise BudgetError(
                f"strength is at least 0 and initial_scale above 0; got {self.strength} and {self.initial_scale}."
            )


class ScalePruner(ChannelPruner):
    """Ranks channels by the scales of their norms; those of a group without a norm stay."""

    Config = ScaleConfig

    @staticmethod
    def arrange(model: nn.Module, example_inputs: Any, config: ChannelConfig) -> None:
        """Gives norms of streams their selections, if the config asks for them.

        Raises:
            ShrinkError: No norm reads a stream.
        """
        if not cast(ScaleConfig, config).selection or selected_norms(model):
            return
        if not select_channels(model, example_inputs):
            raise ShrinkError(
                f"selection is for pre-activation networks, and no batch norm of {type(model).__name__} reads a residual or "
                "concatenated stream: leave selection out."
            )

    def prepare(self) -> None:
        """Finds the scales and sets them to where they start.

        Raises:
            ShrinkError: No channel has a scale, or one norm serves several layers.
        """
        self.places = list(self._places())
        if not self.places:
            raise ShrinkError(
                f"{type(self).__name__} ranks channels by the scales of norms, and no channel of {type(self.model).__name__} "
                f"that can go has a norm with a scale: {INSTEAD}."
            )
        self._refuse_shared()
        self.scales: list[Tensor] = [self.raw[place.name] for place in self.places]
        self.observed: dict[str, Any] | None = None
        if (initial := cast(ScaleConfig, self.config).initial_scale) is not None:
            for scale in self.scales:
                nn.init.constant_(scale, initial)

    def movable(self) -> Tensor:
        """Returns the channels of the groups in which each has a scale."""
        held = torch.zeros(self.units.count + 1, dtype=torch.bool)
        for place in self.places:
            held[place.units] = True
        parts = torch.split(held[:-1], list(self.units.lengths))
        return torch.cat([torch.full_like(part, bool(part.all())) for part in parts])

    def gathered(self, values: Sequence[Tensor]) -> Tensor:
        """Returns the mean of one value per scale over the scales of each channel, (count,); 0 where it has none."""
        total = values[0].new_zeros(self.units.count + 1)
        held = torch.zeros_like(total)
        for place, value in zip(self.places, values, strict=True):
            index = place.units.to(value.device)
            total = total.index_add(0, index, value)
            held = held.index_add(0, index, torch.ones_like(value))
        return total[:-1] / held[:-1].clamp_min(1)

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns |gamma|, the mean over the norms of a channel."""
        return self.gathered([scale.detach().double().abs() for scale in self.scales])

    def final(self) -> Tensor:
        """Returns the channels that stay; notes the scales before those that go are set to zero."""
        kept = super().final()
        self.observed = scales_of(self.scales, self.ranking(), kept)
        return kept

    def report(self) -> dict[str, Any]:
        """Returns the widths and the histogram of scales."""
        return super().report() | {"scales": self.observed}

    def _places(self) -> Iterator[Place]:
        """Yields where channels have a scale."""
        for place in self.units.made:
            path, _, attribute = place.name.rpartition(".")
            if attribute == "weight" and isinstance(self.model.get_submodule(path), NORMS):
                yield place

    def _refuse_shared(self) -> None:
        """Raises where a norm is called more than once in a pass, or two norms share one scale."""
        norms = {place.name: self.model.get_submodule(place.name.rpartition(".")[0]) for place in self.places}
        calls: Counter[str] = Counter(dict.fromkeys(norms, 0))

        def counting(name: str) -> Any:
            return lambda module, args: calls.update([name])

        handles = [norm.register_forward_pre_hook(counting(name)) for name, norm in norms.items()]
        try:
            with evaluating(self.model), undisturbed():
                run(self.model, Example.of(self.example))
        finally:
            for handle in handles:
                handle.remove()
        holders = Counter(id(getattr(m, "weight", None)) for m in self.model.modules() if isinstance(m, NORMS))
        tied = [name for name in norms if calls[name] > 1 or holders[id(self.raw[name])] > 1]
        if tied:
            raise ShrinkError(
                f"The scales {tied[0]} serve several layers, so that they do not rank the channels of one: give each layer a "
                f"norm of its own, or {INSTEAD}."
            )
