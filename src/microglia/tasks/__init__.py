"""Tasks: model, data, loss and metrics as one value."""

from microglia.tasks.classification import image_task
from microglia.tasks.loaders import loaders, samples
from microglia.tasks.metrics import Gathered, Metric, mean_metric
from microglia.tasks.task import Task

__all__ = ["Gathered", "Metric", "Task", "image_task", "loaders", "mean_metric", "samples"]
