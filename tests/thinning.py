"""A small network whose channels a pruner trains away, on fixed images: what the tests of such methods share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from microglia.scores import Evidence

STEPS = 6
"""Steps of a training, unless a test says otherwise."""


def network() -> nn.Sequential:
    """Returns two convolutions with norms, and a classifier; always the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip


def images(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Returns sixteen images and their classes."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 6, 6, generator=made), torch.randint(10, (16,), generator=made)


def made(kind: Any, model: nn.Module, *, steps: int = STEPS, **settings: Any) -> Any:
    """Returns a pruner for a training of some steps: half of the channels, unless the settings have a budget."""
    budget = {} if {"density", "flops", "params", "epsilon"} & set(settings) else {"density": 0.5}
    evidence = Evidence([images(), images(2)], functional.cross_entropy, torch.Generator().manual_seed(0))
    known = {"total_steps": steps, "example_inputs": images()[0][:1], "evidence": evidence}
    return kind(model, **known | budget | settings)


def descend(model: nn.Module, pruner: Any, steps: int = STEPS, *, targets: Tensor | None = None, **settings: Any) -> None:
    """Trains with a pruner, as `microglia.methods.PrunerProtocol` shows it; settings are those of SGD."""
    settings = {"lr": 0.05, "momentum": 0.9} | settings
    optimizers = [torch.optim.SGD(pruner.weights_to_train(), **settings), *pruner.optimizers()]
    x, y = images()
    model.train()
    for _ in range(steps):
        loss = functional.cross_entropy(model(x), y if targets is None else targets) + pruner.penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step(optimizers[0])
