"""Second moments of the inputs that the layers of one block read, once for all layers that read the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.core.layers import Layer
from microglia.scores.second_moments import Moments


@dataclass
class Shared:
    """The layers of a block that read the same tensor, and its moments."""

    moments: Moments
    layers: list[str] = field(default_factory=list)


class Reading:
    """Sums what the layers of a block read; layers that read the same tensor share the sums."""

    def __init__(self, layers: Mapping[str, Layer], *, whole: bool) -> None:
        self.layers, self.whole = layers, whole
        self.shared: dict[str, Shared] = {}
        self.leader: dict[str, str] = {}
        self.seen: list[tuple[str, Tensor, int]] = []
        self.counted: Tensor | None = None

    def attach(self) -> list[Any]:
        """Attaches hooks to every module that multiplies one of the weights; they return nothing."""
        return [
            module.register_forward_hook(self._hook(name))
            for name, layer in self.layers.items()
            if layer.kind.inputs is not None
            for module, _ in layer.holders
        ]

    def begin(self, counted: Tensor | None) -> None:
        """Begins a forward pass; ``counted`` tells which tokens are no padding."""
        self.seen, self.counted = [], counted

    def groups(self) -> list[Shared]:
        """Returns the moments, each with the layers that share it; layers that read nothing have none."""
        for name, leader in self.leader.items():
            self.shared[leader].layers.append(name)
        self.seen = []
        return [group for group in self.shared.values() if group.moments.count]

    def _hook(self, name: str) -> Callable[..., None]:
        return lambda module, args, output: self._note(name, module, args[0])

    def _note(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        plain = self.layers[name].kind.inputs == -1
        same = [n for n, x, version in self.seen if x is inputs and x._version == version] if plain else []
        leader = self.leader.setdefault(name, same[0] if same else name)
        if leader != name:
            if leader not in same:
                raise MicrogliaError(
                    f"The layer {name} reads {leader}'s inputs in one call and others in the next: exclude it."
                )
            return
        if name not in self.shared:
            self.shared[name] = Shared(Moments(self.layers[name], whole=self.whole))
        self.shared[name].moments.add(module, inputs, self.counted)
        self.seen.append((name, inputs, inputs._version))
