"""Training: tasks, the loop, recovery, durable runs, files."""
