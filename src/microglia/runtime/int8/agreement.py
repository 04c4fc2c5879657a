"""How far the outputs of a model in 8 bits are from those in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from microglia.core.batch import Example, take_examples, tensors_of
from microglia.core.running import run
from microglia.runtime.dense.kinds import Runner


@dataclass(frozen=True)
class Agreement:
    """Outputs in 8 bits beside those in float32, on the batches that calibrated.

    Attributes:
        examples: Examples compared.
        same: Fraction of them with the same class (index of the largest output); None where outputs are not (batch, classes).
        mean: Mean deviation of an output, as a fraction of the largest output in float32.
        largest: The largest deviation, likewise.
    """

    examples: int
    same: float | None
    mean: float
    largest: float

    def __str__(self) -> str:
        """Returns a sentence for a reader."""
        same = "" if self.same is None else f"the same class on {100 * self.same:.2f} % of {self.examples:,} examples; "
        return (
            f"Outputs in 8 bits beside float32, on the calibration batches: {same}deviation {100 * self.mean:.2g} % in the "
            f"mean, {100 * self.largest:.2g} % at most, of the largest output."
        )


def agreement_of(model: nn.Module, fast: Runner, batches: Sequence[Example], size: int) -> Agreement:
    """Compares the outputs of an execution with those of the model it was made of.

    Args:
        model: The model in float32.
        fast: Its execution for batches of one size.
        batches: Calls of the model, of any sizes; the last examples of each are repeated to fill a call of ``fast``.
        size: Number of examples of a call of ``fast``.
    """
    examples = same = numbers = 0
    total = largest = scale = 0.0
    classes = True
    for batch in batches:
        expected = tensors_of(run(model, batch.copied()))
        for begin in range(0, batch.batch, size):
            rows = torch.arange(begin, begin + size) % batch.batch
            given = Example(*take_examples((batch.args, batch.kwargs), rows))
            count = min(size, batch.batch - begin)
            got = tensors_of(fast(*given.args, **given.kwargs))
            for one, other in zip(expected, got, strict=True):
                wanted, found = one[rows[:count]].double(), other[:count].double()
                away = (wanted - found).abs()
                total, numbers = total + float(away.sum()), numbers + away.numel()
                largest, scale = max(largest, float(away.max())), max(scale, float(wanted.abs().max()))
            classes = classes and expected[0].ndim == 2
            same += int((expected[0][rows[:count]].argmax(1) == got[0][:count].argmax(1)).sum()) if classes else 0
            examples += count
    scale = scale or 1.0
    return Agreement(examples, same / examples if classes else None, total / numbers / scale, largest / scale)
