"""Auxiliary classifiers inside a network: what modules output, a classifier on it, gradients over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from microglia.train.engine import rank_and_world


class Captured(AbstractContextManager["Captured"]):
    """Context in which the outputs of modules are kept, by name; outputs that are no tensor are left out.

    Attributes:
        seen: Module -> its last output, channels in dimension 1.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, dict.fromkeys(names)
        self.seen: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Captured:
        for name in self.names:

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    self.seen[name] = output.movedim(-1, 1) if isinstance(module, nn.Linear) else output

            self._handles.append(self.model.get_submodule(name).register_forward_hook(note))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()


class AuxiliaryClassifier(nn.Module):
    """Batch norm, ReLU, mean over positions, linear: (batch, channels, *positions) -> (batch, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(channels), nn.Linear(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits."""
        features = features.flatten(2) if features.ndim > 2 else features
        found = torch.relu(self.norm(features))
        out: Tensor = self.linear(found.mean(2) if found.ndim > 2 else found)
        return out


def auxiliary_classifier(features: Tensor, classes: int) -> AuxiliaryClassifier:
    """Returns a classifier of features like these, (batch, channels, *positions)."""
    return AuxiliaryClassifier(features.shape[1], classes)


def averaged_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the means of tensors over all ranks."""
    _, world = rank_and_world()
    if world > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor.div_(world)
    return list(tensors)
