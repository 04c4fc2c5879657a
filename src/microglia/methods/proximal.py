"""Scaling factors of channels that a proximal gradient method trains to exact zeros: common to SSS and GAL.

The algorithm (spec: survey 8.6), for factors x of structures, their gradient g, a rate eta, the weight c of |x|_1:
    z_t = S(y_t - eta g(y_t)), S the soft threshold at eta c;   y_(t+1) = z_t + mu_t (z_t - z_(t-1))
The network runs with y. With a constant mu this is SSS's v <- S(z) - y + mu v, y <- S(z) + mu v; FISTA's mu grows to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.devices import device_of
from microglia.core.errors import BudgetError
from microglia.core.masks import MaskSet, masks_of
from microglia.core.registry import unknown_name
from microglia.graph.channels.widths import highest
from microglia.methods.channel_pruner import ChannelConfig, ChannelPruner
from microglia.methods.soft import SoftMasks

STRUCTURES = ("channels", "groups")


class ProximalGradient(torch.optim.Optimizer):
    """Accelerated proximal gradient descent on an L1 penalty, for groups of parameters that reach exact zeros.

    Args:
        groups: Parameter groups with ``lr``; weight decay is not used.
        strength: c, the weight of the sum of absolute values.
        momentum: mu; None for FISTA's, (t_k - 1) / t_(k+1) with t_(k+1) = (1 + sqrt(1 + 4 t_k^2)) / 2.
    """

    def __init__(self, groups: list[dict[str, Any]], *, strength: float, momentum: float | None = 0.9) -> None:
        super().__init__(groups, {"lr": 0.1, "strength": strength, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Takes one step; parameters without a gradient stay."""
        value = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                before, length = state.get("last", parameter.clone()), state.get("length", 1.0)
                found = functional.softshrink(parameter - group["lr"] * parameter.grad, group["lr"] * group["strength"])
                longer = (1 + (1 + 4 * length**2) ** 0.5) / 2
                momentum = (length - 1) / longer if group["momentum"] is None else group["momentum"]
                parameter.copy_(found + momentum * (found - before))
                state["last"], state["length"] = found, longer
        return value


@dataclass(frozen=True)
class FactorConfig(ChannelConfig):
    """Methods that train a factor of each structure; without density, params and flops those of factor 0 go.

    Attributes:
        strength: c, the weight of the sum of absolute factors.
        factor_lr: eta, the rate of the factors, constant.
        structures: ``channels``: each coupled channel (a neuron) has a factor; ``groups``: all channels of a group have one
            together, as the inner channels of a residual block, of which one channel stays.
    """

    strength: float = 1e-3
    factor_lr: float = 0.1
    structures: Literal["channels", "groups"] = "channels"

    def check_values(self) -> None:
        """Raises for a negative strength, a rate that is not above 0, and unknown structures."""
        if self.strength < 0 or not self.factor_lr > 0:
            raise BudgetError(f"strength is at least 0 and factor_lr above 0; got {self.strength} and {self.factor_lr}.")
        if self.structures not in STRUCTURES:
            raise unknown_name("structure with a factor", self.structures, STRUCTURES)


class FactorPruner(ChannelPruner):
    """Multiplies the weights that read a channel by its factor, which is trained; the factors are merged in the end."""

    Config: type[ChannelConfig] = FactorConfig
    momentum: float | None = 0.9
    """mu of the proximal steps; None for FISTA's."""

    def prepare(self) -> None:
        """Lays out which channels share a factor."""
        lengths = torch.tensor(list(self.units.lengths))
        grouped = getattr(self.config, "structures", "channels") == "groups"
        self.index = torch.arange(len(lengths)).repeat_interleave(lengths) if grouped else torch.arange(self.units.count)
        self.soft: SoftMasks | None = None
        self.chosen: Tensor | None = None

    def begin(self) -> None:
        """Attaches the factors, ones, to the model, which computes what it did before."""
        device = device_of(self.model)
        self.index = self.index.to(device)
        self.soft = SoftMasks(self.model, self.units, self._each, torch.ones(int(self.index.max()) + 1, device=device))

    @property
    def factors(self) -> nn.Parameter:
        """The trained factors, one for each structure."""
        assert self.soft is not None
        return cast(nn.Parameter, self.soft.scores)

    def _each(self) -> Tensor:
        return self.factors[self.index]

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns the absolute factor of each channel."""
        return self._each().detach().double().abs().cpu()

    def choose(self, ranking: Tensor) -> Tensor:
        """Returns the channels that meet the budget; without one those whose factor is not 0, one of each group at least."""
        if self.config.budget is not None:
            return super().choose(ranking)
        parts = torch.split(ranking, list(self.units.lengths))
        return torch.cat([part > 0 if bool((part > 0).any()) else highest(part, 1) for part in parts])

    def final(self) -> Tensor:
        """Returns the channels that stay."""
        return super().final() if self.chosen is None else self.chosen

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Merges the factors into the weights, and masks the channels that do not stay; returns the masks."""
        if self.soft is None:
            return masks_of(self.model)
        self.zeros, self.chosen = int((self.factors == 0).sum()), self.final()
        for name in dict.fromkeys(place.name for place in self.units.read):
            self.raw[name].copy_(self.units.scale(name, self.raw[name], self._each()))
        kept = self.chosen.to(device_of(self.model))
        self.soft.harden(self.model, self.units.masks(kept))
        self.soft.kept = kept
        self.soft.detach_companions(self.model)
        self.soft.leave(self.model)
        self.soft = None
        return super().finish()

    def report(self) -> dict[str, Any]:
        """Returns the widths, and how many factors are exactly 0."""
        zeros = self.zeros if self.soft is None else int((self.factors == 0).sum())
        return super().report() | {"zeros": zeros}

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the group of the factors; only `optimizers` drives them to 0."""
        rate = cast(FactorConfig, self.config).factor_lr
        return [] if self.soft is None else [{"params": [self.factors], "lr": rate, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the proximal method of the factors."""
        strength, groups = cast(FactorConfig, self.config).strength, self.param_groups()[:1]
        return [ProximalGradient(groups, strength=strength, momentum=self.momentum)] if groups else []

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the model without the factors."""
        return [p for p in self.model.parameters() if self.soft is None or p is not self.factors]
