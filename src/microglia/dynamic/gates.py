"""Gates: small heads inside a model that choose the output channels for each input and layer.

A gate is attached to a module of the user's own model, the convolution or the batch norm after it. It multiplies the output by
a mask of zeros and ones. So the norm sees all filters, as FTWT requires, and a following activation with f(0) = 0, also a
functional one, keeps the zeros. Source: FTWT; spec, sections 7.2, 7.4 and 7.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.core.errors import MicrogliaError
from microglia.dynamic.gate_plan import ACTIVATIONS, RECTIFYING, GatePlan, Site
from microglia.dynamic.targets import filters_of, highest, mass, share_of, targets

GATES = "microglia_gates"
"""Attribute of a model that holds the plan of its gates."""


@dataclass(frozen=True)
class Passage:
    """One batch in a gate. Read it within the listener, because later operators may overwrite the output.

    Attributes:
        gate: The gate.
        embedded: Input of its head, (batch, inputs).
        logits: Logits of its head, (batch, units); positive = keep. A unit is one filter, or a block of neighbours.
        mask: Kept channels, boolean, (batch, outputs).
        output: Feature maps after the norm, before activation and mask, without gradient.
    """

    gate: Gate
    embedded: Tensor
    logits: Tensor
    mask: Tensor
    output: Tensor

    @property
    def response(self) -> Tensor:
        """Feature maps after norm and activation, before the mask."""
        return ACTIVATIONS[self.gate.site.activation](self.output)

    @torch.no_grad()
    def share(self) -> Tensor:
        """Returns each unit's share of the response, (batch, units); that of a block is the sum over its filters.

        A monotone, nonnegative activation maps the largest value to the largest absolute one, so that the peaks of the response
        are known without computing it.
        """
        name = self.gate.site.activation
        share = share_of(ACTIVATIONS[name](highest(self.output))) if name in RECTIFYING else mass(self.response)
        units = self.logits.shape[1]
        return share if units == share.shape[1] else share.reshape(len(share), units, -1).sum(2)

    def target(self) -> Tensor:
        """Returns the units to keep by the layer's own r, boolean, (batch, units)."""
        gate = self.gate
        return targets(self.share(), gate.r, gate.rule)


Listener = Callable[[Passage], None]


class _Wire:
    """The connection between a gate's two ends in one call, and its listener; a copied model has its own wires."""

    def __init__(self) -> None:
        self.arriving: Tensor | None = None
        self.listener: Listener | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wire:
        return _Wire()

    def take(self) -> Tensor:
        arriving, self.arriving = self.arriving, None
        if arriving is None:
            raise MicrogliaError(
                "A gate ran before its convolution, so that the model runs its layers in another order now: attach gates anew."
            )
        return arriving


