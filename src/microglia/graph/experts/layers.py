"""Layers of a mixture of experts: which modules route, which hold the experts, and which rows belong to an expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from microglia.core.errors import BudgetError, SelectorError
from microglia.graph.experts.forms import ACTIVE, ExpertForm, expert_forms, form_of, written_number

GROUPS = ("num_group", "n_group")
"""Attributes of a router that chooses groups of experts first: the number of groups."""


@dataclass(frozen=True)
class ExpertLayer:
    """One layer of a mixture of experts.

    Attributes:
        path: Path of the module that holds router and experts.
        router: Name of the router in it.
        experts: Name of the experts in it.
        form: Name of the form of the experts.
        count: Number of experts.
        groups: Number of groups that the router chooses among; 1 without any.
        active: Number of experts of a token; 1 if no attribute says it.
    """

    path: str
    router: str
    experts: str
    form: str
    count: int
    groups: int = 1
    active: int = 1

    @property
    def kind(self) -> ExpertForm:
        """The form of the experts."""
        return expert_forms[self.form]

    def within(self, name: str) -> str:
        """Returns the path in the model of a name in the layer."""
        return f"{self.path}.{name}" if self.path else name

    def check(self, kept: Sequence[int]) -> None:
        """Raises unless the layer can have these experts alone.

        Raises:
            BudgetError: They are fewer than the router chooses.
            SelectorError: They are no rising numbers, or the groups of the router keep different numbers.
        """
        if len(kept) < self.active:
            raise BudgetError(
                f"Each token of {self.path} goes to {self.active} experts, so at least {self.active} stay; got {len(kept)}."
            )
        if sorted(set(kept)) != list(kept) or not 0 <= kept[0] <= kept[-1] < self.count:
            raise SelectorError(f"Experts of {self.path} are rising numbers from 0 to {self.count - 1}; got {list(kept)[:8]}.")
        size = self.count // self.groups
        each = {sum(k // size == group for k in kept) for group in range(self.groups)}
        if self.groups > 1 and (len(each) > 1 or min(each) < 2):
            raise SelectorError(
                f"The router of {self.path} chooses among {self.groups} groups of experts, which keep equal numbers of at "
                f"least 2: keep a multiple of {self.groups}, {2 * self.groups} or more."
            )

    def rows(self, model: nn.Module, kept: Sequence[int]) -> dict[str, dict[str, list[Any]]]:
        """Returns tensor name -> dimension -> indices that stay.

        Raises:
            SelectorError: It is not clear which rows of the router belong to an expert.
        """
        layer = model.get_submodule(self.path)
        own = self.kind.rows(layer.get_submodule(self.experts), kept)
        found = {self.within(f"{self.experts}.{name}"): by_dim for name, by_dim in own.items()}
        for name, _, dim in self.routing_tensors(layer):
            found[self.within(name)] = {str(dim): list(kept)}
        return found

    def routing_tensors(self, layer: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
        """Yields name, tensor and dimension of the experts for each tensor of the router, and of the layer itself.

        Raises:
            SelectorError: It is not clear which rows belong to an expert.
        """
        router = layer.get_submodule(self.router)
        held = [(f"{self.router}.{name}", tensor) for name, tensor in _tensors(router, recurse=True)]
        for name, tensor in chain(held, _tensors(layer, recurse=False)):
            if self.count not in tensor.shape:
                if not tensor.is_floating_point() and tensor.numel() > 1:
                    raise SelectorError(f"{self.within(name)} names experts by number, so no expert of {self.path} can leave.")
                continue
            dim = list(tensor.shape).index(self.count)
            if tensor.ndim > 2 or (tensor.ndim == 2 and dim == 1 and tensor.shape[0] != 1):
                raise SelectorError(f"It is not clear which entries of {self.within(name)} belong to an expert.")
            if tensor.ndim == 1 and any(t.ndim == 2 and t.shape[1] == self.count for _, t in held):
                raise SelectorError(f"{self.path} is as wide as it has experts, so rows of {self.within(name)} are not clear.")
            yield name, tensor, dim


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Returns the layers of a mixture of experts, in the model's order.

    Experts are a module whose parameters all have one row for each of ``num_experts``, or an `nn.ModuleList` with "expert" in
    its name. The router is the module beside it with "gate" or "router" in its name and a row for each expert. Shared
    experts are neither.

    Raises:
        SelectorError: There are none, a router is not found, or layers have different numbers of experts.
    """
    found = []
    for path, module in model.named_modules():
        forms = ((name, form_of(name, child)) for name, child in module.named_children() if "shared" not in name)
        held = {name: found_form for name, found_form in forms if found_form is not None}
        for name, (form, count) in held.items():
            router = _router(path, module, [*held], count)
            places = [module.get_submodule(router), module]
            places += [part.config for part in places if hasattr(part, "config")]
            groups = next((n for place in places if (n := written_number(place, GROUPS))), 1)
            active = next((n for place in places if (n := written_number(place, ACTIVE))), 1)
            found.append(ExpertLayer(path, router, name, form, count, groups, active))
    if not found:
        raise SelectorError(
            f"{type(model).__name__} has no layer of experts: no module holds a row of weights for each expert beside a router."
        )
    if len(counts := {layer.count for layer in found}) > 1:
        raise SelectorError(f"Layers of {type(model).__name__} have different numbers of experts, {sorted(counts)}, not one.")
    return found


def _router(path: str, layer: nn.Module, held: Sequence[str], count: int) -> str:
    found = [
        name
        for name, child in layer.named_children()
        if name not in held
        and ("gate" in name or "router" in name)
        and "shared" not in name
        and any(p.ndim == 2 and p.shape[0] == count for p in child.parameters())
    ]
    if len(found) != 1 or len(held) != 1:
        raise SelectorError(
            f"{path or type(layer).__name__} needs one router with a row for each of its {count} experts, and one set of "
            f"experts; it has {', '.join(found) or 'no router'} beside {', '.join(held)}."
        )
    return found[0]


def _tensors(module: nn.Module, *, recurse: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)
