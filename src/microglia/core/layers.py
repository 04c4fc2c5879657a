"""The prunable weights of a model, their names, and the one selector language to choose among them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.auxiliary import auxiliary_paths, is_auxiliary
from microglia.core.errors import SelectorError
from microglia.core.kinds import Kind, kind_of
from microglia.core.sharded import reshard, whole

ROLES = "_microglia_roles"
"""Attribute that holds the roles of a module after `microglia.core.roles.mark_roles`."""
KNOWN_ROLE = "role:classifier"


class GraphLayer(nn.Module):
    """Holds the tensors of a layer; its operator is called elsewhere, in the traced graph of a model.

    Attributes:
        kinds: Names of the layer's original classes, its own first.
        kind: The attributes that can be masked, and their layout.
    """

    kinds: tuple[str, ...] = ()
    kind: Kind | None = None


def layer_kind(module: nn.Module) -> Kind | None:
    """Returns the weights of a module that can be masked, and their layout; None if there are none."""
    return module.kind if isinstance(module, GraphLayer) else kind_of(module)


def prunable_attributes(module: nn.Module) -> list[str]:
    """Returns the attributes of a module that hold maskable weights, masked or not."""
    kind = layer_kind(module)
    if kind is None:
        return []
    own = _own_tensors(module)
    return [name for form in kind.weights for name in sorted(fnmatch.filter(own, form))]


def _kinds(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of a module's classes, by which selectors mean it."""
    return module.kinds if isinstance(module, GraphLayer) else tuple(base.__name__ for base in type(module).__mro__)


