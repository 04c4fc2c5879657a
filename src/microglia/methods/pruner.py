"""What every pruner is made of: which layers, which units, how many of them, by which score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from microglia.core.allocation import Scope, check_scope
from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, PatternError
from microglia.core.layers import Layer, check_selectors, matches, oriented
from microglia.core.left_out import announce, chosen_layers
from microglia.core.masks import MaskSet, enforce, mask, masks_of
from microglia.core.patterns import Channel, Pattern, parse_pattern
from microglia.core.selection import select
from microglia.methods.arguments import check_evidence, check_model, plain_settings
from microglia.scores import Evidence, scores


@dataclass(frozen=True)
class PruneConfig:
    """What to keep, common to all methods.

    Attributes:
        density: Kept fraction of the prunable weights, in (0, 1].
        params: Kept fraction of all parameters, in (0, 1]; with ``density`` the tighter one binds.
        flops: Kept fraction of the multiply-accumulates; only where channels are removed (the method ``channels``).
        ms: Milliseconds that one example may take on this machine, by measurement; only there too.
        pattern: ``unstructured``, ``block:OUTxIN``, ``nm:N:M`` or ``channel``.
        scope: ``global``, ``layer``, ``row``, ``erk``, or densities by layer name.
        score: Name of a score; see ``microglia methods``.
        reduction: How the scores of a unit's weights become one: ``mean``, ``sum``, ``max``, ``l2``.
        layers: Selectors of the layers to prune.
        exclude: Selectors of layers to leave out: neither pruned nor counted.
        protect: Selectors of layers to keep dense but count as kept.
        allow_empty: Whether a layer may lose all its weights.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    density: float | None = None
    params: float | None = None
    flops: float | None = None
    ms: float | None = None
    pattern: str = "unstructured"
    scope: Literal["global", "layer", "row", "erk"] | dict[str, float] = "global"
    score: str = "magnitude"
    reduction: Literal["mean", "sum", "max", "l2"] = "mean"
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    allow_empty: bool = False


