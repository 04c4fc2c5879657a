"""The memory that a run will need, known before it starts: measured on two tiny batches and counted from there.

The activations that a training keeps for its backward pass are linear in the batch: two small forward passes give those of any
batch. Gradients and optimizer states are counted, and a method says what it holds beside them
(`microglia.methods.config.MethodConfig.own_bytes`). The data in memory and the libraries themselves are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from microglia.core.batch import to_device
from microglia.core.devices import device_of
from microglia.core.layers import prunable_layers
from microglia.core.masks import mask
from microglia.core.running import undisturbed
from microglia.tasks.task import Task
from microglia.train.optim import FitConfig, make_optimizers
from microglia.train.step import objective

SMALL = 2, 4
"""Examples of the two batches from which activations are counted."""
EVALUATED = 256
"""Examples of a forward pass of an evaluation."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a run holds at the same time, at most.

    Attributes:
        weights: Parameters and buffers of the model; of its teacher and moving average too.
        masks: One byte for each prunable weight.
        gradients: Gradients of all parameters; 0 without a training.
        optimizer: States of the optimizer.
        activations: Values that the largest training keeps for its backward pass.
        evaluation: Largest values of a forward pass without one.
        method: All that the method holds beside these, while it chooses.
        available: Free memory of the device now; None if it is not known.
    """

    weights: int
    masks: int
    gradients: int
    optimizer: int
    activations: int
    evaluation: int
    method: int
    available: int | None

    @property
    def training(self) -> int:
        """Bytes of the training alone, beside weights and masks."""
        return self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        """Bytes of the run: a method that masks chooses within the training, whose states stay meanwhile."""
        held = self.weights + self.masks + self.gradients + self.optimizer
        return held + max(self.activations + self.method, self.evaluation)

    @property
    def fits(self) -> bool:
        """Whether it is less than the free memory, or this is not known."""
        return self.available is None or self.total < self.available

    def to_dict(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {**asdict(self), "total": self.total, "fits": self.fits}


def need_of(model: nn.Module, task: Task, trainings: list[FitConfig], *, method: int = 0) -> MemoryNeed:
    """Returns the memory of trainings of a model, one after the other.

    Args:
        model: The model; it gets masks of ones.
        task: Data and loss.
        trainings: How to train.
        method: Bytes of the method's own.
    """
    own = sum(_bytes(t) for t in (*model.parameters(), *model.buffers()))
    parameters = sum(_bytes(p) for p in model.parameters())
    copies = 1 + any(one.ema is not None for one in trainings) + any(one.distill > 0 for one in trainings)
    layers = prunable_layers(model)
    masks = sum(layer.raw.numel() for layer in layers.values())
    mask(model, {name: torch.ones_like(layer.raw, dtype=torch.bool) for name, layer in layers.items()})
    kept, largest = _passes(model, task)
    most = max((one.batch_size for one in trainings), default=0)
    return MemoryNeed(
        weights=own * copies,
        masks=masks,
        gradients=parameters if trainings else 0,
        optimizer=max((parameters * _states(one) for one in trainings), default=0),
        activations=_extended(kept, most) if trainings else 0,
        evaluation=_extended(largest, EVALUATED),
        method=method,
        available=_free(device_of(model)),
    )


def _passes(model: nn.Module, task: Task) -> tuple[list[int], list[int]]:
    """Returns for each small batch the bytes that autograd keeps, and the largest inputs with outputs of one layer."""
    kept, largest = [], []
    loss, device = objective(task), device_of(model)
    with undisturbed():
        for count in SMALL:
            batch = next(iter(task.data.batches("train", count, shuffle=True, augment=True).epoch(0)))
            inputs, targets = (to_device(part, device) for part in batch)
            kept.append(_kept(model, task, loss, inputs, targets))
            largest.append(_largest(model, task, inputs))
    return kept, largest


def _kept(model: nn.Module, task: Task, loss: Any, inputs: Any, targets: Any) -> int:
    """Returns the bytes that one forward pass keeps for its backward pass, with the batch, without the model's own."""
    own = {_place(t) for t in (*model.parameters(), *model.buffers())}
    saved = {_place(t): t.untyped_storage().nbytes() for t in pytree.tree_leaves((inputs, targets)) if isinstance(t, Tensor)}

    def note(tensor: Tensor) -> Tensor:
        saved[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    was = model.training
    state = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            value = loss(task.forward(model.train(), inputs), targets, inputs)  # it holds the graph while this is counted
            found = sum(size for place, size in saved.items() if place not in own)
    finally:
        model.train(was)
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    del value
    return found


@torch.no_grad()
def _largest(model: nn.Module, task: Task, inputs: Any) -> int:
    """Returns the bytes of the largest inputs and outputs of one layer."""
    found = [0]

    def note(module: nn.Module, args: Any, outputs: Any) -> None:
        found[0] = max(found[0], sum(_bytes(t) for t in pytree.tree_leaves((args, outputs)) if isinstance(t, Tensor)))

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    was = model.training
    try:
        task.forward(model.eval(), inputs)
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    return found[0]


def _extended(measured: list[int], count: int) -> int:
    """Returns the value at ``count`` examples on the line through two small batches."""
    (first, second), (low, high) = SMALL, measured
    slope = max(0.0, (high - low) / (second - first))
    return round(max(0.0, low - slope * first) + slope * count)


def _states(config: FitConfig) -> int:
    """Returns how many numbers the optimizer holds for each parameter, from a step on a single one."""
    probe = nn.Parameter(torch.zeros(2))
    (optimizer,) = make_optimizers(config, [{"params": [probe]}])
    probe.grad = torch.ones(2)
    optimizer.step()
    return sum(isinstance(value, Tensor) and value.shape == probe.shape for value in optimizer.state[probe].values())


def _free(device: torch.device) -> int | None:
    """Returns the free bytes of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    described = Path("/proc/meminfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    found: Mapping[str, str] = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(found["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in found else None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
