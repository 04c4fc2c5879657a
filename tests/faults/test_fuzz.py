"""Saved models with fields changed at random: each loads as the right model or ends in one sentence."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import microglia
from microglia.core.errors import MicrogliaError
from microglia.train.archive import PLAN, WEIGHTS, _mark
from microglia.train.files import read_tensors, write_tensors

VALUES = [None, True, -1, 0, 1, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "os:system", "__class__", [], [0],
          [[0], [1]], {}, {"": 0}, {"shape": [10**6] * 3, "dtype": "float32"}, "import", ["x"], [10**9] * 3]  # fmt: skip


class Doubled(nn.Module):
    """A size written into the forward, so that it comes back as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu().unsqueeze(-1).expand(-1, 6, 2).reshape(-1, 12))


def masked() -> nn.Module:
    model = microglia.build("lenet-300-100", classes=4, shape=(1, 4, 4))
    microglia.mask(model, {name: torch.rand_like(p) > 0.5 for name, p in model.named_parameters() if p.ndim == 2})
    return model


def as_module() -> nn.Module:
    model = microglia.build("conv-2", classes=4, shape=(1, 4, 4))
    return microglia.prune_channels(model, torch.ones(1, 1, 4, 4), microglia.Budget(flops=0.6), round_to=1)


def as_graph() -> nn.Module:
    return microglia.prune_channels(Doubled(), torch.ones(2, 4), microglia.Budget(flops=0.7), round_to=1)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Returns every (container, key) of a JSON document."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in inside for found in ((tree, key), *places(value))]


@pytest.fixture(scope="module", params=[masked, as_module, as_graph], ids=lambda make: make.__name__)
def original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[], nn.Module | None]]:
    torch.manual_seed(0)
    directory = microglia.save(request.param(), tmp_path_factory.mktemp("saved") / "model")
    return directory, Doubled if request.param is as_graph else lambda: None


@pytest.mark.filterwarnings("ignore")
def test_a_changed_plan_gives_the_right_model_or_one_sentence(original: Any, tmp_path: Path) -> None:
    directory, fresh = original
    right = microglia.load(directory, fresh()).state_dict()
    rng, refused = random.Random(0), 0
    tensors, _, _ = read_tensors(directory / WEIGHTS, kind="weights")
    for _ in range(60):
        plan = json.loads((directory / PLAN).read_text())
        container, key = rng.choice(places(plan))
        if rng.random() < 0.2 and isinstance(container, dict):
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
        mark = _mark(plan.get("shrunk"), plan.get("gates"))  # as one who means harm writes it
        digest = write_tensors(tmp_path / WEIGHTS, tensors, kind="weights", document=mark)
        plan["digest"] = digest if "digest" in plan else None
        (tmp_path / PLAN).write_text(json.dumps(plan))
        try:
            state = microglia.load(tmp_path, fresh()).state_dict()
        except MicrogliaError:
            refused += 1
        else:
            assert all(torch.equal(value, state[name]) for name, value in right.items())
    assert refused


def test_changed_bytes_are_found(original: Any, tmp_path: Path) -> None:
    directory, fresh = original
    rng = random.Random(1)
    for name in [PLAN, WEIGHTS] * 20:
        shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
        content = bytearray((tmp_path / name).read_bytes())
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(len(content) if name == WEIGHTS else 60)] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(content)
        try:
            state = microglia.load(tmp_path, fresh()).state_dict()
        except MicrogliaError:
            continue
        assert all(
            torch.equal(value, state[key]) for key, value in read_tensors(directory / WEIGHTS, kind="weights")[0].items()
        )
