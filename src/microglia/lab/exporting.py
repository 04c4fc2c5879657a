"""Exporting what is saved: a run's model as a file of another engine, compared on test data, its accuracy and time beside."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import RunError
from microglia.export import Export, export
from microglia.export.targets import target_for, targets
from microglia.lab.target import open_target
from microglia.measure import measure_latency
from microglia.storage.archive import PLAN, saved_bytes
from microglia.tasks.task import Task
from microglia.train.evaluate import evaluate

Json = dict[str, Any]


@dataclass(frozen=True)
class Exporting:
    """What to export, and how.

    Attributes:
        target: A run, or a directory that `save` wrote.
        out: File or directory to write; None for ``model`` with the suffix of ``to``, in the target.
        to: Name of the export target; None for the one of ``out``'s suffix.
        data: Data set instead of the run's own; ``digits`` for a saved model alone.
        dynamic: Dimensions of the inputs that shall be free.
        opset: Version of ONNX's operators; None for torch's default.
        accuracy: Whether to evaluate the test split through the file, and to time it beside the model.
    """

    target: Path
    out: Path | None = None
    to: str | None = None
    data: str | None = None
    dynamic: tuple[int, ...] = (0,)
    opset: int | None = None
    accuracy: bool = False

    @property
    def path(self) -> Path:
        """Where the file goes."""
        return self.out if self.out is not None else self.target / f"exported{targets[self.to or 'onnx'].suffix}"


def export_saved(asked: Exporting) -> Json:
    """Exports a saved model, verified on test data, and returns what it came to.

    The result holds ``task``, ``export`` (see `microglia.export.Export`), ``saved`` (bytes of the model's own file) and, where
    asked, ``model`` and ``exported`` (``metrics`` on the test split), and ``latency`` of one example.

    Raises:
        MicrogliaError: There is no saved model, or it cannot be exported; the text says why, and nothing is written.
    """
    if not (asked.target / "recipe.yaml").is_file() and not (asked.target / PLAN).is_file():
        raise RunError(f"{asked.target} is neither a run directory (recipe.yaml) nor a saved model ({PLAN}).")
    to, _ = target_for(asked.path, asked.to or (None if asked.out is not None else "onnx"))
    model, task = open_target(str(asked.target), asked.data)
    batches = task.data.batches("test", 16).epoch(0)
    inputs = [inputs for inputs, _ in islice(batches, 2)]
    written = export(model, asked.path, task.example, to=to, dynamic=asked.dynamic, data=inputs, opset=asked.opset)
    result: Json = {"task": task.name, "export": written.to_dict(), "saved": saved_bytes(asked.target)}
    if asked.accuracy:
        result |= _compared(model, task, written)
    return result


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
    table = Table("", title=f"{result['task']}: {written['target']}", caption=" ".join([compared, *written["notes"]]))
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
