"""The plan of a model's gates: their sites and their rule of choice; plain values, saved as JSON beside the weights."""

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
"""Activations with f(0) = 0, so that a gate may come before them."""
LATER = ("blocks", "boost", "static")
"""Fields of a plan that version 0.1 does not know."""
RECTIFYING = frozenset({"relu", "relu6"})
"""Activations that are monotone and never negative."""


@dataclass(frozen=True)
class Site:
    """A convolution whose output channels a gate can switch off.

    Attributes:
        layer: Name of the convolution.
        carrier: Name of the module whose output is masked: its batch norm, or itself.
        activation: Activation after the carrier, by its name in `ACTIVATIONS`; the target is the mass after it.
        inputs: Number of channels that the convolution reads, all groups together.
        outputs: Number of channels that it writes.
    """

    layer: str
    carrier: str
    activation: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class GatePlan:
    """The description of a gated model beside its weights; plain values, saved as JSON.

    Attributes:
        sites: Sites of the gates, in the order of the network.
        pool: Pooling of a head's input: ``avg`` as in the code of the published numbers, or ``max`` as in the figures.
        softmax: Whether the pooled input goes through a softmax over channels.
        rule: Rule for targets.
        r: Layer -> fraction of the mass that its target keeps.
        keep: Layer -> fixed number of kept units, those with the largest logits; for random gates.
        blocks: Layer -> number of neighbouring filters that are kept or skipped together, the unit of its gate; 1 if absent.
        boost: Whether a kept filter's response is multiplied by its rectified logit, its saliency (FBS), with a gradient.
        static: Whether a gate keeps the same filters for every input: it has a bias alone, and its head costs nothing.
    """

    sites: tuple[Site, ...]
    pool: Pool = "avg"
    softmax: bool = True
    rule: Rule = "prefix_le"
    r: Mapping[str, float] = field(default_factory=dict)
    keep: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)
    boost: bool = False
    static: bool = False

    def head_of(self, site: Site) -> tuple[int, int]:
        """Returns the shape of a head's weight, (units, inputs)."""
        return site.outputs // self.blocks.get(site.layer, 1), 0 if self.static else site.inputs

    def with_r(self, r: float | Mapping[str, float]) -> GatePlan:
        """Returns the plan with one r for all layers, or one per layer."""
        each = r if isinstance(r, Mapping) else dict.fromkeys((site.layer for site in self.sites), r)
        return replace(self, r=dict(each))

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values; without the fields that earlier versions do not know, where these say nothing."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in LATER or value}

    @classmethod
    def from_dict(cls, values: Any, weights: Mapping[str, Tensor] | None = None) -> GatePlan:
        """Returns the plan that `to_dict` wrote.

        Args:
            values: Values read from a file.
            weights: The state that belongs to the plan and must hold its heads, or None.

        Raises:
            FileError: A type, a range or a shape is wrong.
        """
        check_form(values, {"pool": get_args(Pool), "rule": RULES, "activation": ACTIVATIONS})
        plan = cls(**{**values, "sites": tuple(Site(**site) for site in values["sites"])})
        if weights is not None:
            check_weights({(site.layer, site.carrier): plan.head_of(site) for site in plan.sites}, weights)
        return plan
