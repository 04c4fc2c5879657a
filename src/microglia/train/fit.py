"""The training loop: easy to read, and resumable bit for bit."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from microglia.core.callbacks import Callback, Callbacks
from microglia.core.errors import TrainingError
from microglia.core.progress import Bar, progress_bar
from microglia.storage.run import Progress
from microglia.tasks.task import Batches, Task
from microglia.train.average import MovingAverage
from microglia.train.engine import OneProcess, accelerator, rank_and_world
from microglia.train.evaluate import evaluate
from microglia.train.groups import parameter_groups, plain_name
from microglia.train.optim import FitConfig, epoch_batches, epoch_length, lay_out, make_optimizers, set_rates
from microglia.train.protocols import Optimizing, Pruner, Replacing
from microglia.train.step import Step, clipped, objective, require_finite

if TYPE_CHECKING:
    from accelerate import Accelerator

Row = dict[str, Any]
FEW = 10
"""Below this number of optimizer steps per epoch, accumulation gives a warning."""


def fit(
    model: nn.Module,
    task: Task,
    config: FitConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    pruner: Pruner | None = None,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
    log: Callable[[list[Row]], None] | None = None,
    title: str = "training",
    stop: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[Row]:
    """Trains a model in place and returns one row per epoch (loss, learning rate, validation metrics, seconds).

    With ``config.ema`` the final model is the moving average of its weights, and validation uses this average. Rows have no
    validation metrics for epochs that ``config.evaluate_every`` skips, and for tasks without a validation split.

    Order, augmentation and dropout of an epoch depend only on (seed, epoch), and the learning rate only on the step. So a loop
    that resumes from ``progress`` ends with the same bits on the same machine. Several ranks share each batch.

    Args:
        model: Dense or masked; masked weights stay 0.
        task: Data, loss and metrics.
        config: How to train.
        seed: Root of the randomness.
        device: See `microglia.train.engine.accelerator`.
        pruner: Called after every optimizer step, or in its place (see `Replacing`).
        teacher: Dense model to distil from if ``config.distill`` > 0.
        progress: State to resume an interrupted training from; each finished epoch is saved to it.
        log: Called with all rows after every epoch.
        title: Text of the progress bar.
        stop: Epoch after which to stop, with the learning rates of the whole training; None for its end.
        callbacks: Told of the beginning, each epoch and the end, under the name ``title``; an error of one ends the training.

    Raises:
        TrainingError: An argument is of the wrong kind; or the loss is not finite, and the model is as before that step.
    """
    _check_arguments(model, task, config)
    engine = accelerator(device)
    trained, steps = _prepared(model, task, config, engine, seed=seed, pruner=pruner, teacher=teacher)
    rows = trained.resume(progress)
    end = config.epochs if stop is None else min(stop, config.epochs)
    told = Callbacks(callbacks)
    told.on_stage(title, "resumed" if rows else "began", len(rows))
    with torch.random.fork_rng(), progress_bar(title, total=end * steps.length, done=len(rows) * steps.length) as bar:
        for epoch in range(len(rows), end):
            began = time.perf_counter()
            torch.manual_seed(seed * 1_000_003 + epoch)  # for dropout and similar randomness
            steps.step.model.train()
            rows.append(trained.row(task, config, epoch, steps.epoch(epoch, bar)))
            rows[-1]["seconds"] = round(time.perf_counter() - began, 3)
            bar.say(_headline(task, rows[-1]))
            trained.keep(rows, log, progress)
            told.on_epoch(title, rows[-1])
    trained.finish(engine, whole=end == config.epochs)
    told.on_stage(title, "finished")
    return rows


@dataclass(frozen=True)
class _Trained:
    """All that a training changes and its state holds."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    pruner: Pruner | None
    average: MovingAverage | None
    grouped: bool

    def resume(self, progress: Progress | None) -> list[Row]:
        """Resumes from a state, if there is one; returns the rows of the finished epochs."""
        if progress is None or progress.state is None:
            return []
        state = progress.state
        if self.pruner is not None:  # first, because its masks may have other names in a later phase
            self.pruner.load_state_dict(state["pruner"])
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            lay_out(optimizer)
        if self.average is not None and "average" in state:
            self.average.load_state_dict(state["average"])
        return list(state["rows"])

    def keep(self, rows: list[Row], log: Callable[[list[Row]], None] | None, progress: Progress | None) -> None:
        """Writes the rows, then the state: a run killed in between repeats the epoch and its row."""
        if log is not None:
            log(rows)
        if progress is not None:
            progress.save(self.state(rows))

    def state(self, rows: list[Row]) -> dict[str, Any]:
        """Returns the state to resume from."""
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers], "rows": rows}
        if self.grouped:  # the optimizer orders the parameters differently from the model
            names = {id(p): plain_name(name) for name, p in self.model.named_parameters()}
            own = (p for group in self.optimizers[0].param_groups for p in group["params"])
            state["parameters"] = [names[id(p)] for p in own if id(p) in names]
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state | ({"pruner": self.pruner.state_dict()} if self.pruner is not None else {})

    def finish(self, engine: Accelerator | OneProcess, *, whole: bool) -> None:
        """Puts the averaged weights, if there are any, into the model at the end of the whole training; frees memory."""
        if self.average is not None and whole:
            self.average.put()
        if rank_and_world()[1] > 1:
            engine.free_memory()

    def row(self, task: Task, config: FitConfig, epoch: int, mean: float) -> Row:
        """Returns the row of a finished epoch; validation metrics use the averaged weights if there are any."""
        row = {"epoch": epoch + 1, "loss": mean, "lr": self.optimizers[0].param_groups[0]["lr"]}
        if (epoch + 1) % config.evaluate_every and epoch + 1 != config.epochs:
            return row
        with self.average.in_place() if self.average is not None else nullcontext():
            return row | {f"validation_{k}": v for k, v in evaluate(self.model, task, "validation").items()}


