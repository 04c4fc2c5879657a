"""The chart of shifts: accuracy over severity, a panel for each shift, a line for each model."""

from __future__ import annotations

from microglia.report.chart import Axis, Chart, Line, Panel, look
from microglia.studies.shifts.result import Shifts
from microglia.studies.study import Figure

CLEAN = "clean"


def figures(compared: Shifts) -> list[Figure]:
    """Returns the figure of a comparison.

    Args:
        compared: See `microglia.studies.shifts.study.compare_shifts`.
    """
    rows = [
        {"run": run.name, "shift": one.shift, "severity": one.severity, "accuracy": one.accuracy} | {"macs": one.macs.mean}
        for run in compared.runs
        for one in run.results
    ]
    return [Figure("accuracy", shift_chart(compared), rows, compared)]


def shift_chart(compared: Shifts) -> Chart:
    """Returns accuracy over severity, 0 for the clean images, by shift."""
    shifts = list(dict.fromkeys(one.shift for one in compared.runs[0].results if one.shift != CLEAN))
    panels = []
    for shift in shifts:
        lines = []
        for number, run in enumerate(compared.runs):
            own = [one for one in run.results if one.shift in (CLEAN, shift)]
            accuracy = [100 * one.accuracy for one in own]
            lines.append(Line(run.name, [one.severity for one in own], accuracy, look=look(number)))
        panels.append(Panel(Axis("severity", whole=True), Axis("test accuracy (%)", unit=" %"), lines, title=shift))
    title = f"{compared.data}: {compared.inputs:,} test images"
    return Chart(title, panels, columns=len(panels), size=(3.4 * len(panels), 4.2), shared=True, legend=4)
