"""DCP (Zhuang et al. 2018): input channels chosen greedily by the gradient of a reconstruction and an auxiliary loss.

The algorithm (spec: FTWT and SMART 9.5), with P auxiliary classifiers evenly in the network, for stage p = 1..P+1:
    train the network with the loss of classifier p beside its own; the last stage has its own loss alone
    for each group of channels of the stage, W the weights that read it:
        L(W) = mean (O_dense - O(W))^2 / 2 + lambda L_p,   A = {}, the columns outside A are 0
        repeat: add to A the channel of the largest |dL/dW_j|_F, then a few gradient steps on the columns of A
        stop at the number of channels, or (adaptive) when |L_(t-1) - L_t| / L_0 <= epsilon
then remove the others; fine-tune. The loop does not hand its targets to a pruner: the auxiliary loss is that of one of the
batches for the score at each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.batch import Example
from microglia.core.devices import device_of
from microglia.core.errors import BudgetError, ScoreError
from microglia.core.modes import evaluating, statistics_kept
from microglia.core.running import run as run_on
from microglia.core.running import undisturbed
from microglia.graph.channels.coupled import Place
from microglia.methods.auxiliary import Captured, auxiliary_classifier, averaged_over_ranks
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.channel_pruner import SAMPLED, ChannelConfig, ChannelPruner
from microglia.methods.config import method
from microglia.methods.pruner import own_optimizer
from microglia.methods.what import Takes
from microglia.scores.reading import loss_of, outputs_of
from microglia.storage.run import Run
from microglia.tasks.task import Task


@dataclass(frozen=True)
class DcpConfig(ChannelConfig):
    """DCP; the paper's rate eta is the kept fraction, as is ``density``.

    Attributes:
        scope: Always ``uniform``: the same fraction of every group.
        score_batches: Batches for the choices and for the auxiliary losses, used in turn.
        classifiers: P; 3 in the paper for ResNet-50 and -56, 2 for VGG and ResNet-18.
        auxiliary: lambda, the weight of the auxiliary loss.
        epsilon: Instead of a budget, the relative change of L at which each group stops.
        updates: Gradient steps on the chosen columns after each choice.
        update_lr: Their rate.
        classifier_lr: Rate of the auxiliary classifiers (SGD with momentum).
    """

    takes: ClassVar[Takes] = SAMPLED
    scope: Literal["uniform", "global"] = "uniform"  # type: ignore[assignment]
    score_batches: int = 8
    classifiers: int = 3
    auxiliary: float = 1.0
    epsilon: float | None = None
    updates: int = 1
    update_lr: float = 0.01
    classifier_lr: float = 0.01

    def check_values(self) -> None:
        """Raises `BudgetError` for numbers out of range, another scope, and an epsilon beside a budget."""
        if min(self.classifiers, self.updates) < 0 or self.auxiliary < 0 or min(self.update_lr, self.classifier_lr) <= 0:
            raise BudgetError(
                "classifiers, updates and auxiliary are at least 0, update_lr and classifier_lr above 0; got "
                f"{self.classifiers}, {self.updates}, {self.auxiliary}, {self.update_lr} and {self.classifier_lr}."
            )
        if self.scope != "uniform":
            raise BudgetError(f"Dcp chooses group by group, so that its scope is uniform; got {self.scope!r}.")
        if self.epsilon is not None and (self.budget is not None or not self.epsilon > 0):
            raise BudgetError("epsilon, above 0, decides in the place of density, params and flops: give one of both.")


class Dcp(ChannelPruner):
    """Chooses channels by a reconstruction and classifiers, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = DcpConfig

    @property
    def own(self) -> DcpConfig:
        """The config."""
        return cast(DcpConfig, self.config)

    def prepare(self) -> None:
        """Lays out the stages and where their classifiers read.

        Raises:
            ScoreError: The model does not return one row of logits for each example.
        """
        groups = len(self.units.lengths)
        stages = min(self.own.classifiers + 1, groups)
        self.stages = [range(groups * p // stages, groups * (p + 1) // stages) for p in range(stages)]
        readers = [next(iter(self.readers(self.spans()[group[-1]]))) for group in self.stages[:-1]]
        self.sites = [name.rpartition(".")[0] for name in readers]
        with evaluating(self.model), undisturbed(), Captured(self.model, self.sites) as captured:
            output = run_on(self.model, Example.of(self.example))
            self.shapes = [captured.seen.get(site) for site in self.sites]
        if not isinstance(output, Tensor) or output.ndim != 2 or None in self.shapes:
            raise ScoreError(
                f"Dcp adds classifiers to a classifier, which returns (batch, classes); {type(self.model).__name__} does not."
            )
        self.classes = output.shape[1]

    def begin(self) -> None:
        """Keeps the dense network and makes the classifiers.

        Raises:
            ScoreError: There are no batches, or no loss.
        """
        self.batches: Sequence[tuple[Any, Any]] = list(self.evidence.batches)
        if not self.batches or self.evidence.loss is None:
            raise ScoreError(
                "Dcp chooses channels by a loss: give evidence with batches, [(inputs, targets), ...], and a loss."
            )
        self.dense = deepcopy(self.model).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.evidence.generator)))
            made = [auxiliary_classifier(cast(Tensor, shape), self.classes) for shape in self.shapes]
        self.heads = nn.ModuleList(made).to(device_of(self.model))
        self.target = torch.ones(self.units.count, dtype=torch.bool)
        self.stage = 0
        self.counts = None if self.own.epsilon is not None else super().choose(torch.zeros(self.units.count))

    def choose(self, ranking: Tensor) -> Tensor:
        """Returns the channels that meet the budget; all where epsilon decides."""
        return torch.ones(self.units.count, dtype=torch.bool) if self.own.epsilon is not None else super().choose(ranking)

    def penalty(self) -> Tensor | float:
        """Returns lambda times the loss of the stage's classifier on one of the batches; 0 in the last stage."""
        if self.kept is not None or self.stage >= len(self.heads):
            return 0.0
        with statistics_kept(self.model):
            return self.own.auxiliary * self._loss(self.steps, self.stage)[0]

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step; at the end of a stage its channels are chosen. Removed channels stay zero."""
        super().step(optimizer)
        while self.stage < len(self.stages) and self.steps * len(self.stages) >= self.total_steps * (self.stage + 1):
            self._end_stage()
        self.clear(~self.target, optimizer, whole=True)

    def final(self) -> Tensor:
        """Returns the channels that stay; stages whose training did not come are chosen now."""
        while self.stage < len(self.stages):
            self._end_stage()
        return self.target

    def _end_stage(self) -> None:
        for group in self.stages[self.stage]:
            own = self.spans()[group]
            count = None if self.counts is None else int(self.counts[own].sum())
            if count is None or count < self.units.lengths[group]:
                with evaluating(self.model), torch.enable_grad():
                    self.target[own] = self._greedy(own, count)
                gone = torch.zeros_like(self.target)
                gone[own] = ~self.target[own]
                self.clear(gone, whole=True)
        self.stage += 1

    def _greedy(self, own: slice, count: int | None) -> Tensor:
        """Returns the channels of a group that are added one by one, boolean; their columns are trained meanwhile."""
        places = self.readers(own)
        raws, before = [self.raw[n] for n in places], [self.raw[n].detach().clone() for n in places]
        wanted = [self._dense_outputs(inputs, list(places)) for inputs, _ in self.batches]
        chosen, losses, turn = torch.zeros(self.units.count + 1, dtype=torch.bool), list[float](), 0
        self._set_columns(places, before, own, chosen, raws)
        while True:
            loss, gradients = self._gradients(turn, places, wanted)
            losses.append(loss)
            norms = torch.zeros(self.units.count + 1, dtype=torch.float64)
            for place, gradient in zip(places.values(), gradients, strict=True):
                norms.index_add_(0, place.units, gradient.double().square().movedim(place.dim, 0).flatten(1).sum(1).cpu())
            best = own.start + int(torch.where(chosen, -1.0, norms)[own].argmax())
            chosen[best] = True
            self._set_columns(places, before, slice(best, best + 1), chosen, raws)
            turn += 1
            for _ in range(self.own.updates):
                _, gradients = self._gradients(turn, places, wanted)
                for place, raw, gradient in zip(places.values(), raws, gradients, strict=True):
                    with torch.no_grad():
                        raw.sub_(gradient * _columns(place, chosen, raw), alpha=self.own.update_lr)
                turn += 1
            settled = self.own.epsilon is not None and len(losses) > 1
            if settled and abs(losses[-2] - losses[-1]) <= cast(float, self.own.epsilon) * losses[0]:
                break
            if int(chosen[own].sum()) == (own.stop - own.start if count is None else count):
                break
        return chosen[own]

    def _set_columns(self, places: Mapping[str, Place], before: Any, own: slice, chosen: Tensor, raws: Any) -> None:
        """Gives the columns that read some channels the values from before where chosen, zeros elsewhere."""
        marked = torch.zeros_like(chosen)
        marked[own] = True
        with torch.no_grad():
            for place, raw, old in zip(places.values(), raws, before, strict=True):
                here = _columns(place, marked, raw).bool()
                raw.copy_(torch.where(here, old * _columns(place, chosen, raw), raw))

    def _gradients(self, turn: int, places: Mapping[str, Place], wanted: Any) -> tuple[float, list[Tensor]]:
        """Returns L on one batch and its gradients, of all ranks together."""
        own, captured = self._loss(turn, self.stage, list(places))
        errors = [functional.mse_loss(captured[name], dense) / 2 for name, dense in wanted[turn % len(self.batches)].items()]
        total = self.own.auxiliary * own + sum(errors)
        raws = [self.raw[name] for name in places]
        found = torch.autograd.grad(total, raws, allow_unused=True, materialize_grads=True)
        value, *gradients = averaged_over_ranks([total.detach(), *found])
        return float(value), gradients

    def _loss(self, turn: int, stage: int, readers: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of a stage's classifier, or the model's own, on one batch, and the outputs of readers."""
        inputs, targets = self.batches[turn % len(self.batches)]
        modules = [name.rpartition(".")[0] for name in readers]
        has_head = stage < len(self.heads)
        with Captured(self.model, [*modules, *(self.sites[stage : stage + 1] if has_head else ())]) as captured:
            outputs = outputs_of(self.model, inputs, self.evidence.forward)
        logits = self.heads[stage](captured.seen[self.sites[stage]]) if has_head else outputs
        found = {n: captured.seen[m] for n, m in zip(readers, modules, strict=True) if m in captured.seen}
        return loss_of(self.evidence.loss, logits, targets), found

    def _dense_outputs(self, inputs: Any, readers: Sequence[str]) -> dict[str, Tensor]:
        modules = [name.rpartition(".")[0] for name in readers]
        with torch.no_grad(), Captured(self.dense, modules) as captured:
            outputs_of(self.dense, inputs, self.evidence.forward)
        return {n: captured.seen[m] for n, m in zip(readers, modules, strict=True) if m in captured.seen}

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the group of the classifiers."""
        own = list(self.heads.parameters()) if self.kept is None else []
        return [{"params": own, "lr": self.own.classifier_lr, "weight_decay": 0.0}] if own else []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns SGD of the classifiers."""
        return [own_optimizer("sgd", groups)] if (groups := self.param_groups()) else []

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken, the classifiers, the stage and the choices."""
        return super().state_dict() | {"heads": self.heads.state_dict(), "stage": self.stage, "target": self.target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.heads.load_state_dict(state["heads"])
        self.stage, self.target = int(state["stage"]), state["target"].clone()


def _columns(place: Place, chosen: Tensor, raw: Tensor) -> Tensor:
    """Returns 1 at the entries of a parameter that read chosen channels, else 0, to be multiplied by it."""
    return chosen[place.units].to(raw).view([-1 if d == place.dim else 1 for d in range(raw.ndim)])


@method(
    "dcp",
    DcpConfig,
    check=fits(Dcp),
    paper="Zhuang et al. 2018, arXiv 1810.11809",
    purpose="channels that discriminate, layer by layer",
)
def dcp(task: Task, run: Run, config: DcpConfig) -> nn.Module:
    """DCP: auxiliary classifiers train along; channels are chosen greedily by the gradient of losses, fine-tune."""
    return thinned(task, run, config, Dcp)
