"""Rewinding: a training as stages that start from any earlier state, bit for bit (Frankle et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from microglia.core.layers import prunable_layers
from microglia.core.masks import enforce, mask
from microglia.core.restore import restore
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task
from microglia.train.fit import fit
from microglia.train.groups import plain_name
from microglia.train.optim import FitConfig

State = dict[str, Any]
"""A training as `microglia.train.fit.fit` saves it: ``model``, ``optimizers``, and a row of every finished epoch."""


def start_of(model: nn.Module) -> State:
    """Returns the state of a training before its first step, with fresh optimizers."""
    return {"model": {name: value.clone() for name, value in model.state_dict().items()}, "optimizers": [], "rows": []}


def advance(
    task: Task,
    run: Run,
    name: str,
    model: nn.Module,
    config: FitConfig,
    *,
    start: State,
    stop: int | None = None,
    seed: int | None = None,
) -> State:
    """Trains from a state to an epoch, as a stage, and returns the whole state there; the model ends in this state.

    Weights, batch norm, momenta, learning rate and the position in the data continue from the given state. So two consecutive
    stages end with the same bits as one.

    Args:
        task: Data, loss and metrics.
        run: The run that keeps the stage.
        name: Name of the stage.
        model: A model of the state's architecture, with masks attached if the state has some.
        config: Config of the whole training, from its first epoch.
        start: State to start from.
        stop: Epoch to stop after; None for the end.
        seed: Seed of the data's order from here on, the noise; None for the run's own.
    """

    def work(progress: Progress) -> State:
        reached = progress.state or start

        def save(state: State) -> None:
            nonlocal reached
            reached = state
            progress.save(state)

        restore(model, reached["model"])
        fit(
            model,
            task,
            config,
            seed=run.seed if seed is None else seed,
            device=run.device.type,
            progress=Progress(reached if reached["rows"] else None, save),
            log=lambda rows: run.log(name, rows),
            title=name,
            stop=stop,
        )
        if config.ema is not None:  # the model's state at the end
            reached = {**reached, "model": model.state_dict()}
        return deepcopy(reached)  # `fit` passes the live tensors

    state: State = run.stage(name, work)
    restore(model, state["model"])
    return state


@torch.no_grad()
def with_masks(model: nn.Module, state: State, masks: Mapping[str, Tensor]) -> State:
    """Returns a state with masks: removed weights and their optimizer states are exactly 0.

    Args:
        model: A model of the state's architecture, with masks attached; it ends in the new state.
        state: A state taken with masks attached, for the same layers as ``masks``.
        masks: Masks by layer; weights that the state itself removed may return.
    """
    restore(model, state["model"])
    mask(model, masks)
    enforce(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if "parameters" in state:  # the optimizer holds them in groups, in another order
        by_name = {plain_name(name): p for name, p in model.named_parameters()}
        trained = [by_name[name] for name in state["parameters"]]
    removed = {
        number: ~masks[name].bool().to(p.device)
        for number, p in enumerate(trained)
        for name, layer in prunable_layers(model).items()
        if layer.raw is p and name in masks
    }
    optimizers = [_cleared(optimizer, removed) for optimizer in state["optimizers"]]
    return {**state, "model": start_of(model)["model"], "optimizers": optimizers}


def fresh_optimizers(state: State) -> State:
    """Returns a state with reset optimizers: learning rates continue, momenta start at 0."""
    return {**state, "optimizers": [{**optimizer, "state": {}} for optimizer in state["optimizers"]]}


def _cleared(optimizer: State, removed: Mapping[int, Tensor]) -> State:
    own = {
        number: {
            key: value.masked_fill(removed[number].to(value.device), 0.0)
            if isinstance(value, Tensor) and number in removed and value.shape == removed[number].shape
            else value
            for key, value in held.items()
        }
        for number, held in optimizer["state"].items()
    }
    return {**optimizer, "state": own}
