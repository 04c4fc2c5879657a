"""The method `ftwt`: gates are planned for a budget, fitted and calibrated if requested, trained with `Ftwt`, observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from microglia.core.devices import device_of
from microglia.dynamic import (
    COUNTS,
    Counter,
    Flow,
    GatePlan,
    attach_gates,
    calibrate,
    choose_r,
    estimate,
    fit_heads,
    shares,
    start_static,
    static_masks,
)
from microglia.methods.config import method
from microglia.methods.ftwt import Ftwt
from microglia.methods.ftwt_config import UNTRAINED, FtwtConfig, plan_gates
from microglia.methods.gate_pruner import observe_routes
from microglia.methods.procedure import change, dense_model, train
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.optim import epoch_length


def fits(task: Task, config: FtwtConfig) -> None:
    """Raises unless the task's model has convolutions to gate and the config a budget."""
    config.check_budget()
    model = task.build().eval()
    plan_gates(model, Flow(model, task.example), config)


@dataclass(frozen=True)
class Planned:
    """The plan before the training.

    Attributes:
        plan: The plan of the gates.
        counter: Counter of operations.
        estimate: Estimated cost of the targets.
    """

    plan: GatePlan
    counter: Counter
    estimate: dict[str, Any] = field(default_factory=dict)


@method(
    "ftwt", FtwtConfig, check=fits, paper="Elkerdawy et al. 2022, arXiv 2110.08232", purpose="channels chosen for each input"
)
def ftwt(task: Task, run: Run, config: FtwtConfig) -> nn.Module:
    """Heads predict per input which channels to compute, trained on each layer's own activation mass."""
    model = dense_model(task, run, config.dense)
    teacher = deepcopy(model) if config.train.distill else None
    planned = plan_before(task, run, config, model)
    run.observations["estimate"] = planned.estimate
    attach_gates(model, planned.plan, torch.Generator().manual_seed(run.seed))
    if config.initial == "fitted":
        run.observations["fitted"] = fitted(task, run, config, model, planned)
    if "static" in (config.initial, config.mode):
        run.observations["static"] = started(task, run, config, model, planned)
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))
    at_rest = calibration(task, run, config, model, planned)
    make = partial(Ftwt, model, config, total_steps=steps, at_rest=at_rest)
    run.observations["heads"] = train(task, run, "train", model, config.train, pruner=make, teacher=teacher)

    observe_routes(task, run, model, planned.counter)
    return model


def fitted(task: Task, run: Run, config: FtwtConfig, model: nn.Module, planned: Planned) -> dict[str, Any]:
    """Fits the heads to their targets as a stage, calibrates them if requested; returns the agreement and the moves."""
    calibrated = calibration(task, run, config, model, planned)

    def work(progress: Progress) -> dict[str, Any]:
        agreement = fit_heads(model, images_of(task, run, config))
        return {"agreement": agreement, "moved": calibrated() if calibrated is not None else {}}

    return cast("dict[str, Any]", change(run, "fit", model, work))


def started(task: Task, run: Run, config: FtwtConfig, model: nn.Module, planned: Planned) -> dict[str, Any]:
    """Makes the heads constants that decide as static masks of the budget, as a stage; returns the cost and kept fractions."""

    def work(progress: Progress) -> dict[str, Any]:
        share = shares(model, images_of(task, run, config), config.images, run.device)
        kept, count = planned.estimate["kept"], config.count
        masks = static_masks(share, kept, planned.counter, flops=config.flops, count=count)
        start_static(model, share, masks)
        costs = planned.counter({layer: mask[None] for layer, mask in masks.items()})
        part = {name: float(getattr(costs, name)[0]) / costs.dense for name in COUNTS}
        return {**part, "kept": {layer: float(mask.double().mean()) for layer, mask in masks.items()}}

    return cast("dict[str, Any]", change(run, "static", model, work))


def calibration(
    task: Task, run: Run, config: FtwtConfig, model: nn.Module, planned: Planned
) -> Callable[[], dict[str, float]] | None:
    """Returns a function that calibrates the heads of a model to the requested operations; None without a budget."""
    asked = config.flops
    if asked is None or not config.calibrate or config.mode in UNTRAINED:
        return None
    kept, count = planned.estimate["kept"], config.count
    return lambda: calibrate(model, images_of(task, run, config), planned.counter, kept, flops=asked, count=count)


def images_of(task: Task, run: Run, config: FtwtConfig) -> Iterator[tuple[Any, Any]]:
    """Returns batches of training images to choose r and to fit and calibrate heads."""
    batches = task.data.batches("train", 128, seed=run.seed, shuffle=True)
    return islice(batches.epoch(0), -(-config.images // 128))


def plan_before(task: Task, run: Run, config: FtwtConfig, model: nn.Module) -> Planned:
    """Returns the gates and their r, chosen as a stage on training images for the budget."""
    config.check_budget()
    plain = task.build().eval()
    flow = Flow(plain, task.example)
    plan = plan_gates(plain, flow, config)
    counter = Counter(plain, flow, plan, task.example)

    def work(progress: Progress) -> dict[str, Any]:
        trial = attach_gates(deepcopy(model), plan)
        share = shares(trial, images_of(task, run, config), config.images, device_of(model))
        if config.flops is not None:
            return asdict(choose_r(share, config.flops, config.rule, counter, config.count))
        assert config.r is not None
        return asdict(estimate(share, config.r, config.rule, counter))

    found: dict[str, Any] = run.stage("estimate", work)
    if config.flops is not None:
        plan = plan.with_r(found["r"])
    if config.mode == "random":
        units = {site.layer: plan.head_of(site)[0] for site in plan.sites}
        keep = {layer: max(1, round(found["kept"][layer] * count)) for layer, count in units.items()}
        plan = replace(plan, keep=keep)
    return Planned(plan, counter, found)
