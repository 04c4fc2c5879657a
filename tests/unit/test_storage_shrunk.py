"""Files of shrunk models: loaded bit for bit into a dense network, masked again or not; other plans refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.core.errors import FileError
from microglia.storage.files import read_tensors, write_tensors

IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Shuffle(nn.Module):
    """Sizes written into its forward: it comes back as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.first(images))
        x = x.reshape(x.shape[0], 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape[0], 16, *x.shape[2:])
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return mg.tasks.build("conv-2", classes=10, shape=(1, 8, 8))


def shuffle() -> nn.Module:
    torch.manual_seed(0)
    return Shuffle()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return mg.prune_channels(dense(), IMAGES[:1], mg.Budget(params=0.5))


@pytest.fixture(scope="module")
def graph() -> nn.Module:
    found = mg.prune_channels(shuffle(), IMAGES[:1], mg.Budget(density=0.5), round_to=1)
    assert mg.graph.plan_of(found).kind == "graph"
    return found


@pytest.fixture
def saved(small: nn.Module, tmp_path: Path) -> Path:
    return mg.save(small, tmp_path / "model")


def assert_same(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES), other.eval()(IMAGES))


def test_a_shrunk_network_is_loaded_by_its_directory_alone(small: nn.Module, saved: Path) -> None:
    again = mg.load(saved)
    assert_same(small, again)
    assert mg.graph.plan_of(again).to_dict()["kept"] == mg.graph.plan_of(small).to_dict()["kept"]
    assert sum(p.numel() for p in again.parameters()) < 0.51 * sum(p.numel() for p in dense().parameters())
    assert_same(small, mg.load(saved, dense()))


