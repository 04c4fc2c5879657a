"""Consecutive steps in 8 bits as one operator: a call from Python takes longer than many a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from microglia.runtime.int8.layers import Dequantize, Int8Layer, Pool8, Quantize, linear
from microglia.runtime.segments import Part, joined

TENSORS = ("values", "row_pointer", "channel", "tap", "start", "scale", "bias")
"""The tensors of a layer, in the order of its buffers and of the operator's arguments."""
Numbers = tuple[float, float, float]


class Step(NamedTuple):
    """One step, in the order in which the compiled kernels read its numbers.

    Attributes:
        kind: 0 a convolution, 1 a linear layer, 2 pooling, 3 rounding to 8 bits, 4 its return to float32.
        input: Number of the value that is read: first the given tensors, then the result of each step.
        residual: Number of the value that is added; -1 for none.
        goes_out: Whether the result is returned, not only read by later steps.
        given: Bit i says whether the layer has the i-th of `TENSORS`.
        wide: Whether the result is float32, not uint8.
        zero: The input's value that stands for 0.
        outputs: Output channels or features.
    """

    kind: int
    input: int
    residual: int = -1
    goes_out: int = 0
    given: int = 0
    wide: int = 0
    zero: int = 0
    outputs: int = 0
    kernel_height: int = 1
    kernel_width: int = 1
    stride_height: int = 1
    stride_width: int = 1
    padding_height: int = 0
    padding_width: int = 0
    dilation_height: int = 1
    dilation_width: int = 1

    @property
    def geometry(self) -> list[list[int]]:
        """Kernel, stride, padding and dilation."""
        return [list(self[first : first + 2]) for first in range(8, 16, 2)]


# ------------------------------------------------------------------------------------- a module as a step, a step as a call
def _of_layer(module: nn.Module) -> tuple[dict[str, int], Numbers]:
    assert isinstance(module, Int8Layer)
    given = sum(1 << TENSORS.index(name) for name, _ in module.named_buffers())
    settings = {"given": given, "wide": int(module.wide), "zero": module.zero, "outputs": module.outputs}
    return {"kind": int(module.linear), **settings, **_sides(module.geometry)}, (module.other, *module.bounds)


def _of_pooling(module: nn.Module) -> tuple[dict[str, int], Numbers]:
    assert isinstance(module, Pool8)
    return {"kind": 2, **_sides(module.geometry)}, (0.0, 0.0, 0.0)


def _of_conversion(module: nn.Module) -> tuple[dict[str, int], Numbers]:
    assert isinstance(module, Quantize)
    unit, zero = module.scale
    back = isinstance(module, Dequantize)
    return {"kind": 3 + back}, (unit if back else 1 / unit, float(zero), 0.0)


def _sides(geometry: Sequence[Sequence[int]]) -> dict[str, int]:
    return dict(zip(Step._fields[8:], (side for pair in geometry for side in pair), strict=False))


OF: dict[type[nn.Module], Callable[[nn.Module], tuple[dict[str, int], Numbers]]] = {
    Int8Layer: _of_layer,
    Pool8: _of_pooling,
    Quantize: _of_conversion,
    Dequantize: _of_conversion,
}
"""Type of a module -> what is in its step beside the values, and its numbers."""


def _run(inputs: list[Tensor], tensors: list[Tensor], steps: list[int], numbers: list[float]) -> list[Tensor]:
    """Runs the steps one after the other, each by its own operator; on tensors without data it gives their shapes."""
    ops, size, left = torch.ops.microglia, len(Step._fields), iter(tensors)
    values, out = list(inputs), []
    for at in range(len(steps) // size):
        step, own = Step(*steps[at * size : (at + 1) * size]), numbers[3 * at : 3 * at + 3]
        x, residual = values[step.input], None if step.residual < 0 else values[step.residual]
        if step.kind < 2:
            given = [next(left) if step.given >> bit & 1 else None for bit in range(len(TENSORS))]
            rest = (*own, step.zero, bool(step.wide), step.outputs, *step.geometry)
            values.append((linear if step.kind else ops.int8_conv2d)(x, *given, residual, *rest))
        elif step.kind == 2:
            values.append(ops.int8_max_pool2d(x, *step.geometry[:3]))
        else:
            values.append(ops.quantize(x, *own[:2]) if step.kind == 3 else x.float().sub_(own[1]).mul_(own[0]))
        if step.goes_out:
            out.append(values[-1])
    return out


_library = torch.library.Library("microglia", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("int8_program(Tensor[] inputs, Tensor[] tensors, int[] steps, float[] numbers) -> Tensor[]")  # type: ignore[no-untyped-call]
_library.impl("int8_program", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("microglia::int8_program", _run, lib=_library)


# -------------------------------------------------------------------------------------------------------------- the module
class Program(nn.Module):
    """Consecutive modules in 8 bits in one call of the kernels, which gives the bits of one after the other.

    A result is freed after the last step that reads it.

    Args:
        parts: Its modules, whose types are in `OF`, in order.
        inputs: Number of tensors of a call.
    """

    def __init__(self, parts: Sequence[Part], inputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part.module for part in parts)
        self.inputs = inputs
        self.steps: list[int] = []
        self.numbers: list[float] = []
        for module, (first, *rest), goes_out in parts:
            settings, numbers = OF[type(module)](module)
            self.steps += Step(input=first, residual=rest[0] if rest else -1, goes_out=int(goes_out), **settings)
            self.numbers += numbers

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Returns the results that go out."""
        # Read anew at each call, so that tensors may be replaced; one by one by name they would take longer than the kernels.
        tensors = [tensor for part in self.parts for tensor in part._buffers.values() if tensor is not None]
        out: list[Tensor] = torch.ops.microglia.int8_program(inputs, tensors, self.steps, self.numbers)
        return out


def programmed(graph: GraphModule) -> GraphModule:
    """Joins consecutive steps in 8 bits of a graph into programs, in place, and returns the graph."""
    return joined(graph, "program", lambda module: type(module) in OF, Program)