class Pruner:
    """A method to be stepped inside anybody's training loop; it holds layers by name and the masks live in the model.

    Args:
        model: The model to prune, in place. What it has been masked before stays masked.
        config: See `PruneConfig`.
        evidence: What a score may look at (batches, loss, generator), where the score needs it.
        **settings: The fields of the config by keyword instead, such as ``density=0.2, scope="layer"``.

    Raises:
        MicrogliaError: The config does not fit the model; the text says how.
    """

    Config: type[PruneConfig] = PruneConfig
    couples: ClassVar[bool] = False
    """Whether its channels are those of the whole model, coupled, and not the rows of each layer by itself."""

    def __init__(
        self, model: nn.Module, config: PruneConfig | None = None, *, evidence: Evidence | None = None, **settings: Any
    ) -> None:
        user = type(self).__name__
        check_model(model, user)
        self.model, self.config = model, _config(self.Config, config, settings, user)
        config = self.config
        self.evidence = check_evidence(evidence, user)
        self.score = scores[config.score]
        self.pattern = parse_pattern(config.pattern)
        self.budget = _budget(config, self.pattern)
        check_scope(config.scope)
        layers = self.layers
        _refuse_misfit(self.pattern, layers)
        if isinstance(self.pattern, Channel) and not self.couples:
            _refuse_gates(layers)
        check_selectors(layers, config.protect)
        self.protected = [n for n, layer in layers.items() if config.protect and matches(n, layer.module, config.protect)]
        self.weights = sum(layer.raw.numel() for layer in layers.values())
        self.target = self._target()
        announce(model, layers, config.layers, config.exclude)

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers this pruner works on, by name."""
        return chosen_layers(self.model, self.config.layers, self.config.exclude)

    @property
    def masks(self) -> MaskSet:
        """The masks of its layers; all ones where none is attached."""
        attached = masks_of(self.model)
        ones = {n: torch.ones(layer.shape, dtype=torch.bool) for n, layer in self.layers.items() if n not in attached}
        return MaskSet({n: attached[n] if n in attached else ones[n] for n in self.layers})

    def prune_to(self, keep: int, optimizer: torch.optim.Optimizer | None = None) -> MaskSet:
        """Scores, keeps the best units holding ``keep`` weights, attaches the masks and clears what they removed."""
        layers = self.layers
        chosen = self.select(self.score(self.model, layers, self.evidence), keep, masks_of(self.model))
        mask(self.model, chosen)
        enforce(self.model, optimizer)
        return chosen

    def select(
        self, values: Mapping[str, Tensor], keep: int, alive: Mapping[str, Tensor], scope: Scope | None = None
    ) -> MaskSet:
        """Returns the masks that keep the best units, in the layout of the weights.

        Args:
            values: Scores by layer, shaped like the weights.
            keep: Weights to keep over all layers.
            alive: Masks from before, shaped like the weights; what they removed stays removed.
            scope: In the place of the config's.
        """
        config, layers = self.config, self.layers
        chosen = select(
            oriented(layers, values),
            pattern=self.pattern,
            keep=keep,
            scope=config.scope if scope is None else scope,
            reduction=config.reduction,
            alive=oriented(layers, {n: m for n, m in alive.items() if n in layers}),
            protect=self.protected,
            allow_empty=config.allow_empty,
        )
        return MaskSet(oriented(layers, chosen))

    def penalty(self) -> Tensor | float:
        """Returns what the training adds to the loss."""
        return 0.0

    def replaces_step(self) -> bool:
        """Tells whether the optimizer should rest at this step, for the pruner's own takes its place; few pruners do."""
        return False

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Acts after each optimizer step; with the optimizer at hand its state of removed weights is cleared too."""

    def finish(self) -> MaskSet:
        """Ends the pruning; returns the final masks, which stay attached (`microglia.fold` writes them in)."""
        return self.masks

    def report(self) -> dict[str, Any]:
        """Returns what to tell of the pruning, JSON-ready."""
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns optimizer groups of the pruner's own parameters."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Returns what is needed, beside the model's state, to go on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""

    def _target(self) -> int:
        """Returns how many weights stay in the end."""
        if self.budget is None:
            return 0
        total = sum(p.numel() for p in self.model.parameters())
        return self.budget.kept_weights(self.weights, total)


def _config(kind: type[PruneConfig], config: object, settings: Mapping[str, Any], user: str) -> PruneConfig:
    """Returns the config that is given whole or by keyword."""
    if config is None:
        return kind(**plain_settings(kind, settings, user))
    if settings:
        raise BudgetError(f"{user} takes a config or keywords, not both; got a config and {', '.join(settings)}.")
    if not isinstance(config, PruneConfig):
        raise BudgetError(f"The config of {user} is a {kind.__name__}; got {config!r}: say density=..., the fraction kept.")
    return config


def _budget(config: PruneConfig, pattern: Pattern) -> Budget | None:
    if config.flops is not None or config.ms is not None:
        raise BudgetError(
            f"flops and ms are budgets of removed channels: masks ({pattern}) save neither. Take the method 'channels' "
            "(pattern channel), or give density or params."
        )
    fixed = pattern.fixed_density
    if fixed is not None:
        if config.params is not None or config.density not in (None, fixed):
            raise BudgetError(f"{pattern} keeps {fixed:g} of the weights by itself; leave density and params out.")
        return Budget(density=fixed)
    if not isinstance(config.scope, str):
        if config.density is not None or config.params is not None:
            raise BudgetError("Where scope gives densities by layer, they are the budget; leave density and params out.")
        return None
    return Budget(density=config.density, params=config.params)


def _refuse_misfit(pattern: Pattern, layers: Mapping[str, Layer]) -> None:
    """Raises when a pattern is larger than every layer it should divide."""
    out, in_ = pattern.footprint
    if not any(layer.sides[0] >= out and layer.sides[1] >= in_ for layer in layers.values()):
        largest = max(layers.values(), key=lambda layer: layer.raw.numel())
        raise PatternError(
            f"The pattern {pattern} fits no layer: none of the {len(layers)} has at least {out} outputs and {in_} inputs; "
            f"the largest is {largest.name} with {largest.sides[0]} x {largest.sides[1]}."
        )


def _refuse_gates(layers: Mapping[str, Layer]) -> None:
    """Raises where whole rows would be removed of layers whose rows are gates."""
    if gated := [name for name, layer in layers.items() if layer.kind.gates]:
        kind = type(layers[gated[0]].module).__name__.removeprefix("Parametrized")
        raise PatternError(
            f"The pattern channel removes output channels, but each row of {', '.join(gated[:4])} is one gate of a unit: leave "
            f"recurrent layers out, as by exclude=['type:{kind}']."
        )
