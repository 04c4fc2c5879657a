"""FBS, feature boosting and suppression (ICLR 2019): per input, each layer keeps its most salient channels and boosts them.

The algorithm (spec: 8.1, after the authors' code). Per gated layer with input I, norm n without scale, and shift beta:
    saliency    g = relu(A mean(I) + b), b from 1
    winners     p = g where g is among the d C largest of the C channels, 0 elsewhere
    output      act(p n(conv(I)) + [p > 0] beta)
    loss        L(f(x; W), y) + lambda sum over layers of mean over inputs of sum over channels of g
Unlike FTWT, the loss of the task trains the saliencies, through the kept channels. A pretrained norm keeps its scale, which the
saliency multiplies: at first that is about 1. The density d is one for all layers, and falls from 1 within the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, SelectorError
from microglia.core.modes import evaluating
from microglia.core.patterns import Channel
from microglia.dynamic import (
    COUNTS,
    Count,
    Counter,
    Flow,
    GatePlan,
    Passage,
    attach_gates,
    choose_density,
    find_sites,
    gate_plan,
)
from microglia.methods.arguments import check_model, plain_settings
from microglia.methods.config import MethodConfig, method
from microglia.methods.gate_pruner import GatePruner, observe_routes
from microglia.methods.procedure import dense_model, train
from microglia.methods.what import Takes
from microglia.scores import Evidence
from microglia.scores.checks import check_evidence
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.optim import epoch_length


@dataclass(frozen=True)
class FbsConfig(MethodConfig):
    """FBS; the budget is ``flops``, the fraction of the operations computed for each input.

    Attributes:
        pattern: Always ``channel``.
        layers: Selectors of the convolutions to gate; convolutions that cannot be gated are left out.
        exclude: Selectors of convolutions not to gate.
        count: Operations that ``flops`` counts: ``honest``, all computed ones, or ``paper``, without the heads.
        lasso: Weight of the sum of all saliencies in the loss (1e-8 in the paper).
        head_lr: Constant learning rate of the heads, which use SGD with momentum 0.9 and no weight decay.
        lower: Fraction of the training over which the number of kept channels falls from all to the budget's.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("flops", "layers", "exclude"),
        patterns={Channel: "gated"},
        why={"density": "all weights stay", "params": "all weights stay"},
    )
    pattern: str = "channel"
    count: Count = "honest"
    lasso: float = 1e-8
    head_lr: float = 0.01
    lower: float = 0.5

    def check_values(self) -> None:
        """Raises `BudgetError` for an unknown count and for values out of range."""
        if self.count not in COUNTS or not (self.lasso >= 0 and self.head_lr > 0 and 0 <= self.lower <= 1):
            raise BudgetError(
                f"count is {' or '.join(COUNTS)}, lasso is 0 or more, head_lr is above 0 and lower a fraction of the training; "
                f"got {self.count!r}, {self.lasso}, {self.head_lr} and {self.lower}."
            )

    def check_budget(self) -> None:
        """Raises `BudgetError` unless there is a budget of operations."""
        if self.flops is None:
            raise BudgetError("The method 'fbs' takes flops, the fraction of the operations such as 0.5; got none.")
        Budget(flops=self.flops)


def plan_gates(model: nn.Module, flow: Flow, config: FbsConfig, example: Any) -> tuple[GatePlan, Counter, dict[str, Any]]:
    """Returns the plan of a model's gates for the budget, the counter of operations, and the expected cost.

    Raises:
        SelectorError: No convolution can be gated and boosted.
        BudgetError: There is no budget, or it is out of reach.
    """
    config.check_budget()
    assert config.flops is not None
    steps = {layer: step.convolution for layer, step in flow.convolutions.items()}
    within = [layer for layer, c in steps.items() if c is not None and c.inner]
    sites = [site for site in find_sites(flow, model, config.layers, config.exclude).sites if site.layer not in within]
    if not sites:
        raise SelectorError(
            f"FBS scales a channel between its norm and its activation, and the norms of {type(model).__name__} hold their "
            "activation themselves: take the method 'ftwt'."
        )
    plan = GatePlan(tuple(sites), softmax=False, boost=True)
    counter = Counter(model, flow, plan, example)
    density, keep = choose_density(plan, config.flops, counter, config.count)
    costs = counter({site.layer: torch.arange(site.outputs)[None] < keep[site.layer] for site in sites})
    cost = {name: float(costs.of(name)[0]) / costs.dense for name in ("honest", "paper")}  # type: ignore[arg-type]
    kept = {site.layer: keep[site.layer] / site.outputs for site in sites}
    return GatePlan(plan.sites, softmax=False, boost=True, keep=keep), counter, {"density": density, **cost, "kept": kept}


