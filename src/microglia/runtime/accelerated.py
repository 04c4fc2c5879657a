"""The model that `microglia.runtime.accelerate` returns: one fast execution, and the dense model for everything else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.runtime.dense.kinds import Runner
from microglia.runtime.record import Record
from microglia.runtime.report import AccelerationReport


class Accelerated(nn.Module):
    """A model in the fastest execution found for inputs of one shape, for inference.

    Inputs of other shapes, or with other arguments beside the tensors, run in the plain dense model, with equal outputs. Inputs
    on the CPU with NaN or infinity also run there: oneDNN's fused ReLU turns NaN into 0, and sparse kernels skip inputs of
    pruned weights. The model stays in evaluation mode, and its weights are constant. `microglia.save` writes `dense` and the
    record of the chosen kernels.

    Attributes:
        fast: The chosen execution, called like the model.
        dense: The model with its masks folded in.
    """

    def __init__(self, fast: Runner, dense: nn.Module, example: Example) -> None:
        super().__init__()
        self.fast, self.dense = fast, dense
        self._signature = _signature(example.args, example.kwargs)
        self._report: AccelerationReport | None = None
        self._record: Record | str | None = None
        self._device = next((t.device.type for t in [*example.tensors, *dense.parameters()]), "cpu")
        self._like = torch.zeros(1) if (first := next(dense.parameters(), None)) is None else first.new_zeros(1)
        self.training = False

    def report(self) -> AccelerationReport:
        """Returns the choice, all times and the reason for each layer, and the times of the whole model."""
        assert self._report is not None
        return self._report

    def _chosen_by(self, report: AccelerationReport, record: Record | str | None) -> Self:
        """Returns the model, with the report and the record of its choice."""
        self._report, self._record = report, record
        return self

    def record(self) -> Record | str | None:
        """Returns what makes the model again without timing; or the reason why no file can hold it; None where none is kept."""
        return self._record

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Tells whether these inputs have the shapes and types of the example, so that the fast execution takes them."""
        return _signature(args, kwargs) == self._signature

    def train(self, mode: bool = True) -> Accelerated:
        """Stays in evaluation mode: to train, use the masked model, and accelerate it again."""
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses to load weights.

        Raises:
            MicrogliaError: Always.
        """
        raise MicrogliaError("An accelerated model keeps its weights: load them into the model, then accelerate it again.")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled: packed weights and compiled code are valid only in this process.

        Raises:
            MicrogliaError: Always.
        """
        raise MicrogliaError(
            "An accelerated model cannot be pickled: write it with microglia.save, read it with microglia.load, then "
            "accelerate it again where its kernels were not kept."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a copy with weights of its own."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Accelerated:
        probe, like = fn(self._like), self._like
        if (probe.dtype, probe.device) != (like.dtype, like.device):
            where = "the CPU" if like.device.type == "cpu" else str(like.device)
            kind = str(like.dtype).removeprefix("torch.")
            raise MicrogliaError(f"An accelerated model stays in {kind} on {where}: convert the model that it was made of.")
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's output.

        Raises:
            MicrogliaError: Autocast is on for the model's kind of device.
        """
        refuse_autocast(self._device)
        fits = self.takes(*args, **kwargs) and (self._device != "cpu" or _finite(args, kwargs))
        return (self.fast if fits else self.dense)(*args, **kwargs)


def refuse_autocast(kind: str) -> None:
    """Raises under autocast, because the kernels ignore it.

    Args:
        kind: Kind of the device, such as ``cpu``.

    Raises:
        MicrogliaError: Autocast is on for this kind of device.
    """
    if torch.is_autocast_enabled(kind):
        raise MicrogliaError(
            f"Autocast is on for {kind}, but an accelerated model has a precision of its own: call it outside of autocast, "
            'and ask for accelerate(model, inputs, precision="bf16") or convert the model before.'
        )


def _finite(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tells whether every input is finite, by its sum. A sum that overflows counts as not finite, which only costs time.

    Under a compiler, which cannot branch on a value, inputs count as finite.
    """
    if torch.compiler.is_compiling():
        return True
    alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)  # the usual case
    leaves = args if alone else tree_flatten((args, kwargs))[0]
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Returns a graph's signature: the structure of the arguments, shapes and types of tensors, and all other values."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):  # the usual case, at every call
        return tuple(args[0].shape), args[0].dtype, args[0].device
    leaves, structure = tree_flatten((args, kwargs))
    return structure, [(tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else (type(v), v) for v in leaves]
