"""Bits of each layer for a budget of file bytes: the error of each choice, and the choices with the lowest total error.

The algorithm: each layer is rounded with 1 to 8 bits, which gives pairs (bytes, error). The total error under one number of
bytes is minimal where all layers have the same slope -d error / d bytes (Lagrange; Shoham and Gersho 1988). The corners of each
layer's lower convex envelope are taken in the order of their slopes while they fit. Bytes that are left then buy single steps.

The error of a rounded weight is its squared change, or the second-order change of the loss: h (q - w)^2 / 2. The score `fisher`
gives h. The model of the loss is that of Hassibi and Stork 1992.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from microglia.compress.codebook import BITS, Initial, looked_up, share_groups
from microglia.compress.grouped import stored_bytes
from microglia.compress.tensors import FLOATS
from microglia.core.errors import BudgetError
from microglia.core.layers import Layer
from microglia.scores import Evidence, scores

SCORE = "fisher"
"""Score whose values are w^2 h / 2: the change of the loss where a weight goes."""
SLACK = 12
"""Bytes by which the stored form of a tensor may grow while its values are trained: digits of its check, compressed."""


@dataclass(frozen=True)
class Choice:
    """One layer rounded with one number of bits.

    Attributes:
        bits: Bits of a code.
        bytes: Bytes of the layer in the file, to within the padding.
        error: Its error.
    """

    bits: int
    bytes: int
    error: float


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded; see `microglia.compress.codebook.share_groups`."""

    initial: Initial = "linear"
    exact: bool = False
    seed: int = 0
    groups: int = 1


@torch.no_grad()
def choices(
    layers: Mapping[str, Layer],
    masks: Mapping[str, Tensor],
    *,
    saliency: Mapping[str, Tensor] | None = None,
    rounding: Rounding | None = None,
) -> dict[str, list[Choice]]:
    """Returns the choices of every layer that a file can code, bits ascending.

    Args:
        layers: Layers by name.
        masks: Masks by name; layers without one keep all their weights but zeros.
        saliency: w^2 h / 2 of each weight, by name. None counts squared changes, with h = 2 for all weights.
        rounding: How weights are rounded.
    """
    how, found = rounding or Rounding(), dict[str, list[Choice]]()
    for name, layer in layers.items():
        if layer.weight.dtype not in FLOATS:
            continue
        weight = layer.weight.detach().cpu()
        mask = masks[name].cpu() if name in masks else None
        rows = []
        for bits in range(BITS[0], BITS[1] + 1):
            codes, table = share_groups(weight, bits, how.groups, initial=how.initial, exact=how.exact, seed=how.seed)
            rounded = looked_up(codes, table)
            change = (rounded - weight).double()
            if saliency is None:
                error = change.square().sum()
            else:
                relative = torch.where(weight == 0, 0.0, change / weight.double())
                error = (saliency[name].cpu().double() * relative.square()).sum()
            rows.append(Choice(bits, stored_bytes(rounded, mask), float(error)))
        found[name] = rows
    return found


def second_order(model: torch.nn.Module, layers: Mapping[str, Layer], evidence: Evidence) -> dict[str, Tensor]:
    """Returns w^2 h / 2 of each weight, h the diagonal of the empirical Fisher matrix; errors as in the score `fisher`."""
    return scores[SCORE](model, layers, evidence)


def allot(curves: Mapping[str, Sequence[Choice]], room: int) -> dict[str, int] | None:
    """Returns the bits of each layer with the lowest total error found, or None if even the smallest choices do not fit.

    Args:
        curves: Choices by layer.
        room: Bytes that all layers may take together.
    """
    chosen = {name: min(rows, key=lambda row: (row.bytes, row.error)) for name, rows in curves.items()}
    spent = sum(choice.bytes for choice in chosen.values())
    if spent > room:
        return None
    steps = [
        (-(after.error - before.error) / (after.bytes - before.bytes), name, after)
        for name, rows in curves.items()
        for before, after in _pieces(rows)
    ]
    stopped: set[str] = set()
    for _, name, after in sorted(
        steps, key=lambda step: -step[0]
    ):  # envelopes are convex: a layer's own steps keep their order
        more = after.bytes - chosen[name].bytes
        if name in stopped or spent + more > room:
            stopped.add(name)
            continue
        chosen[name], spent = after, spent + more
    return {name: choice.bits for name, choice in _filled(curves, chosen, room - spent).items()}


def _pieces(rows: Sequence[Choice]) -> list[tuple[Choice, Choice]]:
    """Returns the pieces of the lower convex envelope of (bytes, error), bytes ascending and errors falling."""
    corners: list[Choice] = []
    for row in sorted(rows, key=lambda row: (row.bytes, row.error)):
        if corners and (row.error >= corners[-1].error or row.bytes == corners[-1].bytes):
            continue
        while len(corners) > 1 and not _convex(corners[-2], corners[-1], row):
            corners.pop()
        corners.append(row)
    return list(pairwise(corners))


def _convex(first: Choice, middle: Choice, last: Choice) -> bool:
    across = (last.error - first.error) * (middle.bytes - first.bytes)
    return (middle.error - first.error) * (last.bytes - first.bytes) < across


def _filled(curves: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], left: int) -> dict[str, Choice]:
    """Returns the choices after single steps that fit into the bytes left, the largest fall of the error first."""
    while True:
        better = [
            (choice.error - chosen[name].error, choice.bytes, name, choice)
            for name, rows in curves.items()
            for choice in rows
            if choice.error < chosen[name].error and choice.bytes - chosen[name].bytes <= left
        ]
        if not better:
            return chosen
        *_, name, choice = min(better, key=lambda step: step[:3])
        left -= choice.bytes - chosen[name].bytes
        chosen = {**chosen, name: choice}


def fitting_bits(
    curves: Mapping[str, Sequence[Choice]], budget: int, size_of: Callable[[Mapping[str, int]], int], *, trained: bool = False
) -> dict[str, int]:
    """Returns the bits of each layer for a file of at most ``budget`` bytes.

    Args:
        curves: Choices by layer.
        budget: Bytes of the whole file.
        size_of: Bits by layer -> measured bytes of the whole file.
        trained: Whether the shared values are trained later, for which a few bytes stay free.

    Raises:
        BudgetError: Even the smallest choices give a larger file; or there is no layer to choose for.
    """
    if not curves:
        raise BudgetError("A budget of bytes chooses the bits of layers, and this model has no layer with weights to share.")
    smallest = {name: min(rows, key=lambda row: row.bytes) for name, rows in curves.items()}
    least = size_of({name: choice.bits for name, choice in smallest.items()})
    budget_ = budget - (SLACK * (len(curves) + 1) if trained else 0)
    room = budget_ - (least - sum(choice.bytes for choice in smallest.values()))
    while True:
        found = allot(curves, room)
        if found is None:
            raise BudgetError(
                f"A file of {budget:,} bytes is too small for these weights: with the fewest bits it has {least:,}. Keep fewer "
                "weights, or give more bytes."
            )
        over = size_of(found) - budget_
        if over <= 0:
            return found
        room = min(room - over, sum(row.bytes for n, b in found.items() for row in curves[n] if row.bits == b) - 1)
