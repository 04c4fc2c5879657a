"""Scores of whole filters: closed forms, invariances, and how coupled channels read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import microglia as mg
from microglia.core.errors import ScoreError
from microglia.core.layers import prunable_layers
from microglia.graph import plan_of
from microglia.scores import Evidence, distances, gate_gradients, map_ranks, scores, values_filters
from microglia.scores.base import per_filter, score
from microglia.scores.behind import follow, norms_behind
from microglia.scores.nisp import infinite_selection, propagated

FILTERS = [name for name in scores if values_filters(name)]


class Residual(nn.Module):
    """A stem, a block of two convolutions with a sum, a classifier; each convolution with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(images)))
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.head(functional.relu_(y).mean((2, 3)))


class Dense(nn.Module):
    """A layer whose outputs are put behind its inputs, under one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(7), nn.Linear(7, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = torch.cat([x, self.conv(functional.relu(x))], 1)
        return self.head(functional.relu(self.norm(x)).mean((2, 3)))


def seeded(kind: type[nn.Module] = Residual) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def evidence(size: int = 6, batches: int = 2) -> Evidence:
    made = torch.Generator().manual_seed(1)
    data = [(torch.randn(size, 1, 8, 8, generator=made), torch.randint(5, (size,), generator=made)) for _ in range(batches)]
    return Evidence(data, functional.cross_entropy)


def values(name: str, model: nn.Module, given: Evidence | None = None) -> dict[str, Tensor]:
    """Returns one value per filter by layer."""
    found = scores[name](model, prunable_layers(model), given or evidence())
    for value in found.values():
        assert torch.equal(value, value.flatten(1)[:, :1].view(-1, *[1] * (value.ndim - 1)).expand_as(value))
    return {layer: value.flatten(1)[:, 0] for layer, value in found.items()}


# ------------------------------------------------------------------------------------------------------- what is behind
def test_norms_and_maps_are_those_behind_a_layer() -> None:
    model, maps = seeded().eval(), {}
    layers, given = prunable_layers(model), evidence(batches=1)
    norms = follow(model, layers, given, lambda name, found: maps.__setitem__(name, found.clone()))
    assert {name: norm.module for name, norm in norms.items()} == {
        "stem.weight": model.norm, "conv1.weight": model.norm1, "conv2.weight": model.norm2,
    }  # fmt: skip
    x = functional.relu(model.norm(model.stem(given.batches[0][0])))
    y = functional.relu(model.norm1(model.conv1(x)))
    torch.testing.assert_close(maps["stem.weight"], x)
    torch.testing.assert_close(maps["conv1.weight"], y)
    torch.testing.assert_close(maps["conv2.weight"], functional.relu(model.norm2(model.conv2(y)) + x))  # behind the sum
    assert maps["head.weight"].shape == (6, 5)


def test_a_norm_behind_a_concatenation_has_a_layers_channels_among_others() -> None:
    model, maps = seeded(Dense).eval(), {}
    layers = prunable_layers(model)
    found = follow(model, layers, evidence(batches=1), maps.__setitem__)
    assert found["stem.weight"].channels == slice(0, 4)
    assert found["conv.weight"].channels == slice(4, 7)
    assert torch.equal(found["conv.weight"].scale, model.norm.weight[4:])
    assert maps["conv.weight"].shape[1] == 3
    assert torch.equal(values("scale", model)["conv.weight"], model.norm.weight[4:].abs().double())
    assert len(norms_behind(model, layers, evidence())) == 2


# ------------------------------------------------------------------------------------------------------------- geometry
def test_norms_of_filters() -> None:
    model = seeded()
    rows = model.conv1.weight.flatten(1).double()
    torch.testing.assert_close(values("l1", model)["conv1.weight"], rows.abs().sum(1))
    torch.testing.assert_close(values("l2", model)["conv1.weight"], rows.norm(dim=1))


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm"])
def test_filters_in_another_order_have_their_values_in_that_order(name: str) -> None:
    model, order = seeded(), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    before = values(name, model)["conv1.weight"]
    with torch.no_grad():
        model.conv1.weight.copy_(model.conv1.weight[order])
    torch.testing.assert_close(values(name, model)["conv1.weight"], before[order])


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_a_larger_filter_ranks_higher_and_columns_under_a_mask_do_not_count(name: str) -> None:
    model = seeded()
    before = values(name, model)["conv1.weight"]
    with torch.no_grad():
        model.conv1.weight[2] *= 3
    assert values(name, model)["conv1.weight"].argmax() == 2
    torch.testing.assert_close(values(name, model)["conv1.weight"][2], 3 * before[2])
    keep = torch.ones_like(model.conv1.weight)
    keep[:, 1:] = 0
    rows = model.conv1.weight[:, :1].flatten(1).double()
    mg.mask(model, {"conv1.weight": keep})
    expected = rows.abs().sum(1) if name == "l1" else rows.norm(dim=1)
    torch.testing.assert_close(values(name, model)["conv1.weight"], expected)


def test_equal_filters_are_nearest_to_the_geometric_median_and_a_shift_of_all_changes_nothing() -> None:
    rows = torch.randn(9, 12, generator=torch.Generator().manual_seed(0)).double()
    rows[4] = rows[7] = rows.mean(0)
    found = distances(rows)
    torch.testing.assert_close(found, torch.cdist(rows, rows).sum(1), rtol=1e-6, atol=1e-6)
    assert found[4] == found[7] == found.min()
    torch.testing.assert_close(distances(rows + 5 * torch.randn(12, dtype=torch.float64)), found)
    assert not distances(torch.ones(3, 4)).any()


def test_lamp_is_magnitude_within_a_layer_and_gives_each_layer_one_one() -> None:
    model = seeded()
    found = scores["lamp"](model, prunable_layers(model), Evidence())
    weight, value = model.conv1.weight.flatten(), found["conv1.weight"].flatten()
    assert torch.equal(weight.abs().argsort(), value.argsort())
    at = 17
    expected = weight[at].double() ** 2 / weight[weight.abs() >= weight[at].abs()].double().square().sum()
    torch.testing.assert_close(value[at], expected)
    assert all(float(v.max()) == 1 for v in found.values())
    assert not scores["lamp"](nn.Linear(3, 2), {}, Evidence())


def test_scale_is_that_of_the_norm_and_a_model_without_norms_is_told() -> None:
    model = seeded()
    with torch.no_grad():
        model.norm1.weight[3] = -7
    assert torch.equal(values("scale", model)["conv1.weight"], model.norm1.weight.abs().double())
    assert torch.equal(values("scale", model)["head.weight"], torch.ones(5).double())
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(ScoreError, match="no layer of this Sequential has a norm with a scale right behind it: take l2"):
        values("scale", plain)


# ------------------------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_the_rank_of_a_map_made_of_so_many_products(rank: int) -> None:
    made = torch.Generator().manual_seed(rank)
    left, right = torch.rand(2, 3, 8, rank, generator=made), torch.rand(2, 3, rank, 10, generator=made)
    maps = left @ right if rank else torch.zeros(2, 3, 8, 10)
    assert torch.equal(map_ranks(maps), torch.full((2, 3), float(rank)).double())
    assert torch.equal(map_ranks(100 * maps), map_ranks(maps))


def test_hrank_is_the_mean_rank_and_equal_ranks_are_ordered_by_norm() -> None:
    model, maps = seeded().eval(), {}
    with torch.no_grad():
        model.norm1.weight[0] = model.norm1.bias[0] = 0  # a map of zeros
        model.conv1.weight[5] = model.conv1.weight[4]
        model.norm1.weight[5], model.norm1.bias[5] = 2 * model.norm1.weight[4], 2 * model.norm1.bias[4]
    given = evidence(batches=1)
    follow(model, prunable_layers(model), given, maps.__setitem__)
    found, exact = values("hrank", model, given), map_ranks(maps["conv1.weight"]).mean(0)
    images = len(given.batches[0][0])
    assert torch.equal((found["conv1.weight"] * images).floor(), exact * images)
    assert found["conv1.weight"][0] == 0
    assert exact[5] == exact[4]
    assert found["conv1.weight"][5] > found["conv1.weight"][4]  # twice the norm


def test_hrank_over_batches_is_hrank_over_all_images() -> None:
    model, parts = seeded(), evidence(batches=3)
    whole = Evidence([tuple(torch.cat(part) for part in zip(*parts.batches, strict=True))], parts.loss)
    split, once = values("hrank", model, parts), values("hrank", model, whole)
    for name in ("stem.weight", "conv1.weight", "conv2.weight"):
        torch.testing.assert_close(split[name], once[name])


def test_the_gradient_of_a_gate_is_that_of_its_norm() -> None:
    model, given = seeded().train(), evidence(batches=1)
    (inputs, targets) = given.batches[0]
    found = gate_gradients(model, prunable_layers(model), given)
    loss = functional.cross_entropy(model(inputs), targets)
    loss.backward()
    for layer, norm in (("stem", model.norm), ("conv1", model.norm1), ("conv2", model.norm2)):
        identity = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
        torch.testing.assert_close(found[f"{layer}.weight"].float(), identity, rtol=1e-4, atol=1e-6)
        own = (model.get_submodule(layer).weight * model.get_submodule(layer).weight.grad).flatten(1).sum(1)
        assert own.abs().max() < 1e-2 * identity.abs().max()  # batch norm makes that 0
    torch.testing.assert_close(values("taylor", model, given)["conv1.weight"], found["conv1.weight"].square())


def test_taylor_squares_the_gradient_of_all_batches_together() -> None:
    model, parts = seeded().train(), evidence(batches=3)
    total = sum(gate_gradients(model, prunable_layers(model), Evidence([b], parts.loss))["conv1.weight"] for b in parts.batches)
    torch.testing.assert_close(values("taylor", model, parts)["conv1.weight"], (total / 3).square())


def test_a_gate_behind_a_concatenation_is_not_blind() -> None:
    model = seeded(Dense).train()
    found = values("taylor", model)
    assert (found["conv.weight"] > 1e-12).all()  # in front of the norm it would be 0 to rounding


def test_taylor_of_weights_is_the_sum_of_squares() -> None:
    model, given = seeded(), evidence(batches=1)
    model.train()
    functional.cross_entropy(model(given.batches[0][0]), given.batches[0][1]).backward()
    expected = (model.conv2.weight * model.conv2.weight.grad).double().flatten(1).square().sum(1)
    torch.testing.assert_close(values("taylor-weights", model, given)["conv2.weight"], expected, rtol=1e-4, atol=1e-12)


def test_importance_goes_back_as_finite_differences_of_a_linear_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False))
    final = torch.rand(4).double()
    found = propagated(model, prunable_layers(model), torch.zeros(1, 3), final)
    torch.testing.assert_close(found["1.weight"], final)
    torch.testing.assert_close(found["0.weight"], model[1].weight.detach().abs().double().T @ final)
    assert torch.equal(found["2.weight"], torch.ones(2).double())


def test_importance_goes_through_shortcuts_and_pooling() -> None:
    model = seeded().eval()
    final = torch.rand(6).double()
    found = propagated(model, prunable_layers(model), torch.zeros(1, 1, 8, 8), final)
    torch.testing.assert_close(found["conv2.weight"], final)  # the mean over 64 positions, summed over them
    inner = model.conv2.weight.detach().abs().double()
    reached = functional.conv_transpose2d(final.view(1, 6, 1, 1).expand(1, 6, 8, 8) / 64, inner, padding=1)
    torch.testing.assert_close(found["conv1.weight"], reached.sum((0, 2, 3)))
    assert (found["stem.weight"] > final).all()  # by the shortcut and through the block


def test_features_that_repeat_each_other_rank_below_one_that_stands_alone() -> None:
    made = torch.Generator().manual_seed(0)
    shared = torch.randn(200, 1, generator=made).double()
    features = torch.cat([shared.expand(200, 4), torch.randn(200, 1, generator=made).double()], 1)
    found = infinite_selection(features / features.std(0))
    assert found.argmax() == 4
    assert torch.isfinite(infinite_selection(torch.zeros(5, 3).double())).all()


# ------------------------------------------------------------------------------------------------------ coupled channels
@pytest.mark.parametrize("name", FILTERS)
def test_channels_are_removed_by_every_score_of_filters(name: str) -> None:
    model, given = seeded().eval(), evidence()
    inputs = given.batches[0][0]
    small = mg.prune_channels(model, inputs, mg.Budget(density=0.5), score=name, evidence=given, round_to=1)
    assert small.conv1.out_channels == 4
    assert small.stem.out_channels == small.conv2.out_channels == 3
    assert plan_of(small).error < 1e-10
    wanted = values(name, model, given)["conv1.weight"].topk(4).indices.sort().values
    assert torch.equal(small.norm1.weight, model.norm1.weight[wanted])


def test_filters_that_make_a_channel_count_once_each_and_weights_that_read_it_not_at_all() -> None:
    given: dict[str, Any] = {
        "stem.weight": torch.tensor([1.0, 2, 3, 4, 5, 6]),
        "conv2.weight": torch.tensor([9.0, 0, 0, 0, 0, 0]),
    }

    @score("toy-filters", filters=True)
    def toy(model: nn.Module, layers: Any, evidence: Evidence) -> dict[str, Tensor]:
        return {n: per_filter(layer, given.get(n, 1e6 + torch.arange(layer.shape[0]).flip(0))) for n, layer in layers.items()}

    try:
        small = mg.prune_channels(
            seeded().eval(), evidence().batches[0][0], mg.Budget(density=0.5), score="toy-filters", reduction="sum", round_to=1
        )
    finally:
        del scores._items["toy-filters"]
    kept = seeded().norm.weight[[0, 4, 5]]  # 1 + 9, 5 and 6
    assert torch.equal(small.norm.weight, kept)


def test_a_traced_graph_has_no_maps_to_look_at() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).view(-1, 12))

    small = mg.prune_channels(Sized(), torch.zeros(2, 8), mg.Budget(density=0.5), round_to=1)
    assert plan_of(small).kind == "graph"
    given = Evidence([(torch.zeros(2, 8), torch.zeros(2).long())], functional.cross_entropy)
    for name in ("hrank", "taylor", "scale", "nisp"):
        with pytest.raises(ScoreError, match="came back from shrinking as a graph"):
            scores[name](small, prunable_layers(small), given)


@pytest.mark.parametrize("name", ["hrank", "scale", "nisp", "taylor", "taylor-weights"])
def test_scores_that_run_the_model_ask_for_batches(name: str) -> None:
    with pytest.raises(ScoreError, match="give batches="):
        scores[name](seeded(), prunable_layers(seeded()), Evidence())
