"""The names of the zoo's own models, and the common parts of families: errors, input checks, initialization."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from microglia.core.errors import MicrogliaError
from microglia.core.registry import Registry

Shape = tuple[int, int, int]
"""Shape of one input image: (channels, height, width)."""

Builder = Callable[..., nn.Module]
"""``(name, classes, shape, **options) -> model``; the name lets one function build a whole family."""

MODELS: Registry[Builder] = Registry("model")
"""Every name that `microglia.zoo.build` lists."""

FAMILIES: dict[str, tuple[str, Builder]] = {}
"""Prefix of a name with numbers in it -> (how to spell such a name, its builder)."""

KINDS: dict[str, str] = {}
"""Name of a model -> the kind of task it is made for; other models are classifiers."""


class ModelError(MicrogliaError):
    """A model that cannot be built: an option, an input shape or a library does not fit."""


def register(*names: str, open_form: str | None = None, kind: str | None = None) -> Callable[[Builder], Builder]:
    """Returns a decorator that registers a builder under each of ``names``.

    Args:
        names: Names to list.
        open_form: For a family with numbers in its names, the form of a name, such as ``"wrn-D-K"``. Every name with the same
            beginning (up to the first hyphen) then goes to this builder, listed or not.
        kind: Kind of task that the models are made for, as in ``task: {kind: ...}``; None for classification.
    """

    def add(builder: Builder) -> Builder:
        for name in names:
            MODELS.add(name)(builder)
            if kind is not None:
                KINDS[name] = kind
        if open_form is not None:
            FAMILIES[open_form.partition("-")[0] + "-"] = (open_form, builder)
        return builder

    return add


def require_size(name: str, shape: Shape, smallest: int, reason: str) -> None:
    """Raises `ModelError` when the image is lower or narrower than ``smallest`` pixels.

    Args:
        name: Name of the model, for the message.
        shape: Input shape, (channels, height, width).
        smallest: Minimum height and width, in pixels.
        reason: The reason of the limit, for the message.
    """
    if min(shape[1:]) < smallest:
        raise ModelError(
            f"The input {'x'.join(map(str, shape))} is too small for {name}: it needs at least {smallest}x{smallest} "
            f"pixels ({reason}). Resize the images or take a model with less pooling, such as resnet20."
        )


def require_whole(name: str, **options: object) -> None:
    """Raises `ModelError` for the first option that is not a whole number of at least 1."""
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{name} takes for {option} a whole number of at least 1, not {value!r}.")


def initialize(model: nn.Module) -> nn.Module:
    """Draws convolution weights from N(0, 2 / fan_out), zeroes their biases, and returns the model.

    Linear and normalization layers keep PyTorch's own initialization. On the ``meta`` device nothing is drawn.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 14 (the backward, fan-out form).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # drawing there would import the compiler
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
