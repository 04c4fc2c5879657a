"""Sharded parameters (DTensor, FSDP2): gathered, cut alike, and known to ``fully_shard`` under their new attribute.

A mask is a whole boolean buffer, equal on every rank; only the tensors below it are shards. Functions that gather are
collective: every rank calls them. Nothing here imports ``torch.distributed.tensor`` before a sharded tensor exists.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import FileError, MicrogliaError

FSDP = "torch.distributed.fsdp"
GATHER = "gather it first: microglia.save on all ranks, then microglia.load in one process"


def is_sharded(tensor: object) -> bool:
    """Tells whether a tensor is a DTensor, of which each rank holds a part. By name: a traced value is no tensor."""
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with all its entries on this rank; collective for a sharded one."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor cut as another one is; without communication, so it must be equal on all ranks."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    found = cast(Any, like)
    return distribute_tensor(tensor.to(found.device), found.device_mesh, found.placements, src_data_rank=None)


def zeros_whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns zeros of a weight's shape and memory layout, whole on this rank where the weight is sharded."""
    if is_sharded(weight):
        return torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    return torch.zeros_like(weight, dtype=dtype)


def has_shards(model: nn.Module) -> bool:
    """Tells whether any parameter of a model is sharded, also while FSDP2 has gathered it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return bool(_fsdp_modules(model)) or any(map(is_sharded, model.parameters()))


def gathers_itself(model: nn.Module) -> bool:
    """Tells whether FSDP2 gathers the parameters for each pass; only a backward pass then reaches their shards."""
    return bool(_fsdp_modules(model))


def reshard(model: nn.Module) -> None:
    """Makes a model hold its sharded parameters, which FSDP2 leaves gathered after some passes; else does nothing."""
    for module in _fsdp_modules(model):
        module.reshard()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    library = sys.modules.get(FSDP)
    kind = getattr(library, "FSDPModule", None)
    return [module for module in model.modules() if isinstance(module, kind)] if kind is not None else []


def refuse_shards(model: nn.Module, what: str) -> None:
    """Raises `MicrogliaError` for a model with sharded parameters; ``what`` needs whole ones."""
    if has_shards(model):
        raise MicrogliaError(f"{what} needs whole parameters, but this {plain_name(model)} is sharded: {GATHER}.")


def plain_name(module: nn.Module) -> str:
    """Returns the name of a module's class without the prefix that ``fully_shard`` gives it."""
    name = type(module).__name__
    kind = getattr(sys.modules.get(FSDP), "FSDPModule", None)
    return name.replace("FSDP", "", 1) if kind is not None and isinstance(module, kind) else name


def moved(parameter: Tensor, old: tuple[nn.Module, str], new: tuple[nn.Module, str]) -> None:
    """Tells FSDP2 that a parameter is now another attribute, where it puts the gathered tensor for each pass.

    Args:
        parameter: The parameter; nothing is done unless it is sharded.
        old: Module and attribute that held it.
        new: Module and attribute that hold it now.

    Raises:
        MicrogliaError: This version of torch keeps its records elsewhere.
    """
    if not is_sharded(parameter) or FSDP not in sys.modules:
        return
    try:
        for record in _records():
            if (record.module, record.param_name) == old:
                record.module, record.param_name = new
            held = zip(record.shared_modules, record.shared_param_names, strict=True)
            for place, each in enumerate(held):
                if each == old:
                    record.shared_modules[place], record.shared_param_names[place] = new
    except (ImportError, AttributeError) as error:
        raise MicrogliaError(
            "Masks cannot be attached after fully_shard under this version of torch: attach them first, then shard."
        ) from error


def _records() -> Iterator[Any]:
    """Yields where FSDP2 puts each of its parameters; torch has no public way to say that one has moved."""
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch 2.11: one group
            groups = [group] if (group := getattr(state, "_fsdp_param_group", None)) is not None else []
        for group in groups:
            for held in group.fsdp_params:
                yield held._module_info


@contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Yields whether this rank writes a model's files: rank 0 alone where parameters are sharded; the others wait for it.

    Raises:
        FileError: Rank 0 failed, on the other ranks; rank 0 raises its own error.
    """
    if not has_shards(model):
        yield True
        return
    writes, problem = torch.distributed.get_rank() == 0, [""]
    try:
        yield writes
    except BaseException as error:
        problem[0] = str(error).strip() or type(error).__name__
        raise
    finally:
        torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise FileError(f"Rank 0 did not write the model: {problem[0]}")