class Gate(nn.Module):
    """The head of one layer: pooled input, softmax over channels, one affine map; an output above 0 keeps the filter.

    Source: FTWT; spec, section 7.2.

    Args:
        site: Site of the gate.
        plan: Plan of all gates.
        generator: Draws the initial weights as for a 1x1 convolution, uniform within 1 / sqrt(inputs).

    Attributes:
        fade: Strength of the mask, in [0, 1]: the factor of a channel that is switched off is 1 - fade.
        detached: Whether no gradient flows from the head to its input (decoupled training).
    """

    def __init__(self, site: Site, plan: GatePlan, generator: torch.Generator | None = None) -> None:
        super().__init__()
        bound, (units, inputs) = site.inputs**-0.5, plan.head_of(site)
        weight, bias = torch.empty(units, inputs), torch.empty(units)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(bias.uniform_(-bound, bound, generator=generator))
        if plan.boost:  # the saliency of a channel starts near 1
            nn.init.trunc_normal_(self.weight, std=0.05, generator=generator)
            nn.init.ones_(self.bias)
        self.site, self.pool, self.softmax, self.rule = site, plan.pool, plan.softmax, plan.rule
        self.r: float = plan.r.get(site.layer, 1.0)
        self.keep: int | None = plan.keep.get(site.layer)
        self.block, self.static, self.boost = site.outputs // units, plan.static, plan.boost
        self.fade, self.detached = 1.0, not plan.boost
        self._wire = _Wire()

    def extra_repr(self) -> str:
        """Returns the printed details."""
        blocks = "" if self.block == 1 else f" in blocks of {self.block}"
        return f"{self.site.inputs} -> {self.site.outputs}{blocks}, r={self.r:g}{', static' if self.static else ''}"

    def embed(self, arriving: Tensor) -> Tensor:
        """Returns the pooled input of the head, (batch, inputs); a static gate has no input."""
        if self.static:
            return arriving.new_empty(len(arriving), 0)
        space = tuple(range(2, arriving.ndim))
        # A sum over a count: `mean` would copy a map in bfloat16 to float32.
        pooled = arriving.sum(space) / math.prod(arriving.shape[2:]) if self.pool == "avg" else arriving.amax(space)
        return pooled.softmax(1) if self.softmax else pooled

    def logits(self, embedded: Tensor) -> Tensor:
        """Returns the head's output for an embedded input, (batch, units)."""
        if self.static:  # no layer that a counter of operations would see
            return self.bias.expand(len(embedded), -1)
        return functional.linear(embedded, self.weight, self.bias)

    @torch.no_grad()
    def decide(self, logits: Tensor) -> Tensor:
        """Returns the mask, boolean, (batch, outputs): sigmoid(logit) > 0.5, or the ``keep`` largest logits.

        A boosted filter with a saliency of zero is skipped too.
        """
        if self.keep is None:
            return filters_of(logits > 0, self.site.outputs)
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, : self.keep]
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)
        return filters_of(kept & (logits > 0) if self.boost else kept, self.site.outputs)

    def boosted(self, output: Tensor, logits: Tensor, mask: Tensor, shift: Tensor | None) -> Tensor:
        """Returns feature maps whose kept filters are multiplied by their saliency, all but their shift (spec, section 8.1).

        The saliency takes the place of a norm's scale: y = saliency (output - shift) + shift for a kept filter, 0 for others.

        Args:
            output: Feature maps after the norm, before the activation, (batch, channels, *space).
            logits: Logits of these channels, (batch, channels).
            mask: Kept ones of these channels, boolean, (batch, channels).
            shift: Shift of the norm, or bias of the convolution, for these channels; None for 0.
        """
        shape = (*logits.shape, *[1] * (output.ndim - 2))
        saliency = logits.relu() * mask
        scaled = output * saliency.reshape(shape)
        return scaled if shift is None else scaled + (shift * (mask.to(output.dtype) - saliency)).reshape(shape)

    def listen(self, listener: Listener | None) -> None:
        """Calls ``listener`` at every passage from now on; None ends this."""
        self._wire.listener = listener

    def _arrive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._wire.arriving = args[0]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        arriving = self._wire.take()
        if self.fade == 0 and self._wire.listener is None:
            return output
        embedded = self.embed(arriving.detach() if self.detached else arriving)
        logits = self.logits(embedded)
        mask = self.decide(logits)
        if self._wire.listener is not None:
            self._wire.listener(Passage(self, embedded, logits, mask, output.detach()))
        if self.fade == 0:
            return output
        if self.boost:
            return self.boosted(output, logits, mask, getattr(module, "bias", None))
        factor = mask.to(output.dtype)
        factor = factor if self.fade == 1 else 1 - self.fade * (1 - factor)
        return output * factor.reshape(*factor.shape, *[1] * (output.ndim - 2))