@dataclass(frozen=True)
class Layer:
    """One prunable weight tensor.

    Attributes:
        name: Parameter name as a freshly built model spells it, such as ``"layer1.0.conv1.weight"``.
        holders: Every (module, attribute) that shares the tensor; more than one for tied weights.
    """

    name: str
    holders: tuple[tuple[nn.Module, str], ...]

    @property
    def module(self) -> nn.Module:
        """The first module that holds the weight."""
        return self.holders[0][0]

    @property
    def raw(self) -> nn.Parameter:
        """The trainable tensor itself, below any mask."""
        return raw_parameter(*self.holders[0])

    @property
    def weight(self) -> Tensor:
        """The weight as the forward pass sees it: masked where a mask is attached, and gathered where it is sharded."""
        return whole(getattr(*self.holders[0]))

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight as it is stored: (out, in, *kernel), or (in, out) where ``swapped``."""
        return self.raw.shape

    @property
    def kind(self) -> Kind:
        """Kind of the weight's module; a plain kind where only the tensor is known."""
        return layer_kind(self.module) or Kind()

    @property
    def swapped(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self.kind.swapped

    @property
    def sides(self) -> tuple[int, ...]:
        """The weight's (out, in, *kernel), independent of its layout."""
        first, second, *kernel = self.shape
        return (second, first, *kernel) if self.swapped else (first, second, *kernel)


def oriented(layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors stored like layers' weights as (out, in, *kernel), the layout that patterns see; or the inverse.

    Args:
        layers: Layers by name.
        tensors: Tensors by name of a layer, shaped like its weight, or all of them as this function returned them.
    """
    return {
        name: value.transpose(0, 1).contiguous() if name in layers and layers[name].swapped else value
        for name, value in tensors.items()
    }


def raw_parameter(module: nn.Module, attribute: str) -> nn.Parameter:
    """Returns the trainable tensor behind ``module.attribute``, below any parametrization."""
    if parametrize.is_parametrized(module, attribute):
        return cast(nn.Parameter, module.parametrizations[attribute].original)  # type: ignore[union-attr,index]
    return cast(nn.Parameter, getattr(module, attribute))


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (name, module, attribute) of every prunable weight, tied ones as often as they are held; no auxiliary parts."""
    auxiliary = auxiliary_paths(model)
    for path, module in model.named_modules():
        if is_auxiliary(path, auxiliary):
            continue
        for attribute in prunable_attributes(module):
            yield f"{path}.{attribute}" if path else attribute, module, attribute


def _own_tensors(module: nn.Module) -> list[str]:
    """Returns the attributes of a module that stand for one trainable tensor each, masked or not.

    A parametrization that makes one tensor from several others (weight normalization) has no tensor to prune.
    """
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    if isinstance(module, parametrize.ParametrizationList) or not parametrize.is_parametrized(module):
        return own
    return own + [name for name, below in module.parametrizations.items() if hasattr(below, "original")]  # type: ignore[union-attr,operator]


def matches(name: str, module: nn.Module, selectors: Sequence[str]) -> bool:
    """Tells whether a selector list selects a layer.

    The language is the same in Python, YAML and on the command line. An entry is a glob over the layer's name (``layer1.*``; a
    bare layer name also means its weight), ``type:Conv2d`` for a module class, or ``role:classifier`` for the layers that make
    the output (see `microglia.core.roles.mark_roles`). A leading ``!`` excludes. A list selects each layer that some positive
    entry matches and no negative one does; a list of negatives alone starts from all layers.
    """
    positive = [s for s in selectors if not s.startswith("!")]
    negative = [s[1:] for s in selectors if s.startswith("!")]
    return (not positive or any(_matches_one(name, module, s) for s in positive)) and not any(
        _matches_one(name, module, s) for s in negative
    )


def _matches_one(name: str, module: nn.Module, selector: str) -> bool:
    if selector.startswith("type:"):
        return any(fnmatch.fnmatchcase(kind, selector[5:]) for kind in _kinds(module))
    if selector.startswith("role:"):
        return selector[5:] in getattr(module, ROLES, ())
    return fnmatch.fnmatchcase(name, selector) or fnmatch.fnmatchcase(name.rpartition(".")[0], selector)


def prunable_layers(model: nn.Module, layers: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> dict[str, Layer]:
    """Returns the prunable weights of a model by name, in the order of its modules; those of auxiliary parts are left out.

    Args:
        model: Any module, masked or not; the names are the same either way.
        layers: Selectors of the layers to take (see `matches`).
        exclude: Selectors of the layers to leave out.

    Raises:
        SelectorError: A selector matches no layer of this model, or no layer remains.
    """
    reshard(model)
    found: dict[int, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for name, module, attribute in _walk(model):
        found.setdefault(id(raw_parameter(module, attribute)), (name, []))[1].append((module, attribute))
    _add_tied(model, found)
    everything = {name: Layer(name, tuple(holders)) for name, holders in found.values()}
    check_selectors(everything, [*layers, *exclude])
    chosen = {
        name: layer
        for name, layer in everything.items()
        if matches(name, layer.module, layers) and not (exclude and matches(name, layer.module, exclude))
    }
    if not chosen:
        raise SelectorError(
            f"No layer is left to prune: layers={list(layers)}, exclude={list(exclude)} choose none of the "
            f"{len(everything)} prunable layers of {type(model).__name__} (linear, convolution and recurrent weights)."
        )
    return chosen


def _add_tied(model: nn.Module, found: dict[int, tuple[str, list[tuple[nn.Module, str]]]]) -> None:
    """Adds holders of other kinds, such as an embedding tied to the output layer: a tensor has one mask."""
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for attribute in _own_tensors(module):
            _, holders = found.get(id(raw_parameter(module, attribute)), ("", []))
            if holders and not any(held is module and name == attribute for held, name in holders):
                holders.append((module, attribute))


def check_selectors(layers: dict[str, Layer], selectors: Sequence[str]) -> None:
    """Raises `SelectorError` for the first selector that matches none of ``layers``; ``*`` always passes.

    A role passes once roles were found: its layers may all be unprunable.
    """
    for selector in selectors:
        bare = selector.removeprefix("!")
        if bare.startswith("role:"):
            _check_role(layers, bare)
        elif bare != "*" and not any(_matches_one(name, layer.module, bare) for name, layer in layers.items()):
            names = list(layers)
            shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
            raise SelectorError(f"The selector {selector!r} meets no layer. Layers here: {shown or 'none'}.")


def _check_role(layers: dict[str, Layer], selector: str) -> None:
    if selector != KNOWN_ROLE:
        raise SelectorError(f"The only role that a selector may mean is {KNOWN_ROLE!r}; got {selector!r}.")
    if not any(hasattr(module, ROLES) for layer in layers.values() for module, _ in layer.holders):
        raise SelectorError(
            f"The selector {selector!r} needs to know which layers make the output: "
            "call microglia.core.roles.mark_roles(model, example_inputs) first."
        )


def effective_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state that the unmasked twin of a model would have: masks multiplied in, without mask buffers.

    Shapes, names and dtypes are those of a freshly built model's ``state_dict()``; tensors are detached.
    """
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ == "ParametrizationList" or ".parametrizations." in f".{path}.":
            continue
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                state[prefix + name] = parameter.detach()
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                state[prefix + name] = buffer.detach()
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                state[prefix + name] = getattr(module, name).detach()
    return state
