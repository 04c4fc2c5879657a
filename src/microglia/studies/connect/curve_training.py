"""Training of a curve between two solutions: a random place of it at every step, and the bends moved by the gradient there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.core.progress import Bar, progress_bar
from microglia.storage.run import Progress
from microglia.studies.space.curves import Curve
from microglia.studies.space.points import Point, check_alike, visiting
from microglia.tasks.task import Task
from microglia.train.engine import accelerator
from microglia.train.fit import Row
from microglia.train.optim import FitConfig, epoch_batches, lay_out, make_optimizers, refuse_additions
from microglia.train.step import Step, clipped, objective


def learning_rate(base: float, progress: float) -> float:
    """Returns the learning rate at a fraction of the training: ``base`` up to 0.5, linear to 1 % of it at 0.9, then 1 %.

    Source: the reference code of Garipov et al. 2018, for ends and curves.
    """
    fallen = min(1.0, max(0.0, (progress - 0.5) / 0.4))
    return base * (1 - 0.99 * fallen)


def train_curve(
    model: nn.Module,
    task: Task,
    curve: Curve,
    config: FitConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    masks: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    log: Callable[[list[Row]], None] | None = None,
    title: str = "curve",
) -> tuple[Curve, list[Row]]:
    """Trains the inner points of a curve; returns the trained curve and one row per epoch (loss, learning rate, seconds).

    Minimizes E_t[L(phi(t)) + wd/2 ||phi(t)||^2] for t uniform in (0, 1), one t for each batch; batch norm uses the statistics
    of the batch. The ends do not move. Order and augmentation of an epoch depend on (seed, epoch) alone, so a training that
    goes on from ``progress`` ends in the same bits on the same machine.

    Source: Garipov et al. 2018, equation 2 and algorithm of section 3.2.

    Args:
        model: A network of the curve's architecture, without masks (`microglia.fold`); it is visited and left as it was.
        task: Data and loss to train with.
        curve: Where to start, such as `on_line`.
        config: Optimizer, ``lr``, ``epochs``, batches, ``momentum``, ``clip``, ``precision``; ``weight_decay`` acts on phi(t).
            The learning rate follows the curve's own schedule, `learning_rate`: ``schedule``, ``warmup_epochs`` and
            ``distill`` are not looked at.
        seed: Root of the randomness.
        device: See `microglia.train.engine.accelerator`.
        masks: By parameter name, true = keep, that both ends obey; then every place of the curve obeys them too.
        progress: Where an interrupted training goes on and saves each finished epoch.
        log: Called with all rows after every epoch.
        title: Title of the progress bar.

    Raises:
        MicrogliaError: The model is of another architecture, the curve has no bends, or an end has weights outside the masks.
        TrainingError: The loss is not finite.
    """
    check_alike(dict(model.named_parameters()), curve.points[0])
    _check(curve, masks or {})
    refuse_additions(config, "A curve")
    with _on(model, accelerator(device).device), visiting(model), torch.random.fork_rng():
        training = _Training(model, task, curve, config, masks=masks or {}, seed=seed)
        rows = training.resume(progress)
        length = epoch_batches(config, len(training.batches))
        with progress_bar(title, total=config.epochs * length, done=len(rows) * length) as bar:
            for epoch in range(len(rows), config.epochs):
                torch.manual_seed(seed * 1_000_003 + epoch)  # dropout and the like
                rows.append(training.epoch(epoch, bar))
                bar.say(f"loss {rows[-1]['loss']:.4f}")
                if log is not None:  # before the state: a run killed in between repeats the epoch, and its row
                    log(rows)
                if progress is not None:
                    progress.save(training.state(rows))
        return training.curve(), rows


@contextmanager
def _on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Runs its body with the model on a device, and puts it back where it was."""
    home = device_of(model)
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@dataclass
class Places:
    """The control points of a curve as lists of tensors in the order of a model's parameters, and the rule of the gradient.

    The model's parameters hold phi(t) while a step lasts. This is faster than autograd through the sum (a quarter less time
    for small networks), for the rule is simple: the gradient of p_j is c_j(t) times that of phi(t).

    Attributes:
        live: The model's parameters; of those that want no gradient it is 0, so that they stay on the first curve.
        points: p_0 ... p_n, each with tensors like ``live``.
        weight_decay: wd of the penalty wd/2 ||phi(t)||^2.
    """

    live: Sequence[nn.Parameter]
    points: Sequence[Sequence[Tensor]]
    weight_decay: float = 0.0

    @torch.no_grad()
    def visit(self, coefficients: Sequence[float]) -> None:
        """Writes phi(t) = sum_j c_j(t) p_j into the model."""
        total = [torch.zeros_like(parameter) for parameter in self.live]
        for point, coefficient in zip(self.points, coefficients, strict=True):
            if coefficient:
                torch._foreach_add_(total, list(point), alpha=coefficient)
        torch._foreach_copy_(list(self.live), total)

    def gradients(self, loss: Tensor, coefficients: Sequence[float]) -> list[list[Tensor]]:
        """Returns the gradients of the inner points at the visited place: c_j(t) (dL/dphi + wd phi).

        Args:
            loss: L(phi(t)), with its graph; the penalty is not in it.
            coefficients: c_0(t) ... c_n(t).
        """
        trained = [parameter for parameter in self.live if parameter.requires_grad]
        found = iter(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))
        with torch.no_grad():
            here = [
                torch.zeros_like(parameter) for parameter in self.live
            ]  # in the layout of the weights, unlike what is found
            for value, parameter in zip(here, self.live, strict=True):
                if parameter.requires_grad:
                    value.add_(next(found)).add_(parameter, alpha=self.weight_decay)
            return [list(torch._foreach_mul(here, coefficient)) for coefficient in coefficients[1:-1]]


