"""The config of sparse training from scratch, and how much is exchanged when."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from microglia.core.errors import BudgetError, PatternError
from microglia.core.registry import unknown_name
from microglia.methods.config import MethodConfig
from microglia.train.optim import FitConfig

Growth = Literal["gradient", "random"]
Decay = Literal["cosine", "constant"]


@dataclass(frozen=True)
class SparseTrainingConfig(MethodConfig):
    """Sparse training from scratch; the defaults are RigL's with Erdős-Rényi-kernel densities (Evci et al. 2020).

    Attributes:
        scope: How the budget is shared among layers for good: ``erk``, ``layer`` (uniform), or densities by layer name;
            ``global`` as the score of the first masks has it.
        score: Of the first masks, ``random`` in the papers.
        train: The training of the sparse network, from its initial weights on.
        first_dense: Whether the first layer stays dense under ``layer``, as in the paper. It counts as kept, so the others
            are a little sparser; the paper does not count it, which is what ``exclude`` does.
        drop: Fraction of a layer's weights exchanged at the first updates, in [0, 1); 0 never exchanges any.
        every: Optimizer steps between updates.
        until: Fraction of the training after which the masks rest.
        decay: How the dropped fraction falls until then: ``cosine`` to 0 (RigL), or ``constant`` (SET).
        grow: Where weights grow: where the ``gradient`` is largest (RigL), or at ``random`` (SET).
    """

    scope: Literal["global", "layer", "row", "erk"] | dict[str, float] = "erk"
    score: str = "random"
    train: FitConfig = field(default_factory=FitConfig)
    first_dense: bool = True
    drop: float = 0.3
    every: int = 100
    until: float = 0.75
    decay: Decay = "cosine"
    grow: Growth = "gradient"

    def __post_init__(self) -> None:  # here, so that it shows before a dense model is trained
        if self.pattern != "unstructured":
            raise PatternError(f"Sparse training exchanges single weights: its pattern is unstructured, not {self.pattern}.")
        if self.scope == "row":
            raise BudgetError("Sparse training keeps the count of each layer, not of each row: take scope erk or layer.")
        if not 0 <= self.drop < 1 or not 0 < self.until <= 1:
            raise BudgetError(f"drop is a fraction in [0, 1) and until one in (0, 1]; got {self.drop} and {self.until}.")
        if self.every < 1:
            raise BudgetError(f"every is a number of optimizer steps, at least 1; got {self.every}.")
        if self.decay not in get_args(Decay):
            raise unknown_name("decay", self.decay, get_args(Decay))
        if self.grow not in get_args(Growth):
            raise unknown_name("growth", self.grow, get_args(Growth))

    def due(self, step: int, total_steps: int) -> bool:
        """Tells whether a step, counted from 1, exchanges weights: every so many of them, before ``until``."""
        return self.drop > 0 and step % self.every == 0 and step < self.until * total_steps

    def dropped(self, step: int, total_steps: int) -> float:
        """Returns the fraction of a layer's weights to drop at a step t, in [0, drop]; 0 from the end T on.

        It is drop / 2 (1 + cos(pi t / T)) with T = until * total_steps (Evci et al. 2020, section 3), or constant until T.
        """
        end = self.until * total_steps
        if step >= end:
            return 0.0
        return self.drop if self.decay == "constant" else self.drop / 2 * (1 + math.cos(math.pi * step / end))

    def check_updates(self, total_steps: int) -> None:
        """Raises `BudgetError` when masks that should move never would in a training of so many steps."""
        if self.drop > 0 and not self.due(self.every, total_steps):
            raise BudgetError(
                f"No update of the masks falls into this training: every {self.every} steps, before step "
                f"{self.until * total_steps:g} of {total_steps:,}. Give a smaller every or a longer training, or take the "
                "method 'static' (drop=0), whose masks never move."
            )
