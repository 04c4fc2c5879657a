"""Metrics: numbers over a data set, from a state that is merged over batches and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from microglia.core.errors import MicrogliaError

Better = Literal["higher", "lower"]
"""Direction of a metric: whether higher or lower values are better."""
Unit = Literal["%", ""]
"""Unit of a metric: ``%`` for a fraction in [0, 1] shown in per cent, or empty for the plain number."""


class AnyMetric(Protocol):
    """A metric of either kind, or the user's own; `microglia.train.evaluate.evaluate` needs only this interface."""

    @property
    def better(self) -> Better:
        """Direction: whether higher or lower values are better."""
        ...

    @property
    def unit(self) -> Unit:
        """Unit in which people read the metric."""
        ...

    def update(self, state: Any, predictions: Any, targets: Any) -> Any:
        """Returns the state after one more batch; the state before the first batch is None."""
        ...

    def over_ranks(self, state: Any) -> Any:
        """Returns the state of all ranks, the same on each of them; called on every rank."""
        ...

    def values(self, name: str, state: Any) -> dict[str, float]:
        """Returns the numbers by name; ``name``, the metric's name in its task, is one of them."""
        ...


@dataclass(frozen=True)
class Metric:
    """A number over a data set, computed from statistics that are summed over batches and ranks.

    Attributes:
        statistics: (predictions, targets) of a batch -> tensor to be summed.
        value: The sum -> the metric.
        better: Whether a higher or a lower value is better.
        unit: ``%`` for a fraction in [0, 1], shown in per cent; empty for another number.
    """

    statistics: Callable[[Any, Any], Tensor]
    value: Callable[[Tensor], float]
    better: Better = "higher"
    unit: Unit = "%"

    def update(self, state: Tensor | None, predictions: Any, targets: Any) -> Tensor:
        """Returns the sum of the statistics after one more batch."""
        statistics = self.statistics(predictions, targets)
        return statistics if state is None else state + statistics

    def over_ranks(self, state: Tensor) -> Tensor:
        """Returns the sum over all ranks."""
        torch.distributed.all_reduce(state)
        return state

    def values(self, name: str, state: Tensor) -> dict[str, float]:
        """Returns the metric under its name."""
        return {name: self.value(state)}


Record = Sequence[Tensor]
"""Record of one example in a gathered metric; the first tensor is the index of the example in its split."""


@dataclass(frozen=True)
class Gathered:
    """Numbers over a data set that need every example at once, such as average precision.

    The records of all batches and ranks are sorted by example. A duplicate example (the padding of a distributed sampler)
    counts once. So the values do not depend on batch size or ranks.

    Attributes:
        records: (predictions, targets) of a batch -> one record per example. A record is small tensors; the first is the
            example's index in its split, one integer.
        value: All records in order -> numbers by name; one of them has the name of the metric in its task.
        better: Whether higher or lower values are better.
        unit: ``%`` for fractions in [0, 1], shown in per cent; empty for other numbers.

    Example:
        >>> task.metrics["map"]  # doctest: +SKIP
        Gathered(records=detections, value=average_precision)
    """

    records: Callable[[Any, Any], Sequence[Record]]
    value: Callable[[list[Record]], Mapping[str, float]]
    better: Better = "higher"
    unit: Unit = "%"

    def update(self, state: list[Record] | None, predictions: Any, targets: Any) -> list[Record]:
        """Returns the records after one more batch, on the CPU."""
        kept = [tuple(tensor.detach().cpu() for tensor in record) for record in self.records(predictions, targets)]
        return [*(state or []), *kept]

    def over_ranks(self, state: list[Record] | None) -> list[Record]:
        """Returns the records of all ranks."""
        every: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, state or [])
        return [record for own in every for record in own]

    def values(self, name: str, state: list[Record]) -> dict[str, float]:
        """Returns the numbers over all examples, each counted once, in their order.

        Raises:
            MicrogliaError: None of the numbers has the metric's name.
        """
        once: dict[int, Record] = {}
        for record in state:
            once.setdefault(int(record[0]), record)
        found = dict(self.value([once[index] for index in sorted(once)]))
        if name not in found:
            raise MicrogliaError(
                f"The metric {name!r} gave {', '.join(map(repr, found)) or 'nothing'}; one of its numbers must have its name."
            )
        return found


def mean_metric(values: Callable[[Any, Any], Tensor], *, better: Better = "higher", unit: Unit = "%") -> Metric:
    """Returns the metric that is the mean over examples of ``values(predictions, targets)``, shaped (batch,).

    Args:
        values: Computes the number of each example of a batch.
        better: Whether a higher or a lower value is better.
        unit: ``%`` for a fraction in [0, 1], shown in per cent; empty for another number.
    """

    def statistics(outputs: Any, targets: Any) -> Tensor:
        each = values(outputs, targets).double()
        return torch.stack([each.sum(), each.new_tensor(each.numel())])

    return Metric(statistics, lambda total: float(total[0] / total[1]), better, unit)
