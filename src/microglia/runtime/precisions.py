"""The precisions in which a model is accelerated: a table, from a name to what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from microglia.core.batch import Example
from microglia.core.errors import MicrogliaError
from microglia.core.registry import Registry
from microglia.runtime import bfloat16
from microglia.runtime.candidates import Candidate
from microglia.runtime.dense.fusion import Site, fuse
from microglia.runtime.dense.kinds import TORCH, Runner
from microglia.runtime.int8.calibration import Ranges
from microglia.runtime.int8.candidates import WAY, int8_candidates
from microglia.runtime.int8.lowering import lower_to_int8
from microglia.runtime.sparse_layers.chain import chained

EXAMPLES = 32
"""Examples of one calibration batch, where a command draws them."""


def _as_it_is(site: Site) -> Site:
    return site


def _nothing(site: Site) -> Iterator[Candidate]:
    return iter(())


def _no_other(model: nn.Module, example: Example, against: Sequence[str], notes: list[str]) -> dict[str, Runner]:
    return {}


def _exactly(model: nn.Module, example: Example, ways: Sequence[Candidate], ranges: Ranges) -> nn.Module:
    """Returns a whole model with one way for each layer; consecutive block layers run as one operator."""
    left = iter(ways)
    return chained(fuse(model, example, lambda site: next(left).make()))


@dataclass(frozen=True)
class Precision:
    """The differences of one precision.

    Attributes:
        plan: Returns a whole model with one way for each layer, in the order of `fuse`; called with the folded model, an
            example, the ways, and the ranges of its values.
        site: Returns the layer that is timed.
        candidates: Returns more ways to run a layer, beside the exact ones.
        way: Beginning of the names of those ways.
        dense: Returns more dense executions of the whole model; called with the folded model, an example, names, and notes.
        suffix: End of the names of whole models in which every layer rounds.
        tolerance: Tolerated difference of a whole model's outputs where it rounds, relative to the largest; None where it is
            exact.
        calibrated: Whether the ranges of values are measured on given batches.
        cpu: Why a GPU is refused, for the reader; "" where it is not.
    """

    plan: Callable[[nn.Module, Example, Sequence[Candidate], Ranges], nn.Module] = _exactly
    site: Callable[[Site], Site] = _as_it_is
    candidates: Callable[[Site], Iterable[Candidate]] = _nothing
    way: str = ""
    dense: Callable[[nn.Module, Example, Sequence[str], list[str]], dict[str, Runner]] = _no_other
    suffix: str = ""
    tolerance: float | None = None
    calibrated: bool = False
    cpu: str = ""

    def rounds(self, way: str) -> bool:
        """Tells whether a way of a layer, by its name, rounds."""
        return way.startswith(self.way) if self.way else self.tolerance is not None


_PRECISIONS: Registry[Precision] = Registry("precision")


def register_precision(name: str, precision: Precision) -> Precision:
    """Registers a precision by its name.

    Raises:
        ValueError: The name is taken.
    """
    return _PRECISIONS.add(name)(precision)


def precision_names() -> tuple[str, ...]:
    """Returns the names of all precisions."""
    return tuple(_PRECISIONS)


def precision_of(name: str) -> Precision:
    """Returns a precision by its name.

    Raises:
        MicrogliaError: There is none of this name.
    """
    if name not in _PRECISIONS:
        *others, last = precision_names()
        raise MicrogliaError(f"A model is accelerated in {', '.join(others)} or {last}, not in {name!r}.")
    return _PRECISIONS[name]


register_precision("float32", Precision())
register_precision(
    "bf16",
    Precision(
        plan=lambda model, example, ways, ranges: _lowered(model, example, ways),
        site=bfloat16.lowered_site,
        dense=lambda model, example, against, notes: bfloat16.dense_lowered(
            model, example, [name for name in against if name in TORCH], notes
        ),
        suffix=", bf16",
        tolerance=bfloat16.TOLERANCE,
        cpu="bf16 is for float32 models on the CPU; on a GPU convert the model with .bfloat16() instead.",
    ),
)
register_precision(
    "int8",
    Precision(
        plan=lower_to_int8,
        candidates=int8_candidates,
        way=WAY,
        tolerance=0.5,
        calibrated=True,
        cpu="int8 is for float32 models on the CPU; on a GPU the kernels are those of float32 and half precision.",
    ),
)


def _lowered(model: nn.Module, example: Example, ways: Sequence[Candidate]) -> nn.Module:
    left = iter(ways)
    return bfloat16.lower(model, example, lambda site: next(left).make())
