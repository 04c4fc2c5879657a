"""Tasks: model, data, loss and metrics as one value."""

from microglia.tasks.classification import ImageSource, image_task
from microglia.tasks.classification import build_noted as build
from microglia.tasks.task import Task

__all__ = ["ImageSource", "Task", "build", "image_task"]
