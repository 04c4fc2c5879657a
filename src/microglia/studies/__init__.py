"""Studies: one folder for each experiment."""
