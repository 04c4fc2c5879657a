"""Tensors of a module under ``torch.nn.utils.parametrize``: attached without losing hooks, read, and detached."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.errors import MicrogliaError
from microglia.core.layers import prunable_attributes
from microglia.core.modes import reading
from microglia.core.recurrent import read_anew, settle
from microglia.core.sharded import GATHER, is_sharded, moved, zeros_whole


def attach_parametrization(module: nn.Module, attribute: str, parametrization: nn.Module) -> None:
    """Attaches a parametrization to a tensor of a module; the trainable parameter stays the same object.

    torch's own function resets the parameter's place in the graph. This loses the hooks by which DistributedDataParallel
    gathers its gradient. Here torch's function receives a copy, and the parameter is put back.
    """
    raw = module._parameters.get(attribute)
    if raw is None:  # parametrized already: torch only appends
        parametrize.register_parametrization(module, attribute, parametrization)
        read_anew(module)
        return
    copy = zeros_whole(raw, raw.dtype) if is_sharded(raw) else raw.detach().clone()  # torch checks shape and dtype
    module._parameters[attribute] = nn.Parameter(copy, requires_grad=raw.requires_grad)
    parametrize.register_parametrization(module, attribute, parametrization)
    steps = steps_of(module, attribute)
    steps.original = raw
    moved(raw, (module, attribute), (steps, "original"))
    read_anew(module)


def steps_of(module: nn.Module, attribute: str) -> parametrize.ParametrizationList:
    """Returns the parametrizations of a tensor, in the order in which they are applied."""
    return module.parametrizations[attribute]  # type: ignore[union-attr,index,return-value]


def parametrized_tensors(module: nn.Module) -> list[str]:
    """Returns the attributes of a module that have parametrizations."""
    return list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]


@torch.no_grad()
def baked(module: nn.Module, attribute: str) -> Tensor:
    """Returns a parametrized tensor's value in evaluation mode as a separate tensor, trainable if any original is."""
    steps = steps_of(module, attribute)
    with reading(steps):  # not by eval(), which a parametrization may override
        value: Tensor = steps().detach().clone()
    if not any(name.startswith("original") for name in steps._parameters):
        return value
    return nn.Parameter(value, any(p.requires_grad for p in steps.parameters()))


def detach(module: nn.Module, attribute: str, value: Tensor | None = None) -> None:
    """Removes the parametrizations of a tensor and leaves its original, or ``value``, as the module's own.

    torch's own function deletes the attribute from the module's class, which copies of the module share: they would break.
    """
    lists: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    steps = steps_of(module, attribute)
    original = steps.original if value is None else value
    if value is not None and any(map(is_sharded, steps.parameters())):
        raise MicrogliaError(f"No other tensor can replace the sharded {attribute} of {type(module).__name__}: {GATHER}.")
    if len(lists) > 1:
        del lists[attribute]
        module.__class__ = type(type(module).__name__, type(module).__bases__, _without(type(module), attribute))
    else:
        del module.parametrizations
        module.__class__ = _below(type(module))
    if isinstance(original, nn.Parameter):
        module.register_parameter(attribute, original)
        moved(original, (steps, "original"), (module, attribute))
    else:
        module.register_buffer(attribute, original)  # type: ignore[arg-type]
    for name in _later(module):  # the order of a fresh module, which optimizers rely on
        module._parameters[name] = module._parameters.pop(name)
    settle(module)


def _below(cls: type) -> type:
    """Returns the class below torch's class for parametrized modules, which ``fully_shard`` may have mixed into another."""
    first, *others = cls.__bases__
    if not others:
        return first
    return type(cls.__name__.replace("Parametrized", "", 1), (first, *others[0].__bases__), _without(cls, ""))


def _later(module: nn.Module) -> list[str]:
    """Returns the parameters of a module that follow those with masks, in the order of a fresh module."""
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name in module._parameters]
    first = prunable_attributes(module)
    return [name for name in module._parameters if name not in first]


def _without(cls: type, attribute: str) -> dict[str, object]:
    return {k: v for k, v in vars(cls).items() if k not in (attribute, "__dict__", "__weakref__")}
