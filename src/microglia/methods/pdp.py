"""PDP (arXiv 2305.11203): a soft mask that is a function only of the weights, around a threshold of each layer.

The algorithm (spec: PDP 4.2, 4.3). When the search begins, all units are ranked by magnitude at the budget, which gives each
layer its own share. Then, every mini-batch, per layer (per row of M with N:M):
    t = (|w|_(k) + |w|_(k+1)) / 2      between the smallest kept and the largest pruned; no gradient
    m = sigmoid((|w|^2 - t^2) / tau)   with |w| the norm of a channel's filter, the root mean square of a block
where k falls along a ramp to the layer's share. At the end of the search the masks are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.patterns import NM
from microglia.core.selection import keep_best
from microglia.methods.config import SearchConfig, UnitConfig, method
from microglia.methods.procedure import searched
from microglia.methods.unit_pruner import UnitPruner, fits
from microglia.methods.units import split
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class PdpConfig(SearchConfig, UnitConfig):
    """PDP.

    Attributes:
        temperature: tau, in units of squared magnitude; or, where ``relative``, in units of the layer's own t^2. If tau is not
            far below t^2, weights of exactly zero have a mask near one half (spec 4.5). So one tau does not fit several layers.
        relative: Whether the temperature is relative.
        ramp: Fraction of the search after which the sparsity is reached, in equal increments per step.
    """

    temperature: float = 0.01
    relative: bool = True
    ramp: float = 0.75

    def check_values(self) -> None:
        """Raises `BudgetError` for a temperature or a ramp out of range."""
        if not self.temperature > 0 or not 0 <= self.ramp <= 1:
            raise BudgetError(f"temperature is above 0 and ramp in [0, 1]; got {self.temperature} and {self.ramp}.")


class Pdp(UnitPruner):
    """Prunes by a soft function of the weights; it has no parameters of its own."""

    Config = PdpConfig

    def __init__(self, model: nn.Module, config: PdpConfig | None = None, **settings: Any) -> None:
        self._shares: dict[str, int] | None = None
        self._roots: Tensor | None = None
        super().__init__(model, config, **settings)

    @property
    def pdp(self) -> PdpConfig:
        """The config."""
        return cast(PdpConfig, self.config)

    def ranking(self) -> Tensor:
        """Returns the L2 norm of each unit over the root of its members: of a block's weights, of a channel's filters."""
        if self._roots is None:
            self._roots = self.units.members().to(self.units.costs.device).sqrt()
        return self.units.reduce(self.raw_weights, "l2") / self._roots

    @property
    def shares(self) -> dict[str, int]:
        """Units that each layer finally keeps: its share of the global top of magnitudes at the start of the search."""
        if self._shares is None:
            kept = super().choose(self.ranking().detach())
            self._shares = {name: int(part.sum()) for name, part in split(self.units, kept).items()}
        return self._shares

    def factors(self) -> Tensor:
        """Returns sigmoid((|w|^2 - t^2) / tau)."""
        magnitudes = self.ranking()
        with torch.no_grad():
            squares = self._thresholds(magnitudes.detach()).square()
            config = self.pdp
            scale = config.temperature * squares if config.relative else torch.full_like(squares, config.temperature)
            scale = scale.clamp_min(torch.finfo(squares.dtype).tiny)
        return torch.sigmoid((magnitudes.square() - squares) / scale)

    def choose(self, scores: Tensor) -> Tensor:
        """Returns the exact top of each layer's own share."""
        if isinstance(self.pattern, NM):
            return super().choose(scores)
        parts = split(self.units, scores.detach())
        return torch.cat([keep_best({name: part}, self.shares[name])[name] for name, part in parts.items()])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the search."""
        return super().state_dict() | {"shares": self._shares}

    def load_state_dict(self, state: Any) -> None:
        """Resumes from a state."""
        self._shares = state["shares"]
        super().load_state_dict(state)

    def _thresholds(self, magnitudes: Tensor) -> Tensor:
        """Returns t for each unit: the threshold of its layer, or of its row of M."""
        if isinstance(self.pattern, NM):
            padding = self.units.costs.view(-1, self.pattern.m) == 0
            rows = magnitudes.view(-1, self.pattern.m).masked_fill(padding, 0.0).sort(1, descending=True).values
            if self.pattern.n == self.pattern.m:
                return torch.zeros_like(magnitudes)
            middle = (rows[:, self.pattern.n - 1] + rows[:, self.pattern.n]) / 2
            return middle.repeat_interleave(self.pattern.m)
        done = 1.0 if self.pdp.ramp == 0 else min(1.0, (self.progress + 1e-9) / self.pdp.ramp)
        thresholds = []
        for name, part in split(self.units, magnitudes).items():
            removed = math.floor(done * (len(part) - self.shares[name]) + 0.5)
            thresholds.append(_between(part, len(part) - removed).expand(len(part)))
        return torch.cat(thresholds)


def _between(values: Tensor, keep: int) -> Tensor:
    """Returns the midpoint between the ``keep``-th largest value and the next; 0 if all are kept."""
    if keep >= len(values):
        return values.new_zeros(())
    removed = len(values) - keep
    below = values.kthvalue(removed).values
    return (below + values.kthvalue(removed + 1).values) / 2


@method(
    "pdp",
    PdpConfig,
    check=fits,
    paper="Cho et al. 2023, arXiv 2305.11203",
    purpose="blocks and weights: soft masks without parameters",
)
def pdp(task: Task, run: Run, config: PdpConfig) -> nn.Module:
    """PDP: soft masks as a function of the weights around each layer's threshold, freeze, fine-tune."""
    return searched(task, run, config, Pdp)
