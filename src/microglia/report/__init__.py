"""Reports: run directories to tables, figures and one interactive page."""
