"""Factors in a model: every weight is multiplied by the factor of its unit, which is soft during a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from microglia.core.layers import prunable_layers, raw_parameter
from microglia.core.masks import SCORES, Masked, Unfinished
from microglia.core.parametrizations import attach_parametrization, detach, steps_of
from microglia.core.sharded import moved, zeros_whole
from microglia.methods.units import Units

Factors = Callable[[], Tensor | None]


class Factored(Unfinished):
    """The parametrization: a parameter times the factors of its units."""

    def __init__(self, masks: SoftMasks, name: str) -> None:
        super().__init__()
        self._masks, self._name = masks, name

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the parameter as the forward pass sees it."""
        masks = self._masks
        factors = masks.current()
        return weight if factors is None else masks.units.scale(self._name, weight, factors)


class Kept(Unfinished):
    """The parametrization of a companion, a bias or a norm's affine parameter: zero for removed units."""

    def __init__(self, masks: SoftMasks, name: str) -> None:
        super().__init__()
        self._masks, self._name = masks, name

    def forward(self, parameter: Tensor) -> Tensor:
        """Returns the parameter as the forward pass sees it."""
        masks = self._masks
        return parameter if masks.kept is None else masks.units.companion(self._name, parameter, masks.kept)


class SoftMasks:
    """Holds a method's scores and gives every weight its factors, computed once per forward pass of the model.

    Args:
        model: The model to search, changed in place.
        units: All units.
        factors: Computes the factors, (count,), differentiable; None means ones.
        scores: Parameter of the search, or None.

    Attributes:
        kept: Units that stay, after the choice.
        attached: Whether the weights still have factors.
    """

    def __init__(self, model: nn.Module, units: Units, factors: Factors, scores: Tensor | None) -> None:
        self.units, self._factors = units, factors
        self._model = model
        self.kept: Tensor | None = None
        self.attached = True
        self._known: tuple[Tensor | None] | None = (None,)  # attaching calls the factors
        for name in units.scaled_names:
            _attach(model, name, Factored(self, name))
        for name in units.companions:
            _attach(model, name, Kept(self, name))
        self.forget()
        if scores is not None:
            model.register_parameter(SCORES, nn.Parameter(scores))
        self._hook = model.register_forward_pre_hook(self.forget)

    @property
    def scores(self) -> nn.Parameter | None:
        """The scores in the model, None for a method without; ``fully_shard`` puts another parameter in their place."""
        return self._model._parameters.get(SCORES)

    def forget(self, *_: Any) -> None:
        """Makes the next weight compute the factors again: a graph can be differentiated only once."""
        self._known = None

    def current(self) -> Tensor | None:
        """Returns the factors of this forward pass."""
        if self._known is None:
            self._known = (self._factors(),)
        return self._known[0]

    def harden(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Replaces the factors by masks, once.

        The replacement is in place: registering a new parametrization would cut the hooks that gather gradients across ranks.
        """
        for name in self.units.scaled_names if self.attached else ():
            masked = Masked(_like(masks[name], _holders(model, name)[0])) if name in masks else None
            for module, attribute in _holders(model, name):
                if masked is None:
                    _remove(module, attribute, Factored)
                else:
                    steps = steps_of(module, attribute)
                    steps[_place(steps, Factored)] = masked
        self.attached = False

    @torch.no_grad()
    def restart(self, model: nn.Module, masks: Mapping[str, Tensor], kept: Tensor, former: Mapping[str, Tensor]) -> None:
        """Gives removed units their former weights back where they are made, and zeros where they are read."""
        for name in dict.fromkeys([*masks, *self.units.scaled_names]):
            raw = raw_parameter(*_holders(model, name)[0])
            value = torch.where(masks[name], raw, former[name].to(raw)) if name in masks else raw
            raw.copy_(self.units.scale(name, value, kept) if name in self.units.scaled_names else value)

    @torch.no_grad()
    def detach_companions(self, model: nn.Module) -> None:
        """Writes the zeros of companions into them and detaches from the model."""
        for name in self.units.companions:
            module, attribute = _holders(model, name)[0]
            steps, raw = steps_of(module, attribute), raw_parameter(module, attribute)
            if _place(steps, Kept) == 0:
                raw.copy_(steps[0](raw))
                _remove(module, attribute, Kept)
                continue
            value = getattr(module, attribute).clone()  # zeros below another parametrization do not give these
            detach(module, attribute)
            getattr(module, attribute).copy_(value)

    def leave(self, model: nn.Module) -> None:
        """Removes the scores and the hook from the model."""
        self._hook.remove()
        if (scores := self.scores) is not None:
            delattr(model, SCORES)
            moved(scores, (model, SCORES), (nn.Module(), SCORES))  # FSDP2 keeps it, outside the model


def _like(mask: Tensor, holder: tuple[nn.Module, str]) -> Tensor:
    """Returns a mask with the memory layout of its weight; see `microglia.core.masks`."""
    return zeros_whole(raw_parameter(*holder), torch.bool).copy_(mask)


def _holders(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    layers = prunable_layers(model)
    if name in layers:
        return list(layers[name].holders)
    path, _, attribute = name.rpartition(".")
    return [(model.get_submodule(path), attribute)]


def _place(steps: parametrize.ParametrizationList, kind: type[Unfinished]) -> int:
    """Returns the index of a search's own parametrization among those of a tensor."""
    return next(i for i, step in enumerate(steps) if isinstance(step, kind))


def _remove(module: nn.Module, attribute: str, kind: type[Unfinished]) -> None:
    """Removes a search's own parametrization; the tensor and its other parametrizations stay."""
    steps = steps_of(module, attribute)
    if len(steps) == 1:
        detach(module, attribute)
    else:
        del steps[_place(steps, kind)]


def _attach(model: nn.Module, name: str, parametrization: nn.Module) -> None:
    for module, attribute in _holders(model, name):
        attach_parametrization(module, attribute, parametrization)