class _Training:
    """The state of one training of a curve: inner points, optimizer, generator of t."""

    def __init__(
        self, model: nn.Module, task: Task, curve: Curve, config: FitConfig, *, masks: Mapping[str, Tensor], seed: int
    ) -> None:
        own = dict(model.named_parameters())
        self._model, self._start, self._config, self._names = model, curve, config, list(own)
        self._device = device_of(model)
        self._masks = [masks[name].bool().to(self._device) if name in masks else None for name in own]
        points = [[_like(p, point[name]) for name, p in own.items()] for point in curve.points]
        self._places = Places(list(own.values()), points, config.weight_decay)
        self._inner = points[1:-1]
        for point in self._inner:
            self._mask(point)
        groups = [{"params": [tensor for point in self._inner for tensor in point]}]
        # The decay is that of phi(t), in the gradient; of the inner points themselves there is none.
        self._optimizers = make_optimizers(replace(config, weight_decay=0.0), groups)
        self._coefficients: Sequence[float] = ()
        self._step = Step(
            task,
            model,
            self._optimizers,
            objective(task),
            self._device,
            config.precision,
            backward=self._leave_gradients,
            clip=clipped(lambda: [tensor for point in self._inner for tensor in point], config.clip),
        )
        self._generator = torch.Generator().manual_seed(seed)
        self.batches = task.data.batches("train", config.batch_size, seed=seed, shuffle=True, augment=True)

    def epoch(self, epoch: int, bar: Bar) -> Row:
        """Trains one epoch; returns its row."""
        began = time.perf_counter()
        self._model.train()
        length = epoch_batches(self._config, len(self.batches))
        total, rate = torch.zeros((), device=self._device), self._config.lr
        for number, batch in enumerate(islice(self.batches.epoch(epoch), length)):
            rate = learning_rate(self._config.lr, (epoch * length + number) / (self._config.epochs * length))
            self._visit()
            diverged = (
                f"The loss on the curve became {{loss}} in epoch {epoch + 1}, step {number + 1} (learning rate {rate:.4g}). "
                "The state of the last finished epoch is kept; try a smaller lr, in a new directory."
            )
            total += self._step(batch, rate=rate, diverged=diverged)
            bar.advance()
        seconds = round(time.perf_counter() - began, 3)
        return {"epoch": epoch + 1, "loss": float(total / max(1, length)), "lr": rate, "seconds": seconds}

    def _visit(self) -> None:
        """Draws a place of the curve and writes phi(t) into the model."""
        t = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        self._coefficients = self._start.kind.coefficients(t)
        self._places.visit(self._coefficients)

    def _leave_gradients(self, loss: Tensor) -> None:
        """Leaves the gradients of the inner points, within the masks, in their ``grad``."""
        for point, gradient in zip(self._inner, self._places.gradients(loss, self._coefficients), strict=True):
            self._mask(gradient)
            for tensor, value in zip(point, gradient, strict=True):
                tensor.grad = value

    def _mask(self, tensors: Sequence[Tensor]) -> None:
        """Sets what lies outside the masks to 0, in place."""
        for tensor, mask in zip(tensors, self._masks, strict=True):
            if mask is not None:
                tensor.masked_fill_(~mask, 0.0)

    def curve(self) -> Curve:
        """Returns the curve as it is trained by now, on the devices where its points were."""
        inner = []
        for before, tensors in zip(self._start.inner, self._inner, strict=True):
            named = zip(self._names, tensors, strict=True)
            inner.append({name: tensor.to(before[name], copy=True) for name, tensor in named})
        return self._start.with_inner(inner)

    def state(self, rows: list[Row]) -> dict[str, Any]:
        """Returns what is needed to go on."""
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        return {"inner": self._inner, "optimizers": optimizers, "generator": self._generator.get_state(), "rows": rows}

    def resume(self, progress: Progress | None) -> list[Row]:
        """Goes on from a state, if there is one; returns the rows of the finished epochs."""
        if progress is None or progress.state is None:
            return []
        state = progress.state
        for point, saved in zip(self._inner, state["inner"], strict=True):
            for tensor, value in zip(point, saved, strict=True):
                tensor.copy_(value)
        for optimizer, own in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            lay_out(optimizer)
        self._generator.set_state(state["generator"])
        return list(state["rows"])


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """Returns a copy of a value with the layout, device and type of a tensor."""
    return torch.empty_like(tensor, requires_grad=False).copy_(value)


def _check(curve: Curve, masks: Mapping[str, Tensor]) -> None:
    if not curve.inner:
        raise MicrogliaError(f"{curve.kind} has no points between its ends to train; give a curve with at least one bend.")
    for name, mask in masks.items():
        for which, end in (("start", curve.points[0]), ("end", curve.points[-1])):
            _check_mask(name, mask, which, end)


def _check_mask(name: str, mask: Tensor, which: str, end: Point) -> None:
    if name not in end or end[name].shape != mask.shape:
        raise MicrogliaError(
            f"There is a mask for {name!r} of shape {tuple(mask.shape)}, and the curve has no such parameter; give masks by "
            "parameter name, each of its parameter's shape."
        )
    if outside := int((end[name] * ~mask.bool().to(end[name].device)).count_nonzero()):
        raise MicrogliaError(
            f"The {which} of the curve has {outside} weights of {name!r} outside the mask, so the curve cannot keep to it. "
            "Give two networks pruned with the same masks and folded (microglia.fold), or no masks."
        )
