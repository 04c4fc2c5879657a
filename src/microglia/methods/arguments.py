"""What a caller may get wrong, and the sentence that says it: keywords, numbers, selectors, the model itself."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from microglia.core.allocation import ScopeName, check_scope
from microglia.core.errors import BudgetError, MicrogliaError, ScoreError
from microglia.core.patterns import Pattern, Reduction
from microglia.core.registry import unknown_name
from microglia.scores import Evidence

REMOVED = ("sparsity", "amount", "pruning_ratio", "ratio")
"""Words of other libraries for the fraction that goes; here a budget is the fraction that stays."""
SELECTORS = ("layers", "exclude", "protect")
PAIR = 2


def check_model(model: object, user: str) -> None:
    """Raises unless ``model`` is a network that masks can be put on; the text says what it is instead.

    Raises:
        MicrogliaError: It is no module, or a scripted, quantized or lazy one.
    """
    if isinstance(model, type):
        raise MicrogliaError(f"{user} takes a model, an instance; got the class {model.__name__} itself: call it first.")
    if not isinstance(model, nn.Module):
        raise MicrogliaError(f"{user} takes a model, a torch.nn.Module; got {_kind(model)}.")
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
    """Raises where a method with parameters of its own is given a wrapped model, which would not gather their gradients.

    The model may be the wrapper, hold one, or be what one wraps: that is known by the parameters alone, which wrappers hold.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()) or _within_wrapper(model):
        raise MicrogliaError(
            f"{user} adds parameters, which DistributedDataParallel must see: attach it to the model first, then wrap."
        )


def _within_wrapper(model: nn.Module) -> bool:
    """Tells whether a living wrapper gathers the gradients of a model's parameters; nothing on a module says so."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    own = {id(p) for p in model.parameters()}

    def wraps() -> bool:
        living = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel) and "_modules" in vars(o)]
        return any(id(p) in own for wrapper in living for p in wrapper.parameters())

    if not wraps():
        return False
    gc.collect()  # one that was given up may only wait for this
    return wraps()


def plain_settings(config: type, settings: Mapping[str, Any], user: str) -> dict[str, Any]:
    """Returns a method's keywords as its config wants them: numpy's numbers plain, a lone selector as a list of one.

    Raises:
        BudgetError: A fraction that goes is given where the fraction kept is asked.
        UnknownNameError: There is no such keyword, scope or reduction.
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
    """Raises for a scope or a reduction that is none.

    Args:
        settings: Fields by name.
        config: The config dataclass whose scope is meant, where it has other words than masks have.

    Raises:
        UnknownNameError: The text names the choices.
    """
    if "scope" in settings and not isinstance(settings["scope"], Mapping):
        own = _words(config, "scope") if config is not None else ()
        if settings["scope"] not in own:
            check_scope(cast(ScopeName, str(settings["scope"])))
    if (how := settings.get("reduction", "mean")) not in get_args(Reduction):
        raise unknown_name("reduction", how, get_args(Reduction))


def _words(config: type, field: str) -> tuple[Any, ...]:
    """Returns the words that a field's literal type names."""
    hint = get_type_hints(config)[field]
    return tuple(word for part in (hint, *get_args(hint)) if get_origin(part) is Literal for word in get_args(part))


def check_steps(total_steps: object, user: str, *, least: int = 1) -> int:
    """Returns the number of steps of a training as a plain integer.

    Raises:
        BudgetError: It is none, or below ``least``.
    """
    plain = _plain(total_steps)
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < least:
        raise BudgetError(f"total_steps of {user} is the number of optimizer steps, at least {least}; got {total_steps!r}.")
    return plain


def check_evidence(evidence: object, user: str) -> Evidence:
    """Returns what a score may look at, with batches that can be read more than once.

    Raises:
        ScoreError: It is no `Evidence`, its batches are no (inputs, targets) pairs, a generator that is used up, inputs and
            targets that differ in number, or its loss or generator is of a wrong kind.
    """
    if evidence is None:
        return Evidence()
    if not isinstance(evidence, Evidence):
        raise ScoreError(
            f"evidence of {user} is mg.scores.Evidence(batches=[(inputs, targets), ...], loss=...); got {_kind(evidence)}."
        )
    batches: Any = evidence.batches
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ScoreError(f"The batches of evidence are a list of (inputs, targets); got {_kind(batches)}.")
    if isinstance(batches, Iterator):
        batches = list(batches)
        if not batches:
            raise ScoreError("The batches of evidence are a generator that is used up: give a list of (inputs, targets).")
        object.__setattr__(evidence, "batches", batches)
    if isinstance(batches, Sequence):
        for batch in batches:
            if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) != PAIR:
                raise ScoreError(f"Each batch of evidence is a pair (inputs, targets); got {_kind(batch)}.")
            _check_batch(*batch, needed=evidence.loss is not None)
    _check_loss(evidence.loss, evidence.generator)
    return evidence


def _check_batch(inputs: Any, targets: Any, *, needed: bool) -> None:
    """Raises unless inputs and targets are as many, where both are tensors; a score without a loss needs no targets."""
    if isinstance(inputs, Tensor) and inputs.ndim == 0:
        raise ScoreError(f"The inputs of evidence are a batch, (batch, ...); got {_kind(inputs)}.")
    if targets is None and not needed:
        return
    if not hasattr(targets, "__len__") or (isinstance(targets, Tensor) and targets.ndim == 0):
        raise ScoreError(f"The targets of evidence are one for each input of a batch; got {_kind(targets)}.")
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor) and len(inputs) != len(targets):
        raise ScoreError(
            "A batch of evidence has as many inputs as targets; got inputs of shape "
            f"{tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}."
        )


def _check_loss(loss: object, generator: object) -> None:
    if isinstance(loss, type):
        raise ScoreError(
            f"The loss of evidence is a function of (outputs, targets); got the class {loss.__name__} itself: call it first."
        )
    if loss is not None and not callable(loss):
        raise ScoreError(f"The loss of evidence is a function of (outputs, targets); got {_kind(loss)}.")
    if not isinstance(generator, torch.Generator):
        raise ScoreError(f"The generator of evidence is a torch.Generator; got {_kind(generator)}.")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _selectors(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    listed = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(s, str) for s in listed):
        raise MicrogliaError(f"{name} is a selector or a list of them, such as 'type:Conv2d'; got {value!r}.")
    return listed


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
