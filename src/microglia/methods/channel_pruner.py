"""Common config and pruner of the methods that train a network before its channels are removed.

The form: dense model, a training under the method (a penalty, filters set to zero), a cut to the budget, recovery; see
`microglia.methods.channel_procedure`. A method says what it adds to the loss (`penalty`), what it does after a step (`step`)
and how its channels rank (`ranking`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.budget import Budget
from microglia.core.devices import device_of
from microglia.core.errors import BudgetError
from microglia.core.layers import Layer, prunable_layers, raw_parameter
from microglia.core.masks import MaskSet, enforce, mask, masks_of
from microglia.core.patterns import Channel
from microglia.graph.channels.coupled import CoupledChannels, Place
from microglia.methods.arguments import check_model, check_steps, plain_settings
from microglia.methods.config import MethodConfig
from microglia.methods.what import SAMPLING, Takes
from microglia.scores import Evidence
from microglia.scores.base import compact
from microglia.scores.checks import check_evidence
from microglia.train.optim import FitConfig
from microglia.train.recover import RECALIBRATION

BARRED = "channels are coupled across layers, and exclude keeps layers whole"
CHANNELS = Takes(
    fields=("density", "params", "flops", "exclude", "scope"),
    patterns={Channel: "shrunk"},
    scopes=("uniform", "global"),
    why={
        "layers": BARRED,
        "protect": BARRED,
        "allow_empty": "no layer is ever emptied of channels",
        "ms": "a time is measured where channels are removed at once, by the method 'channels'",
        "score": "it ranks channels by values of its own",
        "reduction": "it ranks channels by values of its own",
    },
)
"""Fields and patterns of these methods."""
SAMPLED = replace(CHANNELS, fields=(*CHANNELS.fields, *SAMPLING))
"""The same, of methods that look at training batches."""


@dataclass(frozen=True)
class ChannelConfig(MethodConfig):
    """Methods that train, cut channels to a budget, recover; ``density`` is the kept fraction of channels that can go.

    Attributes:
        pattern: Always ``channel``.
        scope: ``global``: channels compete across groups; ``uniform``: the same fraction of every group.
        exclude: Selectors of layers that keep their shape; what is coupled to their inputs and outputs stays too.
        round_to: Widths are kept at multiples of this if the budget allows; 1 for none.
        recalibrate: Training batches over which batch-norm statistics are estimated anew after the cut; 0 for none.
        sparse_epochs: Epochs of the training before the cut; as many as ``train`` where left out.
        sparse_lr: Its peak learning rate; that of ``train`` where left out.
    """

    takes: ClassVar[Takes] = CHANNELS
    pattern: str = "channel"
    scope: Literal["uniform", "global"] = "global"  # type: ignore[assignment]  # masks compete elsewhere
    round_to: int = 1
    recalibrate: int = RECALIBRATION
    sparse_epochs: int | None = None
    sparse_lr: float | None = None

    def check_values(self) -> None:
        """Raises `BudgetError` for a rounding below 1."""
        if self.round_to < 1:
            raise BudgetError(f"round_to is at least 1 (1: no rounding); got {self.round_to}.")

    @property
    def budget(self) -> Budget | None:
        """The budget; None where no term is given."""
        terms = {t: v for t in ("density", "params", "flops") if (v := getattr(self, t)) is not None}
        return Budget(**terms) if terms else None

    @property
    def sparse(self) -> FitConfig:
        """The training before the cut."""
        epochs = self.train.epochs if self.sparse_epochs is None else self.sparse_epochs
        return replace(self.train, epochs=epochs, lr=self.train.lr if self.sparse_lr is None else self.sparse_lr)


class ChannelPruner:
    """A pruner of coupled channels, to be stepped inside anybody's loop; see `PrunerProtocol`.

    ``finish()`` masks the channels that go, biases and shifts of theirs included; `microglia.shrink` then removes them.

    Args:
        model: The model to prune, in place.
        config: See `ChannelConfig`; its trainings are not used here.
        total_steps: Optimizer steps of the training under the method.
        example_inputs: One batch of inputs.
        evidence: The data for the score.
        start: Whether to begin; False only checks that the config fits.
        **settings: The fields of the config by keyword instead.

    Raises:
        MicrogliaError: The config does not fit the model; the text says how.
    """

    Config: type[ChannelConfig] = ChannelConfig

    def __init__(
        self,
        model: nn.Module,
        config: ChannelConfig | None = None,
        *,
        total_steps: int,
        example_inputs: Any = None,
        evidence: Evidence | None = None,
        start: bool = True,
        **settings: Any,
    ) -> None:
        user = type(self).__name__
        check_model(model, user)
        self.total_steps = check_steps(total_steps, user)
        self.model, self.steps = model, 0
        self.config = config if config is not None else self.Config(**plain_settings(self.Config, settings, user))
        self.evidence = check_evidence(evidence, user)
        if example_inputs is None:
            raise BudgetError(f"{user} traces the model to find coupled channels: give example_inputs, one batch of inputs.")
        self.example = example_inputs
        self.arrange(model, example_inputs, self.config)
        self.units = CoupledChannels(model, example_inputs, self.config.exclude)
        self.raw = {name: _raw(model, name) for name in {p.name: None for p in (*self.units.read, *self.units.made)}}
        self.kept: Tensor | None = None
        self.prepare()
        self.choose(torch.zeros(self.units.count))  # can the budget be met
        if start:
            self.begin()

    # ------------------------------------------------------------------------------------------------ what a method says
    @staticmethod
    def arrange(model: nn.Module, example_inputs: Any, config: ChannelConfig) -> None:
        """Gives modules the form that the method needs, before the trace; nothing on a model that has it."""

    def prepare(self) -> None:
        """Looks at the model once, before anything is trained; raises where the method has nothing to work on."""

    def begin(self) -> None:
        """Acts once before the first step."""

    def ranking(self) -> Tensor:
        """Returns one value per channel, (count,), higher = keep."""
        raise NotImplementedError

    def movable(self) -> Tensor | None:
        """Returns the channels that may go, boolean (count,), all or none of a group; None for all."""
        return None

    def penalty(self) -> Tensor | float:
        """Returns what the training adds to the loss."""
        return 0.0

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step."""
        self.steps += 1

    # ------------------------------------------------------------------------------------------------------ what all share
    @property
    def layers(self) -> dict[str, Layer]:
        """The layers whose filters make channels, by name."""
        made = {place.name for place in self.units.made}
        return {name: layer for name, layer in prunable_layers(self.model).items() if name in made}

    def spans(self) -> list[slice]:
        """Returns the channels of each group, in the order of the network."""
        stops = list(accumulate(self.units.lengths))
        return [slice(stop - length, stop) for stop, length in zip(stops, self.units.lengths, strict=True)]

    def readers(self, own: slice) -> dict[str, Place]:
        """Returns where the channels of a group are read, by parameter."""
        return {p.name: p for p in self.units.read if bool(((p.units >= own.start) & (p.units < own.stop)).any())}

    def choose(self, ranking: Tensor) -> Tensor:
        """Returns the channels that meet the budget, boolean (count,)."""
        budget = self.config.budget
        if budget is None:
            raise BudgetError(f"{type(self).__name__} cuts to a budget: give density, params or flops, fractions kept.")
        scope, round_to = self.config.scope, self.config.round_to
        return self.units.choose(ranking, budget, scope=scope, round_to=round_to, among=self.movable())[0]

    def final(self) -> Tensor:
        """Returns the channels that stay in the end, boolean (count,)."""
        return self.choose(self.ranking())

    def of_filters(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean over the filters that make each channel of a score of filters, float64 (count,)."""
        layers = self.layers
        return self.units.reduce({name: compact(layers[name], values[name].double()) for name in layers}, "mean")

    @torch.no_grad()
    def clear(self, gone: Tensor, optimizer: torch.optim.Optimizer | None = None, *, whole: bool = False) -> None:
        """Sets the filters of channels to zero, with the optimizer's state for them: none comes back from momentum.

        Args:
            gone: Channels, boolean (count,).
            optimizer: Optimizer of the model's parameters.
            whole: Whether biases and the affine parameters of norms go too, so that the channels are zero.
        """
        padded = torch.cat([gone.cpu(), torch.zeros(1, dtype=torch.bool)])
        for place in self.units.made:
            raw = self.raw[place.name]
            if raw.ndim > 1 or whole:
                entries = padded[place.units].nonzero().flatten().to(raw.device)
                for tensor in (raw, *states_of(optimizer, raw)):
                    tensor.index_fill_(place.dim, entries, 0.0)

    @torch.no_grad()
    def finish(self) -> MaskSet:
        """Masks the channels that do not stay, with what else they add; returns the masks, which stay attached."""
        if self.kept is None:
            self.kept = self.final()
            mask(self.model, self.units.masks(self.kept.to(device_of(self.model))))
            for name in self.units.companions:
                raw = _raw(self.model, name)
                raw.copy_(self.units.companion(name, raw, self.kept.to(raw.device)))
            enforce(self.model)
        return masks_of(self.model)

    def report(self) -> dict[str, Any]:
        """Returns the width of each group, before and kept, and the kept fraction of the channels that could go."""
        kept = (self.kept if self.kept is not None else torch.ones(self.units.count)).bool().cpu()
        free = self.movable()
        parts = torch.split(kept, list(self.units.lengths))
        return {
            "widths": dict(zip(self.units.names, self.units.lengths, strict=True)),
            "counts": {name: int(part.sum()) for name, part in zip(self.units.names, parts, strict=True)},
            "density": float((kept if free is None else kept[free.cpu()]).double().mean()),
        }

    def replaces_step(self) -> bool:
        """Tells that the optimizers act at every step."""
        return False

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns []: the pruner has no parameters of its own."""
        return []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns []: the pruner has no parameters of its own."""
        return []

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the model."""
        return list(self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Returns what is needed, beside the model's state, to go on."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self.steps = int(state["steps"])


class AtOnce(ChannelPruner):
    """A pruner that removes channels when it is made; what it removed stays zero in any training that follows."""

    target: Tensor
    """The channels that stay, boolean (count,), which `begin` chooses."""

    def final(self) -> Tensor:
        """Returns the channels that stay."""
        return self.target

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step; what was removed stays zero."""
        super().step(optimizer)
        self.clear(~self.target, optimizer, whole=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken and the choice."""
        return super().state_dict() | {"target": self.target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.target = state["target"]


def states_of(optimizer: torch.optim.Optimizer | None, raw: nn.Parameter) -> list[Tensor]:
    """Returns what an optimizer keeps for each weight of a parameter."""
    state = optimizer.state.get(raw, {}) if optimizer is not None else {}
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == raw.shape]


def _raw(model: nn.Module, name: str) -> nn.Parameter:
    """Returns the trainable tensor of a name, below any parametrization."""
    layers = prunable_layers(model)
    if name in layers:
        return layers[name].raw
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return raw_parameter(module, attribute) if parametrize.is_parametrized(module, attribute) else model.get_parameter(name)
