"""How well a network bears the loss of half its units, and what that promises of the built path: both measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from microglia.core.errors import MicrogliaError
from microglia.studies.dropout_paths.dropout_path import DropoutPath, Keep, dropout_path, dropped, keep_sets
from microglia.studies.dropout_paths.unit_chain import Network, UnitChain, enter
from microglia.studies.space.points import visiting

Measure = Callable[[nn.Module], float]
"""The loss of a model in evaluation mode, convex in its outputs. With a `microglia.studies.space.gauge.Gauge` that recalibrates
nothing: ``lambda model: gauge(model)["train_loss"]``. Batch norm's statistics are part of the place here."""
FACTORS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0)


@dataclass(frozen=True)
class Stability:
    """The cost of dropped units.

    Attributes:
        loss: Loss of the whole network.
        dropped: Losses with dropped units from each hidden layer on, the first layer first.
    """

    loss: float
    dropped: tuple[float, ...]

    @property
    def epsilon(self) -> float:
        """The largest rise: the network is epsilon-dropout stable with these units."""
        return max(self.dropped) - self.loss

    @property
    def worst(self) -> float:
        """The largest loss."""
        return max(self.loss, *self.dropped)


@dataclass(frozen=True)
class NetworkGauge:
    """Measures networks of one architecture.

    Attributes:
        model: To measure in; it is put back after every measurement, bit for bit.
        chain: Its layers.
        measure: The loss.
    """

    model: nn.Module
    chain: UnitChain
    measure: Measure

    @torch.no_grad()
    def __call__(self, network: Network) -> float:
        """Returns the loss of a network, in evaluation mode."""
        with visiting(self.model):
            self.model.eval()
            enter(self.model, network)
            return float(self.measure(self.model))


def dropout_stability(gauge: NetworkGauge, network: Network, keep: Keep, rescale: float | None = None) -> Stability:
    """Returns the loss of a network and of its dropped forms.

    Args:
        gauge: How to measure.
        network: To look at.
        keep: Units to keep.
        rescale: See `dropped`.
    """
    forms = (dropped(network, gauge.chain, keep, layer, rescale) for layer in range(len(gauge.chain.hidden)))
    return Stability(gauge(network), tuple(gauge(form) for form in forms))


def best_keep_sets(
    gauge: NetworkGauge,
    network: Network,
    *,
    tries: int = 10,
    by: Literal["network", "layer"] = "layer",
    seed: int = 0,
    rescale: float | None = None,
) -> list[Tensor]:
    """Returns the best of drawn keep sets of half the units.

    Args:
        gauge: How to measure.
        network: To look at.
        tries: Draws.
        by: ``network`` takes the draw with the least epsilon; ``layer`` goes from the last hidden layer to the first and
            takes for each the drawn set with the least loss, those after it being chosen.
        seed: Root of the draws.
        rescale: See `dropped`.

    Raises:
        MicrogliaError: There is no try.
    """
    if tries < 1:
        raise MicrogliaError(f"Keep sets are drawn at least once; got tries={tries}.")
    drawn = [keep_sets(gauge.chain, seed=seed * 1_000_003 + number) for number in range(tries)]
    if by == "network":
        return min(drawn, key=lambda keep: dropout_stability(gauge, network, keep, rescale).epsilon)
    chosen = list(drawn[0])
    for layer in reversed(range(len(gauge.chain.hidden))):
        losses = []
        for draw in drawn:
            keep = [*chosen[:layer], draw[layer], *chosen[layer + 1 :]]
            losses.append(gauge(dropped(network, gauge.chain, keep, layer, rescale)))
        chosen[layer] = drawn[losses.index(min(losses))][layer]
    return chosen


def best_rescale(gauge: NetworkGauge, network: Network, keep: Keep, factors: Sequence[float] = FACTORS) -> float:
    """Returns the factor of what leaves kept units under which the network bears dropping best.

    Args:
        gauge: How to measure.
        network: To look at.
        keep: Units to keep.
        factors: To try, each for all layers.
    """
    return min(factors, key=lambda factor: dropout_stability(gauge, network, keep, factor).epsilon)


def losses_along(gauge: NetworkGauge, path: DropoutPath, points: int = 5) -> list[dict[str, Any]]:
    """Returns the loss along a path, one row a place: ``segment``, ``kind``, ``share`` of the segment, ``loss``.

    Args:
        gauge: How to measure.
        path: To walk.
        points: Places of each segment, with its start and without its end; the end of the path comes last.
    """
    if points < 1:
        raise MicrogliaError(f"A path is measured at 1 place of each segment or more; got {points}.")
    rows = []
    for segment, kind in enumerate(path.kinds):
        ending = segment == len(path.kinds) - 1
        for share in (number / points for number in range(points + ending)):
            loss = gauge(path.within(segment, share))
            rows.append({"segment": segment, "kind": kind, "share": share, "loss": loss})
    return rows


def examine_path(
    gauge: NetworkGauge,
    ends: tuple[Network, Network],
    keeps: tuple[Keep, Keep],
    *,
    rescale: float | tuple[float, float] | None = None,
    points: int = 5,
) -> dict[str, Any]:
    """Returns the built path between two networks, measured, against what their dropout stability promises, JSON-ready.

    The result holds:

    - ``ends``, ``dropped`` and ``epsilon`` of both networks, and ``segments``, ``rows`` of the path;
    - ``bound``, the largest loss of the ends and of all their dropped forms;
    - ``maximum`` of the path, and ``barrier``, the maximum less the larger end.

    Args:
        gauge: How to measure.
        ends: The two networks.
        keeps: Their units to keep.
        rescale: See `dropped`; two for two.
        points: Places of each segment.
    """
    path = dropout_path(gauge.chain, ends, keeps, rescale)
    factors = rescale if isinstance(rescale, tuple) else (rescale, rescale)
    sides = zip(ends, keeps, factors, strict=True)
    found = [dropout_stability(gauge, end, keep, factor) for end, keep, factor in sides]
    rows = losses_along(gauge, path, points)
    maximum = max(row["loss"] for row in rows)
    return {
        "ends": [one.loss for one in found],
        "dropped": [list(one.dropped) for one in found],
        "epsilon": [one.epsilon for one in found],
        "bound": max(one.worst for one in found),
        "maximum": maximum,
        "barrier": maximum - max(one.loss for one in found),
        "segments": len(path.kinds),
        "rows": rows,
    }
