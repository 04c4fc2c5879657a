"""How a run's outcome shows itself: a line, and a table of its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from microglia.core.shown import html_table
from microglia.measure.latency import LatencyReport
from microglia.measure.macs import Macs
from microglia.measure.parameters import Parameters
from microglia.measure.size import Bytes


class Seen(Protocol):
    """One model at one moment: its metrics and its counts."""

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Metrics by name."""

    @property
    def parameters(self) -> Parameters:
        """Its parameters."""

    @property
    def macs(self) -> Macs:
        """Its multiply-accumulates."""

    @property
    def bytes(self) -> Bytes:
        """Its size."""


class Ran(Protocol):
    """The outcome of a run."""

    @property
    def task(self) -> str:
        """Model and data, in words."""

    @property
    def headline(self) -> str:
        """Name of the main metric."""

    @property
    def dense(self) -> Seen:
        """The model before pruning."""

    @property
    def before(self) -> Seen | None:
        """The pruned model before recovery."""

    @property
    def pruned(self) -> Seen:
        """The model at the end."""

    @property
    def latency(self) -> LatencyReport | None:
        """Measured times."""


def outcome_line(ran: Ran) -> str:
    """Returns a run's outcome as one line: the metric before and after, the density, the best times."""
    values = (one.metrics.get(ran.headline) for one in (ran.dense, ran.pruned))
    before, after = ("none" if value is None else f"{value:.4g}" for value in values)
    density, time = ran.pruned.parameters.density, f", {ran.latency.fastest}" if ran.latency else ""
    return f"Result({ran.task}, {ran.headline} {before} dense, {after} pruned, density {density:.4g}{time})"


def outcome_table(ran: Ran) -> str:
    """Returns a run's models as a table of HTML."""
    models = {"dense": ran.dense, "before recovery": ran.before, "pruned": ran.pruned}
    rows = [
        (name, m.metrics.get(ran.headline), m.parameters.all, m.parameters.density, m.macs.effective, m.bytes.zipped)
        for name, m in models.items()
        if m is not None
    ]
    heads = ("model", ran.headline, "parameters", "density", "MACs", "bytes, zipped")
    return html_table(ran.task, heads, rows, [ran.latency.fastest] if ran.latency else [])


class Shown:
    """A part of the outcome of a run: it is one line in a terminal, and a table in a notebook."""

    def __repr__(self: Ran) -> str:
        return outcome_line(self)

    def _repr_html_(self: Ran) -> str:
        return outcome_table(self)
