"""Trackers: what a run tells goes to TensorBoard, MLflow or Weights & Biases as well; an error of theirs never ends a run."""

from microglia.track import mlflow, tensorboard, wandb
from microglia.track.tracker import Place, Tracker, opened, trackers

__all__ = ["Place", "Tracker", "mlflow", "opened", "tensorboard", "trackers", "wandb"]
