"""Shrinking of a saved masked model: the smaller model is verified and measured beside the dense and the masked one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from microglia.core.batch import tensors_of
from microglia.core.errors import MicrogliaError, RunError
from microglia.graph import ShrinkError, plan_of, shrink
from microglia.graph.cutting.removal import removal
from microglia.lab.execute import prove_equal
from microglia.lab.recipe import MeasureConfig, read_yaml, resolve
from microglia.lab.target import open_target
from microglia.measure import measure, measure_latency
from microglia.storage.archive import PLAN, save, saved_bytes
from microglia.storage.changes import changes_of
from microglia.storage.files import write_atomic
from microglia.storage.run import read_json
from microglia.tasks.task import Task
from microglia.train.evaluate import evaluate

RESULT = "shrink.json"
Json = dict[str, Any]


@dataclass(frozen=True)
class Shrinking:
    """The options of shrinking.

    Attributes:
        target: A run, or a directory that `save` wrote.
        out: Directory of the smaller model; None for ``shrunk`` in a run, or beside a saved model.
        data: Data set instead of the run's own; by default ``digits`` for a saved model without a run.
        keep_class: Remove only channels that the model's classes can lose.
        clear: Whether to zero biases and norm shifts of masked channels, so that all of them are removed.
        latency: Whether to time the dense, masked and shrunk models.
    """

    target: Path
    out: Path | None = None
    data: str | None = None
    keep_class: bool = False
    clear: bool = False
    latency: bool = True

    @property
    def directory(self) -> Path:
        """Directory of the smaller model."""
        if self.out is not None:
            return self.out
        whole = (self.target / "recipe.yaml").is_file()
        return self.target / "shrunk" if whole else self.target.with_name(f"{self.target.name}-shrunk")

    @property
    def run(self) -> Path | None:
        """The run that is, or contains, the target."""
        near = (self.target, self.target.resolve().parent)
        return next((path for path in near if (path / "recipe.yaml").is_file()), None)


def shrink_saved(asked: Shrinking) -> Json:
    """Shrinks a saved masked model, saves the smaller one and returns the result, also stored as ``shrink.json`` beside it.

    The result holds ``task``; ``dense``, ``masked`` and ``shrunk`` (``metrics`` on the test split, ``parameters``, ``macs``,
    ``bytes``, ``saved``: bytes of the written file; without a run ``dense`` has no metrics); ``removed`` (layer by layer);
    ``difference``, the maximum difference between the outputs of both models on test inputs, relative to the largest output;
    ``latency``.

    Raises:
        MicrogliaError: There is no saved model with completely masked channels, or it cannot be shrunk; the text gives the
            reason.
    """
    masked, task = _open(asked)
    small = shrink(masked, task.example, clear=asked.clear, keep_class=asked.keep_class)
    if not plan_of(small).kept:
        raise MicrogliaError(f"Nothing can be removed from the model in {asked.target}. {' '.join(plan_of(small).notes)}")
    difference = _difference(task, masked, small)
    if not asked.clear and difference > 1e-3:
        raise ShrinkError(f"The shrunk model's outputs differ from the masked one's by {difference:.1e}; nothing was saved.")
    dense = task.build()
    save(small, asked.directory)
    prove_equal(small, asked.directory, task.build())
    places = {"masked": (masked, asked.target), "shrunk": (small, asked.directory)}
    observed = {name: {**_observe(task, m), "saved": saved_bytes(at)} for name, (m, at) in places.items()}
    models = {"dense": dense, "masked": masked, "shrunk": small}
    result = {
        "task": task.name,
        "dense": _dense(asked, task, dense),
        **observed,
        "removed": removal(dense, small),
        "difference": difference,
        "latency": _latency(asked, task, models) if asked.latency else None,
    }
    write_atomic(asked.directory / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _open(asked: Shrinking) -> tuple[nn.Module, Task]:
    if not (asked.target / "recipe.yaml").is_file() and not (asked.target / PLAN).is_file():
        raise RunError(f"{asked.target} is neither a run directory (recipe.yaml) nor a saved model ({PLAN}).")
    model, task = open_target(str(asked.target), asked.data)
    kinds = [done.kind for done in changes_of(model).values()]
    if not any(kind.zeroes for kind in kinds):
        if any(kind.cuts for kind in kinds):
            raise MicrogliaError(f"The model in {asked.target} was shrunk already, and has no masks since.")
        raise MicrogliaError(
            f"The model in {asked.target} has no masks, so there is nothing to remove. Prune with --pattern channel first, or "
            "remove channels at once with --method channels."
        )
    return model, task


def _difference(task: Task, masked: nn.Module, small: nn.Module) -> float:
    """Returns the maximum difference of the outputs on test inputs, relative to the largest output."""
    inputs, _ = next(iter(task.data.batches("test", 64).epoch(0)))
    with torch.no_grad():
        outputs = [tensors_of(task.forward(model.eval(), inputs)) for model in (masked, small)]
    pairs = [(one, other) for one, other in zip(*outputs, strict=True) if one.numel()]
    largest = max((float(one.abs().max()) for one, _ in pairs), default=0.0)
    return max((float((one - other).abs().max()) for one, other in pairs), default=0.0) / max(largest, 1e-12)


def _observe(task: Task, model: nn.Module) -> Json:
    return {"metrics": evaluate(model, task, "test"), **measure(model, task.example, latency=False).to_dict()}


def _dense(asked: Shrinking, task: Task, model: nn.Module) -> Json:
    """Returns the run's observation of its dense model; without a run, only counts."""
    result = asked.run / "result.json" if asked.run is not None else None
    if result is not None and result.is_file() and "dense" in (content := read_json(result)):
        found: Json = content["dense"]
        return found
    return {"metrics": {}, **measure(model, task.example, latency=False).to_dict()}


def _latency(asked: Shrinking, task: Task, models: dict[str, nn.Module]) -> Json:
    config = resolve(read_yaml(asked.run / "recipe.yaml")).measure if asked.run is not None else MeasureConfig()
    example = task.example_batch(config.batch)
    return measure_latency(models, example, executions=config.executions, rounds=config.rounds).to_dict()
