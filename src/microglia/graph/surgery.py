"""Surgery on the graph: the smaller model as its traced graph, with every constant that depends on a size patched."""

from __future__ import annotations

import inspect
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from microglia.graph.cut import Cut, Scaled, constants
from microglia.graph.trace import Trace, named_arguments, operator_name

CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size")
"""Operators of the trace that only check; they compute nothing and their bounds no longer hold."""


class GraphModel(fx.GraphModule):
    """A pruned model as its traced graph: parameters under their own names, any batch size, `train` and `eval` as usual.

    Random depth is the identity, as in evaluation: it left no operator in the trace.
    """

    def __deepcopy__(self, memo: Any) -> GraphModel:
        """Returns a copy with its plan."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies specs of a class of its own that it deprecates
            copy: GraphModel = super().__deepcopy__(memo)  # type: ignore[assignment]
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if k.startswith("microglia_")})
        return copy

    def train(self, mode: bool = True) -> GraphModel:
        """Tells the operators that know (batch norm, dropout, recurrent nets) and returns itself."""
        super().train(mode)
        changed = [_set_training(node, mode) for node in self.graph.nodes if node.op == "call_function"]
        if any(changed):
            self.recompile()
        return self


_TRAINING = {"batch_norm": "training", "dropout": "train", "feature_dropout": "train", "alpha_dropout": "train"}
_TRAINING.update(dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), "train"))


def _set_training(node: fx.Node, mode: bool) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or (flag := _TRAINING.get(operator_name(node))) is None:
        return False
    a = named_arguments(node)
    if flag == "training" and a["running_mean"] is None:  # statistics of its own input, in either mode
        return False
    if a[flag] == mode:
        return False
    _update(node, {flag: mode})
    return True


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
        copy.args = (copies[node.args[0]], changes["split_sizes"], named_arguments(node)["dim"])  # type: ignore[index]
    else:
        _update(copy, changes)


def _carried(copy: fx.Node, value: Any, copies: dict[fx.Node, fx.Node]) -> Any:
    """Returns an argument for the copied graph; a scaled size becomes two operators there."""
    if isinstance(value, fx.Node):
        return copies[value]
    if not isinstance(value, Scaled):
        return value
    with copy.graph.inserting_before(copy):
        product = copy.graph.call_function(operator.mul, (copies[value.size], value.kept))
        return copy.graph.call_function(operator.floordiv, (product, value.whole))


def cut_graph(cut: Cut, names: list[str]) -> GraphModel:
    """Returns the pruned model as a graph.

    Args:
        cut: What stays.
        names: Parameter names of the model's forward, by which its inputs may be given.
    """
    trace = cut.analysis.trace
    graph, copies = patched(cut)
    root = nn.Module()
    for node, copy in copies.items():
        name = trace.name_of.get(node.name)
        if node.op != "placeholder" or name is None:
            continue
        if copy.users:
            tensor = cut.slice(name, trace.tensors[name].detach()).clone()
            original = trace.tensors[name]
            _place(root, name, nn.Parameter(tensor, original.requires_grad) if isinstance(original, nn.Parameter) else tensor)
            with graph.inserting_before(copy):
                copy.replace_all_uses_with(graph.get_attr(name))
        graph.erase_node(copy)
    _keep_forms(graph, trace, names)
    graph.lint()
    return GraphModel(root, graph, class_name="GraphModel")


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    elif leaf not in root._buffers:
        root.register_buffer(leaf, tensor)


def _keep_forms(graph: fx.Graph, trace: Trace, names: list[str]) -> None:
    """Lets the graph take and return what the model's forward does, nested as there."""
    positional, named = pytree.tree_unflatten(list(trace.example), trace.in_spec)
    given = [*names[: len(positional)], *named]
    graph._codegen = _PyTreeCodeGen(_PyTreeInfo(given, trace.in_spec, trace.out_spec))
    output = next(iter(reversed(graph.nodes)))
    output.args = (list(output.args[0]),)


def forward_names(model: nn.Module) -> list[str]:
    """Returns the names of a model's positional inputs."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    found = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]
    return found + [f"input_{i}" for i in range(len(found), 64)]  # for *args
