"""Configurations of transformers' models: `save_pretrained` of a cut model can be loaded again, or is refused.

Widths that differ between layers are listed tensor by tensor; see `microglia.graph.cutting.sizes`. The configurations of
transformers 5.23 can express them (`per_layer_config`), but its language models cannot use them: the MLP of Llama, and that
of Gemma 4, reads one `intermediate_size` and raises.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from microglia.graph.cutting.sizes import SIZES, refuse, save_sized, sizes_of

Fields = Mapping[str, Mapping[str, Any]]
"""Path of a model of transformers within the model -> field of its configuration -> new value."""

HIDDEN = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "ffn_hidden_size",
)
"""Fields that are only the width between two layers: no forward computes with them, so equal shapes suffice."""

WIDTH = "head_dim"
"""Field of the width of one head."""
HEADS = ("num_attention_heads", "num_key_value_heads")
"""Fields of the numbers of query heads and of key-value heads."""

FIELDS = (*HIDDEN, *HEADS, WIDTH)
"""Every field that may follow a cut."""

Shapes = Mapping[str, tuple[list[int], list[int]]]
"""Tensor name -> (shape before, shape after)."""


def fitting_fields(small: nn.Module, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Returns the fields with which transformers builds a cut model's shapes again, for each of its models with such fields."""
    found = {}
    for path, module in _outermost(small):
        prefix = f"{path}." if path else ""
        own = [both for name, both in shapes.items() if name.startswith(prefix)]
        became: dict[int, set[int]] = {}
        for before, after in own:
            for old, new in zip(before, after, strict=True):
                if old != new:
                    became.setdefault(old, set()).add(new)
        fields = {}
        for name in HIDDEN:
            new_sizes = became.get(getattr(module.config, name, None) or 0, set())
            if len(new_sizes) == 1:
                fields[name] = next(iter(new_sizes))
        fields |= _head_fields(module, became)
        refused_before = "save_pretrained" in vars(module)
        if (not own and not refused_before) or (fields and _builds(module, fields)):
            found[path] = fields
    return found


def _head_fields(module: Any, became: Mapping[int, set[int]]) -> dict[str, int]:
    """Returns the fields of a decoder that lost whole groups of heads, each a key-value head with all its query heads.

    The number of heads is certain only where modules say the width of one: it must be the configuration's still.
    """
    heads, shared = (getattr(module.config, name, None) for name in HEADS)
    width = getattr(module.config, WIDTH, None)
    if not (isinstance(heads, int) and isinstance(shared, int) and isinstance(width, int)):
        return {}
    queries, keys = (became.get(number * width, set()) for number in (heads, shared))
    if len(queries) != 1 or len(keys) != 1 or next(iter(queries)) % width or next(iter(keys)) % width:
        return {}
    found = dict(zip(HEADS, (next(iter(queries)) // width, next(iter(keys)) // width), strict=True))
    parts = [part for part in module.modules() if isinstance(getattr(part, "num_key_value_groups", None), int)]
    each = found[HEADS[0]] // found[HEADS[1]]
    if not parts or any((part.head_dim, part.num_key_value_groups) != (width, each) for part in parts):
        return {}
    return {**found, WIDTH: width}


def buildable(model: nn.Module) -> list[str]:
    """Returns the paths of the models of transformers in a model whose classes build their shapes from their configurations."""
    return [path for path, module in _outermost(model) if _builds(module, {})]


def set_fields(small: nn.Module, fields: Fields) -> None:
    """Writes fields to the configurations of a cut model; `save_pretrained` of a model without any writes sizes, or refuses."""
    for path, module in _outermost(small):
        vars(module.config).pop(SIZES, None)
        for name, value in fields.get(path, {}).items():
            setattr(module.config, name, value)
        if path not in fields:
            for part in module.modules():
                if hasattr(part, "save_pretrained"):
                    object.__setattr__(part, "save_pretrained", partial(refuse, type(module).__name__))
            if own := sizes_of(module):
                setattr(module.config, SIZES, own)
                object.__setattr__(module, "save_pretrained", partial(save_sized, module))


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the outermost models of transformers in a model, without an import."""
    kind: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    inside: set[nn.Module] = set()
    for path, module in model.named_modules() if kind is not None else ():
        if isinstance(module, kind) and module not in inside:
            inside.update(module.modules())
            yield path, module


def _builds(module: Any, fields: Mapping[str, Any]) -> bool:
    """Tells whether the model's class builds all of its shapes from its configuration with these fields."""
    config = deepcopy(module.config)
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = type(module)(config)
    except Exception:
        return False
    first, second = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (built, module))
    return first == second
