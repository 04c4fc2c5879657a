"""Charts: a figure described once, as a value; `printed` draws it for paper and `interactive` for the screen.

There are two renderers because the static export of plotly needs kaleido and a browser, which this library does not install.
The value imports neither matplotlib nor plotly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito 2008: colour-blind readers can distinguish them. Black is the dense model; their yellow is too pale on
white."""
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star", "triangle-left")
DASHES = ("solid", "dash", "dashdot", "dot")
"""Markers distinguish the lines in greyscale, together with dashes."""


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        title: Name and unit of the quantity.
        scale: ``symlog`` is linear below 0.01 and logarithmic above; the screen shows it as linear.
        limits: Minimum and maximum shown; None takes the limit from the data.
        ticks: Values to mark; empty for automatic ones.
        labels: Texts at these ticks; empty for their numbers.
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
    """The appearance of a line.

    Attributes:
        color: Color in HTML notation.
        marker: One of `MARKERS`, ``plus``, or empty.
        dash: One of `DASHES`, or empty for points only.
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
    """Returns the look of a line by its number, different from the others."""
    return Look(COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)], size=size)


@dataclass(frozen=True)
class Line:
    """Points, with or without a joining line.

    Attributes:
        name: Label in the legend; lines with the same name share one entry, and an empty name has none.
        x: Positions, as many as in ``y``.
        y: Values; NaN leaves a gap.
        x_error: Half the width of each horizontal error bar; empty for none.
        y_error: Half the height of each vertical error bar; empty for none.
        look: Appearance of the line.
        notes: Additional text of each point on the screen; one text for all, or one per point.
        method: Method whose checkbox on the page shows and hides the line; empty for none.
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
        notes: Additional text of each bar on the screen; one per bar, or empty.
        errors: Half the height of each error bar; empty for none.
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
        at: Position of the line.
        name: Label in the legend.
        upright: Whether the line is vertical, at a value of x, instead of horizontal.
        color: Color in HTML notation.
        dash: One of `DASHES`.
        spread: Half the width of a pale band around it.
        label: Text beside it on the screen, for a rule outside the legend.
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
        x: Positions of the columns; with cells their edges, one more than columns.
        y: Positions of the rows, likewise.
        values: Rows of numbers; NaN stays blank.
        title: Title of the color scale.
        levels: Levels of contours; empty for cells of one color each.
        colors: ``Blues``, ``Viridis`` or ``Viridis_r``.
        limits: Values of the first and the last color, for linear colors without levels; None takes the end from the data.
        scale: Whether the color scale is shown.
        log: Whether colors are on a log scale; the values are positive then.
        ticks: Values to mark at the color scale.
        labels: Texts at these ticks.
        traced: Whether every second level is a thin white line.
        under: Values that the screen shows at each position, by name: rows of numbers; empty for the values themselves.
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
        x: Horizontal axis.
        y: Vertical axis.
        lines: Lines of the panel.
        rules: Straight lines of the panel.
        field: Values behind the lines, or None.
        title: Above it.
        right: A second vertical axis with its own lines, or None.
        right_lines: Lines on that axis.
        empty: Text for a panel without lines.
        aspect: Height over width of the box; None to fill the space.
        bars: Bars of the panel, behind the lines.
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
        panels: Panels, row by row.
        columns: Panels in a row.
        size: Width and height on paper, in inches.
        shared: Whether panels of a row share their vertical axis.
        legend: Columns of the legend below the figure; 0 for a legend in every panel, -1 for none.
        note: Title on the screen instead of ``title``.
        height: Height on the screen, in pixels.
    """

    title: str
    panels: Sequence[Panel]
    columns: int = 1
    size: tuple[float, float] = (8.0, 5.8)
    shared: bool = False
    legend: int = 2
    note: str = ""
    height: int = 480
