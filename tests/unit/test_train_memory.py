"""The memory that a run will need, against the peak that is measured while it runs."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import microglia as mg
from microglia.cli.app import app
from microglia.core.layers import prunable_layers
from microglia.lab.recipe import method_config, resolve
from microglia.methods import methods
from microglia.methods.config import MethodConfig, method
from microglia.report.memory import memory_of, memory_table
from microglia.scores.second_moments import largest_moments
from microglia.train.memory import MemoryNeed, need_of
from microglia.train.optim import FitConfig

SHORT = {"epochs": 1, "max_batches": 2, "batch_size": 64}


class Tracked(TorchDispatchMode):
    """The bytes of the storages that are alive, and the most of them at one time."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0
        for tensor in before:
            self.note(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(found):
            if isinstance(value, Tensor):
                self.note(value)
        return found

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if storage.nbytes() and place not in self.live:
            self.live[place] = storage.nbytes()
            self.most = max(self.most, sum(self.live.values()))
            weakref.finalize(storage, self.live.pop, place, None)


def peak(model: nn.Module, work: Callable[[], object]) -> int:
    """The most bytes of tensors at one time while some work runs."""
    with Tracked([*model.parameters(), *model.buffers()]) as tracked:
        work()
    return tracked.most


def test_the_judge_counts_what_is_alive() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        assert second.sum() == len(torch.zeros(500)) * 2

    assert 8000 <= peak(nn.Linear(1, 1), work) <= 8100


@pytest.fixture(scope="module")
def task():
    return mg.tasks.image_task("conv-2", data="digits")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_needs_what_was_told(task, optimizer: str) -> None:
    model, config = task.build(), FitConfig(**{**SHORT, "optimizer": optimizer, "lr": 0.001})
    told = need_of(task.build(), task, [config])
    mg.methods.OneShot(model, density=0.5)
    measured = peak(model, lambda: mg.fit(model, task, config))
    assert 0.8 < told.total / measured < 1.35, (told, measured)
    assert told.optimizer == {"sgd": 1, "adam": 2}[optimizer] * told.gradients


def test_activations_follow_the_batch(task) -> None:
    one, two = (need_of(task.build(), task, [FitConfig(batch_size=size)]) for size in (64, 128))
    assert one.weights == two.weights
    assert 1.5 < two.activations / one.activations < 2.01
    assert need_of(task.build(), task, []).training == 0


def test_gradients_of_the_fisher_information_are_counted(task) -> None:
    recipe = resolve({"model": "lenet-300-100", "method": "woodfisher", "prune": {"density": 0.5, "score_batch_size": 32}})
    own = mg.tasks.image_task("lenet-300-100", data="digits")
    model, config = own.build(), method_config(recipe)
    batches = [batch for _, batch in zip(range(8), own.data.batches("train", 32).epoch(0), strict=False)]
    evidence = mg.scores.Evidence(batches, nn.functional.cross_entropy)
    pruner = mg.methods.WoodFisher(model, config, total_steps=1, evidence=evidence)
    measured = peak(model, lambda: pruner.prune_to(pruner.weights // 2))
    weights = sum(p.numel() * 4 for p in model.parameters())
    told = config.own_bytes(own.build()) + weights
    assert 0.8 < told / measured < 1.6, (told, measured)
    assert replace(config, score_batches=16).own_bytes(own.build()) > 1.5 * config.own_bytes(own.build()) - 3 * 8 * 2**22


def test_moments_of_a_block_are_those_that_it_holds() -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    assert largest_moments(prunable_layers(block)) == 5 * 64 * 64 * 8
    config = methods["sparsegpt"].config(density=0.5)
    assert (
        config.own_bytes(nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64)))) == 4 * 64 * 64 * 8
    )


def test_the_command_says_it_and_runs_nothing(tmp_path) -> None:
    words = ["prune", "conv-2", "--data", "digits", "--density", "0.5", "--epochs", "1", "--out", str(tmp_path / "a")]
    done = CliRunner().invoke(app, [*words, "--dry-run"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "at the same time, at most" in done.stdout
    assert "are free now" in done.stdout
    assert not (tmp_path / "a").exists()
    found = json.loads(CliRunner().invoke(app, [*words, "--dry-run", "--json"]).stdout)["memory"]
    assert found["total"] == memory_of(resolve({"model": "conv-2", "prune": {"density": 0.5}, "train": {"epochs": 1}})).total
    assert found["fits"] is True


def test_what_does_not_fit_is_said() -> None:
    need = MemoryNeed(1, 1, 1, 1, 2**40, 1, 1, available=2**30)
    assert not need.fits
    assert "It does not fit" in str(memory_table(need).caption)
    assert replace(need, available=None).fits


def test_a_method_from_outside_says_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_items", dict(methods._items))

    class Hungry(MethodConfig):
        def own_bytes(self, model: nn.Module) -> int:
            return 12_345

    @method("hungry", Hungry)
    def hungry(task: object, run: object, config: object) -> None:
        """Holds much."""

    assert memory_of(resolve({"model": "lenet-5", "method": "hungry", "prune": {"density": 0.5}})).method == 12_345