def _trained(
    model: nn.Module, task: Task, config: FitConfig, pruner: Pruner | None, engine: Accelerator | OneProcess
) -> tuple[nn.Module, _Trained]:
    """Returns the model to call in steps, and the trained state: optimizers over its groups, perhaps an average."""
    own = pruner.param_groups() if pruner is not None else []
    theirs = {id(p) for group in own for p in group["params"]}  # these may be part of the model
    wrapped = engine.prepare(model) if rank_and_world()[1] > 1 else model.to(engine.device)
    asked = task.groups(model) if task.groups is not None else []
    groups = parameter_groups(model, asked, config.no_decay, theirs)
    further: list[torch.optim.Optimizer] = pruner.optimizers() if isinstance(pruner, Optimizing) else []
    optimizers = make_optimizers(config, [*groups, *([] if further else own)], further)
    average = None if config.ema is None else MovingAverage(model, config.ema, config.ema_ramp, theirs)
    return wrapped, _Trained(model, optimizers, pruner, average, grouped=bool(asked or config.no_decay))


def _prepared(
    model: nn.Module,
    task: Task,
    config: FitConfig,
    engine: Accelerator,
    *,
    seed: int,
    pruner: Pruner | None,
    teacher: nn.Module | None,
) -> tuple[_Trained, _Steps]:
    """Returns what the training changes, and the steps over the batches of an epoch."""
    rank, world = rank_and_world()
    batches = task.data.batches("train", config.batch_size, seed=seed, shuffle=True, augment=True, rank=rank, world=world)
    wrapped, trained = _trained(model, task, config, pruner, engine)
    loss = objective(task, teacher=teacher, weight=config.distill, temperature=config.temperature)
    clip = clipped(wrapped.parameters, config.clip, by=engine.clip_grad_norm_)
    step = Step(task, wrapped, trained.optimizers, loss, engine.device, config.precision, engine.backward, clip)
    _warn_of_few(config, len(batches))
    return trained, _Steps(step, batches, config, pruner, trained.average)


