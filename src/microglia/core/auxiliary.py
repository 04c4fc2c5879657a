"""Auxiliary parts of a model, which only training uses: pruning, budgets and counts leave them out, and cut models drop them.

A model declares them: ``auxiliary = ("boosters",)``, a tuple of names of its submodules. Its forward pass skips a part that is
None, or an empty ``torch.nn.ModuleList``.
"""

from __future__ import annotations

from torch import nn


def auxiliary_paths(model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of the auxiliary parts that a model, or one of its submodules, declares and still holds."""
    found = []
    for path, module in model.named_modules():
        declared = getattr(module, "auxiliary", ())
        if isinstance(declared, tuple) and all(isinstance(name, str) for name in declared):
            found += [f"{path}.{name}".strip(".") for name in declared if getattr(module, name, None) is not None]
    return tuple(found)


def is_auxiliary(path: str, paths: tuple[str, ...]) -> bool:
    """Tells whether a module or a tensor is an auxiliary part, or lies in one."""
    return any(path == own or path.startswith(f"{own}.") for own in paths)


def counted_parameters(model: nn.Module) -> int:
    """Returns the number of parameters of a model outside its auxiliary parts, a shared one once."""
    paths = auxiliary_paths(model)
    return sum(p.numel() for name, p in model.named_parameters() if not is_auxiliary(name, paths))


def drop_auxiliary(model: nn.Module) -> nn.Module:
    """Removes the auxiliary parts of a model in place; returns the model."""
    for path in auxiliary_paths(model):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, nn.ModuleList() if isinstance(getattr(owner, name), nn.ModuleList) else None)
    return model
