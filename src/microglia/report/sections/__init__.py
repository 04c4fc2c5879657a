"""Sections of a report: a family's tables and figures each, in the order of the report."""

from microglia.report.sections import overview, search, dynamic, at_init  # isort: skip  # noqa: F401  (the order of the report)
