"""The opener of directories with sizes: a configuration and, for every Auto class of transformers, what it calls.

    import microglia.hugging_face
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)

The directory is that of ``save_pretrained`` of a cut model; see `microglia.graph.cutting.sizes`. It names no code: its
architecture is one of transformers, and the sizes are numbers below those of the dense architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from microglia.core.errors import FileError
from microglia.core.optional import needs
from microglia.core.running import first_line
from microglia.graph.cutting.hugging_face import set_fields
from microglia.graph.cutting.sizes import FORMAT, SIZES, misfit, resize

needs("zoo", "transformers")

import transformers  # noqa: E402 -- after the sentence about a missing library
from transformers.models.auto import modeling_auto  # noqa: E402


class SizedConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    """The configuration of such a directory: fields of the dense architecture, and the sizes."""

    model_type = SIZES


def base_config(config: Any) -> Any:
    """Returns the configuration of the dense architecture of a `SizedConfig`.

    Raises:
        FileError: It is damaged, of a later version, or of an unknown architecture.
    """
    own = getattr(config, SIZES, None)
    if not isinstance(own, Mapping) or own.get("version") != FORMAT or not isinstance(own.get("shapes"), Mapping):
        raise FileError(
            f"config.json has no sizes of version {FORMAT} in its field {SIZES!r}: it is damaged, or of a later version."
        )
    name, known = own.get("architecture"), transformers.CONFIG_MAPPING
    if not isinstance(name, str) or name == SIZES or name not in known:
        raise FileError(f"config.json names the architecture {str(name)[:80]!r}, which this transformers does not have.")
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in (SIZES, "auto_map", "model_type")}
    return known[name].from_dict({**fields, "model_type": name})


def sized(kind: Any, shapes: Mapping[str, Any]) -> Any:
    """Returns a class of the same name as a class of transformers, whose new models have other shapes.

    Args:
        kind: The class.
        shapes: Tensor name -> shape; names of a model around this one, or inside of it, are found too.
    """

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        dense = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        own = _own(kind, shapes, dense)
        if len(own) < len(shapes) and kind.__name__ in (config.architectures or ()):
            raise FileError(f"config.json gives sizes of tensors that {kind.__name__} does not have: it is damaged.")
        if wrong := misfit(own, dense):
            raise FileError(
                f"config.json gives {wrong} of {kind.__name__} the shape {str(own[wrong])[:80]}, which is no part of "
                f"{dense[wrong]}: it is damaged."
            )
        resize(self, own)

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _own(kind: Any, shapes: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shapes of the tensors that a class has, by its own names: those of a body lack the prefix of the whole."""
    prefix = f"{kind.base_model_prefix}."
    found = {}
    for name, shape in shapes.items():
        forms = (name, f"{prefix}{name}", name.removeprefix(prefix))
        found.update({form: shape for form in forms if form in dense})
    return found


def open_sized(kind: Any, directory: Any, *args: Any, config: Any, **options: Any) -> Any:
    """Returns what ``kind.from_pretrained`` returns, for a directory with sizes.

    Args:
        kind: A class of transformers.
        directory: The directory, or a name on the hub.
        args: Passed on.
        config: Its `SizedConfig`.
        options: Passed on.

    Raises:
        FileError: The sizes are damaged, or do not fit the weights.
    """
    base = base_config(config)
    try:
        found = sized(kind, getattr(config, SIZES)["shapes"]).from_pretrained(directory, *args, config=base, **options)
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise FileError(f"The weights in {directory} do not have the sizes of its config.json: {first_line(error)}") from error
    model = found[0] if isinstance(found, tuple) else found
    model.__class__ = kind
    set_fields(model, {})
    return found


def _opener(auto: Any) -> Any:
    """Returns the class that an Auto class calls for a `SizedConfig`."""

    def kind_of(base: Any) -> Any:
        if type(base) not in auto._model_mapping:
            raise FileError(f"{auto.__name__} has no class for the architecture {base.model_type!r}.")
        kinds = auto._model_mapping[type(base)]
        kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
        return next((kind for kind in kinds if kind.__name__ in (base.architectures or ())), kinds[0])

    def from_pretrained(cls: type[Any], /, directory: Any, *args: Any, config: Any, **options: Any) -> Any:
        return open_sized(kind_of(base_config(config)), directory, *args, config=config, **options)

    def from_config(cls: type[Any], /, config: Any, **options: Any) -> Any:
        base = base_config(config)
        kind = kind_of(base)
        model = sized(kind, getattr(config, SIZES)["shapes"])._from_config(base, **options)
        model.__class__ = kind
        set_fields(model, {})
        return model

    methods = {"from_pretrained": classmethod(from_pretrained), "_from_config": classmethod(from_config)}
    return type(f"Sized{auto.__name__}", (), {**methods, "config_class": SizedConfig, "__module__": __name__})


def register() -> None:
    """Registers the configuration and every Auto class with transformers; importing this module does it."""
    transformers.AutoConfig.register(SIZES, SizedConfig, exist_ok=True)
    for auto in [*vars(modeling_auto).values()]:
        if isinstance(auto, type) and getattr(auto, "_model_mapping", None) is not None:
            auto.register(SizedConfig, _opener(auto), exist_ok=True)  # type: ignore[attr-defined]


register()
