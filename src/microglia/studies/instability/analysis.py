"""Instability to the noise of training: do two copies, from one state on, end in one basin? (Frankle et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.core.layers import prunable_layers
from microglia.core.masks import fold, mask
from microglia.core.restore import restore
from microglia.storage.run import Run
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.points import combine, move, point_of, visiting
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig
from microglia.train.rewind import State, advance, start_of, with_masks

STABLE = 0.02
"""Below this instability the copies count as one basin (survey 2.3)."""
NOISE = (104_729, 1_299_709)
"""Between the seeds of the run and of the two copies' data orders."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """A training that is done twice.

    Attributes:
        task: A task of an untrained network.
        run: Every training is a stage of it, never done twice.
        config: The whole training, from epoch 0.
        masks: Masks of a subnetwork, or None for the dense network; put on at the epoch the copies part.
        name: Name of the network, unique in the run; the dense training up to the parting is shared by all names.
    """

    task: Task
    run: Run
    config: FitConfig
    masks: Mapping[str, Tensor] | None = None
    name: str = "dense"


def instability(training: Training, epoch: int, gauge: Gauge, *, points: int = 30, pair: int = 0) -> Json:
    """Returns how far the error rises between two copies of a network that part at an epoch.

    Both go on from the same weights, momenta, batch-norm statistics, learning rate and place in the data, with another order
    and augmentation of the data each: W_T = A^(k -> T)(m * W_k, u). E(alpha) is measured on the straight line between them,
    batch-norm statistics made anew at each point. Instability = max E - (E(0) + E(1)) / 2 (equation 1).

    Args:
        training: The training.
        epoch: k, from 0 to the whole training; then the copies are one network.
        gauge: How to measure a point.
        points: Points of the line, ends included.
        pair: Number of the pair of noises.

    Returns:
        ``epoch``, ``alphas``, ``error`` by split (1 - headline at each point), ``instability`` by split, ``stable``, and the
        error of both ``ends``.
    """
    ends = [copy_from(training, epoch, number, pair) for number in (0, 1)]
    stage = f"{training.name}-{epoch}-line-{pair}"
    line = training.run.stage(stage, lambda progress: _line(ends, training, gauge, points))
    headline = training.task.headline
    errors = {split: [1 - row[f"{split}_{headline}"] for row in line["rows"]] for split in gauge.splits}
    heights = {split: max(values) - (values[0] + values[-1]) / 2 for split, values in errors.items()}
    return {
        "epoch": epoch,
        "alphas": line["alphas"],
        "error": errors,
        "instability": heights,
        "stable": max(heights.values()) < STABLE,
        "ends": {split: [values[0], values[-1]] for split, values in errors.items()},
    }


def copy_from(training: Training, epoch: int, number: int, pair: int = 0) -> nn.Module:
    """Returns one of two copies that part at an epoch, trained to the end, its masks folded."""
    task, run, config = training.task, training.run, training.config
    if not 0 <= epoch <= config.epochs:
        raise MicrogliaError(f"Copies part at an epoch of the training, 0 to {config.epochs}; got {epoch}.")
    model = task.build().to(run.device)
    mask(model, {name: torch.ones(layer.shape, dtype=torch.bool) for name, layer in prunable_layers(model).items()})
    state = parting(training, model, epoch)
    if training.masks is not None:
        state = with_masks(model, state, training.masks)
    name = f"{training.name}-{epoch}-copy-{2 * pair + number}"
    seed = run.seed + NOISE[number] * (pair + 1)
    final = advance(task, run, name, model, config, start=state, seed=seed)
    restore(model, final["model"])
    return fold(model)


def parting(training: Training, model: nn.Module, epoch: int) -> State:
    """Returns the dense training's state at an epoch; the model, with masks of ones, is left at it."""
    start = start_of(model)
    return advance(training.task, training.run, f"until-{epoch}", model, training.config, start=start, stop=epoch)


def _line(ends: list[nn.Module], training: Training, gauge: Gauge, points: int) -> Json:
    places = [point_of(end) for end in ends]
    model = deepcopy(ends[0])
    alphas = torch.linspace(0, 1, points).tolist()
    rows = []
    with visiting(model):
        for alpha in alphas:
            move(model, combine(places, (1 - alpha, alpha)))
            rows.append(gauge(model))
    return {"alphas": alphas, "rows": rows}


def smallest_stable(found: list[Json]) -> int | None:
    """Returns the least epoch from which on every one measured is stable, or None."""
    stable: int | None = None
    for row in sorted(found, key=lambda row: -row["epoch"]):
        if not row["stable"]:
            break
        stable = row["epoch"]
    return stable
