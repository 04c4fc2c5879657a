"""FTWT, fire together wire together (CVPR 2022): per input, small heads predict the important filters; only these are used.

The algorithm (spec: 7, after the authors' code). Per gated layer with input I and response O = act(norm(conv(I))):
    prediction  P = A softmax(pool(I)) + b;  M = [P > 0];  the layer passes on M O
    target      a_c = max |O_c|, p = a / sum a;  g = the leading filters whose mass is at most r
    loss        L(f(x; W), y) + lambda (1 / layers) sum over layers of mean over inputs of sum over filters of BCE(P, g)
lambda is 1 until the cool-down, then 0: the heads are fixed and the network adapts to them. In the decoupled mode, no gradient
flows from the heads to I. No gradient of the task's loss reaches a head, because M has none. Targets are those of the masked
network itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, MicrogliaError, SelectorError
from microglia.core.patterns import Channel
from microglia.dynamic import (
    COUNTS,
    RULES,
    Count,
    Flow,
    GatePlan,
    Passage,
    Rule,
    attach_gates,
    find_sites,
    gate_plan,
    gates_of,
    note_plan,
)
from microglia.methods.arguments import check_model, plain_settings
from microglia.methods.config import MethodConfig
from microglia.methods.pruner import own_optimizer, set_rate
from microglia.methods.what import Takes
from microglia.scores import Evidence
from microglia.scores.checks import check_evidence

Mode = Literal["decoupled", "joint", "heads", "random"]


@dataclass(frozen=True)
class FtwtConfig(MethodConfig):
    """FTWT; the budget is ``flops``, the mean fraction of the operations computed, or ``r`` itself.

    Attributes:
        pattern: Always ``channel``.
        layers: Selectors of the convolutions to gate; convolutions that cannot be gated are left out.
        exclude: Selectors of convolutions not to gate.
        mode: ``decoupled``; ``joint``, where the loss of the heads also trains the network; ``heads``, where the network is
            frozen; ``random``, a baseline with untrained heads that keep as many filters of each layer as the targets.
        r: Fraction of a layer's mass that its target keeps, in (0, 1], for all layers or by layer; instead of ``flops``.
        rule: Rule for targets; see `microglia.dynamic.targets`.
        count: Operations that ``flops`` counts: ``honest``, all computed ones, or ``paper``, as published (without the heads).
        images: Training images on which r is chosen before the training.
        pool: Input of a head: the average of each channel (the authors' code) or its maximum (their figures).
        softmax: Whether this input goes through a softmax over channels.
        head_lr: Constant learning rate of the heads, which use SGD with momentum 0.9 and no weight decay.
        cooldown: Fraction of the training after which the heads are fixed.
        soften: Fraction of the training over which the masks grow from no effect to full effect; 0 as in the paper, where half
            the filters are removed at the first step.
        initial: Initial heads: ``random``, as in the paper, or ``fitted`` (ours). A fitted head is the logistic regression of
            its targets on its inputs for about ``images`` training images. This saves training time.
        calibrate: Whether, with ``flops``, the heads' thresholds are moved so that the masks have the requested cost. This
            happens when the heads are fitted, when they are fixed, and at the end. Otherwise, and with ``r``, the threshold is
            the paper's, a probability of one half.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("flops", "layers", "exclude"),
        patterns={Channel: "gated"},
        also=("r",),
        why={"density": "all weights stay", "params": "all weights stay"},
    )
    pattern: str = "channel"
    mode: Mode = "decoupled"
    r: float | dict[str, float] | None = None
    rule: Rule = "prefix_le"
    count: Count = "honest"
    images: int = 2048
    pool: Literal["avg", "max"] = "avg"
    softmax: bool = True
    head_lr: float = 0.1
    cooldown: float = 0.5
    soften: float = 0.0
    initial: Literal["random", "fitted"] = "random"
    calibrate: bool = False

    def asked_besides(self) -> dict[str, float]:
        """Returns r, where it is one for all layers."""
        return {"r": self.r} if isinstance(self.r, float) else {}

    def check_values(self) -> None:
        """Raises `BudgetError` for an unknown choice and for fractions out of range."""
        if self.mode not in ("decoupled", "joint", "heads", "random") or self.rule not in RULES or self.count not in COUNTS:
            known = f"rule is {' or '.join(RULES)}, and count is {' or '.join(COUNTS)}"
            got = f"{self.mode!r}, {self.rule!r} and {self.count!r}"
            raise BudgetError(f"mode is decoupled, joint, heads or random, {known}; got {got}.")
        if self.initial not in ("random", "fitted") or (self.initial == "fitted" and self.mode == "random"):
            got = f"{self.initial!r} with mode {self.mode!r}"
            raise BudgetError(f"initial is random, or fitted where heads are trained; got {got}.")
        if not (0 <= self.cooldown <= 1 and 0 <= self.soften <= 1 and self.head_lr > 0 and self.images > 0):
            raise BudgetError(
                "cooldown and soften are fractions of the training, head_lr and images are above 0; got "
                f"{self.cooldown}, {self.soften}, {self.head_lr} and {self.images}."
            )

    def check_budget(self) -> None:
        """Raises `BudgetError` unless there is one of flops and r, in range."""
        if (self.flops is None) == (self.r is None):
            raise BudgetError(
                "The method 'ftwt' takes one of flops, the mean fraction of the operations such as 0.5, and r, the fraction of "
                f"the mass such as 0.9; got flops={self.flops} and r={self.r}."
            )
        if self.flops is not None:
            Budget(flops=self.flops)
        for value in self.r.values() if isinstance(self.r, dict) else (() if self.r is None else (self.r,)):
            if not 0 < value <= 1:
                raise BudgetError(f"r is the fraction of the mass to keep, in (0, 1]; got {value}.")


