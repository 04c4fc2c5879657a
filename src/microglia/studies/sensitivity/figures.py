"""Charts of a sensitivity: a map of all layers and densities, and the curves of the layers that lose most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from microglia.report.chart import Axis, Chart, Field, Line, Look, Panel, Rule, look
from microglia.studies.result import encode
from microglia.studies.sensitivity.result import LayerPlaces, LayerSensitivity
from microglia.studies.study import Figure

CURVES = 6
"""Layers with a color of their own."""
GREY = Look("#bbbbbb", width=0.8)


def figures(told: LayerSensitivity) -> list[Figure]:
    """Returns the map and the curves.

    Args:
        told: See `microglia.studies.sensitivity.study.measure_sensitivity`.
    """
    charts = {"map": map_chart(told), "curves": curve_chart(told)}
    return [Figure(name, chart, rows(told), told) for name, chart in charts.items()]


def rows(told: LayerSensitivity) -> list[dict[str, Any]]:
    """Returns one row for each layer and density."""
    return [{"layer": row.layer, "size": row.size, **encode(place)} for row in told.layers for place in row.places]


def map_chart(told: LayerSensitivity) -> Chart:
    """Returns the headline by layer (down) and density (across)."""
    layers, densities = told.layers, told.densities
    scale, unit = _scale(told)
    values = [[scale * _number(place.metrics[told.metric]) for place in row.places] for row in layers]
    field = Field(
        [number - 0.5 for number in range(len(densities) + 1)],
        [number - 0.5 for number in range(len(layers) + 1)],
        values,
        f"{told.split} {told.metric}{unit}",
        colors="Viridis" if told.better == "higher" else "Viridis_r",
    )
    across = Axis("density of the one layer", ticks=range(len(densities)), labels=[f"{d:g}" for d in densities])
    names = [row.layer.removesuffix(".weight") for row in layers]
    up = Axis("", ticks=range(len(names)), labels=names, falling=True)
    height = max(3.0, 1.6 + 0.17 * len(layers))
    return Chart(_title(told), [Panel(across, up, field=field)], size=(7.4, height), legend=-1, height=int(95 * height))


def curve_chart(told: LayerSensitivity) -> Chart:
    """Returns the headline over the density of one layer: those that lose most in color, the others in grey."""
    metric, (scale, unit) = told.metric, _scale(told)
    ranked = sorted(told.layers, key=lambda row: _mean(row, metric), reverse=told.better == "lower")
    lines = [_line("other layers", GREY, row, metric, scale) for row in ranked[CURVES:]]
    named = [
        _line(row.layer.removesuffix(".weight"), look(number), row, metric, scale) for number, row in enumerate(ranked[:CURVES])
    ]
    dense = Rule(scale * _number(told.dense[metric]), "dense")
    ticks = told.densities
    across = Axis("density of the one layer", "log", ticks=ticks, labels=[f"{d:g}" for d in ticks], falling=True)
    panel = Panel(across, Axis(f"{told.split} {metric}{unit}"), [*lines, *named], [dense])
    return Chart(_title(told), [panel], size=(7.4, 5.6), legend=4)


def _line(name: str, looks: Look, row: LayerPlaces, metric: str, scale: float) -> Line:
    return Line(
        name,
        [place.density for place in row.places],
        [scale * _number(place.metrics[metric]) for place in row.places],
        look=looks,
        notes=row.layer,
    )


def _mean(row: LayerPlaces, metric: str) -> float:
    values: Sequence[float] = [_number(place.metrics[metric]) for place in row.places]
    return float(np.nanmean(values)) if not np.isnan(values).all() else -np.inf


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _scale(told: LayerSensitivity) -> tuple[float, str]:
    return (100, " (%)") if told.unit == "%" else (1, "")


def _title(told: LayerSensitivity) -> str:
    return f"{told.task}: one layer pruned, the others dense\n{told.pattern}, {told.score}, without retraining"
