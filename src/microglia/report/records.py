"""Records: the part of a run's result that reports need, and the file that keeps them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from microglia.report.sections.routing import Predicted, Routing
from microglia.storage.files import write_atomic

Curves = dict[str, dict[str, list[float]]]
"""Stage -> ``epoch``, ``loss`` and ``validation`` (the headline metric), one value per epoch."""


@dataclass(frozen=True)
class Parameters:
    """Of `microglia.measure.Parameters`, without the layers."""

    all: int
    prunable: int
    kept: int
    density: float
    compression: float | None


@dataclass(frozen=True)
class Macs:
    """Of `microglia.measure.Macs`, without the layers."""

    total: int
    effective: float
    speedup: float | None


@dataclass(frozen=True)
class Bytes:
    """As `microglia.measure.Bytes`."""

    raw: int
    zipped: int


@dataclass(frozen=True)
class Observed:
    """One model at one moment of a run."""

    metrics: dict[str, float | None]
    parameters: Parameters
    macs: Macs
    bytes: Bytes


@dataclass(frozen=True)
class Timing:
    """As `microglia.measure.Timing`, in milliseconds."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Latency:
    """As `microglia.measure.LatencyReport`, of the models ``dense`` and ``pruned``."""

    timings: dict[str, dict[str, Timing]]
    device: str
    threads: int
    batch: int
    torch_version: str
    best: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for model in ("dense", "pruned"):
            if not self.fastest(model)[1] > 0:
                raise ValueError(f"the latency of the {model} model is not positive")

    def fastest(self, model: str) -> tuple[str, float]:
        """Returns the best execution of a model and its median time in milliseconds."""
        try:
            return self.best[model], self.timings[model][self.best[model]].median
        except KeyError as error:
            raise ValueError(f"latency has no timing of {error}") from None

    @property
    def speedup(self) -> float:
        """Measured: best dense execution over best pruned execution."""
        return self.fastest("dense")[1] / self.fastest("pruned")[1]


@dataclass(frozen=True)
class Snapshot:
    """The masks at one step of a search: how many lie in each of equal parts of [0, 1], and how many are undecided."""

    step: int
    histogram: list[int]
    undecided: int
    temperature: float | None = None


@dataclass(frozen=True)
class Freeze:
    """What making the masks exact changed: of so many units, the undecided, and how far factors were from 0 or 1.

    ``softens`` is what the method says of itself: whether its masks are ever soft.
    """

    step: int
    units: int
    kept: int
    undecided: int
    largest: float
    mean: float
    softens: bool = True
    soft: dict[str, float] = field(default_factory=dict)
    hard: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """How a method that learns its masks came to them; densities by layer or group of channels."""

    freeze: Freeze | None = None
    history: list[Snapshot] = field(default_factory=list)
    densities: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPaths:
    """Weights of a layer: all, kept, and those of them on a path from input to output."""

    total: int
    kept: int
    effective: int


@dataclass(frozen=True)
class Initialization:
    """A mask made before training."""

    total: int
    kept: int
    effective: int
    emptied: list[str]
    layers: dict[str, LayerPaths]

    @property
    def least(self) -> float:
        """Smallest density of a layer."""
        return min(layer.kept / layer.total for layer in self.layers.values())


@dataclass(frozen=True)
class Environment:
    """What a run ran on."""

    microglia: str
    torch: str
    python: str
    platform: str
    processor: str
    threads: int
    cores: int | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class Record:
    """One finished run, slim; no path of the machine it ran on is left in it.

    Attributes:
        recipe: Resolved; the checkpoint is a bare file name.
        environment: Where it ran.
        task: Model and data, for people.
        headline: Name of the metric that counts.
        asked: Budget: ``density``, ``params`` and ``flops``, each a fraction, ``ms`` a time; None or missing where not asked.
        dense: The model before pruning.
        pruned: The model in the end.
        before: The pruned model before recovery, where there was such a moment.
        latency: Measured times, if they were.
        seconds: The run took.
        curves: What its trainings logged.
        densities: Kept fraction of each masked layer.
        search: How the masks were found, where a method learns them.
        initialization: The mask, where it was made before training.
        estimate: What the gates of a dynamic model were expected to cost, before the training.
        routes: What they came to on the test split.
        source: Where it was read.
    """

    recipe: dict[str, Any]
    environment: Environment
    task: str
    headline: str
    asked: dict[str, float | None]
    dense: Observed
    pruned: Observed
    before: Observed | None = None
    latency: Latency | None = None
    seconds: float = 0.0
    curves: Curves = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)
    search: Search | None = None
    initialization: Initialization | None = None
    estimate: Predicted | None = None
    routes: Routing | None = None
    source: str = ""

    def __post_init__(self) -> None:
        missing = [key for key in ("model", "data", "method", "prune", "seed") if key not in self.recipe]
        if missing or not isinstance(self.recipe["prune"], dict):
            raise ValueError(f"the recipe lacks {', '.join(missing) or 'the settings of prune'}")
        if self.dynamic and self.recipe["prune"].get("flops") is None and self.recipe["prune"].get("r") is None:
            raise ValueError("the recipe of a run with routes has neither flops nor r")
        for observed in filter(None, (self.dense, self.before, self.pruned)):
            value = observed.metrics.get(self.headline)
            if value is None or not math.isfinite(value):
                raise ValueError(f"{self.headline} is {value}")

    @property
    def dynamic(self) -> bool:
        """Whether gates choose for each input what is computed."""
        return self.routes is not None

    @property
    def left(self) -> float | None:
        """Fraction of the dense multiply-accumulates that is computed (of masked weights: kept); None where that is 0."""
        if self.routes is not None:
            return self.routes.honest.mean
        kept = self.pruned.macs.effective / self.dense.macs.total if self.dense.macs.total else 1.0
        return kept or None

    def value(self, observed: Observed) -> float:
        """Returns the headline metric of one of the models."""
        return float(observed.metrics[self.headline])  # type: ignore[arg-type]  # checked above


_record = TypeAdapter(Record)


def parse(result: dict[str, Any]) -> Record:
    """Returns the record of a result (see `microglia.lab.execute.execute`).

    Raises:
        ValueError: A field is missing or wrong; the text names it.
    """
    try:
        record: Record = _record.validate_python(result)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        message = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place} {message}".strip()) from None
    recipe = _portable(record.recipe)
    if recipe.get("checkpoint"):
        recipe["checkpoint"] = PurePath(recipe["checkpoint"]).name
    latency = record.latency and replace(record.latency, notes=[without_paths(note) for note in record.latency.notes])
    return replace(record, recipe=recipe, latency=latency, task=without_paths(record.task))


def export(records: Sequence[Record], path: str | Path) -> Path:
    """Writes records to one JSON file, a list with a line for each, to be kept with a project and reported from.

    Raises:
        FileError: It cannot be written.
    """
    lines = [json.dumps(_record.dump_python(r, mode="json"), sort_keys=True) for r in sorted(records, key=order)]
    write_atomic(Path(path), "[\n" + ",\n".join(lines) + "\n]\n")
    return Path(path)


def order(record: Record) -> tuple[str, str, str]:
    """Returns what records are sorted by."""
    return record.task, json.dumps(record.recipe, sort_keys=True, default=str), record.source


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