# ----------------------------------------------------------------------------------------------------------- of a model
def attach_gates(model: nn.Module, plan: GatePlan, generator: torch.Generator | None = None) -> nn.Module:
    """Attaches gates to a model, in place, according to a plan; returns the model.

    Raises:
        MicrogliaError: The model already has gates, or a layer of the plan is missing or has another size.
    """
    if gate_plan(model) is not None:
        raise MicrogliaError(f"{type(model).__name__} has gates already; microglia.dynamic.detach_gates removes them.")
    modules = dict(model.named_modules())
    missing = next((n for s in plan.sites for n in (s.layer, s.carrier) if n not in modules), None)
    if missing is not None:
        raise MicrogliaError(f"The gates belong to another model: {type(model).__name__} has no layer {missing!r}.")
    for site in plan.sites:
        _check_place(site, modules[site.layer], modules[site.carrier])
    for site in plan.sites:
        layer, carrier = modules[site.layer], modules[site.carrier]
        like = next(layer.parameters())
        gate = Gate(site, plan, generator).to(like.device, like.dtype).train(carrier.training)
        carrier.add_module("gate", gate)
        layer.register_forward_pre_hook(gate._arrive)
        carrier.register_forward_hook(gate._leave)
    object.__setattr__(model, GATES, plan)
    return model


def _check_place(site: Site, layer: nn.Module, carrier: nn.Module) -> None:
    """Raises unless a gate can be attached to these modules: a convolution of the site's size, and itself or its norm."""
    sound = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (layer.in_channels, layer.out_channels) == (
        site.inputs,
        site.outputs,
    )
    mean = getattr(carrier, "running_mean", None)
    sound = sound and (carrier is layer or (isinstance(mean, Tensor) and mean.shape == (site.outputs,)))
    if not sound or hasattr(carrier, "gate"):
        raise MicrogliaError(
            f"The gates belong to another model: {site.layer!r} is no convolution of {site.inputs} to {site.outputs} channels "
            f"whose output {site.carrier!r} could mask."
        )


def detach_gates(model: nn.Module) -> nn.Module:
    """Removes all gates from a model, in place; returns the model without gates, with its current weights."""
    for module in list(model.modules()):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Gate)]:
                del hooks[key]
        if isinstance(getattr(module, "gate", None), Gate):
            del module.gate
    if gate_plan(model) is not None:
        object.__delattr__(model, GATES)
    return model


def gate_plan(model: nn.Module) -> GatePlan | None:
    """Returns the plan of a model's gates, or None."""
    return getattr(model, GATES, None)


def note_plan(model: nn.Module, plan: GatePlan) -> None:
    """Gives a gated model another r, rule or number of filters to keep."""
    for layer, gate in gates_of(model).items():
        gate.rule, gate.r, gate.keep = plan.rule, plan.r.get(layer, 1.0), plan.keep.get(layer)
    object.__setattr__(model, GATES, plan)


def gates_of(model: nn.Module) -> dict[str, Gate]:
    """Returns the gates by the name of their convolution, in the order of the network."""
    found = {m.site.layer: m for m in model.modules() if isinstance(m, Gate)}
    plan = gate_plan(model)
    return found if plan is None else {site.layer: found[site.layer] for site in plan.sites}


def shift_of(model: nn.Module, gate: Gate) -> Tensor | None:
    """Returns the shift of the norm that a gate masks, or the bias of the convolution; None without any."""
    bias = getattr(model.get_submodule(gate.site.carrier), "bias", None)
    return None if bias is None else bias.detach()


@contextmanager
def listening(model: nn.Module, listener: Listener, *, fade: float | None = None) -> Iterator[None]:
    """Context in which a listener gets every passage; with ``fade`` 0 the model computes as without gates."""
    gates = list(gates_of(model).values())
    before = [(gate._wire.listener, gate.fade) for gate in gates]
    for gate in gates:
        gate.listen(listener)
        gate.fade = gate.fade if fade is None else fade
    try:
        yield
    finally:
        for gate, (previous, faded) in zip(gates, before, strict=True):
            gate.listen(previous)
            gate.fade = faded
