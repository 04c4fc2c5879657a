"""The steps of a chain of block convolutions, in the form of ``block_chain``: flat tensors and one list of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from microglia.runtime.sparse_layers.layout import STRIPE, Places

Pair = tuple[int, int]


class Step(NamedTuple):
    """One convolution, in the order in which the compiled kernels read its numbers.

    Attributes:
        outputs: Output channels.
        block_inputs: Inputs of a block, 1 to 8.
        blocks: Number of blocks.
        has_bias: Whether (outputs,) elements of the flat bias belong to it.
        input: Number of the value that is read: first the given images, then the result of each step.
        residual: Number of the value that is added; -1 for none.
        goes_out: Whether the result is returned, not only read by later steps.
    """

    outputs: int
    kernel_height: int
    kernel_width: int
    stride_height: int
    stride_width: int
    padding_height: int
    padding_width: int
    dilation_height: int
    dilation_width: int
    activation: int
    block_inputs: int
    blocks: int
    has_bias: int
    input: int
    residual: int
    goes_out: int

    @property
    def kernel(self) -> Pair:
        """Height and width."""
        return self.kernel_height, self.kernel_width

    @property
    def geometry(self) -> tuple[Pair, Pair, Pair, Pair]:
        """Kernel, stride, padding and dilation."""
        stride, padding = (self.stride_height, self.stride_width), (self.padding_height, self.padding_width)
        return self.kernel, stride, padding, (self.dilation_height, self.dilation_width)


class Weights(NamedTuple):
    """The concatenated weights of all steps; see `Places`. ``tap`` is 0 if a kernel has one position."""

    values: Tensor
    row_pointer: Tensor
    channel: Tensor
    tap: Tensor
    bias: Tensor


def steps_of(program: Sequence[int]) -> list[Step]:
    """Returns the steps that a list of numbers encodes."""
    size = len(Step._fields)
    return [Step(*program[first : first + size]) for first in range(0, len(program), size)]


def split(weights: Weights, steps: Sequence[Step]) -> Iterator[tuple[Step, Places, Tensor | None]]:
    """Yields each step with its blocks and bias, views of the flat tensors."""
    counts = (
        [step.blocks * step.block_inputs * STRIPE for step in steps],
        [-(-step.outputs // STRIPE) + 1 for step in steps],
        [step.blocks for step in steps],
        [step.blocks for step in steps],
        [step.outputs * step.has_bias for step in steps],
    )
    parts = [torch.split(flat, sizes) for flat, sizes in zip(weights, counts, strict=True)]
    for step, values, row_pointer, channel, tap, bias in zip(steps, *parts, strict=True):
        one_tap = step.kernel == (1, 1)
        blocks = values.view(step.blocks, step.block_inputs, STRIPE)
        yield step, Places(blocks, row_pointer, channel, None if one_tap else tap), bias if step.has_bias else None
