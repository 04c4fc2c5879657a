"""Accelerates a loaded model as its record says: without timing on the machine of the record, by timing on another."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.running import first_line, folded_twin, run, undisturbed
from microglia.runtime.accelerate import accelerate_calibrated, sites_of, tolerance_of
from microglia.runtime.accelerated import Accelerated
from microglia.runtime.bfloat16 import dense_lowered
from microglia.runtime.candidates import Candidate
from microglia.runtime.dense.execution import difference, runners
from microglia.runtime.dense.fusion import Site
from microglia.runtime.dense.kinds import Runner
from microglia.runtime.devices import CPU
from microglia.runtime.precisions import Precision, precision_of
from microglia.runtime.record import LOWERED, Record

Kernels = Literal["timed", "stored", "none"]
"""The use of a record: ``timed`` accelerates the model, by timing where the record is of another machine; ``stored`` does so
only without timing; ``none`` never does."""
KERNELS = get_args(Kernels)
Choice = tuple[str, str, tuple[int, ...]]
"""Name, kind and shape of the weight of a layer."""


def reaccelerated(model: nn.Module, record: Record, kernels: Kernels = "timed") -> nn.Module:
    """Returns a model in the execution of a record: each layer by its recorded kernel, its weight packed anew.

    The outputs are compared with the model's. On another machine, or where an execution cannot be made here, a warning says so
    in one sentence. Then the model is accelerated by timing, or returned as it is.

    Args:
        model: The model that was accelerated, loaded; it stays unchanged.
        record: The record, as `read_record` returned it.
        kernels: ``timed`` or ``stored``, see `Kernels`.

    Raises:
        MicrogliaError: The record does not fit the model.
    """
    example, problem = record.inputs(), _elsewhere(record)
    if problem is None:
        dense = folded_twin(model)
        with undisturbed():
            fast, problem = _made(dense, record, example)
        if fast is not None:
            return Accelerated(fast, dense, example)._chosen_by(record.report, record)
    if kernels == "stored":
        warnings.warn(f"The model runs dense, not by its stored kernels: {problem}.", stacklevel=4)
        return model
    said = f"The kernels of the model are timed anew: {problem}."
    warnings.warn(said, stacklevel=4)
    timed = accelerate_calibrated(model, example, record.report.precision, (), record.ranges, against=record.against)
    return timed._chosen_by(replace(timed.report(), notes=(said, *timed.report().notes)), timed.record())


def _elsewhere(record: Record) -> str | None:
    """Returns in what this machine differs from that of the record, in words, or None."""
    now = CPU.machine()
    other = record.elsewhere(now)
    if not other:
        return None
    said = [f"{key} {str(record.machine.get(key))[:60]!r} there and {now.get(key)!r} here" for key in other]
    return f"they were chosen on another machine ({'; '.join(said)})"


def _made(dense: nn.Module, record: Record, example: Example) -> tuple[Runner | None, str | None]:
    """Returns the execution of a record; or None, and why it cannot be made here."""
    expected = run(dense, example.copied())
    precision, notes = precision_of(record.report.precision), list[str]()
    if record.by_layer:
        ways = _ways(sites_of(dense, example, precision), record, precision)
        try:
            plan = precision.plan(dense, example, ways, record.ranges)
            tolerance = tolerance_of([way.name for way in ways], precision)
            problem = difference(expected, run(plan, example.copied()), tolerance)
        except Exception as error:
            problem = first_line(error)
        return (plan, None) if problem is None else (None, problem.rstrip("."))
    name = record.report.chosen
    if name.startswith(LOWERED):
        ready = dense_lowered(dense, example, [name.removeprefix(LOWERED)], notes)
    else:
        ready = runners(dense, example, [name], notes=notes)
    return (ready[name], None) if name in ready else (None, " ".join(notes).rstrip(".") or f"{name} is not here")


def _ways(sites: Sequence[Site], record: Record, precision: Precision) -> list[Candidate]:
    """Returns the recorded way of each layer.

    Raises:
        MicrogliaError: The record is of other layers, or names a way that a layer does not have.
    """
    layers = record.report.layers
    wanted: list[Choice] = [(layer.name, layer.kind, layer.shape) for layer in layers]
    if wanted != [(site.name, site.kind, tuple(site.weight.shape)) for site in sites]:
        raise MicrogliaError(f"The record is of {len(layers)} layers other than the {len(sites)} of the model.")
    ways = []
    for site, layer in zip(sites, layers, strict=True):
        known = (*CPU.candidates(site, []), *precision.candidates(site))
        found = next((way for way in known if way.name == layer.chosen), None)
        if found is None:
            raise MicrogliaError(f"{site.name or 'The model'} has no execution {layer.chosen[:80]!r}.")
        ways.append(found)
    return ways
