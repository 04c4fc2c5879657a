"""Deep R, deep rewiring (Bellec et al. 2018): signs are fixed, a weight that would change its sign gives way to a random one.

The algorithm (spec: survey 9), weight = sign theta where theta >= 0, else inactive; after every optimizer step of rate eta:
    theta <- theta - eta alpha + sqrt(2 eta T) noise  for active weights
    a weight of theta < 0 becomes inactive; as many inactive positions of its layer, drawn at random, become active
        with theta = 0 and their own fixed sign
so that the number of weights of each layer is constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.masks import enforce, mask
from microglia.methods.arguments import check_steps
from microglia.methods.config import method
from microglia.methods.pruner import Pruner
from microglia.methods.sparse_training import ScratchConfig, fits, from_scratch
from microglia.methods.what import PruneConfig
from microglia.scores import Evidence
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig


@dataclass(frozen=True)
class DeepRConfig(ScratchConfig):
    """Deep R.

    Attributes:
        l1: alpha, the pull of theta to 0.
        temperature: T, of the noise.
    """

    first_dense: bool = False
    l1: float = 1e-5
    temperature: float = 1e-7

    def check_values(self) -> None:
        """Raises `BudgetError` for negative numbers."""
        if self.l1 < 0 or self.temperature < 0:
            raise BudgetError(f"l1 and temperature are at least 0; got {self.l1} and {self.temperature}.")
        if self.first_dense:
            raise BudgetError("Deep R prunes every layer alike: leave first_dense out, or exclude the first layer.")


class DeepR(Pruner):
    """Rewires a sparse network at every step; the optimizer's rate scales pull and noise, and without it there is none.

    Args:
        model: The model to train, in place, usually with initial weights.
        config: See `DeepRConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training.
        evidence: Its generator draws masks, signs, noise and positions.
        **settings: The fields of the config by keyword instead.
    """

    Config = DeepRConfig

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        *,
        total_steps: int,
        evidence: Evidence | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, config, evidence=evidence, **settings)
        self.total_steps = check_steps(total_steps, type(self).__name__, least=0)
        self.steps = self.rewired = 0
        self.prune_to(self.target)
        generator = self.evidence.generator
        self.signs: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            drawn = torch.randint(2, layer.raw.shape, generator=generator).mul(2).sub(1).to(layer.raw)
            self.signs[name] = torch.where(layer.raw.detach() == 0, drawn, layer.raw.detach().sign())

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step: pull, noise, and new positions for the weights that changed their sign."""
        self.steps += 1
        layers, masks, renewed = self.layers, self.masks, {}
        config, generator = cast(DeepRConfig, self.config), self.evidence.generator
        for name, layer in layers.items():
            raw, sign, kept = layer.raw, self.signs[name], masks[name].to(layer.raw.device)
            rate = _rate(optimizer, raw)
            noise = torch.randn(int(kept.sum()), generator=generator).to(raw) * (2 * rate * config.temperature) ** 0.5
            theta = torch.zeros_like(raw).masked_scatter(kept, (raw * sign)[kept] - rate * config.l1 + noise)
            if name in self.protected:
                continue
            staying = kept & (theta >= 0)
            raw.copy_(torch.where(staying, theta * sign, 0.0))
            if count := int(kept.sum() - staying.sum()):
                free = (~staying).flatten().nonzero().flatten().cpu()
                drawn = free[torch.randperm(len(free), generator=generator)[:count]].to(raw.device)
                renewed[name] = staying.flatten().index_fill(0, drawn, True).view(kept.shape)
                self.rewired += count
        mask(self.model, renewed)
        enforce(self.model, optimizer)

    def report(self) -> dict[str, Any]:
        """Returns how many weights gave way to others."""
        return {"rewired": self.rewired}

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken, the signs and the state of the generator."""
        return {"steps": self.steps, **self.report(), "signs": self.signs, "generator": self.evidence.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state; the model's state holds the masks."""
        self.steps, self.rewired = state["steps"], state["rewired"]
        self.signs = {name: state["signs"][name].to(layer.raw) for name, layer in self.layers.items()}
        self.evidence.generator.set_state(state["generator"])


def _rate(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> float:
    """Returns the learning rate of a parameter; 0 without an optimizer that holds it."""
    groups = () if optimizer is None else optimizer.param_groups
    return next((float(g["lr"]) for g in groups if any(p is parameter for p in g["params"])), 0.0)


@method(
    "deep-r",
    DeepRConfig,
    check=fits(DeepR),
    training=FitConfig(),
    paper="Bellec et al. 2018, arXiv 1711.05136",
    purpose="sparse training with fixed signs",
)
def deep_r(task: Task, run: Run, config: DeepRConfig) -> nn.Module:
    """Deep R: sparse from scratch; signs are fixed, weights that would change theirs give way to random ones."""
    return from_scratch(task, run, config, DeepR)
