"""Fusing neighbours of an exported graph: a convolution or linear layer with its norm, residual addition and activation.

Every execution that replaces layers uses this search; the caller chooses the replacement.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from microglia.core.batch import Example
from microglia.runtime.dense.overwriting import overwrite_residuals
from microglia.runtime.dense.traced import graph_of

aten = torch.ops.aten

ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.relu6.default: "relu6",
    aten.relu6_.default: "relu6",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardswish_.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
"""Operator -> name of the activation; ``hardtanh`` and ``gelu`` have settings and are read separately."""
FUSED = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
"""Kind of device -> dtypes of the layers that are replaced there."""


@dataclass(frozen=True)
class Activation:
    """The final activation, ``none`` without one; scalars are the bounds of ``hardtanh``, the form is that of ``gelu``."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    form: str = ""


@dataclass(frozen=True, eq=False)
class Site:
    """A layer of a graph with its only readers: activation(layer(input) + residual).

    Attributes:
        name: Name of the weight's module, such as ``layer1.0.conv2``.
        kind: ``conv2d`` or ``linear``.
        weight: Weight with the norm's scale folded in; (outputs, inputs / groups, height, width) or (outputs, inputs).
        bias: Bias with the norm's shift folded in; None without one.
        input_shape: Shape of the layer's input.
        output_shape: Shape of its output.
        activation: Activation fused after the sum.
        residual: Whether another branch is added.
        stride: Stride of a convolution, as the three following attributes.
        padding: Zeros on each side of height and width.
        dilation: Distance between the taps.
        groups: Number of groups of channels that do not interact.
    """

    name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    activation: Activation = Activation()
    residual: bool = False
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


Engine = Callable[[Site], nn.Module]
"""Makes the module that replaces a site; it is called with the input, and with the residual if there is one. Its output has
memory of its own, or the residual's memory if its attribute ``overwrites`` is set.
"""


def fuse(model: nn.Module, example: Example, engine: Engine) -> GraphModule:
    """Returns the model as a graph in which each layer and the operators fused with it are one module.

    Args:
        model: A folded model in evaluation mode, such as `folded_twin` returns; the graph shares its other weights.
        example: Example inputs; the graph is valid only for inputs of these shapes.
        engine: Makes the module of a site; it is called with every site, in the order of the graph.

    Raises:
        MicrogliaError: torch.export cannot trace the model.
    """
    exported = graph_of(model, example)
    fuser = _Fuser(exported, engine)
    for node in list(exported.graph.nodes):
        if node.target in (aten.conv2d.default, aten.linear.default):
            fuser.fuse(node)
        elif node.target == "_guards_fn":  # checks the input's shape on each call
            exported.graph.erase_node(node)
        elif node.target is aten.view.default:  # an output in channels last can be reshaped, not viewed
            node.target = aten.reshape.default
    exported.graph.eliminate_dead_code()
    exported.recompile()
    overwrite_residuals(exported, fuser.made & set(exported.graph.nodes))
    return exported


