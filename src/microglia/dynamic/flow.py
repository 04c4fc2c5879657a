"""The flow of channels through a traced model: the steps that keep zero channels zero, and the source of channels.

The same steps are used to find sites for gates, to count the operations of each input, and to compute only these.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from microglia.graph.dims.nodes import named_arguments, operator_name, shape_of
from microglia.graph.dims.trace import Trace, trace
from microglia.runtime.sparse_layers.layout import every_block

CHANNELWISE = frozenset(
    {
        "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "dropout", "feature_dropout", "contiguous",
        "clone", "detach", "alias", "to", "upsample_nearest2d", "upsample_bilinear2d", "neg", "abs",
    }
)  # fmt: skip
"""Operators on single channels that keep a zero channel zero."""

ACTIVATION_OF = {
    "relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish", "gelu": "gelu", "leaky_relu": "leaky_relu",
    "elu": "elu", "mish": "mish", "tanh": "tanh",
}  # fmt: skip
"""Operator -> its name in `microglia.dynamic.gates.ACTIVATIONS`, for default arguments."""

ADDITIONS, PADS = frozenset({"add", "sub"}), frozenset({"pad", "constant_pad_nd"})


@dataclass(frozen=True)
class Convolution:
    """A convolution with the operators fused into it.

    Attributes:
        layer: Name of the module.
        weight: Weight with the norm's scale folded in, (outputs, inputs / groups, *kernel).
        bias: Bias with the norm's shift folded in, (outputs,), or None.
        settings: stride, padding, dilation and groups, as `torch.conv2d` takes them.
        carrier: Name of the norm, or of the convolution itself.
        activation: Name of the fused activation, ``identity`` without one.
        inner: Whether the activation is part of the carrier itself, as in a norm with a built-in activation.
    """

    layer: str
    weight: Tensor
    bias: Tensor | None
    settings: dict[str, Any]
    carrier: str
    activation: str
    inner: bool

    @property
    def groups(self) -> int:
        """Number of groups of channels that do not interact."""
        return int(self.settings["groups"])

    @property
    def outputs(self) -> int:
        """Number of channels that it writes."""
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Number of channels that it reads, all groups together."""
        return self.weight.shape[1] * self.groups

    @functools.cached_property
    def blocks(self) -> Tensor:
        """The weight of an ungrouped convolution in the layout of kernels that compute parts of it, made once."""
        return every_block(self.weight)

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads only the input channel of the same number."""
        return self.groups == self.weight.shape[0] > 1 and self.weight.shape[1] == 1


@dataclass(frozen=True)
class Step:
    """One step of the forward pass.

    Attributes:
        node: Its value; for a fused chain the last node.
        kind: ``convolution``; ``keep`` (channels stay separate), ``add``, ``cat`` and ``pad`` over channels; ``plain`` for all
            others, after which no channel is known to be zero.
        sources: Values that it reads, in order.
        convolution: The convolution of such a step.
        amount: Amount of ``pad``, (before, after).
    """

    node: fx.Node
    kind: str
    sources: tuple[fx.Node, ...]
    convolution: Convolution | None = None
    amount: tuple[int, ...] = ()


class Flow:
    """The steps of a model without gates, in order.

    Args:
        model: Any model that `torch.export` can trace, in evaluation mode; it stays unchanged.
        example_inputs: One batch of inputs.

    Attributes:
        trace: The traced forward pass.
        steps: The steps in order.
        depth: Value -> number of convolutions on the longest path to it.

    Raises:
        TraceError: The model cannot be traced.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.trace: Trace = trace(model, example_inputs)
        self._modules = dict(model.named_modules())
        self.steps: list[Step] = []
        self.depth: dict[fx.Node, int] = {}
        fused: dict[fx.Node, fx.Node] = {}
        for node in self.trace.graph.nodes:
            if node.op != "call_function" or node in fused:
                continue
            step = self._step(node, fused)
            self.steps.append(step)
            below = [self.depth.get(source, 0) for source in step.sources]
            self.depth[step.node] = max(below, default=0) + (step.kind == "convolution")

    @property
    def convolutions(self) -> dict[str, Step]:
        """The steps that are convolutions with their own module, by its name."""
        return {step.convolution.layer: step for step in self.steps if step.convolution is not None}

    # ------------------------------------------------------------------------------------------------------- reading
    def _step(self, node: fx.Node, fused: dict[fx.Node, fx.Node]) -> Step:
        sources = tuple(n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor))
        name = operator_name(node).rstrip("_")
        if name in ("conv1d", "conv2d", "conv3d"):
            found = self._convolution(node)
            if found is not None:
                convolution, chain = found
                fused.update(dict.fromkeys(chain, node))
                return Step(chain[-1], "convolution", (sources[0],), convolution)
        return Step(node, *self._kind(node, name, sources))

    def _kind(self, node: fx.Node, name: str, sources: tuple[fx.Node, ...]) -> tuple[Any, ...]:
        """Returns kind, sources and amount, if any, of a step that is not a convolution."""
        rank = len(shape_of(node)) if isinstance(node.meta.get("val"), Tensor) else 0
        a = named_arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        if rank < 2:
            return "plain", sources
        if name in CHANNELWISE or activation_of(node) is not None or _within_channels(name, a, node, sources):
            return "keep", sources
        if name in ADDITIONS and len(sources) == 2 and shape_of(sources[0]) == shape_of(sources[1]):
            return "add", sources
        if name == "cat" and a["dim"] % rank == 1:
            return "cat", sources
        if name in PADS and _zeros(a) and len(a["pad"]) == 2 * (rank - 1) and not any(a["pad"][:-2]):
            return "pad", sources, None, tuple(a["pad"][-2:])
        return "plain", sources

    def _convolution(self, node: fx.Node) -> tuple[Convolution, list[fx.Node]] | None:
        """Returns a convolution whose module is called once, and the chain of nodes fused with it."""
        a = named_arguments(node)
        layer = self._holder(a["weight"], "weight")
        if layer is None or not isinstance(self._modules[layer], nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return None
        weight, bias = self._tensor(a["weight"]), self._tensor(a["bias"])
        chain, carrier = [node], layer
        norm = _only_user(node)
        if norm is not None and operator_name(norm) == "batch_norm" and weight is not None:
            n = named_arguments(norm)
            holder = next((h for k in ("running_mean", "weight") if (h := self._holder(n[k], k)) is not None), None)
            if holder is not None and n["running_mean"] is not None:
                mean, variance, scale, shift = (self._tensor(n[k]) for k in ("running_mean", "running_var", "weight", "bias"))
                assert mean is not None
                assert variance is not None
                weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, n["eps"], scale, shift)  # type: ignore[arg-type]
                chain.append(norm)
                carrier = holder
        activation, inner = "identity", False
        following = _only_user(chain[-1])
        if following is not None and (found := activation_of(following)) is not None:
            chain.append(following)
            activation, inner = found, carrier in _within(following)
        assert weight is not None
        settings = {k: a[k] for k in ("stride", "padding", "dilation", "groups")}
        shift = None if bias is None else bias.detach()
        return Convolution(layer, weight.detach(), shift, settings, carrier, activation, inner), chain

    def _holder(self, value: Any, attribute: str) -> str | None:
        """Returns the name of the module that owns a value as attribute, if the value is read once."""
        if not isinstance(value, fx.Node) or len(value.users) != 1:
            return None
        module, _, name = self.trace.name_of.get(value.name, "").rpartition(".")
        return module if name == attribute and module in self._modules else None

    def _tensor(self, value: Any) -> Tensor | None:
        return self.trace.tensors[self.trace.name_of[value.name]] if isinstance(value, fx.Node) else None

    # -------------------------------------------------------------------------------------------------------- supports
    def supports(self, masks: Mapping[str, Tensor], *, published: bool = False) -> dict[fx.Node, Tensor | None]:
        """Returns the channels of every value that can be nonzero, boolean (batch, channels); None for all.

        Args:
            masks: Layer -> channels that its gate keeps, boolean (batch, outputs).
            published: Whether a sum has the width of the branch added last, as in the published operation counts. Its real
                width is that of the identity.
        """
        known: dict[fx.Node, Tensor | None] = {}
        for step in self.steps:
            below = [known.get(source) for source in step.sources]
            known[step.node] = self._support(step, below, masks, published)
        return known

    def _support(self, step: Step, below: list[Tensor | None], masks: Mapping[str, Tensor], published: bool) -> Tensor | None:
        if step.kind == "convolution":
            assert step.convolution is not None
            return masks.get(step.convolution.layer)
        if step.kind == "keep":
            return below[0]
        if step.kind == "add":
            latest = max(range(len(below)), key=lambda i: self.depth.get(step.sources[i], 0))
            return below[latest] if published else None
        if step.kind == "cat":
            return _side_by_side(step, below)
        if below and below[0] is not None and step.kind == "pad":
            return torch.nn.functional.pad(below[0], step.amount)
        return None


