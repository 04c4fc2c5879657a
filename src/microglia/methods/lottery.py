"""Lottery tickets: masks found by training, with which early weights train as well as all (Frankle and Carbin 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from microglia.core.errors import BudgetError
from microglia.core.layers import check_selectors, matches, oriented
from microglia.core.masks import MaskSet, fold, mask
from microglia.core.restore import restore
from microglia.core.shuffle import shuffled
from microglia.methods.at_init import other_weights, refuse_trained
from microglia.methods.config import MethodConfig, method, preset
from microglia.methods.procedure import evidence, observe
from microglia.methods.pruner import Pruner
from microglia.storage.run import Run
from microglia.tasks.task import Task
from microglia.train.evaluate import evaluate
from microglia.train.optim import FitConfig, epoch_length
from microglia.train.rewind import State, advance, fresh_optimizers, start_of, with_masks

Rewind = Literal["weights", "learning-rate", "fine-tune"]
Control = Literal["none", "reinit", "shuffle"]
FINE_TUNE = 0.01
"""Fraction of the peak learning rate that fine-tuning uses, constant."""
TRAIN_BATCHES = 40
"""Number of batches of 256 examples that estimate a level's training accuracy."""
DENSE = "level-00"
"""Stage of the dense training."""


@dataclass(frozen=True)
class LotteryConfig(MethodConfig):
    """Lottery tickets and iterative magnitude pruning with rewinding.

    Attributes:
        rate: Fraction of the remaining weights that each level removes.
        half: Selectors of layers pruned at half the rate, for which the others compensate; only with scope ``layer``. In the
            paper it is the output layer.
        iterative: Whether every level prunes the trained weights of the previous level; otherwise each prunes the dense network
            at once.
        rewind: Epoch to which every level returns: its weights, momenta, learning rate and position in the data; 0 is the
            initialization. If `FitConfig.max_batches` is set, an epoch has that many steps.
        to: ``weights`` as above; ``learning-rate`` keeps the trained weights and repeats the training from that epoch on;
            ``fine-tune`` keeps them and trains equally long with a hundredth of the peak rate.
        noise: Whether every level has its own order of data; otherwise all use the order of the first.
        control: Control to train beside the ticket: ``reinit`` with other initial weights, ``shuffle`` with a mask of the same
            layer counts at other positions. The masks themselves come from training the true ticket.
    """

    train: FitConfig = field(default_factory=FitConfig)
    rate: float = 0.2
    half: tuple[str, ...] = ()
    iterative: bool = True
    rewind: int = 0
    to: Rewind = "weights"
    noise: bool = False
    control: Control = "none"

    def check_values(self) -> None:
        """Raises `BudgetError` for invalid combinations of levels, rewinding and controls."""
        if not 0 < self.rate < 1:
            raise BudgetError(f"rate is the fraction of the weights that a level removes, in (0, 1); got {self.rate}.")
        if not 0 <= self.rewind < max(1, self.train.epochs):
            raise BudgetError(
                f"rewind is an epoch of the training before its last, 0 to {self.train.epochs - 1}; got {self.rewind}."
            )
        if self.scope not in ("global", "layer") or (self.half and self.scope != "layer"):
            raise BudgetError(
                f"Tickets compete globally or by layer, and half a rate is one of layers; got scope {self.scope!r} and half "
                f"{list(self.half)}."
            )
        if self.control != "none" and self.to != "weights":
            raise BudgetError(
                f"The control {self.control!r} starts from rewound weights as tickets do, so that it needs to='weights'; got "
                f"{self.to!r}."
            )
        if self.train.distill:
            raise BudgetError("Tickets are trained like the dense network, without a teacher; set train.distill=0.")


