"""SMART (arXiv 2403.19969): a separate score per unit, one differentiable top-k over all layers, a falling temperature.

The algorithm (spec: SMART 2.5, 3.3). For every step s of the search:
    tau = init_temp (final_temp / init_temp)^(s / (S - 1))
    f   = soft top-k of the scores at tau, its sum exactly the budget; unless allow_empty, f = 1 for the best of a layer
    train weights w and scores m on L(w f); gradients exact, no straight-through
then keep the exact top-k, fixed, and fine-tune. With N:M the scores are the weights' magnitudes, in each row of M.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.patterns import NM
from microglia.core.registry import unknown_name
from microglia.core.schedules import geometric
from microglia.core.sharded import refuse_shards, shard_like, whole
from microglia.core.soft_topk import soft_topk
from microglia.methods.config import UNITS, SearchConfig, UnitConfig, method
from microglia.methods.procedure import searched
from microglia.methods.pruner import own_optimizer
from microglia.methods.unit_pruner import Report, UnitPruner, fits
from microglia.methods.units import split
from microglia.methods.what import SAMPLING, Takes
from microglia.scores.inputs import mean_inputs
from microglia.storage.run import Run
from microglia.tasks.task import Task

INITS = ("magnitude", "normalized", "layerwise", "noise", "activation")


@dataclass(frozen=True)
class SmartConfig(SearchConfig, UnitConfig):
    """SMART.

    Attributes:
        init_temp: Temperature at the first step of the search, in units of the scores.
        final_temp: Temperature at its last step.
        init: Initial scores. ``magnitude`` is the mean |w| of a unit. ``normalized`` divides it by its spread over all units,
            so that a temperature has the same meaning in every network. ``layerwise`` divides it by its mean in each layer.
            ``noise`` treats all units equally. ``activation`` is the mean |w| |x| with the layer's inputs, normalized.
        mask_lr: Learning rate of the scores, constant.
        mask_optimizer: Optimizer of the scores. Their gradient grows as the temperature falls; ``adam`` is invariant to this.
    """

    takes: ClassVar[Takes] = replace(UNITS, fields=(*UNITS.fields, *SAMPLING))  # init=activation
    init_temp: float = 10.0
    final_temp: float = 1e-4
    init: Literal["magnitude", "normalized", "layerwise", "noise", "activation"] = "normalized"
    mask_lr: float = 0.1
    mask_optimizer: Literal["adam", "adamw", "sgd"] = "adam"

    def check_values(self) -> None:
        """Raises unless temperatures fall, and for an unknown initialization."""
        if not 0 < self.final_temp <= self.init_temp:
            raise BudgetError(
                f"The temperature falls from init_temp to final_temp > 0; got {self.init_temp} and {self.final_temp}."
            )
        if self.init not in INITS:
            raise unknown_name("initialization of the scores", self.init, INITS)


class Smart(UnitPruner):
    """Learns which units to keep, inside any training loop.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        >>> pruner = Smart(model, pattern="block:16x8", density=0.5, total_steps=10, search=0.5)
        >>> optimizers = [torch.optim.SGD(pruner.weights_to_train(), lr=0.1), *pruner.optimizers()]
        >>> for _ in range(10):
        ...     loss = model(torch.randn(8, 16)).square().mean() + pruner.penalty()
        ...     _ = [optimizer.zero_grad() for optimizer in optimizers]
        ...     loss.backward()
        ...     _ = [optimizer.step() for optimizer in optimizers]
        ...     pruner.step(optimizers[0])
        >>> pruner.finish().kept
        512
    """

    Config = SmartConfig
    shards: ClassVar[bool] = True  # where fully_shard comes after it

    @property
    def smart(self) -> SmartConfig:
        """The config."""
        return cast(SmartConfig, self.config)

    @property
    def temperature(self) -> float:
        """Temperature of this step."""
        return geometric(self.progress, self.smart.init_temp, self.smart.final_temp)

    def initial_scores(self) -> Tensor | None:
        """Returns the initial scores; none with N:M, where layers have fixed densities."""
        return None if isinstance(self.pattern, NM) else self._scores()

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step."""
        super().step(optimizer)
        if self.steps == self.begin and self.soft is not None and self.soft.scores is not None:
            with torch.no_grad():  # the weights were trained since the scores were made
                fresh = self._scores()
                self.soft.scores.copy_(shard_like(fresh, self.soft.scores))

    def factors(self) -> Tensor:
        """Returns the soft top-k of the scores at the temperature of this step."""
        if isinstance(self.pattern, NM):  # its ranking reads the weights of all layers during one layer's pass
            refuse_shards(self.model, "Smart with an N:M pattern")
        scores, padding = self.ranking(), self.units.costs == 0
        if not isinstance(self.pattern, NM) and not self.own.allow_empty:
            scores = self._guarded(scores)
        if isinstance(self.pattern, NM):
            rows = scores.masked_fill(padding, -torch.inf).view(-1, self.pattern.m)
            real = self.pattern.m - padding.view(-1, self.pattern.m).sum(1)
            found = soft_topk(rows, real.clamp(max=self.pattern.n), self.temperature, start=self.threshold)
        else:
            keep, sizes = self.limit.soft(self.ranking().detach())
            found = soft_topk(scores, keep, self.temperature, sizes=sizes, start=self.threshold)
        self.threshold = found.threshold
        return found.mask.flatten()

    def _guarded(self, scores: Tensor) -> Tensor:
        """Returns the scores with the best unit of each layer or group at +inf: it stays, as in the freeze."""
        with torch.no_grad():
            best, start = [], 0
            for part in split(self.units, scores).values():
                if len(part):
                    best.append(start + part.argmax())
                start += len(part)
            spots = torch.stack(best)
            safe = torch.zeros_like(scores, dtype=torch.bool)
            safe[spots] = True
        return scores.masked_fill(safe, torch.inf)

    def ranking(self) -> Tensor:
        """Returns the scores."""
        if isinstance(self.pattern, NM):
            return self.units.reduce({name: w.abs() for name, w in self.raw_weights.items()}, "mean")
        assert self.soft is not None
        assert self.soft.scores is not None
        return whole(self.soft.scores)

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the group of the scores: its own rate and no weight decay, which would only raise the temperature."""
        if self.soft is None or self.soft.scores is None:
            return []
        return [{"params": [self.soft.scores], "lr": self.smart.mask_lr, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the optimizer of the scores, named by ``mask_optimizer``."""
        return [own_optimizer(self.smart.mask_optimizer, groups)] if (groups := self.param_groups()) else []

    def _snapshot(self) -> Report:
        return super()._snapshot() | {"temperature": self.temperature}

    @torch.no_grad()
    def _scores(self) -> Tensor:
        init, weights = self.smart.init, self.raw_weights
        if init == "noise":
            noise = torch.randn(self.units.count, generator=self.evidence.generator)
            return 1e-3 * noise.to(self.units.costs.device)
        values: Mapping[str, Tensor] = {name: w.abs() for name, w in weights.items()}
        if init == "activation":
            inputs = mean_inputs(self.model, self.weight_layers, self.evidence)
            values = {name: value * inputs[name] for name, value in values.items()}
        scores = self.units.reduce(values, "mean")
        if init == "layerwise":
            parts = torch.split(scores, list(self.units.lengths))
            return torch.cat([part / part.mean().clamp_min(torch.finfo(part.dtype).tiny) for part in parts])
        if init == "magnitude" or len(scores) < 2:
            return scores
        return scores / scores.std().clamp_min(torch.finfo(scores.dtype).tiny)


@method(
    "smart",
    SmartConfig,
    check=fits,
    paper="Ding et al. 2024, arXiv 2403.19969",
    purpose="blocks for kernels: learned masks, exact density",
)
def smart(task: Task, run: Run, config: SmartConfig) -> nn.Module:
    """SMART: learn scores with a differentiable top-k of falling temperature, freeze, fine-tune."""
    return searched(task, run, config, Smart)
