"""Rows: records of one task, combined over seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from microglia.lab.result import Observed
from microglia.measure import LatencyReport
from microglia.report.families import Family, common_family, left_of
from microglia.report.labels import (
    DENSE,
    asked_of,
    fraction_of,
    method_of,
    named_elsewhere,
    pattern_of,
    scope_of,
    settings_of,
    text_of,
    varying_of,
)
from microglia.report.records import Record
from microglia.report.spread import Spread
from microglia.storage.run import flatten
from microglia.tasks.task import SEEN

__all__ = ["Group", "Row", "Spread", "groups", "speedup_of"]

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed.

    Attributes:
        method: Name in the recipe, or the name from its family; ``dense`` for the baseline.
        pattern: Pattern of the masks.
        scope: Scope within which units compete.
        asked: The budget.
        settings: ``key=value`` of the other recipe fields in which runs of the same method differ; often empty.
        records: The runs.
    """

    method: str
    pattern: str
    scope: str
    asked: str
    settings: str
    records: tuple[Record, ...]

    @property
    def baseline(self) -> bool:
        """Whether this is a dense model."""
        return self.method == "dense"

    @property
    def family(self) -> Family | None:
        """The family of its runs; None if the usual labels and counts hold."""
        return None if self.baseline else common_family(self.records)

    @property
    def reduction(self) -> Spread | None:
        """Saved fraction of the dense multiply-accumulates; None if nothing remains."""
        left = [left_of(record) for record in self.records]
        return None if None in left else Spread.of(1 - value for value in left if value is not None)

    @property
    def line(self) -> str:
        """Name of a figure's line over several budgets."""
        plain = self.pattern in ("unstructured", "") or (self.family is not None and not self.family.patterned)
        return " ".join(filter(None, (self.method, "" if plain else self.pattern, self._odd_scope, self.settings)))

    @property
    def _odd_scope(self) -> str:
        return "" if self.scope in ("global", "") or self.method.startswith(self.scope) else self.scope

    @property
    def before(self) -> Spread | None:
        """The headline before recovery, or None if some run has no such moment."""
        observed = [(r, r.before) for r in self.records]
        values = [r.value(o) for r, o in observed if o is not None]
        return Spread.of(values) if len(values) == len(observed) and not self.baseline else None

    @property
    def after(self) -> Spread:
        """The final headline; for a baseline, over the different dense models."""
        if not self.baseline:
            return Spread.of(r.value(r.pruned) for r in self.records)
        trained = {r.recipe["seed"]: r.value(r.dense) for r in self.records}
        loaded = sorted({r.value(r.dense) for r in self.records})  # one checkpoint is one model for all seeds
        return Spread.of(loaded if self.records[0].recipe.get("checkpoint") else trained.values())

    @property
    def change(self) -> Spread | None:
        """Each run's headline minus that of its own dense model; None for a baseline."""
        return None if self.baseline else Spread.of(r.value(r.pruned) - r.value(r.dense) for r in self.records)

    @property
    def compression(self) -> float | None:
        """All parameters of the dense model divided by the remaining ones, mean over the runs."""
        if self.baseline:
            return _mean(self.records, lambda r: _finite(r.dense.parameters.compression))
        return _mean(
            self.records,
            lambda r: _times(_finite(r.pruned.parameters.compression), r.dense.parameters.all, r.pruned.parameters.all),
        )

    @property
    def theoretical(self) -> float | None:
        """Theoretical speed-up: MACs of the dense model divided by computed MACs, mean over the runs."""
        if self.baseline:
            return _mean(self.records, lambda r: _finite(r.dense.macs.speedup))
        return _mean(self.records, lambda r: 1 / left if (left := left_of(r)) else None)

    @property
    def raw(self) -> float:
        """Bytes of the weights' file, mean over the runs."""
        return _mean(self._observed(), lambda o: o.bytes.raw) or 0.0

    @property
    def zipped(self) -> float:
        """Bytes of this file after zlib, mean over the runs."""
        return _mean(self._observed(), lambda o: o.bytes.zipped) or 0.0

    @property
    def measured(self) -> list[LatencyReport]:
        """The latencies of the timed runs."""
        return [r.latency for r in self.records if r.latency is not None]

    @property
    def machines(self) -> int:
        """Number of different machines, batches and torch versions of the latencies."""
        return len({(m.device, m.threads, m.batch, m.torch_version) for m in self.measured})

    @property
    def speedup(self) -> float | None:
        """Measured speed-up: median over the runs of best dense over best pruned time; None without timing."""
        return statistics.median(speedup_of(m) for m in self.measured) if self.measured else None

    def time(self, model: str) -> tuple[str, float] | None:
        """Returns (best executions, median over the runs of the best time in ms) of ``dense`` or ``pruned``."""
        if not self.measured:
            return None
        fastest = [m.best(model) for m in self.measured]
        return "/".join(sorted({name for name, _ in fastest})), statistics.median(time.median for _, time in fastest)

    def _observed(self) -> list[Observed]:
        return [r.dense if self.baseline else r.pruned for r in self.records]


