"""The purity contract of scores: a score leaves the model bit for bit unchanged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from microglia.core.errors import ScoreError
from microglia.core.modes import modes_kept
from microglia.core.sharded import reshard


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Runs its body and leaves the model, and the global random number generators, as they were.

    State that every forward or backward pass changes is restored: batch-norm statistics and other buffers, train and eval
    modes, ``requires_grad``, ``.grad``, the states of the Python, NumPy and torch generators. State that no score may change is
    checked: the parameters' values and the module's hooks.

    Raises:
        ScoreError: The body changed a parameter in place, or left a hook behind.
    """
    reshard(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    parameters = {name: (p, p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    versions = {id(p): p.grad._version for p in model.parameters() if p.grad is not None}
    hooks = _hooks(model)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the global state is the point
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with modes_kept(model), torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            reshard(model)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for p, _, requires_grad, grad in parameters.values():
                p.requires_grad_(requires_grad)
                p.grad = grad
    changed = [name for name, (p, version, _, _) in parameters.items() if p._version != version]
    changed += [
        f"{name}.grad" for name, (p, _, _, grad) in parameters.items() if grad is not None and grad._version != versions[id(p)]
    ]
    if changed:
        raise ScoreError(f"A score must not change the model, but it wrote to {', '.join(changed[:5])}. Work on a copy.")
    if _hooks(model) != hooks:
        raise ScoreError("A score must not leave hooks on the model; remove the handle it registered.")


def in_training(model: nn.Module) -> nn.Module:
    """Puts a model into training mode, except dropout, whose noise would affect the scores; returns the model."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return model


def _hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)
