"""Reports: run directories to Markdown tables, figures and one interactive page."""

import microglia.report.sections  # noqa: F401  (registers the sections of this library)
