"""Masks on recurrent layers, whose weights torch keeps in a second, flat list: forwards, copies and files see the masks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import microglia as mg
from microglia.core.errors import PatternError
from microglia.measure.macs import count_macs
from microglia.methods import Acdc, Pdp, Smart, SparseTraining

LAYERS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(6, 8, batch_first=True),
    "gru": lambda: nn.GRU(6, 8, batch_first=True),
    "rnn": lambda: nn.RNN(6, 8, batch_first=True, nonlinearity="relu", bias=False),
    "two ways": lambda: nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(6, 10, proj_size=8, batch_first=True),
}
CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
KINDS = pytest.mark.parametrize("kind", LAYERS)


class Net(nn.Module):
    def __init__(self, kind: str = "lstm") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.fc = LAYERS[kind](), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, 6, generator=generator), torch.randint(3, (5,), generator=generator)


def evidence() -> mg.scores.Evidence:
    return mg.scores.Evidence([batch()], functional.cross_entropy, generator=torch.Generator().manual_seed(0))


def multiplied(kind: str, masks: mg.core.masks.MaskSet) -> Net:
    """Returns the dense model with the masks multiplied in by hand."""
    net = Net(kind)
    with torch.no_grad():
        for name, value in masks.items():
            net.get_parameter(name).mul_(value)
    return net


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@KINDS
@pytest.mark.parametrize("mode", [False, True])
def test_each_forward_sees_the_masks_of_now(kind: str, mode: bool) -> None:
    net, x = Net(kind).train(mode), batch()[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No mask reaches")
        masks = mg.methods.OneShot(net, density=0.3).masks
    names = [n for n, p in Net(kind).named_parameters() if p.ndim > 1]
    assert sorted(masks) == sorted(names)
    assert all(0 < int(m.sum()) < m.numel() for n, m in masks.items() if "weight_hh" in n)
    assert torch.equal(net(x), multiplied(kind, masks)(x))
    mg.mask(net, {n: m & (torch.rand(m.shape) > 0.3) for n, m in masks.items()})
    other = mg.masks_of(net)
    assert other.kept < masks.kept
    assert torch.equal(net(x), multiplied(kind, other)(x))
    with torch.no_grad():
        assert torch.equal(net(x), multiplied(kind, other)(x))


@KINDS
def test_gradients_are_those_of_the_masked_weights_at_every_step(kind: str) -> None:
    net, (x, y) = Net(kind), batch()
    masks = mg.methods.OneShot(net, density=0.4).masks
    other = multiplied(kind, masks)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, other)]
    for _ in range(3):
        for model, optimizer in zip((net, other), optimizers, strict=True):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            for name, value in masks.items() if model is other else ():
                other.get_parameter(name).grad.mul_(value)
            optimizer.step()
    mg.core.masks.enforce(net)
    mg.fold(net)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-7)
    assert (net.rnn.weight_hh_l0[~masks["rnn.weight_hh_l0"]] == 0).all()


@KINDS
def test_fold_leaves_a_fresh_layer_that_trains(kind: str) -> None:
    net, (x, y) = Net(kind), batch()
    mg.methods.OneShot(net, density=0.4)
    wanted = net(x).detach()
    mg.fold(net)
    assert type(net.rnn) is type(LAYERS[kind]())
    assert list(net.state_dict()) == list(Net(kind).state_dict())
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in Net(kind).named_parameters()]
    assert torch.equal(net(x), wanted)
    assert all(a is b for a, b in zip(net.rnn._flat_weights, net.rnn.parameters(), strict=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    assert not torch.allclose(net(x), wanted, atol=1e-3)


@KINDS
def test_copies_are_independent_and_masked(kind: str) -> None:
    net, x = Net(kind), batch()[0]
    masks = mg.methods.OneShot(net, density=0.4).masks
    wanted = net(x)  # a graph hangs on what this forward computed
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), wanted)
    mg.fold(twin)
    assert torch.equal(twin(x), wanted)
    assert mg.masks_of(net).same(masks)
    mg.mask(twin, {n: torch.zeros_like(m) for n, m in masks.items()})
    assert torch.equal(net(x), wanted)
    assert torch.equal(copy.deepcopy(mg.fold(net))(x), wanted)


@KINDS
def test_files_and_states_hold_the_masks(kind: str, tmp_path: Any) -> None:
    net, x = Net(kind), batch()[0]
    masks = mg.methods.OneShot(net, density=0.4).masks
    wanted = net(x)
    mg.save(net, tmp_path / "model")
    back = mg.load(tmp_path / "model", Net(kind))
    assert mg.masks_of(back).same(masks)
    assert torch.equal(back(x), wanted)
    fresh = Net(kind)
    mg.methods.OneShot(fresh, density=0.9)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), wanted)


@KINDS
def test_a_change_of_precision_reaches_the_masked_weights(kind: str) -> None:
    net, x = Net(kind), batch()[0].double()
    mg.methods.OneShot(net, density=0.4)
    wanted = mg.fold(copy.deepcopy(net)).double()(x)
    assert torch.equal(net.double()(x), wanted)
    assert torch.equal(mg.fold(net)(x), wanted)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_masked(kind: str) -> None:
    torch.manual_seed(0)
    cell, x = CELLS[kind](6, 8), torch.randn(5, 6)
    dense = copy.deepcopy(cell)
    masks = mg.methods.OneShot(cell, density=0.3).masks
    assert set(masks) == {"weight_ih", "weight_hh"}
    with torch.no_grad():
        for name, value in masks.items():
            dense.get_parameter(name).mul_(value)
    first = cell(x)[0] if kind == "lstm" else cell(x)
    assert torch.equal(first, dense(x)[0] if kind == "lstm" else dense(x))
    mg.fold(cell)
    assert list(cell.state_dict()) == list(dense.state_dict())
    assert torch.equal(cell(x)[0], dense(x)[0])


@pytest.mark.parametrize("score", ["gradient", "snip", "synflow"])
def test_scores_see_them(score: str) -> None:
    net = Net("lstm")
    masks = mg.methods.OneShot(net, density=0.3, score=score, evidence=evidence()).masks
    assert 0 < int(masks["rnn.weight_ih_l0"].sum()) < masks["rnn.weight_ih_l0"].numel()
    again = mg.methods.OneShot(net, density=0.2, score=score, evidence=evidence()).masks
    assert again.nested_in(masks)
    assert again.kept < masks.kept


@pytest.mark.parametrize("pattern", ["block:4x2", "nm:2:4"])
def test_blocks_and_neighbours_are_those_of_the_stacked_gates(pattern: str) -> None:
    net = Net("lstm")
    mg.methods.OneShot(net, pattern=pattern, **({} if pattern.startswith("nm") else {"density": 0.5}))
    kept = mg.masks_of(net)["rnn.weight_hh_l0"]
    if pattern.startswith("nm"):
        assert (kept.view(32, 2, 4).sum(2) == 2).all()
    else:
        blocks = kept.view(8, 4, 4, 2).sum((1, 3))
        assert set(blocks.unique().tolist()) == {0, 8}


def test_output_channels_of_gates_are_refused_and_the_rest_is_not() -> None:
    with pytest.raises(PatternError, match=r"rnn\.weight_ih_l0, rnn\.weight_hh_l0 is one gate.*exclude=\['type:LSTM'\]"):
        mg.methods.OneShot(Net("lstm"), density=0.5, pattern="channel")
    masks = mg.methods.OneShot(Net("lstm"), density=0.5, pattern="channel", exclude=["type:LSTM"], allow_empty=True).masks
    assert list(masks) == ["fc.weight"]


@pytest.mark.filterwarnings("ignore:No optimizer moved")
@pytest.mark.parametrize("method", [mg.methods.Gradual, Smart, Pdp, Acdc, SparseTraining], ids=lambda m: m.__name__)
def test_methods_that_train_reach_their_density(method: Any) -> None:
    net, (x, y) = Net("gru"), batch()
    settings: Any = {Acdc: {"compress": (0.1, 0.7), "decompress": (0.4,)}, SparseTraining: {"every": 2}}.get(method, {})
    pruner = method(net, density=0.3, total_steps=6, evidence=evidence(), pattern="unstructured", **settings)
    own = pruner.param_groups()
    scores = {id(p) for group in own for p in group["params"]}
    optimizer = torch.optim.SGD([{"params": [p for p in net.parameters() if id(p) not in scores]}, *own], lr=0.05)
    for _ in range(6):
        optimizer.zero_grad()
        (functional.cross_entropy(net(x), y) + pruner.penalty()).backward()
        optimizer.step()
        pruner.step(optimizer)
    masks = pruner.finish()
    assert masks.total == 3 * 8 * 14 + 24
    assert masks.density == pytest.approx(0.3, abs=0.01)
    wanted = net(x)
    mg.fold(net)
    assert torch.equal(net(x), wanted)
    assert (net.rnn.weight_ih_l0 == 0).float().mean() > 0.3


def test_counts_see_the_masks() -> None:
    net, x = Net("lstm").eval(), batch()[0]
    dense = count_macs(Net("lstm").eval(), x)
    mg.methods.OneShot(net, density=0.25)
    masked = count_macs(net, x)
    assert masked.total == dense.total == dense.effective
    assert masked.effective < 0.5 * masked.total
    assert masked.layers == dense.layers


def test_a_weight_with_another_parametrization_is_masked_too() -> None:
    net, x = Net("lstm").double(), batch()[0].double()
    parametrizations.orthogonal(net.rnn, "weight_hh_l0", use_trivialization=False)
    wanted = net.rnn.weight_hh_l0.detach().clone()
    kept = torch.rand(32, 8) > 0.5
    mg.mask(net, {"rnn.weight_hh_l0": kept})
    assert torch.equal(net.rnn.weight_hh_l0, wanted * kept)
    other = Net("lstm").double()
    with torch.no_grad():
        other.rnn.weight_hh_l0.copy_(wanted * kept)
    torch.testing.assert_close(net(x), other(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(mg.fold(net)(x), other(x), rtol=0, atol=1e-14)


def test_hidden_units_of_a_masked_layer_are_removed_by_shrink_only_where_the_outputs_stay() -> None:
    net, x = Net("lstm").double().eval(), batch()[0].double()
    mg.methods.OneShot(net, density=0.4)
    wanted = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = mg.shrink(net, x)
    torch.testing.assert_close(small(x), wanted, rtol=0, atol=1e-10)
