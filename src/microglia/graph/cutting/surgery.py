"""Surgery on the graph: the smaller model as its traced graph, with patched constants for every changed size."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from microglia.core.layers import GraphLayer, layer_kind
from microglia.graph.cutting.cut import Cut, Scaled, constants
from microglia.graph.cutting.modules import issuer
from microglia.graph.cutting.training import FLAGS, Mode, batch_norm, counter_of
from microglia.graph.dims.nodes import named_arguments, operator_name, split_dim
from microglia.graph.dims.trace import CHECKS, Trace

_TRAINING = "training_"
"""Prefix of the names of constants that only the graph of training holds."""


@dataclass(frozen=True)
class Follows:
    """The modes and types that operators of a trace follow.

    Attributes:
        modes: Operator -> the module whose mode it follows.
        types: Operator -> names of its arguments that are the dtype of the parameters.
        fixed: Constants that keep their dtype.
    """

    modes: Mapping[fx.Node, Mode]
    types: Mapping[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()


class GraphModel(fx.GraphModule):
    """A pruned model as its traced graphs: parameters under their own names, any batch size, `train` and `eval` as usual.

    Batch norm, dropout and recurrent nets read the mode of their own module, so that `small.norm.eval()` freezes a norm. Code
    that the model runs only in training (random depth) is in a second graph, which runs while the whole model is in training.

    Attributes:
        microglia_graphs: The graph of each mode, if one graph does not serve both.
        microglia_exceptions: For each mode the modules that stay in the other mode, according to the model's own `train`.
        microglia_fixed: Constants that keep their dtype independent of the parameters' dtype.
        microglia_notes: Notes about differences to the model in training.
    """

    microglia_graphs: dict[bool, fx.Graph] | None = None
    microglia_exceptions: dict[bool, tuple[str, ...]] = {True: (), False: ()}  # noqa: RUF012 - never changed in place
    microglia_fixed: tuple[str, ...] = ()
    microglia_notes: tuple[str, ...] = ()

    def __deepcopy__(self, memo: Any) -> GraphModel:
        """Returns a copy with its plan."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies specs of its own deprecated class
            copy: GraphModel = super().__deepcopy__(memo)  # type: ignore[assignment]
            own = {k: v for k, v in self.__dict__.items() if k.startswith("microglia_")}
            graphs = {mode: deepcopy(graph) for mode, graph in (self.microglia_graphs or {}).items()}
        for held in ("_modules", "_parameters", "_buffers"):  # torch rebuilds modules without their classes and masks
            copy.__dict__[held] = deepcopy(self.__dict__[held], memo)
        copy.__dict__.update({**own, "microglia_graphs": graphs or None})
        return copy

    def learn_training(self, cut: Cut, names: list[str], follows: Follows) -> None:
        """Adds the graph traced in training mode; its tensors are this model's, under the same names."""
        training = _named_graph(cut, self, follows, _TRAINING)
        _keep_forms(training, cut.analysis.trace, names)
        self.microglia_graphs = {True: training, False: self.graph}
        self.microglia_fixed += tuple(f"{_TRAINING}{name}" for name in sorted(follows.fixed))

    def learn_modes(self, model: nn.Module) -> None:
        """Sets each module's mode from the traced model."""
        self.train(model.training)
        held = dict(self.named_modules())
        for path, module in model.named_modules(remove_duplicate=False):
            if path in held:
                held[path].training = module.training

    def learn_layers(self, model: nn.Module) -> None:
        """Records which tensors of the traced model are weights of layers, so that masks and selectors find them."""
        held = dict(self.named_modules())
        for path, module in model.named_modules(remove_duplicate=False):
            if path in held and type(held[path]) is nn.Module:
                layer: Any = held[path]
                layer.__class__ = GraphLayer
                layer.kinds = tuple(base.__name__ for base in type(module).__mro__)
                layer.kind = layer_kind(module)

    def _apply(self, fn: Any, recurse: bool = True) -> GraphModel:
        """Converts everything like torch, except constants whose dtype the model's code states."""
        held = dict(self.named_buffers(remove_duplicate=False))
        before = {name: held[name] for name in self.microglia_fixed if name in held}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            path, _, leaf = name.rpartition(".")
            owner = self.get_submodule(path)
            new = owner._buffers[leaf]
            if new is not None and new.dtype != buffer.dtype:
                owner._buffers[leaf] = buffer.to(new.device)
        return self

    def train(self, mode: bool = True) -> GraphModel:
        """Sets the mode like the model's own `train`, and returns itself."""
        super().train(mode)
        held = dict(self.named_modules())
        for path in self.microglia_exceptions[mode]:
            if path in held:
                held[path].training = not mode
        graphs = self.microglia_graphs
        if graphs is not None and self.graph is not graphs[mode]:
            self.graph = graphs[mode]
            graphs[mode] = self.graph  # the setter may make a copy
        return self


def _update(node: fx.Node, changes: dict[str, Any]) -> None:
    """Replaces arguments of a node by their names in the operator's schema."""
    positions = {argument.name: i for i, argument in enumerate(node.target._schema.arguments)}  # type: ignore[union-attr]
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in changes.items():
        if name in kwargs or positions[name] > len(args):
            kwargs[name] = value
        elif positions[name] == len(args):
            if node.target._schema.arguments[positions[name]].kwarg_only:  # type: ignore[union-attr]
                kwargs[name] = value
            else:
                args.append(value)
        else:
            args[positions[name]] = value
    node.args, node.kwargs = tuple(args), kwargs