@dataclass(frozen=True)
class Group:
    """One task: a model on a data set.

    Attributes:
        title: Title for readers.
        slug: Part of file names, unique among the groups.
        headline: Name of the metric.
        baselines: The dense models.
        rows: The pruned models.
    """

    title: str
    slug: str
    headline: str
    baselines: tuple[Row, ...]
    rows: tuple[Row, ...]

    @property
    def records(self) -> list[Record]:
        """All records of the group."""
        return [record for row in self.rows for record in row.records]

    @property
    def seen(self) -> str:
        """Note beside numbers of the validation split if a run began with a checkpoint; else empty."""
        return SEEN if any(record.recipe.get("checkpoint") for record in self.records) else ""

    @property
    def scale(self) -> float:
        """100 if the headline is a fraction, shown in per cent; else 1. Without a recorded unit the values decide."""
        if units := {record.units[self.headline] for record in self.records if self.headline in record.units}:
            return 100.0 if units == {"%"} else 1.0
        values = [r.value(o) for r in self.records for o in (r.dense, r.before, r.pruned) if o is not None]
        return 100.0 if all(0 <= value <= 1 for value in values) else 1.0

    @property
    def unit(self) -> str:
        """Unit of the headline as shown, with a leading space."""
        return " %" if self.scale == 100 else ""

    @property
    def in_unit(self) -> str:
        """The unit in brackets, with a leading space."""
        return f" ({self.unit.strip()})" if self.unit else ""

    @property
    def lines(self) -> dict[str, list[Row]]:
        """Rows of each line of a figure, least compressed first."""
        lines: dict[str, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (row.line, row.compression or math.inf, row.theoretical or math.inf)):
            lines.setdefault(row.line, []).append(row)
        return lines

    def common(self, *keys: str) -> str:
        """Returns ``key value`` of recipe fields, ``varies`` if runs differ; fields of no run are left out."""
        flat = [flatten(record.recipe) for record in self.records]
        texts = []
        for key in keys:
            values = {text_of(recipe.get(key)) for recipe in flat}
            if not values <= {"none", "[]"}:
                texts.append(f"{key} {values.pop() if len(values) == 1 else 'varies'}")
        return ", ".join(texts)


def groups(records: Sequence[Record]) -> list[Group]:
    """Returns the tasks among records, each with its rows, all sorted."""

    def key(record: Record) -> tuple[str, str, str, str]:
        return record.task, record.headline, str(record.recipe["model"]), str(record.recipe["data"])

    found = [list(part) for _, part in groupby(sorted(records, key=key), key)]
    slugs = ["".join(c if c.isalnum() else "-" for c in part[0].task.lower()).strip("-") for part in found]
    often = Counter(slugs)
    unique = [slug if often[slug] == 1 else f"{slug}-{number}" for number, slug in enumerate(slugs, 1)]
    return [
        Group(part[0].task, slug, part[0].headline, _baselines(part), _rows(part))
        for part, slug in zip(found, unique, strict=True)
    ]


def _rows(records: Sequence[Record]) -> tuple[Row, ...]:
    by_method = _by(records, method_of)
    return tuple(row for method, same in by_method for row in _rows_of(method, same))


def _rows_of(method: str, records: Sequence[Record]) -> Iterable[Row]:
    family = common_family(records)
    varying = varying_of(records, lambda key: not named_elsewhere(key, family.shown if family is not None else ()))

    def key(record: Record) -> tuple[str, str, str, float, str]:
        return pattern_of(record), scope_of(record), settings_of(record, varying), fraction_of(record), asked_of(record)

    for (pattern, scope, settings, _, asked), runs in _by(records, key):
        yield Row(method, pattern, scope, asked, settings, tuple(runs))


def _baselines(records: Sequence[Record]) -> tuple[Row, ...]:
    varying = varying_of(records, lambda key: key.startswith(DENSE))
    named: dict[tuple[Any, ...], list[str]] = {}

    def model(record: Record) -> tuple[Any, ...]:
        # One checkpoint with equal measurements is one model, even if a setting is written differently (normalize=auto or by
        # name).
        if checkpoint := record.recipe.get("checkpoint"):
            return checkpoint, record.value(record.dense), record.dense.bytes
        return (settings_of(record, varying),)

    for record in records:
        parts = [text for key in varying if (text := settings_of(record, [key]))] + (
            [] if _trained(record) else ["not trained"]
        )
        named[model(record)] = [part for part in named.get(model(record), parts) if part in parts]
    by_settings = _by(records, lambda record: ", ".join(named[model(record)]))
    return tuple(Row("dense", "", "", "", settings, tuple(runs)) for settings, runs in by_settings)


def _trained(record: Record) -> bool:
    """Tells whether the dense model was trained, here or before; otherwise it is the initial model."""
    epochs = (record.recipe.get("dense") or {}).get("epochs", 1)
    return epochs > 0 or bool(record.recipe.get("checkpoint")) or "pretrained" in str(record.recipe["model"])


def _by(records: Iterable[Record], key: Callable[[Record], Any]) -> list[tuple[Any, list[Record]]]:
    return [(value, list(part)) for value, part in groupby(sorted(records, key=key), key)]


def speedup_of(latency: LatencyReport) -> float:
    """Returns the measured speed-up of a run: the best dense execution over the best pruned one."""
    return latency.speedup("pruned", over="dense")


def _finite(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None


def _times(ratio: float | None, dense: int, now: int) -> float | None:
    """Returns a model's ratio by its zeros times the ratio by its removed parts; None if infinite."""
    return ratio if ratio is None or dense == now else ratio * dense / now if now else None


def _mean(things: Iterable[T], read: Callable[[T], float | None]) -> float | None:
    values = [read(one) for one in things]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
