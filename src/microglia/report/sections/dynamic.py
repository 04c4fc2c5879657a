"""Tables of dynamic runs: what their gates were expected to compute and what they do."""

from __future__ import annotations

from statistics import fmean

from microglia.report.cells import Entry, drop_column, markdown_table, of_spread, of_words
from microglia.report.labels import rule_of
from microglia.report.rows import Group, Row, Spread
from microglia.report.sections.routing import Routing

WORDS = ("method", "rule", "asked", "settings")
EXPLAINED = (
    "Gates choose for each input what is computed; shares are in % of the dense model's multiply-accumulates. Honest: all that "
    "is computed, heads, depthwise layers and full residual widths included. Paper: as published, heads and depthwise layers "
    "for free. Predicted: before the training, on training images. Precision and recall: of the masks against the targets. "
    "Routes: distinct ones of so many test inputs. ± is over seeds where a column does not say inputs. In the figure stand "
    "static runs beside, by the multiply-accumulates of their kept weights."
)


def dynamic_table(group: Group) -> tuple[list[str], list[tuple[Row, list[Entry]]]]:
    """Returns the titles and rows of the table of a task's dynamic models; no row where there are none."""
    unit = f", {group.unit.strip()}" if group.unit else ""
    titles = ["method", "rule", "asked", "settings", "n", "r", "predicted (honest), %", "computed (honest), %"]
    titles += ["± over inputs", "least to most, %", "predicted (paper), %", "computed (paper), %", f"{group.headline}{unit}"]
    titles += ["precision, %", "recall, %", "routes"]
    rows = [(row, _entries(row, group.scale)) for row in group.dynamic]
    if not any(row.settings for row, _ in rows):
        drop_column(titles, [entries for _, entries in rows], "settings")
    return titles, rows


def dynamic_lines(group: Group) -> list[str]:
    """Returns that table for the Markdown file, empty where no run is dynamic."""
    titles, rows = dynamic_table(group)
    return [EXPLAINED, "", *markdown_table(titles, [entries for _, entries in rows], WORDS), ""] if rows else []


def _entries(row: Row, scale: float) -> list[Entry]:
    routes = routings(row)
    over = fmean(one.honest.std for one in routes)
    least, most = min(one.honest.min for one in routes), max(one.honest.max for one in routes)
    return [
        of_words(row.method),
        of_words(rule_of(row.records[0])),
        Entry(row.asked, Spread.of(one.honest.mean for one in routes).mean),
        of_words(row.settings),
        Entry(str(row.after.n), row.after.n),
        _r(row),
        _predicted(row, "honest"),
        of_spread(Spread.of(one.honest.mean for one in routes), 100),
        Entry(f"{100 * over:.2f}", over),
        Entry(f"{100 * least:.1f} to {100 * most:.1f}", most - least),
        _predicted(row, "paper"),
        of_spread(Spread.of(one.paper.mean for one in routes), 100),
        of_spread(row.after, scale),
        of_spread(Spread.of(one.agreement.precision for one in routes), 100),
        of_spread(Spread.of(one.agreement.recall for one in routes), 100),
        _routes(routes),
    ]


def routings(row: Row) -> list[Routing]:
    """Returns what the routes of each of a row's runs tell."""
    return [record.routes for record in row.records if record.routes is not None]


def _r(row: Row) -> Entry:
    found = [record.estimate.r for record in row.records if record.estimate is not None]
    each = [set(r.values()) if isinstance(r, dict) else {r} for r in found]
    if not each or max(map(len, each)) > 1:
        return Entry("by layer" if each else "", 0.0)
    mean = fmean(value for values in each for value in values)
    return Entry(f"{mean:.4f}", mean)


def _predicted(row: Row, count: str) -> Entry:
    found = [getattr(record.estimate, count) for record in row.records if record.estimate is not None]
    return of_spread(Spread.of(found) if found else None, 100)


def _routes(routes: list[Routing]) -> Entry:
    distinct, inputs = fmean(one.routes for one in routes), fmean(one.inputs for one in routes)
    return Entry(f"{distinct:,.0f} of {inputs:,.0f}", distinct)
