"""GAL (Lin et al. 2019): a soft mask learned without labels, so that a discriminator cannot tell the outputs from the dense.

The algorithm (spec: survey 8.6), f_b the dense network, f_m the network under the soft mask m, D a small discriminator:
    D:     minimize -log D(f_b(x)) - log(1 - D(f_m(x)))
    W, m:  minimize 1/(2n) sum |f_b(x) - f_m(x)|^2 - log D(f_m(x)) + c |m|_1, the last term by FISTA
    remove the structures of mask 0, or those of the smallest masks to a budget; the others take their masks; fine-tune.
No label is used: what the model returns to the loop has no gradient, so that the loop's own loss does not act. Both sides step
at once, from one backward pass; the authors' code takes turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from microglia.core.batch import Example
from microglia.core.devices import device_of
from microglia.core.errors import BudgetError
from microglia.core.masks import MaskSet
from microglia.core.modes import evaluating
from microglia.core.running import run as run_on
from microglia.core.running import undisturbed
from microglia.methods.channel_procedure import fits, thinned
from microglia.methods.config import method
from microglia.methods.proximal import FactorConfig, FactorPruner
from microglia.methods.pruner import own_optimizer
from microglia.storage.run import Run
from microglia.tasks.task import Task

HIDDEN = (128, 256, 128)
"""Hidden neurons of the discriminator."""
DECAY = 2e-4


@dataclass(frozen=True)
class GalConfig(FactorConfig):
    """GAL; the networks under the mask and the dense one differ in their outputs alone.

    Attributes:
        strength: c, the weight of |m|_1. The authors' 0.6 for ResNet-56 at each 200th step is 0.003 at every step.
        factor_lr: Rate of the mask.
        discriminator_lr: Rate of the discriminator (SGD with momentum).
        adversarial: Weight of the adversarial term.
    """

    strength: float = 3e-3
    factor_lr: float = 0.01
    discriminator_lr: float = 0.01
    adversarial: float = 1.0

    def check_values(self) -> None:
        """Raises `BudgetError` for a rate that is not above 0 and a negative weight."""
        if not self.discriminator_lr > 0 or self.adversarial < 0:
            raise BudgetError(
                f"discriminator_lr is above 0 and adversarial at least 0; got {self.discriminator_lr} and {self.adversarial}."
            )


class Gal(FactorPruner):
    """Learns a soft mask from the dense network's outputs, to be stepped inside anybody's loop; see `ChannelPruner`."""

    Config = GalConfig
    momentum = None

    @property
    def own(self) -> GalConfig:
        """The config."""
        return cast(GalConfig, self.config)

    def prepare(self) -> None:
        """Looks at the model's outputs.

        Raises:
            BudgetError: They are not one tensor.
        """
        super().prepare()
        with evaluating(self.model), undisturbed():
            output = run_on(self.model, Example.of(self.example))
        self._features = self._one(output)[0].numel()
        self._seen: tuple[Example, Tensor] | None = None

    def _one(self, output: Any) -> Tensor:
        """Returns the outputs, if they are one tensor; networks with auxiliary heads return more in training."""
        if not isinstance(output, Tensor):
            raise BudgetError(
                f"Gal needs a model that returns one tensor; {type(self.model).__name__} returns a {type(output).__name__}."
            )
        return output

    def begin(self) -> None:
        """Keeps the dense network, makes the discriminator and attaches the soft mask."""
        self.dense = deepcopy(self.model).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.evidence.generator)))
            self.discriminator = discriminator(self._features).to(device_of(self.model))
        super().begin()
        self._hook = self.model.register_forward_hook(self._note, with_kwargs=True)

    def penalty(self) -> Tensor | float:
        """Returns the whole objective of the last forward pass but for the term of the mask, which FISTA takes."""
        if self._seen is None or self.soft is None:
            return 0.0
        (example, masked), self._seen = self._seen, None
        with torch.no_grad():
            dense = self._features_of(run_on(self.dense, example))
        masked = self._features_of(masked)
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = _as(1.0, functional_call(self.discriminator, still, (masked,)))
        told = _as(1.0, self.discriminator(dense)) + _as(0.0, self.discriminator(masked.detach()))
        total: Tensor = (masked - dense).square().sum(1).mean() / 2 + self.own.adversarial * (fooled + told)
        return total

    def _features_of(self, outputs: Tensor) -> Tensor:
        """Returns outputs as the discriminator reads them, in its own precision."""
        return outputs.flatten(1).to(next(self.discriminator.parameters()).dtype)

    def finish(self) -> MaskSet:
        """Merges the mask into the weights, and masks the channels that do not stay; returns the masks."""
        if self.soft is not None:
            self._hook.remove()
        return super().finish()

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the groups of the mask and of the discriminator."""
        if not (groups := super().param_groups()):
            return []
        rate = self.own.discriminator_lr
        return [*groups, {"params": list(self.discriminator.parameters()), "lr": rate, "weight_decay": DECAY}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns FISTA of the mask, and SGD of the discriminator."""
        made = super().optimizers()
        return [*made, own_optimizer("sgd", self.param_groups()[1:])] if made else []

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken and the discriminator."""
        return super().state_dict() | {"discriminator": self.discriminator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.discriminator.load_state_dict(state["discriminator"])

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Keeps the outputs of a training step; the loop gets them without a gradient."""
        if not (torch.is_grad_enabled() and module.training):
            return output
        self._seen = Example(args, kwargs), self._one(output)
        return output.detach()


def discriminator(features: int) -> nn.Sequential:
    """Returns a network (batch, features) -> (batch, 1): the logit that outputs are the dense network's."""
    sizes = (features, *HIDDEN)
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN[-1], 1))


def _as(label: float, logits: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


@method(
    "gal", GalConfig, check=fits(Gal), paper="Lin et al. 2019, arXiv 1903.09291", purpose="channels and blocks without labels"
)
def gal(task: Task, run: Run, config: GalConfig) -> nn.Module:
    """GAL: a soft mask learned without labels against a discriminator, by FISTA; structures at zero go, fine-tune."""
    return thinned(task, run, config, Gal)
