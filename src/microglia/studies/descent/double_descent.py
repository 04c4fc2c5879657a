"""Double descent of networks: test error over width or over the number of samples, all trained for the same steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from microglia.core.devices import device_of
from microglia.core.errors import MicrogliaError
from microglia.data import ImageData
from microglia.storage.run import Progress, Run
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import CLASSIFICATION, CrossEntropy, Task
from microglia.train.evaluate import evaluate
from microglia.train.step import Step, objective
from microglia.zoo import build

Row = dict[str, Any]
Shape = tuple[int, int, int]
Schedule = Literal["constant", "root"]
SUBSETS = 1_000_003
"""Added to the seed of a draw of images."""
SAVED = 500
"""Steps after which an unfinished training is saved, at the end of an epoch."""


@dataclass(frozen=True)
class DescentConfig:
    """How every cell is trained: all alike.

    Weight decay and early stopping hide the peak, so there is neither; without label noise it hardly shows.

    Attributes:
        family: ``mlp``, ``cnn``, or a network of the zoo with the option ``width``, such as ``resnet8``.
        noise: Fraction of the training labels to change, in [0, 1].
        steps: Optimizer steps.
        batch_size: Samples a step; all of them where there are fewer.
        optimizer: ``adam`` or ``sgd`` (without momentum).
        lr: Learning rate.
        schedule: ``constant``, or ``root``: lr / sqrt(1 + floor(step / 512)).
        seed: Root of the labels, the subsets, the initial weights and the order of the samples.

    Raises:
        MicrogliaError: A number is out of range.
    """

    family: str = "mlp"
    noise: float = 0.1
    steps: int = 4000
    batch_size: int = 128
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    schedule: Schedule = "constant"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise MicrogliaError(f"The label noise is a fraction in [0, 1]; got {self.noise}.")
        if self.steps < 1 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            raise MicrogliaError(
                f"Training takes steps and a batch size of at least 1 and a learning rate above 0; got {self.steps}, "
                f"{self.batch_size} and {self.lr}."
            )
        if self.optimizer not in ("adam", "sgd") or self.schedule not in get_args(Schedule):
            raise MicrogliaError(
                f"The optimizer is adam or sgd and the schedule constant or root; got {self.optimizer} and {self.schedule}."
            )

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, from 0."""
        return self.lr / math.sqrt(1 + step // 512) if self.schedule == "root" else self.lr


# ------------------------------------------------------------------------------------------------------------------- data
def noisy_labels(labels: Tensor, classes: int, noise: float, seed: int = 0) -> Tensor:
    """Returns labels of which exactly ``round(noise * N)`` are changed, each to another class, all others equally likely.

    Args:
        labels: int64 (N,), in [0, classes).
        classes: At least 2.
        noise: In [0, 1].
        seed: Chooses which, and to what.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    shift = torch.randint(1, classes, (len(chosen),), generator=generator)
    changed = labels.clone()
    changed[chosen] = (labels[chosen] + shift) % classes
    return changed


def with_label_noise(data: ImageData, noise: float, seed: int = 0) -> ImageData:
    """Returns the data set with noisy training labels; validation and test stay as they are."""
    labels = noisy_labels(data.train.labels, len(data.classes), noise, seed)
    return replace(data, train=replace(data.train, labels=labels))


def with_samples(data: ImageData, samples: int, seed: int = 0) -> ImageData:
    """Returns the data set with some of its training images, drawn; more samples hold all of fewer.

    The draw is independent of the one in `noisy_labels`: with the same permutation, a part would hold the changed labels first.

    Raises:
        MicrogliaError: There are not so many.
    """
    if not 1 <= samples <= len(data.train):
        raise MicrogliaError(f"{data.name} has {len(data.train)} training images; asked for {samples} of them.")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(SUBSETS + seed))
    return replace(data, train=data.train.subset(order[:samples]))


# --------------------------------------------------------------------------------------------------------------- networks
def _mlp(width: int, classes: int, shape: Shape) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, classes))


def _cnn(width: int, classes: int, shape: Shape) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = shape[0]
    for number, outputs in enumerate((width, 2 * width, 4 * width, 8 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if number in (1, 2) else []  # so that no image is too small
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


FAMILIES: dict[str, Callable[[int, int, Shape], nn.Module]] = {"mlp": _mlp, "cnn": _cnn}
"""``mlp``: one hidden layer of ``width``. ``cnn``: convolutions of (1, 2, 4, 8) x width with batch norm, and a linear layer
(Nakkiran et al. 2020, "Deep double descent", the 5-layer CNN)."""


def member(family: str, width: int, classes: int, shape: Shape, *, seed: int = 0) -> nn.Module:
    """Returns the network of a family with some width, the same weights for the same seed.

    Raises:
        MicrogliaError: There is no such family, it has no width, or the width is below 1.
    """
    if width < 1:
        raise MicrogliaError(f"The width of a network is at least 1; got {width}.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family in FAMILIES:
            return FAMILIES[family](width, classes, shape)
        return build(family, classes=classes, shape=shape, width=width)


# ------------------------------------------------------------------------------------------------------------------ cells
def descend(data: ImageData, config: DescentConfig, cells: Sequence[tuple[int, int]], run: Run | None = None) -> list[Row]:
    """Trains a network for each cell and returns one row each; with a run's directory no cell is ever trained twice.

    A row holds ``width``, ``samples``, ``parameters``, and ``train_error``, ``train_loss`` (on the noisy labels),
    ``test_error`` and ``test_loss`` (on the true ones), errors in [0, 1], losses in nats.

    Args:
        data: Images with true labels.
        config: How to train.
        cells: (width, samples) of each.
        run: Where to keep them; its recipe should hold data and config, not the cells, so that more can be added.

    Raises:
        MicrogliaError: A cell cannot be trained.
    """
    noisy, run = with_label_noise(data, config.noise, config.seed), run or Run()
    rows = []
    for width, samples in cells:
        cell = _Cell(with_samples(noisy, samples, config.seed), config, width, run.device)
        # Parts of the images have another name than they had when their draw followed the changed labels.
        kind = "samples" if samples == len(data.train) else "part"
        rows.append(run.stage(f"width-{width}-{kind}-{samples}", cell.measured))
    return rows


@dataclass(frozen=True)
class _Cell:
    """One network on one training set."""

    data: ImageData
    config: DescentConfig
    width: int
    device: torch.device

    def measured(self, progress: Progress) -> Row:
        """Trains the network and returns its row."""
        classes, shape = len(self.data.classes), self.data.shape
        model = member(self.config.family, self.width, classes, shape, seed=self.config.seed).to(self.device)
        source = ImageSource(self.data)
        example = torch.zeros(1, *shape)
        task = Task(self.config.family, lambda: model, source, CrossEntropy(), CLASSIFICATION, example)
        train(model, task, self.config, len(self.data.train), progress)
        row: Row = {
            "width": self.width,
            "samples": len(self.data.train),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for split in ("train", "test"):
            found = evaluate(model, task, split)  # type: ignore[arg-type]
            row |= {f"{split}_error": 1 - found["accuracy"], f"{split}_loss": found["loss"]}
        return row


def train(model: nn.Module, task: Task, config: DescentConfig, samples: int, progress: Progress | None = None) -> None:
    """Trains for exactly the steps of a config, in place; goes on from ``progress`` in the same bits.

    Every batch is full: a last partial one of an epoch is left out, the next epoch has another order.

    Raises:
        TrainingError: The loss is not finite.
    """
    size = min(config.batch_size, samples)
    batches, length = task.data.batches("train", size, seed=config.seed, shuffle=True), samples // size
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD
    optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=config.lr)
    step = 0
    if progress is not None and progress.state is not None:
        model.load_state_dict(progress.state["model"])
        optimizer.load_state_dict(progress.state["optimizer"])
        step = progress.state["step"]
    saved = step
    advance = Step(task, model, [optimizer], objective(task, training=False), device_of(model))
    model.train()
    while step < config.steps:  # always at the start of an epoch
        for batch in islice(batches.epoch(step // length), min(length, config.steps - step)):
            diverged = f"The loss became {{loss}} in step {step + 1}; try a smaller lr than {config.lr:g}."
            advance(batch, rate=config.rate(step), diverged=diverged)
            step += 1
        if progress is not None and step - saved >= SAVED:
            progress.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
            saved = step


# ---------------------------------------------------------------------------------------------------------------- reading
def effective_capacity(rows: Sequence[Row], epsilon: float = 0.01) -> int | None:
    """Returns the most samples of any row that the recipe fits to a training error of at most epsilon; None without one."""
    return max((row["samples"] for row in rows if row["train_error"] <= epsilon), default=None)


def interpolation_threshold(rows: Sequence[Row], epsilon: float = 0.01) -> int | None:
    """Returns the least width of any row with a training error of at most epsilon; None without one."""
    return min((row["width"] for row in rows if row["train_error"] <= epsilon), default=None)
