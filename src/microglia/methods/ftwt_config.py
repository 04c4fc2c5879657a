"""The config of FTWT, and the plan of gates it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, PatternError, SelectorError
from microglia.dynamic import COUNTS, RULES, Count, Flow, GatePlan, Rule, find_sites
from microglia.methods.config import MethodConfig

Mode = Literal["decoupled", "joint", "heads", "random"]


@dataclass(frozen=True)
class FtwtConfig(MethodConfig):
    """FTWT; the budget is ``flops``, the mean fraction of the operations computed, or ``r`` itself.

    Attributes:
        pattern: Always ``channel``.
        layers: Selectors of the convolutions to gate; those that cannot be are left out.
        exclude: Selectors of convolutions not to gate.
        mode: ``decoupled``; ``joint``, where the loss of the heads trains the network too; ``heads``, where the network rests;
            ``random``, the baseline whose heads are never trained and keep as many filters of each layer as the targets do.
        r: Fraction of a layer's mass that its target keeps, in (0, 1], for all layers or by layer; instead of ``flops``.
        rule: Of the targets; see `microglia.dynamic.targets`.
        count: What ``flops`` counts: ``honest``, all that is computed, or ``paper``, as published (heads for free).
        images: Training images on which r is chosen before the training.
        pool: What a head sees of its input: the average of each channel (the authors' code) or its maximum (their figures).
        softmax: Whether that goes through a softmax over channels.
        head_lr: Constant learning rate of the heads, which have SGD with momentum 0.9 and no weight decay.
        cooldown: Fraction of the training after which the heads rest.
        soften: Fraction of the training over which the masks come in, from no effect at all to all of it; 0 as in the paper,
            where half the filters go at the first step.
        initial: Heads at the start: ``random``, as in the paper, or ``fitted`` (ours): each the logistic regression of its
            targets on what it sees of about ``images`` training images, so that a short training is not spent on them.
        calibrate: Whether, with ``flops``, the heads' thresholds are moved so that the masks cost what was asked: when the
            heads are fitted, when they rest, and at the end. Otherwise, and with ``r``, they are the paper's, a probability of
            one half.
    """

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

    def __post_init__(self) -> None:  # here, so that it shows before the dense model is trained
        if self.pattern != "channel":
            raise PatternError(f"The method 'ftwt' gates whole channels: its pattern is channel, not {self.pattern}.")
        if self.protect or self.allow_empty or self.scope != "global":
            raise SelectorError("The method 'ftwt' takes layers and exclude, and not protect, allow_empty or scope.")
        if self.mode not in ("decoupled", "joint", "heads", "random") or self.rule not in RULES or self.count not in COUNTS:
            raise BudgetError(f"There is no mode {self.mode!r}, rule {self.rule!r} or count {self.count!r}.")
        if self.initial not in ("random", "fitted") or (self.initial == "fitted" and self.mode == "random"):
            raise BudgetError(
                f"initial is random, or fitted where heads are trained; got {self.initial!r} with mode {self.mode!r}."
            )
        if not (0 <= self.cooldown <= 1 and 0 <= self.soften <= 1 and self.head_lr > 0 and self.images > 0):
            raise BudgetError(
                "cooldown and soften are fractions of the training, head_lr and images are above 0; got "
                f"{self.cooldown}, {self.soften}, {self.head_lr} and {self.images}."
            )

    def check_budget(self) -> None:
        """Raises `BudgetError` unless there is one of flops and r, in range, and nothing else."""
        if (self.density, self.params, self.ms) != (None, None, None):
            raise BudgetError("The method 'ftwt' takes flops or r, and not density, params or ms: all weights stay.")
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
    """Returns the plan of a model's gates, with the config's r where it has one.

    Raises:
        SelectorError: No convolution can be gated, or r names one that is not.
    """
    sites = find_sites(flow, model, config.layers, config.exclude).sites
    plan = GatePlan(sites, pool=config.pool, softmax=config.softmax, rule=config.rule)
    return plan if config.r is None else with_r_of(plan, config.r)


def with_r_of(plan: GatePlan, r: float | dict[str, float]) -> GatePlan:
    """Returns the plan with one r for all layers, or one for each.

    Raises:
        SelectorError: r by layer names another layer than the gated ones, or leaves one out.
    """
    layers = [site.layer for site in plan.sites]
    if isinstance(r, dict):
        wrong = next((name for name in (*r, *layers) if (name in r) != (name in layers)), None)
        if wrong is not None:
            raise SelectorError(
                f"r by layer needs every gated layer and no other; look at {wrong!r}. Gated: {', '.join(layers)}."
            )
    return plan.with_r(r)
