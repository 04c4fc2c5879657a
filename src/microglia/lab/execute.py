"""Execution of a recipe, from task to result; every stage is durable."""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.batch import call, to_device
from microglia.core.callbacks import Callback, log_of_stages
from microglia.core.devices import device_of
from microglia.core.errors import FileError
from microglia.core.roles import means_role
from microglia.core.timing import processor_name
from microglia.lab.accelerating import accelerated
from microglia.lab.recipe import Recipe, RecipeError, as_dict, begun, completed, method_config, start_of
from microglia.lab.recipe_task import build_task
from microglia.lab.result import Result
from microglia.measure import measure_latency
from microglia.methods import MethodConfig, methods
from microglia.methods.procedure import observe
from microglia.storage.archive import check_whole, load, save, saved_bytes
from microglia.storage.changes import changes_of
from microglia.storage.code_folder import ENVIRONMENT, origins
from microglia.storage.files import write_atomic
from microglia.storage.run import Run
from microglia.tasks.classification import check_fit
from microglia.tasks.roles import with_roles
from microglia.tasks.task import Task, Telling
from microglia.track import Place, opened, trackers
from microglia.train.engine import accelerator

BUDGET = ("density", "params", "flops", "ms")
"""Terms of a budget; most methods that mask support only the first two."""
ROUTED = 32
"""Number of test images to time an execution whose time depends on the input."""


def make_task(recipe: Recipe) -> Task:
    """Returns the task that a recipe names, with roles of layers if a selector of the recipe needs them."""
    task = build_task(recipe)
    named = chain.from_iterable(value for value in recipe.prune.values() if isinstance(value, list | tuple))
    return with_roles(task) if means_role(named) else task


