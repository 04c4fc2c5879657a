"""The base of every pruner: its layers, its units, their number, the score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from microglia.core.allocation import Allocation, Scope, read_scope
from microglia.core.auxiliary import counted_parameters
from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, PatternError
from microglia.core.layers import Layer, check_selectors, matches, oriented
from microglia.core.left_out import announce, chosen_layers
from microglia.core.masks import MaskSet, enforce, mask, masks_of
from microglia.core.patterns import Channel, Pattern, parse_pattern
from microglia.core.selection import select
from microglia.core.sharded import refuse_shards
from microglia.methods.arguments import check_model, check_steps, plain_settings
from microglia.methods.what import PruneConfig
from microglia.scores import Evidence, scores
from microglia.scores.checks import check_evidence
from microglia.train.protocols import Pruner as Stepped

__all__ = ["PruneConfig", "Pruner", "PrunerProtocol", "own_optimizer", "set_rate"]


class PrunerProtocol(Stepped, Protocol):
    """The protocol of every pruner, so that pruners are interchangeable in a user's own loop.

    All are made by ``(model, total_steps=..., example_inputs=..., evidence=..., **settings)`` and all work in this loop:

        optimizers = [torch.optim.SGD(pruner.weights_to_train(), lr=0.1, momentum=0.9), *pruner.optimizers()]
        for x, y in loader:
            loss = loss_fn(model(x), y) + pruner.penalty()
            for optimizer in optimizers: optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers: optimizer.step()
            pruner.step(optimizers[0])
        pruner.finish()
    """

    def replaces_step(self) -> bool:
        """Tells, after the backward pass, whether the optimizers should skip this step, as with RigL."""
        ...

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the model without the pruner's own; frozen ones get no gradient."""
        ...

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns new optimizers of the pruner's own parameters, with the method's kind and rates."""
        ...

    def finish(self) -> Any:
        """Ends the pruning."""
        ...

    def report(self) -> dict[str, Any]:
        """Returns the report of the pruning, JSON-ready."""
        ...


class Pruner:
    """A method for use inside any training loop; it holds layers by name, and the model holds the masks.

    Args:
        model: The model to prune, in place. Weights that are already masked stay masked.
        config: See `PruneConfig`.
        evidence: The data for the score (batches, loss, generator), if the score needs it.
        total_steps: Optimizer steps of the training. All pruners take it; pruners that prune at once do not need it.
        example_inputs: One batch of inputs. All pruners take it; pruners of single layers do not need it.
        **settings: The fields of the config by keyword instead, such as ``density=0.2, scope="layer"``.

    Raises:
        MicrogliaError: The config does not fit the model; the text explains it.
    """

    Config: type[PruneConfig] = PruneConfig
    couples: ClassVar[bool] = False
    """Whether its channels are the coupled channels of the whole model, not the rows of each single layer."""
    shards: ClassVar[bool] = False
    """Whether it also prunes parameters that FSDP2 sharded before it is made; see `microglia.core.sharded`."""

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        *,
        evidence: Evidence | None = None,
        total_steps: int | None = None,
        example_inputs: Any = None,
        **settings: Any,
    ) -> None:
        user = type(self).__name__
        check_model(model, user)
        if not self.shards:
            refuse_shards(model, user)
        if total_steps is not None:
            check_steps(total_steps, user, least=0)
        self.model, self.config = model, _config(self.Config, config, settings, user)
        config = self.config
        self.evidence = check_evidence(evidence, user)
        self.score = scores[config.score]
        self.pattern = parse_pattern(config.pattern)
        self.budget = _budget(config, self.pattern)
        self.scope = read_scope(config.scope)
        layers = self.layers
        _refuse_misfit(self.pattern, layers)
        if isinstance(self.pattern, Channel) and not self.couples:
            _refuse_gates(layers)
        check_selectors(layers, config.protect)
        self.protected = [n for n, layer in layers.items() if config.protect and matches(n, layer.module, config.protect)]
        if isinstance(self.scope, Allocation):  # here, so that it shows before a dense model is trained
            self.scope.check({name: layer.raw.numel() for name, layer in layers.items() if name not in self.protected})
        self.weights = sum(layer.raw.numel() for layer in layers.values())
        self.target = self._target()
        announce(model, layers, config.layers, config.exclude)

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that this pruner prunes, by name."""
        return chosen_layers(self.model, self.config.layers, self.config.exclude)

    @property
    def masks(self) -> MaskSet:
        """The masks of its layers; all ones for a layer without a mask."""
        attached = masks_of(self.model)
        ones = {n: torch.ones(layer.shape, dtype=torch.bool) for n, layer in self.layers.items() if n not in attached}
        return MaskSet({n: attached[n] if n in attached else ones[n] for n in self.layers})

    def prune_to(self, keep: int, optimizer: torch.optim.Optimizer | None = None) -> MaskSet:
        """Scores, keeps the best units with ``keep`` weights, attaches the masks and clears removed weights."""
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
            alive: Earlier masks, shaped like the weights; weights that they removed stay removed.
            scope: Scope to use instead of the config's.
        """
        config, layers = self.config, self.layers
        chosen = select(
            oriented(layers, values),
            pattern=self.pattern,
            keep=keep,
            scope=self.scope if scope is None else scope,
            reduction=config.reduction,
            alive=oriented(layers, {n: m for n, m in alive.items() if n in layers}),
            protect=self.protected,
            allow_empty=config.allow_empty,
        )
        return MaskSet(oriented(layers, chosen))

    def penalty(self) -> Tensor | float:
        """Returns the term that the training adds to the loss."""
        return 0.0

    def replaces_step(self) -> bool:
        """Tells whether the optimizer should skip this step because the pruner's own step replaces it; few pruners do."""
        return False

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Acts after each optimizer step; with the optimizer given, its state of removed weights is cleared too."""

    def finish(self) -> MaskSet:
        """Ends the pruning; returns the final masks, which stay attached (`microglia.fold` writes them in)."""
        return self.masks

    def report(self) -> dict[str, Any]:
        """Returns the report of the pruning, JSON-ready."""
        return {}

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns plain groups of the pruner's own parameters: parameters, ``lr``, ``weight_decay``; [] if it has none.

        Every torch optimizer takes them and uses their rate and decay: ``for g in pruner.param_groups():
        optimizer.add_param_group(g)``. They are then trained by that optimizer's rule, and a scheduler of its rates changes
        their rates too. For the method's own rule and constant rate, use `optimizers` instead, not both.
        """
        return []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns new optimizers of the pruner's own parameters, as the method defines them; [] if it has none.

        A pruner with its own ``param_groups`` may return []. `microglia.fit` then adds the groups to its own optimizer, at
        their rates.
        """
        return []

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the model without the pruner's own."""
        own = {id(p) for group in self.param_groups() for p in group["params"]}
        return [p for p in self.model.parameters() if id(p) not in own]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, beside the model's, to resume from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""

    def _target(self) -> int:
        """Returns the final number of kept weights; 0 without a budget of weights."""
        if self.budget is None or self.budget.flops is not None:
            return 0
        total = counted_parameters(self.model)
        return self.budget.kept_weights(self.weights, total)


