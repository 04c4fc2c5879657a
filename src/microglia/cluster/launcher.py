"""Launchers by name, and the work that they do on a node."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from microglia.core.errors import MicrogliaError
from microglia.core.registry import Registry
from microglia.lab.recipe import as_dict, resolve
from microglia.lab.sweep import Cell, CellOutcome, Launcher, run_cell
from microglia.storage.plain_yaml import parse_yaml
from microglia.zoo.trust import trusting

PASSED = ("MICROGLIA_", "HF_", "WANDB_", "MLFLOW_", "OMP_NUM_THREADS", "PYTHONPATH")
"""Beginnings of the environment's names that every node gets."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""Words of the names whose values no file may hold."""
AT_ONCE = 200
"""Cells that a cluster gets at the same time where the user names no number; its own queue keeps them until there is room."""


class ClusterError(MicrogliaError):
    """A cluster that cannot be reached, or that was asked for something it has not."""


launchers: Registry[Callable[..., Launcher]] = Registry("launcher")
"""Launchers by name; each is called with the settings of the command line by keyword."""


def launcher_of(name: str | None, settings: Sequence[str] = ()) -> Launcher | None:
    """Returns a launcher, or None for processes of this machine.

    Args:
        name: Name in `launchers`; None or ``local`` for this machine.
        settings: ``KEY=VALUE``, such as ``address=10.0.0.1:6379``; values are YAML.

    Raises:
        ClusterError: A setting has another form or is not known, or the cluster cannot be reached.
        UnknownNameError: No launcher has this name.
    """
    if name in (None, "local"):
        if settings:
            raise ClusterError(f"Processes of this machine take no settings; got {settings[0]!r}: name a --launcher for it.")
        return None
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.isidentifier():
            raise ClusterError(f"A setting of a launcher looks like address=10.0.0.1:6379; got {setting!r}.")
        given[key] = text if ":" in text else parse_yaml(text)
    make = launchers[str(name)]
    try:
        return make(**given)
    except TypeError as error:
        raise ClusterError(f"The launcher {name} does not take these settings: {error}.") from error


def order_of(cell: Cell, directory: Path, starts: Path | None, threads: int, *, secrets: bool = True) -> dict[str, Any]:
    """Returns what `work` needs to run a cell on another node, as plain values, which every cluster can carry.

    Args:
        cell: The cell to run.
        directory: Directory of its run.
        starts: Directory of the dense networks that cells share.
        threads: CPU threads of its process.
        secrets: Whether tokens and keys go along; not where the order becomes a file.
    """
    variables = {key: value for key, value in os.environ.items() if key.startswith(PASSED)}
    if not secrets:
        variables = {key: value for key, value in variables.items() if not any(word in key for word in SECRET)}
    place = {"directory": str(directory.resolve()), "starts": str(starts.resolve()) if starts else None}
    return {"name": cell.name, "recipe": as_dict(cell.recipe), **place, "threads": threads, "variables": variables}


def work(order: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a cell on a node, and returns the fields of its `CellOutcome`.

    Args:
        order: See `order_of`. `read_sweep` checked where the sweep began that the recipe's models may be built.
    """
    os.environ.update(order["variables"])
    name, where, starts = order["name"], Path(order["directory"]), order["starts"]
    if not (where.parent / "sweep.yaml").is_file():
        problem = (
            f"The node {os.uname().nodename} does not see {where.parent}: give --out a directory that all nodes share, such as "
            "one of NFS."
        )
        return {"name": name, "status": "failed", "problem": problem}
    with trusting(True):
        cell = Cell(name, {}, resolve(order["recipe"]))
    outcome = run_cell(cell, where, threads=order["threads"], starts=Path(starts) if starts else None)
    return {"name": name, "status": outcome.status, "seconds": outcome.seconds, "problem": outcome.problem}


def check_amount(name: str, value: object, *, whole: bool) -> None:
    """Raises `ClusterError` unless a number of cores or GPUs can be one."""
    fits = type(value) is int and value >= 1 if whole else isinstance(value, int | float) and type(value) is not bool
    if not fits or float(value) < 0:  # type: ignore[arg-type]
        wanted = "a whole number, 1 or more" if whole else "a number, 0 or more"
        raise ClusterError(f"The setting {name} of a launcher is {wanted}; got {value!r}.")


def outcome_of(told: Mapping[str, Any], *, again: bool = False) -> CellOutcome:
    """Returns the outcome that `work` tells; a cell that was taken up ``again`` and is finished was done now."""
    status: Any = "done" if again and told["status"] == "skipped" else told["status"]
    return CellOutcome(told["name"], status, told.get("seconds", 0.0), told.get("problem", ""))
