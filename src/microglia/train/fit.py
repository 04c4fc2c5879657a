"""The training loop, plain to read and resumable to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from microglia.core.errors import TrainingError
from microglia.storage.run import Progress
from microglia.tasks.task import Batches, Task
from microglia.train.engine import accelerator, rank_and_world
from microglia.train.evaluate import evaluate
from microglia.train.optim import FitConfig, epoch_length, lay_out, learning_rate, make_optimizers
from microglia.train.progress import Bar
from microglia.train.recover import distillation

if TYPE_CHECKING:
    from accelerate import Accelerator

Row = dict[str, Any]


class Pruner(Protocol):
    """What the loop asks of a pruner; see `microglia.methods.pruner.Pruner`."""

    def penalty(self) -> Tensor | float:
        """Returns what is added to the loss."""
        ...

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Acts after an optimizer step."""
        ...

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns optimizer groups of the pruner's own parameters.

        A group may ask for its own ``optimizer`` (``sgd``, ``adam``, ``adamw``) and its own ``constant_lr``.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns what is needed to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state."""
        ...


@runtime_checkable
class Replacing(Protocol):
    """A pruner that at some steps acts instead of the optimizers, as RigL does; others need not say that they never do."""

    def replaces_step(self) -> bool:
        """Tells, after the backward pass, whether the optimizers rest at this step."""
        ...


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
) -> list[Row]:
    """Trains a model in place and returns one row per epoch (loss, learning rate, validation metrics, seconds).

    Order, augmentation and dropout of an epoch depend on (seed, epoch) alone and the learning rate on the step alone, so
    a loop that goes on from ``progress`` ends in the same bits on the same machine. Several ranks share each batch.

    Args:
        model: Dense or masked; masked weights stay 0.
        task: Data, loss and metrics.
        config: How to train.
        seed: Root of the randomness.
        device: See `microglia.train.engine.accelerator`.
        pruner: Stepped after every optimizer step, or in its place (see `Replacing`).
        teacher: Dense model to distil from where ``config.distill`` > 0.
        progress: Where an interrupted training goes on and saves each finished epoch.
        log: Called with all rows after every epoch.
        title: What the progress bar says.
        stop: Epoch after which to stop, the learning rates being those of the whole training; None for its end.

    Raises:
        TrainingError: An argument is no model, task or config; or the loss is not finite, and the model
            holds the weights before that step.
    """
    _check_arguments(model, task, config)
    engine = accelerator(device)
    rank, world = rank_and_world()
    batches = task.data.batches("train", config.batch_size, seed=seed, shuffle=True, augment=True, rank=rank, world=world)
    own = pruner.param_groups() if pruner is not None else []
    theirs = {id(p) for group in own for p in group["params"]}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in theirs]  # theirs may live in the model
    wrapped = engine.prepare(model) if world > 1 else model.to(engine.device)
    optimizers = make_optimizers(config, [{"params": parameters}, *own])
    start, rows = _resume(model, optimizers, pruner, progress)
    loss = _loss(task, config, teacher)
    length = epoch_length(config, len(batches))
    end = config.epochs if stop is None else min(stop, config.epochs)
    with torch.random.fork_rng(), Bar(title, total=end * length, done=start * length) as bar:
        for epoch in range(start, end):
            began = time.perf_counter()
            torch.manual_seed(seed * 1_000_003 + epoch)  # dropout and the like
            wrapped.train()
            steps = _Steps(engine, wrapped, optimizers, batches, loss, config, pruner)
            mean = steps.epoch(epoch, bar)
            row = {"epoch": epoch + 1, "loss": mean, "lr": optimizers[0].param_groups[0]["lr"]}
            row |= {f"validation_{k}": v for k, v in evaluate(model, task, "validation").items()}
            rows.append(row | {"seconds": round(time.perf_counter() - began, 3)})
            bar.say(f"{task.headline} {row[f'validation_{task.headline}']:.4f}")
            if log is not None:  # before the state: a run killed in between repeats the epoch, and its row
                log(rows)
            _save(model, optimizers, pruner, progress, rows)
    if world > 1:
        engine.free_memory()
    return rows


def _check_arguments(model: object, task: object, config: object) -> None:
    for name, value, kind, hint in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("task", task, Task, "a Task, such as mg.image_task('resnet20', 'cifar10')"),
        ("config", config, FitConfig, "a FitConfig, such as mg.FitConfig(epochs=3)"),
    ):
        if not isinstance(value, kind):
            raise TrainingError(f"The {name} of fit is {hint}; got {value!r}.")


@dataclass(frozen=True)
class _Steps:
    """Everything one epoch of optimizer steps needs."""

    engine: Accelerator
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    batches: Batches
    loss: Callable[[Any, Any, Any], Tensor]
    config: FitConfig
    pruner: Pruner | None

    def epoch(self, epoch: int, bar: Bar) -> float:
        """Trains one epoch; returns the mean loss over the batches it took."""
        device = self.engine.device
        total = torch.zeros((), device=device)
        length = epoch_length(self.config, len(self.batches))
        for number, (inputs, targets) in enumerate(islice(self.batches.epoch(epoch), length)):
            inputs, targets = inputs.to(device), targets.to(device)  # noqa: PLW2901
            lr = learning_rate(self.config, epoch * length + number, length)
            for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
                group["lr"] = group.get("constant_lr", lr)
            value = self._loss(inputs, targets)
            if not torch.isfinite(value):
                raise TrainingError(
                    f"The loss became {value.item()} in epoch {epoch + 1}, step {number + 1} (learning rate {lr:.4g}). The "
                    "state of the last finished epoch is kept; try a smaller lr, a warm-up or clip=1.0, in a new directory."
                )
            value = value * _share(len(targets), device)
            self._descend(value)
            total += value.detach()
            bar.advance()
        _, world = rank_and_world()
        if world > 1:
            torch.distributed.all_reduce(total)
        return float(total / world / max(1, length))

    def _loss(self, inputs: Tensor, targets: Any) -> Tensor:
        bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=bfloat16):
            value = self.loss(self.model(inputs), targets, inputs)
        return value if self.pruner is None else value + self.pruner.penalty()

    def _descend(self, value: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.engine.backward(value)
        if self.config.clip is not None:
            self.engine.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if not _replaces_step(self.pruner):
            for optimizer in self.optimizers:
                optimizer.step()
        if self.pruner is not None:
            self.pruner.step(self.optimizers[0])


def _replaces_step(pruner: object) -> bool:
    return isinstance(pruner, Replacing) and pruner.replaces_step()


def _share(examples: int, device: torch.device) -> Tensor | float:
    """Returns the factor that makes DDP's plain mean over ranks the mean over examples."""
    _, world = rank_and_world()
    if world == 1:
        return 1.0
    everyone = torch.tensor(float(examples), device=device)
    torch.distributed.all_reduce(everyone)
    return examples * world / everyone


def _loss(task: Task, config: FitConfig, teacher: nn.Module | None) -> Callable[[Any, Any, Any], Tensor]:
    plain = task.training_loss or task.loss
    if config.distill and teacher is not None:
        return distillation(plain, teacher, weight=config.distill, temperature=config.temperature)
    return lambda outputs, targets, inputs: plain(outputs, targets)


def _resume(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], pruner: Pruner | None, progress: Progress | None
) -> tuple[int, list[Row]]:
    if progress is None or progress.state is None:
        return 0, []
    state = progress.state
    if pruner is not None:  # first: its masks may have other names in a later phase
        pruner.load_state_dict(state["pruner"])
    model.load_state_dict(state["model"])
    for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(own)
        lay_out(optimizer)
    return len(state["rows"]), list(state["rows"])


def _save(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    pruner: Pruner | None,
    progress: Progress | None,
    rows: list[Row],
) -> None:
    if progress is not None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "rows": rows}
        progress.save(state | ({"pruner": pruner.state_dict()} if pruner is not None else {}))
