"""The target of a command: a run, a saved model (of a run or alone), or a network by name."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from microglia.core.errors import RunError
from microglia.core.registry import unknown_name
from microglia.lab.execute import make_task
from microglia.lab.recipe import put, read_yaml, resolve
from microglia.storage.archive import PLAN, load
from microglia.storage.code_folder import admit
from microglia.storage.run import read_json
from microglia.tasks.classification import check_fit
from microglia.tasks.task import Task
from microglia.zoo import is_known, model_names


def open_target(target: str, data: str | None = None, checkpoint: str | None = None) -> tuple[nn.Module, Task]:
    """Returns the model and the task of a target.

    Args:
        target: A run directory; a directory that `save` wrote (inside a run the run's data are used); or a model's name.
        data: Data set instead of the run's own; by default ``digits`` for a model's name.
        checkpoint: Trained weights of a model by name.

    Raises:
        RunError: The directory is neither a run nor a saved model.
        FileError: A file of the directory names a model that it may not name; see `microglia.zoo.trust`.
    """
    path = Path(target)
    if (path / "recipe.yaml").is_file():
        if not (path / "model" / PLAN).is_file():
            raise RunError(f"The run in {path} has no model yet; start it again to finish it.")
        task = _task_of(path, data)
        return load(path / "model", task.build()), task
    if (path / PLAN).is_file() and (path.resolve().parent / "recipe.yaml").is_file():
        task = _task_of(path.resolve().parent, data)
        return load(path, task.build()), task
    if (path / PLAN).is_file():
        source = read_json(path / PLAN).get("source")
        if not source:
            raise RunError(f"{path} does not say which network it is; load it in Python: microglia.load(path, model).")
        network = load(path)  # first, because it refuses names that need trust
        return network, _task_named(source["name"], data)
    if path.is_dir():
        raise RunError(f"{path} is neither a run directory (recipe.yaml) nor a saved model ({PLAN}).")
    if ":" not in target and (path.parent != Path() or target in ("", ".", "..")):
        raise RunError(f"There is no run directory or saved model {target}; give one, or a model's name such as resnet20.")
    if ":" not in target and not is_known(target):
        raise unknown_name("run directory, saved model or network", target, model_names())
    task = _task_named(target, data, checkpoint)
    model = task.build()
    check_fit(model, task)
    return model, task


def _task_named(model: str, data: str | None, checkpoint: str | None = None) -> Task:
    return make_task(resolve({"model": model, "checkpoint": checkpoint, **({"data": data} if data else {})}))


def _task_of(run: Path, data: str | None) -> Task:
    source = read_yaml(run / "recipe.yaml")
    if data and isinstance(source.get("task"), dict) and "data" in source["task"]:
        source = put(source, "task.data", data)
    admit({**source, "data": data or source.get("data")}, run / "recipe.yaml")
    return make_task(resolve({**source, **({"data": data} if data else {})}))
