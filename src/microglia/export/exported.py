"""An exported file in its engine: it is called with the model's arguments and returns torch tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import tensors_of
from microglia.core.errors import ExportError

Run = Callable[[list[Tensor]], list[Tensor]]
"""One forward pass of an engine: input tensors in the file's order -> output tensors, each with memory of its own."""


class Exported(nn.Module):
    """An exported model in its engine, on the CPU; a module without parameters, so that `microglia.evaluate` takes it.

    Args:
        run: The engine's forward pass.
        inputs: Names of the file's inputs, in order.
        engine: Name of the engine, such as "ONNX Runtime 1.32.0".

    Attributes:
        structure: Makes the model's own outputs from the list of tensors; None for one tensor, or a tuple of several.
    """

    def __init__(self, run: Run, inputs: Sequence[str], engine: str) -> None:
        super().__init__()
        self.run, self.inputs, self.engine = run, tuple(inputs), engine
        self.structure: Callable[[list[Tensor]], Any] | None = None
        self.training = False

    def train(self, mode: bool = True) -> Exported:
        """Stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the outputs.

        Args:
            args: The model's arguments; their tensors are passed to the engine in order.
            kwargs: Arguments by name; an argument with the name of an input of the file goes to that input.
        """
        outputs = self.run(arranged(self.inputs, args, kwargs))
        if self.structure is not None:
            return self.structure(outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def arranged(inputs: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors of a call in the order of a file's inputs.

    Raises:
        ExportError: The number of tensors differs from that of the inputs.
    """
    named = {name: value for name, value in kwargs.items() if name in inputs and isinstance(value, Tensor)}
    rest = tensors_of((args, {name: value for name, value in kwargs.items() if name not in named}))
    if len(named) + len(rest) != len(inputs):
        raise ExportError(f"The file takes {len(inputs)} tensors ({', '.join(inputs)}); got {len(named) + len(rest)}.")
    following = iter(rest)
    return [named[name] if name in named else next(following) for name in inputs]
