"""Tasks: model, data, loss and metrics as one value."""

from microglia.tasks.classification import ImageSource, image_task
from microglia.tasks.classification import build_noted as build
from microglia.tasks.detection import detection_task
from microglia.tasks.embedding import embedding_task
from microglia.tasks.images import images_task
from microglia.tasks.language import language_task
from microglia.tasks.loaders import loaders, samples
from microglia.tasks.metrics import Gathered, Metric, mean_metric
from microglia.tasks.segmentation import segmentation_task
from microglia.tasks.task import Task

__all__ = [
    "Gathered",
    "ImageSource",
    "Metric",
    "Task",
    "build",
    "detection_task",
    "embedding_task",
    "image_task",
    "images_task",
    "language_task",
    "loaders",
    "mean_metric",
    "samples",
    "segmentation_task",
]
