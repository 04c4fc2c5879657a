"""Quantization-aware recovery: training with weights and inputs of layers rounded to 8 bits, straight through.

The forward pass sees the rounding that int8 brings, and the backward pass ignores it (the straight-through estimator; Jacob et
al. 2018, `arXiv:1712.05877 <https://arxiv.org/abs/1712.05877>`_). The model stays in float32 and keeps its structure: it is
quantized afterwards like any other. Weights are rounded as NNCF does it with its remedy for processors without VNNI:
symmetric, for each output, to half of the range; inputs are rounded for each tensor, with a moving range.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.errors import TrainingError
from microglia.storage.run import Progress
from microglia.tasks.task import Task
from microglia.train.fit import Row, fit
from microglia.train.optim import FitConfig

HALF_RANGE = 63
"""Largest rounded weight: sums of products with 8-bit inputs then fit into 16 bits."""
LEVELS = 255
"""Largest rounded input."""
MOMENTUM = 0.1
"""Share of a new batch in the moving range of inputs."""
RANGES = "microglia_ranges"
"""Name of the part that holds a layer's ranges while it is rounded."""
EPOCH = 50
"""Steps between two states from which an interrupted recovery resumes."""
Layer = nn.Conv2d | nn.Conv1d | nn.Linear


class Ranges(nn.Module):
    """The moving range of the inputs of a layer, which rounds them.

    Attributes:
        low: Smallest input, at most 0.
        high: Largest input, at least 0.
        seen: Whether a batch has set both.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        for name in ("low", "high", "seen"):
            self.register_buffer(name, torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the inputs rounded to 8 bits; in training mode the range moves first."""
        if self.training:
            self._move(x.detach())
        scale = ((self.high - self.low) / LEVELS).clamp(min=1e-8)
        zero = (-self.low / scale).round().clamp(0, LEVELS).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, LEVELS)

    def _move(self, x: Tensor) -> None:
        share = torch.where(self.seen > 0, MOMENTUM, 1.0)
        self.low.lerp_(x.amin().float().clamp(max=0), share)
        self.high.lerp_(x.amax().float().clamp(min=0), share)
        self.seen.fill_(1)


def rounded_weight(weight: Tensor) -> Tensor:
    """Returns a weight rounded for each output, symmetrically; its gradient is that of the weight itself."""
    scale = (weight.detach().abs().flatten(1).amax(1) / HALF_RANGE).clamp(min=1e-8).float()
    return torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros_like(scale), 0, -HALF_RANGE, HALF_RANGE)


@contextmanager
def rounding(model: nn.Module) -> Iterator[int]:
    """Rounds weights and inputs of all convolutions and linear layers while the context lasts; yields their number.

    The model is changed in place and is as it was at the end, but for trained weights. Masks stay.

    Raises:
        TrainingError: It has no such layer, for example because its layers are operators of a graph.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    if not layers:
        raise TrainingError(
            f"{type(model).__name__} has no convolution or linear layer of its own to round: a graph calls operators. Recover "
            "the model before it becomes a graph, or export it without recovery."
        )
    try:
        for layer in layers:
            layer.add_module(RANGES, Ranges(layer.weight.device).train(layer.training))
            forward = _linear if isinstance(layer, nn.Linear) else _convolved
            layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign,assignment]
        yield len(layers)
    finally:
        for layer in layers:
            layer._modules.pop(RANGES, None)
            vars(layer).pop("forward", None)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(getattr(layer, RANGES)(x), rounded_weight(layer.weight), layer.bias)


def _convolved(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = layer._conv_forward(getattr(layer, RANGES)(x), rounded_weight(layer.weight), layer.bias)
    return out


def rounded_config(task: Task, steps: int, *, batch_size: int = 128, lr: float = 0.005, distill: float = 0.5) -> FitConfig:
    """Returns the usual training of a recovery: a low rate, and the model itself as the teacher.

    Args:
        task: Its training split limits the steps between two saved states.
        steps: Steps of the training; a few more where they do not divide.
        batch_size: Examples of a step.
        lr: Peak learning rate.
        distill: Weight of the teacher.

    Raises:
        TrainingError: There is no step.
    """
    if steps < 1:
        raise TrainingError(f"A recovery takes 1 step or more; got {steps}.")
    epochs = -(-steps // min(EPOCH, len(task.data.batches("train", batch_size))))
    return FitConfig(epochs=epochs, max_batches=-(-steps // epochs), batch_size=batch_size, lr=lr, distill=distill)


def fit_rounded(
    model: nn.Module,
    task: Task,
    config: FitConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Trains a model in place so that it loses less in int8, and returns one row per epoch, with metrics of the rounded model.

    It is `microglia.train.fit.fit` on rounded layers, resumed from ``progress`` with the same bits.

    Args:
        model: Trained, dense or masked or shrunk.
        task: Data, loss and metrics.
        config: How to train; `rounded_config` is the usual one.
        seed: Root of the randomness.
        device: See `microglia.train.engine.accelerator`.
        teacher: Model to distil from if ``config.distill`` > 0, such as a copy of the model.
        progress: State to resume an interrupted training from.

    Raises:
        TrainingError: See `rounding` and `microglia.train.fit.fit`.
    """
    with rounding(model):
        return fit(model, task, config, seed=seed, device=device, teacher=teacher, progress=progress, title="rounded training")
