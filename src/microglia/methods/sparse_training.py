"""Sparse training from scratch: SET (Mocanu et al. 2018), RigL (Evci et al. 2020) and fixed masks.

The algorithm (spec: survey 9). Random masks with exact counts k_l per layer; then, at every ``every``-th step t before T:
    n      = floor(alpha_t k_l),  alpha_t = drop / 2 (1 + cos(pi t / T)) or drop
    drop   the n smallest |w| of the layer
    grow n of the others: the largest |dL / d(m w)| of this minibatch (RigL), or random ones (SET) new weights start at 0
    without momentum; a weight that was just dropped and returns keeps its value the optimizer skips this step
and gradient descent on the kept weights at all other steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import nn

from microglia.core.errors import BudgetError
from microglia.core.masks import MaskSet, enforce, mask
from microglia.core.patterns import Unstructured
from microglia.core.registry import unknown_name
from microglia.methods.arguments import check_steps
from microglia.methods.at_init import refuse_trained
from microglia.methods.config import MethodConfig, method, preset
from microglia.methods.exchange import DenseGradients, exchange, mask_of
from microglia.methods.procedure import dense_model, evidence, train
from microglia.methods.pruner import Pruner
from microglia.methods.what import LAYERS, NO_SUCH_BUDGET, SAMPLING, PruneConfig, ScopeSetting, Takes
from microglia.scores import Evidence, scores
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig, epoch_length

Growth = Literal["gradient", "random"]
Decay = Literal["cosine", "constant"]


@dataclass(frozen=True)
class ScratchConfig(MethodConfig):
    """Methods that train single weights under moving masks from scratch.

    Attributes:
        scope: Fixed distribution of the budget over layers: ``erk``, ``layer`` (uniform), or densities by layer name;
            ``global`` follows the score of the first masks.
        score: Score of the first masks, ``random`` in the papers.
        train: The training of the sparse network, from its initial weights on.
        first_dense: Whether the first layer stays dense under ``layer``, as in the paper. It counts as kept, so the other
            layers are slightly sparser. The paper does not count it; ``exclude`` gives that rule.
    """

    takes: ClassVar[Takes] = Takes(
        fields=("density", "params", *LAYERS, "score", *SAMPLING),
        patterns={Unstructured: "masked"},
        why={
            "pattern": "sparse training exchanges single weights",
            "reduction": "each unit is one weight",
            "flops": NO_SUCH_BUDGET,
            "ms": NO_SUCH_BUDGET,
        },
    )
    scope: ScopeSetting = "erk"
    score: str = "random"
    train: FitConfig = field(default_factory=FitConfig)
    first_dense: bool = True

    def check_values(self) -> None:
        """Raises `BudgetError` for a scope that is invalid here."""
        if self.scope == "row":
            raise BudgetError("Sparse training keeps the count of each layer, not of each row: take scope erk or layer.")


@dataclass(frozen=True)
class UpdatesConfig(ScratchConfig):
    """Methods that move masks at even distances.

    Attributes:
        drop: Fraction of weights exchanged at the first updates, in [0, 1); 0 never exchanges any.
        every: Optimizer steps between updates.
        until: Fraction of the training after which the masks are fixed.
    """

    drop: float = 0.3
    every: int = 100
    until: float = 0.75

    def check_values(self) -> None:
        """Raises `BudgetError` for fractions out of range."""
        if not 0 <= self.drop < 1 or not 0 < self.until <= 1:
            raise BudgetError(f"drop is a fraction in [0, 1) and until one in (0, 1]; got {self.drop} and {self.until}.")
        if self.every < 1:
            raise BudgetError(f"every is a number of optimizer steps, at least 1; got {self.every}.")

    def due(self, step: int, total_steps: int) -> bool:
        """Tells whether a step, counted from 1, exchanges weights: every ``every`` steps, before ``until``."""
        return self.drop > 0 and step % self.every == 0 and step < self.until * total_steps

    def check_updates(self, total_steps: int) -> None:
        """Raises `BudgetError` if masks should move but never would in a training of this length."""
        if self.drop > 0 and not self.due(self.every, total_steps):
            raise BudgetError(
                f"No update of the masks falls into this training: every {self.every} steps, before step "
                f"{self.until * total_steps:g} of {total_steps:,}. Give a smaller every or a longer training, or take the "
                "method 'static' (drop=0), whose masks never move."
            )


@dataclass(frozen=True)
class SparseTrainingConfig(UpdatesConfig):
    """Sparse training from scratch; the defaults are RigL's with Erdős-Rényi-kernel densities (Evci et al. 2020).

    Attributes:
        decay: Decay of the dropped fraction of a layer until then: ``cosine`` to 0 (RigL), or ``constant`` (SET).
        grow: Rule of growth: the largest ``gradient`` (RigL), or ``random`` (SET).
    """

    decay: Decay = "cosine"
    grow: Growth = "gradient"

    def check_values(self) -> None:
        """Raises `UnknownNameError` for unknown choices."""
        if self.decay not in get_args(Decay):
            raise unknown_name("decay", self.decay, get_args(Decay))
        if self.grow not in get_args(Growth):
            raise unknown_name("growth", self.grow, get_args(Growth))

    def dropped(self, step: int, total_steps: int) -> float:
        """Returns the fraction of a layer's weights to drop at a step t, in [0, drop]; 0 from the end T on.

        It is drop / 2 (1 + cos(pi t / T)) with T = until * total_steps (Evci et al. 2020, section 3), or constant until T.
        """
        end = self.until * total_steps
        if step >= end:
            return 0.0
        return self.drop if self.decay == "constant" else self.drop / 2 * (1 + math.cos(math.pi * step / end))


class SparseTraining(Pruner):
    """Keeps each layer's number of weights and moves the mask while the network trains.

    The optimizer should skip the steps for which `replaces_step` is true: the update of the masks replaces them.

    Example:
        >>> pruner = SparseTraining(model, density=0.1, total_steps=1000)           # doctest: +SKIP
        >>> loss.backward()                                                         # doctest: +SKIP
        >>> if not pruner.replaces_step():                                          # doctest: +SKIP
        ...     optimizer.step()
        >>> pruner.step(optimizer)                                                  # doctest: +SKIP

    Args:
        model: The model to train, in place, usually with initial weights. Existing masks restrict only the first masks.
        config: See `SparseTrainingConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training; ``until`` is a fraction of these.
        evidence: Its generator, with the same seed on all ranks, draws the masks and breaks ties.
        **settings: The fields of the config by keyword instead.
    """

    Config: type[PruneConfig] = SparseTrainingConfig

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        *,
        total_steps: int,
        evidence: Evidence | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, config, evidence=evidence, **settings)
        total_steps = check_steps(total_steps, type(self).__name__, least=0)
        self.own.check_updates(total_steps)
        self.total_steps = total_steps
        self.steps = self.updates = self.grown = 0
        if self.own.scope == "layer" and self.own.first_dense:
            self._protect_first()
        self.prune_to(self.target)
        self._gradients = DenseGradients()
        self._prepare()

    @property
    def own(self) -> SparseTrainingConfig:
        """The config."""
        return cast(SparseTrainingConfig, self.config)

    def _protect_first(self) -> None:
        name, first = next(iter(self.layers.items()))
        if first.raw.numel() >= self.target:
            raise BudgetError(
                f"Uniform densities leave the first layer dense, but {name!r} alone has {first.raw.numel():,} weights of the "
                f"{self.target:,} to keep. Take scope=erk, give first_dense=false, or exclude that layer."
            )
        self.protected = [name, *self.protected]

    def replaces_step(self) -> bool:
        """Tells whether the next step updates the masks; the optimizer then skips it."""
        return self.own.due(self.steps + 1, self.total_steps)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Updates the masks when an update is due; with the optimizer given, grown weights start without momentum."""
        if self.replaces_step():
            self._update(self.steps + 1, optimizer)
        self.steps += 1
        self._prepare()

    def _prepare(self) -> None:
        if self.own.grow == "gradient" and self.replaces_step():
            self._gradients.listen(mask_of(layer) for layer in self.layers.values())
        else:
            self._gradients.rest()

    @torch.no_grad()
    def _update(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        enforce(self.model, optimizer)  # weights that may grow are 0 and without momentum, even if something moved them
        layers, masks, generator = self.layers, self.masks, self.evidence.generator
        gradients = self._gradients.of(layers) if self.own.grow == "gradient" else {}
        dropped = self.own.dropped(step, self.total_steps)
        renewed = {}
        for name, layer in layers.items():
            if masks[name].all():
                continue
            growth = gradients[name].abs() if gradients else torch.zeros_like(layer.raw)  # all equal, so the choice is random
            count = math.floor(dropped * int(masks[name].sum()) + 1e-9)
            renewed[name] = exchange(masks[name], layer.raw, growth, count=count, generator=generator, name=name)
        mask(self.model, renewed)
        enforce(self.model, optimizer)
        self.updates += 1
        self.grown += sum(int((new & ~masks[name]).sum()) for name, new in renewed.items())

    def finish(self) -> MaskSet:
        """Ends the training; returns the final masks, which stay attached (`microglia.fold` writes them in)."""
        self._gradients.rest()
        return self.masks

    def report(self) -> dict[str, Any]:
        """Returns the number of updates, and the number of newly grown weights over all updates."""
        return {"updates": self.updates, "grown": self.grown}

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken, the counts of `report`, and the state of the generator."""
        return {"steps": self.steps, **self.report(), "generator": self.evidence.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state; the model's state holds the masks."""
        self.steps, self.updates, self.grown = state["steps"], state["updates"], state["grown"]
        self.evidence.generator.set_state(state["generator"])
        self._prepare()


def fits(kind: Callable[..., Pruner]) -> Callable[[Task, ScratchConfig], None]:
    """Returns a check that the task begins untrained and layers, budget and length of the training fit its model."""

    def check(task: Task, config: ScratchConfig) -> None:
        refuse_trained(task, config)
        scores[config.score]
        first = replace(config, score="random")  # another score may need batches, which a check does not read
        kind(task.build(), first, total_steps=_steps(task, config.train))

    return check


def _steps(task: Task, config: FitConfig) -> int:
    return config.epochs * epoch_length(config, len(task.data.batches("train", config.batch_size)))


def from_scratch(task: Task, run: Run, config: ScratchConfig, kind: Callable[..., Pruner]) -> nn.Module:
    """Returns a model that was trained sparse from its initial weights on; a dense one is trained for comparison."""
    refuse_trained(task, config)  # the masks are made only after the dense network is trained
    dense = dense_model(task, run, config.dense)  # only for comparison and distillation
    model = task.build().to(run.device)
    steps = _steps(task, config.train)

    def pruner() -> Pruner:
        return kind(model, config, total_steps=steps, evidence=evidence(task, run, config))

    teacher = dense if config.train.distill else None
    run.observations["exchanged"] = train(task, run, "train", model, config.train, pruner=pruner, teacher=teacher)
    return model


@method(
    "rigl",
    SparseTrainingConfig,
    check=fits(SparseTraining),
    training=FitConfig(),
    paper="Evci et al. 2020, arXiv 1911.11134",
    purpose="sparse from the start of training",
)
def rigl(task: Task, run: Run, config: SparseTrainingConfig) -> nn.Module:
    """RigL: sparse from scratch; the smallest weights give way where the gradient is largest."""
    return from_scratch(task, run, config, SparseTraining)


preset(
    "set", "rigl", "SET: sparse from scratch; the smallest weights give way at random.",
    grow="random", decay="constant", until=1.0,
    paper="Mocanu et al. 2018, arXiv 1707.04780", purpose="sparse from the start, without dense gradients",
)  # fmt: skip
preset(
    "static",
    "rigl",
    "Sparse from scratch with random masks that never move: the control.",
    drop=0.0,
    paper="Evci et al. 2020, arXiv 1911.11134",
    purpose="a control of sparse training",
)
