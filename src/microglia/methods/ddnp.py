"""DDNP, disentangled differentiable network pruning (ECCV 2022): two small networks learn widths and ranks of a frozen model.

The algorithm (spec: 9.1, after the authors' code). Per group of C coupled channels, with o of the importance network, noise g:
    width       kappa = sigmoid(linear(fixed noise) + 3)
    importance sigmoid(o + g + 3) / 2 + energy / (2 max energy) energy: mean over data of the sum of x^2 at its readers gate
    prefix(kappa) at the channel's rank by importance, times u = sigmoid((o + g + 3) / 0.4) loss L + 2 w |ln(MACs / (p
    MACs_dense))| + sum over groups ln(1 + |mean hard(u) - kappa + U(-0.02, 0.02)|)
where dL/dkappa := mean over channels of dL/dprefix; MACs are those of the mean of both widths, kappa and mean hard(u). At the
end channels are ranked by the moving average of their importance, and a common factor scales the widths to the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microglia.core.batch import to_device
from microglia.core.budget import Budget
from microglia.core.devices import device_of
from microglia.core.errors import BudgetError, ScoreError
from microglia.core.masks import MaskSet, enforce, mask, masks_of
from microglia.core.modes import evaluating
from microglia.core.patterns import Channel
from microglia.core.progress import progress_bar
from microglia.graph import plan_of, shrink
from microglia.graph.channels.coupled import CoupledChannels
from microglia.graph.cutting.plan import attach
from microglia.methods.arguments import check_model, check_steps, plain_settings
from microglia.methods.config import MethodConfig, method
from microglia.methods.ddnp_networks import Prefix, Search, energies, ranks, to_channels, whole_widths
from microglia.methods.procedure import cut, dense_model, observe, train
from microglia.methods.pruner import own_optimizer, set_rate
from microglia.methods.soft import SoftMasks
from microglia.methods.what import Takes
from microglia.scores import Evidence
from microglia.scores.checks import check_evidence
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.step import Step, objective

__all__ = ["Ddnp", "DdnpConfig", "Prefix", "Search", "ddnp", "energies", "fits", "ranks", "search", "whole_widths"]

DECAY = 1e-4


@dataclass(frozen=True)
class DdnpConfig(MethodConfig):
    """DDNP; the budget is ``flops``, the kept fraction of the multiply-accumulates.

    Attributes:
        pattern: Always ``channel``.
        exclude: Selectors of layers that keep their shape; channels coupled to their inputs and outputs stay too.
        search_epochs: Passes of the search over its share of the training data, in batches of ``score_batch_size``.
        search_share: Fraction of the training batches that the search uses, the same batches in every pass.
        strength: w, the weight of the penalty on multiply-accumulates.
        search_lr: Learning rate of both networks (AdamW); the rate of the widths falls along a cosine.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("flops", "exclude", "score_batch_size"),
        patterns={Channel: "shrunk"},
        why={"layers": "channels are coupled across layers, and exclude keeps layers whole"},
    )
    pattern: str = "channel"
    search_epochs: int = 200
    search_share: float = 0.05
    strength: float = 2.0
    search_lr: float = 1e-3

    def check_values(self) -> None:
        """Raises `BudgetError` for search fields out of range."""
        if self.search_epochs < 1 or not 0 < self.search_share <= 1 or not self.search_lr > 0 or self.strength < 0:
            raise BudgetError(
                "search_epochs is at least 1, search_share in (0, 1], search_lr above 0 and strength at least 0; got "
                f"{self.search_epochs}, {self.search_share}, {self.search_lr} and {self.strength}."
            )

    @property
    def kept(self) -> float:
        """p, the kept fraction of the multiply-accumulates."""
        if self.flops is None:
            raise BudgetError("The method 'ddnp' takes flops, the kept fraction of the multiply-accumulates such as 0.5.")
        return Budget(flops=self.flops).flops or 0.0  # this checks it


