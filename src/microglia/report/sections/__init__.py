"""Sections of a report: the tables and figures of each family, in the order of the report."""

from microglia.report.sections import overview, search, dynamic, at_init, detection, segmentation, packed  # isort: skip  # noqa: F401  (the order of the report)
