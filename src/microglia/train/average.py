"""An exponential moving average of the weights, which replaces them in evaluation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.masks import enforce
from microglia.train.groups import plain_name


class MovingAverage:
    """The average of a model's parameters and of its floating-point buffers (batch-norm statistics) over its updates.

    At update u: average <- d average + (1 - d) weights, with d = decay (1 - exp(-u / ramp)), so that early weights are soon
    forgotten. Raw weights are averaged, and the current mask is applied when the average is read. An average of masked weights
    would be wrong after a change of the mask.

    Args:
        model: Any module; its current weights are the first average.
        decay: Final d, in (0, 1).
        ramp: Number of updates in which d approaches the decay.
        left_out: Identities (``id``) of parameters that are not averaged, such as a pruner's own.

    Attributes:
        updates: Number of updates so far.
        values: Averages by the name of a tensor without masks.

    Source: the ramp is that of common detection recipes; the average is Polyak and Juditsky 1992, with forgetting.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: float, left_out: Collection[int] = ()) -> None:
        self.model, self.decay, self.ramp, self.left_out = model, decay, ramp, left_out
        self.updates = 0
        self.values = {name: tensor.detach().clone() for name, tensor in self._live()}

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in self.left_out:
                yield plain_name(name), parameter
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point() and "parametrizations." not in name:
                yield name, buffer

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average with the current weights."""
        self.updates += 1
        share = 1 - self.decay * (1 - math.exp(-self.updates / self.ramp))
        for name, tensor in self._live():
            if name in self.values:
                self.values[name].lerp_(tensor, share)
            else:  # a parameter that was added later
                self.values[name] = tensor.detach().clone()

    @torch.no_grad()
    def put(self) -> None:
        """Copies the average into the weights of the model; masked weights are 0."""
        for name, tensor in self._live():
            tensor.copy_(self.values[name])
        enforce(self.model)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model's weights are the average; afterwards its own weights are restored bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in self._live()}
        try:
            self.put()
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._live():
                    tensor.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to resume from."""
        return {"values": dict(self.values), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state."""
        self.updates = int(state["updates"])
        for name, tensor in self._live():
            if name in state["values"]:
                self.values[name] = tensor.detach().clone().copy_(state["values"][name])