def test_what_was_loaded_is_saved_again_in_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    mg.save(mg.load(saved), tmp_path / "again")
    for file in ("plan.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


def test_a_graph_is_traced_again(graph: nn.Module, tmp_path: Path) -> None:
    mg.save(graph, tmp_path / "model")
    again = mg.load(tmp_path / "model", shuffle())
    assert_same(graph, again)
    again.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert mg.measure(again, IMAGES[:1], latency=False).parameters.all < sum(p.numel() for p in shuffle().parameters())


@pytest.mark.parametrize("folded", [False, True])
def test_masks_on_a_shrunk_model(folded: bool, tmp_path: Path) -> None:
    model = mg.prune_channels(dense(), IMAGES[:1], mg.Budget(density=0.5))
    mg.methods.OneShot(model, density=0.3)
    if folded:
        mg.fold(model)
    mg.save(model, tmp_path / "model")
    again = mg.load(tmp_path / "model")
    assert mg.masks_of(again).same(mg.masks_of(model))
    assert_same(model, again)


def test_from_masks_to_a_file_and_back(tmp_path: Path) -> None:
    model = dense()
    mg.methods.OneShot(model, pattern=mg.Channel(), density=0.5, scope="layer", exclude=["classifier.4"])
    small = mg.shrink(model, IMAGES[:1])
    mg.save(small, tmp_path / "model")
    assert_same(small, mg.load(tmp_path / "model"))
    torch.testing.assert_close(small.eval()(IMAGES), model.eval()(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_given_a_bias(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))

    model = build()
    with torch.no_grad():
        model[0].bias.abs_().add_(0.1)  # masked units are positive constants
    mg.mask(model, {"0.weight": (torch.arange(16) % 2 == 0)[:, None].expand(16, 6)})
    x = torch.randn(4, 6)
    small = mg.shrink(model, x[:1])
    assert small[2].bias is not None
    mg.save(small, tmp_path / "model")
    again = mg.load(tmp_path / "model", build())
    assert torch.equal(again.eval()(x), small.eval()(x))
    torch.testing.assert_close(again(x), model.eval()(x))


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def other_indices(content: dict[str, Any]) -> None:
    kept = content["shrunk"]["kept"]["features.0.weight"]["0"]
    kept[0] = next(i for i in range(64) if i not in kept)


DAMAGE: dict[str, Callable[[dict[str, Any]], None]] = {
    "no plan": lambda c: c.pop("shrunk"),
    "none": lambda c: c.update(shrunk=None),
    "a text": lambda c: c.update(shrunk="half of it"),
    "an empty plan": lambda c: c.update(shrunk={}),
    "other indices": other_indices,
    "a field more": lambda c: c["shrunk"].update(more=1),
    "another kind": lambda c: c["shrunk"].update(kind="graph"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_plan_that_was_changed_is_refused(saved: Path, case: str) -> None:
    edit(DAMAGE[case])(saved / "plan.json")
    with pytest.raises(FileError, match="do not belong together"):
        mg.load(saved)


FOREIGN: dict[str, tuple[Any, str]] = {
    "a list": ([1], "is damaged: what was removed is no plan"),
    "an empty plan": ({}, "not one that this version understands"),
    "a newer plan": ({"kind": "module", "kept": {}, "later": 1}, "not one that this version understands"),
    "kept is a text": ({"kind": "module", "kept": "all"}, "plan"),
    "indices are texts": ({"kind": "module", "kept": {"features.0.weight": {"0": ["a"]}}}, "plan"),
    "indices out of range": ({"kind": "module", "kept": {"features.0.weight": {"0": [4000]}}}, "does not fit"),
    "a module that is none": ({"kind": "module", "kept": {}, "attributes": {"nine": {"groups": 2}}}, "plan"),
    "a bias of nothing": ({"kind": "module", "kept": {}, "biases": ["nine"]}, "plan"),
    "an attribute of a configuration": ({"kind": "module", "kept": {}, "config": {"": {"__class__": 1}}}, "'config'"),
    "a configuration with a text": ({"kind": "module", "kept": {}, "config": {"": {"d_ff": "x"}}}, "'config'"),
    "a configuration that is none": ({"kind": "module", "kept": {}, "config": []}, "'config'"),
    "not as much as the weights": ({"kind": "module", "kept": {}}, "do not fit"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_plan_that_is_none_is_refused_even_with_the_right_mark(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    plan, text = FOREIGN[case]
    monkeypatch.setattr(type(mg.graph.plan_of(small)), "to_dict", lambda self: plan)
    mg.save(small, tmp_path / "model")
    monkeypatch.undo()
    with pytest.raises(FileError, match=text):
        mg.load(tmp_path / "model")


def test_what_it_is_loaded_into(saved: Path, small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="Pass a freshly built, dense"):
        mg.load(saved, mg.load(saved))
    with pytest.raises(FileError, match="fit"):
        mg.load(saved, mg.tasks.build("lenet-5", classes=10, shape=(1, 28, 28)))
    mg.save(dense(), tmp_path / "dense")
    with pytest.raises(FileError, match="Pass a freshly built, dense"):
        mg.load(tmp_path / "dense", mg.load(saved))


def test_weights_of_another_cut_are_refused(saved: Path, tmp_path: Path) -> None:
    mg.save(mg.prune_channels(dense(), IMAGES[:1], mg.Budget(density=0.25)), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    with pytest.raises(FileError, match="do not belong together"):
        mg.load(saved)


def test_files_of_before_there_were_plans_are_still_read(tmp_path: Path) -> None:
    mg.save(dense(), tmp_path / "model")
    edit(lambda c: c.pop("shrunk"))(tmp_path / "model" / "plan.json")
    assert_same(dense(), mg.load(tmp_path / "model"))


def test_a_graph_saved_before_graphs_counted_batches_is_read(tmp_path):
    """Its norms have no ``num_batches_tracked`` in the file."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.two(torch.relu(self.norm(self.one(x)))[:, :8])  # a size in the forward: it comes back as a graph

    example = torch.randn(2, 3, 8, 8)
    small = mg.prune_channels(Net().eval(), example, mg.Budget(density=0.5), round_to=1)
    assert mg.graph.plan_of(small).kind == "graph"
    mg.save(small, tmp_path)
    state, document, _ = read_tensors(tmp_path / "model.safetensors", kind="weights")
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(old) == len(state) - 1
    mark = write_tensors(tmp_path / "model.safetensors", old, kind="weights", document=document)
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "digest": mark}))
    again = mg.load(tmp_path, Net().eval()).eval()
    assert torch.equal(again(example), small.eval()(example))
