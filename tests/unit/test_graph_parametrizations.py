"""Shrinking and saving models with other parametrizations than masks: the outputs stay, or a sentence refuses."""

from pathlib import Path

import pytest
import torch
from parametrized import KINDS, add, build, channel_mask, inputs
from torch import nn
from torch.nn.utils import parametrizations, prune

import microglia as mg
from microglia.core.masks import mask
from microglia.core.parametrizations import detach
from microglia.graph.cutting import baking
from microglia.graph.cutting.verify import ShrinkError


def ready(kind: str, order: str) -> nn.Sequential:
    net = build() if order == "mask first" else build(kind)
    mask(net, channel_mask())
    if order == "mask first":
        add(net[0], kind)
        net.double()
    net.train()(inputs())
    return net.eval()


ORDERS = pytest.mark.parametrize("order", ["mask first", "mask last"])


@ORDERS
@pytest.mark.parametrize("kind", ["spectral", "adapter", "inverse", "spectral+adapter"])
def test_shrink_keeps_the_outputs(kind: str, order: str, tmp_path: Path) -> None:
    net = ready(kind, order)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    wanted = net(inputs())
    small = mg.shrink(net, inputs())
    torch.testing.assert_close(small(inputs()), wanted, rtol=0, atol=1e-12)
    assert "0.weight" in " ".join(mg.graph.plan_of(small).notes)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items()), "the model given stays"
    if kind == "spectral" or order == "mask last":
        assert small[0].out_features == 5
    mg.save(small, tmp_path)
    again = mg.load(tmp_path, build(kind, seed=3)).eval()
    assert torch.equal(again(inputs()), small(inputs()))


@pytest.mark.parametrize("kind", KINDS)
def test_prune_channels_of_a_model_without_masks(kind: str) -> None:
    net = build(kind).eval()
    small = mg.prune_channels(net, inputs(), mg.Budget(density=0.5), round_to=1)
    kept = mg.graph.plan_of(small).kept["0.weight"]["0"]
    weight = net[0].weight.detach()[kept]
    hidden = torch.relu(nn.functional.linear(inputs(), weight, net[0].bias[kept]))
    wanted = nn.functional.linear(hidden, net[2].weight[:, kept], net[2].bias)
    torch.testing.assert_close(small(inputs()), wanted, rtol=0, atol=1e-12)
    assert mg.graph.plan_of(small).notes


def test_shrink_of_a_weight_norm_elsewhere() -> None:
    net = build()
    mask(net, channel_mask())
    parametrizations.weight_norm(net[2])
    net.double().eval()
    small = mg.shrink(net, inputs())
    torch.testing.assert_close(small(inputs()), net(inputs()), rtol=0, atol=1e-12)
    assert small[2].in_features == 5


@pytest.mark.parametrize(
    ("old", "name"),
    [
        (nn.utils.weight_norm, "WeightNorm"),
        (nn.utils.spectral_norm, "SpectralNorm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "L1Unstructured"),
    ],
)
def test_old_hooks_are_refused_by_shrink_and_kept_by_files(old: object, name: str, tmp_path: Path) -> None:
    def fresh(seed: int) -> nn.Sequential:
        net = build(seed=seed)
        old(net[0])  # type: ignore[operator]
        return net.double().eval()

    net = fresh(0)
    with pytest.raises(mg.MicrogliaError, match=f"weight of 0 .*{name}.*remove"):
        mg.shrink(net, inputs())
    with pytest.raises(mg.MicrogliaError, match=f"weight of 0 .*{name}.*remove"):
        mg.prune_channels(net, inputs(), mg.Budget(density=0.5))
    mg.save(net, tmp_path)
    assert torch.equal(mg.load(tmp_path, fresh(7))(inputs()), net(inputs()))


def test_a_baked_copy_is_held_against_the_model_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of the fault: with the adapter dropped, only a reference that was not changed can tell."""

    def drops(model: nn.Module) -> list[str]:
        detach(model[0], "weight")  # type: ignore[index]
        return []

    monkeypatch.setattr(baking, "bake", drops)
    with pytest.raises(ShrinkError, match="computes something else"):
        mg.prune_channels(build("adapter"), inputs(), mg.Budget(density=0.5))


@ORDERS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folded", [False, True])
def test_saved_and_loaded_bit_for_bit(kind: str, order: str, folded: bool, tmp_path: Path) -> None:
    net = ready(kind, order)
    if folded:
        mg.fold(net)
    mg.save(net, tmp_path)
    again = mg.load(tmp_path, build(kind, seed=3))
    assert torch.equal(again.eval()(inputs()), net.eval()(inputs()))
    assert torch.equal(again.train()(inputs()), net.train()(inputs()))


def test_a_built_model_with_a_parametrization_asks_for_one_to_load_into(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        net = mg.tasks.build("lenet-300-100", classes=10, shape=(1, 8, 8))
        first = next(m for m in net.modules() if isinstance(m, nn.Linear))
        parametrizations.spectral_norm(first)
        return net.eval()

    net = fresh()
    mg.save(net, tmp_path)
    with pytest.raises(mg.MicrogliaError, match="pass a freshly built one"):
        mg.load(tmp_path)
    x = torch.ones(2, 1, 8, 8)
    assert torch.equal(mg.load(tmp_path, fresh()).eval()(x), net(x))
