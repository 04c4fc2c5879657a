"""What is asked of a pruned model, one function per column of the coverage benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import microglia as mg

SINGLE = 1e-4
"""Largest relative difference to the masked model's outputs in float32."""


class CheckError(Exception):
    """The pruned model is not as it should be; the text says why."""


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Returns the floating-point outputs of a model, flat."""
    result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Returns the largest difference of two outputs, relative to the largest value of each.

    Raises:
        CheckError: They have other shapes, or nothing finite to compare.
    """
    shapes = [[tuple(t.shape) for t in side] for side in (got, wanted)]
    if not wanted or shapes[0] != shapes[1]:
        raise CheckError(f"outputs have shapes {shapes[0]} instead of {shapes[1]}")
    if not all(bool(t.isfinite().all()) for t in (*got, *wanted)):
        raise CheckError("outputs are not finite")
    pairs = [(g.double(), w.double()) for g, w in zip(got, wanted, strict=True) if w.numel()]
    return max((float((g - w).abs().max() / w.abs().max().clamp_min(1e-30)) for g, w in pairs), default=0.0)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3) for a, b in zip(one, other, strict=True))


# -------------------------------------------------------------------------------------------------------------- equality
@torch.no_grad()
def equality(dense: nn.Module, small: nn.Module, inputs: Any) -> tuple[float, str]:
    """Compares final outputs in float32, on inputs the pruning has not seen, with those of the masked model.

    Returns:
        The relative difference and what the masked model was: ``zeroed``, the user's own model with the removed entries set
        to zero; or, where that differs because a norm or a mean runs over what is left, the library's ``masked`` reference.

    Raises:
        CheckError: They differ.
    """
    kept = mg.graph.plan_of(small).kept
    got, masked = call(deepcopy(small).eval(), inputs), call(zeroed(dense, kept), inputs)
    if same(masked, call(dense, inputs)):
        raise CheckError("the mask does not change the outputs: their equality would say nothing")
    error = difference(got, masked)
    if error <= SINGLE:
        return error, "zeroed"
    error = difference(got, reference_outputs(dense, kept, inputs))
    if error > SINGLE:
        raise CheckError(f"the outputs differ from the masked model's by {error:.1e}")
    return error, "masked"


def zeroed(dense: nn.Module, kept: Mapping[str, Mapping[str, list[Any]]]) -> nn.Module:
    """Returns a copy of a model whose removed entries are zero."""
    model = deepcopy(dense).eval()
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, by_dim in kept.items():
        for dim, stays in by_dim.items():
            if name not in tensors:
                continue
            tensor, several = tensors[name], isinstance(stays[0], list)  # a list for each group of a convolution
            rows = torch.tensor(by_dim.get("0", range(len(tensor)))).chunk(len(stays)) if several else [slice(None)]
            for own, left in zip(rows, stays if several else [stays], strict=True):
                removed = torch.ones(tensor.shape[int(dim)], dtype=torch.bool)
                removed[left] = False
                tensor[own] = tensor[own].index_fill(int(dim), removed.nonzero()[:, 0], 0)
    return model


def reference_outputs(dense: nn.Module, kept: Mapping[str, Mapping[str, list[Any]]], inputs: Any) -> list[Tensor]:
    """Returns the outputs of the library's masked reference, in float32: reductions run over kept entries."""
    from microglia.graph.cutting.cut import Cut
    from microglia.graph.cutting.modules import kept_units
    from microglia.graph.cutting.reference import Reference
    from microglia.graph.dims.analysis import Analysis
    from microglia.graph.dims.trace import trace

    analysis = Analysis(trace(deepcopy(dense), inputs, dynamic=()))
    cut = Cut(analysis, kept_units(analysis, kept))
    reference, traced = Reference(cut), analysis.trace
    given = dict(zip(traced.inputs, pytree.tree_leaves(inputs), strict=True))
    values: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            leaves = fx.node.map_arg(node.args[0], values.__getitem__)
            return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if node.op == "placeholder":
            name = traced.name_of.get(node.name)
            values[node] = given.get(node.name) if name is None else cut.zero(name, traced.tensors[name].detach())
        else:
            values[node] = reference.run(node, values)
    raise CheckError("the traced graph has no output")


# ---------------------------------------------------------------------------------------------------------------- the rest
def train_step(model: nn.Module, inputs: Any) -> None:
    """Runs forward and backward in training mode.

    Raises:
        CheckError: No gradient arrives, or one that is not finite.
    """
    torch.manual_seed(0)
    model.train()
    model.zero_grad(set_to_none=True)
    sum(output.square().mean() for output in call(model, inputs)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if not gradients:
        raise CheckError("no parameter got a gradient")
    broken = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    if broken:
        raise CheckError(f"the gradient of {broken[0]} is not finite")


@torch.no_grad()
def reloaded(small: nn.Module, fresh: nn.Module, inputs: Any) -> None:
    """Saves a pruned model, loads it into a freshly built one, and compares bits.

    Raises:
        CheckError: Parameters or outputs differ.
    """
    with tempfile.TemporaryDirectory() as directory:
        mg.save(small, directory)
        loaded = mg.load(directory, fresh)
    before, after = small.state_dict(), loaded.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise CheckError("the loaded model has another state")
    pairs = zip(call(deepcopy(small).eval(), inputs), call(loaded.eval(), inputs), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise CheckError("the loaded model has other outputs")


@torch.no_grad()
def compiled(model: nn.Module, inputs: Any, backend: str) -> None:
    """Compiles a model as one graph and compares its outputs.

    Raises:
        CheckError: They differ.
    """
    torch._dynamo.reset()
    model = deepcopy(model).eval()
    expected = call(model, inputs)
    fast = torch.compile(model, fullgraph=True, backend=backend)
    if (error := difference(call(fast, inputs), expected)) > SINGLE:
        raise CheckError(f"compiled outputs differ by {error:.1e}")
