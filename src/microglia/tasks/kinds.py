"""Kinds of tasks by name, for a recipe's ``task: {kind: ..., ...}``. A new kind registers itself here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ConfigDict

from microglia.core.registry import Registry
from microglia.tasks.classification import image_task
from microglia.tasks.task import Task
from microglia.zoo.registry import KINDS

DEFAULT = "classification"
"""The default kind of a recipe; its options are also fields of the recipe itself."""


class MakesTask(Protocol):
    """Makes a task from a model's name and the options of its kind."""

    def __call__(self, model: str, options: Any, *, checkpoint: str | None, seed: int) -> Task:
        """Returns the task; ``seed`` is that of the initial weights."""
        ...


Saved = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Source of a saved model (``name``, ``classes``, ``shape``, ``options``) -> options of its kind that follow from it."""


def nothing_more(source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns no options."""
    return {}


@dataclass(frozen=True)
class Kind:
    """A kind of task.

    Attributes:
        options: Frozen dataclass of its options, each with a default.
        make: Makes the task.
        saved: Returns the options that follow from a saved model without a run, such as the size of its inputs.
    """

    options: type
    make: MakesTask
    saved: Saved = nothing_more


kinds: Registry[Kind] = Registry("kind of task")


def kind_of_model(name: object) -> str:
    """Returns the kind of task that a network of the zoo is made for; the default for every other model."""
    return KINDS.get(name, DEFAULT) if isinstance(name, str) else DEFAULT


def kind(name: str, options: type, *, saved: Saved = nothing_more) -> Callable[[MakesTask], MakesTask]:
    """Returns a decorator that registers how tasks of a kind are made.

    Args:
        name: Name of the kind, as in ``task: {kind: name}``.
        options: Frozen dataclass of the mapping's other fields.
        saved: See `Kind`.
    """

    def register(make: MakesTask) -> MakesTask:
        kinds.add(name)(Kind(options, make, saved))
        return make

    return register


@dataclass(frozen=True)
class ClassificationOptions:
    """The options of image classification, which are also fields of `microglia.Recipe`.

    Attributes:
        data: ``digits``, ``cifar10``, ``mnist``, ``hf:NAME`` or a folder.
        normalize: Name of the statistics of the images, ``data`` for the data set's own, or ``auto``.
        image_size: Side to resize images to; None for their own.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        model_options: Options of the model, such as ``{width: 0.25}`` for the MobileNets, or ``{pretrained: true}`` for
            ``timm:``, ``torchvision:`` and ``hf:``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    data: str = "digits"
    normalize: str = "auto"
    image_size: int | None = None
    label_smoothing: float = 0.0
    model_options: dict[str, Any] = field(default_factory=dict)


@kind(DEFAULT, ClassificationOptions)
def classification(model: str, options: ClassificationOptions, *, checkpoint: str | None, seed: int) -> Task:
    """Returns the task of classifying a data set's images with a network of the zoo."""
    return image_task(
        model,
        options.data,
        checkpoint=checkpoint,
        normalize=options.normalize,
        image_size=options.image_size,
        label_smoothing=options.label_smoothing,
        model_options=options.model_options,
        seed=seed,
    )
