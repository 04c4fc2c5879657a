"""Charts: one value, the same numbers on paper and on the screen, whatever it is made of."""

import math

import numpy as np
import pytest

from microglia.report.chart import DASHES, MARKERS, Axis, Chart, Field, Line, Look, Panel, Rule, look
from microglia.report.interactive import interactive, markup
from microglia.report.printed import printed, save


def lines(count=3):
    return [
        Line(f"line {number}", [1, 2, 4], [number, number + 1, math.nan], look=look(number), notes=["a", "b", "c"])
        for number in range(count)
    ]


@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
@pytest.mark.parametrize("number", range(len(MARKERS)))
def test_both_renderers_draw_the_same_points(scale, number):
    shown = Line("one", [1, 2, 4], [3.0, 1.0, 2.0], look=look(number))
    chart = Chart("title", [Panel(Axis("x", scale), Axis("y"), [shown])])
    (axes,) = printed(chart).axes
    (trace,) = interactive(chart).data
    assert axes.lines[0].get_xdata() == pytest.approx(trace.x)
    assert axes.lines[0].get_ydata() == pytest.approx(trace.y)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x", "y")
    assert interactive(chart).layout.xaxis.title.text == "x"
    assert (axes.lines[0].get_color(), trace.line.dash) == (trace.line.color, DASHES[number % len(DASHES)])


def test_error_bars_rules_and_words_are_on_both():
    bars = Line("bars", [1, 2], [3, 4], x_error=[0.5, 0.0], y_error=[0.25, 0.5], method="snip")
    rules = [Rule(3.5, "dense", spread=0.1), Rule(1.5, "edge", upright=True, label="edge")]
    chart = Chart("title", [Panel(Axis("x", limits=(0, 3)), Axis("y", ticks=(3, 4), labels=("three", "four")), [bars], rules)])
    (axes,) = printed(chart).axes
    up = axes.containers[0].lines[2][1].get_segments()
    assert [segment[1][1] - segment[0][1] for segment in up] == pytest.approx([0.5, 1.0])
    assert {line.get_label(): line for line in axes.lines}["dense"].get_ydata()[0] == 3.5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["three", "four"]
    assert axes.get_xlim() == (0, 3)
    figure = interactive(chart)
    (trace,) = figure.data
    assert (list(trace.error_y.array), trace.meta) == ([0.25, 0.5], "snip")
    assert [(shape.y0, shape.x0) for shape in figure.layout.shapes if shape.y0 == 3.5 or shape.x0 == 1.5] == [
        (3.5, 0),
        (0, 1.5),
    ]
    assert list(figure.layout.yaxis.ticktext) == ["three", "four"]
    assert list(figure.layout.xaxis.range) == [0, 3]


def test_lines_of_one_name_share_an_entry_of_the_legend_over_panels():
    panel = Panel(Axis(), Axis(), [*lines(2), Line("line 0", [1], [1]), Line("", [1], [1])])
    chart = Chart("title", [panel, panel], columns=2)
    assert [text.get_text() for text in printed(chart).legends[0].get_texts()] == ["line 0", "line 1"]
    assert [trace.name for trace in interactive(chart).data if trace.showlegend] == ["line 0", "line 1"]


@pytest.mark.parametrize("levels", [(), (1.0, 10.0, 100.0)])
@pytest.mark.parametrize("log", [False, True])
def test_a_field_is_cells_or_contours_with_a_scale_of_colors(levels, log):
    edges = [0, 1, 2] if not levels else [0, 1]
    field = Field(edges, edges, [[1.0, 10.0], [math.nan, 100.0]], "units", levels, log=log)
    right = Line("heat", [0, 1], [1, 100], look=Look("red"))
    panel = Panel(Axis("x"), Axis("y"), field=field, right=Axis("t", "log"), right_lines=[right])
    chart = Chart("title", [panel])
    axes = printed(chart).axes
    assert any(one.get_ylabel() == "units" for one in axes)
    assert [line.get_label() for one in axes for line in one.lines if line.get_label() == "heat"] == ["heat"]
    drawn, line = interactive(chart).data
    assert drawn.type == ("contour" if levels else "heatmap")
    assert drawn.z[1][0] is None
    assert drawn.z[1][1] == pytest.approx(2 if log else 100)
    assert line.yaxis == "y2"
    assert "NaN" not in markup(chart, "mark").partition("Plotly.newPlot(")[2]


def test_an_empty_panel_says_why():
    chart = Chart(
        "title", [Panel(Axis(), Axis(), lines(1)), Panel(Axis(), Axis(), empty="not measured")], columns=2, shared=True
    )
    assert [text.get_text() for text in printed(chart).axes[1].texts] == ["not measured"]
    (said,) = interactive(chart).layout.annotations
    assert (said.text, said.xref) == ("not measured", "x2 domain")


def test_files_are_the_same_every_time_and_a_dollar_is_a_dollar(tmp_path):
    chart = Chart("costs $5 and $6", [Panel(Axis("$x$"), Axis("y", "symlog"), lines())])
    first, second = (save(chart, tmp_path / name, "slug", "name") for name in "ab")
    assert [path.name for path in first] == ["slug-name.png", "slug-name.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert markup(chart, "mark") == markup(chart, "mark")
    assert "mathdefault" not in first[1].read_text()


def test_values_of_numpy_are_taken():
    line = Line("one", np.arange(3), np.array([1.0, np.inf, 2.0]))
    (trace,) = interactive(Chart("title", [Panel(Axis(), Axis(), [line])])).data
    assert list(trace.y) == [1.0, None, 2.0]
