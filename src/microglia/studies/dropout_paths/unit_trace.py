"""Reading a network as a chain of layers of units, proved operation by operation on its traced graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from microglia.core.errors import MicrogliaError
from microglia.graph.dims.nodes import named_arguments, nodes_in, operator_name, shape_of
from microglia.graph.dims.trace import Trace, trace
from microglia.studies.dropout_paths.unit_chain import UnitChain, UnitLayer

WEIGHTED = ("linear", "conv1d", "conv2d", "conv3d")
ELEMENTWISE = (
    "relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu", "silu_", "sigmoid", "tanh", "softplus",
    "hardtanh", "hardtanh_", "hardswish", "hardswish_", "relu6",
)  # fmt: skip
POOLING = ("max_pool1d", "max_pool2d", "max_pool3d")
LINEAR_POOLING = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
NOTHING = ("dropout", "dropout_", "feature_dropout", "contiguous", "clone", "alias", "detach")
FLATTENING = ("flatten", "view", "reshape", "_unsafe_view")


def unit_chain(model: nn.Module, example: Any) -> UnitChain:
    """Returns the chain of layers a network is, proved on its traced graph.

    A chain is linear layers and convolutions, one after the other, with operations between them that act on each unit by
    itself: batch norm, activations, pooling, dropout, flattening. The model is left as it is.

    Args:
        model: Without masks (`microglia.fold`).
        example: One input, (batch, ...).

    Raises:
        MicrogliaError: The network is no chain; the text says where it is not.
        TraceError: It cannot be traced.
    """
    walk = _Walk(trace(model, example), type(model).__name__)
    chain = walk.through()
    unknown = sorted({name for name, _ in model.named_parameters()} - set(chain.tensors))
    if unknown:
        walk.refuse(f"the parameter {unknown[0]!r} belongs to no layer of the chain")
    return chain


class _Walk:
    """One walk along the graph, from the input to the logits.

    Attributes:
        flat: Entries along dimension 1 for each unit: 1, or after flattening the pixels of a channel.
        linear: Whether nothing but linear operations came after the last weight layer.
    """

    def __init__(self, traced: Trace, model: str) -> None:
        self.traced, self.model = traced, model
        self.layers: list[UnitLayer] = []
        self.flat = 1
        self.linear = True

    def through(self) -> UnitChain:
        """Returns the chain."""
        if len(self.traced.inputs) != 1:
            self.refuse(f"it takes {len(self.traced.inputs)} inputs")
        here = next(node for node in self.traced.graph.nodes if node.name == self.traced.inputs[0])
        while (node := self.following(here)).op != "output":
            self.step(node, here)
            here = node
        names = [name for layer in self.layers for name in layer.tensors]
        if len(self.layers) < 2:
            self.refuse("it has no hidden layer")
        if len(set(names)) < len(names):
            self.refuse("two of its layers share a tensor")
        if not self.linear or self.flat > 1:
            self.refuse("its outputs are not those of a linear layer or convolution")
        return UnitChain(tuple(self.layers))

    def following(self, node: fx.Node) -> fx.Node:
        """Returns the one operation that takes a value."""
        users = [user for user in node.users if not operator_name(user).startswith("sym_size")]
        if len(users) != 1:
            names = ", ".join(operator_name(user) for user in users)
            self.refuse(f"the output of {operator_name(node)} is used {len(users)} times ({names}), as in a residual network")
        return users[0]

    def step(self, node: fx.Node, here: fx.Node) -> None:
        """Goes over one operation."""
        if any(
            n is not here and n.name not in self.traced.name_of for n in nodes_in((node.args, node.kwargs)) if self.is_tensor(n)
        ):
            self.refuse(f"{operator_name(node)} joins two values, or its weight is computed (masks are to be folded)")
        kind = operator_name(node)
        for names, act in self.acts():
            if kind in names:
                act(node, here)
                return
        self.refuse(f"it is not known whether {kind} acts on each unit by itself")

    def acts(self) -> tuple[tuple[Sequence[str], Callable[[fx.Node, fx.Node], None]], ...]:
        """Returns what to do at which operation."""
        return (
            (WEIGHTED, self.weighted),
            (("batch_norm",), self.norm),
            ((*ELEMENTWISE, *POOLING), partial(self.passes, linear=False)),
            ((*LINEAR_POOLING, *NOTHING), partial(self.passes, linear=True)),
            (FLATTENING, self.flatten),
            (("mean",), self.mean),
        )

    @staticmethod
    def is_tensor(node: fx.Node) -> bool:
        """Tells whether a node's value is a tensor; sizes are not."""
        return isinstance(node.meta.get("val"), Tensor)

    def weighted(self, node: fx.Node, here: fx.Node) -> None:
        """A linear layer or convolution: a new layer of units."""
        given = named_arguments(node)
        if given.get("groups", 1) != 1:
            self.refuse("it has a grouped convolution, whose units do not all hear each other")
        if operator_name(node) == "linear" and len(shape_of(here)) != 2:
            self.refuse(f"a linear layer acts on inputs of shape {shape_of(here)}; expected (batch, features)")
        weight = self.name(given["weight"])
        others = () if given["bias"] is None else (self.name(given["bias"]),)
        units = len(self.traced.tensors[weight])
        inputs = self.traced.tensors[weight].shape[1]
        if self.layers and inputs != self.layers[-1].units * self.flat:
            self.refuse(f"{weight} takes {inputs} inputs from {self.layers[-1].units} units of {self.flat} entries each")
        self.layers.append(UnitLayer(weight, others, units))
        self.flat, self.linear = 1, True

    def norm(self, node: fx.Node, here: fx.Node) -> None:
        """Batch norm with stored statistics: more tensors of the last layer's units."""
        given = named_arguments(node)
        if given["training"] or given["running_mean"] is None:
            self.refuse("a batch norm uses the statistics of the batch, so that units act on each other")
        found = [given[key] for key in ("weight", "bias", "running_mean", "running_var") if given[key] is not None]
        if not self.layers or self.flat > 1:
            self.refuse("a batch norm follows no layer of units")
        last = self.layers[-1]
        self.layers[-1] = UnitLayer(last.weight, (*last.others, *map(self.name, found)), last.units)
        self.linear = False  # of two factors, weight and scale, a line in both is no line in the product

    def passes(self, node: fx.Node, here: fx.Node, *, linear: bool) -> None:
        """An operation that acts on each unit by itself."""
        self.linear = self.linear and linear

    def flatten(self, node: fx.Node, here: fx.Node) -> None:
        """A channel becomes a block of features."""
        before, after = shape_of(here), shape_of(node)
        if before == after:
            return
        pixels = torch.Size(before[2:]).numel()
        if len(after) != 2 or after != [before[0], before[1] * pixels]:
            self.refuse(f"{operator_name(node)} turns {before} into {after}; expected (batch, features)")
        self.flat *= pixels

    def mean(self, node: fx.Node, here: fx.Node) -> None:
        """Pooling over all pixels."""
        rank = len(shape_of(here))
        if {d % rank for d in (named_arguments(node)["dim"] or range(rank))} & {0, 1}:
            self.refuse("a mean is taken over units or over the batch")

    def name(self, node: Any) -> str:
        """Returns the name of a tensor of the model."""
        return self.traced.name_of[node.name]

    def refuse(self, reason: str) -> NoReturn:
        """Raises the error that says why."""
        raise MicrogliaError(
            f"{self.model} is no plain chain of layers: {reason}. The constructed path moves single units, which is possible "
            "in chains of linear layers and convolutions such as lenet-300-100, conv-4 or vgg16-bn; for other networks find "
            "a curve by training."
        )
