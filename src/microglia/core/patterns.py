"""Patterns: the smallest part of a weight that is kept or removed as a whole.

A pattern sees a weight of shape (out, in, *kernel) as a matrix of *units*. It is two pure tensor functions: `reduce` maps a
tensor of the weight's shape to one value per unit; `expand` maps one value per unit back. The columns of a row of the unit
matrix compete under the scope ``row``: the row is an output unit for single weights, a stripe of output units for blocks, the m
neighbours for N:M, the whole layer for channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from microglia.core.errors import PatternError

Reduction = Literal["mean", "sum", "max", "l2"]
Shape = Sequence[int]


@runtime_checkable
class Pattern(Protocol):
    """The interface of every pattern; shapes are those of the weight, (out, in, *kernel)."""

    @property
    def fixed_density(self) -> float | None:
        """The density the pattern itself prescribes (N:M), or None where a budget decides."""
        ...

    @property
    def footprint(self) -> tuple[int, int]:
        """The least (outputs, inputs) of a layer in which a whole unit fits."""
        ...

    def reduce(self, values: Tensor, how: Reduction = "mean") -> Tensor:
        """Returns one value per unit, (rows, columns), from one value per weight."""
        ...

    def expand(self, units: Tensor, shape: Shape) -> Tensor:
        """Returns one value per weight, of ``shape``, from one value per unit."""
        ...

    def sizes(self, shape: Shape) -> Tensor:
        """Returns how many weights each unit holds, int64 (rows, columns); 0 marks padding."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Every weight is a unit; units form (out, in * kernel)."""

    @property
    def fixed_density(self) -> None:
        """A budget decides."""
        return None

    @property
    def footprint(self) -> tuple[int, int]:
        """The least (outputs, inputs) of a layer in which a whole unit fits."""
        return 1, 1

    def reduce(self, values: Tensor, how: Reduction = "mean") -> Tensor:
        """Returns the values as a matrix (out, in * kernel); l2 and max of one value are its absolute value and itself."""
        return values.flatten(1).abs() if how == "l2" else values.flatten(1)

    def expand(self, units: Tensor, shape: Shape) -> Tensor:
        """Returns the matrix in the weight's shape."""
        return units.reshape(tuple(shape))

    def sizes(self, shape: Shape) -> Tensor:
        """Returns ones (a broadcast view: no memory)."""
        return torch.ones((), dtype=torch.int64).expand(shape[0], math.prod(shape[1:]))

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block:
    """Blocks of ``out`` output by ``in_`` input channels at one kernel position, such as 16x8 or the vector 16x1.

    Units form (ceil(O / out), ceil(I / in_) * kernel). Where a shape does not divide, the blocks at the edge are smaller
    and count by what they hold. 16x8x1x1 is the pattern of SMART (arXiv 2403.19969).
    """

    out: int
    in_: int

    def __post_init__(self) -> None:
        if self.out < 1 or self.in_ < 1:
            raise PatternError(f"A block needs positive sides, as in 'block:16x8'; got {self.out}x{self.in_}.")

    @property
    def fixed_density(self) -> None:
        """A budget decides."""
        return None

    @property
    def footprint(self) -> tuple[int, int]:
        """The least (outputs, inputs) of a layer in which a whole unit fits."""
        return self.out, self.in_

    def reduce(self, values: Tensor, how: Reduction = "mean") -> Tensor:
        """Returns the reduction over each block; the mean is over the weights that the block really holds."""
        total = _reduce(self._blocks(values, -math.inf if how == "max" else 0.0), (1, 3), how)
        if how == "mean":
            total = total / self.sizes(values.shape).to(total.device).view_as(total)
        return total.flatten(1)

    def expand(self, units: Tensor, shape: Shape) -> Tensor:
        """Returns each block's value at all of its weights."""
        out, in_, kernel = _matrix_shape(shape)
        grid = units.reshape(-(-out // self.out), -(-in_ // self.in_), kernel)
        grid = grid.repeat_interleave(self.out, 0)[:out].repeat_interleave(self.in_, 1)[:, :in_]
        return grid.reshape(tuple(shape))

    def sizes(self, shape: Shape) -> Tensor:
        """Returns the number of weights in each block; edge blocks hold fewer."""
        out, in_, kernel = _matrix_shape(shape)
        rows = _edge_sizes(out, self.out)
        columns = _edge_sizes(in_, self.in_)
        return (rows[:, None] * columns).repeat_interleave(kernel, 1)

    def _blocks(self, values: Tensor, fill: float) -> Tensor:
        out, in_, kernel = _matrix_shape(values.shape)
        pad = (0, 0, 0, -in_ % self.in_, 0, -out % self.out)
        grid = functional.pad(values.reshape(out, in_, kernel), pad, value=fill)
        return grid.reshape(grid.shape[0] // self.out, self.out, grid.shape[1] // self.in_, self.in_, kernel)

    def __str__(self) -> str:
        return f"block:{self.out}x{self.in_}"


@dataclass(frozen=True)
class NM:
    """At most ``n`` of every ``m`` neighbours along the input dimension are kept, such as 2:4.

    Units are single weights in rows of m: (out * kernel * ceil(I / m), m). Where m does not divide the input width the
    last row is shorter (its padding units hold 0 weights) and keeps min(n, its length), so the layout stays N:M.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise PatternError(f"N:M keeps n of every m with 1 <= n <= m, as in 'nm:2:4'; got {self.n}:{self.m}.")

    @property
    def fixed_density(self) -> float:
        """N / m: the pattern itself is the budget."""
        return self.n / self.m

    @property
    def footprint(self) -> tuple[int, int]:
        """The least (outputs, inputs) of a layer in which a whole unit fits."""
        return 1, self.m

    def reduce(self, values: Tensor, how: Reduction = "mean") -> Tensor:
        """Returns the values in rows of m; padding units are 0."""
        out, in_, kernel = _matrix_shape(values.shape)
        rows = functional.pad(values.reshape(out, in_, kernel).transpose(1, 2), (0, -in_ % self.m))
        rows = rows.reshape(-1, self.m)
        return rows.abs() if how == "l2" else rows

    def expand(self, units: Tensor, shape: Shape) -> Tensor:
        """Returns the rows of m in the weight's shape, padding dropped."""
        out, in_, kernel = _matrix_shape(shape)
        return units.reshape(out, kernel, -1)[..., :in_].transpose(1, 2).reshape(tuple(shape))

    def sizes(self, shape: Shape) -> Tensor:
        """Returns 1 for a weight, 0 for padding."""
        return self.reduce(torch.ones(tuple(shape), dtype=torch.int64))

    def __str__(self) -> str:
        return f"nm:{self.n}:{self.m}"


@dataclass(frozen=True)
class Channel:
    """A whole output channel (filter, row) is a unit; units form (1, out), so one row is the layer."""

    @property
    def fixed_density(self) -> None:
        """A budget decides."""
        return None

    @property
    def footprint(self) -> tuple[int, int]:
        """The least (outputs, inputs) of a layer in which a whole unit fits."""
        return 1, 1

    def reduce(self, values: Tensor, how: Reduction = "mean") -> Tensor:
        """Returns the reduction over each output channel."""
        reduced = _reduce(values.flatten(1), (1,), how)
        return (reduced / values[0].numel() if how == "mean" else reduced)[None]

    def expand(self, units: Tensor, shape: Shape) -> Tensor:
        """Returns each channel's value at all of its weights."""
        return units.reshape(-1, *[1] * (len(shape) - 1)).expand(tuple(shape)).contiguous()

    def sizes(self, shape: Shape) -> Tensor:
        """Returns the number of weights of a channel, the same for all."""
        return torch.tensor(math.prod(shape[1:])).expand(1, shape[0])

    def __str__(self) -> str:
        return "channel"


PATTERN_FORMS = ("unstructured", "block:OUTxIN", "nm:N:M", "channel")


def parse_pattern(text: str | Pattern) -> Pattern:
    """Returns the pattern a text names, for the command line and YAML; a pattern passes through.

    Example:
        >>> parse_pattern("block:16x8")
        Block(out=16, in_=8)
        >>> str(parse_pattern("nm:2:4"))
        'nm:2:4'
    """
    if isinstance(text, Pattern):
        return text
    if text == "unstructured":
        return Unstructured()
    if text == "channel":
        return Channel()
    if match := re.fullmatch(r"block:(\d+)x(\d+)", str(text)):
        return Block(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"nm:(\d+):(\d+)", str(text)):
        return NM(int(match[1]), int(match[2]))
    raise PatternError(f"The pattern {text!r} is none of {', '.join(PATTERN_FORMS)} (such as block:16x8 or nm:2:4).")


def _matrix_shape(shape: Shape) -> tuple[int, int, int]:
    """Returns (out, in, kernel positions) of a weight's shape."""
    return shape[0], shape[1], math.prod(shape[2:])


def _edge_sizes(length: int, side: int) -> Tensor:
    """Returns how much of ``length`` falls to each of its ceil(length / side) pieces."""
    return torch.arange(0, length, side).neg().add(length).clamp(max=side)


def _reduce(values: Tensor, dims: tuple[int, ...], how: Reduction) -> Tensor:
    """Returns sum, max or l2 over ``dims``; the mean's division is left to the caller, who knows the true size."""
    if how == "max":
        return values.amax(dims)
    if how == "l2":
        return values.square().sum(dims).sqrt()
    if how in ("sum", "mean"):
        return values.sum(dims)
    raise PatternError(f"The reduction {how!r} is none of mean, sum, max, l2.")
