"""Optimizer groups: parameters with a common learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from microglia.core.errors import TrainingError

UNDER_MASKS = re.compile(r"parametrizations\.(\w+)\.original$")


def plain_name(name: str) -> str:
    """Returns the name that a parameter has in a model without masks."""
    return UNDER_MASKS.sub(r"\1", name)


def parameter_groups(
    model: nn.Module, asked: Sequence[dict[str, Any]], no_decay: Sequence[str], left_out: Collection[int]
) -> list[dict[str, Any]]:
    """Returns the optimizer groups of a model: first the remaining parameters, then the requested groups; each may be split.

    Args:
        model: Any module; only parameters that require a gradient are trained.
        asked: Requested groups, with ``params`` and other keys that an optimizer or `microglia.train.optim.set_rates` reads.
        no_decay: Selectors of parameters without weight decay, see `microglia.FitConfig`.
        left_out: Identities (``id``) of parameters that are trained elsewhere.

    Raises:
        TrainingError: A selector matches nothing, or two groups request the same parameter.
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad and id(p) not in left_out}
    groups = [{**group, "params": [p for p in group["params"] if id(p) in trained]} for group in asked]
    taken = [id(p) for group in groups for p in group["params"]]
    if len(taken) != len(set(taken)):
        raise TrainingError("Two groups of the task ask for the same parameter; give each parameter to one of them.")
    rest = {"params": [p for p in model.parameters() if id(p) in trained and id(p) not in taken]}
    plain = undecayed(model, no_decay)
    return [part for group in (rest, *groups) for part in _split(group, plain)] or [rest]


def undecayed(model: nn.Module, no_decay: Sequence[str]) -> set[int]:
    """Returns the identities (``id``) of the selected parameters.

    Raises:
        TrainingError: A glob matches no parameter.
    """
    found: set[int] = set()
    for selector in no_decay:
        own = {id(p) for module, name, p in _parameters(model) if _is_meant(module, name, selector)}
        if not own and selector not in ("norm", "bias"):  # a network may have no norms and no biases
            raise TrainingError(
                f"no_decay names {selector!r}, which is no parameter of the model; use norm, bias, or a glob such as 'head.*'."
            )
        found |= own
    return found


def _is_meant(module: nn.Module, name: str, selector: str) -> bool:
    if selector == "norm":
        return "norm" in type(module).__name__.lower()
    if selector == "bias":
        return name.rpartition(".")[2] == "bias"
    return fnmatchcase(name, selector)


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yields (owning module, name without masks, parameter)."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        yield modules[plain.rpartition(".")[0]], plain, parameter


def _split(group: dict[str, Any], plain: set[int]) -> list[dict[str, Any]]:
    decayed = {**group, "params": [p for p in group["params"] if id(p) not in plain]}
    rest = {**group, "params": [p for p in group["params"] if id(p) in plain], "weight_decay": 0.0}
    return [part for part in (decayed, rest) if part["params"]]
