"""The images of a task, for studies that look at them one by one."""

from __future__ import annotations

from microglia.core.errors import MicrogliaError
from microglia.data import ImageData
from microglia.tasks.classification import ImageSource
from microglia.tasks.task import Task


def image_data(task: Task) -> ImageData:
    """Returns the images of a task.

    Raises:
        MicrogliaError: It is no task on images.
    """
    if not isinstance(task.data, ImageSource):
        raise MicrogliaError(f"This command needs a task on images in memory, such as digits or cifar10; got {task.name}.")
    return task.data.images
