"""Instability against the parting epoch, and the lines themselves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from microglia.report.figure_files import write_figure
from microglia.report.figures import COLORS, DASHES, MARKERS
from microglia.studies.instability.analysis import STABLE

Json = Mapping[str, Any]


def draw(told: Json, directory: Path) -> list[Path]:
    """Writes instability against k (left) and the test error along each line (right); returns the paths.

    Raises:
        FileError: They cannot be written.
    """
    rows = [
        {"network": r["network"], "density": r["density"], "epoch": r["epoch"], "seed": r["seed"], "pair": r["pair"]}
        | {"alpha": alpha, "train_error": train, "test_error": test}
        for r in told["rows"]
        for alpha, train, test in zip(r["alphas"], r["error"]["train"], r["error"]["test"], strict=True)
    ]
    return write_figure(
        directory, "instability", "lines", printed=partial(_printed, told), interactive=_interactive(told), told=told, rows=rows
    )


def _networks(told: Json) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in told["summary"]))


def _places(told: Json, row: Json) -> tuple[int, int]:
    """Returns which network a line belongs to, its dashes, and which epoch its copies part at, its color."""
    epochs = sorted({each["epoch"] for each in told["rows"]})
    return _networks(told).index(row["network"]), epochs.index(row["epoch"])


def _printed(told: Json) -> Figure:
    figure = Figure(figsize=(12.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(told["task"])
    left, right = figure.subplots(1, 2)
    for place, name in enumerate(_networks(told)):
        own = [row for row in told["summary"] if row["network"] == name]
        style = {"color": COLORS[place], "marker": MARKERS[place], "capsize": 3}
        for split, dash in (("test", DASHES[0]), ("train", DASHES[1])):
            means = [100 * row["instability"][split]["mean"] for row in own]
            spread = [100 * (row["instability"][split]["std"] or 0.0) for row in own]
            left.errorbar([row["epoch"] for row in own], means, yerr=spread, linestyle=dash, label=f"{name}, {split}", **style)
    left.axhline(100 * STABLE, color="black", linewidth=1, linestyle=(0, (6, 3)), label="stable below")
    left.set_xlabel("epoch at which the copies part")
    left.set_ylabel("instability: rise of the error (%)")
    for row in told["rows"]:
        label = f"{row['network']}, k = {row['epoch']}" if row["seed"] == told["rows"][0]["seed"] and not row["pair"] else None
        network, epoch = _places(told, row)
        style = {"color": COLORS[epoch % len(COLORS)], "linestyle": DASHES[network % len(DASHES)], "linewidth": 1.2}
        right.plot(row["alphas"], [100 * e for e in row["error"]["test"]], label=label, **style)
    right.set_xlabel("place on the straight line between the copies")
    right.set_ylabel("test error (%)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="0.9")
        axes.legend(frameon=False, fontsize="small")
    return figure


def _interactive(told: Json) -> go.Figure:
    figure = make_subplots(cols=2, horizontal_spacing=0.1)
    for place, name in enumerate(_networks(told)):
        own = [row for row in told["summary"] if row["network"] == name]
        for split, dash in (("test", "solid"), ("train", "dash")):
            trace = go.Scatter(
                x=[row["epoch"] for row in own],
                y=[100 * row["instability"][split]["mean"] for row in own],
                error_y={"type": "data", "array": [100 * (row["instability"][split]["std"] or 0.0) for row in own]},
                name=f"{name}, {split}",
                line={"color": COLORS[place], "dash": dash},
            )
            figure.add_trace(trace, row=1, col=1)
    figure.add_hline(100 * STABLE, line={"color": "black", "dash": "dash", "width": 1}, row=1, col=1)
    for row in told["rows"]:
        name = f"{row['network']}, k = {row['epoch']}, seed {row['seed']}, pair {row['pair']}"
        network, epoch = _places(told, row)
        line = {"color": COLORS[epoch % len(COLORS)], "dash": ("solid", "dash", "dot")[network % 3]}
        figure.add_trace(
            go.Scatter(x=row["alphas"], y=[100 * e for e in row["error"]["test"]], name=name, line=line), row=1, col=2
        )
    figure.update_xaxes(title="epoch at which the copies part", row=1, col=1)
    figure.update_yaxes(title="instability (%)", row=1, col=1)
    figure.update_xaxes(title="place on the line", row=1, col=2)
    figure.update_yaxes(title="test error (%)", row=1, col=2)
    return figure.update_layout(template="plotly_white", height=480, title=told["task"])
