"""AC/DC (arXiv 2106.12379): sparse and dense training alternate, so that removed weights may return.

The algorithm (spec: AC/DC 6.1):
    dense warm-up
    COMPRESS keep the exact top by magnitude over all layers, train the kept weights, masks fixed
    DECOMPRESS train all weights, the removed ones from zero, momentum reset
    ... and the last phase is compressed.

A channel returns with its former filters, and is read from zero. A filter of zeros has no variance: the batch norm after it
would divide its first gradient by the root of epsilon, and such filters would soon displace trained ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.patterns import Channel
from microglia.methods.config import UnitConfig, method
from microglia.methods.procedure import searched
from microglia.methods.unit_pruner import UnitPruner, fits
from microglia.storage.run import Run
from microglia.tasks.task import Task

MOMENTA = ("momentum_buffer", "exp_avg")


@dataclass(frozen=True)
class AcdcConfig(UnitConfig):
    """AC/DC; the defaults are the schedule of the official ResNet-50 run, as fractions of the training.

    Attributes:
        compress: Fractions of the training at which compressed phases begin; the last one lasts to the end.
        decompress: Fractions of the training at which dense phases begin, each between two compressed ones.
        reset_momentum: Whether a dense phase begins without momentum; otherwise removed weights jump back at its first step.
    """

    compress: tuple[float, ...] = (0.10, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70, 0.85)
    decompress: tuple[float, ...] = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
    reset_momentum: bool = True
    max_sparsity: float = 0.98

    def check_values(self) -> None:
        """Raises `BudgetError` unless compressed and dense phases alternate."""
        both = [t for pair in zip(self.compress, (*self.decompress, 1.0), strict=False) for t in pair]
        if len(self.compress) != len(self.decompress) + 1 or both != sorted(set(both)) or both[0] < 0:
            raise BudgetError(
                "Compressed and dense phases take turns and the training ends compressed: compress has one entry more than "
                f"decompress, all rising and below 1. Got compress {self.compress}, decompress {self.decompress}."
            )

    @property
    def span(self) -> tuple[float, float]:
        """From the first to the last compression."""
        return self.compress[0], self.compress[-1]


class Acdc(UnitPruner):
    """Compresses and decompresses alternately."""

    Config = AcdcConfig
    softens = False

    def __init__(self, model: nn.Module, config: AcdcConfig | None = None, **settings: Any) -> None:
        self._former: dict[str, Tensor] = {}
        super().__init__(model, config, **settings)
        times = [*self.acdc.compress, *self.acdc.decompress]
        if len({self._at(fraction) for fraction in times}) < len(times):
            raise BudgetError(
                f"In {self.total_steps} steps two of AC/DC's {len(times)} phases would begin at the same one; train longer, or "
                "give fewer entries of compress and decompress."
            )

    @property
    def acdc(self) -> AcdcConfig:
        """The config."""
        return cast(AcdcConfig, self.config)

    def factors(self) -> Tensor:
        """Returns ones: its masks are never soft."""
        return torch.ones(self.units.count, device=self.units.costs.device)

    def ranking(self) -> Tensor:
        """Returns the L1 norm of each unit over its members: of a block's weights, of a channel's filters."""
        total = self.units.reduce({name: w.abs() for name, w in self.raw_weights.items()}, "sum")
        return total / self.units.members().to(total.device)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step, into the next phase when it is due."""
        self.steps += 1
        if self.steps == self.end:
            self.freeze(optimizer)
        elif self.steps < self.end and self.steps in self._times(self.acdc.compress):
            if isinstance(self.pattern, Channel):
                self._former = {name: weight.clone() for name, weight in self.raw_weights.items()}
            self.harden(self.choose(self.ranking()), optimizer)
        elif self.steps < self.end and self.steps in self._times(self.acdc.decompress):
            self.open()
            self._restart()
            if self.acdc.reset_momentum and optimizer is not None:
                _reset_momentum(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the search."""
        return super().state_dict() | {"former": dict(self._former)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
        self._former = dict(state.get("former", {}))
        super().load_state_dict(state)

    def _restart(self) -> None:
        """Lets removed channels return."""
        if self._former and self.soft is not None and self.kept is not None:
            self.soft.restart(self.model, self.units.masks(self.kept), self.kept, self._former)
            self._former = {}

    def _times(self, fractions: tuple[float, ...]) -> set[int]:
        return {self._at(fraction) for fraction in fractions}

    def _at(self, fraction: float) -> int:
        return max(1, round(fraction * self.total_steps))


def _reset_momentum(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for name in MOMENTA:
            if isinstance(state.get(name), Tensor):
                state[name].zero_()


@method(
    "acdc",
    AcdcConfig,
    check=fits,
    paper="Peste et al. 2021, arXiv 2106.12379",
    purpose="dense and sparse training in turn; both models",
)
def acdc(task: Task, run: Run, config: AcdcConfig) -> nn.Module:
    """AC/DC: compressed and dense phases in turn, ending compressed."""
    return searched(task, run, config, Acdc)
