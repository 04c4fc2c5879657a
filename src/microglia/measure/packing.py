"""A model's fastest plain execution on CPU without a compiler: weights packed for oneDNN once, neighbours fused.

Convolutions and linear layers leave the exported graph as the operators that ``torch.compile`` with freezing emits, a
batch norm and an activation behind them folded in, and the addition of a residual branch too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from microglia.core.errors import MicrogliaError
from microglia.measure.running import Example

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


class _Activation(NamedTuple):
    """How oneDNN's operators spell an activation: (name, scalars, algorithm)."""

    name: str
    scalars: list[float]
    algorithm: str


_NOTHING = _Activation("none", [], "")
_ACTIVATIONS: dict[Any, _Activation] = {
    aten.relu.default: _Activation("relu", [], ""),
    aten.relu_.default: _Activation("relu", [], ""),
    aten.relu6.default: _Activation("hardtanh", [0.0, 6.0], ""),
    aten.relu6_.default: _Activation("hardtanh", [0.0, 6.0], ""),
    aten.silu.default: _Activation("swish", [], ""),
    aten.silu_.default: _Activation("swish", [], ""),
    aten.hardswish.default: _Activation("hardswish", [], ""),
    aten.hardswish_.default: _Activation("hardswish", [], ""),
    aten.sigmoid.default: _Activation("sigmoid", [], ""),
    aten.tanh.default: _Activation("tanh", [], ""),
}


def pack(model: nn.Module, example: Example) -> nn.Module:
    """Returns the model as a graph of packed operators, for inputs of exactly the example's shapes.

    Args:
        model: A folded model in evaluation mode on the CPU, such as `folded_twin` returns; shares its weights.
        example: What it is called with.

    Raises:
        MicrogliaError: It has no 2-d convolution or linear layer in float32 on the CPU.
    """
    exported = torch.export.export(model, example.args, example.kwargs, strict=False).module()
    assert isinstance(exported, GraphModule)
    packer = _Packer(exported)
    for node in list(exported.graph.nodes):
        if node.target is aten.conv2d.default:
            packer.pack_convolution(node)
        elif node.target is aten.linear.default:
            packer.pack_linear(node)
        elif node.target == "_guards_fn":  # checks the input's shape on each call
            exported.graph.erase_node(node)
    if not packer.packed:
        raise MicrogliaError("there is no 2-d convolution or linear layer in float32 on the CPU to pack.")
    exported.graph.eliminate_dead_code()
    exported.recompile()
    return exported


