"""Gates: one factor for each coupled channel, for networks whose norms cannot be scaled, or which have none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from microglia.core.devices import device_of
from microglia.graph.channels.coupled import CoupledChannels
from microglia.methods.soft import SoftMasks


class ChannelGates:
    """Factors of channels behind their activations, a parameter of the model while they are attached.

    A factor multiplies the weights that read its channel; so it needs no norm, and several layers may share one. `merge` makes
    it part of these weights.

    Args:
        model: The model, changed in place; it computes the same, because every gate starts at 1.
        units: The coupled channels of the model.
    """

    def __init__(self, model: nn.Module, units: CoupledChannels) -> None:
        self.units = units
        ones = torch.ones(units.count, device=device_of(model))
        self._soft = SoftMasks(model, units, lambda: self.values, ones)

    @property
    def values(self) -> Tensor:
        """The gates, (count,)."""
        assert self._soft.scores is not None
        return self._soft.scores

    @torch.no_grad()
    def merge(self, model: nn.Module, raw: Mapping[str, nn.Parameter]) -> None:
        """Multiplies the gates into the weights that read the channels, ``raw`` by name, and leaves the model."""
        gates = self.values.detach().clone()
        for name in {place.name: None for place in self.units.read}:
            raw[name].copy_(self.units.scale(name, raw[name], gates))
        self._soft.harden(model, {})
        self._soft.detach_companions(model)
        self._soft.leave(model)
