"""The durable stages of procedures: dense model, a change or a cut of it, training, observation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import fields, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from microglia.core.batch import to_device
from microglia.core.errors import ScoreError
from microglia.core.layers import effective_state
from microglia.core.patterns import parse_pattern
from microglia.core.restore import restore
from microglia.graph import permutation_of, permute_channels, plan_of, shrink
from microglia.graph.channels.widths import TOLERANCE
from microglia.graph.cutting.plan import attach
from microglia.measure import measure
from microglia.methods.config import MethodConfig, Permuting, UnitConfig
from microglia.methods.pruner import Pruner, PrunerProtocol
from microglia.methods.unit_pruner import UnitPruner
from microglia.methods.what import PruneConfig
from microglia.scores import Evidence
from microglia.storage.changes import changes_of, decode, replay
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.engine import rank_and_world
from microglia.train.evaluate import evaluate
from microglia.train.fit import fit
from microglia.train.optim import FitConfig, epoch_length
from microglia.train.recover import recalibrate_on


def change(run: Run, name: str, model: nn.Module, work: Callable[[Progress], Any]) -> Any:
    """Runs ``work``, which changes the model in place, as a stage; a finished stage's model is restored instead.

    It returns the result of ``work``, computed now or at the first time.
    """

    def stage(progress: Progress) -> dict[str, Any]:
        said = work(progress)
        return {"model": model.state_dict(), "said": said}

    done = run.stage(name, stage)
    restore(model, done["model"])
    return done.get("said")


def cut(task: Task, run: Run, name: str, model: nn.Module, work: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Returns the smaller model that ``work`` makes of a dense or cut model, as a stage.

    The stage stores the plan of all removals and the state. The plan is always replayed on a freshly built model, so that a new
    cut and a cut read from its file are equal. Every rank uses the first rank's plan, because times differ.
    """

    def stage(progress: Progress) -> dict[str, Any]:
        small = work(model)
        made = [{"plan": plan_of(small).to_dict(), "model": small.state_dict(), **_forms(small)}]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(made)
        return made[0]

    done = run.stage(name, stage)
    again = decode({**done.get("forms", {}), "shrunk": done["plan"]}, done["model"])
    return restore(replay(task.build().to(run.device), again), done["model"])


def _forms(model: nn.Module) -> dict[str, Any]:
    """Returns the changes to replay before the plan of a cut, as JSON by field, under one key; empty without any."""
    found = {key: done.kind.encode(done.value) for key, done in changes_of(model).items() if done.kind.forms}
    return {"forms": found} if found else {}