class Ddnp:
    """Learns widths and ranks of a frozen model's channels inside any training loop; see `PrunerProtocol`.

    The model is frozen until `finish`: in evaluation mode, without gradients. Its channels have new gates at every step. The
    networks are not part of the model, so that a data-parallel wrapper does not average their gradients.

    Args:
        model: The model to prune, in place.
        config: See `DdnpConfig`; its trainings and the length of its search are not used here.
        total_steps: Optimizer steps of the search; over these the rate of the widths falls along a cosine.
        example_inputs: One batch of inputs.
        evidence: Batches for the energy of channels, and the generator of all random numbers.
        **settings: The fields of the config by keyword instead.

    Raises:
        MicrogliaError: The config or the evidence does not fit the model; the text explains it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DdnpConfig | None = None,
        *,
        total_steps: int,
        example_inputs: Any = None,
        evidence: Evidence | None = None,
        **settings: Any,
    ) -> None:
        user = type(self).__name__
        check_model(model, user)
        self.total_steps = check_steps(total_steps, user)
        self.model, self.steps = model, 0
        self.config = config if config is not None else DdnpConfig(**plain_settings(DdnpConfig, settings, user))
        evidence = check_evidence(evidence, user)
        if example_inputs is None:
            raise BudgetError(f"{user} traces the model to find coupled channels: give example_inputs, one batch of inputs.")
        self.units = CoupledChannels(model, example_inputs, self.config.exclude)
        whole_widths(self.units, torch.ones(len(self.units.lengths)), self.config.kept)  # checks that it can be met
        device = device_of(model)
        with evaluating(model):
            energy = energies(model, self.units, evidence.batches, device, evidence.forward)
        if not energy.any():
            raise ScoreError(f"{user} weighs channels by their energy: give evidence with batches, (inputs, targets).")
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        self._modes = [(module, module.training) for module in model.modules()]
        model.eval().requires_grad_(False)
        self.search = Search(self.units, self.config, energy, evidence.generator)
        self._made: list[torch.optim.Optimizer] = []
        self._penalty: Tensor | None = None
        self._rest = model.register_forward_pre_hook(_rest)
        self._soft: SoftMasks | None = SoftMasks(model, self.units, self._gates, None)

    def _gates(self) -> Tensor | None:
        """Returns the gates of this step, drawn at its first forward pass; evaluation uses the last gates."""
        if torch.is_grad_enabled() and self._penalty is None:
            self._penalty = self.search()
        return self.search.gates

    def penalty(self) -> Tensor | float:
        """Returns the penalty of the last forward pass's gates."""
        return 0.0 if self._penalty is None else self._penalty

    def replaces_step(self) -> bool:
        """Tells that the optimizers act at every step."""
        return False

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step: new gates, and the next rate of the widths."""
        self.steps, self._penalty = self.steps + 1, None
        rate = cosine(self.config.search_lr, self.steps / self.total_steps)
        set_rate([optimizer, *self._made], [self.search.linear], rate)

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of both networks; see `Pruner.param_groups`."""
        if self._soft is None:
            return []
        return groups_of(self.search, self.config.search_lr)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns AdamW for both networks; the rate of the widths falls at every step."""
        made = [own_optimizer("adamw", groups)] if (groups := self.param_groups()) else []
        self._made += made
        return list(made)

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the model, which are frozen: none gets a gradient before `finish`."""
        return list(self.model.parameters())

    @torch.no_grad()
    def kept(self) -> Tensor:
        """Returns the channels that meet the budget, by the current widths and ranks, boolean (channels,)."""
        counts = whole_widths(self.units, self.search.widths().cpu(), self.config.kept)
        return ranks(self.search.average.cpu(), self.search.lengths) < to_channels(counts, self.search.lengths)

    def finish(self) -> MaskSet:
        """Ends the search: masks all other channels and unfreezes the model; returns the masks."""
        if self._soft is not None:
            kept = self.kept().to(device_of(self.model))
            masks = self.units.masks(kept)
            self._soft.harden(self.model, masks)
            self._soft.kept = kept
            self._soft.detach_companions(self.model)
            self._soft.leave(self.model)
            self._rest.remove()
            self._soft, self._penalty = None, None
            mask(self.model, masks)
            enforce(self.model)
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            for module, training in self._modes:
                module.training = training
        return masks_of(self.model)

    def report(self) -> dict[str, Any]:
        """Returns the learned widths by group."""
        return {"widths": dict(zip(self.units.names, self.search.widths().tolist(), strict=True))}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the search."""
        state = {"networks": self.search.state_dict(), "average": self.search.average}
        return {"steps": self.steps, **state, "generator": self.search.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
        self.steps = int(state["steps"])
        self.search.load_state_dict(state["networks"])
        self.search.average.copy_(state["average"])
        self.search.generator.set_state(state["generator"])


def _rest(module: nn.Module, args: Any) -> None:
    """Keeps a frozen model in evaluation mode, even if the loop sets another mode."""
    if module.training:
        module.eval()


def cosine(rate: float, progress: float) -> float:
    """Returns a rate that falls along half a cosine, from the full rate at progress 0 to 0 at 1."""
    return rate * (1 + math.cos(math.pi * progress)) / 2


def groups_of(search: Search, rate: float) -> list[dict[str, Any]]:
    """Returns the groups of the networks: the widths, without decay, and the rest."""
    rest = [parameter for parameter in search.parameters() if parameter is not search.linear]
    return [
        {"params": [search.linear], "lr": rate, "weight_decay": 0.0},
        {"params": rest, "lr": rate, "weight_decay": DECAY},
    ]


def _units(model: nn.Module, task: Task, config: DdnpConfig) -> CoupledChannels:
    example = to_device(task.example, device_of(model))
    return CoupledChannels(model, example, config.exclude)


def fits(task: Task, config: DdnpConfig) -> None:
    """Raises unless the channels of the task's model can be removed down to the budget."""
    kept, channels = config.kept, _units(task.build(), task, config)
    whole_widths(channels, torch.ones(len(channels.lengths)), kept)


