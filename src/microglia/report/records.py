"""Records: the part of a run's result that reports need, and the file that stores them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from microglia.lab.result import Observed, Outcome, read, written
from microglia.measure import LatencyReport
from microglia.storage.files import write_atomic

Curves = dict[str, dict[str, list[float]]]
"""Stage -> ``epoch``, ``loss`` and ``validation`` (the headline metric), one value per epoch."""


@dataclass(frozen=True, kw_only=True)
class Record(Outcome):
    """One finished run, only with sums over layers and without paths of its machine.

    Attributes:
        curves: Logged values of its trainings, by epoch; ``validation`` is NaN for an epoch without an evaluation.
        source: Path from which it was read.
        shown: Predictions of each model on a few test examples, only where a run directory is read. Exported files lack
            them, because images of a data set may not be copied.
    """

    curves: Curves = field(default_factory=dict)
    source: str = ""
    shown: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [key for key in ("model", "data", "method", "prune", "seed") if key not in self.recipe]
        if missing or not isinstance(self.recipe["prune"], dict):
            raise ValueError(f"the recipe lacks {', '.join(missing) or 'the settings of prune'}")
        if self.recipe.get("measure", {}).get("split", "test") != "test":
            raise ValueError("its metrics are of validation images, and tables show those of test images")
        for observed in filter(None, (self.dense, self.before, self.pruned)):
            value = observed.metrics.get(self.headline)
            if value is None or not math.isfinite(value):
                raise ValueError(f"{self.headline} is {value}")
        for model in ("dense", "pruned"):
            if self.latency is not None and model not in self.latency.timings:
                raise ValueError(f"latency has no timing of the {model} model")

    def value(self, observed: Observed) -> float:
        """Returns the headline metric of one of the models."""
        return float(observed.metrics[self.headline])  # type: ignore[arg-type]  # checked above


def parse(content: Mapping[str, Any]) -> Record:
    """Returns the record of a result's JSON form (see `microglia.lab.execute.execute`).

    Raises:
        ValueError: A field is missing or wrong; the text names it.
    """
    record = read(Record, content)
    recipe = _portable(record.recipe)
    if recipe.get("checkpoint"):
        recipe["checkpoint"] = PurePath(recipe["checkpoint"]).name
    return replace(
        record,
        recipe=recipe,
        latency=_without_paths(record.latency),
        task=without_paths(record.task),
        dense=_in_sums(record.dense),
        before=None if record.before is None else _in_sums(record.before),
        pruned=_in_sums(record.pruned),
    )


def export(records: Sequence[Record], path: str | Path) -> Path:
    """Writes records to one JSON file, a list with one line per record, from which a report can be made later.

    Raises:
        FileError: The file cannot be written.
    """
    lines = [json.dumps(exported(record), sort_keys=True) for record in sorted(records, key=order)]
    write_atomic(Path(path), "[\n" + ",\n".join(lines) + "\n]\n")
    return Path(path)


def exported(record: Record) -> dict[str, Any]:
    """Returns a record as values of JSON without its predictions, which take most of the room."""
    return {key: value for key, value in written(record).items() if key != "shown"}


def order(record: Record) -> tuple[str, str, str]:
    """Returns the sort key of a record."""
    return record.task, json.dumps(record.recipe, sort_keys=True, default=str), record.source


def _in_sums(observed: Observed) -> Observed:
    """Returns the observations for an exported file, without the counts of each layer."""
    parameters = replace(observed.parameters, nonzero_all=None, layers={})
    return replace(observed, parameters=parameters, macs=replace(observed.macs, other=0, layers={}))


def _without_paths(latency: LatencyReport | None) -> LatencyReport | None:
    return latency and replace(latency, notes=tuple(without_paths(note) for note in latency.notes))


def _portable(value: Any) -> Any:
    """Returns a recipe with every absolute path in it reduced to its last part."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def without_paths(text: str) -> str:
    """Returns a text with every absolute path in it reduced to its last part."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)/?", r"\1", text)
