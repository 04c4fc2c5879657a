"""Where the methods that search follow their papers: one constraint for search and freeze, ragged blocks, the first update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microglia as mg
from microglia.methods import Acdc, Awg, Pas, Pdp, Smart
from microglia.methods.search_observed import Freeze


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # the layer that the soft search would empty
    return model


def smart(model: nn.Module, **settings: Any) -> Smart:
    known = {"pattern": "unstructured", "density": 0.25, "total_steps": 4, "search": 1.0, "init": "magnitude"}
    return Smart(model, **(known | {"init_temp": 1e-6, "final_temp": 1e-6} | settings))


def test_the_soft_search_keeps_the_best_unit_of_each_layer_and_so_does_the_freeze() -> None:
    pruner = smart(two_layers())
    factors = pruner.factors().detach()
    best = int(pruner.ranking()[64:].argmax())
    assert factors[64:].round().nonzero().flatten().tolist() == [best]
    assert float(factors.sum()) == pytest.approx(32, abs=1e-4)
    kept = pruner.choose(pruner.ranking())
    assert torch.equal(factors.round().bool(), kept)  # soft and exact masks obey one constraint
    pruner.finish()
    assert int(pruner.masks["2.weight"].sum()) == 1


def test_a_layer_may_be_emptied_where_that_is_allowed_in_search_and_freeze_alike() -> None:
    pruner = smart(two_layers(), allow_empty=True)
    assert float(pruner.factors().detach()[64:].sum()) == pytest.approx(0, abs=1e-4)
    assert not pruner.choose(pruner.ranking())[64:].any()


def test_pdp_ranks_a_block_at_the_edge_by_the_mean_of_what_it_holds() -> None:
    """10 x 8 in blocks of 4 x 8: rows 8 and 9 are a block of 16 weights. All weights 1, those of the first block 0.9."""
    model = nn.Sequential(nn.Linear(8, 10, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[:4] = 0.9
    pruner = Pdp(model, pattern="block:4x8", density=0.6, total_steps=4, search=1.0)
    torch.testing.assert_close(pruner.ranking().detach(), torch.tensor([0.9, 1.0, 1.0]))
    assert pruner.choose(pruner.ranking()).tolist() == [False, True, True]  # by the norm, 5.1 > 4, the last one would go


class Residual(nn.Module):
    """A sum of two layers, and one layer inside: two filters write each channel of the sum, one each inner channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False)
        self.outer, self.head = nn.Linear(5, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.outer(torch.relu(self.inner(x)))))


@pytest.mark.parametrize(("kind", "order"), [(Pdp, 2), (Acdc, 1)])
def test_channels_rank_by_the_norm_of_a_filter(kind: type[Pdp] | type[Acdc], order: int) -> None:
    """The norm of a whole filter (spec 4.2 and 6.1), and its mean of order p over the layers that write a channel."""
    torch.manual_seed(0)
    model = Residual()
    pruner = kind(model, pattern="channel", density=0.5, total_steps=100, example_inputs=torch.zeros(1, 4))
    inner, *outer = (
        torch.linalg.vector_norm(layer.weight.detach(), order, 1) for layer in (model.inner, model.stem, model.outer)
    )
    sums = torch.stack(outer).pow(order).mean(0).pow(1 / order)
    found = dict(zip(pruner.units.names, pruner.ranking().detach().split(list(pruner.units.lengths)), strict=True))
    torch.testing.assert_close(found["inner.weight"], inner)
    torch.testing.assert_close(next(v for name, v in found.items() if name != "inner.weight"), sums)


@pytest.mark.parametrize(("updates", "begin", "expected"), [(1, 0.0, [1]), (4, 0.0, [1, 5, 10, 15]), (2, 0.2, [8, 14])])
def test_awg_prunes_at_the_start_of_each_part_of_the_search(updates: int, begin: float, expected: list[int]) -> None:
    x = torch.randn(4, 8)
    evidence = mg.scores.Evidence([(x, x)], lambda o, t: (o - t).square().mean())
    share = 0.5 if begin == 0 else 0.3
    total = 40
    pruner = Awg(
        two_layers(), pattern="unstructured", density=0.5, total_steps=total, begin=begin, search=share, updates=updates,
        evidence=evidence,
    )  # fmt: skip
    seen = [math.inf]
    for _ in range(total):
        pruner.step()
        seen.append(pruner.masks.kept)
    assert [step for step in range(1, total + 1) if seen[step] < min(seen[:step]) and seen[step] < 128] == expected
    assert seen[-1] == 64
    assert pruner.freeze_report["step"] == expected[-1]


def test_methods_say_whether_their_masks_are_ever_soft() -> None:
    assert [kind.softens for kind in (Smart, Pdp, Pas, Awg, Acdc)] == [True, True, True, False, False]
    pruner = Acdc(two_layers(), pattern="unstructured", density=0.5, total_steps=40)
    pruner.freeze()
    assert pruner.freeze_report["softens"] is False
    told = pruner.freeze_report | {"soft": {"accuracy": 0.5}, "hard": {"accuracy": 0.5}}
    assert Freeze(**told).softens is False


@pytest.mark.parametrize("name", ["yolov5m_coco", "bisenetv2_cityscapes"])
def test_published_recipes_of_a_small_rate_start_from_plain_magnitudes(name: str, pytestconfig: pytest.Config) -> None:
    text = (pytestconfig.rootpath / "recipes" / "smart" / f"{name}.yaml").read_text()
    assert "init: magnitude" in text
    assert "mask_lr: 0.0001, mask_optimizer: sgd" in text


def test_sgd_at_a_small_rate_moves_plain_magnitudes_and_not_normalized_scores() -> None:
    """The reason: a step moves scores by lr * gradient, which is the same sum of weights in both, on a scale of 0.02 or 1."""
    moved = {}
    for init in ("magnitude", "normalized"):
        model = two_layers()
        pruner = Smart(
            model, pattern="unstructured", density=0.25, total_steps=4, search=1.0, init=init, mask_lr=1e-4,
            mask_optimizer="sgd", init_temp=0.1, final_temp=0.1,
        )  # fmt: skip
        scores: Tensor = pruner.soft.scores
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        moved[init] = float((1e-4 * scores.grad).norm() / scores.detach().std())
    assert moved["normalized"] < moved["magnitude"]
