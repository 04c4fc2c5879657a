"""The base of pruners that train the heads of gates, and the observation of what the gates choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from microglia.dynamic import Counter, gates_of, record, statistics
from microglia.methods.pruner import own_optimizer
from microglia.storage.run import Progress, Run
from microglia.tasks.task import Task


class GatePruner:
    """A gated model in a training loop: its gates, the progress, the heads' own optimizer; see `PrunerProtocol`.

    Args:
        model: A model with gates.
        total_steps: Optimizer steps of the training.
        head_lr: Constant learning rate of the heads.
    """

    def __init__(self, model: nn.Module, total_steps: int, head_lr: float) -> None:
        self.model, self.gates = model, gates_of(model)
        self.total_steps, self.steps = max(1, total_steps), 0
        self._head_lr = head_lr
        self._made: list[torch.optim.Optimizer] = []

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all heads."""
        return [p for gate in self.gates.values() for p in gate.parameters()]

    @property
    def progress(self) -> float:
        """Completed fraction of the training."""
        return self.steps / self.total_steps

    def replaces_step(self) -> bool:
        """Tells that the optimizers act at every step."""
        return False

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns the heads' group with its own rate and no weight decay; see `Pruner.param_groups`."""
        return [{"params": self.parameters(), "lr": self._head_lr, "momentum": 0.9, "weight_decay": 0.0}]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns SGD with momentum 0.9 for the heads, at a constant rate."""
        made = [own_optimizer("sgd", groups)] if (groups := self.param_groups()) else []
        self._made += made
        return list(made)

    def weights_to_train(self) -> list[nn.Parameter]:
        """Returns the parameters of the network without the heads."""
        own = {id(p) for p in self.parameters()}
        return [p for p in self.model.parameters() if id(p) not in own]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to resume from; the heads are in the model's state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state."""
        self.steps = int(state["steps"])

    def report(self) -> dict[str, Any]:
        """Returns the report, JSON-ready."""
        return {"steps": self.steps}


def observe_routes(task: Task, run: Run, model: nn.Module, counter: Counter) -> None:
    """Records the routes of the test images through a gated model as a stage, and observes their statistics."""

    def work(progress: Progress) -> dict[str, Any]:
        routes = record(model, task.data.batches("test", 256).epoch(0), run.device)
        return {"routes": statistics(routes, counter)}

    run.observations["routes"] = cast("dict[str, Any]", run.stage("routes", work))["routes"]
