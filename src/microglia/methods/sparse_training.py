"""Sparse training from scratch: SET (Mocanu et al. 2018), RigL (Evci et al. 2020) and masks that never move.

The algorithm (spec: survey 9). Random masks with exact counts k_l per layer; then, at every ``every``-th step t before T:
    n      = floor(alpha_t k_l),  alpha_t = drop / 2 (1 + cos(pi t / T)) or drop
    drop   the n smallest |w| of the layer
    grow   n of those not kept: the largest |dL / d(m w)| of this minibatch (RigL), or any (SET)
    new weights start at 0 without momentum; one just dropped that returns keeps its value
    the optimizer rests at this step
and gradient descent on what is kept at all other steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from microglia.core.errors import BudgetError, TrainingError
from microglia.core.layers import Layer
from microglia.core.masks import Masked, MaskSet, enforce, mask
from microglia.core.selection import keep_best
from microglia.methods.arguments import check_steps
from microglia.methods.at_init import refuse_trained
from microglia.methods.config import method, preset
from microglia.methods.procedure import dense_model, evidence, train
from microglia.methods.pruner import PruneConfig, Pruner
from microglia.methods.sparse_training_config import SparseTrainingConfig
from microglia.scores import Evidence, scores
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig, epoch_length


class DenseGradients:
    """Reads dL / d(m w) in backward passes: what each weight would get were it not masked.

    The mask's own backward zeroes it at removed weights, so it is read at the mask's output, and only between `listen` and
    `rest`: other steps pay nothing. Several uses of a weight, and micro-batches of one step, add up as they do in ``.grad``.
    """

    def __init__(self) -> None:
        self._sums: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def listen(self, masked: Iterable[Masked]) -> None:
        """Reads the backward passes from now on, from zero."""
        self.rest()
        sums, known = self._sums, set(masked)

        def add(module: nn.Module, gradient: Tensor) -> None:
            sums[module] = sums[module] + gradient if module in sums else gradient.detach()

        def after_forward(module: nn.Module, inputs: Any, weight: Tensor) -> None:
            if weight.requires_grad and module in known:  # not while evaluating, and not in a copy of the model
                weight.register_hook(partial(add, module))  # type: ignore[no-untyped-call]

        self._handles = [module.register_forward_hook(after_forward) for module in known]

    def rest(self) -> None:
        """Forgets what was read and reads no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], {}

    def of(self, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
        """Returns the gradients by layer, summed over all ranks; 0 for a layer that the loss did not reach.

        Raises:
            TrainingError: No backward pass was read.
        """
        if not self._sums:
            raise TrainingError(
                "Weights grow where the gradient is large, but this step had none: call loss.backward() before pruner.step()."
            )
        found = {}
        for name, layer in layers.items():
            gradient = self._sums.get(_masked(layer))
            gradient = torch.zeros_like(layer.raw) if gradient is None else gradient
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            found[name] = gradient.clone(memory_format=torch.contiguous_format)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(found[name])
        return found


def _masked(layer: Layer) -> Masked:
    module, attribute = layer.holders[0]  # the others share it
    return next(p for p in module.parametrizations[attribute] if isinstance(p, Masked))  # type: ignore[union-attr,index]


def exchange(
    kept: Tensor, weight: Tensor, growth: Tensor, *, count: int, generator: torch.Generator, name: str = "weight"
) -> Tensor:
    """Returns the mask in which the ``count`` smallest weights gave way to as many others.

    Args:
        kept: The mask, of the weight's shape.
        weight: The weights, of which |w| counts.
        growth: Where to grow, higher first, among all not kept after the drop.
        count: Weights to exchange, 0 <= count <= those kept.
        generator: Decides among equals. The paper's code adds noise of 1e-5 to |w| to that end; this is exact instead.
        name: Of the layer, for errors.

    Raises:
        ScoreError: A weight or a gradient is NaN.
    """
    renewed, size, growth = kept.flatten(), weight.flatten().abs(), growth.flatten()
    active = renewed.nonzero().squeeze(1)
    staying = active[_best(name, size[active], len(active) - count, generator)]
    renewed = torch.zeros_like(renewed).index_fill_(0, staying, True)
    free = (~renewed).nonzero().squeeze(1)
    growing = free[_best(name, growth[free], count, generator)]
    return renewed.index_fill_(0, growing, True).view(kept.shape)


def _best(name: str, values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns the positions of the ``count`` largest values, equal ones in random order."""
    order = torch.randperm(len(values), generator=generator).to(values.device)
    return order[keep_best({name: values[order]}, count)[name]]


class SparseTraining(Pruner):
    """Keeps each layer's number of weights and moves them while the network trains.

    At the steps for which `replaces_step` is true the optimizer should rest: the update of the masks takes its place.

    Example:
        >>> pruner = SparseTraining(model, density=0.1, total_steps=1000)           # doctest: +SKIP
        >>> loss.backward()                                                         # doctest: +SKIP
        >>> if not pruner.replaces_step():                                          # doctest: +SKIP
        ...     optimizer.step()
        >>> pruner.step(optimizer)                                                  # doctest: +SKIP

    Args:
        model: The model to train, in place, usually with initial weights. Masks it has bound the first masks only.
        config: See `SparseTrainingConfig`; its training fields are not used here.
        total_steps: Optimizer steps of the training, over which ``until`` is a fraction.
        evidence: Its generator, seeded alike on all ranks, draws the masks and decides among equals.
        **settings: The fields of the config by keyword instead.
    """

    Config = SparseTrainingConfig

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
        """Tells whether the next step updates the masks, at which the optimizer rests."""
        return self.own.due(self.steps + 1, self.total_steps)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Updates the masks when it is time; with the optimizer at hand grown weights start without momentum."""
        if self.replaces_step():
            self._update(self.steps + 1, optimizer)
        self.steps += 1
        self._prepare()

    def _prepare(self) -> None:
        if self.own.grow == "gradient" and self.replaces_step():
            self._gradients.listen(_masked(layer) for layer in self.layers.values())
        else:
            self._gradients.rest()

    @torch.no_grad()
    def _update(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        enforce(self.model, optimizer)  # what may grow is 0 and without momentum, whatever moved it meanwhile
        layers, masks, generator = self.layers, self.masks, self.evidence.generator
        gradients = self._gradients.of(layers) if self.own.grow == "gradient" else {}
        dropped = self.own.dropped(step, self.total_steps)
        renewed = {}
        for name, layer in layers.items():
            if masks[name].all():
                continue
            growth = gradients[name].abs() if gradients else torch.zeros_like(layer.raw)  # all equal: any, at random
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
        """Returns how often the masks moved, and how many weights grew where there was none, over all updates."""
        return {"updates": self.updates, "grown": self.grown}

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken, what `report` tells, and the state of the generator."""
        return {"steps": self.steps, **self.report(), "generator": self.evidence.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the masks come with the model's."""
        self.steps, self.updates, self.grown = state["steps"], state["updates"], state["grown"]
        self.evidence.generator.set_state(state["generator"])
        self._prepare()


def fits(task: Task, config: SparseTrainingConfig) -> None:
    """Raises unless the task begins untrained and layers, budget and length of the training fit its model."""
    refuse_trained(task, config)
    scores[config.score]
    first = replace(config, score="random")  # another may need batches, which a check does not read
    SparseTraining(task.build(), first, total_steps=_steps(task, config.train))


def _steps(task: Task, config: FitConfig) -> int:
    return config.epochs * epoch_length(config, len(task.data.batches("train", config.batch_size)))


@method("rigl", SparseTrainingConfig, check=fits, training=FitConfig())
def rigl(task: Task, run: Run, config: SparseTrainingConfig) -> nn.Module:
    """RigL: sparse from scratch; the smallest weights give way where the gradient is largest."""
    refuse_trained(task, config)  # the masks are made only when the dense network is trained
    dense = dense_model(task, run, config.dense)  # to compare with, and to distil from; nothing else of it is used
    model = task.build().to(run.device)
    steps = _steps(task, config.train)

    def pruner() -> SparseTraining:
        return SparseTraining(model, config, total_steps=steps, evidence=evidence(task, run, config))

    teacher = dense if config.train.distill else None
    run.observations["exchanged"] = train(task, run, "train", model, config.train, pruner=pruner, teacher=teacher)
    return model


preset(
    "set", "rigl", "SET: sparse from scratch; the smallest weights give way at random.",
    grow="random", decay="constant", until=1.0,
)  # fmt: skip
preset("static", "rigl", "Sparse from scratch with random masks that never move: the control.", drop=0.0)
