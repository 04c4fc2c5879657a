"""Checks of a caller's arguments with clear errors: keywords, numbers, selectors, the model itself."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import nn
from torch.jit import ScriptModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from microglia.core.allocation import Allocation, check_scope
from microglia.core.errors import BudgetError, MicrogliaError
from microglia.core.patterns import Pattern, Reduction
from microglia.core.registry import unknown_name
from microglia.core.sharded import has_shards
from microglia.scores.checks import described

REMOVED = ("sparsity", "amount", "pruning_ratio", "ratio")
"""Words of other libraries for the removed fraction; here a budget is the kept fraction."""
SELECTORS = ("layers", "exclude", "protect")


def check_model(model: object, user: str) -> None:
    """Raises unless ``model`` is a network that can be masked; the text describes the given object.

    Raises:
        MicrogliaError: The model is not a module, or is scripted, quantized or lazy.
    """
    if isinstance(model, type):
        raise MicrogliaError(f"{user} takes a model, an instance; got the class {model.__name__} itself: call it first.")
    if not isinstance(model, nn.Module):
        raise MicrogliaError(f"{user} takes a model, a torch.nn.Module; got {described(model)}.")
    if isinstance(model, ScriptModule):
        raise MicrogliaError(f"{user} cannot change a scripted model (torch.jit): give the Python model it was made from.")
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__ and "torch" in type(module).__module__ and not module._parameters:
            raise MicrogliaError(
                f"{user} cannot mask quantized weights, and {name or 'the model'} is quantized: prune before quantization."
            )
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise MicrogliaError(f"{lazy[0]} is lazy and has no shape yet: call the model once on a batch before {user}.")


def check_unwrapped(model: nn.Module, user: str) -> None:
    """Raises if a method with its own parameters gets a wrapped model: the wrapper would not gather their gradients.

    The model may be the wrapper, contain a wrapper, or be wrapped. The last case is detected by the parameters that wrappers
    hold.
    """
    if has_shards(model):
        raise MicrogliaError(f"{user} adds parameters, which fully_shard must see: attach it to the model first, then shard.")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()) or _within_wrapper(model):
        raise MicrogliaError(
            f"{user} adds parameters, which DistributedDataParallel must see: attach it to the model first, then wrap."
        )


def _within_wrapper(model: nn.Module) -> bool:
    """Tells whether an existing wrapper gathers the gradients of a model's parameters; a module does not record this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    own = {id(p) for p in model.parameters()}

    def wraps() -> bool:
        living = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel) and "_modules" in vars(o)]
        return any(id(p) in own for wrapper in living for p in wrapper.parameters())

    if not wraps():
        return False
    gc.collect()  # frees wrappers that are no longer referenced
    return wraps()


def plain_settings(config: type, settings: Mapping[str, Any], user: str) -> dict[str, Any]:
    """Returns a method's keywords in the config's form: numpy numbers as plain numbers, a single selector as a list.

    Raises:
        BudgetError: A removed fraction is given instead of the kept fraction.
        UnknownNameError: A keyword, scope or reduction is unknown.
    """
    known = {f.name for f in fields(config)} if is_dataclass(config) else set()
    for name, value in settings.items():
        if name in REMOVED and name not in known:
            kept = f", here density={1 - value:g}" if isinstance(value, float) and 0 <= value < 1 else ""
            raise BudgetError(f"There is no {name} here: say density=..., the fraction kept{kept}.")
        if name not in known:
            raise unknown_name(f"setting of {user}", name, known)
    plain = {name: _plain(value) for name, value in settings.items()}
    for name in SELECTORS:
        if name in plain:
            plain[name] = _selectors(name, plain[name])
    if isinstance(plain.get("pattern"), Pattern):
        plain["pattern"] = str(plain["pattern"])
    check_choices(plain, config)
    return plain


def check_choices(settings: Mapping[str, Any], config: type | None = None) -> None:
    """Raises for an unknown scope or reduction.

    Args:
        settings: Fields by name.
        config: The config dataclass of the scope, if its words differ from those of masks.

    Raises:
        UnknownNameError: The text names the choices.
    """
    if "scope" in settings and not isinstance(settings["scope"], Mapping | Allocation):
        own = _words(config, "scope") if config is not None else ()
        if settings["scope"] not in own:
            check_scope(str(settings["scope"]))
            if own:
                raise unknown_name("scope of this method", settings["scope"], own)
    if (how := settings.get("reduction", "mean")) not in get_args(Reduction):
        raise unknown_name("reduction", how, get_args(Reduction))


def _words(config: type, field: str) -> tuple[Any, ...]:
    """Returns the words of a field's literal type; none for a field of any text, such as a scope of masks."""
    hint = get_type_hints(config)[field]
    if str in get_args(hint):
        return ()
    return tuple(word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part))


def check_steps(total_steps: object, user: str, *, least: int = 1) -> int:
    """Returns the number of steps of a training as a plain integer.

    Raises:
        BudgetError: The number is not an integer, or is below ``least``.
    """
    plain = _plain(total_steps)
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < least:
        raise BudgetError(f"total_steps of {user} is the number of optimizer steps, at least {least}; got {total_steps!r}.")
    return plain


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _selectors(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    listed = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(s, str) for s in listed):
        raise MicrogliaError(f"{name} is a selector or a list of them, such as 'type:Conv2d'; got {value!r}.")
    return listed
