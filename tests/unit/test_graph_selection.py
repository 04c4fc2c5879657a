"""Channel selection: norms of pre-activation nets choose channels of a stream; cuts, files, copies and programs keep it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import FileError
from microglia.graph import ShrinkError, plan_of, select_channels
from microglia.graph.selection import SelectedBatchNorm2d, selected_norms, stream_norms
from microglia.lab.execute import execute
from microglia.lab.recipe import resolve
from microglia.methods import Polarization, Slimming
from microglia.zoo import build

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def preactivated() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet164", blocks=1, width=4, classes=5, shape=(3, 8, 8))


class Own(nn.Module):
    """A norm behind a concatenation, one behind a pooled sum, and one that alone reads a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.after, self.joined, self.pooled = nn.BatchNorm2d(4), nn.BatchNorm2d(8), nn.BatchNorm2d(4)
        self.three, self.linear = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = functional.relu(self.after(self.two(x)))
        z = self.three(functional.relu(self.joined(torch.cat([x, y], 1))))
        pooled: Tensor = self.pooled(functional.avg_pool2d(x + z, 2))
        return self.linear(functional.relu(pooled).mean((2, 3)))


def slimmed(model: nn.Module, **settings: float) -> Slimming:
    return Slimming(model, total_steps=1, example_inputs=X, selection=True, **settings)


# ---------------------------------------------------------------------------------------------------------- which norms
def test_norms_of_streams_are_found() -> None:
    assert stream_norms(preactivated(), X) == ["layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1", "bn"]
    assert stream_norms(build("wrn-10-1"), X) == ["layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1", "bn"]
    assert stream_norms(Own(), X) == ["joined", "pooled"]
    for plain in ("resnet8", "resnet8-projection"):
        assert stream_norms(build(plain), X) == []


def test_a_selection_changes_no_value_and_no_name() -> None:
    model = preactivated().eval()
    names, wanted = [n for n, _ in model.named_parameters()], model(X)
    assert selected_norms(model) is None
    assert select_channels(model, X) == selected_norms(model)
    assert select_channels(model, X) == []
    assert [n for n, _ in model.named_parameters()] == names
    for same in (model, copy.deepcopy(model)):
        torch.testing.assert_close(same(X), wanted, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- removal
def test_exactly_the_channels_of_small_scales_go_and_the_stream_stays() -> None:
    model = preactivated()
    pruner = slimmed(model, density=0.6)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.copy_(torch.linspace(0.1, 1.0, norm.num_features).roll(2))
            norm.bias.fill_(0.3)
    pruner.finish()
    masked = copy.deepcopy(model).eval()
    small = mg.shrink(model, X, clear=True).eval()
    torch.testing.assert_close(small(X), masked(X))
    first = small.layer2[0]
    assert type(first.bn1) is SelectedBatchNorm2d
    assert first.conv1.in_channels == first.bn1.num_features == len(first.bn1.selected) < 16
    expected = model.layer2[0].bn1.weight.nonzero().flatten()
    assert torch.equal(first.bn1.selected, expected)
    assert small.conv1.out_channels == 4
    assert first.conv3.out_channels == small.layer3[0].shortcut.in_channels == 32
    assert plan_of(small).kind == "module"
    assert plan_of(small).error < 1e-10


def test_each_norm_of_one_stream_chooses_for_itself() -> None:
    torch.manual_seed(0)
    model = build("resnet164", blocks=2, width=4, classes=5, shape=(3, 8, 8))
    pruner = slimmed(model, density=0.7)
    with torch.no_grad():
        for norm, shift in ((model.layer2[1].bn1, 0), (model.layer3[0].bn1, 7)):
            norm.weight.copy_(torch.linspace(0.0, 2.0, norm.num_features).roll(shift))
    pruner.finish()
    small = mg.shrink(model, X, clear=True)
    one, other = small.layer2[1].bn1.selected, small.layer3[0].bn1.selected
    assert not torch.equal(one, other)
    torch.testing.assert_close(small.eval()(X), model.eval()(X))
    program = torch.export.export(small, (X,), strict=False)
    torch.testing.assert_close(program.module()(X), small(X))
    functional.cross_entropy(small.train()(X), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in small.parameters())


def test_polarization_takes_it_too() -> None:
    model = preactivated()
    pruner = Polarization(model, total_steps=1, example_inputs=X, selection=True, density=0.5)
    pruner.finish()
    assert mg.shrink(model, X, clear=True)(X).shape == (2, 5)


def test_a_net_without_streams_is_refused() -> None:
    with pytest.raises(
        ShrinkError, match="no batch norm of ResNet reads a residual or concatenated stream: leave selection out"
    ):
        slimmed(build("resnet8"), density=0.5)


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection") / "run"
    short = {"epochs": 1, "max_batches": 2, "batch_size": 16}
    recipe = resolve(
        {
            "model": "wrn-10-1",
            "data": "digits",
            "method": "slimming",
            "prune": {"density": 0.6, "selection": True, "recalibrate": 1},
            "dense": short,
            "train": short,
            "measure": {"latency": False},
            "threads": 1,
        }
    )
    execute(recipe, folder)
    return folder


def test_a_run_keeps_and_loads_it(run: Path) -> None:
    model = mg.load(run / "model").eval()
    assert selected_norms(model) == ["layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1", "bn"]
    assert any(len(m.selected) < int(m.selected.max()) + 1 for m in model.modules() if isinstance(m, SelectedBatchNorm2d))
    x = torch.randn(2, 1, 8, 8)
    mg.save(model, run.parent / "again")
    torch.testing.assert_close(mg.load(run.parent / "again").eval()(x), model(x), rtol=0, atol=0)


def test_a_stopped_run_goes_on_to_the_same_bits(run: Path) -> None:
    wanted = mg.load(run / "model").state_dict()
    recipe = resolve(json.loads((run / "result.json").read_text())["recipe"])
    stages = sorted(run.rglob("*train*"))
    assert stages
    for path in (run / "result.json", *(p for p in stages if p.is_file())):
        path.unlink()
    execute(recipe, run)
    found = mg.load(run / "model").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("wrong", ["bn", ["layer1.0.bn9"], [3]])
def test_a_damaged_selection_is_refused(run: Path, tmp_path: Path, wrong: object) -> None:
    mg.save(mg.load(run / "model"), tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "plan.json").read_text())
    (tmp_path / "model" / "plan.json").write_text(json.dumps(plan | {"selected": wrong}))
    with pytest.raises(FileError):
        mg.load(tmp_path / "model")
