"""The worker process of the coverage benchmark: one model after another, every step reported when it is done."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

import microglia as mg
from coverage_checks import call, compiled, equality, reloaded, train_step
from models import Case, cases, randomize

Update = dict[str, Any]


@dataclass
class Subject:
    """A model under test.

    Attributes:
        case: Where it comes from.
        model: Dense, with random statistics, in evaluation mode.
        inputs: What it is pruned with.
        others: What it is compared with.
        size: Of the images.
        trains: Whether the dense model runs forward and backward.
    """

    case: Case
    model: nn.Module
    inputs: Any
    others: Any
    size: int
    trains: bool


@cache
def known(family: str) -> dict[str, Case]:
    return {case.name: case for case in cases(family)}


def serve(connection: Connection) -> None:
    """Answers (family, name, job, options) with updates; None ends an answer, and as a request the process."""
    warnings.simplefilter("ignore")
    silence()
    warm_up()
    connection.send({})
    subject: Subject | None = None
    while (request := connection.recv()) is not None:
        family, name, job, options = request
        try:
            if subject is None or subject.case.name != name:
                subject = None
                gc.collect()
                subject = prepare(known(family)[name])
                parameters = sum(p.numel() for p in subject.model.parameters())
                connection.send({"size": subject.size, "parameters": parameters, "trains": subject.trains})
            for update in JOBS[job](subject, options):
                connection.send(update)
        except Exception as error:
            connection.send({f"{job}_why": f"the benchmark itself: {said(error)}"})
        connection.send(None)


def silence() -> None:
    """Drops what this process prints: a failed trace prints its whole graph."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def warm_up() -> None:
    """Lets both sides import what they need, so that the first model does not pay for it."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    for prune in (ours, theirs):
        try:
            prune(deepcopy(net).eval(), (torch.randn(2, 3, 8, 8),), (4,))
        except Exception:  # the models will say it
            continue


def prepare(case: Case) -> Subject:
    """Builds a model and finds the smallest image it runs and trains at."""
    torch.manual_seed(0)
    model = randomize(case.build()).eval()
    problem: Exception | None = None
    for trains in (True, False):
        for size in case.sizes:
            torch.manual_seed(1)
            inputs, others = case.inputs(size), case.inputs(size)
            try:
                with torch.no_grad():
                    call(model, inputs)
                if trains:
                    train_step(deepcopy(model), inputs)
            except Exception as error:
                problem = problem or error
                continue
            return Subject(case, model, inputs, others, size, trains)
    raise RuntimeError(f"the dense model does not run: {problem}")


def said(error: BaseException) -> str:
    """Returns the first lines of an error on one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:400]


def step(name: str, action: Callable[[], Any]) -> Update:
    """Runs one check; returns whether it held, and why not."""
    start = time.perf_counter()
    try:
        result = action()
    except Exception as error:
        return {name: False, f"{name}_why": said(error)}
    return {name: True, f"{name}_seconds": time.perf_counter() - start, f"{name}_result": result}


# ------------------------------------------------------------------------------------------------------------ both sides
def ours(model: nn.Module, inputs: Any, heads: tuple[int, ...], keep_class: bool = False) -> nn.Module:
    return mg.prune_channels(model, inputs, mg.Budget(density=0.5), round_to=1, keep_class=keep_class)


def theirs(model: nn.Module, inputs: Any, heads: tuple[int, ...]) -> nn.Module:
    """Torch-Pruning with its defaults, in place; it has to be told the heads."""
    import torch_pruning as tp

    layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))
    last = [m for m in layers if (m.out_features if isinstance(m, nn.Linear) else m.out_channels) in heads]
    importance = tp.importance.GroupMagnitudeImportance()
    tp.pruner.BasePruner(model, inputs, importance=importance, pruning_ratio=0.5, ignored_layers=last).step()
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def job_ours(subject: Subject, options: Update) -> Iterator[Update]:
    update = step("prune", lambda: ours(subject.model, subject.inputs, subject.case.heads))
    small = update.pop("prune_result", None)
    if small is None:
        yield update | {"traced": "TraceError" not in update["prune_why"]}
        return
    plan = mg.graph.plan_of(small)
    told = {"kind": plan.kind, "groups": plan.found, "groups_pruned": plan.pruned, "error64": plan.error, "notes": plan.notes}
    before, after = plan.parameters
    share = {"params_kept": after / before, "macs_kept": plan.macs[1] / max(1, plan.macs[0])}
    yield update | told | share | {"traced": True, "state_kept": parameters(small) / parameters(subject.model)}
    equal = step("equal", lambda: equality(subject.model, small, subject.others))
    if equal["equal"]:
        equal["error32"], equal["reference"] = equal.pop("equal_result")
    yield equal
    if subject.trains:
        yield step("train", lambda: train_step(deepcopy(small), subject.inputs))
    yield step("saved", lambda: reloaded(small, subject.case.build().train(small.training), subject.others))
    if options["compile"]:
        update = step("compiled", lambda: compiled(small, subject.others, options["compile"]))
        if not update["compiled"]:
            update["dense_compiled"] = step("dense", lambda: compiled(subject.model, subject.others, options["compile"]))[
                "dense"
            ]
        yield update


def job_keep_class(subject: Subject, options: Update) -> Iterator[Update]:
    update = step("keep_class", lambda: ours(subject.model, subject.inputs, subject.case.heads, keep_class=True))
    if (small := update.pop("keep_class_result", None)) is not None:
        before, after = mg.graph.plan_of(small).parameters
        update |= {"keep_class_kept": after / before, "keep_class_type": type(small) is type(subject.model)}
    yield update


def job_theirs(subject: Subject, options: Update) -> Iterator[Update]:
    model = deepcopy(subject.model)
    update = step("theirs_prune", lambda: theirs(model, subject.inputs, subject.case.heads))
    update.pop("theirs_prune_result", None)
    yield update | {"theirs_kept": parameters(model) / parameters(subject.model)}
    if update["theirs_prune"]:
        check = train_step if subject.trains else call
        yield step("theirs_runs", lambda: check(model, subject.inputs) and None)


JOBS: dict[str, Callable[[Subject, Update], Iterator[Update]]] = {
    "ours": job_ours,
    "keep_class": job_keep_class,
    "theirs": job_theirs,
}
