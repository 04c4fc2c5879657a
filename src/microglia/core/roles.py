"""Roles of layers in a model, found by running the model; a selector ``role:...`` is independent of names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.layers import ROLES, prunable_layers
from microglia.core.modes import evaluating

CLASSIFIER = "classifier"
"""Role of the layers that make the output: no other layer stands between them and it."""
LOGITS = "logits"
"""Entry or attribute of an output; if it exists, the other entries are ignored."""
LOOKED_UP = "EmbeddingBackward"
"""Prefix of the names of operators that look up rows of a weight; their results are activations."""
Node = Any
"""An operator in the graph that autograd keeps of a forward pass."""


def mark_roles(model: nn.Module, example_inputs: Any) -> dict[str, tuple[str, ...]]:
    """Finds the layers that make a model's output, so that selectors can name them: ``exclude=["role:classifier"]``.

    The model runs once, in evaluation mode; its state, its modes and the random generators stay as they are. The weights of the
    operators next to the output decide, not names: a classifier may be a convolution, one of several heads, or before a
    softmax. Copies of the model keep the marks; the state does not hold them.

    Args:
        model: Any module, masked or not.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        The names of the modules of each role, in the order of the modules; one name per module.

    Raises:
        MicrogliaError: The model does not run, or its output depends on no weight.
    """
    owners = _owners(model)
    found = _last_layers(_outputs(model, example_inputs), owners)
    if not found:
        raise MicrogliaError(f"No weight of {type(model).__name__} makes its output, so that it has no classifier.")
    roles = {CLASSIFIER: tuple(path for path, _ in model.named_modules() if path in found)}
    put_roles(model, roles)
    return roles


def put_roles(model: nn.Module, roles: Mapping[str, Collection[str]]) -> None:
    """Marks the modules of a model with roles that were found in another one of the same architecture.

    Args:
        model: The model to mark.
        roles: Names of modules by role, as `mark_roles` returns them.
    """
    for path, module in model.named_modules():
        setattr(module, ROLES, tuple(role for role, paths in roles.items() if path in paths))


def means_role(selectors: Iterable[object]) -> bool:
    """Tells whether one of the values is a selector by role."""
    return any(isinstance(s, str) and s.removeprefix("!").startswith("role:") for s in selectors)


def _owners(model: nn.Module) -> dict[int, frozenset[str]]:
    """Returns the paths of the modules that hold each weight, by the identity of its parameter.

    Weights are the prunable tensors and all other matrices: a layer under weight normalization is a layer too.
    """
    prunable = {id(layer.raw) for layer in prunable_layers(model).values()}
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in prunable or sum(size > 1 for size in parameter.shape) > 1:
            path = name.partition("parametrizations.")[0] if "parametrizations." in name else name.rpartition(".")[0]
            found.setdefault(id(parameter), set()).add(path.removesuffix("."))
    return {number: frozenset(paths) for number, paths in found.items()}


@dataclass
class _Seen:
    """Record of a forward pass: its output, and the operators that made the outputs of modules."""

    output: Any = None
    made: set[Node] = field(default_factory=set)


def _outputs(model: nn.Module, example_inputs: Any) -> _Seen:
    seen = _Seen()

    def note(module: nn.Module, inputs: object, output: Any) -> None:
        seen.made.update(node for tensor in _tensors(output) if (node := tensor.grad_fn) is not None)

    hooks = [m.register_forward_hook(note) for path, m in model.named_modules() if not _parametrizes(path, m)]
    example = Example.of(example_inputs).map(_own)
    devices = [p.device.index for p in model.parameters() if p.device.type == "cuda"][:1]
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices), torch.enable_grad(), _all_trainable(model):
            seen.output = model(*example.args, **example.kwargs)
    except Exception as error:  # whatever the user's own forward raises
        raise MicrogliaError(f"{type(model).__name__} does not run on the example inputs: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _parametrizes(path: str, module: nn.Module) -> bool:
    return isinstance(module, parametrize.ParametrizationList) or "parametrizations." in path


def _own(tensor: Tensor) -> Tensor:
    """Returns a copy that passes gradients on, because a model may write into its inputs."""
    copy = tensor.detach().clone()
    return copy.requires_grad_().clone() if copy.is_floating_point() else copy


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[None]:
    """Context in which every parameter takes part in the graph, also a frozen one."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _tensors(output: Any) -> list[Tensor]:
    """Returns the tensors of an output; only its logits if it names some."""
    logits = output.get(LOGITS) if isinstance(output, Mapping) else getattr(output, LOGITS, None)
    return [leaf for leaf in tree_leaves(output if logits is None else logits) if isinstance(leaf, Tensor)]


def _last_layers(seen: _Seen, owners: Mapping[int, frozenset[str]]) -> frozenset[str]:
    """Returns the paths of the modules whose weights the output uses with no other layer in between."""
    order = _from_inputs_on({t.grad_fn for t in _tensors(seen.output) if t.grad_fn is not None})
    layers = _layers(order, seen.made, owners)
    after: dict[Node, frozenset[frozenset[str]]] = {}
    last: set[str] = set()
    for node in reversed(order):  # from the output back
        own = layers.get(node, frozenset())
        if own and after.get(node, frozenset()) <= own:
            last.update(*own)
        for before, _ in node.next_functions:
            after[before] = after.get(before, frozenset()) | after.get(node, frozenset()) | own
    return frozenset(last)


def _from_inputs_on(roots: Iterable[Node]) -> list[Node]:
    """Returns every operator from the inputs to the roots, each after its dependencies."""
    order: list[Node] = []
    visited: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in visited:
            visited.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in node.next_functions if before is not None and before not in visited]
    return order


def _layers(order: list[Node], made: set[Node], owners: Mapping[int, frozenset[str]]) -> dict[Node, frozenset[frozenset[str]]]:
    """Returns the layers that each operator on activations uses; modules that share a weight are one layer.

    An operator whose inputs are only parameters, such as a transposition or a mask, makes a weight. Outputs of modules and rows
    that are looked up always are activations.
    """
    weights: dict[Node, frozenset[frozenset[str]]] = {}  # layers of the operators that make weights
    layers: dict[Node, frozenset[frozenset[str]]] = {}
    for node in order:
        before = [n for n, _ in node.next_functions if n is not None]
        held = frozenset[frozenset[str]]().union(*(weights[n] for n in before if n in weights))
        if (variable := getattr(node, "variable", None)) is not None:
            if isinstance(variable, nn.Parameter):
                own = owners.get(id(variable))
                weights[node] = frozenset() if own is None else frozenset([own])
        elif node.name().startswith(LOOKED_UP):
            continue
        elif node in made or any(n not in weights for n in before):
            layers[node] = held
        else:
            weights[node] = held
    return layers
