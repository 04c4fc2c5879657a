"""A figure in every form a reader may want: PNG and SVG for paper, an interactive page, and its data as JSON and CSV."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.io import to_html

from microglia.report.figures import save
from microglia.report.page import CONFIG, POLICY
from microglia.storage.files import write_atomic

Row = Mapping[str, Any]


def write_figure(
    directory: Path,
    slug: str,
    name: str,
    *,
    printed: Callable[[], Figure],
    interactive: go.Figure,
    told: Mapping[str, Any],
    rows: Sequence[Row],
) -> list[Path]:
    """Writes ``slug-name`` as .png, .svg, .html, .json and .csv, the same data as the same bytes; returns the paths.

    Args:
        directory: Where.
        slug: What it is about, such as the command.
        name: Which figure.
        printed: Makes the figure for paper.
        interactive: The same for the screen; the page needs no network.
        told: Everything the figure is made of, JSON-ready.
        rows: Its points, one mapping each, all with the same keys.

    Raises:
        FileError: They cannot be written.
    """
    paths = save(printed, directory, slug, name)
    contents = {"html": _page(interactive, f"{slug}: {name}", f"{slug}-{name}"), "json": json.dumps(told, indent=1) + "\n"}
    contents["csv"] = _table(rows)
    for form, content in contents.items():
        path = directory / f"{slug}-{name}.{form}"
        write_atomic(path, content)
        paths.append(path)
    return paths


def _page(figure: go.Figure, title: str, mark: str) -> str:
    body = to_html(figure, full_html=False, include_plotlyjs=True, div_id=mark, config=CONFIG)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<title>{html.escape(title)}</title>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