def patched(cut: Cut) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Returns a copy of the traced graph with its constants patched, and node -> its copy; checks are left out."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in cut.analysis.trace.graph.nodes:
        if node.op == "call_function" and operator_name(node) in CHECKS:
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_function":
            _patch(cut, node, copies)
    return graph, copies


def _patch(cut: Cut, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    target, changes = constants(cut, node)
    if not changes:
        return
    copy = copies[node]
    for key, value in changes.items():
        if isinstance(value, list):
            changes[key] = [_carried(copy, v, copies) for v in value]
    if target is not node.target:
        copy.target, copy.kwargs = target, {}
        source: Any = node.args[0]
        k = split_dim(operator_name(node), named_arguments(node), len(cut.dims_of(source)))
        copy.args = (copies[source], changes["split_sizes"], k)
    else:
        _update(copy, changes)


def _carried(copy: fx.Node, value: Any, copies: dict[fx.Node, fx.Node]) -> Any:
    """Returns an argument for the copied graph; a scaled size becomes two operators."""
    if isinstance(value, fx.Node):
        return copies[value]
    if not isinstance(value, Scaled):
        return value
    with copy.graph.inserting_before(copy):
        product = copy.graph.call_function(operator.mul, (copies[value.size], value.kept))
        return copy.graph.call_function(operator.floordiv, (product, value.whole))


def cut_graph(cut: Cut, names: list[str], follows: Follows | None = None) -> GraphModel:
    """Returns the pruned model as a graph.

    Args:
        cut: The cut.
        names: Parameter names of the model's forward, for inputs by keyword.
        follows: The modes and types that operators of the trace follow.
    """
    root = nn.Module()
    graph = _named_graph(cut, root, follows or Follows({}))
    fixed = tuple(sorted(follows.fixed)) if follows else ()
    _keep_forms(graph, cut.analysis.trace, names)
    small = GraphModel(root, graph, class_name="GraphModel")
    small.microglia_fixed = fixed
    return small


def _named_graph(cut: Cut, root: nn.Module, follows: Follows, prefix: str = "") -> fx.Graph:
    """Returns the patched graph, which reads its tensors from ``root``; missing tensors are added there.

    ``prefix`` distinguishes the constants of this graph from those of another.
    """
    trace = cut.analysis.trace
    graph, copies = patched(cut)
    _follow(graph, copies, root, cut, follows.modes)
    for node, copy in copies.items():
        name = trace.name_of.get(node.name)
        if node.op != "placeholder" or name is None:
            continue
        if copy.users:
            original, sliced = trace.tensors[name], cut.slice(name, trace.tensors[name].detach())
            name = prefix + name if name in trace.constants else name
            tensor = sliced.clone()
            _place(root, name, nn.Parameter(tensor, original.requires_grad) if isinstance(original, nn.Parameter) else tensor)
            with graph.inserting_before(copy):
                copy.replace_all_uses_with(graph.get_attr(name))
        graph.erase_node(copy)
    _follow_precision(graph, copies, root, follows.types)
    output = next(iter(reversed(graph.nodes)))
    output.args = (list(output.args[0]),)
    graph.lint()
    return graph


def _follow(
    graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], root: nn.Module, cut: Cut, follows: Mapping[fx.Node, Mode]
) -> None:
    """Makes operators of the copied graph read the mode of their modules, and batch norms count batches."""
    trace = cut.analysis.trace
    counted = {mode.counter for mode in follows.values()}
    for node in reversed(list(copies)):  # these count in both modes; now the norm itself counts
        if node.op == "call_function" and counter_of(node, trace) in counted - {None} and not copies[node].users:
            graph.erase_node(copies[node])
    for node, mode in follows.items():
        copy = copies[node]
        _module(root, mode.path)
        with graph.inserting_before(copy):
            flag = graph.get_attr(mode.flag)
            if mode.counter is None:
                _update(copy, {FLAGS[operator_name(node)]: flag})
                continue
            _place(root, mode.counter, trace.tensors[mode.counter].detach().clone())
            batches = graph.get_attr(mode.counter)
        eps = named_arguments(node)["eps"]
        x, weight, bias, mean, variance = copy.args[:5]
        copy.target, copy.args = batch_norm, (x, (weight, bias), (mean, variance, batches))
        copy.kwargs = {"training": flag, "momentum": mode.momentum, "eps": eps}


def _follow_precision(
    graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], root: nn.Module, types: Mapping[fx.Node, tuple[str, ...]]
) -> None:
    """Makes operators of the copied graph take their dtypes from a parameter of their module, or else the first one."""
    held = [name for name, p in root.named_parameters() if p.is_floating_point()]
    for node, keys in types.items():
        if node not in copies or not held:
            continue
        path = issuer(node)
        name = next((n for n in held if n.rpartition(".")[0] == path), held[0])
        with graph.inserting_before(copies[node]):
            dtype = graph.call_function(getattr, (graph.get_attr(name), "dtype"))
        _update(copies[node], dict.fromkeys(keys, dtype))


def _module(root: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path, which is created if it is missing."""
    for part in filter(None, path.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    root = _module(root, path)
    if leaf in root._parameters or leaf in root._buffers:
        return
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor)


def _keep_forms(graph: fx.Graph, trace: Trace, names: list[str]) -> None:
    """Gives the graph the inputs and outputs of the model's forward, with the same nesting."""
    positional, named = pytree.tree_unflatten(list(trace.example), trace.in_spec)
    given = [*names[: len(positional)], *named]
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo(given, trace.in_spec, trace.out_spec))


def forward_names(model: nn.Module) -> list[str]:
    """Returns the names of a model's positional inputs."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    found = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]
    return found + [f"input_{i}" for i in range(len(found), 64)]  # for *args
