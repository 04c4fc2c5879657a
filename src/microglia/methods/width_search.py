"""The shared evaluator of searches over widths, and the pruner that removes channels to the widths that a search finds.

A width vector is evaluated by slicing the shared weights: the best channels of each group stay, as many as the vector says. The
model is traced once; a candidate is neither built nor traced. Values are kept in the stage of the search, so a search that was
killed proposes the same vectors again and gets the stored values.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from statistics import median
from types import TracebackType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from microglia.core.errors import BudgetError
from microglia.core.progress import progress_bar
from microglia.methods.channel_pruner import CHANNELS, ChannelConfig, ChannelPruner
from microglia.methods.what import ScopeSetting, Takes
from microglia.methods.width_space import Widths, WidthSpace
from microglia.scores import scores
from microglia.storage.run import Progress
from microglia.train.optim import FitConfig

__all__ = ["WIDTHS", "Evaluator", "SearchedConfig", "SearchedPruner", "WidthSpace", "Widths"]

WIDTHS: Takes = replace(
    CHANNELS,
    fields=("density", "params", "flops", "exclude"),
    scopes=(),
    why={**CHANNELS.why, "scope": "the search finds the width of each group"},
)
"""Fields and patterns of searches over widths."""
PATIENCE = 0.2
"""Seconds between two looks of a worker at whether its parent still lives."""


class Evaluator(AbstractContextManager["Evaluator"]):
    """Values of width vectors, each computed once.

    Args:
        measure: Width vector -> value, higher is better; it must not depend on other calls.
        progress: Where values are kept and found again.
        processes: Processes that measure; 1 for this one. More are forked, so that nothing is copied or sent but vectors.
        begin: Called once in each forked process.
        told: Called with each new value.

    Attributes:
        values: Vector -> value, in the order of evaluation.
        found: Number of values that an interrupted attempt left.
    """

    def __init__(
        self,
        measure: Callable[[Widths], float],
        *,
        progress: Progress | None = None,
        processes: int = 1,
        begin: Callable[[], object] | None = None,
        told: Callable[[float], None] = lambda value: None,
    ) -> None:
        self.measure, self._progress, self._told = measure, progress, told
        self.values: dict[Widths, float] = {}
        self._known: dict[Widths, float] = {}
        if progress is not None and progress.state is not None:
            vectors = (tuple(row) for row in progress.state["widths"].tolist())
            self._known.update(zip(vectors, progress.state["values"].tolist(), strict=True))
        self.found = len(self._known)
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(processes, context, _worker_begins, (measure, begin, os.getpid()))

    def __call__(self, vectors: Sequence[Widths]) -> list[float]:
        """Returns the value of each vector; the ones that are new are measured and kept one by one."""
        new = [v for v in dict.fromkeys(vectors) if v not in self.values and v not in self._known]
        measured = iter(self._measured(new))
        for vector in dict.fromkeys(vectors):
            if vector not in self.values:
                known = vector in self._known
                self.values[vector] = self._known[vector] if known else next(measured)
                self._told(self.values[vector])
                if not known and self._progress is not None:
                    self._progress.save(self.state())
        return [self.values[vector] for vector in vectors]

    def state(self) -> dict[str, Tensor]:
        """Returns all values known so far."""
        everything = {**self._known, **self.values}
        return {
            "widths": torch.tensor([list(vector) for vector in everything]),
            "values": torch.tensor(list(everything.values()), dtype=torch.float64),
        }

    def _measured(self, vectors: Sequence[Widths]) -> Iterator[float]:
        if self._pool is None:
            return map(self.measure, vectors)
        return self._pool.map(_measure, vectors)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_measuring: list[Callable[[Widths], float]] = []
"""The evaluator of this process, if it is a worker."""


def _worker_begins(measure: Callable[[Widths], float], begin: Callable[[], object] | None, parent: int) -> None:
    """Prepares a forked process: one thread, and an end as soon as its parent is gone."""
    torch.set_num_threads(1)  # the parent's threads do not exist here
    _measuring[:] = [measure]
    if begin is not None:
        begin()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _measure(vector: Widths) -> float:
    return _measuring[0](vector)


@dataclass(frozen=True)
class SearchedConfig(ChannelConfig):
    """Methods that search over widths, cut to the best, recover.

    Attributes:
        images: Held-out training examples on which a candidate is valued.
        processes: Processes that evaluate candidates; 1 for none beside the main one.
        tolerance: How far a candidate's fraction may be from the budget.
    """

    takes: ClassVar[Takes] = WIDTHS
    scope: ScopeSetting = "global"  # type: ignore[assignment]  # not taken, so that every word is refused alike
    images: int = 512
    processes: int = 1
    tolerance: float = 0.005

    def check_values(self) -> None:
        """Raises `BudgetError` for counts below 1 and a tolerance out of range."""
        if min(self.images, self.processes) < 1:
            raise BudgetError(f"images and processes are at least 1; got {self.images} and {self.processes}.")
        if not 0 <= self.tolerance < 1:
            raise BudgetError(f"tolerance is in [0, 1); got {self.tolerance}.")

    @property
    def sparse(self) -> FitConfig:
        """The training before the cut: none."""
        return replace(self.train, epochs=0)


class SearchedPruner(ChannelPruner):
    """Removes channels to the widths that a search finds; the best channels by L1 norm of their filters stay.

    Example:
        >>> import torch
        >>> from microglia.methods import EagleEye
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        >>> model = torch.nn.Sequential(*layers)
        >>> pruner = EagleEye(model, total_steps=1, example_inputs=torch.zeros(1, 8), flops=0.5, candidates=4)
        >>> pruner.search(lambda small: -float(small(torch.ones(1, 8)).abs().sum()))
        >>> _ = pruner.finish()
        >>> sum(pruner.report()["counts"].values()) < 32
        True
    """

    Config = SearchedConfig

    def prepare(self) -> None:
        """Lays out the width vectors that meet the budget."""
        self.widths: Widths | None = None
        self.values: dict[Widths, float] = {}
        self.history: list[dict[str, float]] = []
        self.space = self.make_space()
        self.units.check_sliced()

    # ------------------------------------------------------------------------------------------------ what a method says
    def make_space(self) -> WidthSpace:
        """Returns the width vectors to search among."""
        own = cast(SearchedConfig, self.config)
        return WidthSpace(self.units, self.asked, below=own.tolerance, above=own.tolerance, round_to=own.round_to)

    @property
    def planned(self) -> int:
        """Number of vectors that the search intends to evaluate, for its progress bar; 0 if it is not known."""
        return 0

    def explore(self, evaluate: Evaluator, generator: torch.Generator) -> None:
        """Proposes vectors of ``self.space`` and evaluates them; what it proposes depends on generator and values only."""
        raise NotImplementedError

    def candidate(self, widths: Widths) -> nn.Module:
        """Returns the small model of a vector."""
        return self.units.sliced(self.model, self.space.channels(self.values_of_channels, widths))

    # ------------------------------------------------------------------------------------------------------- what all share
    @property
    def asked(self) -> Any:
        """The budget.

        Raises:
            BudgetError: There is none.
        """
        if self.config.budget is None:
            raise BudgetError(f"{type(self).__name__} cuts to a budget: give density, params or flops, fractions kept.")
        return self.config.budget

    def choose(self, ranking: Tensor) -> Tensor:
        """Returns the channels of the widths that were found; all before the search."""
        return (
            torch.ones(self.units.count, dtype=torch.bool) if self.widths is None else self.space.channels(ranking, self.widths)
        )

    @torch.no_grad()
    def ranking(self) -> Tensor:
        """Returns the L1 norm of the filters that make each channel."""
        return self.of_filters(scores["l1"](self.model, self.layers, self.evidence)).cpu()

    def search(
        self,
        measure: Callable[[nn.Module], float],
        progress: Progress | None = None,
        *,
        begin: Callable[[], object] | None = None,
        seed: int = 0,
    ) -> None:
        """Searches for the widths; `finish` then masks the channels that go. Among equal values the widest counts.

        Args:
            measure: Small model -> value, higher is better. It should estimate batch-norm statistics anew first, see
                `microglia.train.recover.recalibrate`.
            progress: Where values are kept, so that a search that was killed goes on.
            begin: Called once in each forked process.
            seed: Seed of the proposals.
        """
        self.values_of_channels = self.ranking()
        processes = cast(SearchedConfig, self.config).processes

        def value(widths: Widths) -> float:
            return float(measure(self.candidate(widths)))

        with progress_bar("search", self.planned) as bar:
            best = -math.inf

            def told(value: float) -> None:
                nonlocal best
                best = max(best, value)
                bar.say(f"best {best:.4g}")
                bar.at(bar.done + 1, self.planned)

            with Evaluator(value, progress=progress, processes=processes, begin=begin, told=told) as evaluate:
                self.explore(evaluate, torch.Generator().manual_seed(seed))
        if not evaluate.values:
            raise BudgetError(f"{type(self).__name__} found no width vector near the budget ({self.asked}): widen tolerance.")
        self.values = evaluate.values
        self.widths = max(self.values, key=lambda widths: (self.values[widths], self.space.excess(widths)))

    def final(self) -> Tensor:
        """Returns the channels that stay.

        Raises:
            BudgetError: There was no search.
        """
        if self.widths is None:
            raise BudgetError(f"{type(self).__name__} has no widths yet: call search(measure) before finish().")
        return super().final()

    def note(self, values: Sequence[float]) -> None:
        """Adds the values of one round to the history."""
        self.history.append({"best": max(values), "median": median(values), "candidates": len(values)})

    def report(self) -> dict[str, Any]:
        """Returns widths before and after, and the search: every vector with its value, each round, rejected draws."""
        found = [{"widths": list(vector), "value": value} for vector, value in self.values.items()]
        return super().report() | {"candidates": found, "rounds": self.history, "rejected": self.space.rejected}

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken and the widths found."""
        return super().state_dict() | {"widths": None if self.widths is None else list(self.widths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        super().load_state_dict(state)
        self.widths = None if state["widths"] is None else tuple(state["widths"])