class Fbs(GatePruner):
    """Saliencies of a model's channels and their loss, for use inside any training loop; see `PrunerProtocol`.

    Example:
        >>> pruner = mg.methods.Fbs(model, flops=0.5, total_steps=1000, example_inputs=x)      # doctest: +SKIP

    Args:
        model: A model with gates that boost, or without gates, which are added in place.
        config: See `FbsConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training; fractions refer to these.
        example_inputs: One batch of inputs, if the model has no gates yet.
        evidence: Its generator draws the heads' initial weights.
        **settings: The fields of the config by keyword instead.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FbsConfig | None = None,
        *,
        total_steps: int,
        example_inputs: Any = None,
        evidence: Evidence | None = None,
        **settings: Any,
    ) -> None:
        user = type(self).__name__
        check_model(model, user)
        generator = None if (given := check_evidence(evidence, user)) is None else given.generator
        self.config = config if config is not None else FbsConfig(**plain_settings(FbsConfig, settings, user))
        plan = gate_plan(model)
        if plan is None:
            if example_inputs is None:
                raise BudgetError("Fbs needs example_inputs, one batch of inputs, to find the places of its gates; got none.")
            with evaluating(model):
                plan, _, _ = plan_gates(model, Flow(model, example_inputs), self.config, example_inputs)
            attach_gates(model, plan, generator)
        if not plan.boost:
            raise BudgetError(
                "Fbs trains gates that boost, and those of this model do not: microglia.dynamic.detach_gates first."
            )
        super().__init__(model, total_steps, self.config.head_lr)
        self.keep = dict(plan.keep)
        self._losses: list[Tensor] = []
        for gate in self.gates.values():
            gate.listen(self._hear)
        self._narrow()

    def _hear(self, passage: Passage) -> None:
        if passage.gate.training and self.config.lasso:
            self._losses.append(passage.logits.relu().sum(1).mean())

    def _narrow(self) -> None:
        """Sets how many channels the gates keep now."""
        done = min(1.0, self.progress / self.config.lower) if self.config.lower else 1.0
        for layer, gate in self.gates.items():
            units = len(gate.bias)
            gate.keep = units - round(done * (units - self.keep[layer]))

    def penalty(self) -> Tensor | float:
        """Returns the lasso of the saliencies in the last forward pass."""
        losses, self._losses = self._losses, []
        return self.config.lasso * torch.stack(losses).sum() if losses else 0.0

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step."""
        self.steps += 1
        self._narrow()

    def finish(self) -> nn.Module:
        """Ends the training of the saliencies; returns the gated model, whose gates keep the budget's number of channels."""
        for layer, gate in self.gates.items():
            gate.listen(None)
            gate.keep = self.keep[layer]
        return self.model

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
        super().load_state_dict(state)
        self._narrow()


def fits(task: Task, config: FbsConfig) -> None:
    """Raises unless the task's model has convolutions to gate and the budget is in reach."""
    model = task.build().eval()
    plan_gates(model, Flow(model, task.example), config, task.example)


@method(
    "fbs", FbsConfig, check=fits, paper="Gao et al. 2019, arXiv 1810.05331", purpose="salient channels boosted for each input"
)
def fbs(task: Task, run: Run, config: FbsConfig) -> nn.Module:
    """Heads predict per input how salient each channel is; the most salient ones are computed, and multiplied by it."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    plain = task.build().eval()
    plan, counter, expected = plan_gates(plain, Flow(plain, task.example), config, task.example)

    def work(progress: Progress) -> dict[str, Any]:
        return expected

    run.observations["estimate"] = run.stage("estimate", work)
    attach_gates(model, plan, torch.Generator().manual_seed(run.seed))
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))
    make = partial(Fbs, model, config, total_steps=steps)
    run.observations["heads"] = train(task, run, "train", model, config.train, pruner=make, teacher=teacher)
    observe_routes(task, run, model, counter)
    return model
