"""The config of FTWT, and the plan of gates that it describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from microglia.core.budget import Budget
from microglia.core.errors import BudgetError, SelectorError
from microglia.core.patterns import Channel
from microglia.dynamic import COUNTS, PLACES, RULES, Count, Flow, GatePlan, Places, Rule, blocks_of, find_sites
from microglia.methods.config import MethodConfig
from microglia.methods.what import Takes

Mode = Literal["decoupled", "joint", "heads", "random", "static"]
Initial = Literal["random", "fitted", "static"]
MODES, INITIALS = get_args(Mode), get_args(Initial)
UNTRAINED = ("random", "static")
"""Modes, which are baselines, whose heads are never trained."""


@dataclass(frozen=True)
class FtwtConfig(MethodConfig):
    """FTWT; the budget is ``flops``, the mean fraction of the operations computed, or ``r`` itself.

    Attributes:
        pattern: Always ``channel``.
        layers: Selectors of the convolutions to gate; convolutions that cannot be gated are left out.
        exclude: Selectors of convolutions not to gate.
        mode: ``decoupled``; ``joint``, where the loss of the heads also trains the network; ``heads``, where the network is
            frozen; ``random``, a baseline with untrained heads that keep as many filters of each layer as the targets;
            ``static``, the baseline that gates must beat: masks at the same places, the same for every input. They keep the
            filters with the largest mean mass over ``images`` training images, at the same cost, and have no heads.
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
        initial: Initial heads: ``random``, as in the paper, ``fitted`` or ``static`` (ours). A fitted head is the logistic
            regression of its targets on its inputs for about ``images`` training images. This saves training time. A static
            head starts as a constant that decides as the mode ``static`` does; routes open up while it learns.
        gates: Places of the gates: ``all`` convolutions that can have one, or ``first`` for those that no sum reads, as the
            first of a residual block.
        block: Number of neighbouring filters that are kept or skipped together, in layers that have at least two such blocks.
            Blocks of 16 are what the gathered execution skips without packing weights.
        calibrate: Whether, with ``flops``, the heads' thresholds are moved so that the masks have the requested cost. This
            happens when the heads are fitted, when they are fixed, three times while the network adapts, and at the end.
            Otherwise, and with ``r``, the threshold is the paper's, a probability of one half.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("flops", "layers", "exclude"),
        patterns={Channel: "gated"},
        also=("r",),
        why={"density": "all weights stay", "params": "all weights stay"},
    )
    later: ClassVar[tuple[str, ...]] = ("gates", "block")
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
    initial: Initial = "random"
    gates: Places = "all"
    block: int = 1
    calibrate: bool = False

    def asked_besides(self) -> dict[str, float]:
        """Returns r, where it is one for all layers."""
        return {"r": self.r} if isinstance(self.r, float) else {}

    def check_values(self) -> None:
        """Raises `BudgetError` for an unknown choice and for fractions out of range."""
        known = {"mode": MODES, "rule": RULES, "count": COUNTS, "initial": INITIALS, "gates": PLACES}
        if any(getattr(self, name) not in words for name, words in known.items()):
            listed = ", and ".join(f"{name} is {', '.join(words[:-1])} or {words[-1]}" for name, words in known.items())
            got = ", ".join(repr(getattr(self, name)) for name in known)
            raise BudgetError(f"{listed}; got {got}.")
        if self.mode in UNTRAINED and self.initial != "random":
            raise BudgetError(
                f"initial is random, or static or fitted where heads are trained; got {self.initial!r} with mode {self.mode!r}."
            )
        if self.block < 1:
            raise BudgetError(f"block is the number of filters of a gate's unit, 1 or more; got {self.block}.")
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
    sites = find_sites(flow, model, config.layers, config.exclude, config.gates).sites
    blocks, static = blocks_of(sites, config.block), config.mode == "static"
    plan = GatePlan(sites, pool=config.pool, softmax=config.softmax, rule=config.rule, blocks=blocks, static=static)
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