def _headline(task: Task, row: Row) -> str:
    """Returns the headline of an epoch in words, empty without an evaluation."""
    value = row.get(f"validation_{task.headline}")
    return "" if value is None else f"{task.headline} {value:.4f}"


def _warn_of_few(config: FitConfig, batches: int) -> None:
    length = epoch_length(config, batches)
    if config.batches_per_step > 1 and length < FEW:
        warnings.warn(
            f"With {config.batches_per_step} batches per optimizer step (accumulate, nominal_batch) an epoch of {batches} "
            f"batches has {length} optimizer steps; take smaller batches or more epochs.",
            stacklevel=4,
        )


def _check_arguments(model: object, task: object, config: object) -> None:
    for name, value, kind, hint in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("task", task, Task, "a Task, such as mg.tasks.image_task('resnet20', 'cifar10')"),
        ("config", config, FitConfig, "a FitConfig, such as mg.FitConfig(epochs=3)"),
    ):
        if not isinstance(value, kind):
            raise TrainingError(f"The {name} of fit is {hint}; got {value!r}.")


@dataclass(frozen=True)
class _Steps:
    """All that one epoch of optimizer steps needs."""

    step: Step
    batches: Batches
    config: FitConfig
    pruner: Pruner | None
    average: MovingAverage | None

    @property
    def length(self) -> int:
        """Optimizer steps of an epoch."""
        return epoch_length(self.config, len(self.batches))

    def epoch(self, epoch: int, bar: Bar) -> float:
        """Trains one epoch; returns the mean loss over its batches."""
        total = torch.zeros((), device=self.step.device)
        count = epoch_batches(self.config, len(self.batches))
        length, many = self.length, self.config.batches_per_step
        for number, batch in enumerate(islice(self.batches.epoch(epoch), count)):
            index, place = divmod(number, many)
            together = min(many, count - index * many)  # the last step of an epoch may have fewer batches
            if place == 0:
                lr = set_rates(self.step.optimizers, self.config, epoch * length + index, length)
            total += self._accumulate(
                batch, place, together, f"in epoch {epoch + 1}, step {index + 1} (learning rate {lr:.4g})"
            )
            if place + 1 == together:
                self._act()
                bar.advance()
        _, world = rank_and_world()
        if world > 1:
            torch.distributed.all_reduce(total)
        return float(total / world / max(1, count))

    def _accumulate(self, batch: tuple[Any, Any], place: int, together: int, where: str) -> Tensor:
        """Adds the gradient of one batch, with its weight, to the gradient of its step; returns its loss."""
        step = self.step
        diverged = (
            f"The loss became {{loss}} {where}. The state of the last finished epoch is kept; try a smaller lr, a warm-up or "
            "clip=1.0, in a new directory."
        )
        # Some penalties depend on the last forward pass, so each batch has its own penalty, like its own loss.
        value = require_finite(step.loss_of(*batch, None if self.pruner is None else self.pruner.penalty), diverged)
        value = value * _share(step.task.count(batch[1]), step.device)
        if place == 0:
            step.clear()
        step.backward(value if together == 1 else value / together)
        return value.detach()

    def _act(self) -> None:
        """Takes the step along the current gradients."""
        self.step.act(rest=lambda: _replaces_step(self.pruner))
        if self.pruner is not None:
            self.pruner.step(self.step.optimizers[0])
        if self.average is not None:
            self.average.update()


def _replaces_step(pruner: object) -> bool:
    return isinstance(pruner, Replacing) and pruner.replaces_step()


def _share(examples: int, device: torch.device) -> Tensor | float:
    """Returns the factor that turns DDP's plain mean over ranks into the mean over examples."""
    _, world = rank_and_world()
    if world == 1:
        return 1.0
    everyone = torch.tensor(float(examples), device=device)
    torch.distributed.all_reduce(everyone)
    return examples * world / everyone
