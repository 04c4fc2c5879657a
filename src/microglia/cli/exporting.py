"""Exporting what is saved: a run's model as a file of another engine, compared on test data, its accuracy and time beside."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import RunError
from microglia.core.restore import restore
from microglia.export import Export, Int8, export
from microglia.export.int8 import COUNT, MAX_DROP, quantizers
from microglia.export.targets import target_for, targets
from microglia.lab.target import open_target
from microglia.measure import measure_latency
from microglia.storage.archive import PLAN, saved_bytes
from microglia.storage.files import State, digest
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.evaluate import evaluate
from microglia.train.rounded import fit_rounded, rounded_config

Json = dict[str, Any]

CALIBRATED = 32
"""Training examples that are read at a time to calibrate int8."""
RECOVERED = "int8-recovery"
"""Directory in the target that keeps the state of recoveries."""
COMPARED = 1024
"""Validation examples on which int8 is held against float32: the limit is met to a tenth of a point."""


@dataclass(frozen=True)
class Exporting:
    """Request for an export.

    Attributes:
        target: A run, or a directory that `save` wrote.
        out: File or directory to write; None for ``model`` with the suffix of ``to``, in the target.
        to: Name of the export target; None for the one of ``out``'s suffix.
        data: Data set instead of the run's own; ``digits`` for a saved model alone.
        dynamic: Dimensions of the inputs that shall be free.
        opset: Version of ONNX's operators; None for torch's default.
        accuracy: Whether to evaluate the test split through the file, and to time it beside the model.
        int8: Whether to round to 8 bits, calibrated on training data.
        calibrate: Training examples that calibrate.
        max_drop: Largest accepted loss of the task's first metric, on validation data.
        recover: Steps of training with rounded layers where int8 costs more than that; 0 for none. A killed one is continued.
    """

    target: Path
    out: Path | None = None
    to: str | None = None
    data: str | None = None
    dynamic: tuple[int, ...] = (0,)
    opset: int | None = None
    accuracy: bool = False
    int8: bool = False
    calibrate: int = COUNT
    max_drop: float = MAX_DROP
    recover: int = 0

    @property
    def path(self) -> Path:
        """Where the file goes."""
        return self.out if self.out is not None else self.target / f"exported{targets[self.to or self.usual].suffix}"

    @property
    def usual(self) -> str:
        """The export target where none is asked for: one that has int8 where that is."""
        return next(iter(quantizers)) if self.int8 else "onnx"


def export_saved(asked: Exporting) -> Json:
    """Exports a saved model, verified on test data, and returns what it came to.

    The result holds ``task``, ``export`` (see `microglia.export.Export`), ``saved`` (bytes of the model's own file) and, where
    asked, ``model`` and ``exported`` (``metrics`` on the test split), and ``latency`` of one example.

    Raises:
        MicrogliaError: There is no saved model, or it cannot be exported; the text says why, and nothing is written.
    """
    if asked.recover and not asked.int8:
        raise RunError(f"--recover {asked.recover} trains for int8: give it together with --int8.")
    if not (asked.target / "recipe.yaml").is_file() and not (asked.target / PLAN).is_file():
        raise RunError(f"{asked.target} is neither a run directory (recipe.yaml) nor a saved model ({PLAN}).")
    to, _ = target_for(asked.path, asked.to or (None if asked.out is not None else asked.usual))
    model, task = open_target(str(asked.target), asked.data)
    batches = task.data.batches("test", 16).epoch(0)
    inputs = [inputs for inputs, _ in islice(batches, 2)]
    settings: Json = {"dynamic": asked.dynamic, "data": inputs, "opset": asked.opset}
    int8 = int8_of(task, asked.calibrate, asked.max_drop) if asked.int8 else None
    if int8 is not None and asked.recover:
        int8 = replace(int8, recover=partial(recovered, task=task, steps=asked.recover, place=asked.target / RECOVERED))
    written = export(model, asked.path, task.example, to=to, int8=int8, **settings)
    result: Json = {"task": task.name, "export": written.to_dict(), "saved": saved_bytes(asked.target)}
    if asked.accuracy:
        result |= _compared(model, task, written)
    return result


def recovered(model: nn.Module, task: Task, *, steps: int, place: Path) -> nn.Module:
    """Returns a model trained with rounded layers, its own copy in float32 as the teacher.

    Args:
        model: Trained; changed in place.
        task: Data, loss and metrics.
        steps: Steps of the training.
        place: Directory that keeps its state, for these weights and this number of steps; a killed training is continued.
    """
    config = rounded_config(task, steps)
    run = Run(place / f"{digest(model.state_dict())}-{steps}", {"int8": asdict(config)})
    try:
        teacher = copy.deepcopy(model)

        def train(progress: Progress) -> State:
            fit_rounded(model, task, config, teacher=teacher, progress=progress)
            return {"model": model.state_dict()}

        restore(model, run.stage("rounded", train)["model"])
    finally:
        run.close()
    return model.eval()


def int8_of(task: Task, count: int = COUNT, max_drop: float = MAX_DROP, *, seed: int = 0) -> Int8:
    """Returns the wish for int8 on a task's own data: shuffled training data calibrate, validation data compare.

    Args:
        task: Its first metric is the score; where lower is better, the score is its negative.
        count: Examples that calibrate.
        max_drop: Largest accepted loss of the score.
        seed: Seed of the order of both splits.
    """
    name = task.headline
    metric = task.metrics[name]

    def score(pairs: Iterable[tuple[Any, Any]]) -> float:
        state = None
        for outputs, wanted in pairs:
            state = metric.update(state, task.predict(outputs), wanted)
        value = metric.values(name, state)[name]
        return value if metric.better == "higher" else -value

    train = task.data.batches("train", CALIBRATED, seed=seed, shuffle=True).epoch(0)
    validation = task.data.batches("validation", COMPARED // 8, seed=seed, shuffle=True).epoch(0)
    pairs = list(islice(validation, 8)) or None
    return Int8(train, count, pairs, score, max_drop, task.forward)


def _compared(model: nn.Module, task: Task, written: Export) -> Json:
    """Returns metrics on the test split of the model and of the file, and their times on one example, interleaved."""
    opened = written.open()
    example = Example.of(task.example).map(lambda tensor: tensor.cpu())
    batch = written.batch or 256
    timed = measure_latency(
        {"model": model.cpu()},
        example,
        executions=("eager", "packed"),
        ready={"model": {opened.engine: lambda: opened(*example.args, **example.kwargs)}},
    )
    return {
        "model": {"metrics": evaluate(model, task, "test")},
        "exported": {"metrics": evaluate(opened, task, "test", batch_size=batch)},
        "latency": timed.to_dict(),
    }


def export_table(result: Json) -> Table:
    """Returns the table of what was exported: model and file, with bytes and, where they were asked for, metrics and times."""
    written = result["export"]
    compared = f"Outputs differ by {written['difference']:.1e} of the largest at most, on {written['examples']} examples."
    said = [compared, *written["notes"], *_rounded(written["int8"])]
    title = f"{result['task']}: {written['target']}{', int8' if written['int8'] else ''}"
    table = Table("", title=title, caption=" ".join(said))
    metrics = result["model"]["metrics"] if "model" in result else {}
    for name in [*metrics, "bytes", *(["ms, one example"] if metrics else [])]:
        table.add_column(name, justify="right")
    times = result["latency"]["timings"]["model"] if metrics else {}
    own = min((name for name in times if name != written["engine"]), key=lambda name: times[name]["median"], default="")
    rows = {
        f"model{f' ({own})' if own else ''}": ("model", result["saved"], own),
        written["engine"]: ("exported", written["bytes"], written["engine"]),
    }
    for name, (key, size, execution) in rows.items():
        shown = [f"{result[key]['metrics'][metric]:.4f}" for metric in metrics]
        table.add_row(name, *shown, f"{size:,}", *([f"{times[execution]['median']:.3f}"] if metrics else []))
    return table


def _rounded(report: Json | None) -> list[str]:
    """Returns what a person reads of int8."""
    if report is None:
        return []
    said = [f"Calibrated on {report['calibrated']} training examples."]
    if report["scores"] is not None:
        before, after = report["scores"]
        said.append(f"Validation score {before:.4f} in float32 and {after:.4f} in int8 (limit: {report['max_drop']:g} less).")
    if report["recovered_from"]:
        first, rounded = report["recovered_from"]
        said.append(f"Trained with rounded layers for that; before {first:.4f} in float32 and {rounded:.4f} in int8.")
    if report["restored"]:
        said.append(f"{len(report['kept_float'])} layers are back in float32 to hold that limit.")
    return said