def own_optimizer(name: str, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer of a pruner's own parameters.

    Args:
        name: ``sgd`` (with momentum 0.9), ``adam`` or ``adamw``.
        groups: Parameter groups, each with its rate and decay.
    """
    plain: Any = [dict(group) for group in groups]
    if name == "sgd":
        return torch.optim.SGD(plain, momentum=0.9, fused=True)
    return torch.optim.Adam(plain, fused=True) if name == "adam" else torch.optim.AdamW(plain, fused=True)


def set_rate(optimizers: Iterable[torch.optim.Optimizer | None], parameters: Iterable[Tensor], rate: float) -> None:
    """Sets the rate of every group that holds one of the parameters, in the loop's optimizers and in the pruner's own."""
    own = {id(p) for p in parameters}
    for group in (g for optimizer in optimizers if optimizer is not None for g in optimizer.param_groups):
        if any(id(p) in own for p in group["params"]):
            group["lr"] = rate
            if "constant_lr" in group:  # in `microglia.fit`, which sets the rates of each step
                group["constant_lr"] = rate


def _config(kind: type[PruneConfig], config: object, settings: Mapping[str, Any], user: str) -> PruneConfig:
    """Returns the config, which is given as an object or by keyword."""
    if config is None:
        return kind(**plain_settings(kind, settings, user))
    if settings:
        raise BudgetError(f"{user} takes a config or keywords, not both; got a config and {', '.join(settings)}.")
    if not isinstance(config, PruneConfig):
        raise BudgetError(f"The config of {user} is a {kind.__name__}; got {config!r}: say density=..., the fraction kept.")
    return config


def _budget(config: PruneConfig, pattern: Pattern) -> Budget | None:
    fixed = pattern.fixed_density
    if fixed is not None:
        if config.params is not None or config.flops is not None or config.density not in (None, fixed):
            raise BudgetError(f"{pattern} keeps {fixed:g} of the weights by itself; leave density, params and flops out.")
        return Budget(density=fixed)
    if isinstance(config.scope, Mapping):
        if config.density is not None or config.params is not None:
            raise BudgetError("Where scope gives densities by layer, they are the budget; leave density and params out.")
        return None
    return Budget(density=config.density, params=config.params, flops=config.flops)


def _refuse_misfit(pattern: Pattern, layers: Mapping[str, Layer]) -> None:
    """Raises if a pattern is larger than every layer."""
    out, in_ = pattern.footprint
    if not any(layer.sides[0] >= out and layer.sides[1] >= in_ for layer in layers.values()):
        largest = max(layers.values(), key=lambda layer: layer.raw.numel())
        raise PatternError(
            f"The pattern {pattern} fits no layer: none of the {len(layers)} has at least {out} outputs and {in_} inputs; "
            f"the largest is {largest.name} with {largest.sides[0]} x {largest.sides[1]}."
        )


def _refuse_gates(layers: Mapping[str, Layer]) -> None:
    """Raises if whole rows of layers would be removed whose rows are gates."""
    if gated := [name for name, layer in layers.items() if layer.kind.gates]:
        kind = type(layers[gated[0]].module).__name__.removeprefix("Parametrized")
        raise PatternError(
            f"The pattern channel removes output channels, but each row of {', '.join(gated[:4])} is one gate of a unit: leave "
            f"recurrent layers out, as by exclude=['type:{kind}']."
        )