def _side_by_side(step: Step, below: list[Tensor | None]) -> Tensor | None:
    known = next((b for b in below if b is not None), None)
    if known is None:
        return None
    widths = [shape_of(source)[1] for source in step.sources]
    parts = [known.new_ones(len(known), w) if b is None else b for b, w in zip(below, widths, strict=True)]
    return torch.cat(parts, dim=1)


def _within_channels(name: str, a: dict[str, Any], node: fx.Node, sources: tuple[fx.Node, ...]) -> bool:
    """Tells whether a mean, slice or pad with zeros is only over space."""
    before = shape_of(sources[0]) if sources else []
    if name == "mean":
        return all(d % len(before) > 1 for d in a.get("dim") or (0,))
    if name == "slice":
        return a["dim"] % len(before) > 1 or shape_of(node) == before
    return name in PADS and _zeros(a) and not any(a["pad"][2 * (len(before) - 2) :])


def _zeros(a: dict[str, Any]) -> bool:
    return a.get("mode", "constant") == "constant" and not a.get("value")


def activation_of(node: fx.Node) -> str | None:
    """Returns the name of an activation with f(0) = 0, in its named form; None for all others."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = operator_name(node).rstrip("_")
    if name == "hardtanh":
        a = named_arguments(node)
        return "relu6" if (a["min_val"], a["max_val"]) == (0, 6) else None
    if name not in ACTIVATION_OF:
        return None
    given, settings = named_arguments(node), node.target._schema.arguments[1:]
    return ACTIVATION_OF[name] if all(given[a.name] == a.default_value for a in settings) else None


def _within(node: fx.Node) -> set[str]:
    """Returns the names of the modules whose forward contains a node."""
    return {path for path, _ in node.meta.get("nn_module_stack", {}).values()}


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
