"""Search for sites of gates: every convolution whose skipped filters are exact zeros for the following layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import fx, nn

from microglia.core.errors import SelectorError
from microglia.core.layers import check_selectors, matches, prunable_layers
from microglia.dynamic.flow import Flow, Step
from microglia.dynamic.gate_plan import Site
from microglia.graph.dims.nodes import operator_name, shape_of

MIXING = frozenset({"group_norm", "layer_norm", "instance_norm", "rms_norm", "batch_norm", "softmax", "log_softmax", "sigmoid"})
"""Operators that must not follow a gate: they change a zero channel, or let it change other channels."""


Places = Literal["all", "first"]
PLACES = get_args(Places)


@dataclass(frozen=True)
class Sites:
    """The sites of gates.

    Attributes:
        sites: Sites in the order of the network.
        left_out: Convolution -> reason why it has no gate.
    """

    sites: tuple[Site, ...]
    left_out: dict[str, str] = field(default_factory=dict)


def find_sites(
    flow: Flow, model: nn.Module, layers: Sequence[str] = ("*",), exclude: Sequence[str] = (), places: Places = "all"
) -> Sites:
    """Returns the sites of a model.

    As in FTWT (spec 7.5), a gate covers a convolution together with its batch norm and activation; in a residual block also the
    last convolution, before the addition. Some convolutions get no gate: projection shortcuts, those that make the model's
    output, grouped ones that are not depthwise, and those on 1x1 maps, where the head costs as much as the layer.

    Args:
        flow: Flow of the model.
        model: The model.
        layers: Selectors of the convolutions to gate (see `microglia.core.layers.matches`).
        exclude: Selectors of convolutions not to gate.
        places: ``first`` gates only convolutions that no sum reads, as the first of a residual block: what they skip, the next
            convolution skips too.

    Raises:
        SelectorError: Nothing can be gated, or a selector matches no layer.
    """
    check_selectors(prunable_layers(model), [*layers, *exclude])
    found, left_out = [], {}
    shortcuts, summed = _shortcuts(flow), _summed(flow) if places == "first" else frozenset()
    modules = dict(model.named_modules())
    for layer, step in flow.convolutions.items():
        chosen = matches(f"{layer}.weight", modules[layer], layers) and not (
            exclude and matches(f"{layer}.weight", modules[layer], exclude)
        )
        reason = (_obstacle(step, modules[layer]) or shortcuts.get(step.node)) if chosen else "not selected"
        if reason is None and step.node in summed:
            reason = "a sum reads it, and gates are for first convolutions"
        if reason is not None:
            left_out[layer] = reason
            continue
        c = step.convolution
        assert c is not None
        found.append(Site(layer, c.carrier, "identity" if c.inner else c.activation, c.inputs, c.outputs))
    if not found:
        telling = sorted(left_out.items(), key=lambda item: item[1] == "not selected")[:4]
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in telling) or "it has no convolutions"
        raise SelectorError(f"{type(model).__name__} has no convolution to gate ({reasons}).")
    return Sites(tuple(found), left_out)


def _obstacle(step: Step, module: nn.Module) -> str | None:
    """Returns the local reason why a convolution cannot be gated, None if it can."""
    c = step.convolution
    assert c is not None
    if c.groups > 1 and not c.depthwise:
        return "its groups are not single channels"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return "it pads with other values than zeros"
    if all(size == 1 for size in shape_of(step.node)[2:]):
        return "it works on 1x1 maps, where its head costs as much"
    if any(_reaches_output(user) for user in step.node.users):
        return "it makes the model's output"
    following = [operator_name(user).rstrip("_") for user in step.node.users if user.op == "call_function"]
    return next((f"{name} follows it" for name in following if name in MIXING), None)


def _reaches_output(node: fx.Node) -> bool:
    """Tells whether a value becomes the model's output only through views, as a detector's maps do."""
    if node.op == "output":
        return True
    if operator_name(node).rstrip("_") not in ("view", "reshape", "permute", "transpose", "flatten", "contiguous", "cat"):
        return False
    return any(_reaches_output(user) for user in node.users)


def _shortcuts(flow: Flow) -> dict[fx.Node, str]:
    """Returns projection shortcuts: their output is used only as the shorter branch of a residual addition."""
    own = {step.node for step in flow.convolutions.values()}
    found = {}
    for step in flow.steps:
        if step.kind == "add" and all(source in own for source in step.sources):
            shorter, longer = sorted(step.sources, key=flow.depth.__getitem__)
            if flow.depth[shorter] < flow.depth[longer] and list(shorter.users) == [step.node]:
                found[shorter] = "it is a shortcut"
    return found


def _summed(flow: Flow) -> frozenset[fx.Node]:
    """Returns the values that a sum reads, directly or through steps that keep channels apart."""
    found: set[fx.Node] = set()
    for step in reversed(flow.steps):
        if step.kind == "add" or (step.kind in ("keep", "cat", "pad") and step.node in found):
            found.update(step.sources)
    return frozenset(found)


def blocks_of(sites: Sequence[Site], size: int) -> dict[str, int]:
    """Returns layer -> size for the sites whose filters form at least two blocks of neighbours of this size.

    Args:
        sites: Sites of gates.
        size: Filters in a block; 1 for single filters everywhere.

    Raises:
        SelectorError: The size is above 1, and no layer has two such blocks.
    """
    found = {site.layer: size for site in sites if size > 1 and site.outputs % size == 0 and site.outputs > size}
    if size > 1 and not found:
        widest = max(site.outputs for site in sites)
        raise SelectorError(
            f"No gated layer has two blocks of {size} filters, as a multiple of {size} above it has; the widest has {widest}: "
            "give a smaller block."
        )
    return found
