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

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.dynamic import Flow, Passage, attach_gates, gate_plan, note_plan
from microglia.methods.arguments import check_model, plain_settings
from microglia.methods.ftwt_config import UNTRAINED, FtwtConfig, plan_gates, with_r_of
from microglia.methods.gate_pruner import GatePruner
from microglia.methods.pruner import set_rate
from microglia.scores import Evidence
from microglia.scores.checks import check_evidence

__all__ = ["Ftwt", "FtwtConfig", "plan_gates", "with_r_of"]

PARTS = 4
"""Equal parts of the training after the cool-down; fixed heads are calibrated at the start of each, because the network that
adapts to them changes their inputs. One move at the end would be one that no training follows."""


class Ftwt(GatePruner):
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
        at_rest: Called to calibrate the heads: when they become fixed, three times while the network adapts, and at the end.
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
        self.config = config if config is not None else FtwtConfig(**plain_settings(FtwtConfig, settings, user))
        self._at_rest = at_rest
        self._moved: dict[str, float] = {}
        plan = gate_plan(model)
        if plan is None:
            if self.config.r is None or example_inputs is None:
                raise MicrogliaError(
                    "Ftwt needs r, the fraction of the mass to keep such as 0.9, and example_inputs; a budget of flops is met "
                    "by microglia.dynamic.choose_r or the method 'ftwt'."
                )
            if self.config.initial != "random" or self.config.mode == "static":
                raise MicrogliaError(
                    "Ftwt sees no images to fit heads to: give random ones and call microglia.dynamic.fit_heads, or its "
                    "start_static for constant ones."
                )
            self.config.check_budget()
            attach_gates(model, plan_gates(model, Flow(model, example_inputs), self.config), generator)
        elif self.config.r is not None:
            self.config.check_budget()
            note_plan(model, with_r_of(plan, self.config.r))
        super().__init__(model, total_steps, self.config.head_lr)
        self._losses: list[Tensor] = []
        self._rested: list[nn.Parameter] = []
        own = {id(p) for p in self.parameters()}
        if self.config.mode == "heads":
            self._rest([p for p in model.parameters() if id(p) not in own])
            self._norms = model.register_forward_pre_hook(_norms_rest)
        elif self.config.mode in UNTRAINED:
            self._rest(self.parameters())
        for gate in self.gates.values():
            gate.detached = self.config.mode != "joint"
            gate.listen(self._hear)
        self._fade()

    def _rest(self, parameters: list[nn.Parameter]) -> None:
        self._rested = [p for p in parameters if p.requires_grad]
        for parameter in self._rested:
            parameter.requires_grad_(False)

    @property
    def _trained(self) -> bool:
        return self.config.mode not in UNTRAINED

    @property
    def learning(self) -> bool:
        """Whether the heads are being trained now."""
        return self.config.mode == "heads" or (self._trained and self.progress < self.config.cooldown)

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
        if self._trained and torch.distributed.is_initialized():  # every parameter needs a gradient there
            return 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return 0.0

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Advances by one optimizer step; with the optimizer given, momentum does not move fixed heads either."""
        self.steps += 1
        self._fade()
        if not self.learning and self.steps in self._due:
            self._calibrate()
        if not self.learning:  # under DDP they still get gradients, which are zero
            set_rate([optimizer, *self._made], self.parameters(), 0.0)

    @property
    def _due(self) -> set[int]:
        """Steps after which fixed heads are calibrated."""
        rested = math.ceil(self.config.cooldown * self.total_steps - 1e-9)  # as `progress` tells it
        return {rested + part * (self.total_steps - rested) // PARTS for part in range(PARTS)}

    def _calibrate(self) -> None:
        if self._at_rest is not None:
            self._moved = {layer: self._moved.get(layer, 0.0) + step for layer, step in self._at_rest().items()}

    def _fade(self) -> None:
        soften = self.config.soften
        for gate in self.gates.values():
            gate.fade = min(1.0, self.progress / soften) if soften else 1.0

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the heads' group with its own rate and no weight decay; none where the heads are not trained."""
        return super().param_groups() if self._trained else []

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
        super().load_state_dict(state)
        self._moved = dict(state["moved"])
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
