"""Forms in which a model holds its experts: fused tensors (transformers 5), or a list of modules. A form is one table value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import tensors_of
from microglia.core.registry import Registry

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
"""Attributes of modules, and fields of configurations, that hold the number of experts."""
ACTIVE = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
"""The same for the number of experts that a token is routed to."""


@dataclass(frozen=True)
class Routing:
    """The experts of each token in one call of a layer.

    Attributes:
        hidden: Inputs of the experts, (tokens, width).
        index: Numbers of the chosen experts, (tokens, chosen).
        weights: Weights of their outputs, (tokens, chosen).
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ExpertForm:
    """One way to hold experts.

    Attributes:
        count: Returns the number of experts that a module holds in this form, from its name and the module; 0 for none.
        rows: Returns tensor name -> dimension -> indices that stay, from the experts and the kept numbers.
        remove: Removes other parts than tensors in place, from the experts and the kept numbers.
        run: Returns outputs (tokens, width) of one expert without a weight, from the experts, its number and the tokens.
        observed: Name of the part whose calls tell the routing: ``experts`` or ``router``.
        routing: Returns the routing of a call of this part, or None if it has another form. It gets the layer, the arguments of
            the call in order, and its outputs.
    """

    count: Callable[[str, nn.Module], int]
    rows: Callable[[nn.Module, Sequence[int]], Mapping[str, dict[str, list[Any]]]]
    run: Callable[[nn.Module, int, Tensor], Tensor]
    routing: Callable[[nn.Module, Sequence[Any], Any], Routing | None]
    remove: Callable[[nn.Module, Sequence[int]], None] = lambda experts, kept: None
    observed: str = "experts"


expert_forms: Registry[ExpertForm] = Registry("form of experts")
"""Forms by name; the first one that counts experts in a module is that of the module."""


def form_of(name: str, module: nn.Module) -> tuple[str, int] | None:
    """Returns the form of a module that holds experts and their number, or None."""
    found = ((key, form.count(name, module)) for key, form in expert_forms.items())
    return next((both for both in found if both[1]), None)


def written_number(module: nn.Module, names: Sequence[str]) -> int | None:
    """Returns the whole number that a module has under one of the names, or None."""
    values = (vars(module).get(name) for name in names)
    return next((value for value in values if type(value) is int), None)


def _fused_count(name: str, module: nn.Module) -> int:
    count, shapes = written_number(module, COUNTS), [p.shape for p in module.parameters(recurse=False)]
    if len(shapes) != len([*module.parameters()]):  # a layer around them, whose router is as long
        return 0
    fits = count and shapes and max(map(len, shapes)) > 2 and all(len(s) > 1 and s[0] == count for s in shapes)
    return count if fits and count else 0


def _fused_run(experts: nn.Module, number: int, hidden: Tensor) -> Tensor:
    index = torch.full((len(hidden), 1), number, dtype=torch.long, device=hidden.device)
    outputs: Tensor = experts.forward(hidden, index, torch.ones_like(index, dtype=hidden.dtype))  # past the hooks
    return outputs


def _fused_routing(layer: nn.Module, inputs: Sequence[Any], outputs: Any) -> Routing | None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    index = next((t for t in tensors if not t.is_floating_point()), None)
    if index is None or index.ndim != 2 or not tensors[0].is_floating_point() or tensors[0].ndim != 2:
        return None
    weights = next((t for t in tensors[1:] if t.is_floating_point() and t.shape == index.shape), None)
    return None if weights is None or len(tensors[0]) != len(index) else Routing(tensors[0], index, weights)


def _listed_count(name: str, module: nn.Module) -> int:
    same = isinstance(module, nn.ModuleList) and len({type(part) for part in module}) == 1
    return len(module) if same and "expert" in name and any(True for _ in module.parameters()) else 0  # type: ignore[arg-type]


def _listed_remove(experts: Any, kept: Sequence[int]) -> None:
    stay = [experts[k] for k in kept]
    experts._modules.clear()
    experts.extend(stay)


def _listed_routing(layer: nn.Module, inputs: Sequence[Any], outputs: Any) -> Routing | None:
    """Reads a router that returns logits, or weights and numbers of experts.

    Logits become the softmax over all experts. The weights of the chosen ones have the sum 1, unless ``norm_topk_prob`` of the
    layer is false.
    """
    hidden, tensors = inputs[0].flatten(0, -2), [t.flatten(0, -2) for t in tensors_of(outputs) if t.ndim > 1]
    index = next((t for t in tensors if not t.is_floating_point()), None)
    if index is not None:
        weights = next((t for t in tensors if t.is_floating_point() and t.shape == index.shape), None)
        return None if weights is None else Routing(hidden, index, weights)
    active = written_number(layer, ACTIVE)
    if active is None or len(tensors) != 1:
        return None
    weights, index = tensors[0].float().softmax(-1).topk(active)
    normed = getattr(layer, "norm_topk_prob", True)
    return Routing(hidden, index, weights / weights.sum(-1, keepdim=True) if normed else weights)


expert_forms.add("fused")(
    ExpertForm(
        count=_fused_count,
        rows=lambda experts, kept: {name: {"0": list(kept)} for name, _ in experts.named_parameters()},
        run=_fused_run,
        routing=_fused_routing,
    )
)
expert_forms.add("listed")(
    ExpertForm(
        count=_listed_count,
        rows=lambda experts, kept: {},
        run=lambda experts, number, hidden: experts[number](hidden),  # type: ignore[index,no-any-return]
        routing=_listed_routing,
        remove=_listed_remove,
        observed="router",
    )
)
