"""One function for every model: the zoo's own names, ``timm:``, ``torchvision:``, ``hf:`` and ``package.module:function``."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

from torch import nn

from microglia.core.registry import unknown_name
from microglia.zoo import (  # noqa: F401  (register)
    bisenet,
    conv,
    densenet,
    external,
    googlenet,
    lenet,
    mobilenet,
    preactivation,
    recurrent,
    resnet,
    segmenters,
    snip,
    vgg,
    wide_resnet,
    yolov5,
)
from microglia.zoo.registry import FAMILIES, KINDS, MODELS, Builder, ModelError, Shape, require_whole

_FORMS = ("timm:NAME", "torchvision:NAME", "hf:NAME", "package.module:function")


CLASSIFICATION = "classification"
"""Kind of task of a model that names no other."""


def model_names(kind: str | None = CLASSIFICATION) -> list[str]:
    """Returns the names of the zoo's own models, in alphabetical order.

    `build` also takes every other ``wrn-D-K``, and the forms with a colon.

    Args:
        kind: Kind of task that the models are made for; None for all models.
    """
    return sorted(name for name in MODELS if kind in (None, KINDS.get(name, CLASSIFICATION)))


def is_known(name: str) -> bool:
    """Returns whether the zoo itself has a model of this name; names with a colon belong to other sources."""
    return name in MODELS or any(name.startswith(prefix) for prefix in FAMILIES)


def build(name: str, *, classes: int = 10, shape: Sequence[int] = (3, 32, 32), **options: Any) -> nn.Module:
    """Builds a network by name, with fresh weights drawn from the global random generator of torch.

    Example:
        >>> model = build("resnet20", classes=10, shape=(3, 32, 32))
        >>> sum(parameter.numel() for parameter in model.parameters())
        269722

    Args:
        name: One of `model_names`, ``wrn-D-K``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` (a model or a local
            directory that transformers reads) or ``package.module:function`` for a factory of your own. These need the
            libraries of ``pip install 'microglia[zoo]'``; your own factory is given ``classes`` and ``shape`` if its
            signature takes them.
        classes: Number of logits, at least 1.
        shape: Shape of one input, (channels, height, width).
        options: The model's own options, such as ``width=32`` for the ResNets, or ``pretrained=True`` for ``timm:``,
            ``torchvision:`` and ``hf:``, or ``maps=True`` for a segmenter of the last two, see `microglia.zoo.segmenters`.

    Returns:
        A module in train mode that maps (N, channels, height, width) to (N, classes) logits; models for other tasks say what
        they return. The result of your own factory is returned unchanged.

    Raises:
        UnknownNameError: The name is unknown; the text gives the nearest names.
        ModelError: An option, the input shape or an installed library does not fit.
    """
    checked = _checked_shape(shape)
    require_whole("Every model", classes=classes)
    if ":" in name:
        if options.pop("maps", False):
            return segmenters.build(name, classes, checked, options)
        return external.build(name, classes, checked, options)
    builder = _builder(name)
    _check_options(name, builder, options)
    try:
        return builder(name, classes, checked, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ModelError(f"{name} cannot be built with {given or 'these arguments'}: {error}") from error


def check_name(name: str) -> None:
    """Raises for a name that is not in the zoo; names with a colon are looked up when they are built.

    Raises:
        UnknownNameError: The name is unknown; the text gives the nearest names.
    """
    if ":" not in name:
        _builder(name)


def _builder(name: str) -> Builder:
    if name in MODELS:
        return MODELS[name]
    for prefix, (_, builder) in FAMILIES.items():
        if name.startswith(prefix):
            return builder
    raise unknown_name("model", name, [*MODELS, *(form for form, _ in FAMILIES.values()), *_FORMS])


def _checked_shape(shape: Sequence[int]) -> Shape:
    try:
        channels, height, width = (operator.index(size) for size in shape)
    except (TypeError, ValueError):
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise ModelError(f"shape is (channels, height, width), three whole numbers of at least 1, not {shape!r}.")
    return channels, height, width


def _check_options(name: str, builder: Builder, options: dict[str, Any]) -> None:
    parameters = inspect.signature(builder).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ModelError(f"{name} takes no option {option!r}; its options: {', '.join(known) or 'none'}.")
