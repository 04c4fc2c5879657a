"""Ranges of a model's values on given batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.fusion import Engine, fuse

EXAMPLES = 256
"""Maximum number of examples that calibrate and are compared; batches after them are not read."""
Ranges = dict[str, tuple[float, float]]
"""Name of a value in the graph -> the smallest and the largest number in it."""


def calibration_batches(calibration: Iterable[Any] | None, example: Example) -> list[Example]:
    """Returns batches as calls of the model, targets left out.

    Args:
        calibration: Batches of inputs, or of (inputs, targets) as a loader gives them; one tensor is one batch.
        example: The model's example inputs, which say how many arguments it takes.

    Raises:
        MicrogliaError: There is none; or one has another form than the example, or holds NaN or infinity.
    """
    if calibration is None:
        raise MicrogliaError(
            'precision="int8" needs batches of inputs that show the ranges of activations: give calibration=batches, such as a '
            "few batches of training images."
        )
    batches: list[Example] = []
    for batch in (calibration,) if isinstance(calibration, Tensor) else calibration:
        batches.append(_called(batch, example))
        if sum(found.batch for found in batches) >= EXAMPLES:
            break
    if not batches:
        raise MicrogliaError('precision="int8" was given no calibration batch; give one batch of inputs at least.')
    return batches


def _called(batch: Any, example: Example) -> Example:
    """Returns one batch as a call of the model."""
    if isinstance(batch, tuple | list) and batch and example.kwargs:
        batch = batch[0]
    elif isinstance(batch, tuple | list) and batch:
        several = len(example.args) > 1 and isinstance(batch[0], tuple | list)
        batch = tuple(batch[0] if several else batch[: len(example.args)])
    found = Example.of(batch)
    wanted, given = ([(t.shape[1:], t.dtype) for t in one.tensors] for one in (example, found))
    if wanted != given:
        raise MicrogliaError(
            f"A calibration batch holds {_described(found)}, but the example {_described(example)}: they may differ in the "
            "first dimension alone."
        )
    if not all(bool(t.isfinite().all()) for t in found.tensors if t.is_floating_point()):
        raise MicrogliaError("A calibration batch holds NaN or infinity; give batches of finite inputs.")
    return found


def _described(example: Example) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in example.tensors) or "no tensors"


def ranges_of(model: nn.Module, batches: Iterable[Example], engine: Engine) -> Ranges:
    """Returns the range of each value: the mean over the batches of its smallest and of its largest number.

    Args:
        model: A folded model in evaluation mode on the CPU; it stays unchanged.
        batches: Calls of the model.
        engine: Makes the modules of the layers, as for `fuse`.

    Raises:
        MicrogliaError: A value is not finite; or the model takes another way for one batch than for another.
    """
    graphs: dict[int, _Observer] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    for batch in batches:
        observer = graphs.get(batch.batch) or graphs.setdefault(batch.batch, _Observer(fuse(model, batch, engine)))
        for name, extremes in observer.of(batch).items():
            found.setdefault(name, []).append(extremes)
    if len({len(each) for each in found.values()}) != 1:
        raise MicrogliaError(
            "The model has another graph for one size of calibration batches than for another; give equal ones."
        )
    ranges = {name: tuple(sum(side) / len(each) for side in zip(*each, strict=True)) for name, each in found.items()}
    for name, (low, high) in ranges.items():
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise MicrogliaError(
                f"The value {name} of the model is NaN or infinite on a calibration batch; give other batches."
            )
    return {name: (low, high) for name, (low, high) in ranges.items()}


class _Observer(Interpreter):
    """Runs a graph and notes the smallest and largest number of each of its values in float32."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.extremes: dict[str, tuple[float, float]] = {}

    def of(self, batch: Example) -> dict[str, tuple[float, float]]:
        """Returns the extremes of each value for one batch."""
        self.extremes = {}
        given = batch.copied()
        self.run(*tree_leaves((given.args, given.kwargs)))
        return self.extremes

    def run_node(self, n: Node) -> Any:
        """Runs one node."""
        out = super().run_node(n)
        if isinstance(out, Tensor) and out.dtype == torch.float32 and out.numel():
            low, high = out.aminmax()
            self.extremes[n.name] = float(low), float(high)
        return out
