"""The grid of a sweep: a YAML file becomes cells, each a checked recipe with a readable name."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from microglia.core.budget import Budget
from microglia.core.errors import CheckpointError, MicrogliaError
from microglia.core.patterns import parse_pattern
from microglia.lab.recipe import Recipe, RecipeError, as_dict, method_config, override, put, read_yaml, resolve
from microglia.scores import scores
from microglia.storage.run import flatten
from microglia.storage.validation import problems
from microglia.zoo.trust import require_known_recipe

SPOKEN = {"method", "model", "data"}
"""Grid keys whose values appear without the key in a cell's name."""
MOST = 10_000
"""Cells of a sweep."""
LONGEST = 120
"""Maximum length of a cell's name, which is a directory name."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Directory name, unique in the sweep.
        values: Values of the grid for this cell, by dotted key.
        recipe: Recipe with every default filled in.
    """

    name: str
    values: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A grid of recipes.

    Attributes:
        grid: Dotted recipe key -> the values to run; the cells are all combinations, the last key varying fastest.
        base: The common recipe of the cells.
        name: Name for readers and for the default directory.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    grid: dict[str, list[Any]]
    base: dict[str, Any] = field(default_factory=dict)
    name: str = "sweep"

    def __post_init__(self) -> None:
        if not self.grid:
            raise ValueError("grid needs at least one key with a list of values, such as seed: [0, 1]")
        for key, values in self.grid.items():
            if not values or len({json.dumps(v, sort_keys=True, default=str) for v in values}) < len(values):
                raise ValueError(f"grid.{key} needs one or more different values; got {repr(values)[:200]}")
        if (count := math.prod(map(len, self.grid.values()))) > MOST:
            raise ValueError(f"a sweep has at most {MOST:,} cells; this grid has {count:,}")

    @cached_property
    def cells(self) -> list[Cell]:
        """See `cells`."""
        return cells(self)


_sweep = TypeAdapter(Sweep)


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Returns the sweep of a YAML file; every cell is validated.

    Args:
        path: A file with a mapping of ``grid`` and, optionally, ``base`` and ``name``.
        overrides: Assignments such as ``base.checkpoint=FILE`` or ``grid.prune.params=[0.5]``; values are YAML.

    Raises:
        RecipeError: The file, or a cell, is not valid; the text names the cell and the field.
    """
    source = read_yaml(Path(path), "sweep")
    if "grid" not in source and not any(text.startswith("grid.") for text in overrides):
        raise RecipeError(
            f"{path} is no sweep: a sweep has 'grid' (dotted keys with lists of values) and 'base' (a recipe). "
            f"A recipe is run by: microglia prune --recipe {path}"
        )
    whole = [text for text in overrides if text.startswith("grid.")]  # keys of the grid are dotted themselves
    source = override(source, [text for text in overrides if text not in whole])
    grid = dict(source.get("grid") or {})
    for text in whole:
        ((key, value),) = flatten(override({}, [text])["grid"]).items()
        grid[key] = value
    try:
        sweep: Sweep = _sweep.validate_python({**source, "grid": grid})
    except ValidationError as error:
        raise RecipeError(f"The sweep {path} is not valid: {problems(error, 'sweep')}") from None
    for cell in sweep.cells:
        require_known_recipe(as_dict(cell.recipe), path)
    return sweep


def cells(sweep: Sweep) -> list[Cell]:
    """Returns the runs of a sweep in the order of its grid, each recipe resolved and checked.

    Raises:
        RecipeError: A cell is not valid; the text names the cell and the field.
    """
    chosen = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    return [Cell(name, v, _checked(name, v, sweep.base)) for name, v in zip(_names(chosen), chosen, strict=True)]


def _checked(name: str, values: Mapping[str, Any], base: Mapping[str, Any]) -> Recipe:
    """Returns a cell's recipe after every check that needs neither model nor data."""
    try:
        tree: dict[str, Any] = dict(base)
        for key, value in values.items():
            tree = put(tree, key, value)
        recipe = resolve(tree)
        config = method_config(recipe)
        parse_pattern(config.pattern)
        scores[config.score]
        if config.density is not None or config.params is not None:
            Budget(density=config.density, params=config.params)
        if recipe.checkpoint is not None and not Path(recipe.checkpoint).is_file():
            raise CheckpointError(f"checkpoint: there is no file {recipe.checkpoint}.")
    except MicrogliaError as error:
        raise RecipeError(f"The cell {name} of the sweep is not valid. {error}") from error
    return recipe


def _names(chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a readable, filesystem-safe, unique name for each combination of grid values."""
    ends = Counter(key.rpartition(".")[2] for key in chosen[0])
    labels = {key: key if ends[end] > 1 else end for key in chosen[0] for end in [key.rpartition(".")[2]]}
    plain = ["_".join(_spoken(labels[k], v) for k, v in values.items()) for values in chosen]
    often = Counter(name.casefold() for name in plain)  # some file systems ignore case
    names = []
    for name, values in zip(plain, chosen, strict=True):
        mark = hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        clear = len(name) <= LONGEST and often[name.casefold()] == 1
        names.append(name if clear else f"{name[: LONGEST - len(mark) - 1]}-{mark}")
    return names


def _spoken(label: str, value: Any) -> str:
    if isinstance(value, Mapping):
        text = "+".join(_spoken(str(k), v) for k, v in value.items())
    elif isinstance(value, list | tuple):
        text = "+".join(str(v) for v in value)
    else:
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = text if label in SPOKEN else f"{label}-{text}"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "empty"
