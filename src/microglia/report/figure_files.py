"""A figure as files: PNG and SVG for paper, an interactive page, and its data as JSON and CSV."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microglia.report.chart import Chart
from microglia.report.interactive import POLICY, markup
from microglia.report.printed import save
from microglia.storage.files import write_atomic

Row = Mapping[str, Any]


def write_figure(
    directory: Path,
    slug: str,
    name: str,
    *,
    chart: Chart,
    told: Mapping[str, Any],
    rows: Sequence[Row],
) -> list[Path]:
    """Writes ``slug-name`` as .png, .svg, .html, .json and .csv, the same data as the same bytes; returns the paths.

    Args:
        directory: Directory of the files.
        slug: Prefix of the file names, such as the command.
        name: Name of the figure.
        chart: The figure; its page needs no network.
        told: All data of the figure, JSON-ready.
        rows: Its points, one mapping each, all with the same keys.

    Raises:
        FileError: The files cannot be written.
    """
    paths = save(chart, directory, slug, name)
    contents = {"html": _page(chart, f"{slug}: {name}", f"{slug}-{name}"), "json": json.dumps(told, indent=1) + "\n"}
    contents["csv"] = _table(rows)
    for form, content in contents.items():
        path = directory / f"{slug}-{name}.{form}"
        write_atomic(path, content)
        paths.append(path)
    return paths


def _page(chart: Chart, title: str, mark: str) -> str:
    body = markup(chart, mark, whole=True)
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
