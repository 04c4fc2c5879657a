"""Sections of a report: the tables and figures of each family, in the order of the report."""

# The order of the imports is the order of the report.
from microglia.report.sections import (  # isort: skip  # noqa: F401
    overview,
    search,
    dynamic,
    at_init,
    detection,
    segmentation,
    widths,
    scales,
    ranks,
    freezing,
    packed,
)
