"""A run: one durable execution in one directory; every stage is finished once and can be resumed at any moment."""

from __future__ import annotations

import fcntl
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import yaml
from torch import Tensor

from microglia.core.callbacks import Callbacks, Lines
from microglia.core.errors import FileError, RunError
from microglia.storage.files import State, parse, read_state, write_atomic, write_state, write_tensors
from microglia.storage.plain_yaml import read_yaml_text

PLACE = "place"
"""Kind of the files that hold the parameters at one moment of a training."""
TRAJECTORY = "trajectory"
"""Directory in a run for the parameter files of its last training."""
SHOWN = "shown"
"""Directory in a run for predictions on a few test examples, a file for each model."""
DENSE_STAGES = ("dense", "dense-observed")
"""Stages that only the start of a recipe decides, so that runs with the same start can share them."""


@dataclass
class Progress:
    """The progress of an unfinished stage.

    Attributes:
        state: The last saved state of the interrupted attempt, or None for a fresh start.
    """

    state: State | None
    _save: Callable[[State], None]

    def save(self, state: State) -> None:
        """Saves ``state``, from which an interrupted stage resumes."""
        self._save(state)


class Run:
    """One execution. With a directory its stages are durable; without one they only run.

    A run directory holds ``recipe.yaml``, ``environment.json``, ``metrics.jsonl``, ``stages/``, ``result.json`` and
    ``model/``. Writes are atomic, so a killed process leaves no partial file. On several ranks only the first writes.

    Args:
        directory: Directory for all files of the run, or None.
        recipe: The recipe of the run; a directory of another recipe is refused.
        seed: Root of every random number of the run.
        device: Device of the computation.
        identity: Maps a recipe to its identity, which must be equal for this recipe and the one in the directory.

    Attributes:
        observations: Measurements of the model during the run, by name (``dense``, ``before`` ...).
        trajectory: Whether trainings keep their parameters after every epoch.
        split: Split that the metrics of `observations` are about: ``test`` or ``validation``.
        callbacks: `microglia.core.callbacks.Lines` on the first rank, and what is added to it.
        shared: Directory in which runs with the same start keep `DENSE_STAGES` for each other, or None.

    Raises:
        RunError: The directory belongs to another recipe, or another process works in it.
    """

    def __init__(
        self,
        directory: Path | None = None,
        recipe: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
        identity: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        self.directory, self.seed, self.device = directory, seed, torch.device(device)
        self._identity = identity
        self.recipe = json.loads(json.dumps(dict(recipe or {})))  # in the form of its file
        self.observations: dict[str, dict[str, Any]] = {}
        self.trajectory = False
        self.split: Literal["test", "validation"] = "test"
        self.shared: Path | None = None
        self.main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self.callbacks = Callbacks([Lines()] if self.main else [])
        self._lock: TextIO | None = None
        if directory is not None and self.main:
            self._claim(directory)

    def _claim(self, directory: Path) -> None:
        try:
            (directory / "stages").mkdir(parents=True, exist_ok=True)
            self._lock = (directory / ".lock").open("w")
        except OSError as error:
            raise RunError(f"Cannot use {directory} for a run: {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"Another process is running in {directory}; wait for it or choose another directory.") from None
        path = directory / "recipe.yaml"
        if path.exists():
            self._refuse_other_recipe(path)
            for debris in directory.rglob(".*.part"):  # left by a process that was killed while it wrote
                debris.unlink(missing_ok=True)
        else:
            write_atomic(path, yaml.safe_dump(self.recipe, sort_keys=False))

    def _refuse_other_recipe(self, path: Path) -> None:
        try:
            before = read_yaml_text(path) or {}
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is not readable YAML; the directory is not a run of this library.") from error
        if not isinstance(before, Mapping):
            raise RunError(f"{path} holds no recipe; the directory is not a run of this library.")
        old, new = flatten(self._identity(before)), flatten(self._identity(self.recipe))
        changed = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if changed:
            raise RunError(
                f"{path.parent} holds a run of another recipe ({'; '.join(changed[:5])}). Give --out another directory, or "
                "remove this one."
            )

    def stage(self, name: str, work: Callable[[Progress], State]) -> State:
        """Returns the final state of a stage: from its file if it was finished before, else by running ``work``.

        Args:
            name: File name of the stage, unique in the run.
            work: Returns the final state; it gets a `Progress` to resume from and to save to.
        """
        if self.directory is None:
            return self._worked(name, work, Progress(None, lambda state: None))
        final = self.directory / "stages" / f"{name}.safetensors"
        partial = self.directory / "stages" / f"{name}.partial.safetensors"
        state = _read_if_whole(final)
        if state is not None:
            self.callbacks.on_stage(name, "found")
        else:
            with self._sharing(name) as common:
                state = None if common is None else self._take(name, common)
                if state is None:
                    state = self._worked(name, work, Progress(_read_if_whole(partial), lambda s: self._write(partial, s)))
                    if common is not None:
                        self._give(name, common, state)
            self._write(final, state)
        if self.main:  # also a file left by a process that was killed between the two
            partial.unlink(missing_ok=True)
        return state

    def _worked(self, name: str, work: Callable[[Progress], State], progress: Progress) -> State:
        """Runs the work of a stage; the callbacks are told when it begins and ends."""
        rows = progress.state.get("rows", ()) if isinstance(progress.state, Mapping) else ()
        self.callbacks.on_stage(name, "resumed" if rows else "began", len(rows))
        state = work(progress)
        self.callbacks.on_stage(name, "finished")
        return state

    @contextmanager
    def _sharing(self, name: str) -> Iterator[Path | None]:
        """Holds the lock of a stage that runs share; yields its file. Another run that works on the stage is waited for."""
        if self.shared is None or name not in DENSE_STAGES or torch.distributed.is_initialized():
            yield None
            return
        self.shared.mkdir(parents=True, exist_ok=True)
        with (self.shared / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a killed process lets go of it
            yield self.shared / f"{name}.safetensors"

    def _take(self, name: str, common: Path) -> State | None:
        """Returns the state of a stage that another run finished, or None; takes the stage's rows of the metrics too."""
        state = _read_if_whole(common)
        if state is not None:
            self.callbacks.on_stage(name, "found")
        if state is not None and (rows := _read_rows(common.with_suffix(".jsonl"))):
            self._write_rows(name, [{k: v for k, v in json.loads(row).items() if k != "stage"} for row in rows])
        return state

    def _give(self, name: str, common: Path, state: State) -> None:
        """Keeps the finished state of a stage, and its rows of the metrics, for other runs."""
        assert self.directory is not None
        rows = [row for row in _read_rows(self.directory / "metrics.jsonl") if json.loads(row)["stage"] == name]
        write_atomic(common.with_suffix(".jsonl"), "".join(f"{row}\n" for row in rows))
        write_state(common, state)

    def _write(self, path: Path, state: State) -> None:
        if self.main:
            write_state(path, state)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def log(self, stage: str, rows: list[dict[str, Any]]) -> None:
        """Writes ``rows`` as the rows of a stage in ``metrics.jsonl``, after those of earlier stages; the last one is new."""
        if rows:
            self.callbacks.on_epoch(stage, rows[-1])
        self._write_rows(stage, rows)

    def _write_rows(self, stage: str, rows: list[dict[str, Any]]) -> None:
        if self.directory is None or not self.main:
            return
        path = self.directory / "metrics.jsonl"
        kept = [line for line in _read_rows(path) if json.loads(line)["stage"] != stage]
        write_atomic(path, "".join(f"{line}\n" for line in [*kept, *(json.dumps({"stage": stage, **row}) for row in rows)]))

    def keep_place(self, epoch: int, parameters: Mapping[str, Tensor]) -> None:
        """Keeps the parameters after an epoch if the run keeps a trajectory."""
        if self.trajectory and self.directory is not None and self.main:
            write_tensors(self.directory / TRAJECTORY / f"{epoch:06d}.safetensors", parameters, kind=PLACE)

    def show(self, name: str, shown: Any) -> None:
        """Writes a model's predictions on a few test examples to ``shown/NAME.json``, for the pictures of reports."""
        if self.directory is not None and self.main:
            write_atomic(self.directory / SHOWN / f"{name}.json", json.dumps(shown) + "\n")

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, or None; a damaged result counts as None, because the stages can make it again."""
        path = self.directory / "result.json" if self.directory else None
        if path is None or not path.exists():
            return None
        try:
            return read_json(path)
        except FileError as error:
            warnings.warn(f"{error} It is made again.", stacklevel=2)
            return None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json``: the run is finished and will not run again; the callbacks get the result."""
        if self.directory is not None and self.main:
            write_atomic(self.directory / "result.json", json.dumps(result, indent=2) + "\n")
        self.callbacks.on_result(result)

    def close(self) -> None:
        """Closes the callbacks, and lets another process use the directory."""
        try:
            self.callbacks.close()
        finally:
            self.release()

    def release(self) -> None:
        """Lets another process use the directory; all that a forked process has to give back of its parent's run."""
        if self._lock is not None:
            self._lock.close()


def _read_if_whole(path: Path) -> State | None:
    """Returns a stage's state, or None if it must be computed (again); runs are seeded, so the result is the same."""
    if not path.exists():
        return None
    try:
        return read_state(path)
    except FileError as error:
        warnings.warn(f"{error} This stage is computed again.", stacklevel=3)
        return None


def _read_rows(path: Path) -> list[str]:
    """Returns the lines of a metrics file; a damaged file counts as empty, because the stages hold the same rows."""
    try:
        lines = path.read_text().splitlines()
        return lines if all("stage" in json.loads(line) for line in lines) else []
    except (OSError, ValueError, TypeError):
        return []


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        FileError: The file is not a readable JSON object.
    """
    try:
        content = parse(path.read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is damaged or not a JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} holds no JSON object.")
    return content


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping with dotted keys, such as ``{"train.epochs": 3}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
