"""A thousand saved models with fields or bytes changed at random: each loads as the right model or ends in one sentence."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

import microglia
from microglia.core.errors import FileError
from microglia.dynamic import Flow, GatePlan, attach_gates, find_sites, gate_plan
from microglia.storage.archive import PLAN, WEIGHTS, _mark
from microglia.storage.files import ENTRY, read_tensors, write_tensors

VALUES = [None, True, False, -1, 0, 1, 2, 0.5, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "os:system", "__class__", [],
          [0], [[0], [1]], {}, {"": 0}, {"shape": [10**6] * 3, "dtype": "float32"}, "import", ["x"], [10**9] * 3]  # fmt: skip
IMAGE = torch.ones(1, 1, 4, 4)


class Doubled(nn.Module):
    """A size written into the forward, so that it comes back as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu().unsqueeze(-1).expand(-1, 6, 2).reshape(-1, 12))


def masked() -> nn.Module:
    model = microglia.tasks.build("lenet-300-100", classes=4, shape=(1, 4, 4))
    microglia.mask(model, {name: torch.rand_like(p) > 0.5 for name, p in model.named_parameters() if p.ndim == 2})
    return model


def as_module() -> nn.Module:
    return microglia.prune_channels(
        microglia.tasks.build("conv-2", classes=4, shape=(1, 4, 4)), IMAGE, microglia.Budget(flops=0.6), round_to=1
    )


def as_graph() -> nn.Module:
    return microglia.prune_channels(Doubled(), torch.ones(2, 4), microglia.Budget(flops=0.7), round_to=1)


def gated(model: nn.Module | None = None) -> nn.Module:
    """FTWT: heads that choose for each input, one of them by number."""
    model = (model or microglia.tasks.build("conv-2", classes=4, shape=(1, 4, 4))).eval()
    sites = find_sites(Flow(model, IMAGE), model).sites
    plan = GatePlan(sites, keep={sites[0].layer: 2}).with_r(0.8)
    return attach_gates(model, plan, torch.Generator().manual_seed(1))


def gated_and_shrunk() -> nn.Module:
    return gated(as_module())


COUNTS = {masked: (150, 50, 50), as_module: (90, 25, 50), as_graph: (60, 25, 40), gated: (160, 50, 50),
          gated_and_shrunk: (100, 50, 50)}  # fmt: skip
"""How often fields of the plan are changed, fields of the weights' header, and bytes."""


@dataclass(frozen=True)
class Original:
    """A saved model: its files in memory, its state, how to make one to load into."""

    files: dict[str, bytes]
    state: dict[str, Tensor]
    gates: GatePlan | None
    fresh: Callable[[], nn.Module | None]
    counts: tuple[int, int, int]

    def try_load(self, directory: Path) -> bool:
        """Loads what is in a directory, which has to be right; returns False where it is refused."""
        try:
            model = microglia.load(directory, self.fresh())
        except FileError:
            return False
        state = model.state_dict()
        assert state.keys() == self.state.keys()
        assert all(torch.equal(value, state[name]) for name, value in self.state.items())
        plan = gate_plan(model)
        assert (plan.sites if plan else None) == (self.gates.sites if self.gates else None)
        return True


@pytest.fixture(scope="module", params=COUNTS, ids=lambda make: make.__name__)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    torch.manual_seed(0)
    model = request.param()
    directory = microglia.save(model, tmp_path_factory.mktemp("saved") / "model")
    files = {name: (directory / name).read_bytes() for name in (PLAN, WEIGHTS)}
    fresh = Doubled if request.param is as_graph else lambda: None
    return Original(files, model.state_dict(), gate_plan(model), fresh, COUNTS[request.param])


@pytest.fixture
def place(original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the saved model, where writing does not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for name, content in original.files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Returns every (container, key) of a JSON document."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in inside for found in ((tree, key), *places(value))]


def change(rng: random.Random, tree: Any) -> None:
    """Removes, doubles or replaces one field at random."""
    container, key = rng.choice(places(tree))
    chance = rng.random()
    if chance < 0.15 and isinstance(container, dict):
        del container[key]
    elif chance < 0.25 and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = rng.choice(VALUES)


@pytest.mark.filterwarnings("ignore")
def test_a_changed_plan_gives_the_right_model_or_one_sentence(original: Original, place: Path) -> None:
    rng, count = random.Random(0), original.counts[0]
    tensors, _, _ = read_tensors(place / WEIGHTS, kind="weights")
    loaded = 0
    for _ in range(count):
        plan = json.loads(original.files[PLAN])
        change(rng, plan)
        mark = _mark(plan)  # as one who means harm writes it
        digest = write_tensors(place / WEIGHTS, tensors, kind="weights", document=mark)
        plan["digest"] = digest if "digest" in plan else None
        (place / PLAN).write_text(json.dumps(plan))
        loaded += original.try_load(place)
    assert 0 < loaded < count


def test_a_changed_header_of_the_weights_gives_the_right_model_or_one_sentence(original: Original, place: Path) -> None:
    with safe_open(place / WEIGHTS, framework="pt") as file:
        header = file.metadata()[ENTRY]
    stored, rng = load(original.files[WEIGHTS]), random.Random(2)
    for _ in range(original.counts[1]):
        changed = json.loads(header)
        change(rng, changed)
        (place / WEIGHTS).write_bytes(save(stored, metadata={ENTRY: json.dumps(changed)}))
        original.try_load(place)
    (place / WEIGHTS).write_bytes(save(stored, metadata={ENTRY: header}))
    assert original.try_load(place)


def test_changed_bytes_are_found(original: Original, place: Path) -> None:
    rng, refused = random.Random(1), 0
    for number in range(original.counts[2]):
        name = (PLAN, WEIGHTS)[number % 2]
        content = bytearray(original.files[name])
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (place / name).write_bytes(content)
        refused += not original.try_load(place)
        (place / name).write_bytes(original.files[name])
    assert refused
    assert original.try_load(place)


def test_there_are_a_thousand_of_them() -> None:
    assert sum(map(sum, COUNTS.values())) == 1000
