"""The ticket figure: accuracy and speed of learning of tickets and their controls against density."""

from __future__ import annotations

from microglia.report.chart import Axis, Chart, Line, Panel, Rule, look
from microglia.studies.study import Figure
from microglia.studies.tickets.result import ArmLevel, TicketSearch
from microglia.studies.tickets.statements import ARMS, NAMES

PANELS = (("accuracy", "test accuracy at the end (%)", 100.0), ("early_stop", "step of least validation loss", 1.0))
"""(what, title, factor); the paper draws the same two."""


def figures(told: TicketSearch) -> list[Figure]:
    """Returns accuracy and early stopping against density.

    Args:
        told: See `microglia.studies.tickets.study.find_tickets`.
    """
    rows = [
        {"arm": r.arm, "level": r.level, "density": r.density, "n": r.n}
        | {
            f"{what}_{key}": getattr(getattr(r, what), key)
            for what in ("accuracy", "early_stop", "early_stop_accuracy")
            for key in ("mean", "std")
        }
        for r in told.summary
    ]
    return [Figure("levels", chart(told), rows, told)]


def chart(told: TicketSearch) -> Chart:
    """Returns accuracy and early stopping of every arm against the density, means over seeds."""
    ticks = [100.0 * 0.8**level for level in range(0, 16, 3)]
    x = Axis("weights left (%)", "log", ticks=ticks, labels=[f"{tick:.3g}" for tick in ticks], falling=True, unit=" %")
    panels = [Panel(x, Axis(title), _lines(told, what, factor), _rules(told, what, factor)) for what, title, factor in PANELS]
    return Chart(told.task, panels, columns=len(PANELS), size=(12.5, 5.2), legend=3)


def _own(told: TicketSearch, arm: str) -> list[ArmLevel]:
    return [row for row in told.summary if row.arm == arm]


def _lines(told: TicketSearch, what: str, factor: float) -> list[Line]:
    arms = [arm for arm in ARMS if _own(told, arm)]
    return [
        Line(
            NAMES[arm],
            [100 * row.density for row in _own(told, arm)],
            [factor * row.measured(what).mean for row in _own(told, arm)],
            y_error=[factor * (row.measured(what).std or 0.0) for row in _own(told, arm)],
            look=look(place - 1, size=5),
        )
        for place, arm in enumerate(arms)
        if arm != "dense"
    ]


def _rules(told: TicketSearch, what: str, factor: float) -> list[Rule]:
    return [Rule(factor * row.measured(what).mean, NAMES["dense"], label=NAMES["dense"]) for row in _own(told, "dense")[:1]]
