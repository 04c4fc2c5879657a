"""The chart of double descent: training and test error over width or samples."""

from __future__ import annotations

from microglia.report.chart import COLORS, Axis, Chart, Line, Look, Panel, Rule
from microglia.studies.descent.result import Descent
from microglia.studies.study import Figure

LINES = (("test", Look(COLORS[1], "circle", size=5)), ("train", Look(COLORS[0], "square", "dash", size=5)))
LABELS = 14  # at most so many places are named at the axis


def figures(told: Descent) -> list[Figure]:
    """Returns the figure, named ``width`` or ``samples``.

    Args:
        told: See `microglia.studies.descent.study.view_descent`.
    """
    return [Figure(told.over, descent_chart(told), told.rows, told)]


def descent_chart(told: Descent) -> Chart:
    """Returns two panels over width or samples, on a log scale: error, and loss."""
    edge = _edge(told)
    rules = [] if edge is None else [Rule(edge, _edge_label(told), upright=True, label=_edge_label(told))]
    guessing = Rule(100 * told.chance, "guessing", color="#7f7f7f", dash="dot", label="guessing")
    panels = [
        Panel(_across(told), Axis("error (%)", limits=(0, None), unit=" %"), _lines(told, "error", 100), [guessing, *rules]),
        Panel(_across(told), Axis("loss (nats)"), _lines(told, "loss", 1), rules),
    ]
    return Chart(_title(told), panels, columns=2, size=(11, 4.8), legend=4)


def _lines(told: Descent, what: str, scale: float) -> list[Line]:
    rows = told.rows
    notes = [f"width {row.width:,}, {row.samples:,} samples, {row.parameters:,} parameters" for row in rows]
    return [
        Line(
            "test, true labels" if split == "test" else "training, noisy labels",
            [row.place(told.over) for row in rows],
            [scale * getattr(row, f"{split}_{what}") for row in rows],
            look=look,
            notes=notes,
        )
        for split, look in LINES
    ]


def _across(told: Descent) -> Axis:
    places = sorted({row.place(told.over) for row in told.rows})
    ticks = places[:: -(-len(places) // LABELS)]
    title = {"width": "width", "samples": "training samples"}[told.over]
    return Axis(title, "log", ticks=ticks, labels=[f"{place:,}" for place in ticks])


def _edge(told: Descent) -> int | None:
    """Returns where fitting begins (widths) or ends (samples)."""
    found: int | None = told.threshold if told.over == "width" else told.capacity
    return found


def _edge_label(told: Descent) -> str:
    return f"{'first' if told.over == 'width' else 'last'} with at most {100 * told.epsilon:g} % training error"


def _title(told: Descent) -> str:
    config, rows = told.config, told.rows
    fixed = f"{rows[0].samples:,} samples" if told.over == "width" else f"width {rows[0].width:,}"
    return (
        f"{config.family} on {told.data}, {fixed}, label noise {100 * config.noise:g} %: {config.steps:,} steps of "
        f"{config.optimizer}, lr {config.lr:g}"
    )