def execute(
    recipe: Recipe, directory: Path | None = None, *, starts: Path | None = None, callbacks: Sequence[Callback] = ()
) -> Result:
    """Runs a recipe and returns its result, which a run directory keeps as ``result.json``.

    A finished run is not repeated: its result is returned. An interrupted run resumes. Runs with the same ``starts``, a
    directory, train a dense network that they have in common once: equal model, data, training and seed.

    The result has typed fields (see `microglia.lab.result.Result`), and is the dict that ``result.json`` holds. The dict has
    ``recipe``; ``environment``; ``units`` (of each metric: ``%`` for a fraction that is shown in per cent); ``asked`` and
    ``masks`` (requested budget, kept weights among the masked ones); ``densities`` (kept fraction of each masked layer);
    ``search`` (the search of a method that learns its masks); ``removed`` (losses of a shrunk model by layer; None for a masked
    one); ``saved`` (bytes of the written file ``model.safetensors``, masks included; None without a directory); ``dense``,
    ``before`` and ``pruned`` (each with ``metrics`` on ``measure.split``, ``parameters``, ``macs``, ``bytes``; ``before`` is
    the pruned model before recovery, if the method has such a moment); further observations of the method, such as
    ``estimate`` and ``routes`` of a model that chooses its computation by input; ``latency``; ``seconds``.

    ``callbacks``, and the trackers that the recipe names in ``track``, are told of stages, epochs and the result: callbacks on
    every rank, trackers on the first one. A finished run tells nothing.

    Raises:
        MicrogliaError: An error that the user can correct; the text says how.
    """
    recipe = begun(recipe, directory)
    engine = accelerator(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    # Errors of a new recipe appear before its directory is made; a known directory answers before data are read.
    prepared = None if directory is not None and (directory / "recipe.yaml").exists() else prepare(recipe)
    run = Run(directory, as_dict(recipe), seed=recipe.seed, device=engine.device.type, identity=completed)
    run.trajectory, run.split = recipe.measure.trajectory, recipe.measure.split
    run.shared = None if starts is None else starts / start_of(as_dict(recipe))
    try:
        finished = _finished(run)
        if finished is not None:
            log_of_stages.info("%s: already finished", directory)
            return finished
        run.callbacks.all += callbacks  # first: they are closed if a tracker cannot be opened
        run.callbacks.all += _trackers(recipe, run)
        return _execute(recipe, run, prepared or make_task(recipe))
    finally:
        run.close()


def _trackers(recipe: Recipe, run: Run) -> Sequence[Callback]:
    """Returns the open trackers of a recipe, on the first rank."""
    if not recipe.track or not run.main:
        return ()
    if run.directory is None:
        raise RecipeError("Trackers follow a run that has a directory: name one, such as --out runs/a, or leave out `track`.")
    return opened(recipe.track, Place(run.directory, run.directory.name, as_dict(recipe)))


def _finished(run: Run) -> Result | None:
    """Returns the result of a finished run with a complete model; else None, because its stages can make both again."""
    result = run.result
    if result is None or run.directory is None:
        return None
    try:
        check_whole(run.directory / "model")
    except FileError as error:
        warnings.warn(f"{error} The model is made again.", stacklevel=3)
        return None
    try:
        return Result.of(result)
    except ValueError as error:
        raise FileError(
            f"{run.directory / 'result.json'} is damaged: {error}. Remove the file, and the same command makes it again."
        ) from None


def prepare(recipe: Recipe) -> Task:
    """Returns the recipe's task, after checking that its pruning fits the model.

    Raises:
        MicrogliaError: Model, data, checkpoint, layers, pattern or budget are not valid.
    """
    task = make_task(recipe)
    check_fit(task.build(), task)
    for name in recipe.track:
        trackers[name]
    methods[recipe.method].check(task, method_config(recipe))
    return task


def _execute(recipe: Recipe, run: Run, task: Task) -> Result:
    began = time.perf_counter()
    if run.directory is not None and run.main:
        found = {**environment(), **origins(as_dict(recipe))}
        write_atomic(run.directory / ENVIRONMENT, json.dumps(found, indent=2) + "\n")
    config = method_config(recipe)
    model = methods[recipe.method].procedure(task, run, config)
    observe(task, run, "pruned", model)
    if run.directory is not None and run.main:
        save(model, run.directory / "model")
        prove_equal(model, run.directory / "model", task.build())
        task.deliver(model, run.directory)
    changes = changes_of(model)
    changed: dict[str, Any] = {"masks": {"kept": 0, "total": 0}, "densities": {}, "removed": None}
    for done in changes.values():
        changed.update(done.kind.result(done.value, model, task.build))
    result: dict[str, Any] = {
        "recipe": as_dict(recipe),
        "environment": environment(),
        "task": task.name,
        "headline": task.headline,
        "units": {name: metric.unit for name, metric in task.metrics.items()},
        "normalization": None,
        **(task.data.told() if isinstance(task.data, Telling) else {}),
        "asked": _asked(config, masked=not any(done.kind.cuts or done.kind.chooses for done in changes.values())),
        **changed,
        "saved": None if run.directory is None else saved_bytes(run.directory),
        **run.observations,
        **_times(recipe, task, model, run.main),
        "seconds": round(time.perf_counter() - began, 2),
    }
    run.finish(result)
    return Result.of(result)


def prove_equal(model: nn.Module, directory: Path, fresh: nn.Module) -> None:
    """Raises unless the saved model, loaded again into a fresh one, has the same bits."""
    mine, theirs = model.state_dict(), load(directory, fresh).state_dict()
    different = sorted(mine.keys() ^ theirs.keys())
    different = different or [name for name in mine if not torch.equal(mine[name], theirs[name].to(mine[name].device))]
    if different:
        raise FileError(f"The model saved in {directory} does not read back bit for bit ({different[0]}); check the disk.")


def _asked(config: MethodConfig, *, masked: bool) -> dict[str, Any]:
    terms = {term: getattr(config, term) for term in BUDGET}
    usual = BUDGET[:2] if masked else BUDGET
    return {term: value for term, value in terms.items() if term in usual or value is not None} | config.asked_besides()


def _times(recipe: Recipe, task: Task, model: nn.Module, main: bool) -> dict[str, Any]:
    """Returns the times of the dense and the pruned model and, if requested, the record of the accelerated model."""
    asked = recipe.measure
    if not main or not (asked.latency or asked.accelerate):
        return {"latency": None}
    device = device_of(model)
    example = to_device(task.example_batch(asked.batch), device)
    ready: dict[str, Callable[[], object]] = {}
    record: dict[str, Any] = {}
    for done in changes_of(model).values():
        ready |= done.kind.executions(model, to_device(task.example, device), partial(_batches, task, asked.batch, device))
    if asked.accelerate:
        fast, record["accelerated"] = accelerated(model, task, asked.batch, against=asked.executions)
        ready["accelerated"] = lambda: call(fast, example)
    if not asked.latency:
        return {"latency": None, **record}
    models = {"dense": task.build().to(device), "pruned": model}
    executions, rounds = asked.executions, asked.rounds
    report = measure_latency(models, example, executions=executions, ready={"pruned": ready}, rounds=rounds)
    return {"latency": report.to_dict(), **record}


def _batches(task: Task, batch: int, device: torch.device) -> Sequence[Tensor]:
    """Returns test images in batches that all have the same size."""
    images, _ = next(iter(task.data.batches("test", max(ROUTED, batch)).epoch(0)))
    return images.to(device).split(batch)[: max(1, len(images) // batch)]  # type: ignore[no-any-return]


def environment() -> dict[str, Any]:
    """Returns the environment of a run: versions, machine and threads."""
    return {
        "microglia": version("microglia"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
