"""Dense executions: the best ways to run a dense model, against which every speed-up is measured."""
