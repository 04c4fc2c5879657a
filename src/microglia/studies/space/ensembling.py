"""Fast geometric ensembling: the networks that one run passes while its learning rate goes up and down, averaged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import to_device
from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.core.modes import evaluating
from microglia.core.progress import progress_bar
from microglia.storage.run import Progress
from microglia.tasks.task import Split, Task
from microglia.train.engine import accelerator
from microglia.train.fit import Row
from microglia.train.optim import FitConfig, epoch_batches, lay_out, make_optimizers, refuse_additions
from microglia.train.step import Step, clipped, objective

EXPECTED = "give the state_dict of the optimizer that trained this model."


@dataclass(frozen=True)
class Averaged:
    """The mean of the probabilities of several classifiers on one split, an immutable value.

    Attributes:
        total: Sum of the members' probabilities, float64 (examples, classes); None before the first.
        labels: Classes of the examples, (examples,).
        members: How many.
    """

    total: Tensor | None = None
    labels: Tensor | None = None
    members: int = 0

    def add(self, probabilities: Tensor, labels: Tensor) -> Averaged:
        """Returns the average with one member more."""
        total = probabilities if self.total is None else self.total + probabilities
        return Averaged(total, labels, self.members + 1)

    @property
    def accuracy(self) -> float:
        """Fraction of the examples whose class has the largest mean probability, in [0, 1].

        Raises:
            MicrogliaError: There are no members.
        """
        if self.total is None or self.labels is None:
            raise MicrogliaError("An ensemble needs at least one member; got none.")
        return float((self.total.argmax(1) == self.labels).double().mean())


@torch.no_grad()
def probabilities(
    model: nn.Module, task: Task, split: Split = "test", *, batch_size: int = 256, limit: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the softmax of a classifier's logits in evaluation mode, and the labels; its modes are left as they were.

    Args:
        model: Maps inputs to logits (batch, classes).
        task: Its data.
        split: Which part of them.
        batch_size: Examples in a forward pass.
        limit: Batches to look at, drawn by ``seed`` and the same ones as of `microglia.evaluate`; None for all.
        seed: See ``limit``.

    Returns:
        Probabilities, float64 (examples, classes), in which no two classes become equal that the logits tell apart; and
        labels, int64 (examples,). Both on the CPU.

    Raises:
        MicrogliaError: The task is no classification.
    """
    if "accuracy" not in task.metrics:
        raise MicrogliaError(f"{task.name} is no classification, and only probabilities of classes can be averaged.")
    device = device_of(model)
    found, labels = [], []
    batches = task.data.batches(split, batch_size, seed=seed, shuffle=limit is not None)
    with evaluating(model):
        for inputs, targets in islice(batches.epoch(0), limit):
            found.append(task.forward(model, to_device(inputs, device)).cpu().double().softmax(1))
            labels.append(targets)
    return torch.cat(found), torch.cat(labels)


@dataclass(frozen=True)
class Cycles:
    """How the learning rate goes up and down.

    Attributes:
        members: Cycles, each of which gives one member of the ensemble.
        length: Epochs of a cycle, even, so that its middle is the end of an epoch.
        high: Learning rate at the start and the end of a cycle, above 0.
        low: At its middle, in (0, high].
    """

    members: int = 3
    length: int = 2
    high: float = 0.05
    low: float = 0.01

    def __post_init__(self) -> None:
        if self.members < 1 or self.length < 2 or self.length % 2:
            raise MicrogliaError(
                f"There is at least 1 cycle of an even number of epochs; got {self.members} cycles of {self.length} epochs."
            )
        if not 0 < self.low <= self.high:
            raise MicrogliaError(f"The learning rates are 0 < low <= high; got low {self.low} and high {self.high}.")

    @property
    def epochs(self) -> int:
        """Epochs up to the last member; what follows the last middle would change nothing."""
        return self.members * self.length - self.length // 2

    def is_middle(self, epoch: int) -> bool:
        """Tells whether the middle of a cycle is the end of an epoch (counted from 0)."""
        return epoch % self.length + 1 == self.length // 2

    def rate(self, epoch: int, fraction: float) -> float:
        """Returns the learning rate after a fraction in [0, 1] of an epoch (counted from 0)."""
        return cyclic_rate((epoch % self.length + fraction) / self.length, self.high, self.low)


def cyclic_rate(u: float, high: float, low: float) -> float:
    """Returns the learning rate at u in [0, 1] of a cycle: from ``high`` straight to ``low`` at 1/2, and straight back.

    (1 - 2u) high + 2u low for u < 1/2, (2 - 2u) low + (2u - 1) high after.

    Source: Garipov et al. 2018, section 4.
    """
    if u < 0.5:
        return (1 - 2 * u) * high + 2 * u * low
    return (2 - 2 * u) * low + (2 * u - 1) * high