def train(
    task: Task,
    run: Run,
    name: str,
    model: nn.Module,
    config: FitConfig,
    *,
    pruner: Callable[[], PrunerProtocol] | None = None,
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Trains a model in place as a stage, durable at every epoch; returns the pruner's report.

    The pruner is made only if the stage really runs, because it changes the model; it is also finished there.
    """
    own = set(dict(task.build().named_parameters())) if run.trajectory and name == "train" else set()

    def log(rows: list[dict[str, Any]]) -> None:
        run.log(name, rows)
        if own:
            run.keep_place(len(rows), {n: v for n, v in effective_state(model).items() if n in own})

    def work(progress: Progress) -> dict[str, Any]:
        made = pruner() if pruner is not None else None
        fit(
            model,
            task,
            config,
            seed=run.seed,
            device=run.device.type,
            pruner=made,
            teacher=teacher,
            progress=progress,
            log=log,
            title=name,
        )
        if made is None:
            return {}
        made.finish()
        return made.report()

    return cast("dict[str, Any]", change(run, name, model, work))


def dense_model(task: Task, run: Run, config: FitConfig) -> nn.Module:
    """Returns the task's dense model, trained here unless it is pretrained, and observes it."""
    model = task.build().to(run.device)
    if not task.pretrained:
        train(task, run, "dense", model, config)
    observe(task, run, "dense", model)
    return model


def dense_in_order(task: Task, run: Run, config: MethodConfig) -> nn.Module:
    """Returns the task's dense model as a stage, with channels permuted for the pattern if the config requests it."""
    model = dense_model(task, run, config.dense)

    def work(progress: Progress) -> dict[str, Any]:
        permuted = permute_channels(
            model,
            to_device(task.example, run.device),
            parse_pattern(config.pattern),
            density=_densities(model, config),
            generator=torch.Generator().manual_seed(run.seed),
        )
        model.load_state_dict(permuted.state_dict())
        return permutation_of(permuted).to_dict()

    if isinstance(config, Permuting) and config.permute:
        run.observations["permutation"] = change(run, "permute", model, work)
    return model


def _densities(model: nn.Module, config: MethodConfig) -> dict[str, float]:
    """Returns the density that the scope gives each layer by magnitude; protected layers stay whole in every order."""
    shared = {f.name: getattr(config, f.name) for f in fields(PruneConfig)}
    pruner = Pruner(deepcopy(model), PruneConfig(**shared | {"score": "magnitude"}))
    found = {name: float(kept.float().mean()) for name, kept in pruner.prune_to(pruner.target).items()}
    return {name: density for name, density in found.items() if name not in pruner.protected}


def observe(task: Task, run: Run, name: str, model: nn.Module) -> None:
    """Measures the current model, once: metrics on the run's split, parameters, MACs, bytes.

    Predictions on a few test examples, if the task shows any, go to a file of the run.
    """

    def stage(progress: Progress) -> dict[str, Any]:
        metrics = evaluate(model, task, run.split)
        return {"metrics": metrics, **measure(model, to_device(task.example, run.device), latency=False).to_dict()}

    observed = f"{name}-observed" if run.split == "test" else f"{name}-observed-{run.split}"  # runs share the first name
    run.observations[name] = run.stage(observed, stage)
    if task.show is not None and run.directory is not None:
        run.show(name, task.show(model))


def evidence(task: Task, run: Run, config: MethodConfig, *, per_class: int | None = None, halves: bool = False) -> Evidence:
    """Returns the evidence for a score: shuffled training batches without augmentation, loss and a seeded generator.

    Args:
        task: Data and loss.
        run: Seed and device.
        config: Number of batches and of examples in each.
        per_class: Examples of every class instead, over all ranks, in batches of the same size; only for classification.
        halves: Whether these form two batches instead, the halves of the examples sorted by class.
    """
    rank, world = rank_and_world()
    batches = task.data.batches("train", config.score_batch_size, seed=run.seed, shuffle=True, rank=rank, world=world)
    drawn: Iterable[tuple[Tensor, Tensor]] = islice(batches.epoch(0), config.score_batches)
    if per_class is not None:
        drawn = _balanced(batches.epoch(0), -(-per_class // world), None if halves else config.score_batch_size)
    chosen = [to_device(batch, run.device) for batch in drawn]
    generator = torch.Generator().manual_seed(run.seed)
    return Evidence(chosen, task.loss, generator, forward=task.forward, count=task.count)


def _balanced(batches: Iterable[tuple[Tensor, Tensor]], per_class: int, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the first examples of every class, up to a number, in batches of a given size.

    A size of None sorts them by class and yields two halves, the first of which is the smaller one (GraSP's code).
    """
    found: dict[int, int] = {}
    kept: list[tuple[Tensor, Tensor]] = []
    for inputs, targets in batches:
        if not isinstance(targets, Tensor) or not isinstance(inputs, Tensor) or targets.ndim != 1:
            shown = (
                f"have the shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else f"are a {type(targets).__name__}"
            )
            raise ScoreError(f"Examples of each class need one tensor of inputs and one label each; these targets {shown}.")
        take = []
        for number, target in enumerate(targets.tolist()):
            found[target] = found.get(target, 0) + 1
            if found[target] <= per_class:
                take.append(number)
        kept.append((inputs[take], targets[take]))
        if min(found.values()) >= per_class and len(take) == 0:  # a whole batch without new examples
            break
    if not kept:
        raise ScoreError("There are no training examples to score with.")
    inputs, targets = (torch.cat(parts) for parts in zip(*kept, strict=True))
    half = len(targets) // 2
    if size is None:
        order = targets.argsort(stable=True)
        inputs, targets = inputs[order], targets[order]
    parts = [half, len(targets) - half] if size is None else size
    yield from zip(torch.split(inputs, parts), torch.split(targets, parts), strict=True)


def searched(task: Task, run: Run, config: UnitConfig, pruner: type[UnitPruner]) -> nn.Module:
    """Returns the dense model trained with a pruner that searches within the training; channels are removed at the end."""
    model = dense_in_order(task, run, config)
    teacher = deepcopy(model) if config.train.distill else None
    steps = config.train.epochs * epoch_length(config.train, len(task.data.batches("train", config.train.batch_size)))

    def moment(name: str) -> dict[str, float]:
        if name == "hard":
            recalibrate_on(model, task, batch_size=config.train.batch_size, count=config.recalibrate, seed=run.seed)
        return evaluate(model, task, "validation")

    def make() -> UnitPruner:
        return pruner(
            model,
            config,
            total_steps=max(1, steps),  # without epochs finish() makes the masks
            example_inputs=to_device(task.example, run.device),
            evidence=evidence(task, run, config),
            at_freeze=moment,
        )

    run.observations["search"] = train(task, run, "train", model, config.train, pruner=make, teacher=teacher)
    if config.pattern == "channel":
        model = cut(task, run, "shrink", model, lambda masked: _shrunk(masked, task, run, config))
    return model


def _shrunk(masked: nn.Module, task: Task, run: Run, config: UnitConfig) -> nn.Module:
    """Returns a masked model without its masked channels; for a budget of operations the plan says what came out."""
    small = shrink(masked, to_device(task.example, run.device))
    if config.flops is None:
        return small
    plan = plan_of(small)
    got = plan.macs[1] / plan.macs[0]
    far = abs(got / config.flops - 1) > TOLERANCE
    notes = [f"The nearest channels have flops {got:.4g} (asked {config.flops:.4g}): one channel is more."] if far else []
    return attach(small, replace(plan, asked={"flops": config.flops}, got={"flops": got}, notes=(*plan.notes, *notes)))