class _Packer:
    """Replaces nodes of one graph and holds the packed weights in its module.

    A packed node stands where its convolution stood, so it reads what the convolution read; the other nodes that it
    replaces had no other reader. Anything that does not fit a rule stays as it is.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.packed = 0

    def pack_convolution(self, node: Node) -> None:
        """Replaces a 2-d convolution and the batch norm, residual addition and activation that alone read it."""
        defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
        arguments: list[Any] = [*node.args, *defaults[len(node.args) :]]
        source, weight_node, bias_node, stride, padding, dilation, groups = arguments
        weight, bias = self._constant(weight_node), self._constant(bias_node)
        if node.kwargs or not _packable(source, weight, 4) or (bias_node is not None and bias is None):
            return
        assert isinstance(source, Node)
        assert weight is not None
        chain = [node]
        fused = self._fused_norm(_only_reader(node), weight, bias)
        if fused is not None:
            weight, bias = fused
            chain.extend(node.users)
        packed = mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(source.meta["val"].shape))
        operands = (*self._hold(node, packed, bias), padding, stride, dilation, groups)
        other = _residual(chain)
        if other is None:
            activation = _activation(chain)
            self._replace(chain, mkldnn._convolution_pointwise.default, (source, *operands, *activation))
        else:
            rectified = "relu" if _activation(chain, only="relu").name == "relu" else None
            self._replace(
                chain,
                mkldnn._convolution_pointwise.binary,
                (source, other, *operands, "add", 1.0, rectified, [], ""),
            )

    def pack_linear(self, node: Node) -> None:
        """Replaces a linear layer and the activation that alone reads it."""
        source, weight_node, bias_node = [*node.args, None][:3]
        weight, bias = self._constant(weight_node), self._constant(bias_node)
        if node.kwargs or not _packable(source, weight) or (bias_node is not None and bias is None):
            return
        assert isinstance(source, Node)
        shape = source.meta["val"].shape
        chain = [node]
        packed = mkldnn._reorder_linear_weight(weight, shape.numel() // shape[-1])
        operands = self._hold(node, packed, bias)
        self._replace(chain, mkldnn._linear_pointwise.default, (source, *operands, *_activation(chain)))

    def _fused_norm(self, norm: Node | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if norm is None or norm.target is not aten.batch_norm.default:
            return None
        scale, shift, mean, variance = (self._constant(argument) for argument in norm.args[1:5])
        training, epsilon = norm.args[5], norm.args[7]
        if training or mean is None or variance is None:
            return None
        fused = fuse_conv_bn_weights(weight, bias, mean, variance, epsilon, scale, shift)  # type: ignore[arg-type]
        return fused[0].detach(), fused[1].detach()

    def _constant(self, node: Any) -> Tensor | None:
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value.detach() if isinstance(value, Tensor) else None

    def _hold(self, before: Node, *tensors: Tensor | None) -> list[Node | None]:
        nodes: list[Node | None] = []
        for tensor in tensors:
            name = f"packed_{len(self.module._buffers)}"
            if tensor is not None:
                self.module.register_buffer(name, tensor)
            with self.module.graph.inserting_before(before):
                nodes.append(None if tensor is None else self.module.graph.get_attr(name))
        return nodes

    def _replace(self, chain: list[Node], target: Any, arguments: tuple[Any, ...]) -> None:
        with self.module.graph.inserting_before(chain[0]):
            packed = self.module.graph.call_function(target, arguments)
        packed.meta = dict(chain[-1].meta)
        chain[-1].replace_all_uses_with(packed)
        for node in reversed(chain):  # by hand: dead-code elimination would keep an in-place activation
            self.module.graph.erase_node(node)
        self.packed += 1


def _packable(source: Any, weight: Tensor | None, dimensions: int | None = None) -> bool:
    value = source.meta.get("val") if isinstance(source, Node) else None
    return (
        isinstance(value, Tensor)
        and (value.ndim >= 2 if dimensions is None else value.ndim == dimensions)
        and value.numel() > 0
        and weight is not None
        and value.dtype == weight.dtype == torch.float32
        and value.device.type == weight.device.type == "cpu"
    )


def _only_reader(node: Node) -> Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 else None


def _activation(chain: list[Node], only: str | None = None) -> _Activation:
    """Returns the activation that alone reads the end of ``chain`` and takes it into the chain; nothing without one."""
    reader = _only_reader(chain[-1])
    if reader is None:
        return _NOTHING
    found = _ACTIVATIONS.get(reader.target, _NOTHING)
    if reader.target in (aten.hardtanh.default, aten.hardtanh_.default):
        bounds: list[Any] = [*reader.args[1:], *(-1.0, 1.0)[len(reader.args) - 1 :]]
        found = _Activation("hardtanh", [float(bound) for bound in bounds], "")
    elif reader.target is aten.gelu.default:
        found = _Activation("gelu", [], str(reader.kwargs.get("approximate", "none")))
    if found is _NOTHING or (only is not None and found.name != only):
        return _NOTHING
    chain.append(reader)
    return found


def _residual(chain: list[Node]) -> Node | None:
    """Returns the other summand of an addition that alone reads the end of ``chain``, which takes the addition in.

    The other summand must be there before the convolution, keep its value until the addition, have the same shape, and
    not be seen by anyone else when an in-place addition writes into it.
    """
    last = chain[-1]
    reader = _only_reader(last)
    if reader is None or reader.target not in (aten.add.Tensor, aten.add_.Tensor) or reader.kwargs:
        return None
    left, right = reader.args[:2]
    other = right if left is last else left
    if not isinstance(other, Node):
        return None
    own = other.target is mkldnn._convolution_pointwise.default and _only_reader(other) is reader
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
        if node is other or _mutates(node):
            return None
        node = node.next
    chain.append(reader)
    return other


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema is None or schema.is_mutable)
