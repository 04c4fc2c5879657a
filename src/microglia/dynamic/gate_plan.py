"""The plan of a model's gates: where they are and how they choose, beside their weights; plain values, saved as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from microglia.dynamic.plan_check import check_form, check_weights
from microglia.dynamic.targets import RULES, Rule

Pool = Literal["avg", "max"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "gelu": functional.gelu,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "mish": functional.mish,
    "tanh": torch.tanh,
}
"""Activations that leave 0 as it is, so that a gate may stand in front of them."""
RECTIFYING = frozenset({"relu", "relu6"})
"""Those that never fall and are never negative."""


@dataclass(frozen=True)
class Site:
    """A convolution whose output channels a gate can switch off.

    Attributes:
        layer: Name of the convolution.
        carrier: Name of the module whose output is masked: its batch norm, or itself.
        activation: What follows the carrier, by its name in `ACTIVATIONS`; the target is the mass behind it.
        inputs: Channels the convolution reads, all groups together.
        outputs: Channels it writes.
    """

    layer: str
    carrier: str
    activation: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class GatePlan:
    """What a gated model is, beside its weights; plain values, saved as JSON.

    Attributes:
        sites: Where the gates are, in the order of the network.
        pool: How a head sees its input: ``avg`` as in the code that made the published numbers, or ``max`` as in the figures.
        softmax: Whether the pooled input goes through a softmax over channels.
        rule: How targets are made.
        r: Layer -> fraction of the mass that its target keeps.
        keep: Layer -> how many filters stay whatever the input, those of the largest logits; for random gates.
    """

    sites: tuple[Site, ...]
    pool: Pool = "avg"
    softmax: bool = True
    rule: Rule = "prefix_le"
    r: Mapping[str, float] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)

    def with_r(self, r: float | Mapping[str, float]) -> GatePlan:
        """Returns the plan with one r for all layers, or one for each."""
        each = r if isinstance(r, Mapping) else dict.fromkeys((site.layer for site in self.sites), r)
        return replace(self, r=dict(each))

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, weights: Mapping[str, Tensor] | None = None) -> GatePlan:
        """Returns the plan that `to_dict` wrote.

        Args:
            values: As read from a file.
            weights: The state that the plan belongs to, which has to hold its heads; None where there is none at hand.

        Raises:
            FileError: It is none: a type, a range or, against the weights, a shape is wrong.
        """
        check_form(values, {"pool": get_args(Pool), "rule": RULES, "activation": ACTIVATIONS})
        sites = tuple(Site(**site) for site in values["sites"])
        if weights is not None:
            check_weights(sites, weights)
        return cls(**{**values, "sites": sites})