def fast_ensemble(
    model: nn.Module,
    task: Task,
    config: FitConfig,
    cycles: Cycles,
    *,
    optimizer: Mapping[str, Any] | None = None,
    split: Split = "test",
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[list[Row], Averaged]:
    """Trains a network on, in place, and averages the probabilities that it gives at the middle of every cycle.

    Batch norm is trained with it, so its statistics are those of each member. The model ends as the last member.

    Source: Garipov et al. 2018, section 4 and algorithm 1: fast geometric ensembling.

    Args:
        model: Trained for about 80 % of a usual training; masks stay.
        task: Data and training loss; a classification.
        config: Optimizer, batches, ``momentum``, ``weight_decay``, ``clip`` and ``precision``; the learning rates and epochs
            are those of ``cycles``.
        cycles: See `Cycles`.
        optimizer: State (``state_dict``) of the optimizer that trained the model so far; its momentum goes on.
        split: On which members are measured.
        seed: Root of the order of the data.
        device: See `microglia.train.engine.accelerator`.
        progress: Where an interrupted ensembling goes on, epoch by epoch.

    Returns:
        One row per member (``member``, ``epoch``, ``accuracy`` of it alone, ``ensemble`` of all so far), and the average.

    Raises:
        MicrogliaError: The task is no classification, or the state is of another optimizer.
        TrainingError: The loss is not finite.
    """
    refuse_additions(config, "A fast ensemble")
    model.to(accelerator(device).device)
    training = _Cycling(model, task, config, cycles, seed=seed, optimizer=optimizer)
    rows, average, start = training.resume(progress)
    with torch.random.fork_rng(), progress_bar("ensemble", total=cycles.epochs, done=start) as bar:
        for epoch in range(start, cycles.epochs):
            began = time.perf_counter()
            torch.manual_seed(seed * 1_000_003 + epoch)  # dropout and the like
            loss = training.epoch(epoch)
            if cycles.is_middle(epoch):
                found = probabilities(model, task, split)
                average = average.add(*found)
                row = {"member": average.members, "epoch": epoch + 1, "loss": loss, "accuracy": Averaged().add(*found).accuracy}
                rows.append(row | {"ensemble": average.accuracy, "seconds": round(time.perf_counter() - began, 3)})
            if progress is not None:
                progress.save(training.state(rows, average, epoch + 1))
            bar.advance()
    return rows, average


class _Cycling:
    """The state of a training in cycles: model, optimizer, batches."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: FitConfig,
        cycles: Cycles,
        *,
        seed: int,
        optimizer: Mapping[str, Any] | None,
    ) -> None:
        self._model, self._config, self._cycles, self._device = model, config, cycles, device_of(model)
        self._batches = task.data.batches("train", config.batch_size, seed=seed, shuffle=True, augment=True)
        (self._optimizer,) = make_optimizers(config, [{"params": [p for p in model.parameters() if p.requires_grad]}])
        self._step = Step(
            task,
            model,
            [self._optimizer],
            objective(task),
            self._device,
            config.precision,
            clip=clipped(model.parameters, config.clip),
        )
        if optimizer is not None:
            self._go_on_with(optimizer)

    def _go_on_with(self, state: Mapping[str, Any]) -> None:
        groups = self._optimizer.state_dict()["param_groups"]
        try:
            self._optimizer.load_state_dict(dict(state))
        except (KeyError, ValueError) as error:
            raise MicrogliaError(f"The optimizer's state does not fit the model ({error}); {EXPECTED}") from error
        for parameter, held in self._optimizer.state.items():
            for value in held.values():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise MicrogliaError(
                        f"The optimizer's state does not fit the model (it has {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}); {EXPECTED}"
                    )
        for group, own in zip(self._optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})  # what the config says holds
        lay_out(self._optimizer)

    def epoch(self, epoch: int) -> float:
        """Trains one epoch; returns the mean loss over its batches."""
        self._model.train()
        length, total = epoch_batches(self._config, len(self._batches)), 0.0
        for number, batch in enumerate(islice(self._batches.epoch(epoch), length)):
            rate = self._cycles.rate(epoch, number / length)
            diverged = f"The loss became {{loss}} in epoch {epoch + 1} (learning rate {rate:.4g}); try smaller ones."
            total += float(self._step(batch, rate=rate, diverged=diverged))
        return total / max(1, length)

    def state(self, rows: list[Row], average: Averaged, epochs: int) -> dict[str, Any]:
        """Returns what is needed to go on."""
        own = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        return own | {"rows": rows, "epochs": epochs, "average": [average.total, average.labels, average.members]}

    def resume(self, progress: Progress | None) -> tuple[list[Row], Averaged, int]:
        """Goes on from a state, if there is one; returns (rows, average, epochs done)."""
        if progress is None or progress.state is None:
            return [], Averaged(), 0
        state = progress.state
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        lay_out(self._optimizer)
        return list(state["rows"]), Averaged(*state["average"]), state["epochs"]
