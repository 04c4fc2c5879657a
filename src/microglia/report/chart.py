"""Charts: a figure described once, as a value; `printed` draws it for paper and `interactive` for the screen.

Two renderers, not one: the static export of plotly needs kaleido and a browser, and neither is installed with this library.
The value imports neither matplotlib nor plotly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito 2008: told apart by colour-blind readers. Black is the dense model; their yellow is too pale on white."""
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star", "triangle-left")
DASHES = ("solid", "dash", "dashdot", "dot")
"""In greyscale the lines are told apart by markers and dashes."""


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        title: Name and unit of the quantity.
        scale: ``symlog`` is linear below 0.01 and logarithmic above; the screen shows it as linear.
        limits: Smallest and largest value shown; None leaves a side to the data.
        ticks: Values to mark; empty for automatic ones.
        labels: Words at these ticks; empty for their numbers.
        suffix: Text after the number of each tick.
        whole: Whether automatic ticks are whole numbers.
        falling: Whether values fall along the axis.
        unit: Text after a value under the pointer.
        color: Color of the title.
        upright: Whether the words at the ticks stand upright, where they are long and many.
        bare: Whether it has neither ticks nor a line.
    """

    title: str = ""
    scale: Literal["linear", "log", "symlog"] = "linear"
    limits: tuple[float | None, float | None] = (None, None)
    ticks: Sequence[float] = ()
    labels: Sequence[str] = ()
    suffix: str = ""
    whole: bool = False
    falling: bool = False
    unit: str = ""
    color: str = "black"
    upright: bool = False
    bare: bool = False

    @property
    def words(self) -> list[str]:
        """Labels of the given ticks."""
        return list(self.labels) or [f"{tick:g}{self.suffix}" for tick in self.ticks]


@dataclass(frozen=True)
class Look:
    """How a line looks.

    Attributes:
        color: As HTML writes it.
        marker: One of `MARKERS`, ``plus``, or empty.
        dash: One of `DASHES`, or empty for points alone.
        hollow: Whether markers are filled with white.
        size: Size of the markers, in points.
        width: Width of the line, in points.
        outline: Color of a thin band around the line, on a dark ground; empty for none.
    """

    color: str = COLORS[0]
    marker: str = ""
    dash: str = "solid"
    hollow: bool = False
    size: float = 6
    width: float = 1.5
    outline: str = ""


def look(number: int, size: float = 6) -> Look:
    """Returns how the line of a number looks beside others."""
    return Look(COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)], size=size)


@dataclass(frozen=True)
class Line:
    """Points, joined by a line or not.

    Attributes:
        name: Label in the legend; lines of one name share one entry, and an empty name has none.
        x: Places, the same number as ``y``.
        y: Values; NaN leaves a gap.
        x_error: Half the width of each error bar across; empty where there are none.
        y_error: Half the height of each error bar.
        look: How it looks.
        notes: What the screen shows of each point beside its values; one text for all, or one for each.
        method: Method whose box on the page shows and hides the line; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    x_error: Sequence[float] = ()
    y_error: Sequence[float] = ()
    look: Look = Look()
    notes: Sequence[str] | str = ()
    method: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars that stand on the axis across; those of a later entry stand in front of an earlier one.

    Attributes:
        name: Label in the legend.
        x: Places of the bars.
        heights: One for each place.
        color: As HTML writes it.
        width: Width of a bar, in units of the axis.
        notes: What the screen says of each bar beside its height; one for each, or empty.
        errors: Half the height of each error bar; empty where there are none.
    """

    name: str
    x: Sequence[float]
    heights: Sequence[float]
    color: str = COLORS[0]
    width: float = 0.8
    notes: Sequence[str] = ()
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Rule:
    """A straight line across a panel, such as the dense model.

    Attributes:
        at: The value.
        name: Label in the legend.
        upright: Whether it stands at a place of x instead of lying at a value of y.
        color: As HTML writes it.
        dash: One of `DASHES`.
        spread: Half the width of a pale band around it.
        label: Text beside it on the screen, where a rule is in no legend.
    """

    at: float
    name: str
    upright: bool = False
    color: str = "black"
    dash: str = "dash"
    spread: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Field:
    """Values over a plane, shown by color.

    Attributes:
        x: Places of the columns; with cells their edges, one more than columns.
        y: Places of the rows, likewise.
        values: Rows of numbers; NaN is left blank.
        title: Beside the scale of colors.
        levels: Levels of contours; empty for cells of one color each.
        colors: ``Blues``, ``Viridis`` or ``Viridis_r``.
        limits: Values of the first and the last color, where colors are linear and there are no levels; None leaves an end to
            the data.
        scale: Whether the scale of colors is shown.
        log: Whether colors are on a log scale; the values are positive then.
        ticks: Values to mark at the scale of colors.
        labels: Words at these ticks.
        traced: Whether every second level is drawn as a thin white line.
        under: What the screen says of each place, by name: rows of numbers; empty for the values themselves.
    """

    x: Sequence[float]
    y: Sequence[float]
    values: Any
    title: str
    levels: Sequence[float] = ()
    colors: str = "Blues"
    log: bool = False
    ticks: Sequence[float] = ()
    labels: Sequence[str] = ()
    traced: bool = False
    under: tuple[tuple[str, Any], ...] = ()
    limits: tuple[float | None, float | None] = (None, None)
    scale: bool = True


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        x: Axis across.
        y: Axis up.
        lines: Its lines.
        rules: Its straight lines.
        field: Values behind the lines, or None.
        title: Above it.
        right: A second axis up, with lines of its own, or None.
        right_lines: Lines on that axis.
        empty: What it says where it has no line.
        aspect: Height over width of the box; None for what the space gives.
        bars: Its bars, behind the lines.
        image: Pixels that the panel shows, uint8 (height, width) or (height, width, 3); None for none.
    """

    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    rules: Sequence[Rule] = ()
    field: Field | None = None
    title: str = ""
    right: Axis | None = None
    right_lines: Sequence[Line] = ()
    empty: str = ""
    aspect: float | None = None
    bars: Sequence[Bars] = ()
    image: Any = None


@dataclass(frozen=True)
class Chart:
    """A whole figure.

    Attributes:
        title: Above it.
        panels: Row by row.
        columns: Panels in a row.
        size: Width and height on paper, in inches.
        shared: Whether panels of a row share their axis up.
        legend: Columns of the legend below the figure; 0 for a legend in every panel, -1 for none.
        note: Title on the screen instead of ``title``.
        height: On the screen, in pixels.
    """

    title: str
    panels: Sequence[Panel]
    columns: int = 1
    size: tuple[float, float] = (8.0, 5.8)
    shared: bool = False
    legend: int = 2
    note: str = ""
    height: int = 480
