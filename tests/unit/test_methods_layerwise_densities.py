"""Densities of the layers of blocks, and exact OBS of single layers."""

import pytest
import torch
from torch import nn

from microglia.core.errors import BudgetError, PatternError, UnknownNameError
from microglia.core.patterns import NM, Unstructured
from microglia.methods import Layerwise
from microglia.methods.exact_obs import exact_least_squares, removal_costs
from microglia.methods.layerwise_densities import SPREAD, densities
from microglia.methods.layerwise_rules import Wish, rules
from microglia.methods.reconstruction import inverse_factor
from microglia.storage.run import Run


def values(seed=0, outliers=(0, 40, 10)):
    """Three blocks of two layers; some have outliers."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, count in enumerate(outliers):
        block = {f"{index}.{n}": torch.rand(20, size, generator=generator) for n, size in (("a", 30), ("b", 15))}
        block[f"{index}.a"].view(-1)[:count] = 100.0
        found.append(block)
    return found


def test_owl_keeps_more_where_outliers_are_and_the_budget_exactly():
    blocks = values()
    counts = densities["owl"](blocks, 900)
    assert sum(counts.values()) == 900
    kept = [sum(counts[n] for n in block) / 900 for block in blocks]
    shares = [
        float(sum((v > 5 * torch.cat([x.flatten() for x in b.values()]).mean()).sum() for v in b.values())) for b in blocks
    ]
    assert shares[1] > shares[2] > shares[0]
    assert kept[1] > kept[2] > kept[0]
    assert abs(kept[1] - kept[0] - 2 * SPREAD) < 0.01
    for block in blocks:  # one density in a block
        assert len({round(counts[n] / v.numel(), 2) for n, v in block.items()}) == 1


def test_owl_of_equal_blocks_is_uniform():
    blocks = values(outliers=(0, 0, 0))
    assert densities["owl"](blocks, 900) == densities["uniform"](blocks, 900)


def test_owl_refuses_densities_out_of_range():
    with pytest.raises(BudgetError, match="take densities=uniform"):
        densities["owl"](values(), 30)


def test_one_budget_takes_from_the_layer_whose_weights_matter_least():
    blocks = values(outliers=(0, 0, 0))
    spread = blocks[1]["1.a"]
    blocks[1]["1.a"] = spread * 0 + 1.0
    blocks[1]["1.a"][:, 10:] = 1e-3  # a third of its inputs makes nearly all of its outputs
    counts = densities["budget"](blocks, 1350)
    assert sum(counts.values()) == 1350
    assert counts["1.a"] == min(counts.values(), key=lambda c: c) or counts["1.a"] < 0.5 * 600
    assert counts["1.a"] >= round(0.1 * 0.5 * 600)


class Net(nn.Module):
    """Three blocks, the second with an input that is much larger than the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def batches():
    return [torch.randn(30, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("rule", ["owl", "budget"])
def test_a_model_keeps_the_budget_whatever_the_densities(rule, tmp_path):
    run = Run(tmp_path, {})
    pruner = Layerwise(Net(), batches(), rule="sparsegpt", density=0.5, densities=rule)
    report = pruner.prune(run)
    assert sum(row["kept"] for row in report["layers"]) == round(0.5 * 3 * 144)
    run.close()
    again = Layerwise(Net(), batches(), rule="sparsegpt", density=0.5, densities=rule)
    assert again.prune(Run(tmp_path, {})) == report
    assert again.masks.same(pruner.masks)


def test_densities_from_outside_are_known_by_name():
    @densities.add("first")
    def first(blocks, keep):
        names = [name for block in blocks for name in block]
        return {name: 144 if index == 0 else (keep - 144) // (len(names) - 1) for index, name in enumerate(names)}

    try:
        rows = Layerwise(Net(), batches(), density=0.5, densities="first").prune()["layers"]
        assert [row["kept"] for row in rows] == [144, 36, 36]
    finally:
        densities._items.pop("first")


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"density": 0.5, "densities": "own"}, UnknownNameError, "rule of densities"),
        ({"pattern": "nm:2:4", "densities": "owl"}, BudgetError, "leave densities out"),
        ({"density": 0.5, "pattern": "block:2x2", "rule": "optimal-brain-compression"}, PatternError, "take sparsegpt"),
    ],
)
def test_wrong_input_ends_in_one_sentence(settings, error, text):
    with pytest.raises(error, match=text) as raised:
        Layerwise(Net(), batches(), **settings).prune()
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------------ exact OBS
def layer(columns=10, rows=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x / 60


def test_each_removal_is_the_one_that_costs_least_and_costs_are_the_errors():
    weight, moments = layer()
    hessian = 2 * moments + 0.1 * torch.eye(10, dtype=torch.float64)
    order, costs = removal_costs(weight, torch.linalg.inv(hessian), 4)
    for row, sequence, cost in zip(weight, order, costs, strict=True):
        gone: list[int] = []
        for step in range(4):
            tried = {}
            for q in set(range(10)) - set(gone):
                kept = torch.ones(1, 10, dtype=torch.bool)
                kept[0, [*gone, q]] = False
                tried[q] = float(exact_least_squares(row[None], kept, hessian)[1])
            gone.append(int(sequence[step]))
            assert min(tried, key=tried.get) == gone[-1]
            assert abs(tried[gone[-1]] - float(cost[: step + 1].sum())) < 1e-9


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 5)])
def test_exact_obs_is_nearer_than_sparsegpt_on_the_same_counts(pattern):
    weight, moments = layer(40, 8)
    wish = Wish(pattern, 160 if isinstance(pattern, Unstructured) else 0, mask_block=40)
    rule = rules["optimal-brain-compression"]
    exact = rule.prune(weight, rule.prepare(moments[None].clone(), wish), wish)
    greedy = rules["sparsegpt"].prune(weight, inverse_factor(moments[None].clone(), wish.dampening), wish)
    assert int(exact.mask.sum()) == int(greedy.mask.sum()) == (160 if isinstance(pattern, Unstructured) else 128)
    assert not exact.weight[~exact.mask].any()
    assert exact.loss < greedy.loss
    delta = exact.weight - weight
    hessian = 2 * moments
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    assert abs(float(((delta @ hessian) * delta).sum()) / 2 - exact.loss) < 1e-9
    if isinstance(pattern, NM):
        assert bool((pattern.reduce(exact.mask.float()).sum(1) == 2).all())
