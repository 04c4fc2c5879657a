"""Models of timm, torchvision and transformers, and of the user's own factory; a library is imported only when needed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microglia.zoo.own_code import called, function_of, unknown
from microglia.zoo.registry import ModelError, Shape

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""Schemas of the operators that torchvision looks up during its import."""

_declared: list[torch.library.Library] = []  # a schema lives as long as its library object


def build(name: str, classes: int, shape: Shape, options: dict[str, Any]) -> nn.Module:
    """Builds ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or ``package.module:function``.

    Args:
        name: The whole name, with its prefix.
        classes: Number of logits.
        shape: Input shape, (channels, height, width).
        options: Passed on to the library or the factory; ``pretrained`` (default False) works for all three libraries.

    Raises:
        UnknownNameError: The library or the module does not have this name.
        ModelError: The library is not installed, or refuses the arguments.
    """
    source, _, rest = name.partition(":")
    if not source or not rest:
        raise ModelError(f"{name!r} is no model name: write SOURCE:NAME, such as timm:resnet18 or package.module:function.")
    builders: dict[str, Callable[..., nn.Module]] = {"timm": timm_model, "torchvision": torchvision_model, "hf": hf_model}
    if source in builders:
        return builders[source](rest, classes, shape, **options)
    return factory_model(name, classes, shape, **options)


def timm_model(name: str, classes: int, shape: Shape, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Builds a model of timm; a model with a fixed input size, such as a ViT, is built for the size of ``shape``."""
    _torchvision(f"timm:{name}")
    timm = library("timm", f"timm:{name}")
    if not timm.is_model(name) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise unknown("timm", name, timm.list_models(), "timm.list_models()")
    with refusals(f"timm:{name}"):
        settings = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
        if settings is not None and settings.fixed_input_size:
            options.setdefault("img_size", shape[1:])
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=shape[0], **options)
    return model.train()


def torchvision_model(name: str, classes: int, shape: Shape, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Builds a model of torchvision, without auxiliary heads, and without weights by default.

    Pretrained weights keep their own number of classes, which ``classes`` must equal.
    """
    models = _torchvision(f"torchvision:{name}").models
    known = models.list_models()
    if name.lower() not in known:
        raise unknown("torchvision", name, known, "torchvision.models.list_models()")
    if shape[0] != 3:
        raise ModelError(f"The models of torchvision take 3 channels, not {shape[0]}; those of timm take any (timm:NAME).")
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in accepted and not pretrained:
        options.setdefault("weights_backbone", None)
    auxiliary = options.get("aux_logits", False)
    if name.lower() in ("googlenet", "inception_v3") and not pretrained:
        options.setdefault("aux_logits", False)
        options.setdefault("init_weights", True)
    with refusals(f"torchvision:{name}"):
        weights = "DEFAULT" if pretrained else None
        model: Any = models.get_model(name, weights=weights, num_classes=classes, **options)
    if name.lower() == "inception_v3" and not auxiliary:
        model.aux_logits, model.AuxLogits = False, None  # its published weights load only with the auxiliary head
    classifier: nn.Module = model.train()
    return classifier


class Logits(nn.Module):
    """Adapter that gives a transformers classifier the interface of the other models.

    Transformers returns an output object; the adapter returns its ``logits``. The model itself is ``.model``, so parameter
    names begin with ``model.``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, classes) logits."""
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def hf_model(name: str, classes: int, shape: Shape, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Builds an image classifier of transformers from the hub or a local directory, wrapped in `Logits`.

    With fresh weights the configuration's channels and image size are set to those of ``shape``; pretrained weights
    keep their own. ``options`` overwrite entries of the configuration.
    """
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # transformers imports it internally and would fail on the missing operators
    transformers = library("transformers", f"hf:{name}")
    classifier = transformers.AutoModelForImageClassification
    with refusals(f"hf:{name}"):
        remote = {"trust_remote_code": options.pop("trust_remote_code", False)}  # without it, the library asks at a terminal
        config = transformers.AutoConfig.from_pretrained(name, num_labels=classes, **remote, **options)
        if pretrained:
            model = classifier.from_pretrained(name, config=config, ignore_mismatched_sizes=True, **remote)
        else:
            for entry, value in (("num_channels", shape[0]), ("image_size", shape[1])):
                if hasattr(config, entry) and entry not in options:
                    setattr(config, entry, value)
            model = classifier.from_config(config, **remote)
    return Logits(model).train()


def factory_model(name: str, classes: int, shape: Shape, **options: Any) -> nn.Module:
    """Calls ``package.module:function``, with ``classes`` and ``shape`` if its signature takes them."""
    factory = function_of(name, other=" (The other sources are timm:, torchvision: and hf:.)")
    model = called(name, factory, {"classes": classes, "shape": shape}, options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}; a model factory returns a torch.nn.Module.")
    return model


def import_torchvision() -> Any:
    """Imports torchvision, even if its compiled operators do not load.

    The wheel built for CUDA finds no CUDA libraries with a CPU-only torch. Its operators are then not registered, and the
    import ends in "operator torchvision::nms does not exist". Image classifiers need none of them, so in this one case the
    schemas are declared without an implementation and the import is tried again. A call of such an operator afterwards still
    raises torchvision's own error.

    Returns:
        The module.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        declare_operators()
        return importlib.import_module("torchvision")


def declare_operators() -> None:
    """Declares the unregistered schemas of `OPERATORS`; only for a torchvision whose library cannot load."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in OPERATORS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)


def _torchvision(wanted: str) -> Any:
    try:
        return import_torchvision()
    except ModuleNotFoundError as error:
        raise _not_installed("torchvision", wanted, error) from error


def library(module: str, wanted: str) -> Any:
    """Returns an optional library; a missing one ends in the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _not_installed(module, wanted, error) from error


def _not_installed(module: str, wanted: str, error: ModuleNotFoundError) -> Exception:
    if error.name != module:
        return error  # installed, but one of its dependencies is not
    return ModelError(f"The model {wanted!r} needs {module}, which is not installed: pip install 'microglia[zoo]'")


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Context that turns a library's errors about arguments, missing files or the network into one sentence."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"{name} cannot be built: {reason}") from error
