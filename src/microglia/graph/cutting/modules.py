"""Surgery on the user's own modules: slices tensors in a copy and corrects the sizes that layers store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from microglia.core.auxiliary import drop_auxiliary
from microglia.core.modes import modes_kept
from microglia.graph.cutting.cut import Cut, by_group, constants, positions, select_all
from microglia.graph.dims.analysis import Analysis
from microglia.graph.dims.nodes import named_arguments

Indices = Mapping[str, Mapping[str, list[Any]]]
"""Tensor name -> dimension -> kept indices; a list per group if the groups of a convolution keep different ones."""

Attributes = Mapping[str, Mapping[str, Any]]
"""Module name -> attribute -> new value."""

NOTED = ("groups", "num_groups", "normalized_shape", "pad")
"""Arguments that layers pass to their operators from an attribute of the same name."""


def indices(cut: Cut) -> dict[str, dict[str, list[Any]]]:
    """Returns the kept indices of every tensor that loses any."""
    found = {}
    for name in cut.analysis.parameter_dims:
        if stays := cut.stays(name):
            found[name] = {str(k): positions(mask) for k, mask in stays.items()}
    return found


def kept_units(analysis: Analysis, kept: Indices, without: Collection[str] = ()) -> dict[int, Tensor]:
    """Returns the units of each atom that stay, from kept indices by tensor: a unit stays if any of its entries stays.

    Args:
        analysis: Analysis of the model.
        kept: The result of `indices`; other tensors stay whole.
        without: Tensors to ignore.
    """
    algebra, rows = analysis.algebra, analysis.rows
    units: dict[int, Tensor] = {}
    for name, dims in analysis.parameter_dims.items():  # whole tensors too: a unit removed from one may stay in others
        if name in analysis.trace.constants or name in without:  # each trace numbers constants differently
            continue
        for k in range(len(dims)):
            dim, stays = analysis.entries(name, k), _stays(analysis, name, k, kept.get(name, {}))
            for atom in algebra.leaves(dim):
                place = algebra.coordinate(dim, atom, rows.get(atom, 1))
                found = units.setdefault(atom, torch.zeros(rows.get(atom, 1) * algebra.sizes[atom], dtype=torch.bool))
                found[place[stays & (place >= 0)]] = True
    return {atom: _by_row(found, rows.get(atom, 1)) for atom, found in units.items() if not bool(found.all())}


def _stays(analysis: Analysis, name: str, k: int, kept: Mapping[str, list[Any]]) -> Tensor:
    """Returns the entries of a tensor's dimension that stay, in every remaining group of a convolution; boolean (entries,)."""
    groups, shape = analysis.algebra.size(analysis.groups(name, k)), analysis.trace.tensors[name].shape
    stay: Any = kept.get(str(k))
    rows = list(dict.fromkeys(i * groups // shape[0] for i in kept.get("0", range(shape[0])))) if groups > 1 else [0]
    stays = torch.zeros(groups, shape[k], dtype=torch.bool)
    each = stay if by_group(stay or []) else [range(shape[k]) if stay is None else stay] * len(rows)
    if groups == 1:  # for groups that this trace does not see, the union of the lists
        rows *= len(each)
    for row, own in zip(rows, each, strict=True):
        stays[row, list(own)] = True
    return stays.flatten()


def _by_row(units: Tensor, rows: int) -> Tensor:
    """Returns the units of each row; a row that is removed itself gets those of the first remaining row."""
    if rows == 1:
        return units
    each = units.view(rows, -1)
    alive = each.any(1)
    return torch.where(alive[:, None], each, each[alive][0]) if bool(alive.any()) else each


def attributes(cut: Cut, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the attributes that layers pass to their operators and that the cut changes: groups, normalized shapes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, dict[str, Any]] = {}
    for node in cut.analysis.trace.graph.nodes:
        if node.op != "call_function":
            continue
        _, changes = constants(cut, node)
        path = issuer(node)
        for key, value in changes.items():
            if key not in NOTED or path not in modules or not hasattr(modules[path], key):
                continue
            if _list(getattr(modules[path], key)) == _list(named_arguments(node)[key]):
                found.setdefault(path, {})[key] = value
    return found


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def issuer(node: Any) -> str:
    """Returns the path of the module whose forward called the operator."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path)


def cut_module(model: nn.Module, kept: Indices, changed: Attributes) -> nn.Module:
    """Returns a cut copy of the model, without its auxiliary parts if it loses anything: they fit only the whole model."""
    held = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    model = deepcopy(model, {id(held[name]): held[name] for name in kept if name in held})  # these are replaced, not changed
    before = _entries(model)
    apply_indices(model, kept, changed)
    if _entries(model) < before:
        drop_auxiliary(model)
    forget(model)
    return model


def _entries(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def forget(model: nn.Module) -> None:
    """Makes a model recompute values that it caches in one mode, such as biases by position, from the cut parameters."""
    with modes_kept(model, through_train=True):
        model.train(not model.training)


@torch.no_grad()
def apply_indices(model: nn.Module, kept: Indices, changed: Attributes) -> None:
    """Slices tensors of a model in place and corrects its layers' attributes. Names without a tensor are skipped."""
    modules = dict(model.named_modules(remove_duplicate=False))
    new_of: dict[int, Tensor] = {}
    held: list[Tensor] = []  # keeps replaced tensors alive, because a new tensor might otherwise get the same id
    touched: dict[int, nn.Module] = {}
    for name, by_dim in kept.items():
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        old = getattr(owner, leaf, None)
        if owner is None or not isinstance(old, Tensor):
            continue
        if id(old) not in new_of:
            held.append(old)
            new_of[id(old)] = new = _sliced(old, by_dim)
            new_of[id(new)] = new  # a module with several names is cut under the first
        if leaf in owner._parameters:
            owner._parameters[leaf] = new_of[id(old)]  # type: ignore[assignment]
        elif leaf in owner._buffers:
            owner._buffers[leaf] = new_of[id(old)]
        else:
            setattr(owner, leaf, new_of[id(old)])
        touched[id(owner)] = owner
    for path, values in changed.items():
        for attribute, value in values.items():
            old = getattr(modules[path], attribute)
            if attribute not in NOTED or isinstance(old, bool) or not isinstance(old, int | tuple | list):
                raise ValueError(f"{attribute} of {path} is no size that a cut changes")
            if isinstance(old, int) is not isinstance(value, int) or len(_list(value)) != len(_list(old)):
                raise ValueError(f"{attribute} of {path} is {old}, which cannot become {value}")
            setattr(modules[path], attribute, value if isinstance(old, int) else type(old)(value))
            touched[id(modules[path])] = modules[path]
    for module in touched.values():
        mend(module)


def _sliced(old: Tensor, by_dim: Mapping[str, list[Any]]) -> Tensor:
    for dim, places in by_dim.items():
        flat = [i for place in places for i in place] if by_group(places) else places
        if flat and not 0 <= min(flat) <= max(flat) < old.shape[int(dim)]:
            raise IndexError(f"dimension {dim} has {old.shape[int(dim)]} entries, of which {max(flat)} is none")
    new = select_all(old.detach(), {int(dim): places for dim, places in by_dim.items()})
    if old.ndim == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)  # otherwise every convolution would convert it
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def mend(module: nn.Module) -> None:
    """Sets the sizes that a layer stores to those of its tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        transposed = isinstance(module, _ConvTransposeNd)
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, _NormBase):
        present = module.running_mean if module.running_mean is not None else module.weight
        module.num_features = len(present) if present is not None else module.num_features
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    elif type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):  # a layer of Transformers: (in, out)
        for attribute, size in (("nx", weight.shape[0]), ("nf", weight.shape[1])):
            if hasattr(module, attribute):
                setattr(module, attribute, size)
