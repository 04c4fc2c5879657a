"""What each input costs by both counts, the choice of r for a budget, and the statistics of routes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gated import NETWORKS, bias, counter_of, gated, images, network, plan_of, same, state_of
from microglia.core.errors import BudgetError
from microglia.dynamic import (
    Counter,
    Flow,
    GatePlan,
    Routes,
    attach_gates,
    choose_r,
    estimate,
    find_sites,
    frequencies,
    listening,
    record,
    shares,
    statistics,
    targets,
)
from microglia.dynamic.routes import agreement
from microglia.measure import count_macs

Masks = dict[str, Tensor]
SEVERAL = [name for name in NETWORKS if name not in ("mobilenet-v2", "resnet8", "resnet8-projection")]


def full(counter: Counter, batch: int = 2) -> Masks:
    convolutions = counter.flow.convolutions
    return {n: torch.ones(batch, s.convolution.outputs, dtype=torch.bool) for n, s in convolutions.items() if s.convolution}


def counted(model: nn.Module, x: Tensor, **selectors: Any) -> tuple[Counter, Masks]:
    """A counter, and masks that keep everything of the gated layers."""
    flow = Flow(model, x)
    plan = GatePlan(find_sites(flow, model, **selectors).sites)
    counter = Counter(model, flow, plan, x)
    return counter, {site.layer: torch.ones(2, site.outputs, dtype=torch.bool) for site in plan.sites}


@functools.cache
def known(name: str) -> Counter:
    return counter_of(network(name), images(1))


def half(mask: Tensor) -> Tensor:
    """Keeps the first half of the filters."""
    return mask & (torch.arange(mask.shape[1]) < mask.shape[1] // 2)


# ------------------------------------------------------------------------------------------------------------- counting
@pytest.mark.parametrize("name", SEVERAL)
def test_all_ones_cost_the_dense_model_and_in_truth_the_heads_too(name: str) -> None:
    model = network(name)
    counter, masks = counted(model, images(1))
    costs = counter(masks)
    assert counter.dense == count_macs(model, images(1)).total
    assert costs.paper.tolist() == [counter.dense] * 2
    assert costs.honest.tolist() == [counter.dense + counter.heads] * 2
    assert costs.heads == sum(site.inputs * site.outputs for site in plan_of(model, images(1)).sites)
    assert {n: c.tolist() for n, c in costs.layers.items()} == {n: [m, m] for n, m in counter.macs.items()}
    assert (costs.of("honest") is costs.honest, costs.of("paper") is costs.paper) == (True, True)


def test_halving_both_sides_quarters_a_convolution() -> None:
    counter, masks = counted(network("plain"), images(1))
    masks["0"], masks["3"] = half(masks["0"]), half(masks["3"])
    costs = counter(masks)
    share = {layer: (costs.layers[layer] / counter.macs[layer]).tolist() for layer in masks}
    assert share == {"0": [0.5] * 2, "3": [0.25] * 2, "5": [0.5] * 2, "10": [1.0] * 2, "13": [1.0] * 2}
    saved = sum(counter.macs[n] * (1 - s[0]) for n, s in share.items())
    assert costs.paper.tolist() == [counter.dense - saved] * 2
    assert costs.honest.tolist() == [counter.dense - saved + counter.heads] * 2


def test_depthwise_by_intersection_and_free_in_the_published_count() -> None:
    counter, masks = counted(network("depthwise"), images(1))
    masks["0"], masks["3"] = half(masks["0"]), masks["3"] & (torch.arange(8) % 2 == 0)
    costs = counter(masks)
    assert (costs.layers["3"] / counter.macs["3"]).tolist() == [2 / 8] * 2  # channels 0 and 2
    assert (costs.layers["6"] / counter.macs["6"]).tolist() == [0.5] * 2
    all_but = counter.dense - counter.macs["0"] / 2 - counter.macs["3"] - counter.macs["6"] / 2
    assert costs.paper.tolist() == [all_but] * 2  # floor(4 / 8) = 0
    assert (costs.layers["12"] / counter.macs["12"]).tolist() == [1.0] * 2


def test_a_residual_sum_arrives_whole_and_in_the_published_count_as_wide_as_its_branch() -> None:
    counter, masks = counted(network("residual"), images(1))
    masks["two"] = half(masks["two"])
    costs = counter(masks)
    assert (costs.layers["two"] / counter.macs["two"]).tolist() == [0.5] * 2
    assert costs.layers["three"].tolist() == [counter.macs["three"]] * 2
    assert costs.layers["shortcut"].tolist() == [counter.macs["shortcut"]] * 2
    published = counter.dense - (counter.macs["two"] + counter.macs["three"] + counter.macs["shortcut"]) / 2
    assert costs.paper.tolist() == [published] * 2


def test_layers_without_gates_still_need_only_what_arrives() -> None:
    counter, masks = counted(network("plain"), images(1), layers=("0", "5"))
    assert counter.heads == 3 * 8 + 12 * 16
    masks["0"] = half(masks["0"])
    assert (counter(masks).layers["3"] / counter.macs["3"]).tolist() == [0.5] * 2
    counter, masks = counted(network("depthwise"), images(1), exclude=("3",))
    masks["0"] = half(masks["0"])
    assert counter(masks).layers["3"].tolist() == [counter.macs["3"]] * 2  # runs whole
    assert counter(masks).layers["6"].tolist() == [counter.macs["6"]] * 2  # for its constants arrive all


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", ["plain", "depthwise", "branches"])
def test_each_input_is_counted_by_itself(name: str, seed: int) -> None:
    counter = known(name)
    generator = torch.Generator().manual_seed(seed)
    plan = plan_of(network(name), images(1))
    masks = {s.layer: torch.rand(3, s.outputs, generator=generator) < 0.5 for s in plan.sites}
    together = counter(masks)
    alone = [counter({n: m[i : i + 1] for n, m in masks.items()}) for i in range(3)]
    assert together.honest.tolist() == [float(c.honest) for c in alone]
    assert together.paper.tolist() == [float(c.paper) for c in alone]
    assert float(together.honest.mean()) == pytest.approx(sum(float(c.honest) for c in alone) / 3)
    more = {n: m | (torch.rand(m.shape, generator=generator) < 0.3) for n, m in masks.items()}
    for count in ("honest", "paper"):
        assert (counter(more).of(count) >= together.of(count)).all()  # type: ignore[arg-type]
        assert (together.of(count) <= counter.dense + counter.heads).all()  # type: ignore[arg-type]


def test_nothing_kept_costs_what_has_no_gate() -> None:
    counter, masks = counted(network("plain"), images(1))
    costs = counter({n: torch.zeros_like(m) for n, m in masks.items()})
    assert costs.honest.tolist() == [counter.heads + counter.rest] * 2
    assert costs.paper.tolist() == [counter.rest] * 2


# ------------------------------------------------------------------------------------------------------------ choosing r
@pytest.fixture(scope="module")
def share() -> Masks:
    model = attach_gates(network("residual"), plan_of(network("residual"), images(1)))
    return shares(model, [(images(16, seed=s), None) for s in range(4)], 50, torch.device("cpu"))


@pytest.fixture(scope="module")
def counter() -> Counter:
    return counter_of(network("residual"), images(1))


def test_shares_are_those_of_the_plain_model_which_stays_as_it_is(share: Masks) -> None:
    model = gated(network("residual"), images(1)).train()
    bias(model, -100.0)
    before = state_of(model)
    again = shares(model, iter([(images(16, seed=s), None) for s in range(4)]), 50, torch.device("cpu"))
    assert same(state_of(model), before)
    assert all(module.training for module in model.modules())
    assert {n: v.shape for n, v in again.items()} == {s.layer: (50, s.outputs) for s in plan_of(model, images(1)).sites}
    assert same(again, share)
    plain, x = network("residual"), images(16, seed=0)
    response = torch.relu(plain.stem_norm(plain.stem(x))).flatten(2).amax(2)  # type: ignore[operator]
    torch.testing.assert_close(again["stem"][:16], response / response.sum(1, keepdim=True))


@pytest.mark.parametrize("rule", ["prefix_le", "cover_ge", "uniform"])
@pytest.mark.parametrize("count", ["honest", "paper"])
def test_the_largest_r_within_the_budget(share: Masks, counter: Counter, count: Any, rule: Any) -> None:
    before = 0.0
    for flops in (0.35, 0.5, 0.7, 0.9):
        found = choose_r(share, flops, rule, counter, count)
        assert isinstance(found.r, float)
        assert getattr(found, count) <= flops
        assert before <= found.r <= 1
        before = found.r
        again = estimate(share, found.r, rule, counter)
        assert again == found
        masks = {n: targets(s, found.r, rule) for n, s in share.items()}
        assert found.honest == pytest.approx(float(counter(masks).honest.mean()) / counter.dense)
        assert found.kept == {n: pytest.approx(float(m.float().mean())) for n, m in masks.items()}
        if found.r < 1:  # one step further is too much
            assert getattr(estimate(share, min(1.0, found.r + 2e-7), rule, counter), count) > flops
        assert found.images == 50


@pytest.mark.parametrize("rule", ["prefix_le", "cover_ge", "uniform"])
def test_the_cost_is_monotone_in_r(share: Masks, counter: Counter, rule: Any) -> None:
    grid = [0.01, *[i / 20 for i in range(1, 20)], 0.99, 0.9999, 0.999995, 0.9999999, 1.0]
    found = [estimate(share, r, rule, counter) for r in grid]
    for less, more in itertools.pairwise(found):
        assert less.honest <= more.honest
        assert less.paper <= more.paper


def test_r_by_layer(share: Masks, counter: Counter) -> None:
    each = {layer: 0.3 + 0.1 * i for i, layer in enumerate(share)}
    found = estimate(share, each, "prefix_le", counter)
    assert found.r == each
    for layer, r in each.items():
        assert found.kept[layer] == pytest.approx(float(targets(share[layer], r).float().mean()))


def test_a_budget_that_needs_no_pruning_and_one_that_cannot_be_met(share: Masks, counter: Counter) -> None:
    assert choose_r(share, 1.0, "cover_ge", counter, "paper").r == 1.0
    with pytest.raises(BudgetError, match=r"to 0.01 of the dense model.*Gate more layers"):
        choose_r(share, 0.01, "prefix_le", counter)


# --------------------------------------------------------------------------------------------------------------- routes
def routes(inputs: int = 12, seed: int = 0) -> tuple[Routes, Counter]:
    counter = known("plain")
    generator = torch.Generator().manual_seed(seed)
    sizes = {s.layer: s.outputs for s in plan_of(network("plain"), images(1)).sites}
    made = [{n: torch.rand(inputs, size, generator=generator) < 0.6 for n, size in sizes.items()} for _ in range(2)]
    made[0]["0"][:, 2], made[0]["0"][:, 5], made[0]["3"][:] = True, False, made[0]["3"][0]
    return Routes(*made, torch.randint(3, (inputs,), generator=generator)), counter


def overlap(a: Tensor, b: Tensor) -> float:
    mine, theirs = set(a.nonzero()[:, 0].tolist()), set(b.nonzero()[:, 0].tolist())
    return len(mine & theirs) / max(1, len(mine | theirs))


def test_what_routes_tell() -> None:
    found, counter = routes()
    told = statistics(found, counter)
    costs = counter(found.masks)
    assert (told["inputs"], told["dense"], told["heads"]) == (12, counter.dense, counter.heads)
    assert told["honest"]["mean"] == pytest.approx(float(costs.honest.mean()) / counter.dense)
    assert told["paper"]["max"] == pytest.approx(float(costs.paper.max()) / counter.dense)
    assert told["paper"]["std"] == pytest.approx(float(costs.paper.std(correction=0)) / counter.dense)
    signatures = {tuple(int(m[i].sum()) for m in found.masks.values()) for i in range(12)}
    ways = {tuple(tuple(m[i].tolist()) for m in found.masks.values()) for i in range(12)}
    assert (told["signatures"], told["routes"]) == (len(signatures), len(ways))
    by_layer = {row["layer"]: row for row in told["layers"]}
    assert list(by_layer) == list(found.masks)
    for layer, mask in found.masks.items():
        row, kept = by_layer[layer], [int(m.sum()) for m in mask]
        core = [c for c in range(mask.shape[1]) if all(m[c] for m in mask)]
        assert row["filters"] == mask.shape[1]
        assert row["kept"] == pytest.approx(sum(kept) / 12 / mask.shape[1])
        assert row["core"] == len(core)
        assert row["dead"] == sum(not any(m[c] for m in mask) for c in range(mask.shape[1]))
        assert row["diversity"] == pytest.approx(1 - len(core) / (sum(kept) / 12))
        assert row["macs"] == pytest.approx(float(costs.layers[layer].mean()) / counter.macs[layer])
        assert row["accuracy"] == pytest.approx(float((mask == found.targets[layer]).float().mean()))
        for name, alike in (("within", True), ("across", False)):
            pairs = [
                overlap(mask[i], mask[j])
                for i, j in itertools.combinations(range(12), 2)
                if bool(found.labels[i] == found.labels[j]) is alike
            ]
            assert row[name] == pytest.approx(sum(pairs) / len(pairs), abs=0.05)  # of drawn pairs
    assert by_layer["0"]["core"] >= 1
    assert by_layer["0"]["dead"] >= 1
    assert (by_layer["3"]["diversity"], by_layer["3"]["within"]) == (0, 1)
    assert statistics(found, counter) == told


def test_agreement_of_masks_with_targets() -> None:
    mask, wanted = torch.tensor([[1, 1, 0, 0]]).bool(), torch.tensor([[1, 0, 1, 1]]).bool()
    assert agreement(mask, wanted) == {"accuracy": 0.25, "precision": 0.5, "recall": pytest.approx(1 / 3)}
    none = torch.zeros(1, 4).bool()
    assert agreement(none, none) == {"accuracy": 1.0, "precision": 1.0, "recall": 1.0}


def test_how_often_each_class_uses_each_filter() -> None:
    found, _ = routes()
    for layer, table in frequencies(found).items():
        for label in range(3):
            mine = found.masks[layer][found.labels == label]
            torch.testing.assert_close(table[label], mine.double().mean(0))
    one = Routes(found.masks, found.targets, torch.full((12,), 2))
    assert not frequencies(one)["0"][:2].any()
    told = statistics(one, routes()[1])
    assert told["layers"][0]["across"] is None


def test_recorded_routes_are_those_of_the_model_which_stays_as_it_is() -> None:
    model, x = gated(network("depthwise"), images(1)).train(), images(7)
    before = state_of(model)
    labels = torch.arange(7)
    found = record(model, [(x[:4], labels[:4]), (x[4:4], labels[:0]), (x[4:], labels[4:])])
    assert same(state_of(model), before)
    assert all(module.training for module in model.modules())
    assert torch.equal(found.labels, labels)
    heard: Masks = {}
    model.eval()
    with listening(model, lambda p: heard.update({p.gate.site.layer: p.mask, f"{p.gate.site.layer} wanted": p.target()})):
        model(x)
    for layer, mask in found.masks.items():
        assert torch.equal(mask, heard[layer])
        assert torch.equal(found.targets[layer], heard[f"{layer} wanted"])
    assert len(record(model, [(x, labels)] * 3, limit=2).labels) == 14