def plan_gates(model: nn.Module, flow: Flow, config: FtwtConfig) -> GatePlan:
    """Returns the plan of a model's gates, with the config's r if it has one.

    Raises:
        SelectorError: No convolution can be gated, or r names one that is not.
    """
    sites = find_sites(flow, model, config.layers, config.exclude).sites
    plan = GatePlan(sites, pool=config.pool, softmax=config.softmax, rule=config.rule)
    return plan if config.r is None else with_r_of(plan, config.r)


def with_r_of(plan: GatePlan, r: float | dict[str, float]) -> GatePlan:
    """Returns the plan with one r for all layers, or one for each.

    Raises:
        SelectorError: r by layer names a layer that is not gated, or omits a gated one.
    """
    layers = [site.layer for site in plan.sites]
    if isinstance(r, dict):
        wrong = next((name for name in (*r, *layers) if (name in r) != (name in layers)), None)
        if wrong is not None:
            raise SelectorError(
                f"r by layer needs every gated layer and no other; look at {wrong!r}. Gated: {', '.join(layers)}."
            )
    return plan.with_r(r)


class Ftwt:
    """The heads of a model and their loss, for use inside any training loop; see `PrunerProtocol`.

    Example:
        >>> pruner = mg.methods.Ftwt(model, r=0.9, total_steps=1000, example_inputs=x)      # doctest: +SKIP

    Args:
        model: A model with gates, which get a new r, or without gates, which are added in place.
        config: See `FtwtConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training; fractions refer to these.
        example_inputs: One batch of inputs, if the model has no gates yet.
        evidence: Its generator draws the heads' initial weights.
        generator: Draws the initial weights instead.
        at_rest: Called when the heads become fixed, and again at the end, to calibrate them.
        **settings: The fields of the config by keyword instead.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FtwtConfig | None = None,
        *,
        total_steps: int,
        example_inputs: Any = None,
        evidence: Evidence | None = None,
        generator: torch.Generator | None = None,
        at_rest: Callable[[], dict[str, float]] | None = None,
        **settings: Any,
    ) -> None:
        user = type(self).__name__
        check_model(model, user)
        generator = check_evidence(evidence, user).generator if generator is None and evidence is not None else generator
        self.model = model
        self.config = config if config is not None else FtwtConfig(**plain_settings(FtwtConfig, settings, user))
        self.total_steps, self.steps = max(1, total_steps), 0
        self._made: list[torch.optim.Optimizer] = []
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
        """Completed fraction of the training."""
        return self.steps / self.total_steps

    @property
    def learning(self) -> bool:
        """Whether the heads are being trained now."""
        return self.config.mode == "heads" or (self.config.mode != "random" and self.progress < self.config.cooldown)

    def _hear(self, passage: Passage) -> None:
        if passage.gate.training and self.learning:
            wanted = passage.target().to(passage.logits.dtype)
            loss = functional.binary_cross_entropy_with_logits(passage.logits, wanted, reduction="sum")
            self._losses.append(loss / len(wanted))

    # -------------------------------------------------------------------------------------------- what the loop asks
    def penalty(self) -> Tensor | float:
        """Returns the loss of the heads in the last forward pass, mean over layers; 0 once they are fixed."""
        losses, self._losses = self._losses, []
        if losses:
            return torch.stack(losses).sum() / len(self.gates)
        if self.config.mode != "random" and torch.distributed.is_initialized():  # every parameter needs a gradient there
            return 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return 0.0

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step; with the optimizer given, momentum does not move fixed heads either."""
        learned = self.learning
        self.steps += 1
        self._fade()
        if learned and not self.learning:
            self._calibrate()
        if not self.learning:  # under DDP they still get gradients, which are zero
            set_rate([optimizer, *self._made], self.parameters(), 0.0)

    def replaces_step(self) -> bool:
        """Tells that the optimizers act at every step."""
        return False

    def _calibrate(self) -> None:
        if self._at_rest is not None:
            self._moved = {layer: self._moved.get(layer, 0.0) + step for layer, step in self._at_rest().items()}

    def _fade(self) -> None:
        soften = self.config.soften
        for gate in self.gates.values():
            gate.fade = min(1.0, self.progress / soften) if soften else 1.0

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the heads' group with its own rate and no weight decay; see `Pruner.param_groups`."""
        if self.config.mode == "random":
            return []
        return [{"params": self.parameters(), "lr": self.config.head_lr, "momentum": 0.9, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns SGD with momentum 0.9 for the heads, at a constant rate until they are fixed."""
        made = [own_optimizer("sgd", groups)] if (groups := self.param_groups()) else []
        self._made += made
        return list(made)

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the network without the heads."""
        own = {id(p) for p in self.parameters()}
        return [p for p in self.model.parameters() if id(p) not in own]

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
        """Returns the state to resume from; the heads are in the model's state."""
        return {"steps": self.steps, "moved": self._moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
        self.steps, self._moved = int(state["steps"]), dict(state["moved"])
        self._fade()

    def report(self) -> dict[str, Any]:
        """Returns the report, JSON-ready."""
        rested = None if self.learning else round(self.config.cooldown * self.total_steps)
        return {"steps": self.steps, "rested_after": rested, "moved": self._moved}


def _norms_rest(module: nn.Module, args: Any) -> None:
    """Keeps batch norms in evaluation mode, so that a frozen network also keeps its statistics."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.training = False  # not eval(), because gates attached to it stay active
