"""The page: tables and interactive figures in one file that needs no network, filtered by method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from microglia.core.optional import needs
from microglia.report.interactive import POLICY, markup
from microglia.report.opening import byte_bars, opening
from microglia.report.read import Collected
from microglia.report.rows import Group
from microglia.report.section import pictures_of, tables_of
from microglia.report.table import what_ran

with needs("report", "jinja2", "plotly", what="A report"):
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

TEMPLATE = "page.html"
"""The template beside this file; it escapes everything except the scripts of plotly."""


def page(found: Collected, tasks: Sequence[Group]) -> str:
    """Returns ``report.html``.

    Args:
        found: The collected records.
        tasks: The groups of records.
    """
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        files("microglia.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    sources = Counter(record.source.partition("#")[0] for record in found.records)
    return template.render(
        policy=POLICY,
        plotly=get_plotlyjs(),
        found=found,
        methods=sorted({row.method for group in tasks for row in group.rows}),
        tasks=[_task(group) for group in tasks],
        sources=[f"{name} ({count})" for name, count in sorted(sources.items())],
    )


def _task(group: Group) -> dict[str, Any]:
    """Returns the template's values of one task."""
    return {
        "title": group.title,
        "opening": opening(group),
        "facts": what_ran(group),
        "bars": byte_bars(group),
        "tables": tables_of(group),
        "plots": [markup(picture.chart, f"plot-{group.slug}-{number}") for number, picture in enumerate(pictures_of(group))],
    }