@method("ddnp", DdnpConfig, check=fits, paper="Gao et al. 2022", purpose="widths of a frozen trained network")
def ddnp(task: Task, run: Run, config: DdnpConfig) -> nn.Module:
    """DDNP: two networks learn widths and ranks of the frozen model's channels, the rest is removed, fine-tune."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    found = run.stage("search", partial(search, task, run, config, model))
    run.observations["widths"] = found["report"]
    model = cut(task, run, "prune", model, partial(_removed, task, run, config, found["kept"]))
    observe(task, run, "before", model)
    train(task, run, "train", model, config.train, teacher=teacher)
    return model


def search(task: Task, run: Run, config: DdnpConfig, model: nn.Module, progress: Progress) -> dict[str, Any]:
    """Returns the result of a search, which uses a frozen copy, saves each pass, and is the same on every rank."""
    units, frozen = _units(model, task, config), deepcopy(model).eval().requires_grad_(False)
    batches = task.data.batches("train", config.score_batch_size, seed=run.seed, shuffle=True)
    share = max(1, round(config.search_share * len(batches)))
    energy = energies(frozen, units, islice(batches.epoch(0), share), run.device, task.forward)
    own = Search(units, config, energy, generator := torch.Generator().manual_seed(run.seed))
    SoftMasks(frozen, units, lambda: own.gates, None)
    optimizer, rows = torch.optim.AdamW(groups_of(own, config.search_lr)), []
    loss, device = objective(task, training=False), own.noise.device
    step = Step(task, frozen, [optimizer], loss, device, config.train.precision)
    if (state := progress.state) is not None:
        own.load_state_dict(state["networks"])
        own.average.copy_(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        rows = list(state["rows"])
    with progress_bar("search: passes", config.search_epochs, len(rows)) as bar:
        while len(rows) < config.search_epochs:
            optimizer.param_groups[0]["lr"] = cosine(config.search_lr, len(rows) / config.search_epochs)
            rows.append({"loss": _epoch(own, step, islice(batches.epoch(0), share))})
            state = {"networks": own.state_dict(), "average": own.average, "optimizer": optimizer.state_dict(), "rows": rows}
            progress.save({**state, "generator": generator.get_state()})
            bar.advance()
    widths = own.widths().detach().cpu()
    counts = whole_widths(units, widths, config.kept)
    learned, final = (dict(zip(units.names, values.tolist(), strict=True)) for values in (widths, counts))
    kept = ranks(own.average.cpu(), own.lengths) < to_channels(counts, own.lengths)
    return {"kept": kept, "report": {"widths": learned, "counts": final, "history": rows}}


def _epoch(own: Search, step: Step, batches: Iterable[Any]) -> float:
    """Advances by one pass over the batches; returns the mean loss."""
    losses, diverged = [], "The loss of the search became {loss}; look for non-finite weights or inputs."
    for batch in batches:
        penalty = own()  # first, because it draws the gates of the forward pass
        losses.append(float(step(batch, penalty=lambda drawn=penalty: drawn, diverged=diverged)))  # type: ignore[misc]
    return sum(losses) / len(losses)


def _removed(task: Task, run: Run, config: DdnpConfig, kept: Tensor, model: nn.Module) -> nn.Module:
    """Returns the model without the other channels, including their biases and shifts."""
    masked = deepcopy(model)
    mask(masked, _units(model, task, config).masks(kept.to(run.device)))
    small = shrink(masked, to_device(task.example, run.device), clear=True)
    plan = plan_of(small)
    return attach(small, replace(plan, asked={"flops": config.kept}, got={"flops": plan.macs[1] / plan.macs[0]}))
