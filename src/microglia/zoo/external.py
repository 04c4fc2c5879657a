"""Models of timm, torchvision and transformers, and of the user's own factory; a library is imported only when needed."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from microglia.core.vision import OPERATORS, declare_operators, import_torchvision
from microglia.zoo.own_code import called, function_of, unknown
from microglia.zoo.registry import ModelError, Shape

__all__ = [
    "OPERATORS",
    "Logits",
    "build",
    "declare_operators",
    "factory_model",
    "hf_model",
    "hf_network",
    "import_torchvision",
    "library",
    "refusals",
    "timm_model",
    "torchvision_model",
]


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
    """Builds an image classifier of transformers from the hub or a local directory, wrapped in `Logits`; see `hf_network`."""
    found = hf_network(name, classes, shape, "AutoModelForImageClassification", pretrained=pretrained, **options)
    return Logits(found).train()


def hf_network(name: str, classes: int, shape: Shape, auto: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Builds a network of transformers from the hub or a local directory.

    With fresh weights the configuration's channels and image size are set to those of ``shape``; pretrained weights
    keep their own. ``options`` overwrite entries of the configuration.

    Args:
        name: Name on the hub, or a directory.
        classes: Number of logits.
        shape: Input shape, (channels, height, width).
        auto: Class of transformers that chooses the network by its configuration.
        pretrained: Whether to load trained weights.
        options: Entries of the configuration.
    """
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # transformers imports it internally and would fail on the missing operators
    chooser = getattr(library("transformers", f"hf:{name}"), auto)
    with refusals(f"hf:{name}"):
        remote = {"trust_remote_code": options.pop("trust_remote_code", False)}  # without it, the library asks at a terminal
        transformers = library("transformers", f"hf:{name}")
        config = transformers.AutoConfig.from_pretrained(name, num_labels=classes, **remote, **options)
        if pretrained:
            return chooser.from_pretrained(name, config=config, ignore_mismatched_sizes=True, **remote)  # type: ignore[no-any-return]
        for entry, value in (("num_channels", shape[0]), ("image_size", shape[1])):
            if hasattr(config, entry) and entry not in options:
                setattr(config, entry, value)
        return chooser.from_config(config, **remote)  # type: ignore[no-any-return]


def factory_model(name: str, classes: int, shape: Shape, **options: Any) -> nn.Module:
    """Calls ``package.module:function``, with ``classes`` and ``shape`` if its signature takes them."""
    factory = function_of(name, other=" (The other sources are timm:, torchvision: and hf:.)")
    model = called(name, factory, {"classes": classes, "shape": shape}, options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}; a model factory returns a torch.nn.Module.")
    return model


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