@dataclass(frozen=True)
class Level:
    """One level of pruning, trained to its end.

    Attributes:
        name: Name of its stage.
        number: Number of the level; 0 is dense.
        masks: Masks of the kept weights.
        state: State of the finished training.
    """

    name: str
    number: int
    masks: MaskSet
    state: State

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the training, epoch by epoch."""
        return self.state["rows"]  # type: ignore[no-any-return]


class Tickets:
    """The levels of a search for tickets; each is a durable stage of a run and is never computed twice.

    Args:
        task: A task of an untrained network.
        run: The run that keeps the stages.
        config: See `LotteryConfig`.
        prefix: Prefix of the names of its stages, if one run holds searches with different rewind epochs. The dense training
            has no prefix: it ends with the same bits wherever it was split, so that all searches of a run share it.
    """

    def __init__(self, task: Task, run: Run, config: LotteryConfig, *, prefix: str = "") -> None:
        self.task, self.run, self.config, self.prefix = task, run, config, prefix
        self.model = task.build().to(run.device)
        self.pruner = Pruner(self.model, config, evidence=evidence(task, run, config))
        layers = self.pruner.layers
        mask(self.model, {n: torch.ones(layer.shape, dtype=torch.bool) for n, layer in layers.items()})
        check_selectors(layers, config.half)
        self.slow = [n for n, layer in layers.items() if config.half and matches(n, layer.module, config.half)]
        self.start = advance(
            task, run, f"{prefix}start", self.model, config.train, start=start_of(self.model), stop=config.rewind
        )

    def dense(self) -> Level:
        """Returns level 0: the whole network, trained to the end."""
        state = self._train(DENSE, self.start, seed=None)
        ones = {n: torch.ones(layer.shape, dtype=torch.bool) for n, layer in self.pruner.layers.items()}
        return Level(DENSE, 0, MaskSet(ones), state)

    def below(self, level: Level, number: int, *, keep: int | None = None) -> Level:
        """Returns the ticket of a level: its mask comes from another level's training; it is trained from the rewound state.

        Args:
            level: The level above, or the dense one.
            number: Number of the new level: (1 - rate)^number of the weights stay.
            keep: Number of weights to keep instead.
        """
        masks = self.masks_below(level, number, keep)
        name = f"{'level' if self.config.iterative else 'once'}-{number:02d}"
        return Level(name, number, masks, self._train(name, self._rewound(level, masks), self._noise(number)))

    def masks_below(self, level: Level, number: int, keep: int | None = None) -> MaskSet:
        """Returns the masks that keep the largest trained weights of a level; nested in its own."""
        restore(self.model, level.state["model"])
        if keep is None:
            keep = round(self.pruner.weights * (1 - self.config.rate) ** number)
        pruner = self.pruner
        values = pruner.score(self.model, pruner.layers, pruner.evidence)
        return pruner.select(values, keep, level.masks, self._densities(keep) if self.slow else None)

    def control(self, level: Level, kind: Control, draw: int = 0) -> Level:
        """Returns a control of a ticket, trained like it: other initial weights, or a mask at other positions.

        Args:
            level: The ticket.
            kind: Kind of the control.
            draw: Number of the random draw.
        """
        name, seed = f"{level.name}-{kind}-{draw}", self.run.seed * 1_009 + draw
        masks = level.masks
        if kind == "shuffle":
            layers = self.pruner.layers
            masks = MaskSet(oriented(layers, shuffled(oriented(layers, masks), self.pruner.pattern, seed)))
        begin = self.start
        if kind == "reinit":
            other = other_weights(self.task, seed).to(self.run.device)
            mask(other, masks)
            begin = start_of(other)
        state = self._train(name, with_masks(self.model, begin, masks), self._noise(level.number))
        return Level(name, level.number, masks, state)

    def told(self, level: Level) -> dict[str, Any]:
        """Returns the measurements of a level, computed once.

        These are its density, metrics at the ``end`` (a step), and the minimum of its validation loss.
        """
        done: dict[str, Any] = self.run.stage(f"{self._stage(level.name)}-told", lambda progress: self._look(level))
        return done

    def _look(self, level: Level) -> dict[str, Any]:
        restore(self.model, level.state["model"])
        steps = epoch_length(self.config.train, len(self.task.data.batches("train", self.config.train.batch_size)))
        seen = [row for row in level.rows if "validation_loss" in row]  # not every epoch and not every task has it
        best = min(seen, key=lambda row: row["validation_loss"], default=None)
        headline = f"validation_{self.task.headline}"
        return {
            "level": level.number,
            "kept": level.masks.kept,
            "density": level.masks.density,
            "end": steps * self.config.train.epochs,
            "test": evaluate(self.model, self.task, "test"),
            "train": evaluate(self.model, self.task, "train", limit=TRAIN_BATCHES),
            "early_stop": None if best is None else {"step": best["epoch"] * steps, headline: best[headline]},
        }

    def _densities(self, keep: int) -> dict[str, float]:
        """Returns the density of every layer if some are pruned at half the rate; together they give the kept number."""
        return slow_densities(
            {n: layer.raw.numel() for n, layer in self.pruner.layers.items()}, self.slow, keep, self.config.rate
        )

    def _noise(self, number: int) -> int | None:
        return self.run.seed + 7_919 * number if self.config.noise else None

    def _rewound(self, level: Level, masks: MaskSet) -> State:
        if self.config.to == "weights":
            return with_masks(self.model, self.start, masks)
        kept = {**level.state, "rows": self.start["rows"], "optimizers": self.start["optimizers"]}
        return fresh_optimizers(with_masks(self.model, kept, masks))

    def _train(self, name: str, start: State, seed: int | None) -> State:
        config = self.config.train
        if self.config.to == "fine-tune" and name != DENSE:
            config = replace(config, lr=config.lr * FINE_TUNE, schedule="constant", warmup_epochs=0.0)
        return advance(self.task, self.run, self._stage(name), self.model, config, start=start, seed=seed)

    def _stage(self, name: str) -> str:
        return name if name == DENSE else f"{self.prefix}{name}"


def slow_densities(sizes: Mapping[str, int], slow: Sequence[str], keep: int, rate: float) -> dict[str, float]:
    """Returns densities by layer that give the kept number, with some layers pruned at half the rate.

    Args:
        sizes: Weights of each layer.
        slow: Layers pruned at half the rate at every level; the number of levels follows from ``keep``.
        keep: Weights to keep in all.
        rate: Rate of a level.

    Raises:
        BudgetError: The slow layers hold more weights than ``keep``.
    """
    total = sum(sizes.values())
    passed = math.log(keep / total) / math.log(1 - rate)
    density = (1 - rate / 2) ** passed
    held = sum(round(density * sizes[name]) for name in slow)
    rest = total - sum(sizes[name] for name in slow)
    if not 0 < keep - held <= rest:
        raise BudgetError(
            f"When {keep:,} of {total:,} weights are left, the layers pruned at half the rate would hold {held:,} of them; "
            "choose fewer such layers, or end at a larger density."
        )
    return {name: density if name in slow else (keep - held) / rest for name in sizes}


def levels_to(weights: int, keep: int, rate: float) -> int:
    """Returns the minimum number of levels after which at most ``keep`` of ``weights`` remain."""
    return max(1, math.ceil(math.log(max(1, keep) / weights) / math.log(1 - rate) - 1e-9))


def check(task: Task, config: LotteryConfig) -> None:
    """Raises unless a task and a config of tickets fit each other."""
    refuse_trained(task, config)
    if not config.train.epochs:
        raise BudgetError("Tickets are found by training; got train.epochs=0.")
    pruner = Pruner(task.build(), config)
    slow = [n for n, layer in pruner.layers.items() if config.half and matches(n, layer.module, config.half)]
    if slow:  # only the last level shows whether it can be met
        slow_densities({n: layer.raw.numel() for n, layer in pruner.layers.items()}, slow, pruner.target, config.rate)
    if config.control == "reinit":
        other_weights(task, 0)


@method(
    "tickets",
    LotteryConfig,
    check=check,
    training=FitConfig(),
    paper="Frankle, Carbin 2019, arXiv 1803.03635",
    purpose="the study of lottery tickets",
)
def tickets(task: Task, run: Run, config: LotteryConfig) -> nn.Module:
    """Train, remove the smallest weights, go back, train again, level by level down to the density (lottery tickets, IMP)."""
    run.shared = None  # its dense network is trained by ``train``, not by ``dense`` as the one that runs share
    search = Tickets(task, run, config)
    level = dense = search.dense()
    _observe(search, dense, "dense")
    total, keep = search.pruner.weights, search.pruner.target
    numbers = range(1, levels_to(total, keep, config.rate) + 1)
    told = [search.told(dense)]
    for number in numbers if config.iterative else numbers[-1:]:
        level = search.below(level, number, keep=keep if number == numbers[-1] else None)
        told.append(search.told(level))
    if config.control != "none":
        level = search.control(level, config.control)
        told.append({**search.told(level), "control": config.control})
    run.observations["levels"] = {"rows": told}
    restore(search.model, level.state["model"])
    return search.model


def _observe(search: Tickets, level: Level, name: str) -> None:
    restore(search.model, level.state["model"])
    observe(search.task, search.run, name, fold(deepcopy(search.model)))


preset(
    "tickets-oneshot",
    "tickets",
    "Lottery tickets found in one step from the dense network.",
    iterative=False,
    paper="Frankle, Carbin 2019, arXiv 1803.03635",
    purpose="tickets in one round",
)
preset(
    "imp",
    "tickets",
    "Iterative magnitude pruning, weights rewound to epoch rewind (Frankle et al. 2020).",
    to="weights",
    paper="Frankle et al. 2020, arXiv 1912.05671",
    purpose="highest accuracy at high sparsity, at many trainings",
)
preset(
    "lr-rewinding",
    "tickets",
    "Iterative magnitude pruning, the learning rate rewound (Renda et al. 2020).",
    to="learning-rate",
    paper="Renda et al. 2020, arXiv 2003.02389",
    purpose="as imp, weights kept",
)
