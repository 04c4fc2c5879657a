"""FTWT, fire together wire together (CVPR 2022): per input, small heads predict which filters will matter; only these count.

The algorithm (spec: 7, after the authors' code). Per gated layer with input I and response O = act(norm(conv(I))):
    prediction  P = A softmax(pool(I)) + b;  M = [P > 0];  the layer passes on M O
    target      a_c = max |O_c|, p = a / sum a;  g = the leading filters whose mass is at most r
    loss        L(f(x; W), y) + lambda (1 / layers) sum over layers of mean over inputs of sum over filters of BCE(P, g)
lambda is 1 until the cool-down, then 0: the heads rest and the network adapts to them. Decoupled, the heads see I without a
gradient to it. No gradient of the task's loss reaches a head, for M has none. Targets are those of the masked network itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.dynamic import (
    Counter,
    Flow,
    GatePlan,
    Passage,
    attach_gates,
    calibrate,
    choose_r,
    estimate,
    fit_heads,
    gate_plan,
    gates_of,
    note_plan,
    record,
    shares,
    statistics,
)
from microglia.methods.config import method
from microglia.methods.ftwt_config import FtwtConfig, plan_gates, with_r_of
from microglia.methods.procedure import change, dense_model, train
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.optim import epoch_length


class Ftwt:
    """The heads of a model and their loss, to be stepped inside anybody's training loop.

    Example:
        >>> pruner = mg.methods.Ftwt(model, r=0.9, total_steps=1000, example_inputs=x)      # doctest: +SKIP

    Args:
        model: With gates, which a new r reaches, or to be given some, in place.
        config: See `FtwtConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training, over which fractions count.
        example_inputs: One batch of inputs, where the model has no gates yet.
        generator: Draws the heads' initial weights.
        at_rest: Called when the heads come to rest, and again at the end, to calibrate them.
        **settings: The fields of the config by keyword instead.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FtwtConfig | None = None,
        *,
        total_steps: int,
        example_inputs: Any = None,
        generator: torch.Generator | None = None,
        at_rest: Callable[[], dict[str, float]] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.config = model, config if config is not None else FtwtConfig(**settings)
        self.total_steps, self.steps = max(1, total_steps), 0
        self._at_rest = at_rest
        self._moved: dict[str, float] = {}
        plan = gate_plan(model)
        if plan is None:
            if self.config.r is None or example_inputs is None:
                raise MicrogliaError(
                    "Ftwt needs r, the fraction of the mass to keep such as 0.9, and example_inputs; a budget of flops is met "
                    "by microglia.dynamic.choose_r or the method 'ftwt'."
                )
            if self.config.initial == "fitted":
                raise MicrogliaError(
                    "Ftwt sees no images to fit heads to: give random ones and call microglia.dynamic.fit_heads."
                )
            self.config.check_budget()
            attach_gates(model, plan_gates(model, Flow(model, example_inputs), self.config), generator)
        elif self.config.r is not None:
            self.config.check_budget()
            note_plan(model, with_r_of(plan, self.config.r))
        self.gates = gates_of(model)
        self._losses: list[Tensor] = []
        self._rested: list[nn.Parameter] = []
        own = {id(p) for p in self.parameters()}
        if self.config.mode == "heads":
            self._rest([p for p in model.parameters() if id(p) not in own])
            self._norms = model.register_forward_pre_hook(_norms_rest)
        elif self.config.mode == "random":
            self._rest(self.parameters())
        for gate in self.gates.values():
            gate.detached = self.config.mode != "joint"
            gate.listen(self._hear)
        self._fade()

    def _rest(self, parameters: list[nn.Parameter]) -> None:
        self._rested = [p for p in parameters if p.requires_grad]
        for parameter in self._rested:
            parameter.requires_grad_(False)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all heads."""
        return [p for gate in self.gates.values() for p in gate.parameters()]

    @property
    def progress(self) -> float:
        """Fraction of the training that is over."""
        return self.steps / self.total_steps

    @property
    def learning(self) -> bool:
        """Whether the heads learn now."""
        return self.config.mode == "heads" or (self.config.mode != "random" and self.progress < self.config.cooldown)

    def _hear(self, passage: Passage) -> None:
        if passage.gate.training and self.learning:
            wanted = passage.target().to(passage.logits.dtype)
            loss = functional.binary_cross_entropy_with_logits(passage.logits, wanted, reduction="sum")
            self._losses.append(loss / len(wanted))

    # -------------------------------------------------------------------------------------------- what the loop asks
    def penalty(self) -> Tensor | float:
        """Returns the loss of the heads in the last forward pass, mean over layers; 0 when they rest."""
        losses, self._losses = self._losses, []
        if losses:
            return torch.stack(losses).sum() / len(self.gates)
        if self.config.mode != "random" and torch.distributed.is_initialized():  # every parameter needs a gradient there
            return 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return 0.0

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Goes on by one optimizer step; given the optimizer, heads that rest do not drift on their momentum either."""
        learned = self.learning
        self.steps += 1
        self._fade()
        if learned and not self.learning:
            self._calibrate()
        if optimizer is not None and not self.learning:  # under DDP they go on getting gradients, of zeros
            own = {id(p) for p in self.parameters()}
            for group in optimizer.param_groups:
                if any(id(p) in own for p in group["params"]):
                    group["constant_lr"] = group["lr"] = 0.0

    def _calibrate(self) -> None:
        if self._at_rest is not None:
            self._moved = {layer: self._moved.get(layer, 0.0) + step for layer, step in self._at_rest().items()}

    def _fade(self) -> None:
        soften = self.config.soften
        for gate in self.gates.values():
            gate.fade = min(1.0, self.progress / soften) if soften else 1.0

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the heads' group: SGD at a constant learning rate, no weight decay."""
        if self.config.mode == "random":
            return []
        rate = self.config.head_lr
        own = {"lr": rate, "constant_lr": rate, "momentum": 0.9, "weight_decay": 0.0, "optimizer": "sgd"}
        return [{"params": self.parameters(), **own}]

    def finish(self) -> nn.Module:
        """Ends the training of the heads; returns the gated model."""
        for gate in self.gates.values():
            gate.listen(None)
            gate.fade = 1.0
        self._calibrate()
        if self.config.mode == "heads":
            self._norms.remove()
        for parameter in self._rested:
            parameter.requires_grad_(True)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Returns where it stands; the heads are in the model's state."""
        return {"steps": self.steps, "moved": self._moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self.steps, self._moved = int(state["steps"]), dict(state["moved"])
        self._fade()

    def report(self) -> dict[str, Any]:
        """Returns what to tell of it."""
        rested = None if self.learning else round(self.config.cooldown * self.total_steps)
        return {"steps": self.steps, "rested_after": rested, "moved": self._moved}


def _norms_rest(module: nn.Module, args: Any) -> None:
    """Keeps batch norms in evaluation mode, so that a network at rest keeps its statistics too."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.training = False  # not eval(): a gate that hangs on it goes on


# --------------------------------------------------------------------------------------------------------- the procedure
def fits(task: Task, config: FtwtConfig) -> None:
    """Raises unless the task's model has convolutions to gate and the config a budget."""
    config.check_budget()
    model = task.build().eval()
    plan_gates(model, Flow(model, task.example), config)


@dataclass(frozen=True)
class Planned:
    """What is known before the training.

    Attributes:
        plan: Of the gates.
        counter: Of operations.
        estimate: What the targets would cost.
    """

    plan: GatePlan
    counter: Counter
    estimate: dict[str, Any] = field(default_factory=dict)


@method("ftwt", FtwtConfig, check=fits)
def ftwt(task: Task, run: Run, config: FtwtConfig) -> nn.Module:
    """Heads predict per input which channels to compute, trained on each layer's own activation mass."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    planned = plan_before(task, run, config, model)
    run.observations["estimate"] = planned.estimate
    attach_gates(model, planned.plan, torch.Generator().manual_seed(run.seed))
    if config.initial == "fitted":
        run.observations["fitted"] = fitted(task, run, config, model, planned)
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))
    at_rest = calibration(task, run, config, model, planned)
    make = partial(Ftwt, model, config, total_steps=steps, at_rest=at_rest)
    run.observations["heads"] = train(task, run, "train", model, config.train, pruner=make, teacher=teacher)

    def observe_routes(progress: Progress) -> dict[str, Any]:
        routes = record(model, task.data.batches("test", 256).epoch(0), run.device)
        return {"routes": statistics(routes, planned.counter)}

    run.observations["routes"] = run.stage("routes", observe_routes)["routes"]
    return model


def fitted(task: Task, run: Run, config: FtwtConfig, model: nn.Module, planned: Planned) -> dict[str, Any]:
    """Fits the heads to their targets as a stage, and calibrates them if asked; returns how well they agree, and the moves."""
    calibrated = calibration(task, run, config, model, planned)

    def work(progress: Progress) -> dict[str, Any]:
        agreement = fit_heads(model, images_of(task, run, config))
        return {"agreement": agreement, "moved": calibrated() if calibrated is not None else {}}

    return cast("dict[str, Any]", change(run, "fit", model, work))


def calibration(
    task: Task, run: Run, config: FtwtConfig, model: nn.Module, planned: Planned
) -> Callable[[], dict[str, float]] | None:
    """Returns what calibrates the heads of a model to the operations asked, None where nothing is to be met."""
    asked = config.flops
    if asked is None or not config.calibrate or config.mode == "random":
        return None
    kept, count = planned.estimate["kept"], config.count
    return lambda: calibrate(model, images_of(task, run, config), planned.counter, kept, flops=asked, count=count)


def images_of(task: Task, run: Run, config: FtwtConfig) -> Iterator[tuple[Any, Any]]:
    """Returns batches of the training images that r is chosen on, and heads are fitted and calibrated to."""
    batches = task.data.batches("train", 128, seed=run.seed, shuffle=True)
    return islice(batches.epoch(0), -(-config.images // 128))


def plan_before(task: Task, run: Run, config: FtwtConfig, model: nn.Module) -> Planned:
    """Returns the gates and their r, chosen as a stage on training images for the budget asked."""
    config.check_budget()
    plain = task.build().eval()
    flow = Flow(plain, task.example)
    plan = plan_gates(plain, flow, config)
    counter = Counter(plain, flow, plan, task.example)

    def work(progress: Progress) -> dict[str, Any]:
        trial = attach_gates(deepcopy(model), plan)
        share = shares(trial, images_of(task, run, config), config.images, device_of(model))
        if config.flops is not None:
            return asdict(choose_r(share, config.flops, config.rule, counter, config.count))
        assert config.r is not None
        return asdict(estimate(share, config.r, config.rule, counter))

    found: dict[str, Any] = run.stage("estimate", work)
    if config.flops is not None:
        plan = plan.with_r(found["r"])
    if config.mode == "random":
        keep = {site.layer: max(1, round(found["kept"][site.layer] * site.outputs)) for site in plan.sites}
        plan = replace(plan, keep=keep)
    return Planned(plan, counter, found)
