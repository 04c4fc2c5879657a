"""The interfaces of a pruner in the loop."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class Pruner(Protocol):
    """The interface of a pruner in the loop; see `microglia.methods.pruner.Pruner`."""

    def penalty(self) -> Tensor | float:
        """Returns the term that is added to the loss."""
        ...

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Acts after an optimizer step."""
        ...

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns optimizer groups of the pruner's own parameters; a group's own ``lr`` is held constant."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to resume from."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state."""
        ...


@runtime_checkable
class Replacing(Protocol):
    """A pruner that replaces the optimizers at some steps, as RigL does; other pruners do not need this method."""

    def replaces_step(self) -> bool:
        """Tells, after the backward pass, whether the optimizers skip this step."""
        ...


@runtime_checkable
class Optimizing(Protocol):
    """A pruner with its own optimizers for the parameters in its groups."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns new optimizers of the pruner's own parameters; [] if the training's optimizers suffice."""
        ...
