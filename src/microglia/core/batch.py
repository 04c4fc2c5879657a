"""Batches and example inputs: trees of tensors, and the one normal form in which a model is called with them.

Inputs and targets are any tree of tensors that `torch.utils._pytree` walks: one tensor, tuples, lists, dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from microglia.core.errors import MicrogliaError


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_inputs: Any) -> Example:
        """Reads example inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

        If a model takes one dictionary or one list as its argument, put it inside a tuple: ``(batch,)``.

        Raises:
            MicrogliaError: The inputs are none of these.
        """
        if isinstance(example_inputs, Example):
            return example_inputs
        if isinstance(example_inputs, Tensor):
            return cls((example_inputs,), {})
        if isinstance(example_inputs, Mapping):
            return cls((), dict(example_inputs))
        if isinstance(example_inputs, list | tuple):
            return cls(tuple(example_inputs), {})
        raise MicrogliaError(
            f"Example inputs are a tensor, a tuple of arguments or a mapping of keyword arguments, not "
            f"{type(example_inputs).__name__}."
        )

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int:
        """Length of the first dimension of the first tensor; 1 without one."""
        return next((tensor.shape[0] for tensor in self.tensors if tensor.ndim > 0), 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Example:
        """Returns the example with ``function`` applied to each tensor."""
        args, kwargs = map_tensors(function, (self.args, self.kwargs))
        return Example(args, kwargs)

    def copied(self) -> Example:
        """Returns the example with its own tensors, for a model that writes into its inputs."""
        return self.map(lambda tensor: tensor.detach().clone())


def call(model: nn.Module, inputs: Any) -> Any:
    """Returns the model's outputs for inputs in any form that `Example.of` reads."""
    if isinstance(inputs, Tensor):  # the usual case, without a detour
        return model(inputs)
    example = Example.of(inputs)
    return model(*example.args, **example.kwargs)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Returns the tree with ``function`` applied to every tensor; other leaves stay."""
    if isinstance(tree, Tensor):
        return function(tree)
    return tree_map(lambda leaf: _mapped(function, leaf), tree)


def _mapped(function: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return function(leaf)
    if isinstance(leaf, Mapping):  # a mapping of another class, such as the batches of a tokenizer
        return map_tensors(function, dict(leaf))
    return leaf


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns every tensor of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return found


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Returns the tree with every tensor on a device; a tensor that is there already is not copied."""
    return map_tensors(lambda tensor: tensor.to(device), tree)


def count_examples(tree: Any) -> int:
    """Returns the number of examples of a batch: the length of its first tensor, or of a list of mappings, one per example.

    Args:
        tree: Inputs or targets.

    Raises:
        MicrogliaError: The tree holds no tensor with a first dimension and is not a list.
    """
    if isinstance(tree, list | tuple) and tree and all(isinstance(entry, Mapping) for entry in tree):
        return len(tree)
    if isinstance(tree, Mapping):
        tree = dict(tree)
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    if isinstance(tree, Sized) and not isinstance(tree, Mapping | Tensor):
        return len(tree)
    raise MicrogliaError(
        f"The examples of a batch are counted by its first tensor, and there is none with a first dimension in a "
        f"{type(tree).__name__}; give the task its own count=function of the targets."
    )


def repeat_example(example: Any, n: int) -> Any:
    """Returns example inputs of one example as a batch of ``n`` equal ones.

    Args:
        example: A tree of tensors whose first dimension is the batch, of size 1; a tensor without dimensions stays.
        n: Examples in the batch, at least 1.
    """
    return map_tensors(lambda tensor: tensor.repeat(n, *[1] * (tensor.ndim - 1)) if tensor.ndim else tensor, example)


def take_examples(tree: Any, chosen: Tensor) -> Any:
    """Returns the chosen examples of a batch, by index along the first dimension of every tensor; one may repeat.

    Args:
        tree: Tensors that all have the batch as their first dimension.
        chosen: int64, on the CPU.
    """
    return map_tensors(lambda tensor: tensor[chosen.to(tensor.device)] if tensor.ndim else tensor, tree)
