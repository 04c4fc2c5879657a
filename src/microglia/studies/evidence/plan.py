"""The plan of a queue: every start, pilot and cell in order, with those that are finished."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from microglia.core.errors import MicrogliaError
from microglia.lab.recipe import AFTER_DENSE, Recipe, RecipeError, as_dict, as_whole_dict, identity_of, put, start_of
from microglia.studies.evidence.files import EvidenceStudy, Queue, Row, tries
from microglia.studies.evidence.identity import recipe_of
from microglia.studies.evidence.ledger import Ledger
from microglia.zoo.trust import require_known_recipe

Kind = Literal["start", "pilot", "cell"]
DENSE = {"method": "oneshot", "prune": {"density": 1.0}, "train": {"epochs": 0}, "measure": {"latency": False}}
"""Fields of a recipe that only trains a dense network."""


@dataclass(frozen=True)
class Job:
    """One run of the queue.

    Attributes:
        kind: A dense network that others start from, a pilot, or a cell of a table.
        study: Name of the study; empty for a start.
        row: Row of the table.
        values: Values of the grid, or those that a pilot tries.
        seed: Seed of the run.
        recipe: The resolved recipe.
        done: Whether the results hold it.
        settled: Whether the pilots that choose its settings are finished; until then the recipe is provisional.
    """

    kind: Kind
    study: str
    row: str
    values: dict[str, Any]
    seed: int
    recipe: Recipe
    done: bool = False
    settled: bool = True

    @property
    def identity(self) -> str:
        """Identity of the recipe; for a start the name under which runs share it."""
        return start_of(as_dict(self.recipe)) if self.kind == "start" else identity_of(self.recipe)

    @property
    def start(self) -> str | None:
        """Name of the dense network that it begins from; None for one that trains no dense network."""
        return start_of(as_dict(self.recipe)) if self.recipe.dense.epochs and self.recipe.checkpoint is None else None

    @property
    def epochs(self) -> int:
        """Epochs of the run without its start, with those of a training before a cut."""
        before = self.recipe.prune.get("sparse_epochs") or 0
        return self.recipe.dense.epochs if self.kind == "start" else self.recipe.train.epochs + int(before)

    @property
    def name(self) -> str:
        """Directory name of the run, unique in a study."""
        words = [self.kind, self.row, *(f"{k.rpartition('.')[2]}-{v}" for k, v in self.values.items()), f"seed-{self.seed}"]
        text = re.sub(r"[^A-Za-z0-9.+-]+", "-", "_".join(filter(None, words)))[:80].replace("-_", "_")
        return f"{text}-{self.identity[:8]}"


@dataclass
class Planner:
    """Makes the plan of a queue from its files and the finished results.

    Attributes:
        queue: The queue.
        ledger: The finished results.
        starts: Directory of the dense networks on this machine; None to plan as if they were all there.
    """

    queue: Queue
    ledger: Ledger
    starts: Path | None = None
    _jobs: dict[tuple[str, ...], Job] = field(default_factory=dict)

    def jobs(self) -> list[Job]:
        """Returns every job in the order of the queue: starts and pilots before the first cell that needs them."""
        self._jobs = {}
        for part in self.queue.ordered:
            study = self.queue.studies[part.study]
            for seed in part.seeds or study.seeds:
                for name in part.rows or study.rows:
                    for values in combinations(study, study.rows[name]):
                        if all(values.get(key) in allowed for key, allowed in part.only.items() if key in values):
                            self._add_cell(study, name, values, seed)
        return list(self._jobs.values())

    def _add_cell(self, study: EvidenceStudy, name: str, values: dict[str, Any], seed: int) -> None:
        chosen, settled = self.chosen(study, name)
        recipe = self._recipe(study, name, {**chosen, **values, "seed": seed})
        done = settled and self.ledger.holds(identity_of(recipe))
        self._add(Job("cell", study.name, name, values, seed, recipe, done, settled))

    def chosen(self, study: EvidenceStudy, name: str) -> tuple[dict[str, Any], bool]:
        """Returns the settings that the pilots of a row chose so far, and whether all of them are finished.

        Pilots that are not in the plan yet are added to it.
        """
        row, pilots = study.rows[name], study.pilots
        if pilots is None or not row.pilots:
            return {}, True
        best: dict[str, Any] = {}
        tried: list[tuple[float, dict[str, Any]]] = []
        wanted = 0
        steps = [*pilots.steps, *row.steps]
        for number, step in enumerate(steps, 1):
            wanted += len(tries(step))
            for changes in tries(step):
                settings = {**best, **changes}
                job = self._pilot(study, name, settings)
                measured = self.ledger.pilot(job.identity)
                if measured is not None:
                    tried.append((measured, settings))
            if len(tried) < wanted:
                held = best or tries(step)[0]
                for changes in [changes for later in steps[number:] for changes in tries(later)]:
                    self._pilot(study, name, {**held, **changes}, settled=False)  # counted, and run once the best is known
                return held, False
            sign = 1 if study.better == "higher" else -1
            best = max(tried, key=lambda one: -math.inf if math.isnan(one[0]) else sign * one[0])[1]  # the first of equal ones
        return best, True

    def _pilot(self, study: EvidenceStudy, name: str, settings: dict[str, Any], *, settled: bool = True) -> Job:
        assert study.pilots is not None
        pilots = study.pilots
        grid = grid_of(study, study.rows[name])
        at = {key: value for key, value in pilots.at.items() if key in grid}
        judged = {"seed": pilots.seed, "measure.split": "validation", "measure.latency": False}
        recipe = self._recipe(study, name, {**settings, **pilots.set, **study.rows[name].short, **at, **judged})
        done = self.ledger.pilot(identity_of(recipe)) is not None
        return self._add(Job("pilot", study.name, name, settings, pilots.seed, recipe, done, settled))

    def _recipe(self, study: EvidenceStudy, name: str, over: Mapping[str, Any]) -> Recipe:
        tree: dict[str, Any] = study.base
        try:
            for key, value in {**study.rows[name].set, **over}.items():
                tree = put(tree, key, value)
            recipe = recipe_of(tree)
        except MicrogliaError as error:
            raise RecipeError(f"The row {name} of {study.name} is not valid. {error}") from error
        require_known_recipe(as_dict(recipe), self.queue.path)
        return recipe

    def _add(self, job: Job) -> Job:
        key = (job.kind, job.study, job.identity) if job.settled else (job.kind, job.study, job.row, job.name)
        known = self._jobs.get((job.kind, job.study, job.identity))
        if known is not None and job.kind == "pilot":
            return known  # a later step tries again what an earlier one tried
        if key not in self._jobs:
            if not job.done and job.start is not None:
                self._add_start(job)
            self._jobs[key] = job
        return self._jobs[key]

    def _add_start(self, job: Job) -> None:
        start = start_recipe(job.recipe)
        name = start_of(as_dict(start))
        there = self.starts is None or (self.starts / name / "dense.safetensors").is_file()
        done = self.ledger.start(name) is not None and there
        self._jobs.setdefault(("start", name), Job("start", "", start.model, {}, start.seed, start, done))


def start_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe that trains the dense network of another recipe, and nothing more."""
    whole = as_whole_dict(recipe)
    kept = {key: value for key, value in whole.items() if key not in AFTER_DENSE}
    return recipe_of({**kept, **DENSE})


def grid_of(study: EvidenceStudy, row: Row) -> dict[str, list[Any]]:
    """Returns the grid of a row: its own, or that of the study."""
    return study.grid if row.grid is None else row.grid


def combinations(study: EvidenceStudy, row: Row) -> Iterator[dict[str, Any]]:
    """Yields the values of the grid of a row."""
    grid = grid_of(study, row)
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))
