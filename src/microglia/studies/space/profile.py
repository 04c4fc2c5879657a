"""The profile of a path in weight space: the metrics at its places, its length, and the height of its barrier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn

from microglia.core.progress import progress_bar
from microglia.storage.run import Progress
from microglia.studies.space.curves import Chain, Curve, check_parameter, walked
from microglia.studies.space.ensembling import Averaged, probabilities
from microglia.studies.space.gauge import Gauge
from microglia.studies.space.points import Point, move, visiting
from microglia.tasks.task import Split

Path = Callable[[float], Point]
"""A path: the place at t in [0, 1]. `Curve.point` is one, `polyline` makes one."""
Stop = TypeVar("Stop")


@dataclass(frozen=True)
class Summary:
    """One metric along a path.

    Attributes:
        min: Smallest value at the places looked at.
        max: Largest.
        mean: Plain mean over these places.
        integral: Mean weighted by length, sum (v_i + v_i+1)/2 dl_i / sum dl_i (trapezoids; survey 2.1 e).
        barrier: max over t of v(t) - ((1 - t) v(0) + t v(1)): by how much the path rises above its ends. At least 0 where both
            ends are among the places. Where a metric is better when it is higher, look at the error instead.
    """

    min: float
    max: float
    mean: float
    integral: float
    barrier: float


@dataclass(frozen=True)
class Profile:
    """The metrics of a path at some places.

    Attributes:
        ts: Where, increasing from the first to the last.
        lengths: Euclidean length walked to each, by chords, from 0.
        values: Metric -> one value for each place.
    """

    ts: tuple[float, ...]
    lengths: tuple[float, ...]
    values: dict[str, tuple[float, ...]]

    @property
    def summaries(self) -> dict[str, Summary]:
        """The summary of every metric."""
        return {name: summary(self.ts, self.lengths, values) for name, values in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, the summaries too, JSON-ready."""
        return {
            "ts": list(self.ts),
            "lengths": list(self.lengths),
            "values": {name: list(values) for name, values in self.values.items()},
            "summary": {name: asdict(found) for name, found in self.summaries.items()},
        }


def summary(ts: Sequence[float], lengths: Sequence[float], values: Sequence[float]) -> Summary:
    """Returns the summary of one metric.

    Args:
        ts: Parameters of the places, increasing.
        lengths: Walked to each place, from 0.
        values: At each place.
    """
    mean = sum(values) / len(values)
    steps = zip(pairwise(lengths), pairwise(values), strict=True)
    walk = sum((there - here) * (one + other) / 2 for (here, there), (one, other) in steps)
    first, last = values[0], values[-1]
    span = (ts[-1] - ts[0]) or 1.0
    line = [first + (last - first) * (t - ts[0]) / span for t in ts]
    return Summary(
        min=min(values),
        max=max(values),
        mean=mean,
        integral=walk / lengths[-1] if lengths[-1] > 0 else mean,  # a path between equal ends has no length
        barrier=max(value - straight for value, straight in zip(values, line, strict=True)),
    )


def polyline(points: Sequence[Point]) -> Path:
    """Returns the path of straight segments through places, each segment of n as long in t (1/n) and walked at constant speed.

    Raises:
        MicrogliaError: There are fewer than 2 places, or they are not of one architecture.
    """
    return Curve(Chain(len(points) - 1), tuple(points)).point


def profile(
    model: nn.Module,
    path: Path,
    gauge: Gauge,
    ts: Sequence[float],
    *,
    progress: Progress | None = None,
    title: str = "profile",
) -> Profile:
    """Measures a path at some places; batch-norm statistics are made anew at each, as the gauge says.

    Args:
        model: A network of the path's architecture, without masks, on the device to compute on; it is left as it was.
        path: Place by t.
        gauge: How to measure. Where it measures an accuracy, the error (1 - accuracy) is among the values too.
        ts: Where to measure, in [0, 1], increasing.
        progress: Where an interrupted measurement goes on, place by place.
        title: Title of the progress bar.

    Raises:
        MicrogliaError: A t is out of range, or the path is of another architecture.
    """
    for t in ts:
        check_parameter(t)
    rows = visit_all(model, path, ts, gauge, progress=progress, title=title)
    values = {name: tuple(row[name] for row in rows) for name in rows[0]}
    return Profile(tuple(ts), tuple(walked(path, ts)), values)


def visit_all(
    model: nn.Module,
    place: Callable[[Stop], Point],
    stops: Sequence[Stop],
    gauge: Gauge,
    *,
    progress: Progress | None = None,
    title: str = "places",
) -> list[dict[str, float]]:
    """Returns the metrics at places of weight space, one row for each stop; the model is visited and left as it was.

    Args:
        model: A network of the places' architecture.
        place: Where a stop is.
        stops: Arguments of ``place``.
        gauge: How to measure; with the error beside every accuracy.
        progress: Where an interrupted measurement goes on, stop by stop.
        title: Title of the progress bar.
    """
    rows: list[dict[str, float]] = list(progress.state["rows"]) if progress is not None and progress.state is not None else []
    with visiting(model), progress_bar(title, total=len(stops), done=len(rows)) as bar:
        for stop in stops[len(rows) :]:
            move(model, place(stop))
            rows.append(with_errors(gauge(model)))
            if progress is not None:
                progress.save({"rows": rows})
            bar.advance()
    return rows


def with_errors(metrics: dict[str, float]) -> dict[str, float]:
    """Returns metrics with ``test_error`` = 1 - ``test_accuracy`` and so on.

    A barrier is defined for quantities where lower is better.
    """
    return metrics | {f"{k.removesuffix('accuracy')}error": 1 - v for k, v in metrics.items() if k.endswith("accuracy")}


@dataclass(frozen=True)
class AlongPath:
    """Accuracy of networks of a path, alone and averaged; in [0, 1], one value for each place.

    Attributes:
        ts: Where the networks are.
        alone: Accuracy of phi(t).
        pair: Accuracy of the mean of the probabilities of phi(first t) and phi(t).
        so_far: Accuracy of the mean over all places up to t.
    """

    ts: tuple[float, ...]
    alone: tuple[float, ...]
    pair: tuple[float, ...]
    so_far: tuple[float, ...]


def ensemble(model: nn.Module, path: Path, gauge: Gauge, ts: Sequence[float], *, split: Split = "test") -> AlongPath:
    """Returns how accurate the networks of a path are when their probabilities (not logits) are averaged.

    Source: Garipov et al. 2018, figure 2 right.

    Args:
        model: A classifier of the path's architecture; it is visited and left as it was.
        path: Place by t.
        gauge: How batch-norm statistics are made at every place, and which batches to look at.
        ts: Where the networks are, in [0, 1].
        split: On which to measure.

    Raises:
        MicrogliaError: A t is out of range, or the task is no classification.
    """
    for t in ts:
        check_parameter(t)
    prepare = replace(gauge, splits=())
    rows: list[tuple[float, float, float]] = []
    so_far = first = Averaged()
    with visiting(model), progress_bar("ensemble", total=len(ts)) as bar:
        for t in ts:
            move(model, path(t))
            prepare(model)
            found = probabilities(model, gauge.task, split, batch_size=gauge.batch_size, limit=gauge.limit, seed=gauge.seed)
            alone, so_far = Averaged().add(*found), so_far.add(*found)
            pair = first.add(*found) if first.members else alone
            first = first if first.members else alone
            rows.append((alone.accuracy, pair.accuracy, so_far.accuracy))
            bar.advance()
    columns = [tuple(column) for column in zip(*rows, strict=True)]
    return AlongPath(tuple(ts), *columns)
