"""Dense executions: the best ways to run a dense model, the baselines of every speed-up."""