class _Fuser:
    """Replaces nodes of one graph.

    A fused module takes the place of its layer, so it reads the layer's inputs; the other replaced nodes had no other reader.
    Everything that does not fit a rule stays unchanged.
    """

    def __init__(self, module: GraphModule, engine: Engine) -> None:
        self.module = module
        self.engine = engine
        self.made: set[Node] = set()

    def fuse(self, node: Node) -> None:
        """Replaces a 2-d convolution or linear layer and its only readers: batch norm, residual addition, activation."""
        convolution = node.target is aten.conv2d.default
        defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
        arguments: list[Any] = [*node.args, *defaults[len(node.args) :]]
        source, weight_node, bias_node, stride, padding, dilation, groups = arguments
        weight, bias = self._constant(weight_node), self._constant(bias_node)
        if node.kwargs or not _fusible(source, weight, convolution) or (bias_node is not None and bias is None):
            return
        assert isinstance(source, Node)
        assert weight is not None
        chain = [node]
        folded = self._folded_norm(_only_reader(node), weight, bias) if convolution else None
        if folded is not None:
            weight, bias = folded
            chain.extend(node.users)
        other = self._residual(chain)
        site = Site(
            name=str(weight_node.target).rpartition(".")[0],
            kind="conv2d" if convolution else "linear",
            weight=weight,
            bias=bias,
            input_shape=tuple(source.meta["val"].shape),
            output_shape=tuple(node.meta["val"].shape),
            activation=_activation(chain),
            residual=other is not None,
            stride=_pair(stride),
            padding=_pair(padding),
            dilation=_pair(dilation),
            groups=groups,
        )
        self._replace(chain, site, (source,) if other is None else (source, other))

    def _folded_norm(self, norm: Node | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if norm is None or norm.target is not aten.batch_norm.default:
            return None
        scale, shift, mean, variance = (self._constant(argument) for argument in norm.args[1:5])
        training, epsilon = norm.args[5], norm.args[7]
        if training or mean is None or variance is None:
            return None
        folded = fuse_conv_bn_weights(weight, bias, mean, variance, epsilon, scale, shift)  # type: ignore[arg-type]
        return folded[0].detach(), folded[1].detach()

    def _constant(self, node: Any) -> Tensor | None:
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value.detach() if isinstance(value, Tensor) else None

    def _residual(self, chain: list[Node]) -> Node | None:
        """Returns the other summand of an addition that is the only reader of the end of ``chain``; extends the chain by it.

        The other summand must exist before the layer, keep its value until the addition, and have the same shape. If an
        in-place addition writes into it, it must have no other reader.
        """
        last = chain[-1]
        reader = _only_reader(last)
        if reader is None or reader.target not in (aten.add.Tensor, aten.add_.Tensor) or reader.kwargs:
            return None
        left, right = reader.args[:2]
        other = right if left is last else left
        if not isinstance(other, Node):
            return None
        own = other in self.made and _only_reader(other) is reader
        if reader.target is aten.add_.Tensor and left is not last and not own:
            return None
        here, there = last.meta.get("val"), other.meta.get("val")
        if not (isinstance(here, Tensor) and isinstance(there, Tensor)) or (here.shape, here.dtype) != (
            there.shape,
            there.dtype,
        ):
            return None
        node = chain[0]
        while node is not reader:
            if node is other or mutates(node):
                return None
            node = node.next
        chain.append(reader)
        return other

    def _replace(self, chain: list[Node], site: Site, arguments: tuple[Node, ...]) -> None:
        name = f"fused_{len(self.made)}"
        self.module.add_module(name, self.engine(site))
        with self.module.graph.inserting_before(chain[0]):
            fused = self.module.graph.call_module(name, arguments)
        fused.meta = dict(chain[-1].meta)
        chain[-1].replace_all_uses_with(fused)
        for node in reversed(chain):  # explicitly, because dead-code elimination would keep an in-place activation
            self.module.graph.erase_node(node)
        self.made.add(fused)


def _fusible(source: Any, weight: Tensor | None, image: bool) -> bool:
    value = source.meta.get("val") if isinstance(source, Node) else None
    return (
        isinstance(value, Tensor)
        and (value.ndim == 4 if image else value.ndim >= 2)
        and value.numel() > 0
        and weight is not None
        and weight.numel() > 0
        and (value.dtype, value.device) == (weight.dtype, weight.device)
        and value.dtype in FUSED.get(value.device.type, ())
    )


def _only_reader(node: Node) -> Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 else None


def _pair(value: Any) -> tuple[int, int]:
    first, last = (value * 2 if len(value) == 1 else value) if isinstance(value, list | tuple) else (value, value)
    return int(first), int(last)


def _activation(chain: list[Node]) -> Activation:
    """Returns the activation that is the only reader of the end of ``chain``, and extends the chain by it; or nothing."""
    reader = _only_reader(chain[-1])
    if reader is None:
        return Activation()
    if reader.target in (aten.hardtanh.default, aten.hardtanh_.default):
        bounds: list[Any] = [*reader.args[1:], *(-1.0, 1.0)[len(reader.args) - 1 :]]
        low, high = (float(bound) for bound in bounds)
        found = Activation("relu6") if (low, high) == (0.0, 6.0) else Activation("hardtanh", (low, high))
    elif reader.target is aten.gelu.default:
        found = Activation("gelu", (), str(reader.kwargs.get("approximate", "none")))
    elif reader.target in ACTIVATIONS:
        found = Activation(ACTIVATIONS[reader.target])
    else:
        return Activation()
    chain.append(reader)
    return found


def mutates(node: Node) -> bool:
    """Tells whether a node writes into one of its inputs."""
    if node.op == "call_module" or node.target is operator.getitem:  # a fused layer does not write into its inputs
        return False
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema is None or schema.is_mutable)
